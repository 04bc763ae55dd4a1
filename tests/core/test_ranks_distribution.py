"""Vectors move between ranks as slices of the concatenation of all arrays, which these tests make for comparison."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mfac_core.backends import numpy_dtype
from mfac_core.ranks import Alone, Ranks, Shards
from mfac_core.ranks.distribution import Distribution, deal
from mfac_core.ranks.routes import Route
from tests.core.thread_ranks import ThreadRanks, outcomes, run_ranks

with_fixture = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Case(NamedTuple):
    shapes: dict[str, tuple[int, ...]]
    ranges: dict[str, list[tuple[int, int]]]
    mask: np.ndarray
    block_size: int | None
    size: int

    @property
    def shards(self) -> Shards:
        return Shards(self.shapes, self.ranges)

    def distribution(self, ranks: Ranks) -> Distribution:
        return Distribution(ranks, self.shards, self.mask, block_size=self.block_size)

    def held(self, rank: int, of_all: np.ndarray) -> np.ndarray:
        """What a rank has of a vector of all arrays."""
        parts, offset = [], 0
        for name, shape in self.shapes.items():
            start, stop = self.ranges[name][rank]
            parts.append(of_all[offset + start : offset + stop])
            offset += math.prod(shape)
        return np.concatenate(parts)

    def held_unpruned(self, rank: int, columns: np.ndarray) -> np.ndarray:
        """What a rank has of a vector of all unpruned weights."""
        of_all = np.zeros(len(self.mask), columns.dtype)
        of_all[self.mask] = columns
        return self.held(rank, of_all)[self.held(rank, self.mask)]


def cut(draw, length: int, parts: int) -> list[tuple[int, int]]:
    """Consecutive ranges, some of them empty, given to the ranks in any order."""
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
    return draw(st.permutations(list(zip([0, *cuts], [*cuts, length], strict=True))))


@st.composite
def cases(draw) -> Case:
    groups, replicas = draw(st.sampled_from([(g, r) for g in range(1, 7) for r in range(1, 7) if g * r <= 6]))
    shapes = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        shapes[name] = tuple(draw(st.lists(st.integers(0, 5), max_size=2)))
    order = draw(st.permutations(range(groups * replicas)))
    ranges = {}
    for name, shape in shapes.items():
        of_group = cut(draw, math.prod(shape), groups)
        ranges[name] = [of_group[member % groups] for member in order]
    length = sum(map(math.prod, shapes.values()))
    mask = draw(st.one_of(hnp.arrays(bool, length), st.just(np.zeros(length, bool)), st.just(np.ones(length, bool))))
    return Case(shapes, ranges, mask, draw(st.sampled_from([1, 2, 3, 7, None])), groups * replicas)


@given(st.integers(0, 60), st.one_of(st.none(), st.integers(1, 20)), st.integers(1, 9))
def test_whole_blocks_are_dealt_in_order(num_columns, block_size, size):
    ranges = deal(num_columns, block_size, size)
    assert len(ranges) == size
    assert [column for start, stop in ranges for column in range(start, stop)] == list(range(num_columns))
    width = max(num_columns, 1) if block_size is None else block_size
    assert all(start % width == 0 or start == num_columns for start, _ in ranges)
    blocks = [-(-(stop - start) // width) for start, stop in ranges]
    assert max(blocks) - min(blocks) <= 1
    assert blocks == sorted(blocks, reverse=True)
    if block_size is None:
        assert ranges[0] == (0, num_columns)


@with_fixture
@given(cases(), st.sampled_from([np.float32, np.float64]))
def test_vectors_arrive_where_they_belong(library, case, dtype):
    columns = np.arange(1, 1 + np.count_nonzero(case.mask), dtype=dtype)

    def move(ranks: ThreadRanks):
        distribution = case.distribution(ranks)
        start, stop = distribution.columns
        np.testing.assert_array_equal(distribution.held_mask, case.held(ranks.rank, case.mask))
        held = case.held_unpruned(ranks.rank, columns)
        own = distribution.to_owners(library.array(held))
        assert numpy_dtype(own) == dtype
        np.testing.assert_array_equal(library.numpy(own), columns[start:stop])
        back = distribution.to_holders(own)
        assert numpy_dtype(back) == dtype
        np.testing.assert_array_equal(library.numpy(back), held)
        return start, stop

    assert run_ranks(case.size, move) == list(deal(len(columns), case.block_size, case.size))


@given(cases(), st.data())
def test_booleans_arrive_everywhere(case, data):
    bits = data.draw(hnp.arrays(bool, len(case.mask)))

    def move(ranks: ThreadRanks):
        distribution = case.distribution(ranks)
        everywhere = distribution.everywhere(case.held(ranks.rank, bits))
        of_columns = distribution.columns_everywhere(bits[case.mask][slice(*distribution.columns)])
        return everywhere, of_columns

    for everywhere, of_columns in run_ranks(case.size, move):
        assert everywhere.dtype == of_columns.dtype == np.bool_
        np.testing.assert_array_equal(everywhere, bits)
        np.testing.assert_array_equal(of_columns, bits[case.mask])


@with_fixture
@given(cases(), st.data(), st.sampled_from([np.nan, np.inf, -np.inf]), st.lists(st.floats(0, 1), max_size=3))
def test_a_row_that_is_not_finite_on_one_rank_is_known_to_all(library, case, data, wrong, cuts):
    row = np.arange(np.count_nonzero(case.mask), dtype=np.float32)
    bad = data.draw(st.none() | st.integers(0, len(row) - 1)) if len(row) else None
    if bad is not None:
        row[bad] = wrong

    def move(ranks: ThreadRanks):
        distribution = case.distribution(ranks)
        held = case.held_unpruned(ranks.rank, row)
        flag = np.array([not np.isfinite(held).all()], np.float32)
        # as the arrays of a model are: cut at any places
        vectors = np.split(held, sorted(int(cut * len(held)) for cut in cuts))
        own, flags = distribution.row_to_owners([library.array(each) for each in vectors], library.array(flag))
        found = [np.zeros(0, np.float32), *(library.numpy(each) for each in own)]
        np.testing.assert_array_equal(np.concatenate(found), row[slice(*distribution.columns)])
        assert len(ranks.calls) == (not case.shards.is_whole)
        return library.numpy(flags).tolist()

    for flags in run_ranks(case.size, move):
        assert set(flags) <= {0.0, 1.0}
        assert any(flags) == (bad is not None)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_replicas_send_nothing_while_they_collect(size):
    mask = np.array([True, False, True, True, True])

    def move(ranks: ThreadRanks):
        distribution = Distribution(ranks, Shards.whole({"w": (5,)}, size), mask, block_size=1)
        distribution.to_owners(np.arange(4.0))
        distribution.row_to_owners([np.arange(4.0)], np.zeros(1))
        distribution.everywhere(mask)
        return ranks.calls

    assert run_ranks(size, move) == [[]] * size


def test_a_rank_alone_sends_nothing():
    case = Case({"w": (5,)}, {"w": [(0, 5)]}, np.array([True, False, True, True, True]), 2, 1)
    alone = case.distribution(Alone())
    values = np.arange(4.0)
    assert alone.to_owners(values) is not None and np.shares_memory(alone.to_owners(values), values)
    assert np.shares_memory(alone.to_holders(values), values)
    assert alone.held_mask is case.mask


def test_each_entry_is_sent_once_and_only_to_its_owner():
    shards = Shards({"w": (12,)}, {"w": [(0, 6), (6, 12)]})

    def collect(ranks: ThreadRanks):
        distribution = Distribution(ranks, shards, np.ones(12, bool), block_size=4)
        distribution.to_owners(np.zeros(6))
        return ranks.calls

    # rank 0 owns two blocks of four: rank 1 sends it columns 6 and 7
    assert run_ranks(2, collect) == [[("exchange", 0)], [("exchange", 16)]]


def test_what_lies_between_two_intervals_is_not_sent():
    held, wanted = [[(0, 2), (4, 8)], [(2, 4)]], [[(3, 4)], [(0, 1), (3, 5), (7, 8)]]
    entries = [[0.0, 1.0, 4.0, 5.0, 6.0, 7.0], [2.0, 3.0]]

    def move(ranks: ThreadRanks):
        route = Route(ranks, held=held, wanted=wanted)
        return route.move(np.array(entries[ranks.rank])).tolist(), ranks.calls

    assert run_ranks(2, move) == [([3.0], [("exchange", 24)]), ([0.0, 3.0, 4.0, 7.0], [("exchange", 8)])]


def test_a_rank_takes_what_it_has_itself():
    held, wanted = [(4, 8), (0, 4), (0, 4)], [(4, 8), (0, 2), (1, 5)]

    def collect(ranks: ThreadRanks):
        route = Route(ranks, held=[[each] for each in held], wanted=[[each] for each in wanted])
        np.testing.assert_array_equal(route.move(np.arange(*map(float, held[ranks.rank]))), range(*wanted[ranks.rank]))
        return ranks.calls

    # rank 2 lacks a single entry, which rank 0 has
    assert run_ranks(3, collect) == [[("exchange", 8)], [("exchange", 0)], [("exchange", 0)]]


def test_replicas_of_shards_share_the_sending():
    held, wanted = [(0, 4), (0, 4), (4, 8), (4, 8)], [(4, 6), (6, 8), (0, 2), (2, 4)]

    def collect(ranks: ThreadRanks):
        route = Route(ranks, held=[[each] for each in held], wanted=[[each] for each in wanted])
        route.move(np.arange(*map(float, held[ranks.rank])))
        return ranks.calls

    assert run_ranks(4, collect) == [[("exchange", 16)]] * 4


def test_packed_booleans_take_one_bit_each():
    def move(ranks: ThreadRanks):
        distribution = Distribution(ranks, Shards.whole({"w": (160,)}, 2), np.ones(160, bool), block_size=1)
        distribution.columns_everywhere(np.ones(80, bool))
        return ranks.calls

    assert run_ranks(2, move) == [[("exchange", 10)]] * 2


@given(cases(), st.integers(1, 3), st.data())
def test_rows_move_to_new_owners(case, num_rows, data):
    """After a pruning step: the columns that are left, consecutive on each rank, are dealt anew."""
    before = int(np.count_nonzero(case.mask))
    rows = np.arange(float(num_rows * before)).reshape(num_rows, before)
    stay = data.draw(hnp.arrays(bool, before))
    after = rows[:, stay]
    dealt = deal(before, case.block_size, case.size)
    bounds = [int(np.count_nonzero(stay[:start])) for start, _ in dealt] + [after.shape[1]]
    left = [[(start, stop)] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]
    wanted = [[columns] for columns in deal(after.shape[1], case.block_size, case.size)]

    def move(ranks: ThreadRanks):
        (here,), (there,) = left[ranks.rank], wanted[ranks.rank]
        moved = Route(ranks, held=left, wanted=wanted).move(after[:, slice(*here)])
        np.testing.assert_array_equal(moved, after[:, slice(*there)])

    run_ranks(case.size, move)


@given(st.data())
def test_columns_that_several_ranks_have_loaded_are_sent_by_one(data):
    size, length = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 12))
    cuts = data.draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, length)), min_size=size, max_size=size))
    held = [[(min(pair), max(pair))] for pair in cuts]
    held[data.draw(st.integers(0, size - 1))] = [(0, length)]
    wanted = [[columns] for columns in deal(length, 1, size)]

    def move(ranks: ThreadRanks):
        (here,), (there,) = held[ranks.rank], wanted[ranks.rank]
        moved = Route(ranks, held=held, wanted=wanted).move(np.arange(*map(float, here)))
        np.testing.assert_array_equal(moved, np.arange(*map(float, there)))

    run_ranks(size, move)


def test_columns_that_no_rank_has_are_refused_by_all():
    def fail(ranks: ThreadRanks):
        Route(ranks, held=[[(0, 1)], [(2, 3)]], wanted=[[(0, 1)], [(0, 3)]])

    for error in outcomes(2, fail):
        assert str(error) == "no rank has all of [(0, 3)]; together they have [(0, 1), (2, 3)]"


@pytest.mark.parametrize(("size", "shape"), [(1, (4,)), (2, (3,))])
def test_shards_of_another_run_are_refused(size, shape):
    message = f"shards of {shape[0]} weights on {size} ranks do not fit 4 weights on 2 ranks"

    def fail(ranks: ThreadRanks):
        Distribution(ranks, Shards.whole({"w": shape}, size), np.ones(4, bool), block_size=None)

    with pytest.raises(ValueError, match=message):
        run_ranks(2, fail)
