"""Keras on CUDA devices: weights and gradients that stay there on their way to the core and back.

Keras runs on the backend that ``KERAS_BACKEND`` names, ``torch`` by default; each needs a process of its own.
"""

import os

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the memory, and
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # TensorFlow all of it
keras = pytest.importorskip("keras")
pytest.importorskip(os.environ["KERAS_BACKEND"])

from mfac_core import MFACPruner, load_recipe, make_pruner  # noqa: E402
from mfac_core.backends import lookup  # noqa: E402
from mfac_keras import MFACPruningCallback, conversion  # noqa: E402
from mfac_keras.backends import current_backend  # noqa: E402

BACKEND = keras.backend.backend()
VALUES = np.random.default_rng(0).standard_normal((6, 4)).astype("float32")
SCHEDULE = {"init_sparsity": 0.2, "final_sparsity": 0.75, "start_epoch": 1.0, "end_epoch": 3.0}
SETTINGS = SCHEDULE | {"update_frequency": 1.0, "num_grads": 3, "fisher_block_size": 16, "damp": 0.01}
STEPS_PER_EPOCH = 5


@pytest.fixture(autouse=True)
def _keras_uses_the_gpu():
    if device_of(keras.Variable(VALUES)) == "cpu":
        pytest.skip(f"needs Keras on a CUDA device; {BACKEND} computes on the CPU here")


def device_of(variable):
    if BACKEND == "torch":
        return variable.value.device.type
    if BACKEND == "jax":
        return next(iter(variable.value.devices())).platform
    return "cpu" if "CPU" in variable.value.device else "gpu"


def address_of(variable):
    if BACKEND == "torch":
        return variable.value.data_ptr()
    return variable.value.unsafe_buffer_pointer() if BACKEND == "jax" else None


def new_model(**compile_options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input([6]), keras.layers.Dense(8, activation="tanh", name="body"), keras.layers.Dense(3, name="head")]
    )
    model.compile("adam", "mse", **compile_options)
    return model


def fit(model, *callbacks):
    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((80, 6)).astype("float32"), rng.standard_normal((80, 3)).astype("float32")
    model.fit(x, y, batch_size=16, shuffle=False, epochs=4, verbose=0, callbacks=list(callbacks))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_tensor_becomes_a_cupy_array_of_its_values(dtype):
    if BACKEND == "jax" and dtype == "float64":
        pytest.skip("JAX computes in float32 where float64 is not switched on")
    variable = keras.Variable(VALUES, dtype=dtype)
    array = current_backend().to_array(variable)
    assert isinstance(array, cupy.ndarray)
    assert array.dtype == ("float64" if dtype == "float64" else "float32")
    wanted = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
    np.testing.assert_array_equal(cupy.asnumpy(array).astype("float32"), wanted)


def test_the_array_shares_memory_on_torch_alone():
    # torch computes on the stream that the core reads on; the others could reuse memory before the core has read it
    variable = keras.Variable(VALUES)
    array = current_backend().to_array(variable)
    assert (array.data.ptr == address_of(variable)) == (BACKEND == "torch")


@pytest.mark.parametrize("trainable", [True, False])
def test_a_variable_takes_a_transposed_cupy_array(trainable):
    variable = keras.Variable(np.zeros_like(VALUES), trainable=trainable)
    array = cupy.asarray(VALUES.T.copy()).T
    tensor = current_backend().to_tensor(array)
    if BACKEND == "torch":
        assert tensor.data_ptr() == array.data.ptr
    else:
        assert isinstance(tensor, np.ndarray)
    variable.assign(tensor)
    array[:] = 7  # the variable has memory of its own
    cupy.cuda.Device().synchronize()
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), VALUES)
    assert device_of(variable) != "cpu"


@pytest.mark.skipif(BACKEND != "torch", reason="the other backends have streams of their own")
def test_on_a_stream_of_its_own_torch_gives_arrays_in_host_memory():
    import torch

    variable = keras.Variable(VALUES)
    with torch.cuda.stream(torch.cuda.Stream()):
        array = current_backend().to_array(variable)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, VALUES)


def test_an_array_keeps_its_values_when_the_framework_goes_on():
    to_array = current_backend().to_array
    variable = keras.Variable(np.zeros((512, 512), "float32"))
    arrays = []
    for step in range(50):
        variable.assign(keras.ops.full((512, 512), float(step)))
        array = to_array(variable)
        arrays.append(array.copy() if BACKEND == "torch" else array)
    assert [float(array.min()) for array in arrays] == [float(array.max()) for array in arrays] == list(range(50))


@pytest.fixture
def calls(monkeypatch):
    """What the core was asked for, with all arrays in host memory: ``("observe", gradients)``, ``("prune", ...)``."""
    calls = []
    observe, prune = MFACPruner.observe, MFACPruner.prune

    def note_observe(self, gradients):
        calls.append(("observe", from_gpu(gradients)))
        return observe(self, gradients)

    def note_prune(self, weights, step=None):
        weights_before = from_gpu(weights)
        result = prune(self, weights, step)
        calls.append(("prune", weights_before, step, from_gpu(result.masks)))
        return result

    monkeypatch.setattr(MFACPruner, "observe", note_observe)
    monkeypatch.setattr(MFACPruner, "prune", note_prune)
    return calls


def from_gpu(arrays):
    assert all(isinstance(array, cupy.ndarray) for array in arrays.values())
    return {name: cupy.asnumpy(array) for name, array in arrays.items()}


@pytest.mark.parametrize("jit", [False, "auto"])
@pytest.mark.parametrize("devices", [["cuda:0"], ["cpu"]])
def test_masks_hold_and_are_those_of_the_core_on_the_cpu(calls, monkeypatch, jit, devices):
    grown = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kernels = {v.path: keras.ops.convert_to_numpy(v) for v in self.model.trainable_variables}
            grown.extend(np.count_nonzero(kernels[name][~mask]) for name, mask in pruning.masks.items())

    pruning = MFACPruningCallback(**SETTINGS, available_devices=devices, verbose=0)
    fit(new_model(jit_compile=jit), pruning, Watch())
    assert len(grown) > 20
    assert not any(grown)
    assert pruning.sparsity == 0.75
    monkeypatch.undo()
    assert [call[0] for call in calls] == ["observe", "observe", "observe", "prune"] * 3
    assert_masks_are_those_of_the_core(calls)


def assert_masks_are_those_of_the_core(calls):
    keys = "".join(f"  {key}: {value}\n" for key, value in SETTINGS.items())
    settings = load_recipe(f"m_modifiers:\n- !MFACPruningModifier\n{keys}").pruning[0]
    pruner = make_pruner(settings, calls[0][1], steps_per_epoch=STEPS_PER_EPOCH)
    for kind, arrays, *of_prune in calls:
        if kind == "observe":
            assert pruner.observe(arrays)
        else:
            step, masks = of_prune
            for found, wanted in zip(masks.values(), pruner.prune(arrays, step).masks.values(), strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_without_cupy_the_pruning_step_works_in_host_memory_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(lookup, "_has_cupy", lambda: False)
    conversion._array_device.cache_clear()
    try:
        array = current_backend().to_array(keras.Variable(VALUES))
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, VALUES)
        fit(new_model(), MFACPruningCallback(**SETTINGS, verbose=0))
    finally:
        conversion._array_device.cache_clear()
    assert caplog.text.count("tensors on GPU 0 are copied to host memory") == 1
