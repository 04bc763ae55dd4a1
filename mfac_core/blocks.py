"""How ``d`` weights are cut into Fisher blocks and dealt to devices: pure integers, no arrays.

A *group* is what one kernel call works on: several small blocks of equal width side by side, or one block,
which is cut into *chunks* of columns when it is large. Groups bound the working memory and keep calls large enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mfac_core.errors import MemoryBudgetError

__all__ = ["BlockGroup", "cut", "deal", "working_bytes"]

GROUP_BYTES = 2 * 2**20
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of equal width that one kernel call works on.

    Args:
        start: First column of the group.
        count: Number of blocks.
        chunk_widths: Columns of each chunk; more than one only when ``count`` is 1.
    """

    start: int
    count: int
    chunk_widths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of one block."""
        return sum(self.chunk_widths)

    @property
    def stop(self) -> int:
        """One past the last column of the group."""
        return self.start + self.count * self.width

    @property
    def chunk_bounds(self) -> tuple[tuple[int, int], ...]:
        """First and one-past-last column of each chunk."""
        bounds = []
        start = self.start
        for width in self.chunk_widths:
            bounds.append((start, start + self.count * width))
            start += self.count * width
        return tuple(bounds)


def cut(
    num_weights: int,
    block_size: int | None,
    *,
    num_gradients: int,
    itemsize: int,
    group_bytes: int = GROUP_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[BlockGroup, ...]:
    """Cut the columns ``[0, num_weights)`` into blocks, and gather these into groups.

    Args:
        num_weights: Number of columns ``d``.
        block_size: Columns per block; the last block may be shorter. ``None`` means one block.
        num_gradients: Rows ``m`` of the gradient window, for the size of a group in bytes.
        itemsize: Bytes per number.
        group_bytes: Blocks are gathered until a group reaches this size.
        chunk_bytes: A block larger than this is cut into chunks.

    Returns:
        Groups that tile the columns in order; empty when there are no columns.

    Example:
        >>> [(g.start, g.stop, g.count) for g in cut(10, 4, num_gradients=2, itemsize=4)]
        [(0, 8, 2), (8, 10, 1)]
    """
    width = num_weights if block_size is None else min(block_size, num_weights)
    if width == 0:
        return ()
    whole, rest = divmod(num_weights, width)
    column_bytes = max(num_gradients, 1) * itemsize
    chunks = _chunk_widths(width, max(1, chunk_bytes // column_bytes))
    per_group = max(1, group_bytes // (width * column_bytes)) if len(chunks) == 1 else 1
    groups = [BlockGroup(first * width, min(per_group, whole - first), chunks) for first in range(0, whole, per_group)]
    if rest:
        groups.append(BlockGroup(whole * width, 1, _chunk_widths(rest, max(1, chunk_bytes // column_bytes))))
    return tuple(groups)


def deal(
    groups: Sequence[BlockGroup], free_bytes: Mapping[str, int | None], *, num_gradients: int, itemsize: int
) -> dict[str, tuple[int, ...]]:
    """Deal groups to devices so that each gets about the same number of columns.

    Args:
        groups: What has to be computed.
        free_bytes: Free memory of each device; ``None`` where it is not known.
        num_gradients: Rows of the gradient window.
        itemsize: Bytes per number.

    Returns:
        For each device the indices of its groups, consecutive and in order.

    Raises:
        MemoryBudgetError: If a device has less free memory than its largest group needs.
    """
    total = sum(group.stop - group.start for group in groups)
    names = list(free_bytes)
    dealt: dict[str, list[int]] = {name: [] for name in names}
    done = 0
    for index, group in enumerate(groups):
        columns = group.stop - group.start
        middle = done + columns / 2
        dealt[names[min(int(middle * len(names) / total), len(names) - 1)]].append(index)
        done += columns
    for name, indices in dealt.items():
        needed = max((working_bytes(groups[i], num_gradients, itemsize) for i in indices), default=0)
        free = free_bytes[name]
        if free is not None and needed > free:
            raise MemoryBudgetError(
                f"device {name}: one block needs {needed:,} bytes of working memory and {free:,} are free; "
                "choose a smaller block_size or fewer num_gradients"
            )
    return {name: tuple(indices) for name, indices in dealt.items()}


def working_bytes(group: BlockGroup, num_gradients: int, itemsize: int) -> int:
    """Return the memory that computing one group takes, beside the window.

    Args:
        group: The group.
        num_gradients: Rows ``m`` of the gradient window.
        itemsize: Bytes per number of the window.

    Returns:
        Bytes: the chunk and its solved copy, and the factor in float64.
    """
    chunk = group.count * num_gradients * max(group.chunk_widths) * itemsize
    small = min(num_gradients, group.width)
    return 2 * chunk + 2 * 8 * group.count * small * small


def _chunk_widths(width: int, widest: int) -> tuple[int, ...]:
    pieces = -(-width // widest)
    small, larger = divmod(width, pieces)
    return (small + 1,) * larger + (small,) * (pieces - larger)
