"""Windows in bfloat16: half the memory, and what the rounded rows give in float32."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mfac_core import MemoryBudgetError, MFACPruner, MFACSettings
from mfac_core.backends import Device
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.row_formats import RowFormat, widened
from mfac_core.fisher.window import GradientWindow
from mfac_core.pruners.memory import WindowMemory
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.session.plan import plan_model
from tests import reference

BFLOAT16 = RowFormat.named("bfloat16")
SHAPES = {"a": (6, 20), "b": (37,)}
SETTINGS = MFACSettings(
    final_sparsity=0.8,
    end_epoch=3.0,
    num_gradients={0.0: 6, 0.5: 4},
    block_size=20,
    damping=1e-2,
    gradients_dtype="bfloat16",
)


def number(pattern: int) -> float:
    """The number that 16 bits are, by the definition of the format: the upper half of a float32."""
    return struct.unpack(">f", struct.pack(">HH", pattern, 0))[0]


FINITE = np.array([number(pattern) for pattern in range(0x7F80)])  # not negative, in ascending order


def nearest(x: float) -> float:
    """The nearest bfloat16, of two equally near the even one, found among all of them."""
    if np.isnan(x):
        return x
    # beyond the largest, rounding goes on as if the exponent had no limit
    beyond = 2.0**128
    values = np.append(FINITE, beyond)
    above = int(np.searchsorted(values, abs(x)))
    if above == len(values):
        return np.copysign(np.inf, x)
    below = above if values[above] == abs(x) else above - 1
    to_above, to_below = values[above] - abs(x), abs(x) - values[below]
    index = above if to_above < to_below or (to_above == to_below and above % 2 == 0) else below
    return float(np.copysign(values[index] if values[index] != beyond else np.inf, x))


def rounded(x: np.ndarray) -> np.ndarray:
    return np.array([nearest(float(each)) for each in x.ravel()], np.float32).reshape(x.shape)


def rows_of(count: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, d)) * np.exp(rng.standard_normal(d))).astype(np.float32)


def filled(rows: np.ndarray, m: int, block_size: int, device="cpu", dtype="bfloat16") -> GradientWindow:
    window = GradientWindow(rows.shape[1], m, block_size=block_size, device=device, dtype=dtype)
    for row in rows:
        window.push(row)
    return window


# --- the format


@given(st.floats(width=32))
@example(float(np.float32(3.3961773e38)))  # the largest that stays finite
@example(float(np.float32(3.3961775e38)))
@example(1.0 + 2.0**-8)  # halfway to the next, which is odd
@example(1.0 + 3 * 2.0**-8)  # halfway to the next, which is even
@example(-1.0 - 2.0**-8 - 2.0**-23)
@example(2.0**-133)  # the smallest
@example(2.0**-134)  # half of it
def test_numbers_are_rounded_to_the_nearest(x):
    stored = BFLOAT16.stored(np.array([x], np.float32))
    assert stored.itemsize == BFLOAT16.itemsize == 2
    np.testing.assert_array_equal(widened(stored), np.array([nearest(x)], np.float32))
    assert np.signbit(widened(stored)[0]) == np.signbit(np.float32(x)) or np.isnan(x)
    assert (abs(x) <= BFLOAT16.largest) == np.isfinite(widened(stored)[0])


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_nan_stays_nan(library, bits):
    x = library.array(np.array([bits], np.uint32).view(np.float32))
    assert np.isnan(library.numpy(widened(BFLOAT16.stored(x)))).all()


def test_all_numbers_are_read_and_stored_again_on_each_library(library):
    patterns = np.arange(2**16, dtype=np.uint16)
    values = np.array([number(int(pattern)) for pattern in patterns], np.float32)
    found = widened(library.array(patterns.view(np.int16)))
    np.testing.assert_array_equal(library.numpy(found), values)
    again = library.numpy(BFLOAT16.stored(found)).view(np.uint16)
    np.testing.assert_array_equal(again[~np.isnan(values)], patterns[~np.isnan(values)])


def test_each_library_rounds_alike(library):
    x = np.random.default_rng(0).integers(0, 2**32, 50_000, np.uint32).view(np.float32)
    found, expected = BFLOAT16.stored(library.array(x)), BFLOAT16.stored(x)
    is_number = ~np.isnan(x)
    np.testing.assert_array_equal(library.numpy(found)[is_number], expected[is_number])


# --- the window


@pytest.mark.parametrize("block_size", [7, 50])
def test_a_window_holds_the_rounded_rows_in_half_the_memory(library, block_size):
    rows = rows_of(7, 20)
    window = filled(rows, 4, block_size, library.device)
    expected = filled(rounded(rows), 4, block_size, dtype=np.float32)
    assert window.to_rows().dtype == window.dtype == np.float32
    np.testing.assert_array_equal(window.to_rows(), expected.to_rows())
    assert window.num_bytes == expected.num_bytes / 2 == 4 * 20 * 2
    chunks = [chunk for group in window.stored_groups for chunk in window.chunks(group)]
    assert sum(library.numpy(chunk).nbytes for chunk in chunks) == window.num_bytes
    columns = [library.numpy(widened(chunk)).swapaxes(0, 1).reshape(4, -1) for chunk in chunks]
    np.testing.assert_array_equal(np.concatenate(columns, axis=1), expected.to_rows())
    kept = np.arange(20) % 3 > 0
    for more in (2, 4, 6):
        rebuilt = window.rebuilt(kept, more)
        assert rebuilt.num_bytes == more * int(kept.sum()) * 2
        np.testing.assert_array_equal(rebuilt.to_rows(), expected.rebuilt(kept, more).to_rows())


@pytest.mark.parametrize("pushes", [3, 4, 6])
def test_a_state_keeps_the_stored_form_and_is_read_by_each_library(library, pushes):
    window = filled(rows_of(pushes, 20), 4, 7)
    state = window.state_dict()
    assert state["rows"].itemsize == 2
    resumed = GradientWindow(20, 4, block_size=7, device=library.device, dtype="bfloat16")
    resumed.load_state_dict(state)
    for row in rows_of(3, 20, seed=1):
        np.testing.assert_array_equal(resumed.state_dict()["rows"], window.state_dict()["rows"])
        assert resumed.state_dict()["position"] == window.state_dict()["position"]
        window.push(row)
        resumed.push(row)


@pytest.mark.parametrize("saved", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_state_of_another_dtype_is_refused_by_name(saved, wanted):
    state = filled(rows_of(2, 20), 4, 7, dtype=saved).state_dict()
    window = filled(rows_of(1, 20), 4, 7, dtype=wanted)
    before = window.to_rows()
    if saved == wanted:
        return window.load_state_dict(state)
    for take in (window.check_state, window.load_state_dict):
        with pytest.raises(ValueError, match=f"window is {saved}, this one is {wanted}; .*grads_dtype in a recipe"):
            take(state)
    np.testing.assert_array_equal(window.to_rows(), before)


def test_a_device_receives_16_bits_per_number():
    received = []

    class Recording(NumpyBackend):
        def stream(self, device, loaders):
            for chunks in super().stream(device, loaders):
                received.extend(chunk.nbytes for chunk in chunks)
                yield chunks

    window = filled(rows_of(5, 40), 5, 10)
    BlockwiseFisher(window, damping=1e-2, devices=Device(Recording(), "cpu")).diagonal()
    assert sum(received) == window.num_bytes == 5 * 40 * 2


@pytest.mark.parametrize("m", [5, 30])
@pytest.mark.parametrize("damping", [1e-2, "auto"])
def test_the_inverse_fisher_is_that_of_the_rounded_rows(library, m, damping):
    rows = rows_of(m, 57)
    window = filled(rows, m, 20, library.device)
    fisher = BlockwiseFisher(window, damping=damping, devices=library.device, rtol=1e-4)
    found = library.numpy(fisher.diagonal()) / fisher.unit
    expected = np.diag(reference.dense_inverse(rounded(rows), damping, 20))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


# --- pruning


def weights_of(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def train(settings, change=np.array, first=0, last=12, pruner=None, weights=None):
    """A run of 12 steps with 4 per epoch; ``change`` is applied to each gradient."""
    weights = weights_of() if weights is None else weights
    pruner = pruner or MFACPruner(settings, weights, steps_per_epoch=4)
    for step in range(first, last):
        if pruner.needs_gradients(step):
            assert pruner.observe({name: change(array) for name, array in weights_of(100 + step).items()})
        while pruner.is_due(step + 1):
            weights = pruner.prune(weights, step + 1).weights
    return pruner, weights


@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_run_is_that_of_float32_on_the_rounded_rows(update, scope):
    settings = replace(SETTINGS, update=update, scope=scope)
    pruner, weights = train(settings)
    expected, others = train(replace(settings, gradients_dtype="float32"), rounded)
    for name in SHAPES:
        np.testing.assert_array_equal(pruner.masks[name], expected.masks[name])
        np.testing.assert_array_equal(weights[name], others[name])
    assert pruner.is_finished and pruner.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_pruning_step_is_the_dense_one_on_the_rounded_rows():
    settings = replace(SETTINGS, start_epoch=3.0, initial_sparsity=0.5, final_sparsity=0.5)
    pruner, weights = train(settings)
    rows = [np.concatenate([array.ravel() for array in weights_of(100 + step).values()]) for step in range(6, 12)]
    expected = reference.prune(
        weights_of(),
        rounded(np.array(rows)),
        sparsity=0.5,
        masks={name: np.ones(shape, bool) for name, shape in SHAPES.items()},
        block_size=20,
        damping=1e-2,
        scope="layer",
        update="independent",
        num_recomputations=1,
    )
    for name in SHAPES:
        np.testing.assert_array_equal(pruner.masks[name], expected.masks[name])
        np.testing.assert_allclose(weights[name], expected.weights[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("killed_at", [3, 5, 7, 10])
def test_a_resumed_run_ends_bit_for_bit_the_same(killed_at):
    whole, expected = train(SETTINGS)
    first, weights = train(SETTINGS, last=killed_at)
    second = MFACPruner(SETTINGS, weights_of(), steps_per_epoch=4)
    second.load_state_dict(first.state_dict())
    resumed, weights = train(SETTINGS, first=killed_at, pruner=second, weights=weights)
    for name in SHAPES:
        np.testing.assert_array_equal(weights[name], expected[name])
        np.testing.assert_array_equal(resumed.masks[name], whole.masks[name])


def test_a_run_is_not_resumed_with_another_dtype():
    state = train(SETTINGS, last=3)[0].state_dict()
    other = MFACPruner(replace(SETTINGS, gradients_dtype="float32"), weights_of(), steps_per_epoch=4)
    with pytest.raises(ValueError, match="window is bfloat16, this one is float32"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "window": None})  # the rows are collected again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_bfloat16_cannot_hold_is_refused_and_counted(library, dtype):
    settings = replace(SETTINGS, gradients_dtype=dtype)
    pruner = MFACPruner(settings, library.arrays(weights_of()), steps_per_epoch=4)
    for value, fits in [(3.3e38, True), (-3.4e38, dtype == "float32"), (np.inf, False), (np.nan, False)]:
        gradients = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
        gradients["b"][5] = value
        rows, refused = pruner.num_rows, pruner.refused_rows
        pruner.observe(library.arrays(gradients))
        assert (pruner.num_rows - rows, pruner.refused_rows - refused) == ((1, 0) if fits else (0, 1))


@pytest.mark.parametrize("seed", range(3))
def test_rounding_moves_fewer_entries_of_the_mask_than_other_samples_do(seed):
    d, m = 4000, 32
    weights = {"w": np.random.default_rng(seed).standard_normal(d).astype(np.float32)}
    settings = MFACSettings(final_sparsity=0.7, end_epoch=0.0, num_gradients=m, block_size=200, damping="auto")

    def mask(dtype: str, sample: int) -> np.ndarray:
        pruner = MFACPruner(replace(settings, gradients_dtype=dtype), weights, steps_per_epoch=1, live_gradients=False)
        for row in rows_of(m, d, seed=10 * seed + sample):
            pruner.observe({"w": row})
        return pruner.prune(weights, 0).masks["w"]

    usual = mask("float32", 1)
    by_rounding, by_samples = (int(np.sum(usual != other)) for other in (mask("bfloat16", 1), mask("float32", 2)))
    assert 20 * by_rounding < by_samples


# --- memory


def test_the_bytes_before_a_run_are_those_of_the_stored_rows():
    steps = [ScheduledStep(1, 1.0, 0.5), ScheduledStep(2, 2.0, 0.75)]
    settings = MFACSettings(final_sparsity=0.75, end_epoch=2, num_gradients=64, gradients_dtype="bfloat16")
    memory = WindowMemory(settings, 10_000, steps)
    in_float32 = replace(memory, settings=replace(settings, gradients_dtype="float32"))
    assert memory.bytes_at_once() == in_float32.bytes_at_once() / 2 == 64 * 15_000 * 2
    assert in_float32.needed_bytes() - memory.needed_bytes() == 64 * 10_000 * 2
    (planned,) = plan_model([settings], [{"w": 10_000}], steps_per_epoch=1).modifiers
    assert (planned.window, planned.window_bytes) == ((64, 10_000), 64 * 10_000 * 2)
    assert planned.needed_bytes == memory.needed_bytes()


def test_a_block_of_several_chunks_is_counted_as_a_whole_where_it_is_widened():
    wide = MFACSettings(
        final_sparsity=0.5, end_epoch=1, num_gradients=1000, block_size=10**5, gradients_dtype="bfloat16"
    )
    memory = WindowMemory(wide, 10**5, [ScheduledStep(1, 1.0, 0.5)])
    assert memory.needed_bytes() > 1000 * 10**5 * (2 + 4)


def test_a_window_that_fits_only_in_bfloat16_is_accepted(monkeypatch):
    weights = {"w": np.ones(4000, np.float32)}
    settings = MFACSettings(final_sparsity=0.5, end_epoch=1.0, num_gradients=64, block_size=100)
    needed = {
        dtype: WindowMemory(replace(settings, gradients_dtype=dtype), 4000, [ScheduledStep(1, 1.0, 0.5)]).needed_bytes()
        for dtype in ("float32", "bfloat16")
    }
    monkeypatch.setattr(NumpyBackend, "free_bytes", lambda self, device: needed["bfloat16"])
    with pytest.raises(MemoryBudgetError, match=f"needs {needed['float32']:,} bytes"):
        MFACPruner(settings, weights, steps_per_epoch=1)
    assert MFACPruner(replace(settings, gradients_dtype="bfloat16"), weights, steps_per_epoch=1).needed_bytes


def test_a_pruning_step_widens_a_few_blocks_at_a_time(monkeypatch):
    monkeypatch.setattr(NumpyBackend, "group_bytes", lambda self, device, total: 40_000)
    peaks = {}
    for dtype in ("float32", "bfloat16"):
        window = filled(rows_of(80, 20_000), 80, 100, dtype=dtype)
        tracemalloc.start()
        try:
            BlockwiseFisher(window, damping="auto", devices="cpu", retain="never").diagonal()
            peaks[dtype] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peaks["bfloat16"] - peaks["float32"] < window.num_bytes / 4
