"""Groups of blocks: which of them need float64, what is kept between the passes, and who computes what."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest

import mfac_core
from mfac_core.backends import Device
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.backends.threads import map_on_threads, spare_threads
from mfac_core.fisher import blockwise, dual, factors
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.fisher.window import GradientWindow
from mfac_core.pruners.step import mfac_step
from tests import reference
from tests.core.strict_backend import NAMES, StrictBackend, strict_devices

M, B, BLOCKS, DAMPING = 12, 30, 6, 1e-4


class RoomyBackend(NumpyBackend):
    """Host memory with groups of several blocks, whatever the size, and a chosen amount of free memory."""

    def __init__(self, free_bytes: int | None = 10**9) -> None:
        self._free_bytes = free_bytes

    def group_bytes(self, device, total):
        return 10**9

    def free_bytes(self, device):
        return self._free_bytes


def gradients_of_both_kinds(m: int = M, width: int = B) -> np.ndarray:
    """Return gradients of which the second and the last block need float64."""
    rows = np.random.default_rng(0).standard_normal((m, BLOCKS * width)).astype(np.float32)
    for block in (1, BLOCKS - 1):
        columns = slice(block * width, (block + 1) * width)
        rows[:, columns] = rows[:1, columns] + 1e-3 * rows[:, columns]
    return rows


def chunks_of(rows: np.ndarray, width: int = B) -> list[np.ndarray]:
    return [np.ascontiguousarray(rows.reshape(len(rows), -1, width).transpose(1, 0, 2))]


@pytest.mark.parametrize("m, width", [(M, B), (200, B)])
@pytest.mark.parametrize("device", [None, *strict_devices(2, StrictBackend(group_bytes=10**9))])
def test_a_group_with_a_block_that_needs_float64_is_computed_in_it_as_a_whole(m, width, device):
    rows = gradients_of_both_kinds(m, width)
    chunks = chunks_of(rows, width)
    if device is not None:
        chunks = [device.asarray(chunk) for chunk in chunks]
    assert factors.evaluate([chunk[2:5, ...] for chunk in chunks], DAMPING, 1e-5)[0].in_float64 is False
    made, diagonal = factors.evaluate(chunks, DAMPING, 1e-5)
    host = np.asarray if device is None else device.to_numpy
    assert made.in_float64 is True
    exact = reference.exact_inverse(rows, DAMPING, width)
    np.testing.assert_allclose(host(diagonal).reshape(-1) / DAMPING, np.diag(exact), rtol=1e-5)
    x = np.random.default_rng(1).standard_normal((BLOCKS, width)).astype(np.float32)
    given = x if device is None else device.asarray(x)
    wanted = exact @ x.reshape(-1)
    for again in (made, factors.factor(chunks, DAMPING, made.in_float64)):
        found = host(again.apply(chunks, given[..., None])).reshape(-1) / DAMPING
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        for part in (slice(0, 1), slice(0, 2), slice(1, 2), slice(2, 6), slice(4, 6)):
            found = host(
                again.select_blocks(part).apply([chunk[part, :, :] for chunk in chunks], given[part, :, None])
            )[..., 0]
            within = wanted.reshape(BLOCKS, width)[part]
            np.testing.assert_allclose(found / DAMPING, within, rtol=0, atol=1e-4 * np.abs(within).max())


def test_rows_are_applied_to_in_the_precision_of_each_block():
    rows = gradients_of_both_kinds()
    made, _ = factors.evaluate(chunks_of(rows), DAMPING, 1e-5)
    coefficients = np.random.default_rng(1).standard_normal((BLOCKS, M)).astype(np.float32)
    found = made.apply_to_rows(chunks_of(rows), coefficients)
    for block in range(BLOCKS):
        columns = slice(block * B, (block + 1) * B)
        exact = reference.exact_inverse(rows[:, columns], DAMPING, None)
        wanted = exact @ rows[:, columns].T.astype(np.float64) @ coefficients[block] / M
        np.testing.assert_allclose(found[block], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_the_share_of_groups_in_float64_counts_those_that_needed_it():
    source = GradientMatrix([gradients_of_both_kinds()], block_size=B)
    fisher = BlockwiseFisher(source, damping=DAMPING, devices=strict_devices(1, StrictBackend(group_bytes=1)))
    assert len(fisher.groups) == BLOCKS and fisher.float64_share == 0
    fisher.diagonal()
    assert fisher.float64_share == 2 / BLOCKS


def steps_with(backend, monkeypatch, rows, width, update="independent"):
    """Return what a pruning step gives, and how often a group was factored."""
    made = []
    for name in ("evaluate", "factor"):
        original = getattr(blockwise, name)

        def counting(*arguments, original=original):
            made.append(1)
            return original(*arguments)

        monkeypatch.setattr(blockwise, name, counting)
    weights = np.random.default_rng(2).standard_normal(rows.shape[1]).astype(np.float32)
    source = GradientMatrix([rows], block_size=width)
    result = mfac_step(
        weights, source, lambda s: s < np.median(s), damping=DAMPING, update=update, devices=Device(backend, "cpu")
    )
    monkeypatch.undo()
    return result, len(made)


def test_a_factor_is_retained_for_the_second_pass_only_while_there_is_room(monkeypatch):
    rows = gradients_of_both_kinds(M, 2 * B)
    kept, once = steps_with(RoomyBackend(), monkeypatch, rows, 2 * B)
    working = mfac_core.fisher.partition.working_bytes(mfac_core.fisher.partition.BlockGroup(0, 1, (2 * B,)), M, 4)
    for backend in (RoomyBackend(None), RoomyBackend(BLOCKS * working)):
        monkeypatch.setattr(blockwise, "RETAINED_FRACTION", 1e-6)
        again, twice = steps_with(backend, monkeypatch, rows, 2 * B)
        assert (once, twice) == (1, 2)
        for left, right in zip(again, kept, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def test_factors_as_large_as_dense_inverses_are_not_retained(monkeypatch):
    # small enough to have room: what is kept is at most half of the window
    _, made = steps_with(RoomyBackend(), monkeypatch, gradients_of_both_kinds(200), B)
    assert made == 2


def test_no_factor_is_retained_if_none_is_wanted():
    source = GradientMatrix([gradients_of_both_kinds(M, 2 * B)], block_size=2 * B)
    fisher = BlockwiseFisher(source, damping=DAMPING, devices=Device(RoomyBackend(), "cpu"), retain="never")
    fisher.diagonal()
    assert not fisher._retained


def test_retained_factors_are_released_when_they_have_been_used():
    source = GradientMatrix([gradients_of_both_kinds(M, 2 * B)], block_size=2 * B)
    fisher = BlockwiseFisher(source, damping=DAMPING, devices=Device(RoomyBackend(), "cpu"))
    room = dict(fisher._room)
    fisher.diagonal()
    assert fisher._room["cpu"] < room["cpu"]
    fisher.apply(np.ones(BLOCKS * 2 * B, np.float32))
    assert fisher._room == room and not fisher._retained


def test_retained_factors_take_no_more_than_half_of_the_window():
    source = GradientMatrix([gradients_of_both_kinds()], block_size=B)
    fisher = BlockwiseFisher(source, damping=DAMPING, devices=Device(RoomyBackend(10**12), "cpu"))
    assert fisher._room["cpu"] == M * BLOCKS * B * 4 // 2
    fisher.diagonal()
    assert not fisher._retained


def test_devices_share_what_retained_factors_may_take():
    source = GradientMatrix([gradients_of_both_kinds()], block_size=B)
    fisher = BlockwiseFisher(source, damping=DAMPING, devices=strict_devices(3, StrictBackend(10**9)))
    assert list(fisher._room.values()) == [M * BLOCKS * B * 4 // 2 // 3] * 3


def test_retained_factors_take_no_more_than_a_quarter_of_the_free_memory():
    source = GradientMatrix([gradients_of_both_kinds()], block_size=B)
    fisher = BlockwiseFisher(source, damping=DAMPING, devices=Device(RoomyBackend(8000), "cpu"))
    assert fisher._room["cpu"] == 2000


def test_repeated_products_factor_once(monkeypatch):
    made = []
    original = blockwise.evaluate
    monkeypatch.setattr(blockwise, "evaluate", lambda *arguments: made.append(1) or original(*arguments))
    fisher = mfac_core.inverse_fisher(gradients_of_both_kinds(), block_size=B, damping=DAMPING)
    first = fisher.apply(np.ones(BLOCKS * B, np.float32))
    count = len(made)
    np.testing.assert_array_equal(fisher.apply(np.ones(BLOCKS * B, np.float32)), first)
    assert len(made) == count


def test_groups_of_a_window_are_subgroups_of_its_stored_groups():
    window = GradientWindow(BLOCKS * B + 7, M, block_size=B, device=Device(RoomyBackend(), "cpu"))
    rows = np.concatenate([gradients_of_both_kinds(), np.ones((M, 7), np.float32)], axis=1)
    for row in rows:
        window.push(row)
    assert [group.count for group in window.stored_groups] == [BLOCKS, 1]
    devices = strict_devices(3, StrictBackend(group_bytes=1))
    fisher = BlockwiseFisher(window, damping=DAMPING, devices=devices)
    assert len(fisher.groups) == BLOCKS + 1
    for group in fisher.groups:
        (chunk,) = window.chunks(group)
        np.testing.assert_array_equal(chunk[0], rows[:, group.start : group.stop])
    exact = reference.exact_inverse(rows, DAMPING, B)
    np.testing.assert_allclose(fisher.home.to_numpy(fisher.diagonal()), np.diag(exact), rtol=1e-4)


@pytest.mark.parametrize("speeds", [{}, {"device1": 3.0}, {"CPU_DEVICE": 0.01, "device2": 5.0}])
def test_the_speed_of_devices_decides_who_computes_and_not_what(speeds):
    backend = StrictBackend(speeds=speeds)
    rows = gradients_of_both_kinds()
    fisher = mfac_core.inverse_fisher(rows, block_size=B, damping=DAMPING, devices=strict_devices(3, backend))
    alone = mfac_core.inverse_fisher(rows, block_size=B, damping=DAMPING, devices=strict_devices(1))
    np.testing.assert_allclose(fisher.diagonal(), alone.diagonal(), rtol=1e-5)
    blocks = [device for device, shape in backend.uploads if len(shape) == 3]
    share = {name: speeds.get(name, 1.0) / sum(speeds.get(each, 1.0) for each in NAMES) for name in NAMES}
    for name in NAMES:
        assert abs(blocks.count(name) - BLOCKS * share[name]) <= 1


def test_a_device_that_computes_nothing_is_named_in_the_log(caplog):
    class Small(StrictBackend):
        def free_bytes(self, device):
            return 100 if device == "device1" else None

    with caplog.at_level("INFO", logger="mfac_core"):
        mfac_core.inverse_fisher(gradients_of_both_kinds(), block_size=B, devices=strict_devices(3, Small()))
    assert "device1" in caplog.text and "device2" not in caplog.text


def test_cores_are_shared_between_workers_and_blas(monkeypatch):
    limits = []

    class Limits:
        def __init__(self, limits, user_api):
            self.limits = limits

        def __enter__(self):
            limits.append(self.limits)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("mfac_core.backends.numpy_backend._cores", lambda: 16)
    monkeypatch.setattr("mfac_core.backends.numpy_backend._thread_limits", lambda: Limits)
    for tasks, workers in [(1, 1), (3, 3), (16, 16), (100, 16)]:
        with NumpyBackend().workers("cpu", tasks) as found:
            assert found == workers
    assert limits == [1, 5, 1, 1]


def test_blocks_are_enough_for_all_cores(monkeypatch):
    monkeypatch.setattr("mfac_core.backends.numpy_backend._cores", lambda: 4)
    threads = set()
    rows = np.random.default_rng(0).standard_normal((8, 64 * 20)).astype(np.float32)
    fisher = BlockwiseFisher(GradientMatrix([rows], block_size=20), damping=1.0, devices="cpu")
    assert len(fisher.groups) >= 16
    barrier = threading.Barrier(4)

    def task(index, device, chunks):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            barrier.wait(timeout=20)

    fisher.run(task)
    assert len(threads) == 4


@pytest.mark.parametrize("m, width", [(12, 7000), (300, 4000)])
def test_a_single_block_spreads_its_columns_over_the_cores(m, width, monkeypatch):
    monkeypatch.setattr("mfac_core.backends.numpy_backend._cores", lambda: 3)
    monkeypatch.setattr("mfac_core.fisher.chunks.CACHE_BYTES", 100_000)
    threads = set()
    original = dual.lower_gram

    def counting(x):
        threads.add(threading.get_ident())
        barrier.wait(timeout=20)
        return original(x)

    barrier = threading.Barrier(3)
    rows = np.random.default_rng(0).standard_normal((m, width)).astype(np.float32)
    alone = mfac_core.inverse_fisher(rows.astype(np.float64), block_size=None, damping=1e-2).diagonal()
    monkeypatch.setattr(dual, "lower_gram", counting)
    spread = mfac_core.inverse_fisher(rows, block_size=None, damping=1e-2).diagonal()
    assert len(threads) == 3
    np.testing.assert_allclose(spread, alone, rtol=1e-4)


def test_what_is_said_of_overflow_holds_in_spread_work_too():
    with spare_threads(2), np.errstate(over="raise"), pytest.raises(FloatingPointError):
        map_on_threads(lambda x: x * x, [np.array([1e300])] * 2)


@pytest.mark.parametrize("damping", [1e-300, 1e-45, 1e300])
def test_an_inverse_that_the_dtype_cannot_hold_is_refused_by_name(damping):
    fisher = mfac_core.inverse_fisher(np.ones((1, 8), np.float32), damping=damping)
    with np.errstate(all="ignore"), pytest.raises(mfac_core.IllConditionedError, match=re.escape(f"{damping:g}")):
        fisher.diagonal()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_product_with_what_is_not_finite_is_refused(value):
    x = np.ones(8, np.float32)
    x[3] = value
    with pytest.raises(ValueError, match="finite"):
        mfac_core.inverse_fisher(np.ones((1, 8), np.float32)).apply(x)


def test_repeated_products_with_narrow_blocks_factor_once(monkeypatch):
    made = []
    original = blockwise.factor
    monkeypatch.setattr(blockwise, "factor", lambda *arguments: made.append(1) or original(*arguments))
    fisher = mfac_core.inverse_fisher(gradients_of_both_kinds(40), block_size=B, damping=DAMPING)
    for _ in range(3):
        fisher.apply(np.ones(BLOCKS * B, np.float32))
    assert not made
