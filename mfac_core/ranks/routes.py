"""Routes of entries from the ranks that have them to those that want them: index arithmetic and one exchange.

A rank's entries are those of a few intervals of one long vector, in order. So whatever one rank sends to another is a
few slices of what it has, and the receiver joins the slices of all ranks in the order of the long vector.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace, device_of
from mfac_core.ranks.base import Ranks
from mfac_core.ranks.parts import Parts

__all__ = ["Consecutive", "Interval", "Route"]

Interval = tuple[int, int]
"""First and one-past-last position."""

_Segment = tuple[int, int, list[int]]
"""An interval with the ranks that have it."""


class _Piece(NamedTuple):
    start: int
    stop: int
    source: int


class Route:
    """How entries move from the ranks that have them to those that want them.

    A rank takes what it has itself; what several others have, one of them sends.

    Args:
        ranks: The ranks.
        held: For each rank the intervals that it has, in order and disjoint.
        wanted: For each rank the intervals that it wants, in order and disjoint; some rank has each of their positions.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> Route(Alone(), held=[[(0, 4)]], wanted=[[(0, 1), (2, 4)]]).move(np.array([5.0, 6.0, 7.0, 8.0]))
        array([5., 7., 8.])
    """

    def __init__(
        self, ranks: Ranks, *, held: Sequence[Sequence[Interval]], wanted: Sequence[Sequence[Interval]]
    ) -> None:
        held, wanted = [_merged(each) for each in held], [_merged(each) for each in wanted]
        cover = _cover(held)
        somewhere = _merged([(start, stop) for start, stop, _ in cover])
        # the same on all ranks: all refuse, and all exchange or none
        lacking = [each for each in wanted if not _contain(somewhere, each)]
        if lacking:
            raise ValueError(f"no rank has all of {lacking[0]}; together they have {somewhere}")
        self._is_local = all(map(_contain, held, wanted))
        self._ranks = ranks
        own = ranks.rank
        offsets = [0, *accumulate(stop - start for start, stop in held[own])]

        def here(piece: _Piece) -> Interval:
            # neighbouring entries of the long vector are neighbours here too
            index = bisect_right(held[own], piece.start, key=itemgetter(0)) - 1
            first = offsets[index] + piece.start - held[own][index][0]
            return first, first + piece.stop - piece.start

        from_here = [segment for segment in cover if own in segment[2]]
        # what each rank is sent, among the entries of this one
        self._sent = [
            [here(piece) for piece in _pieces(from_here, each, to) if own == piece.source != to]
            for to, each in enumerate(wanted)
        ]
        # where what is wanted comes from: a rank, and positions among what it sends, or the entries of this one
        self._wanted: list[tuple[int, Interval]] = []
        self._num_received = [0] * ranks.size
        for piece in _pieces(cover, wanted[own], own):
            if piece.source == own:
                self._wanted.append((own, here(piece)))
                continue
            first = self._num_received[piece.source]
            self._num_received[piece.source] += piece.stop - piece.start
            self._wanted.append((piece.source, (first, self._num_received[piece.source])))

    def move(self, array: Array) -> Array:
        """Return the entries that this rank wants, in order; collective, unless all ranks have what they want.

        Args:
            array: The entries that this rank has, in order, along the last axis; the other axes are alike on all ranks.
        """
        device = device_of(array)
        with device.backend.on(device.name):
            held = Consecutive([array])
            received: list[Array] = []
            if not self._is_local:
                reshape = array_namespace(array).reshape
                parts = [[reshape(_concatenated(slices, array), (-1,))] for slices in self._parts(held)]
                rows = math.prod(array.shape[:-1])
                arrived = self._exchanged(parts, [rows * count for count in self._num_received])
                received = [reshape(part, (*array.shape[:-1], -1)) for part in arrived]
            return _concatenated(self._pieces(held, received), array)

    def move_bits(self, bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Do the same for booleans in host memory, eight to a byte."""
        held = Consecutive([bits])
        received: list[Array] = []
        if not self._is_local:
            packed = [[np.packbits(_concatenated(slices, bits))] for slices in self._parts(held)]
            arrived = self._exchanged(packed, [-(-count // 8) for count in self._num_received])
            received = [
                np.unpackbits(part, count=count).view(np.bool_)
                for part, count in zip(arrived, self._num_received, strict=True)
            ]
        moved: npt.NDArray[np.bool_] = _concatenated(self._pieces(held, received), bits)
        return moved

    def move_flagged(self, vectors: Sequence[Array], flag: Array) -> tuple[list[Array], Array]:
        """Move entries in consecutive vectors, and tell a flag to all ranks along with them; always collective.

        What is sent is copied once. Nothing else is copied.

        Args:
            vectors: The entries that this rank has, in order.
            flag: A vector of one number, of their dtype.

        Returns:
            The entries that this rank wants, in order, in consecutive vectors; and the flags of all ranks.
        """
        held = Consecutive(vectors)
        parts = [[*slices, flag] for slices in self._parts(held)]
        received = self._exchanged(parts, [count + 1 for count in self._num_received])
        return self._pieces(held, received), array_namespace(flag).concat([part[-1:] for part in received])

    def _exchanged(self, parts: Sequence[Sequence[Array]], arriving: Sequence[int]) -> list[Array]:
        """Send each rank its vectors, and return those that arrive from each, of known lengths."""
        lengths = [sum(vector.shape[0] for vector in vectors) for vectors in parts]
        everything = list(chain.from_iterable(parts))
        return self._ranks.exchange(Parts(array_namespace(everything[0]).concat(everything), lengths, arriving))

    def _parts(self, held: Consecutive) -> list[list[Array]]:
        """Return what each rank needs of the entries of this one; nothing for this rank itself."""
        return [[piece for start, stop in intervals for piece in held.cut(start, stop)] for intervals in self._sent]

    def _pieces(self, held: Consecutive, received: Sequence[Array]) -> list[Array]:
        """Return the entries that this rank wants, from those that it has and what it has received from each rank."""
        pieces: list[Array] = []
        for source, (start, stop) in self._wanted:
            if source == self._ranks.rank:
                pieces += held.cut(start, stop)
            else:
                pieces.append(received[source][..., start:stop])
        return pieces


class Consecutive:
    """Arrays of consecutive entries along their last axis.

    Example:
        >>> Consecutive([np.array([5.0, 6.0]), np.array([7.0, 8.0])]).cut(1, 3)
        [array([6.]), array([7.])]
    """

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._arrays = arrays
        self._ends = list(accumulate(array.shape[-1] for array in arrays))

    def cut(self, start: int, stop: int) -> list[Array]:
        """Return the entries from ``start`` to ``stop``, as views where the library has views."""
        found = []
        index = bisect_right(self._ends, start)
        while start < stop:
            array, end = self._arrays[index], self._ends[index]
            before = end - array.shape[-1]
            found.append(array[..., start - before : min(stop, end) - before])
            start, index = end, index + 1
        return found


def _concatenated(arrays: list[Array], like: Array) -> Array:
    """Return arrays joined along their last axis, in a new array unless it is one; none of them give an empty one."""
    if not arrays:
        return like[..., :0]
    return arrays[0] if len(arrays) == 1 else array_namespace(like).concat(arrays, axis=-1)


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Return intervals without empty ones, and neighbours as one."""
    merged: list[Interval] = []
    for start, stop in intervals:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        elif start < stop:
            merged.append((start, stop))
    return merged


def _cover(held: Sequence[Sequence[Interval]]) -> list[_Segment]:
    """Return all that is held, cut where it begins or ends on a rank, each segment with the ranks that have it."""
    cuts = sorted({cut for of_rank in held for interval in of_rank for cut in interval})
    number = {cut: index for index, cut in enumerate(cuts)}
    holders: list[list[int]] = [[] for _ in cuts]
    for rank, of_rank in enumerate(held):
        for start, stop in of_rank:
            for index in range(number[start], number[stop]):
                holders[index].append(rank)
    return [(start, stop, having) for start, stop, having in zip(cuts, cuts[1:], holders, strict=False) if having]


def _pieces(segments: Sequence[_Segment], wanted: Sequence[Interval], to: int) -> list[_Piece]:
    """Return what a rank wants of the segments, with the ranks that it comes from, in as few pieces as possible."""
    pieces: list[_Piece] = []
    for start, stop in wanted:
        index = max(bisect_right(segments, start, key=itemgetter(0)) - 1, 0)
        for position in range(index, len(segments)):
            first, end, holders = segments[position]
            if first >= stop:
                break
            if end <= start:
                continue
            # its own entries, or else those of one of the holders, of which each serves its share of the ranks
            source = to if to in holders else holders[to % len(holders)]
            piece = _Piece(max(first, start), min(end, stop), source)
            if pieces and (pieces[-1].stop, pieces[-1].source) == (piece.start, source):
                piece = _Piece(pieces.pop().start, piece.stop, source)
            pieces.append(piece)
    return pieces


def _contain(held: Sequence[Interval], wanted: Sequence[Interval]) -> bool:
    """Return whether merged intervals contain others."""
    for start, stop in wanted:
        index = bisect_right(held, start, key=itemgetter(0)) - 1
        if index < 0 or held[index][1] < stop:
            return False
    return True
