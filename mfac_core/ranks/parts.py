"""What a rank sends in an exchange whose sizes all ranks know beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from mfac_core.backends import Array

__all__ = ["Parts"]


class Parts(Sequence[Array]):
    """The vectors that a rank sends in :meth:`Ranks.exchange`, consecutive slices of a single one.

    An implementation of ``Ranks`` may take them as any other vectors. It may also send :attr:`vector` as it is, without
    joining them, and need not ask the other ranks how much they send: if one passes ``Parts``, all do.

    Args:
        vector: The parts for all ranks, one after the other.
        lengths: How many numbers each rank is sent.
        arriving: How many numbers each rank sends to this one.

    Attributes:
        vector: The parts for all ranks, one after the other.
        lengths: How many numbers each rank is sent.
        arriving: How many numbers each rank sends to this one.

    Example:
        >>> import numpy as np
        >>> list(Parts(np.array([5.0, 6.0, 7.0]), [1, 2], [1, 4]))
        [array([5.]), array([6., 7.])]
    """

    def __init__(self, vector: Array, lengths: Sequence[int], arriving: Sequence[int]) -> None:
        self.vector = vector
        self.lengths = list(lengths)
        self.arriving = list(arriving)
        self._bounds = [0, *accumulate(lengths)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        """Return the part for a rank."""
        rank = range(len(self))[index]
        return self.vector[self._bounds[rank] : self._bounds[rank + 1]]
