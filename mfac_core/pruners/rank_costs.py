"""What each of several ranks keeps, computes and sends, before the run: the one with the most blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from mfac_core.pruners.memory import COMPUTED_ITEMSIZE, WindowMemory

__all__ = ["RankCosts", "Traffic", "rank_costs"]

_BITS = 8


class Traffic(NamedTuple):
    """What a rank sends, in bytes; sums of a few kilobytes are not counted.

    Attributes:
        per_row: At most so much of each gradient sample, while the window collects.
        per_step: At most so much at a pruning step, besides live rows, which move to the new owners of their columns.
    """

    per_row: int
    per_step: int


class RankCosts(NamedTuple):
    """What the rank with the most blocks keeps, computes and sends, for the largest gradient window of a run.

    Attributes:
        num_ranks: Number of ranks.
        columns: Unpruned weights whose blocks it owns.
        blocks: Number of these blocks.
        window_bytes: Bytes of its window.
        needed_bytes: Bytes that it needs for windows and computation.
        operations: About the number of floating-point operations of the inverse diagonal of its blocks. The joint
            update takes about as many again.
        moved_bytes: Bytes of live rows that it sends at most at a pruning step, if their columns get another owner.
        replicated: What it sends if every rank has all weights.
        sharded: What it sends if every rank has an equal part of each weight array.
    """

    num_ranks: int
    columns: int
    blocks: int
    window_bytes: int
    needed_bytes: int
    operations: int
    moved_bytes: int
    replicated: Traffic
    sharded: Traffic


def rank_costs(memory: WindowMemory) -> RankCosts:
    """Return what the rank with the most blocks keeps, computes and sends.

    Example:
        >>> from mfac_core.settings.pruning import MFACSettings
        >>> from mfac_core.schedules.pruning import ScheduledStep
        >>> settings = MFACSettings(final_sparsity=0.5, end_epoch=1, num_gradients=64)
        >>> costs = rank_costs(WindowMemory(settings, 100_000, [ScheduledStep(1, 1.0, 0.5)], num_ranks=8))
        >>> costs.blocks, costs.columns, costs.window_bytes, costs.replicated.per_row, costs.sharded.per_row
        (7, 14000, 3584000, 0, 50000)
    """
    memory = replace(memory, rank=0)  # which has the most blocks
    rows, own = memory.peak()
    _, columns = replace(memory, num_ranks=1).peak()
    width = memory.settings.block_size or max(columns, 1)
    others = memory.num_ranks - 1
    # of a weight array, or a row, each of the ranks has a share of this size
    share = -(-columns // memory.num_ranks) * COMPUTED_ITEMSIZE if others else 0
    # the mask is complete on all ranks
    mask = others * -(-own // _BITS)
    zeros = others * -(-memory.num_weights // (memory.num_ranks * _BITS))
    weights = own * COMPUTED_ITEMSIZE
    return RankCosts(
        memory.num_ranks,
        own,
        -(-own // width),
        memory.peak_bytes(),
        memory.needed_bytes(),
        # the dual form: a symmetric product and a triangular solve; the primal form has the width in place of m
        2 * rows * min(rows, width) * own,
        rows * own * COMPUTED_ITEMSIZE if others and memory.live_gradients else 0,
        # all new weights of its columns go to each other rank
        replicated=Traffic(0, others * weights + mask),
        # its part of the weights goes to the owners of its columns, and the new weights back
        sharded=Traffic(share, share + (weights if others else 0) + mask + zeros),
    )
