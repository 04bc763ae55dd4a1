from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core import IllConditionedError, RankError
from mfac_core.ranks import Alone, Parts, Ranks, Shards
from mfac_core.ranks.agreement import gathered, same_on_all, together
from tests.core.thread_ranks import outcomes, run_ranks


def test_each_rank_receives_what_the_others_send():
    def exchange(ranks: Ranks):
        parts = [np.full(ranks.rank + to, 10 * ranks.rank + to, np.float32) for to in range(ranks.size)]
        return [part.tolist() for part in ranks.exchange(parts)]

    assert run_ranks(3, exchange) == [[[], [10], [20] * 2], [[1], [11] * 2, [21] * 3], [[2] * 2, [12] * 3, [22] * 4]]


def test_parts_are_slices_of_one_vector():
    vector = np.arange(5.0)
    parts = Parts(vector, [2, 0, 3], [1, 1, 1])
    assert [part.tolist() for part in parts] == [[0, 1], [], [2, 3, 4]]
    assert parts[-1].tolist() == [2, 3, 4] and len(parts) == 3
    assert all(np.shares_memory(part, vector) for part in (parts[0], parts[2]))
    with pytest.raises(IndexError):
        parts[3]


def test_a_sum_is_the_same_on_all_ranks():
    assert run_ranks(3, lambda ranks: ranks.sum(np.array([ranks.rank, 1])).tolist()) == [[3, 3]] * 3


def test_a_rank_that_raises_is_known_and_the_others_do_not_wait():
    def fail(ranks: Ranks):
        if ranks.rank == 1:
            raise OSError("disk full")
        ranks.sum(np.zeros(1))

    found = outcomes(3, fail)
    assert [type(each) for each in found] == [RankError, OSError, RankError]
    assert str(found[0]) == "rank 1 is gone"
    with pytest.raises(OSError, match="disk full"):
        run_ranks(3, fail)


def test_ranks_in_different_collectives_are_refused():
    def differ(ranks: Ranks):
        return ranks.sum(np.zeros(1)) if ranks.rank else ranks.exchange([np.zeros(1)] * 2)

    with pytest.raises(AssertionError, match="different collectives"):
        run_ranks(2, differ)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_values_of_all_ranks_arrive_exactly(size):
    def gather(ranks: Ranks):
        return gathered(ranks, [2**62 + ranks.rank, -1]), gathered(ranks, [0.1 * ranks.rank, np.inf, np.nan, 3])

    for integers, floats in run_ranks(size, gather):
        assert integers.tolist() == [[2**62 + rank, -1] for rank in range(size)]
        np.testing.assert_array_equal(floats, [[0.1 * rank, np.inf, np.nan, 3] for rank in range(size)])


def test_a_block_that_fails_on_one_rank_fails_on_all():
    def fail(ranks: Ranks):
        with together(ranks, "the update of the weights"):
            if ranks.rank == 2:
                raise IllConditionedError("block 7 of “w”")
        return "committed"

    found = outcomes(4, fail)
    assert [type(each) for each in found] == [RankError, RankError, IllConditionedError, RankError]
    expected = "rank 2 failed in the update of the weights: IllConditionedError: block 7 of “w”; nothing has changed"
    assert str(found[0]) == str(found[3]) == expected


def test_of_several_ranks_that_fail_each_raises_its_own_error():
    def fail(ranks: Ranks):
        with together(ranks, "reading"):
            if ranks.rank in (1, 2):
                raise OSError(f"file {ranks.rank} " + "x" * 5000)
        return "committed"

    found = outcomes(3, fail)
    assert str(found[0]).startswith("ranks 1 and 2 failed in reading: OSError: file 1 xxx")
    assert [str(each)[:6] for each in found[1:]] == ["file 1", "file 2"]


def test_a_block_that_succeeds_on_all_ranks_costs_one_small_sum():
    def succeed(ranks: Ranks):
        with together(ranks, "reading"):
            pass
        return ranks.calls

    assert run_ranks(2, succeed) == [[("sum", 16)]] * 2
    assert run_ranks(1, succeed) == [[]]


def test_blocks_inside_each_other_fail_on_all_ranks():
    def fail(ranks: Ranks):
        with together(ranks, "the step"), together(ranks, "the diagonal"):
            if ranks.rank == 0:
                raise ValueError("NaN")

    found = outcomes(3, fail)
    assert [type(each) for each in found] == [ValueError, RankError, RankError]
    assert "rank 0 failed in the diagonal" in str(found[1])


def test_the_error_of_a_rank_is_raised_even_if_the_others_are_gone():
    def fail(ranks: Ranks):
        if ranks.rank == 1:
            raise KeyboardInterrupt
        with together(ranks, "reading"):
            raise OSError("disk full")

    found = outcomes(2, fail)
    assert [type(each) for each in found] == [OSError, KeyboardInterrupt]


CURES = {"step": "pass the same steps_per_epoch", "lambda": "pass the same settings", "gradients": "use DDP"}


def compared(*values, size=None):
    def compare(ranks: Ranks):
        same_on_all(ranks, values[ranks.rank], CURES)

    found = outcomes(size or len(values), compare)
    assert len({str(each) for each in found}) == 1  # every rank raises the same
    assert {type(each) for each in found} <= {RankError, type(None)}
    return None if found[0] is None else str(found[0])


def test_values_that_are_the_same_on_all_ranks_pass():
    same = {"step": 3, "lambda": float("nan"), "gradients": "abc"}
    assert compared(same) is None
    assert compared(same, same, dict(same)) is None


def test_a_rank_that_differs_is_named_with_its_value():
    steps = [{"step": 120, "gradients": "a"}] * 3 + [{"step": 119, "gradients": "b"}]
    assert compared(*steps) == "ranks differ in step: 119 on rank 3, 120 on the others; pass the same steps_per_epoch"


def test_ranks_of_which_most_differ_are_named_with_their_values():
    steps = [{"step": step} for step in (5, 6, 5, 7)]
    expected = "ranks differ in step: 5 on ranks 0 and 2, 6 on rank 1, 7 on rank 3; pass the same steps_per_epoch"
    assert compared(*steps) == expected
    assert "0.5 on rank 0, 0.25 on rank 1" in compared({"lambda": np.float32(0.5)}, {"lambda": np.float32(0.25)})
    numbers = [{"lambda": 0.1}, {"lambda": np.nextafter(0.1, 1)}]
    expected = "ranks differ in lambda: 0.1 on rank 0, 0.10000000000000002 on rank 1; pass the same settings"
    assert compared(*numbers) == expected


def test_texts_are_compared_and_not_shown():
    texts = [{"step": 1, "gradients": text} for text in "aaba"]
    assert compared(*texts) == "ranks differ in gradients: rank 2 from the others; use DDP"
    assert compared(*[{"gradients": text} for text in "abcd"]) == "ranks differ in gradients; use DDP"


def test_only_a_few_of_many_values_are_named():
    message = compared(*[{"step": step} for step in range(9)])
    assert message == (
        "ranks differ in step: 0 on rank 0, 1 on rank 1, 2 on rank 2, 3 on rank 3; pass the same steps_per_epoch"
    )


def test_alone_everything_is_known():
    alone = Alone()
    values = np.arange(3)
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.exchange([values]) == [values] and alone.sum(values) is values
    with pytest.raises(OSError), together(alone, "reading"):
        raise OSError


def chunked(length: int, size: int) -> list[tuple[int, int]]:
    """The ranges of ``torch.chunk``."""
    step = -(-length // size) if length else 1
    return [(min(rank * step, length), min((rank + 1) * step, length)) for rank in range(size)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 5))
def test_the_parts_of_an_array_are_those_of_fsdp(shape, size):
    full = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    in_row = int(np.prod(shape[1:], dtype=int))
    rows = chunked(shape[0], size)
    shards = Shards({"w": tuple(shape)}, {"w": [(in_row * start, in_row * stop) for start, stop in rows]})
    for rank, (start, stop) in enumerate(rows):
        part = shards.local("w", full, rank)
        assert part.shape == shards.local_shape("w", rank)
        if full.size:
            np.testing.assert_array_equal(part, full[start:stop])


def test_a_part_that_ends_inside_a_row_is_flat():
    shards = Shards({"w": (2, 3)}, {"w": [(0, 2), (2, 6)]})
    assert [shards.local("w", np.arange(6).reshape(2, 3), rank).tolist() for rank in (0, 1)] == [[0, 1], [2, 3, 4, 5]]


def test_whole_arrays_of_all_ranks_are_no_shards():
    whole = Shards.whole({"w": (2, 3), "b": ()}, 2)
    assert whole.is_whole
    assert whole.of_rank(1) == {"w": (0, 6), "b": (0, 1)}
    assert whole.local_shape("b", 1) == ()
    assert not Shards({"w": (2,)}, {"w": [(0, 2), (0, 1)]}).is_whole


def test_the_shards_of_some_arrays_keep_their_order():
    shards = Shards({"a": (2,), "b": (2,), "c": (2,)}, {name: [(0, 1), (1, 2)] for name in "cba"})
    assert list(shards.restricted(["c", "a"]).of_rank(0)) == ["a", "c"]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({}, "missing: ['w']"),
        ({"w": [(0, 4)], "v": [(0, 1)]}, "unknown: ['v']"),
        ({"w": []}, "one range for each rank"),
        ({"w": [(0, 5)]}, "range (0, 5) does not fit w, which has 4 entries"),
        ({"w": [(2, 1), (0, 4)]}, "range (2, 1) does not fit w"),
        ({"w": [(0, 1), (2, 4)]}, "no rank has entry 1 of w"),
        ({"w": [(0, 1), (1, 3), (3, 3)]}, "no rank has entry 3 of w"),
    ],
)
def test_ranges_that_do_not_cover_an_array_are_refused(ranges, message):
    with pytest.raises(ValueError) as caught:
        Shards({"w": (4,)}, ranges)
    assert message in str(caught.value)
