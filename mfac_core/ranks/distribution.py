"""The unpruned weights over the ranks: blocks are dealt to owners, and vectors move between these and the holders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array
from mfac_core.ranks.base import Ranks
from mfac_core.ranks.routes import Consecutive, Interval, Route
from mfac_core.ranks.shards import Shards

__all__ = ["Distribution", "deal"]

Bits = npt.NDArray[np.bool_]


def deal(num_columns: int, block_size: int | None, size: int) -> tuple[Interval, ...]:
    """Deal whole blocks of columns to ranks: consecutive ones, numbers of blocks that differ by at most one.

    Args:
        num_columns: Number of columns ``d``, one for each unpruned weight.
        block_size: Columns per block; the last block may be shorter. ``None`` means one block, which rank 0 owns.
        size: Number of ranks.

    Returns:
        First and one-past-last column that each rank owns.

    Example:
        >>> deal(10, 3, 3)
        ((0, 6), (6, 9), (9, 10))
    """
    width = max(num_columns, 1) if block_size is None else block_size
    each, larger = divmod(-(-num_columns // width), size)
    bounds = [min((rank * each + min(rank, larger)) * width, num_columns) for rank in range(size + 1)]
    return tuple(zip(bounds[:-1], bounds[1:], strict=True))


class Distribution:
    """The unpruned weights of one mask over the ranks.

    Blocks are cut over the vector of all unpruned weights, so they do not depend on the number of ranks. The columns of
    a rank are those of the blocks that it owns; what it holds are the weights that it has.

    Args:
        ranks: The ranks.
        shards: What each rank has of the weights in scope.
        mask: Which of these are unpruned, shape ``(n,)``, alike on all ranks.
        block_size: Weights per Fisher block; ``None`` means one block.

    Attributes:
        ranks: The ranks.
        mask: Which weights in scope are unpruned.
        is_whole: Whether each rank has all weights.
        ranges: First and one-past-last column that each rank owns.
        num_columns: Number of unpruned weights ``d``.

    Raises:
        ValueError: If the shards are those of another number of ranks or weights.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> mask = np.array([True, False, True])
        >>> alone = Distribution(Alone(), Shards.whole({"w": (3,)}, 1), mask, block_size=2)
        >>> alone.columns, alone.to_owners(np.array([5.0, 7.0]))
        ((0, 2), array([5., 7.]))
    """

    def __init__(self, ranks: Ranks, shards: Shards, mask: Bits, *, block_size: int | None) -> None:
        if shards.size != ranks.size or shards.num_entries != len(mask):
            raise ValueError(
                f"shards of {shards.num_entries} weights on {shards.size} ranks do not fit {len(mask)} weights on "
                f"{ranks.size} ranks"
            )
        self.ranks = ranks
        self.mask = mask
        self.is_whole = shards.is_whole
        self._held = [shards.positions(rank) for rank in range(ranks.size)]
        self.num_columns = int(np.count_nonzero(mask))
        self.ranges = deal(self.num_columns, block_size, ranks.size)

    @property
    def columns(self) -> Interval:
        """First and one-past-last column that this rank owns."""
        return self.ranges[self.ranks.rank]

    @cached_property
    def held_mask(self) -> Bits:
        """Which of the weights that this rank has are unpruned, in order."""
        if self.is_whole:
            return self.mask
        return np.concatenate([self.mask[start:stop] for start, stop in self._held[self.ranks.rank]])

    def to_owners(self, held: Array) -> Array:
        """Return the columns of this rank, from the unpruned weights, or other numbers, that each rank holds.

        Collective, unless the ranks are replicas.
        """
        return self._to_owners.move(held)

    def row_to_owners(self, vectors: Sequence[Array], flag: Array) -> tuple[list[Array], Array]:
        """Do the same with a gradient sample, and tell all ranks whether any holds NaN or Inf, in the same exchange.

        Args:
            vectors: The unpruned entries that this rank holds, in order, in consecutive vectors.
            flag: A vector of one number, of their dtype: not 0 if an entry is NaN or Inf.

        Returns:
            The columns of this rank, in order, in consecutive vectors; and the flags, one of each rank, or that of this
            one if the ranks are replicas.
        """
        if self.is_whole:
            return Consecutive(vectors).cut(*self.columns), flag
        return self._to_owners.move_flagged(vectors, flag)

    def to_holders(self, own: Array) -> Array:
        """Return what this rank holds of the columns of all ranks, in order; collective if there are several ranks."""
        return self._to_holders.move(own)

    def everywhere(self, held: Bits) -> Bits:
        """Return booleans of all ``n`` weights in scope, from those of the weights, pruned or not, that each rank has.

        Collective, unless the ranks are replicas.
        """
        everything = [[(0, len(self.mask))]] * self.ranks.size
        return Route(self.ranks, held=self._held, wanted=everything).move_bits(held)

    def columns_everywhere(self, own: Bits) -> Bits:
        """Return booleans of all columns, shape ``(d,)``, from those of each rank; collective for several ranks."""
        return self._to_all.move_bits(own)

    def complete(self, own: Array) -> Array:
        """Return the numbers of all columns, shape ``(d,)``, from those of each rank; collective for several ranks."""
        return self._to_all.move(own)

    @property
    def _owned(self) -> list[list[Interval]]:
        return [[columns] for columns in self.ranges]

    @cached_property
    def _held_columns(self) -> list[list[Interval]]:
        bounds = sorted({0, *(bound for held in self._held for interval in held for bound in interval)})
        pairs = zip(bounds[:-1], bounds[1:], strict=True)
        before = accumulate((int(np.count_nonzero(self.mask[start:stop])) for start, stop in pairs), initial=0)
        columns = dict(zip(bounds, before, strict=True))
        return [[(columns[start], columns[stop]) for start, stop in held] for held in self._held]

    @cached_property
    def _to_all(self) -> Route:
        return Route(self.ranks, held=self._owned, wanted=[[(0, self.num_columns)]] * self.ranks.size)

    @cached_property
    def _to_owners(self) -> Route:
        return Route(self.ranks, held=self._held_columns, wanted=self._owned)

    @cached_property
    def _to_holders(self) -> Route:
        return Route(self.ranks, held=self._owned, wanted=self._held_columns)
