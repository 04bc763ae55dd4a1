from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.errors import MemoryBudgetError
from mfac_core.fisher.partition import BlockGroup, DeviceShare, assign, partition, working_bytes

SIZES = st.integers(0, 1200)
BLOCK_SIZES = st.one_of(st.none(), st.integers(1, 1500))
ROWS = st.integers(0, 40)
ITEMSIZES = st.sampled_from([4, 8])
BYTES = st.integers(1, 200_000)


@given(SIZES, BLOCK_SIZES, ROWS, ITEMSIZES, BYTES, BYTES)
def test_blocks_tile_the_weights_exactly(d, block_size, m, itemsize, group_bytes, chunk_bytes):
    stored_groups = partition(
        d, block_size, num_gradients=m, itemsize=itemsize, group_bytes=group_bytes, chunk_bytes=chunk_bytes
    )
    blocks = [
        (group.start + i * group.width, group.start + (i + 1) * group.width)
        for group in stored_groups
        for i in range(group.count)
    ]
    step = max(d if block_size is None else block_size, 1)
    assert blocks == [(start, min(start + step, d)) for start in range(0, d, step)]
    assert all(group.stop == group.start + group.count * group.width for group in stored_groups)


@given(SIZES, BLOCK_SIZES, ROWS, ITEMSIZES, BYTES, BYTES)
def test_groups_and_chunks_keep_to_their_bytes(d, block_size, m, itemsize, group_bytes, chunk_bytes):
    stored_groups = partition(
        d, block_size, num_gradients=m, itemsize=itemsize, group_bytes=group_bytes, chunk_bytes=chunk_bytes
    )
    column_bytes = max(m, 1) * itemsize
    for group in stored_groups:
        assert group.count == 1 or group.count * group.width * column_bytes <= group_bytes
        assert max(group.chunk_widths) == 1 or max(group.chunk_widths) * column_bytes <= chunk_bytes
        assert max(group.chunk_widths) - min(group.chunk_widths) <= 1


@given(SIZES, BLOCK_SIZES, ROWS, BYTES, BYTES)
def test_chunks_tile_their_group(d, block_size, m, group_bytes, chunk_bytes):
    for group in partition(
        d, block_size, num_gradients=m, itemsize=4, group_bytes=group_bytes, chunk_bytes=chunk_bytes
    ):
        bounds = group.chunk_bounds
        assert bounds[0][0] == group.start and bounds[-1][1] == group.stop
        assert all(end == start for (_, end), (start, _) in zip(bounds, bounds[1:], strict=False))
        assert all(stop > start for start, stop in bounds)


def test_no_group_of_several_blocks_is_split_into_chunks():
    stored_groups = partition(1000, 10, num_gradients=4, itemsize=4, group_bytes=100_000, chunk_bytes=32)
    assert all(group.count == 1 or len(group.chunk_widths) == 1 for group in stored_groups)


def test_small_blocks_share_a_group_and_a_large_block_is_split_into_chunks():
    small = partition(95, 10, num_gradients=5, itemsize=4, group_bytes=800, chunk_bytes=10_000)
    assert [(g.start, g.count, g.chunk_widths) for g in small] == [
        (0, 4, (10,)), (40, 4, (10,)), (80, 1, (10,)), (90, 1, (5,))
    ]  # fmt: skip
    large = partition(95, None, num_gradients=5, itemsize=4, group_bytes=800, chunk_bytes=600)
    assert [(g.start, g.count, g.chunk_widths) for g in large] == [(0, 1, (24, 24, 24, 23))]


def shares(speeds, group_bytes=1, free_bytes=None):
    return {f"cuda:{i}": DeviceShare(speed, group_bytes, free_bytes) for i, speed in enumerate(speeds)}


@given(
    st.integers(1, 3000),
    st.integers(1, 300),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=5),
    BYTES,
    BYTES,
)
def test_every_block_is_assigned_once_and_in_order(d, block_size, speeds, stored_bytes, group_bytes):
    stored_groups = partition(d, block_size, num_gradients=3, itemsize=4, group_bytes=stored_bytes)
    assigned = assign(stored_groups, shares(speeds, group_bytes), num_gradients=3, itemsize=4)
    assert list(assigned) == [f"cuda:{i}" for i in range(len(speeds))]
    groups = [group for each in assigned.values() for group in each]
    assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])]
    assert groups[-1].stop == d
    widths = {stored.start: stored for stored in stored_groups}
    for group in groups:
        stored = widths[max(start for start in widths if start <= group.start)]
        assert group.chunk_widths == stored.chunk_widths
        assert group.stop <= stored.stop and (group.start - stored.start) % stored.width == 0
        assert group.count == 1 or group.count * group.width * 12 <= group_bytes


@given(st.integers(1, 3000), st.integers(1, 300), st.lists(st.floats(0.1, 10), min_size=1, max_size=5), BYTES)
def test_devices_get_columns_in_proportion_to_their_speed(d, block_size, speeds, group_bytes):
    stored_groups = partition(d, block_size, num_gradients=3, itemsize=4, group_bytes=group_bytes)
    assigned = assign(stored_groups, shares(speeds), num_gradients=3, itemsize=4)
    for speed, groups in zip(speeds, assigned.values(), strict=True):
        columns = sum(group.stop - group.start for group in groups)
        assert abs(columns - d * speed / sum(speeds)) <= stored_groups[0].width


def test_without_blocks_no_device_gets_any():
    assert assign((), shares([1, 1]), num_gradients=3, itemsize=4) == {"cuda:0": (), "cuda:1": ()}


def test_a_device_without_room_for_a_block_gets_none_and_one_with_little_room_small_groups():
    stored_groups = partition(1000, 10, num_gradients=6, itemsize=4, group_bytes=10**6)
    needed = working_bytes(BlockGroup(0, 1, (10,)), 6, 4)
    mixed = {
        "cuda:0": DeviceShare(1.0, 10**6, needed - 1),
        "cuda:1": DeviceShare(1.0, 10**6, 3 * needed),
        "cuda:2": DeviceShare(1.0, 10**6, None),
    }
    assigned = assign(stored_groups, mixed, num_gradients=6, itemsize=4)
    assert assigned["cuda:0"] == ()
    assert {group.count for group in assigned["cuda:1"]} <= {3, 2, 1} and assigned["cuda:1"][0].count == 3
    assert [group.count for group in assigned["cuda:2"]] == [50]


def test_without_room_for_a_block_anywhere_the_error_names_devices_and_bytes():
    stored_groups = partition(100, 10, num_gradients=6, itemsize=4, group_bytes=1)
    needed = working_bytes(stored_groups[0], 6, 4)
    assert assign(stored_groups, shares([1, 1], free_bytes=needed), num_gradients=6, itemsize=4)["cuda:1"]
    with pytest.raises(MemoryBudgetError, match=f"cuda:0, cuda:1.*{needed:,}.*{needed - 1:,}"):
        assign(stored_groups, shares([1, 1], free_bytes=needed - 1), num_gradients=6, itemsize=4)


@pytest.mark.parametrize("m, larger", [(2, 0), (6, 1)])
def test_room_is_needed_for_the_block_that_takes_most(m, larger):
    stored_groups = partition(15, 10, num_gradients=m, itemsize=4, group_bytes=1)
    needed = working_bytes(stored_groups[larger], m, 4)
    assert working_bytes(stored_groups[1 - larger], m, 4) < needed
    with pytest.raises(MemoryBudgetError, match=f"{needed:,}"):
        assign(stored_groups, shares([1], free_bytes=needed - 1), num_gradients=m, itemsize=4)


def test_working_bytes_grow_with_everything_that_is_held():
    group = BlockGroup(0, 2, (50,))
    assert working_bytes(group, 10, 4) == 2 * (2 * 10 * 50 * 4) + 3 * 8 * 2 * 10 * 10
    assert working_bytes(BlockGroup(0, 1, (50, 50)), 10, 4) < working_bytes(BlockGroup(0, 1, (100,)), 10, 4)
    assert working_bytes(BlockGroup(0, 1, (5,)), 10, 4) == 2 * (10 * 5 * 4) + 8 * 8 * 5 * 5
