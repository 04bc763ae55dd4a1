from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.blocks import BlockGroup, cut, deal, working_bytes
from mfac_core.errors import MemoryBudgetError

SIZES = st.integers(0, 1200)
BLOCK_SIZES = st.one_of(st.none(), st.integers(1, 1500))
ROWS = st.integers(0, 40)
ITEMSIZES = st.sampled_from([4, 8])
BYTES = st.integers(1, 200_000)


@given(SIZES, BLOCK_SIZES, ROWS, ITEMSIZES, BYTES, BYTES)
def test_blocks_tile_the_weights_exactly(d, block_size, m, itemsize, group_bytes, chunk_bytes):
    groups = cut(d, block_size, num_gradients=m, itemsize=itemsize, group_bytes=group_bytes, chunk_bytes=chunk_bytes)
    blocks = [
        (group.start + i * group.width, group.start + (i + 1) * group.width)
        for group in groups
        for i in range(group.count)
    ]
    step = max(d if block_size is None else block_size, 1)
    assert blocks == [(start, min(start + step, d)) for start in range(0, d, step)]
    assert all(group.stop == group.start + group.count * group.width for group in groups)


@given(SIZES, BLOCK_SIZES, ROWS, ITEMSIZES, BYTES, BYTES)
def test_groups_and_chunks_keep_to_their_bytes(d, block_size, m, itemsize, group_bytes, chunk_bytes):
    groups = cut(d, block_size, num_gradients=m, itemsize=itemsize, group_bytes=group_bytes, chunk_bytes=chunk_bytes)
    column_bytes = max(m, 1) * itemsize
    for group in groups:
        assert group.count == 1 or group.count * group.width * column_bytes <= group_bytes
        assert max(group.chunk_widths) == 1 or max(group.chunk_widths) * column_bytes <= chunk_bytes
        assert max(group.chunk_widths) - min(group.chunk_widths) <= 1


@given(SIZES, BLOCK_SIZES, ROWS, BYTES, BYTES)
def test_chunks_tile_their_group(d, block_size, m, group_bytes, chunk_bytes):
    for group in cut(d, block_size, num_gradients=m, itemsize=4, group_bytes=group_bytes, chunk_bytes=chunk_bytes):
        bounds = group.chunk_bounds
        assert bounds[0][0] == group.start and bounds[-1][1] == group.stop
        assert all(end == start for (_, end), (start, _) in zip(bounds, bounds[1:], strict=False))
        assert all(stop > start for start, stop in bounds)


def test_no_group_of_several_blocks_is_cut_into_chunks():
    groups = cut(1000, 10, num_gradients=4, itemsize=4, group_bytes=100_000, chunk_bytes=32)
    assert all(group.count == 1 or len(group.chunk_widths) == 1 for group in groups)


def test_small_blocks_share_a_group_and_a_large_block_is_cut_into_chunks():
    small = cut(95, 10, num_gradients=5, itemsize=4, group_bytes=800, chunk_bytes=10_000)
    assert [(g.start, g.count, g.chunk_widths) for g in small] == [
        (0, 4, (10,)), (40, 4, (10,)), (80, 1, (10,)), (90, 1, (5,))
    ]  # fmt: skip
    large = cut(95, None, num_gradients=5, itemsize=4, group_bytes=800, chunk_bytes=600)
    assert [(g.start, g.count, g.chunk_widths) for g in large] == [(0, 1, (24, 24, 24, 23))]


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 5), BYTES)
def test_every_group_is_dealt_once_and_in_order(d, block_size, count, group_bytes):
    groups = cut(d, block_size, num_gradients=3, itemsize=4, group_bytes=group_bytes)
    names = [f"cuda:{i}" for i in range(count)]
    dealt = deal(groups, dict.fromkeys(names), num_gradients=3, itemsize=4)
    assert list(dealt) == names
    assert [i for indices in dealt.values() for i in indices] == list(range(len(groups)))


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 5))
def test_devices_get_about_the_same_number_of_columns(d, block_size, count):
    groups = cut(d, block_size, num_gradients=3, itemsize=4, group_bytes=1)
    dealt = deal(groups, {f"cuda:{i}": None for i in range(count)}, num_gradients=3, itemsize=4)
    columns = [sum(groups[i].stop - groups[i].start for i in indices) for indices in dealt.values()]
    widest = max(group.stop - group.start for group in groups)
    assert max(abs(share - d / count) for share in columns) <= widest


def test_no_groups_are_dealt_to_nobody():
    assert deal((), {"cpu": None, "cuda:0": 0}, num_gradients=3, itemsize=4) == {"cpu": (), "cuda:0": ()}


def test_a_device_without_room_for_its_largest_group_is_refused_by_name():
    groups = cut(100, 10, num_gradients=6, itemsize=4, group_bytes=1)
    needed = working_bytes(groups[0], 6, 4)
    assert deal(groups, {"cuda:0": needed, "cuda:1": needed}, num_gradients=6, itemsize=4)
    with pytest.raises(MemoryBudgetError, match=f"cuda:1.*{needed:,}.*{needed - 1:,}"):
        deal(groups, {"cuda:0": needed, "cuda:1": needed - 1}, num_gradients=6, itemsize=4)


def test_working_bytes_grow_with_everything_that_is_held():
    group = BlockGroup(0, 2, (50,))
    assert working_bytes(group, 10, 4) == 2 * (2 * 10 * 50 * 4) + 2 * 8 * 2 * 10 * 10
    assert working_bytes(BlockGroup(0, 1, (50, 50)), 10, 4) < working_bytes(BlockGroup(0, 1, (100,)), 10, 4)
    assert working_bytes(BlockGroup(0, 1, (5,)), 10, 4) == 2 * (10 * 5 * 4) + 2 * 8 * 5 * 5
