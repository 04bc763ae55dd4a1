"""What `mfac plan --ranks` says is what windows take, and what ranks really send."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core import MemoryBudgetError, MFACSettings
from mfac_core.backends import resolve_device
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.fisher.window import GradientWindow
from mfac_core.pruners.memory import WindowMemory
from mfac_core.pruners.rank_costs import Traffic, rank_costs
from mfac_core.ranks import Shards
from mfac_core.ranks.distribution import Distribution, deal
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.session.plan import plan_model
from tests.core.rank_runs import by_rows, gradient_at, on_rank, weights_at_start
from tests.core.thread_ranks import ThreadRanks, run_ranks

SETTINGS = MFACSettings(final_sparsity=0.5, end_epoch=1.0, num_gradients=6, block_size=5)


def memory_of(d: int, num_ranks: int, live: bool = True, **changes) -> WindowMemory:
    steps = [ScheduledStep(1, 1.0, 0.5), ScheduledStep(2, 2.0, 0.75)]
    return WindowMemory(replace(SETTINGS, **changes), d, steps, live_gradients=live, num_ranks=num_ranks)


@given(st.integers(1, 300), st.integers(1, 9), st.none() | st.integers(1, 40), st.sampled_from(["float32", "bfloat16"]))
@settings(deadline=None)
def test_the_window_and_the_blocks_are_those_of_the_rank_with_the_most(d, num_ranks, block_size, dtype):
    if block_size is None:
        dtype = "float32"
    memory = memory_of(d, num_ranks, block_size=block_size, gradients_dtype=dtype)
    costs = rank_costs(memory)
    windows = [
        GradientWindow(stop - start, 6, block_size=block_size, dtype=dtype)
        for start, stop in deal(d, block_size, num_ranks)
    ]
    assert costs.window_bytes == max(window.num_bytes for window in windows)
    assert costs.blocks == max(sum(group.count for group in window.stored_groups) for window in windows)
    assert costs.columns == max(window.num_weights for window in windows)
    assert sum(window.num_bytes for window in windows) == 6 * d * memory.row_format.itemsize
    assert costs.operations == 2 * 6 * min(6, block_size or d) * costs.columns


@pytest.mark.parametrize("live", [False, True])
def test_memory_is_that_of_the_share(live):
    # whole blocks of the same size on each rank, before and after a pruning step: exactly a quarter
    whole, share = memory_of(4000, 1, live), memory_of(4000, 4, live)
    assert share.bytes_at_once() == whole.bytes_at_once() / 4
    block = whole.needed_bytes() - 6 * 4000 * 4 if not live else 0
    assert share.needed_bytes() == (whole.needed_bytes() - block) / 4 + block
    assert (share.peak(), whole.peak()) == ((6, 1000), (6, 4000))


def test_too_large_a_share_is_refused_with_its_numbers(monkeypatch):
    memory = memory_of(4000, 4)
    monkeypatch.setattr(NumpyBackend, "free_bytes", lambda self, device: memory.needed_bytes())
    assert memory.check(resolve_device("cpu")) == memory.needed_bytes()
    with pytest.raises(MemoryBudgetError, match="6 gradient samples of 2,000 unpruned weights"):
        replace(memory, num_ranks=2).check(resolve_device("cpu"))


SHAPES = {f"layer {index}": (8, 4 + index % 2) for index in range(24)}
TOTAL = sum(map(math.prod, SHAPES.values()))


def shards(size: int, sharded: bool) -> Shards:
    if not sharded:
        return Shards.whole(SHAPES, size)
    each = {name: math.prod(shape) // size for name, shape in SHAPES.items()}
    return Shards(SHAPES, {name: [(k * n, (k + 1) * n) for k in range(size)] for name, n in each.items()})


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sharded", [False, True])
def test_no_rank_sends_more_than_is_said(size, sharded):
    """The vectors that a row and a pruning step move, by the functions that move them in a run."""

    def sent(ranks: ThreadRanks) -> Traffic:
        distribution = Distribution(ranks, shards(size, sharded), np.ones(TOTAL, bool), block_size=5)
        held = np.arange(distribution.held_mask.sum(), dtype=np.float32)
        distribution.row_to_owners([held], np.zeros(1, np.float32))
        per_row = sum(num_bytes for _, num_bytes in ranks.calls)
        num_calls = len(ranks.calls)
        distribution.everywhere(held > 0)
        own = distribution.to_owners(held)
        distribution.columns_everywhere(own > 0)
        distribution.to_holders(own)
        return Traffic(per_row, sum(num_bytes for _, num_bytes in ranks.calls[num_calls:]))

    costs = rank_costs(memory_of(TOTAL, size))
    said = costs.sharded if sharded else costs.replicated
    found = run_ranks(size, sent)
    flags = 4 * (size - 1)  # that the part of a row is finite, to each other rank
    for traffic in found:
        assert traffic.per_row <= said.per_row + flags
        assert traffic.per_step <= said.per_step
    most = Traffic(*(max(each) for each in zip(*found, strict=True)))
    if sharded:
        # a rank keeps about 1/size of its shard, and has about that of its columns
        assert most.per_row >= said.per_row * (size - 1) / size * 0.9
        assert most.per_step >= said.per_step * (size - 1) / size * 0.9
    else:
        assert most == said


def test_a_plan_for_ranks_says_what_one_of_them_needs():
    plan = plan_model([SETTINGS, SETTINGS], [{"w": 4000}, {"w": 8000}], steps_per_epoch=10, num_ranks=4)
    first, second = (modifier.of_rank for modifier in plan.modifiers)
    assert (first.num_ranks, first.columns, first.blocks) == (4, 1000, 200)
    assert plan.needed_bytes_of_rank == first.needed_bytes + second.needed_bytes < plan.needed_bytes
    alone = plan_model([SETTINGS], [{"w": 4000}], steps_per_epoch=10)
    assert alone.modifiers[0].of_rank is None and alone.needed_bytes_of_rank == 0


def test_a_single_rank_sends_nothing():
    costs = rank_costs(memory_of(4000, 1))
    assert costs.replicated == costs.sharded == Traffic(0, 0)
    assert costs.moved_bytes == 0
    assert rank_costs(memory_of(4000, 2)).moved_bytes == 6 * 2000 * 4
    assert rank_costs(memory_of(4000, 2, live=False)).moved_bytes == 0


def test_all_costs_fall_with_the_number_of_ranks():
    one, eight = (rank_costs(memory_of(80_000, size)) for size in (1, 8))
    for name in ("columns", "blocks", "window_bytes", "operations"):
        assert getattr(eight, name) == getattr(one, name) / 8, name


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 4])
def test_no_rank_of_a_run_sends_more_than_is_planned(size, dtype, layout):
    made = MFACSettings(
        final_sparsity=0.75, start_epoch=1.0, end_epoch=3.0, num_gradients=4, block_size=5, gradients_dtype=dtype
    )
    of_run = None if layout == "replicated" else by_rows(size, SHAPES)

    def train(ranks: ThreadRanks) -> tuple[int, list[int], list[int]]:
        run = on_rank(ranks, made, of_run, weights=weights_at_start(SHAPES))
        pruner, weights = run.pruner, run.part(run.full)

        def exchanged(since: int) -> int:
            return sum(num_bytes for name, num_bytes in ranks.calls[since:] if name == "exchange")

        per_row, per_step = [], []
        for step in range(3 * 4 + 1):
            pruner.check_ranks(step)
            before = len(ranks.calls)
            if pruner.is_due(step):
                weights = pruner.prune(weights, step).weights
                per_step.append(exchanged(before))
            before = len(ranks.calls)
            if pruner.needs_gradients(step):
                pruner.observe(run.part(gradient_at(step, SHAPES)))
                per_row.append(exchanged(before))
        return pruner.window_bytes, per_row, per_step

    plan = plan_model([made], [{name: math.prod(shape) for name, shape in SHAPES.items()}], 4, num_ranks=size)
    said = plan.modifiers[0].of_rank
    traffic = said.replicated if layout == "replicated" else said.sharded
    found = run_ranks(size, train)
    assert max(window_bytes for window_bytes, *_ in found) == said.window_bytes
    flags = 0 if layout == "replicated" else 4 * (size - 1)
    for _, per_row, per_step in found:
        assert len(per_row) == 2 * 4 and len(per_step) == 3
        assert max(per_row) <= traffic.per_row + flags
        # live rows move after all but the last, in float32
        assert all(each <= traffic.per_step + said.moved_bytes for each in per_step[:-1])
        assert per_step[-1] <= traffic.per_step
    assert max(per_row[0] for _, per_row, _ in found) >= 0.4 * traffic.per_row
