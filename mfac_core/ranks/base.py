"""The contract by which processes communicate, and its form for a single process.

To use other means of communication, implement :class:`Ranks`; nothing else of it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt

from mfac_core.backends import Array

__all__ = ["Alone", "Ranks"]


class Ranks(Protocol):
    """The processes of one run, and how they communicate.

    :meth:`exchange` and :meth:`sum` are collective: all ranks call them in the same order, and each call waits for all
    others. Where another rank is gone, they raise :class:`mfac_core.RankError` instead of waiting forever.

    Attributes:
        rank: This process, from 0 to ``size - 1``.
        size: Number of processes.

    Example:
        >>> import numpy as np
        >>> ranks: Ranks = Alone()
        >>> ranks.rank, ranks.size, ranks.sum(np.array([2, 3])).tolist()
        (0, 1, [2, 3])
    """

    @property
    def rank(self) -> int:
        """This process, from 0 to ``size - 1``."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        """Send ``parts[i]`` to rank ``i``, and return what each rank has sent to this one, in the order of ranks.

        Parts are vectors of one dtype, the same on all ranks: float32, float64, int64 or uint8. They are of one library
        and on one device, and so are those that are returned. Their lengths may differ, and be 0. Where ranks know how
        much the others send, all pass :class:`mfac_core.ranks.Parts`, which say it.
        """

    def sum(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the sum over all ranks, element by element, with the same bits on each rank.

        ``array`` is a NumPy array of int64 or float64, with the same shape on all ranks, and is not modified.
        """


class Alone:
    """A single process.

    Example:
        >>> Alone().exchange([[1, 2]])
        [[1, 2]]
    """

    @property
    def rank(self) -> int:
        """0.

        Returns:
            This process.
        """
        return 0

    @property
    def size(self) -> int:
        """1.

        Returns:
            Number of processes.
        """
        return 1

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        """Return the part for this process.

        Args:
            parts: One vector.

        Returns:
            The same vector.
        """
        return list(parts)

    def sum(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the array itself.

        Args:
            array: A NumPy array.

        Returns:
            The same array.
        """
        return array
