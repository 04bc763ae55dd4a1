"""Where weights and the gradient window are kept, and gradients that arrive from another device during training."""

from __future__ import annotations

import numpy as np
import pytest

from mfac_core import (
    ACDCSettings,
    ConstantSettings,
    DeviceError,
    MagnitudeSettings,
    MemoryBudgetError,
    MFACPruner,
    MFACSettings,
    make_pruner,
)
from mfac_core.backends import Device, lookup, resolve_device
from mfac_core.fisher.partition import BlockGroup, working_bytes
from mfac_core.pruners.memory import WindowMemory, choose_window_device
from mfac_core.schedules.pruning import pruning_schedule
from tests.core.strict_backend import StrictBackend, strict_devices

SETTINGS = MFACSettings(
    initial_sparsity=0.1,
    final_sparsity=0.8,
    start_epoch=1,
    end_epoch=3,
    num_gradients={0.0: 5, 0.5: 8},
    block_size=7,
    damping=1e-3,
)
STEPS = 8
SHAPES = {"a": (5, 6), "b": (11,)}


class Accelerator(StrictBackend):
    """Virtual devices that training happens on; counts waits, requests for host memory, and numbers that are moved."""

    def __init__(self, free_bytes=10**9):
        super().__init__(free_bytes=free_bytes)
        self.waited = 0
        self.pinned = 0
        self.moved = {"up": [], "down": []}  # shapes of floating-point arrays

    def asarray(self, x, device, dtype=None):
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            self.moved["up"].append(x.shape)
        return super().asarray(x, device, dtype)

    def to_numpy(self, x):
        if not isinstance(x, np.ndarray) and "float" in str(x.dtype):
            self.moved["down"].append(x.shape)
        return super().to_numpy(x)

    def fetch(self, x):
        def wait():
            self.waited += 1
            return self.to_numpy(x)

        return wait

    def host_zeros(self, shape, dtype):
        self.pinned += 1
        return super().host_zeros(shape, dtype)


@pytest.fixture
def accelerator(monkeypatch):
    backend = Accelerator()

    monkeypatch.setattr(lookup, "_registered", {backend.name: backend})
    return backend


def gradient_at(step):
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def pruner_for(**changes):
    settings = MFACSettings(**{**SETTINGS.__dict__, **changes})
    return MFACPruner(settings, gradient_at(1000), steps_per_epoch=STEPS)


def train(pruner, place, refused=()):
    """Return the weights after a run in which each gradient lies where ``place`` puts it."""
    weights = gradient_at(1000)
    for step in range(3 * STEPS):
        if pruner.needs_gradients(step):
            gradients = gradient_at(step)
            if step in refused:
                gradients["b"][3] = np.nan
            pruner.observe({name: place(array) for name, array in gradients.items()})
        if pruner.is_due(step + 1):
            weights = pruner.prune(weights, step + 1).weights
    return weights


@pytest.mark.parametrize("gradients_device", ["auto", "cpu", "device1", "device2"])
@pytest.mark.parametrize("refused", [(), (7, 18)])
def test_a_run_on_devices_ends_as_one_in_host_memory(gradients_device, refused, accelerator):
    in_host_memory = pruner_for(devices=("cpu",))
    here = train(in_host_memory, np.asarray, refused)
    pruner = pruner_for(devices=("device1", "device2"), gradients_device=gradients_device)
    there = train(pruner, Device(accelerator, "device1").asarray, refused)
    assert pruner.refused_rows == in_host_memory.refused_rows
    assert bool(pruner.refused_rows) == bool(refused)
    assert pruner.is_finished
    for name in SHAPES:
        np.testing.assert_array_equal(there[name] == 0, here[name] == 0)
        np.testing.assert_allclose(there[name], here[name], rtol=1e-4, atol=1e-5)
    assert bool(accelerator.pinned) == (gradients_device == "cpu")


@pytest.mark.parametrize("gradients_device", ["cpu", "device1"])
def test_a_gradient_is_waited_for_only_when_the_next_one_comes(gradients_device, accelerator):
    pruner = pruner_for(devices=("device1",), gradients_device=gradients_device)
    place = Device(accelerator, "device1").asarray
    for count in range(3):
        assert accelerator.waited == max(0, count - 1)
        assert pruner.needs_gradients(STEPS - 3 + count)
        assert not pruner.is_due(STEPS - 3 + count)
        assert pruner.observe({name: place(array) for name, array in gradient_at(count).items()})
    assert accelerator.waited == 2
    assert pruner.num_rows == 3
    assert accelerator.waited == 3


def test_a_gradient_that_is_arriving_is_part_of_the_state_and_can_be_forgotten(accelerator):
    pruner = pruner_for(devices=("device1",))
    place = Device(accelerator, "device1").asarray
    pruner.observe({name: place(array) for name, array in gradient_at(0).items()})
    assert pruner.state_dict()["window"]["rows"].shape == (1, 41)
    pruner.observe({name: place(array) for name, array in gradient_at(1).items()})
    pruner.forget_gradients()
    assert pruner.num_rows == 0


def test_a_gradient_that_is_arriving_takes_part_in_the_pruning_step(accelerator):
    in_host_memory, pruner = (pruner_for(initial_sparsity=0.5, devices=(name,)) for name in ("cpu", "device1"))
    place = Device(accelerator, "device1").asarray
    for step in range(2):
        in_host_memory.observe(gradient_at(step))
        pruner.observe({name: place(array) for name, array in gradient_at(step).items()})
    here, there = in_host_memory.prune(gradient_at(1000)).weights, pruner.prune(gradient_at(1000)).weights
    for name in SHAPES:
        np.testing.assert_allclose(there[name], here[name], rtol=1e-4, atol=1e-5)
    assert pruner.num_rows == 2


def test_a_gradient_that_was_arriving_is_no_part_of_a_state_that_is_loaded(accelerator):
    pruner = pruner_for(devices=("device1",))
    state = pruner.state_dict()
    pruner.observe({name: Device(accelerator, "device1").asarray(array) for name, array in gradient_at(0).items()})
    pruner.load_state_dict(state)
    assert pruner.num_rows == 0


@pytest.mark.parametrize("update", ["independent", "joint"])
def test_weights_do_not_leave_their_device_in_a_pruning_step(update, accelerator):
    """Masks travel, at one byte for each weight; the weights themselves would be four or eight."""
    in_host_memory, pruner = (pruner_for(update=update, devices=(name,)) for name in ("cpu", "device1"))
    place = Device(accelerator, "device1").asarray
    for step in range(5):
        in_host_memory.observe(gradient_at(step))
        pruner.observe({name: place(array) for name, array in gradient_at(step).items()})
    here, weights = gradient_at(1000), {name: place(array) for name, array in gradient_at(1000).items()}
    assert pruner.num_rows == 5
    accelerator.moved = {"up": [], "down": []}
    result = pruner.prune(weights, STEPS)
    vectors = [shape for moved in accelerator.moved.values() for shape in moved if len(shape) == 1 and shape[0] > 10]
    assert not vectors and not set(SHAPES.values()) & {*accelerator.moved["up"], *accelerator.moved["down"]}
    expected = in_host_memory.prune(here, STEPS)
    for name in SHAPES:
        assert isinstance(result.masks[name], np.ndarray) and result.weights[name].device == weights[name].device
        np.testing.assert_array_equal(result.masks[name], expected.masks[name])
        found = accelerator.to_numpy(result.weights[name])
        np.testing.assert_allclose(found, expected.weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("places", [("device1", "device2"), ("cpu", "device1"), ("device1", "cpu")])
@pytest.mark.parametrize(
    "settings",
    [
        MagnitudeSettings(final_sparsity=0.5, end_epoch=0),
        MagnitudeSettings(final_sparsity=0.5, initial_sparsity="__FROM_PARAM__", end_epoch=0),
        ConstantSettings(),
        ACDCSettings(compression_sparsity=0.5, end_epoch=0),
    ],
    ids=lambda each: type(each).__name__,
)
def test_weights_may_be_spread_over_devices(settings, places, accelerator):
    def placed(name, array):
        device = dict(zip(SHAPES, places, strict=True))[name]
        return array if device == "cpu" else Device(accelerator, device).asarray(array)

    here = gradient_at(1000)
    here["a"][0] = 0
    there = {name: placed(name, array) for name, array in here.items()}
    expected, result = (make_pruner(settings, each, steps_per_epoch=1).prune(each) for each in (here, there))
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], expected.masks[name])
        np.testing.assert_array_equal(accelerator.to_numpy(result.weights[name]), expected.weights[name])
        assert type(result.weights[name]) is type(there[name]) and result.weights[name].device == there[name].device


def test_weights_on_a_device_that_are_not_finite_are_refused_unless_they_are_pruned(accelerator):
    place = Device(accelerator, "device1").asarray
    weights, settings = gradient_at(1000), MagnitudeSettings(final_sparsity=0.5, end_epoch=0)
    weights["b"][3] = np.nan
    masks = {name: np.isfinite(array) for name, array in weights.items()}
    there = {name: place(array) for name, array in weights.items()}
    with pytest.raises(ValueError, match="weights contain NaN or Inf in b: training has diverged"):
        make_pruner(settings, there, steps_per_epoch=1).prune(there)
    result = make_pruner(settings, there, steps_per_epoch=1, masks=masks).prune(there)
    assert not result.masks["b"][3] and accelerator.to_numpy(result.weights["b"])[3] == 0


def test_the_first_device_with_room_keeps_the_window():
    class Tight(StrictBackend):
        def free_bytes(self, device):
            return 10_000 if device == "CPU_DEVICE" else 1_000_000

    backend = Tight()
    devices = (resolve_device("cpu"), *strict_devices(3, backend))
    assert choose_window_device("auto", devices, 5_000).name == "CPU_DEVICE"
    assert choose_window_device("auto", devices, 50_000).name == "device1"


def test_the_window_leaves_room_to_work_in():
    (device,) = strict_devices(1, StrictBackend(free_bytes=10_000, group_bytes=1000))
    assert choose_window_device("auto", [device], 4_000) == device
    assert choose_window_device("auto", [device], 4_001).name == "cpu"


def test_a_device_whose_free_memory_is_not_known_does_not_keep_the_window():
    assert choose_window_device("auto", strict_devices(1, StrictBackend(None)), 10).name == "cpu"


def test_without_room_the_window_stays_in_host_memory_and_says_so(caplog):
    assert choose_window_device("auto", strict_devices(2, StrictBackend(1000)), 50_000).name == "cpu"
    assert "50,000" in caplog.text and "CPU_DEVICE, device1" in caplog.text
    caplog.clear()
    assert choose_window_device("auto", (resolve_device("cpu"),), 50_000).name == "cpu"
    assert not caplog.text


def test_a_device_that_is_named_is_taken():
    assert choose_window_device("cpu", strict_devices(1, StrictBackend(10**9)), 10).name == "cpu"
    with pytest.raises(DeviceError, match="gpu7"):
        choose_window_device("gpu7", strict_devices(1), 10)


def test_a_run_needs_its_largest_window_and_room_to_work_in():
    schedule = pruning_schedule(SETTINGS, STEPS)
    rows, columns = WindowMemory(SETTINGS, 41, schedule).peak()
    needed = 4 * rows * columns + 2 * working_bytes(BlockGroup(0, 1, (7,)), rows, 4)
    (enough,), (too_little,) = (strict_devices(1, StrictBackend(free)) for free in (needed, needed - 1))
    assert WindowMemory(SETTINGS, 41, schedule).check(enough) == needed
    with pytest.raises(MemoryBudgetError, match=f"{needed:,}"):
        WindowMemory(SETTINGS, 41, schedule).check(too_little)
