"""Runs in several processes of JAX, on the CPU: each run is a function here, called in each process.

``python jax_processes.py FOLDER SIZE RUN ...`` leaves in FOLDER/RUN-RANK.pickle what a run has returned, or raised, and
what it has logged. The processes are forks of this one, which has imported Keras and computed nothing.
"""

import contextlib
import logging
import os
import pickle
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: E402
import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

from mfac_core import RankError  # noqa: E402
from mfac_keras import (  # noqa: E402
    MFACPruningCallback,
    live_pruning,
    prune_one_shot,
    recalibrate_batchnorm,
    sensitivity,
)
from mfac_keras.backends.jax_ranks import jax_ranks  # noqa: E402

TASK = conftest.TinyTask()
EPOCHS = 6
SAVED = 4  # the epoch at which a run is saved and goes on in another number of processes
RESUMED = {"start_epoch": 2.0, "end_epoch": 5.0, "update_frequency": 3.0, "num_grads": 7}  # rows are collected then


@contextlib.contextmanager
def data_parallel(**options):
    """Models are made on the devices of all processes; each process passes its own part of the data."""
    with keras.distribution.DataParallel(auto_shard_dataset=False, **options).scope():
        yield


def part(array):
    """The part of each batch that is this process's."""
    rank, size = jax.process_index(), jax.process_count()
    batches = array.reshape(-1, TASK.batch_size, *array.shape[1:])
    mine = batches.reshape(len(batches), size, TASK.batch_size // size, *array.shape[1:])[:, rank]
    return mine.reshape(-1, *array.shape[1:])


def fit(model, *callbacks, **options):
    """Train on the same batches in each epoch, in any number of processes."""
    options = {"batch_size": TASK.batch_size // jax.process_count(), "shuffle": False, "verbose": 0} | options
    return model.fit(part(TASK.x), part(TASK.y), callbacks=list(callbacks), **{"epochs": 4} | options)


def outcome(model, masks, **more):
    """What all processes, and one alone, must agree on."""
    return {"masks": masks, "weights": model.get_weights(), **more}


def trained(recipe, *, epochs=4, sampler=None):
    """Train and prune."""
    with data_parallel():
        model = TASK.model(keras.optimizers.Adam(0.01))
        pruning = MFACPruningCallback(recipe, sampler=sampler, verbose=1)
        history = fit(model, pruning, epochs=epochs)
        return outcome(model, pruning.masks, history=history.history["sparsity"])


def samples(*, poisoned=()):
    """Small batches to sample gradients from, some of which contain NaN."""
    batches = [(TASK.x[start : start + 8], TASK.y[start : start + 8]) for start in range(0, 72, 8)]
    return [(x * np.nan if number in poisoned else x, y) for number, (x, y) in enumerate(batches)]


# the runs, in any number of processes


def by_layer(folder):
    """Each layer has the same sparsity."""
    return trained(TASK.recipe())


def by_all(folder):
    """All weights compete; the blocks do not divide evenly."""
    keys = {"global_sparsity": "true", "update": "joint", "damp": "auto"}
    return trained(TASK.recipe(fisher_block_size=13, num_recomputations=2, **keys))


def in_one_block(folder):
    """A single process computes it."""
    return trained(TASK.recipe(fisher_block_size="null"))


def by_magnitude(folder):
    """There are no gradients."""
    return trained(TASK.recipe("MagnitudePruningModifier"))


def in_phases(folder):
    """Masks are released again, and the state of the optimizer with them."""
    return trained(
        "pruning_modifiers:\n  - !ACDCPruningModifier {compression_sparsity: 0.6, start_epoch: 0.0, end_epoch: 4.0, "
        "update_frequency: 1.0, params: __ALL_PRUNABLE__, momentum_buffer_reset: true}"
    )


def sampled(folder):
    """Gradient samples are drawn at pruning steps; their number does not divide evenly, and one is refused."""
    return trained(TASK.recipe(num_grads=7), sampler=samples(poisoned=[3]))


def from_tf_data(folder):
    """Keras itself shards the data."""
    import tensorflow as tf

    with keras.distribution.DataParallel().scope():
        model = TASK.model("sgd")
        # TensorFlow does not know the length of what Keras has sharded
        pruning = MFACPruningCallback(TASK.recipe(), steps_per_epoch=TASK.steps_per_epoch, verbose=0)
        data = tf.data.Dataset.from_tensor_slices((TASK.x, TASK.y)).batch(TASK.batch_size)
        model.fit(data, epochs=4, shuffle=False, verbose=0, callbacks=[pruning])
        return outcome(model, pruning.masks)


def normalized():
    """A model with batch normalization."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, name="body"), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input([6]), *layers], name="tiny")


def recalibrated(folder):
    """Each process has other data."""
    with data_parallel():
        model = normalized()
        recalibrate_batchnorm(model, samples()[:8][jax.process_index() :: jax.process_count()])
        return outcome(model, {})


def one_shot(folder):
    """A model with batch normalization is pruned, and its statistics are recalibrated."""
    with data_parallel():
        model = normalized()
        options = {"sparsity": 0.6, "num_grads": 5, "num_recomputations": 2, "fisher_block_size": 20}
        masks = prune_one_shot(model, samples(), "mse", recalibrate_batchnorm=True, verbose=1, **options)
        return outcome(model, masks)


def by_groups(folder):
    """Weights that a pattern selects, with a warning, are sampled and pruned two at a time."""
    with data_parallel():
        model = normalized()
        options = {"sparsity": 0.5, "num_grads": 5, "fisher_block_size": 20, "global_sparsity": False}
        masks = prune_one_shot(model, samples(), "mse", params=["re:.*"], layers_at_once=2, **options)
        return outcome(model, masks)


def saved(folder):
    """Stop in the middle of a window, and leave the model and the state of the pruning."""
    with data_parallel():
        model = TASK.model(keras.optimizers.Adam(0.01))
        pruning = MFACPruningCallback(TASK.recipe(**RESUMED), state_path=folder / "state" / "pruning.npz", verbose=0)
        fit(model, pruning, epochs=SAVED)
        model.save(folder / f"model-{jax.process_index()}.keras")  # collective, because Keras makes an optimizer for it
        return outcome(model, pruning.masks)


def resumed(folder):
    """Go on from what ``saved`` has left."""
    with data_parallel():
        keras.utils.set_random_seed(0)  # Keras wants the same initial weights in all processes
        model = keras.models.load_model(folder / "model-0.keras")
        pruning = MFACPruningCallback(TASK.recipe(**RESUMED), state_path=folder / "state" / "pruning.npz", verbose=0)
        fit(model, pruning, initial_epoch=SAVED, epochs=EPOCHS)
        return outcome(model, pruning.masks)


def backed_up(folder):
    """Go on in the same number of processes, each from a backup of its own."""
    for epochs in (SAVED, EPOCHS):
        with data_parallel():
            model = TASK.model(keras.optimizers.Adam(0.01))
            pruning = MFACPruningCallback(TASK.recipe(**RESUMED), state_path=folder / "backed-up.npz", verbose=0)
            place = folder / f"backup-{jax.process_index()}"
            backup = keras.callbacks.BackupAndRestore(str(place), delete_checkpoint=False)
            fit(model, pruning, backup, epochs=epochs)
    return outcome(model, pruning.masks)


def documented(folder):
    """The script of docs/keras.md."""
    page = (Path(__file__).parents[3] / "docs" / "keras.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    given = {"build": TASK.model, "recipe": TASK.recipe(), "x": TASK.x, "y": TASK.y}
    initialize, keras.distribution.initialize = keras.distribution.initialize, lambda: None  # done for all runs
    try:
        os.chdir(folder)
        names = {"MFACPruningCallback": MFACPruningCallback, **given}
        exec(compile(block, "docs/keras.md", "exec"), names)
    finally:
        keras.distribution.initialize = initialize
        keras.distribution.set_distribution(None)
    return outcome(names["model"], names["pruning"].masks)


def without_interruption(folder):
    """What ``resumed`` must end with."""
    return trained(TASK.recipe(**RESUMED), epochs=EPOCHS)


def without_distribution(folder):
    """Each process would train on its own."""
    fit(TASK.model(), MFACPruningCallback(TASK.recipe()))


def on_its_own_devices(folder):
    """The same, by a distribution over the devices of one process."""
    with data_parallel(devices=[f"{device.platform}:{device.id}" for device in jax.local_devices()]):
        prune_one_shot(TASK.model(), samples(), sparsity=0.5)


def sharded(folder):
    """No process has all weights."""
    devices = keras.distribution.list_devices()
    layouts = keras.distribution.LayoutMap(
        keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    )
    layouts[".*body/kernel"] = (None, "model")
    with keras.distribution.ModelParallel(layout_map=layouts, auto_shard_dataset=False).scope():
        prune_one_shot(TASK.model(), samples(), sparsity=0.5)


def measured(folder):
    """How much sparsity each layer tolerates."""
    with data_parallel():
        sensitivity(TASK.model(), samples(), progress=False)


def with_other_recipes(folder):
    """The last process prunes to another schedule."""
    is_last = jax.process_index() == jax.process_count() - 1
    trained(TASK.recipe(update_frequency=0.5 if is_last else 1.0))


def failing_once(folder):
    """Weights cannot be written on the last process; afterwards the same pruning step is done again."""
    write, calls = live_pruning.KerasPruning.write, []

    def fail(self, weights):
        calls.append(1)
        if len(calls) == 2 and jax.process_index() == jax.process_count() - 1:
            raise OSError("not today")
        write(self, weights)

    with data_parallel():
        model = TASK.model(keras.optimizers.Adam(0.01))
        pruning = MFACPruningCallback(TASK.recipe(), verbose=0)
        live_pruning.KerasPruning.write = fail
        try:
            fit(model, pruning)
            raised = None
        except Exception as error:
            raised = f"{type(error).__name__}: {error}"
        finally:
            live_pruning.KerasPruning.write = write
        return outcome(model, pruning.masks, raised=raised)


def killed(folder):
    """The last process is killed in the third epoch."""

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2 and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    with data_parallel():
        pruning = MFACPruningCallback(TASK.recipe(), state_path=folder / "killed.npz", verbose=0)
        fit(TASK.model(), pruning, Kill())


def exchange(folder):
    """Exchange arrays of all lengths, and sum."""
    ranks = jax_ranks()
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 5000, (ranks.size, ranks.size))
    lengths[0] = 0
    lengths[-1, -1] = 70_000
    lengths[-1, 0] = 1 << 15  # a power of two, and of several rounds
    found = {}
    for dtype in ("float32", "float64", "int64", "uint8"):
        parts = [[rng.integers(-99, 99, length).astype(dtype) for length in of_rank] for of_rank in lengths]
        received = ranks.exchange(parts[ranks.rank])
        found[dtype] = [np.array_equal(a, sent[ranks.rank]) for a, sent in zip(received, parts, strict=True)]
        found[dtype] += [each.dtype == dtype for each in received]
    numbers = rng.standard_normal((ranks.size, 3, 5)), rng.integers(-(2**60), 2**60, (ranks.size, 7)) // ranks.size
    summed = [ranks.sum(each[ranks.rank]) for each in numbers]
    exact = [sum(each, start=np.zeros_like(each[0])) for each in numbers]
    return {"found": found, "summed": summed, "exact": exact, "rank": ranks.rank, "size": ranks.size}


def process(rank, size, port, folder, runs):
    """Be one of the processes."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={os.environ.get('DEVICES', '1')}"
    jax.distributed.initialize(
        f"localhost:{port}", size, rank, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=20
    )
    for name in runs:
        logged, start = [], time.perf_counter()
        handler = logging.Handler()
        handler.emit = lambda record, logged=logged: logged.append((record.levelname, record.getMessage()))
        for library in ("mfac_core", "mfac_keras"):
            logger = logging.getLogger(library)
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.INFO)
        try:
            found = {"found": globals()[name](folder)}
        except Exception as error:
            found = {"raised": type(error).__name__, "message": str(error), "where": traceback.format_exc()}
        found |= {"logged": logged, "seconds": time.perf_counter() - start}
        (folder / f"{name}-{rank}.pickle").write_bytes(pickle.dumps(found))
        try:
            jax_ranks().sum(np.zeros(1))  # the next run may read what this one has written
        except RankError:
            return  # a process was killed, and JAX would wait for it
    jax.distributed.shutdown()


def free_port():
    """A port for the coordinator of the processes."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    folder, size, *runs = sys.argv[1:]
    port, children = free_port(), []
    for rank in range(int(size)):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                process(rank, int(size), port, Path(folder), runs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
