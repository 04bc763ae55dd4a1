from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfac_core.backends import Device
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.fisher.partition import BlockGroup, partition
from mfac_core.fisher.window import GradientWindow
from tests.core.strict_backend import strict_devices

WIDTHS = st.integers(1, 30)
ROWS = st.integers(1, 8)
BLOCK_SIZES = st.one_of(st.none(), st.integers(1, 35))
PUSHES = st.integers(0, 25)

few = settings(max_examples=60, deadline=None)


@pytest.fixture(params=["whole blocks", "small pieces"], autouse=True)
def pieces(request, monkeypatch):
    """Run each test also with groups of few blocks and blocks of several chunks, which otherwise take megabytes."""
    if request.param == "small pieces":
        monkeypatch.setattr("mfac_core.fisher.window.partition", _split_into_small_pieces)
        monkeypatch.setattr("mfac_core.fisher.matrix.partition", _split_into_small_pieces)


def _split_into_small_pieces(
    num_weights, block_size, *, num_gradients, itemsize, group_bytes
) -> tuple[BlockGroup, ...]:
    row = num_gradients * itemsize
    width = num_weights if block_size is None else block_size
    small = {"chunk_bytes": 4 * row, "group_bytes": 1} if width > 4 else {"group_bytes": 8 * row}
    return partition(num_weights, block_size, num_gradients=num_gradients, itemsize=itemsize, **small)


def sample(i: int, d: int) -> np.ndarray:
    return (1000.0 * i + np.arange(d)).astype(np.float32)


def filled(d: int, m: int, block_size: int | None, pushes: int, **options) -> GradientWindow:
    window = GradientWindow(d, m, block_size=block_size, **options)
    for i in range(pushes):
        window.push(sample(i, d))
    return window


def last(pushes: int, m: int, d: int) -> np.ndarray:
    return np.array([sample(i, d) for i in range(max(0, pushes - m), pushes)]).reshape(-1, d)


def in_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 0])] if rows.size else rows


def through_chunks(window: GradientWindow | GradientMatrix) -> np.ndarray:
    rows = np.full((window.count, window.num_weights), np.nan)
    for group in window.stored_groups:
        for (start, stop), chunk in zip(group.chunk_bounds, window.chunks(group), strict=True):
            assert chunk.shape == (group.count, window.count, (stop - start) // group.count)
            for block in range(group.count):
                width = chunk.shape[-1]
                rows[:, start + block * width : start + (block + 1) * width] = chunk[block]
    return rows


few_with_fixture = settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@few_with_fixture
@given(WIDTHS, ROWS, BLOCK_SIZES, PUSHES)
def test_the_window_holds_the_last_rows(d, m, block_size, pushes):
    window = filled(d, m, block_size, pushes)
    assert window.count == min(pushes, m)
    assert window.is_full == (pushes >= m)
    np.testing.assert_array_equal(in_order(window.to_rows()), last(pushes, m, d))


@few_with_fixture
@given(WIDTHS, ROWS, BLOCK_SIZES, PUSHES)
def test_chunks_are_the_columns_of_the_rows(d, m, block_size, pushes):
    window = filled(d, m, block_size, pushes)
    np.testing.assert_array_equal(through_chunks(window), window.to_rows())


@few_with_fixture
@given(WIDTHS, ROWS, BLOCK_SIZES, PUSHES, ROWS, st.integers(0, 12), st.data())
def test_rebuilding_equals_slicing_the_dense_matrix(d, m, block_size, pushes, rows, more, data):
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=d, max_size=d)))
    window = filled(d, m, block_size, pushes)
    window = window.rebuilt(kept, rows)
    stay = min(pushes, m, rows)
    assert (window.num_weights, window.num_gradients, window.count) == (int(kept.sum()), rows, stay)
    assert [group.stop for group in window.stored_groups][-1:] == [window.num_weights] * bool(window.stored_groups)
    expected = last(pushes, min(m, rows), d)[:, kept]
    np.testing.assert_array_equal(in_order(window.to_rows()), expected)
    np.testing.assert_array_equal(through_chunks(window), window.to_rows())
    for i in range(more):
        window.push(sample(pushes + i, d)[kept])
    arrived = [*last(pushes, min(m, rows), d), *(sample(pushes + i, d) for i in range(more))][-rows:]
    assert window.count == min(stay + more, rows)
    np.testing.assert_array_equal(in_order(window.to_rows()), np.array(arrived).reshape(-1, d)[:, kept])


@few_with_fixture
@given(WIDTHS, ROWS, BLOCK_SIZES, PUSHES, st.integers(0, 12))
def test_a_restored_window_goes_on_the_same(d, m, block_size, pushes, more):
    window = filled(d, m, block_size, pushes)
    restored = GradientWindow(d, m, block_size=block_size)
    restored.push(sample(99, d))
    restored.load_state_dict(window.state_dict())
    for i in range(more + 1):
        np.testing.assert_array_equal(restored.to_rows(), window.to_rows())
        assert (restored.count, restored.is_full) == (window.count, window.is_full)
        window.push(sample(pushes + i, d))
        restored.push(sample(pushes + i, d))


def test_a_stored_state_does_not_change_with_the_window():
    window = filled(5, 3, None, 4)
    state = window.state_dict()
    before = state["rows"].copy()
    window.push(sample(9, 5))
    np.testing.assert_array_equal(state["rows"], before)


def test_a_pushed_row_is_copied():
    window, row = GradientWindow(4, 2, block_size=2), sample(1, 4)
    window.push(row)
    row[:] = -1
    np.testing.assert_array_equal(window.to_rows(), [sample(1, 4)])


def test_a_cleared_window_starts_anew():
    window = filled(4, 3, 2, 5)
    window.clear()
    assert (window.count, window.is_full) == (0, False)
    assert window.to_rows().shape == (0, 4)
    window.push(sample(7, 4))
    np.testing.assert_array_equal(window.to_rows(), [sample(7, 4)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_kept_in_the_windows_dtype(dtype):
    window = GradientWindow(3, 2, block_size=None, dtype=dtype)
    window.push(np.arange(3, dtype=np.float64))
    assert window.to_rows().dtype == dtype
    assert window.chunks(window.stored_groups[0])[0].dtype == dtype
    assert window.num_bytes == 2 * 3 * np.dtype(dtype).itemsize


@pytest.mark.parametrize("shape", [(3,), (5,), (1, 4), ()])
def test_a_row_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(4,\)"):
        GradientWindow(4, 2, block_size=2).push(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(2, 3), (4, 4), (4,)])
def test_a_state_of_another_window_is_refused(shape):
    window = GradientWindow(4, 3, block_size=2)
    with pytest.raises(ValueError, match="window"):
        window.load_state_dict({"rows": np.zeros(shape), "position": 0})


def test_a_window_whose_weights_are_all_pruned_is_empty():
    window = filled(4, 3, 2, 2)
    window = window.rebuilt(np.zeros(4, dtype=bool), 5)
    assert (window.num_weights, window.stored_groups, window.num_bytes) == (0, (), 0)
    window.push(np.zeros(0, np.float32))


@few_with_fixture
@given(WIDTHS, ROWS, BLOCK_SIZES, PUSHES, ROWS, st.data())
def test_a_window_on_another_device_holds_the_same(d, m, block_size, pushes, rows, data):
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=d, max_size=d)))
    device = strict_devices(3)[2]
    window, expected = filled(d, m, block_size, pushes, device=device), filled(d, m, block_size, pushes)
    np.testing.assert_array_equal(window.to_rows(), expected.to_rows())
    window = window.rebuilt(kept, rows)
    expected = expected.rebuilt(kept, rows)
    np.testing.assert_array_equal(window.to_rows(), expected.to_rows())
    assert all(str(chunk.device).count("device2") for group in window.stored_groups for chunk in window.chunks(group))


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.bool_, np.complex64])
def test_gradients_that_are_no_real_floats_are_refused_with_a_cure(dtype):
    window = GradientWindow(4, 2, block_size=2)
    with pytest.raises(ValueError, match=f"gradients.*{np.dtype(dtype)}.*astype"):
        window.push(np.ones(4, dtype))
    assert window.count == 0
    with pytest.raises(ValueError, match=f"gradients.*{np.dtype(dtype)}.*astype"):
        GradientMatrix([np.ones((2, 3)), np.ones((2, 4), dtype)], block_size=2)


def test_rebuilding_takes_the_new_window_beside_the_old_and_little_more():
    class SmallSlabs(NumpyBackend):
        def group_bytes(self, device, total):
            return 20_000

    tracemalloc.start()
    try:
        window = filled(4000, 80, 100, 80, device=Device(SmallSlabs(), "cpu"))
        held, before = tracemalloc.get_traced_memory()[0], window.num_bytes
        tracemalloc.reset_peak()
        half = window.rebuilt(np.arange(4000) % 2 == 0, 80)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (window.num_bytes, half.num_bytes) == (before, before // 2)
    assert peak - held < before // 2 + before // 4


@few_with_fixture
@given(st.lists(WIDTHS, min_size=1, max_size=4), BLOCK_SIZES, st.data())
def test_arrays_side_by_side_are_read_as_one_without_the_columns_that_are_left_out(widths, block_size, data):
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=sum(widths), max_size=sum(widths))))
    rows = np.arange(3.0 * sum(widths)).reshape(3, -1)
    matrix = GradientMatrix(np.split(rows, np.cumsum(widths)[:-1], axis=1), kept, block_size=block_size)
    assert (matrix.count, matrix.num_weights) == (3, kept.sum())
    np.testing.assert_array_equal(through_chunks(matrix), rows[:, kept])


def test_a_window_that_was_full_with_fewer_rows_is_refused_by_the_number_of_rows():
    full = GradientWindow(4, 2, block_size=2)
    for _ in range(2):
        full.push(np.ones(4, np.float32))
    with pytest.raises(
        ValueError, match=r"is full with 2 gradient samples, this one holds 3; resume with the num_gradients"
    ):
        GradientWindow(4, 3, block_size=2).load_state_dict(full.state_dict())
