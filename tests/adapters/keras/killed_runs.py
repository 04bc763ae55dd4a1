"""Runs that are really killed: each in a process of its own, at an exact place of saving, by SIGKILL.

``python killed_runs.py FOLDER PLACE ORDER ...`` leaves in FOLDER/PLACE-ORDER what a killed run leaves on disk. The
processes are forks of this one, which has imported Keras and computed nothing.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: E402
import keras  # noqa: E402

from mfac_core import files  # noqa: E402
from mfac_keras import MFACPruningCallback, callback  # noqa: E402

with contextlib.suppress(ImportError):
    import tensorflow  # noqa: F401 (Keras wants it to save, on each backend, and importing it takes long)

EPOCHS = 6
KILLED_IN = 3  # the epoch, from 0, at the end of which a run is killed
ORDERS = ("pruning first", "backup first")
PLACES = ("in the state", "between the two", "in the weights", "before the epoch", "after both")


def callbacks_of(folder, order):
    """The callbacks of a script that is started again after it was killed, and what it is started with."""
    task = conftest.TinyTask()
    recipe = task.recipe(start_epoch=2.0, end_epoch=5.0, num_grads=7)
    pruning = MFACPruningCallback(recipe, state_path=folder / "pruning.npz", verbose=0)
    backup = keras.callbacks.BackupAndRestore(str(folder / "backup"), double_checkpoint=True, delete_checkpoint=False)
    return pruning, [pruning, backup] if order == "pruning first" else [backup, pruning]


def train(folder, order, *others, epochs=EPOCHS):
    """Train, or go on."""
    task = conftest.TinyTask()
    model = task.model(keras.optimizers.Adam(0.01))
    pruning, callbacks = callbacks_of(folder, order)
    task.fit(model, *callbacks, *others, epochs=epochs)
    return model, pruning


def killed(folder, place, order):
    """Train, and be killed."""
    epoch = -1
    backup = keras.callbacks.BackupAndRestore
    save_model, save_weights, write_state = backup._save_model, keras.Model.save_weights, callback.write_state

    class Count(keras.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            nonlocal epoch
            epoch = number

    def kill(*args, **kwargs):
        if epoch == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)

    def half(self, filepath, **options):
        save_weights(self, filepath, **options)
        if epoch == KILLED_IN:
            with open(filepath, "r+b") as file:
                file.truncate(os.path.getsize(filepath) // 2)
            kill()

    def after(function):
        def replaced(*args, **kwargs):
            function(*args, **kwargs)
            kill()

        return replaced

    if place == "in the state":
        files.os.fsync = kill
    elif place == "between the two":
        callback.write_state = after(write_state)
    elif place == "in the weights":
        keras.Model.save_weights = half
    elif place == "before the epoch":
        keras.Model.save_weights = after(save_weights)
    else:
        backup._save_model = after(save_model)
    train(folder, order, Count())


def main(folder, *cases):
    """Kill one run after the other."""
    for place, order in zip(cases[::2], cases[1::2], strict=True):
        pid = os.fork()
        if not pid:
            if conftest.BACKEND == "tensorflow":
                conftest._two_virtual_cpus()
            killed(Path(folder) / f"{place}-{order}", place, order)
            os._exit(1)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"the run was not killed {place}, {order}: status {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
