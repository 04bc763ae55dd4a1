"""Partitions ``d`` weights into Fisher blocks and assigns these to devices: pure integers, no arrays.

A *group* is what one kernel call works on: several small blocks of equal width side by side, or one block, which is
split into *chunks* of columns if it is large. A window stores its columns in *stored groups*, each chunk in contiguous
memory; each device works through them in groups of the size that suits it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mfac_core.errors import MemoryBudgetError

__all__ = ["BlockGroup", "DeviceShare", "assign", "partition", "working_bytes"]

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of equal width that one kernel call works on.

    Args:
        start: First column of the group.
        count: Number of blocks.
        chunk_widths: Columns of each chunk; more than one only if ``count`` is 1.
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

    def subgroup(self, first: int, count: int) -> BlockGroup:
        """Return ``count`` of these blocks, from the one with index ``first`` on."""
        return BlockGroup(self.start + first * self.width, count, self.chunk_widths)


@dataclass(frozen=True)
class DeviceShare:
    """What decides how much of the work a device gets.

    Args:
        speed: Operations per second, or any number in proportion to it.
        group_bytes: Gradients that one kernel call should work on.
        free_bytes: Free memory; ``None`` if unknown.
    """

    speed: float
    group_bytes: int
    free_bytes: int | None = None


def partition(
    num_weights: int,
    block_size: int | None,
    *,
    num_gradients: int,
    itemsize: int,
    group_bytes: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[BlockGroup, ...]:
    """Partition the columns ``[0, num_weights)`` into blocks, and collect these in groups for storage.

    Args:
        num_weights: Number of columns ``d``.
        block_size: Columns per block; the last block may be shorter. ``None`` means one block.
        num_gradients: Rows ``m`` of the gradient window.
        itemsize: Bytes per number.
        group_bytes: Size that a group of several blocks does not exceed.
        chunk_bytes: A block larger than this is split into chunks.

    Returns:
        Groups that tile the columns in order; empty if there are no columns.

    Example:
        >>> [(g.start, g.stop, g.count) for g in partition(10, 4, num_gradients=2, itemsize=4, group_bytes=1000)]
        [(0, 8, 2), (8, 10, 1)]
    """
    width = num_weights if block_size is None else min(block_size, num_weights)
    if width == 0:
        return ()
    whole, rest = divmod(num_weights, width)
    column_bytes = max(num_gradients, 1) * itemsize
    chunks = _chunk_widths(width, max(1, chunk_bytes // column_bytes))
    # a block of several chunks is a group of its own: each chunk is large enough for a kernel call
    per_group = max(1, group_bytes // (width * column_bytes)) if len(chunks) == 1 else 1
    groups = [BlockGroup(first * width, min(per_group, whole - first), chunks) for first in range(0, whole, per_group)]
    if rest:
        groups.append(BlockGroup(whole * width, 1, _chunk_widths(rest, max(1, chunk_bytes // column_bytes))))
    return tuple(groups)


def assign(
    stored_groups: Sequence[BlockGroup], shares: Mapping[str, DeviceShare], *, num_gradients: int, itemsize: int
) -> dict[str, tuple[BlockGroup, ...]]:
    """Assign blocks to devices in proportion to their speed, in groups that fit each device.

    Args:
        stored_groups: The blocks, in order, in the groups in which they are stored.
        shares: Name and share of each device.
        num_gradients: Rows of the gradient window.
        itemsize: Bytes per number.

    Returns:
        The groups of each device, consecutive and in order; empty for a device without memory for a single block.

    Raises:
        MemoryBudgetError: If no device has memory for a single block.

    Example:
        >>> stored_groups = partition(60, 10, num_gradients=2, itemsize=4, group_bytes=1000)
        >>> shares = {"cuda:0": DeviceShare(2.0, 300), "cuda:1": DeviceShare(1.0, 300)}
        >>> assigned = assign(stored_groups, shares, num_gradients=2, itemsize=4)
        >>> {name: [(g.start, g.stop) for g in groups] for name, groups in assigned.items()}
        {'cuda:0': [(0, 20), (20, 40)], 'cuda:1': [(40, 60)]}
    """
    assigned: dict[str, list[BlockGroup]] = {name: [] for name in shares}
    if not stored_groups:
        return {name: () for name in assigned}
    # blocks differ only in width, but a narrower last block may take more if it changes to the primal form
    needed = max(working_bytes(group.subgroup(0, 1), num_gradients, itemsize) for group in stored_groups)
    able = {name: share for name, share in shares.items() if share.free_bytes is None or share.free_bytes >= needed}
    if not able:
        most = max(share.free_bytes or 0 for share in shares.values())
        raise MemoryBudgetError(
            f"device {', '.join(shares)}: one block needs {needed:,} bytes of working memory and {most:,} are free; "
            "choose a smaller block_size (fisher_block_size in a recipe) or a smaller num_gradients (num_grads)"
        )
    # each device gets the blocks whose middle column lies before its bound and after that of the previous device
    bounds = _bounds(stored_groups[-1].stop, able)
    names = list(able)
    current = 0
    for stored in stored_groups:
        first = 0
        while first < stored.count:
            while current < len(names) - 1 and stored.start + (first + 0.5) * stored.width >= bounds[current]:
                current += 1
            share = able[names[current]]
            left = stored.count - first
            # the blocks before the bound of this device, rounded to the nearest block
            if current < len(names) - 1:
                left = min(left, math.ceil((bounds[current] - stored.start) / stored.width - 0.5) - first)
            group = stored.subgroup(first, min(left, _blocks_at_once(stored, share, num_gradients, itemsize)))
            assigned[names[current]].append(group)
            first += group.count
    return {name: tuple(groups) for name, groups in assigned.items()}


def working_bytes(group: BlockGroup, num_gradients: int, itemsize: int) -> int:
    """Return the memory that the computation of one group takes, in addition to the window.

    That is a chunk and its solved copy, and some float64 matrices of the size of the factor.

    Args:
        group: The group.
        num_gradients: Rows ``m`` of the gradient window.
        itemsize: Bytes per number of the window.
    """
    chunk = group.count * num_gradients * max(group.chunk_widths) * itemsize
    small = min(num_gradients, group.width)
    # for the factor and what it is computed from; the primal form computes its whole inverse as well
    copies = 3 if num_gradients < group.width else 8
    return 2 * chunk + copies * 8 * group.count * small * small


def _bounds(num_weights: int, shares: Mapping[str, DeviceShare]) -> list[float]:
    """Return for each device one past its last column, in proportion to the speeds."""
    total = sum(share.speed for share in shares.values())
    bounds, reached = [], 0.0
    for share in shares.values():
        reached += share.speed
        bounds.append(num_weights * reached / total)
    return bounds


def _blocks_at_once(stored: BlockGroup, share: DeviceShare, num_gradients: int, itemsize: int) -> int:
    working = working_bytes(stored.subgroup(0, 1), num_gradients, itemsize)
    # the gradients are half of the working memory, or less if the factor is large
    count = share.group_bytes // (working // 2)
    if share.free_bytes is not None:
        count = min(count, share.free_bytes // working)
    return max(1, count)


def _chunk_widths(width: int, widest: int) -> tuple[int, ...]:
    """Return the widths of as few chunks as possible, which differ by at most one column."""
    count = -(-width // widest)
    small, larger = divmod(width, count)
    return (small + 1,) * larger + (small,) * (count - larger)
