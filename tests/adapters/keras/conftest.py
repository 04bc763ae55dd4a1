"""A tiny training run that the tests share, and the plugin that notes which features a backend passes.

The backend is the one that ``KERAS_BACKEND`` names, ``tensorflow`` by default; each needs a process of its own.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

BACKEND = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests count on two virtual devices of the CPU
if BACKEND == "jax":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # tests compile the same steps: once for all of their processes
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mfac-jax-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

try:
    import keras
except ImportError:
    keras = None

ONCE_ON = "torch"  # the backend of the tests that no backend can change: it compiles nothing
STEPS_PER_EPOCH = 5
COMPILERS = ("g++", "c++", "clang++")
REPORT = "MFAC_KERAS_FEATURES"  # where to write the outcome of each feature, as JSON


def pytest_configure(config):
    config.addinivalue_line("markers", "feature(name): what the test shows, a row of the matrix of backends")
    config.addinivalue_line("markers", "backends(*names): the backends of Keras that have what the test is about")
    config.addinivalue_line("markers", f"once: no backend can change what the test shows; it runs on {ONCE_ON}")
    config.addinivalue_line("markers", "needs(*names): names in keras.optimizers that older versions of Keras lack")
    config.addinivalue_line("markers", "jit_compile: the test compiles the training step, with torch.compile on torch")
    # Keras on TensorFlow asks for arrays in a way that NumPy 2 warns about.
    config.addinivalue_line(
        "filterwarnings",
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:keras[.]src",
    )
    if keras is not None and BACKEND == "tensorflow":
        _two_virtual_cpus()


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("feature")
    if marker is not None:
        item.user_properties.append(("feature", marker.args[0]))
    marker = item.get_closest_marker("backends")
    if marker is not None and BACKEND not in marker.args:
        pytest.skip(f"is about {', '.join(marker.args)}; Keras runs on {BACKEND}")
    if item.get_closest_marker("once") and BACKEND != ONCE_ON and REPORT not in os.environ:
        pytest.skip(f"no backend can change what it shows: it runs on {ONCE_ON}")
    marker = item.get_closest_marker("needs")
    missing = [name for name in marker.args if not hasattr(keras.optimizers, name)] if marker else []
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, which keras {keras.__version__} does not have")
    compiles = item.get_closest_marker("jit_compile") and BACKEND == "torch"
    if compiles and not any(map(shutil.which, COMPILERS)):
        pytest.skip(f"needs a C++ compiler: torch.compile finds none of {', '.join(COMPILERS)}")


def _two_virtual_cpus():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


class Features:
    """Notes the outcome of the tests of each feature."""

    def __init__(self, path):
        self.path = Path(path)
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        feature = dict(report.user_properties).get("feature")
        if feature is not None and (report.when == "call" or report.outcome != "passed"):
            self.outcomes.setdefault(feature, []).append(report.outcome)

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.outcomes, indent=1), encoding="utf-8")


def pytest_sessionstart(session):
    if REPORT in os.environ and not hasattr(session.config, "workerinput"):  # workers report to the first process
        session.config.pluginmanager.register(Features(os.environ[REPORT]))


class TinyTask:
    """Fixed data of 5 batches per epoch, and small models."""

    steps_per_epoch = STEPS_PER_EPOCH

    def __init__(self):
        rng = np.random.default_rng(7)
        self.x = rng.standard_normal((80, 6)).astype("float32")
        self.y = rng.standard_normal((80, 3)).astype("float32")
        self.batch_size = 16

    @staticmethod
    def model(optimizer="adam", *, hidden=None, **compile_options):
        """A network of two dense layers, the first of which may be another."""
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input([6]),
                hidden or keras.layers.Dense(8, activation="tanh", name="body"),
                keras.layers.Dense(3, name="head"),
            ],
            name="tiny",
        )
        model.compile(optimizer, "mse", **compile_options)
        return model

    def fit(self, model, *callbacks, epochs=4, **options):
        """Train on the same batches in each epoch."""
        options = {"batch_size": self.batch_size, "shuffle": False, "verbose": 0} | options
        return model.fit(self.x, self.y, epochs=epochs, callbacks=list(callbacks), **options)

    def batch(self, number):
        """The inputs and targets of a batch."""
        rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
        return self.x[rows], self.y[rows]

    @staticmethod
    def recipe(modifier="MFACPruningModifier", **keys):
        """A recipe that prunes in epochs 1, 2 and 3, which are steps 5, 10 and 15."""
        schedule = {
            "params": "__ALL_PRUNABLE__",
            "init_sparsity": 0.2,
            "final_sparsity": 0.75,
            "start_epoch": 1.0,
            "end_epoch": 3.0,
            "update_frequency": 1.0,
        }
        of_mfac = {"num_grads": 3, "fisher_block_size": 16, "damp": 0.01} if "MFAC" in modifier else {}
        lines = "".join(f"    {key}: {value}\n" for key, value in (schedule | of_mfac | keys).items())
        return f"pruning_modifiers:\n  - !{modifier}\n{lines}"

    @staticmethod
    def kernels(model):
        """Name and values of each weight that has more than one axis."""
        return {v.path: v.numpy() for v in model.trainable_variables if len(v.shape) > 1}


@pytest.fixture
def task():
    return TinyTask()


@pytest.fixture(scope="session")
def two_replicas():
    """A strategy over two CPUs: one for all tests, because TensorFlow mixes up what two of them reduce in a process."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def watch():
    """A callback that counts pruned weights, and what optimizers remember of them, that are not zero."""

    class Watch(keras.callbacks.Callback):
        def __init__(self, pruning):
            super().__init__()
            self.pruning = pruning
            self.steps = self.grown = 0
            self.optimizer_state = Counter()  # by variable

        def on_train_batch_end(self, batch, logs=None):
            from mfac_keras.optimizers import innermost

            self.steps += bool(self.pruning.masks)
            variables = {variable.path: variable for variable in self.model.trainable_variables}
            for name, mask in self.pruning.masks.items():
                value = variables[name].numpy()
                self.grown += int(np.count_nonzero(value[~mask])) + int(np.signbit(value[~mask]).sum())
                for leaf in innermost(self.model.optimizer):
                    for slot in leaf.variables:  # Keras names it after its variable
                        if name.replace("/", "_") in slot.path and slot.shape == mask.shape:
                            self.optimizer_state[name] += int(np.count_nonzero(slot.numpy()[~mask]))

    return Watch
