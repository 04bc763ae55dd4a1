"""Routes of entries from the ranks that have them to those that want them: index arithmetic and one exchange.

A rank's entries are those of a few intervals of one long vector, in order. So whatever one rank sends to another is a
few slices of what it has, and the receiver joins the slices of all ranks in the order of the long vector.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace, device_of
from mfac_core.ranks.base import Ranks

__all__ = ["Interval", "Route"]

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
        self._joined = _pieces(cover, wanted[own], own)
        from_here = [segment for segment in cover if own in segment[2]]
        self._sent = [
            [piece for piece in _pieces(from_here, each, to) if own == piece.source != to]
            for to, each in enumerate(wanted)
        ]
        self._held = held[own]
        self._offsets = [0, *accumulate(stop - start for start, stop in self._held)]

    def move(self, array: Array) -> Array:
        """Return the entries that this rank wants, in order; collective, unless all ranks have what they want.

        Args:
            array: The entries that this rank has, in order, along the last axis; the other axes are alike on all ranks.
        """
        if self._is_local:
            return self.joined(array, {})
        return self.joined(array, self._ranks.exchange(self.parts(array)))

    def move_bits(self, bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Do the same for booleans in host memory, eight to a byte."""
        received = {}
        if not self._is_local:
            packed = [np.packbits(part) for part in self.parts(bits)]
            received = {
                source: np.unpackbits(part, count=self._num_received(source)).view(np.bool_)
                for source, part in enumerate(self._ranks.exchange(packed))
            }
        joined: npt.NDArray[np.bool_] = self.joined(bits, received)
        return joined

    def parts(self, array: Array) -> list[Array]:
        """Return the vector that each rank needs of the entries of this one; an empty one for this rank itself."""
        device = device_of(array)
        with device.backend.on(device.name):
            reshape = array_namespace(array).reshape
            slices = ([self._slice(array, piece) for piece in pieces] for pieces in self._sent)
            return [reshape(_concatenated(of_rank, array), (-1,)) for of_rank in slices]

    def joined(self, array: Array, received: Sequence[Array] | dict[int, Array]) -> Array:
        """Return the entries that this rank wants, from those that it has and what it has received from each rank."""
        device = device_of(array)
        with device.backend.on(device.name):
            reshape = array_namespace(array).reshape
            others = {piece.source for piece in self._joined} - {self._ranks.rank}
            arrived = {source: reshape(received[source], (*array.shape[:-1], -1)) for source in others}
            first = dict.fromkeys(others, 0)
            found = []
            for piece in self._joined:
                if piece.source == self._ranks.rank:
                    found.append(self._slice(array, piece))
                    continue
                last = first[piece.source] + piece.stop - piece.start
                found.append(arrived[piece.source][..., first[piece.source] : last])
                first[piece.source] = last
            return _concatenated(found, array)

    def _slice(self, array: Array, piece: _Piece) -> Array:
        # neighbouring entries of the long vector are neighbours here too
        index = bisect_right(self._held, piece.start, key=itemgetter(0)) - 1
        first = self._offsets[index] + piece.start - self._held[index][0]
        return array[..., first : first + piece.stop - piece.start]

    def _num_received(self, source: int) -> int:
        if source == self._ranks.rank:
            return 0
        return sum(piece.stop - piece.start for piece in self._joined if piece.source == source)


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
