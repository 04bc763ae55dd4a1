"""How ``d`` weights are cut into Fisher blocks and dealt to devices: pure integers, no arrays.

A *group* is what one kernel call works on: several small blocks of equal width side by side, or one block,
which is cut into *chunks* of columns when it is large. A *slab* is a group of the size in which a window is stored;
each device gets it in groups of the size that suits the device.
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

    def part(self, first: int, count: int) -> BlockGroup:
        """Return some of these blocks.

        Args:
            first: The first of them, counted from 0.
            count: How many.

        Returns:
            Their group.
        """
        return BlockGroup(self.start + first * self.width, count, self.chunk_widths)


@dataclass(frozen=True)
class DeviceShare:
    """What decides how much of the work a device gets.

    Args:
        speed: Operations per second, or any number in proportion to it.
        group_bytes: Gradients that one kernel call should work on.
        free_bytes: Free memory; ``None`` where it is not known.
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
    slab_bytes: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[BlockGroup, ...]:
    """Cut the columns ``[0, num_weights)`` into blocks, and gather these into slabs.

    Args:
        num_weights: Number of columns ``d``.
        block_size: Columns per block; the last block may be shorter. ``None`` means one block.
        num_gradients: Rows ``m`` of the gradient window, for the size of a slab in bytes.
        itemsize: Bytes per number.
        slab_bytes: Blocks are gathered until a slab reaches this size.
        chunk_bytes: A block larger than this is cut into chunks.

    Returns:
        Slabs that tile the columns in order; empty when there are no columns.

    Example:
        >>> [(g.start, g.stop, g.count) for g in partition(10, 4, num_gradients=2, itemsize=4, slab_bytes=1000)]
        [(0, 8, 2), (8, 10, 1)]
    """
    width = num_weights if block_size is None else min(block_size, num_weights)
    if width == 0:
        return ()
    whole, rest = divmod(num_weights, width)
    column_bytes = max(num_gradients, 1) * itemsize
    chunks = _chunk_widths(width, max(1, chunk_bytes // column_bytes))
    per_group = max(1, slab_bytes // (width * column_bytes)) if len(chunks) == 1 else 1
    groups = [BlockGroup(first * width, min(per_group, whole - first), chunks) for first in range(0, whole, per_group)]
    if rest:
        groups.append(BlockGroup(whole * width, 1, _chunk_widths(rest, max(1, chunk_bytes // column_bytes))))
    return tuple(groups)


def assign(
    slabs: Sequence[BlockGroup], shares: Mapping[str, DeviceShare], *, num_gradients: int, itemsize: int
) -> dict[str, tuple[BlockGroup, ...]]:
    """Deal blocks to devices in proportion to their speed, in groups that fit each device.

    Args:
        slabs: What has to be computed, in order.
        shares: Name and share of each device.
        num_gradients: Rows of the gradient window.
        itemsize: Bytes per number.

    Returns:
        For each device its groups, consecutive and in order; none for a device that has no room for a single block
        while another has.

    Raises:
        MemoryBudgetError: If no device has room for a single block.

    Example:
        >>> slabs = partition(60, 10, num_gradients=2, itemsize=4, slab_bytes=1000)
        >>> shares = {"cuda:0": DeviceShare(2.0, 300), "cuda:1": DeviceShare(1.0, 300)}
        >>> dealt = assign(slabs, shares, num_gradients=2, itemsize=4)
        >>> {name: [(g.start, g.stop) for g in groups] for name, groups in dealt.items()}
        {'cuda:0': [(0, 20), (20, 40)], 'cuda:1': [(40, 60)]}
    """
    dealt: dict[str, list[BlockGroup]] = {name: [] for name in shares}
    if not slabs:
        return {name: () for name in dealt}
    needed = max(working_bytes(slab.part(0, 1), num_gradients, itemsize) for slab in slabs)
    able = {name: share for name, share in shares.items() if share.free_bytes is None or share.free_bytes >= needed}
    if not able:
        most = max(share.free_bytes or 0 for share in shares.values())
        raise MemoryBudgetError(
            f"device {', '.join(shares)}: one block needs {needed:,} bytes of working memory and {most:,} are free; "
            "choose a smaller block_size or fewer num_gradients"
        )
    bounds = _bounds(slabs[-1].stop, able)
    names = list(able)
    current = 0
    for slab in slabs:
        first = 0
        while first < slab.count:
            while current < len(names) - 1 and slab.start + (first + 0.5) * slab.width >= bounds[current]:
                current += 1
            share = able[names[current]]
            left = slab.count - first
            if current < len(names) - 1:
                left = min(left, math.ceil((bounds[current] - slab.start) / slab.width - 0.5) - first)
            group = slab.part(first, min(left, _blocks_at_once(slab, share, num_gradients, itemsize)))
            dealt[names[current]].append(group)
            first += group.count
    return {name: tuple(groups) for name, groups in dealt.items()}


def working_bytes(group: BlockGroup, num_gradients: int, itemsize: int) -> int:
    """Return the memory that computing one group takes, beside the window.

    Args:
        group: The group.
        num_gradients: Rows ``m`` of the gradient window.
        itemsize: Bytes per number of the window.

    Returns:
        Bytes: the chunk and its solved copy, and the factor in float64 with room to make it, and its inverse where it
        has the size of a block.
    """
    chunk = group.count * num_gradients * max(group.chunk_widths) * itemsize
    small = min(num_gradients, group.width)
    copies = 3 if num_gradients < group.width else 8
    return 2 * chunk + copies * 8 * group.count * small * small


def _bounds(num_weights: int, shares: Mapping[str, DeviceShare]) -> list[float]:
    total = sum(share.speed for share in shares.values())
    bounds, reached = [], 0.0
    for share in shares.values():
        reached += share.speed
        bounds.append(num_weights * reached / total)
    return bounds


def _blocks_at_once(slab: BlockGroup, share: DeviceShare, num_gradients: int, itemsize: int) -> int:
    working = working_bytes(slab.part(0, 1), num_gradients, itemsize)
    count = share.group_bytes // (working // 2)  # half of the working memory, or more, is the factor where it is large
    if share.free_bytes is not None:
        count = min(count, share.free_bytes // working)
    return max(1, count)


def _chunk_widths(width: int, widest: int) -> tuple[int, ...]:
    pieces = -(-width // widest)
    small, larger = divmod(width, pieces)
    return (small + 1,) * larger + (small,) * (pieces - larger)
