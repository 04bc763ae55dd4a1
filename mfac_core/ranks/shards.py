"""Which part of each weight array each rank has."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

from mfac_core.backends import Array, array_namespace

__all__ = ["Shards"]


class Shards:
    """The range of each flattened array that each rank has: everything, a shard, or nothing.

    Several ranks may have the same entries (replicas), but together they have all of them.

    Args:
        shapes: Name and full shape of each array, in order.
        ranges: For each array the first and one-past-last position that each rank has, in the order of ranks; positions
            count the entries of the array in row-major order.

    Raises:
        ValueError: If the ranges do not fit the shapes, or no rank has some entry.

    Example:
        >>> shards = Shards({"w": (5, 2), "b": (3,)}, {"w": [(0, 6), (6, 10)], "b": [(0, 2), (2, 3)]})
        >>> shards.of_rank(1), shards.local_shape("w", 1), shards.is_whole
        ({'w': (6, 10), 'b': (2, 3)}, (2, 2), False)
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], ranges: Mapping[str, Sequence[tuple[int, int]]]) -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        missing = [name for name in shapes if name not in ranges]
        unknown = [name for name in ranges if name not in shapes]
        if missing or unknown:
            raise ValueError(
                "ranges must have exactly the names of the shapes; "
                f"missing: {missing or 'none'}, unknown: {unknown or 'none'}"
            )
        self._ranges = {name: tuple((start, stop) for start, stop in ranges[name]) for name in self._shapes}
        sizes = {name: len(of_array) for name, of_array in self._ranges.items()}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(
                f"each array needs one range for each rank, got {sizes}; write (0, 0) where it has nothing"
            )
        for name, shape in self._shapes.items():
            _check_ranges(name, math.prod(shape), self._ranges[name])

    @classmethod
    def whole(cls, shapes: Mapping[str, tuple[int, ...]], size: int) -> Shards:
        """Return the shards of ranks that all have everything.

        Args:
            shapes: Name and shape of each array, in order.
            size: Number of ranks.

        Returns:
            The shards.
        """
        return cls(shapes, {name: [(0, math.prod(shape))] * size for name, shape in shapes.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and full shape of each array, in order.

        Returns:
            A copy.
        """
        return dict(self._shapes)

    @property
    def size(self) -> int:
        """Number of ranks.

        Returns:
            The number.
        """
        return len(next(iter(self._ranges.values())))

    @property
    def num_entries(self) -> int:
        """Number of entries of all arrays.

        Returns:
            The number.
        """
        return sum(map(math.prod, self._shapes.values()))

    @property
    def is_whole(self) -> bool:
        """Whether each rank has everything.

        Returns:
            True without shards.
        """
        return all(
            of_rank == (0, math.prod(shape)) for name, shape in self._shapes.items() for of_rank in self._ranges[name]
        )

    def of_rank(self, rank: int) -> dict[str, tuple[int, int]]:
        """Return what a rank has.

        Args:
            rank: The rank.

        Returns:
            For each array, in order, the first and one-past-last position in the flattened array.
        """
        return {name: of_array[rank] for name, of_array in self._ranges.items()}

    def positions(self, rank: int) -> list[tuple[int, int]]:
        """Return what a rank has, as positions in the vector of all arrays.

        Args:
            rank: The rank.

        Returns:
            For each array the first and one-past-last position.
        """
        offsets = accumulate(map(math.prod, self._shapes.values()), initial=0)
        ranges = self.of_rank(rank).values()
        return [(offset + start, offset + stop) for offset, (start, stop) in zip(offsets, ranges, strict=False)]

    def restricted(self, names: Collection[str]) -> Shards:
        """Return the shards of some of the arrays.

        Args:
            names: Their names, in any order.

        Returns:
            Their shards, in the order of these.
        """
        shapes = {name: shape for name, shape in self._shapes.items() if name in names}
        return Shards(shapes, {name: self._ranges[name] for name in shapes})

    def local_shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Return the shape of the part of an array that a rank has.

        Args:
            name: Name of the array.
            rank: The rank.

        Returns:
            The full shape, or that of whole rows; of one dimension if the part begins or ends inside a row.
        """
        shape = self._shapes[name]
        start, stop = self._ranges[name][rank]
        if stop - start == math.prod(shape):
            return shape
        in_row = math.prod(shape[1:])
        return (stop - start,) if start % in_row or stop % in_row else ((stop - start) // in_row, *shape[1:])

    def local(self, name: str, full: Array, rank: int) -> Array:
        """Return the part of an array that a rank has.

        Args:
            name: Name of the array.
            full: The whole array.
            rank: The rank.

        Returns:
            The part, in its :meth:`local_shape`: a view where the library has views.
        """
        start, stop = self._ranges[name][rank]
        reshape = array_namespace(full).reshape
        return reshape(reshape(full, (-1,))[start:stop], self.local_shape(name, rank))


def _check_ranges(name: str, length: int, ranges: Sequence[tuple[int, int]]) -> None:
    reached = 0
    for start, stop in sorted(ranges):
        if not 0 <= start <= stop <= length:
            raise ValueError(f"range ({start}, {stop}) does not fit {name}, which has {length} entries")
        if start > reached and start < stop:
            break
        reached = max(reached, stop)
    if reached < length:
        raise ValueError(f"no rank has entry {reached} of {name}, which has {length} entries; got {list(ranges)}")
