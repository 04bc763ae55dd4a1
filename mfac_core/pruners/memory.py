"""The memory that gradient windows will take, checked against free memory before the run."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mfac_core.backends import Device, resolve_device
from mfac_core.errors import MemoryBudgetError
from mfac_core.fisher.partition import BlockGroup, partition, working_bytes
from mfac_core.fisher.row_formats import BFLOAT16, RowFormat
from mfac_core.ranks.distribution import deal
from mfac_core.schedules.pruning import ScheduledStep, num_gradients_at
from mfac_core.schedules.substeps import Sparsity, layer_sparsity, num_substeps, substep_sparsity
from mfac_core.settings.pruning import MFACSettings

__all__ = [
    "MasksToCome",
    "WindowMemory",
    "choose_window_device",
]

COMPUTED_ITEMSIZE = 4
"""Bytes per number of the gradients that blocks are computed from (float32), however the window stores them."""

WORKING_GROUPS = 6
"""Groups of blocks for which a GPU needs room besides the window: the group, intermediate arrays, retained factors."""

MasksToCome = tuple[Sequence[Sparsity], Callable[[Sparsity], tuple[Sparsity, int]]]
"""The masks that a schedule leads to: the sparsity that each pruning step aims at, and a function that returns the
sparsity then reached and the number of weights left, from :func:`mfac_core.masks.sparsity.attained_sparsity`."""

_logger = logging.getLogger("mfac_core")


@dataclass(frozen=True)
class WindowMemory:
    """The gradient windows of a run, and the bytes that they need.

    Args:
        settings: What to prune, when and how.
        num_weights: Number of weights in scope.
        schedule: The pruning steps.
        masks: The masks that the schedule leads to; ``None`` counts by the scheduled sparsities.
        live_gradients: Whether gradients arrive while training. Their rows survive a pruning step, so the old and
            the new window exist at the same time.
        rank: The process whose share of the window is counted; the first has the largest.
        num_ranks: Number of processes, to which the columns of the window are dealt by whole blocks.

    Example:
        >>> settings = MFACSettings(final_sparsity=0.75, end_epoch=2, num_gradients=64)
        >>> memory = WindowMemory(settings, 1000, [ScheduledStep(1, 1.0, 0.5), ScheduledStep(2, 2.0, 0.75)])
        >>> memory.peak(), memory.bytes_at_once(), replace(memory, live_gradients=False).bytes_at_once()
        ((64, 1000), 384000, 256000)
    """

    settings: MFACSettings
    num_weights: int
    schedule: Sequence[ScheduledStep]
    masks: MasksToCome | None = None
    live_gradients: bool = True
    rank: int = 0
    num_ranks: int = 1

    @property
    def row_format(self) -> RowFormat:
        """How the rows are stored."""
        return RowFormat.named(self.settings.gradients_dtype)

    def peak(self) -> tuple[int, int]:
        """Return rows and columns of the largest gradient window.

        Example:
            >>> settings = MFACSettings(final_sparsity=0.75, end_epoch=2, num_gradients={0.0: 64, 0.5: 512})
            >>> WindowMemory(settings, 1000, [ScheduledStep(1, 1.0, 0.5), ScheduledStep(2, 2.0, 0.75)]).peak()
            (512, 500)
        """
        windows = (window for windows in self._sequences(skips=False) for window in windows)
        return max(((rows, self._share(columns)) for rows, columns in windows), key=math.prod)

    def peak_bytes(self) -> int:
        """Return the bytes of the largest gradient window."""
        return math.prod(self.peak()) * self.row_format.itemsize

    def bytes_at_once(self) -> int:
        """Return the largest number of bytes that gradient windows take at one time."""
        live, largest = self.live_gradients, 0
        for windows in self._sequences(skips=live):
            numbers = [rows * self._share(columns) for rows, columns in windows]
            # a rank may have as many columns as before, but of other weights
            changes = [one != other for one, other in pairwise(windows)]
            both = [sum(pair) for pair, changed in zip(pairwise(numbers), changes, strict=True) if changed and live]
            largest = max(largest, *numbers, *both)
        return largest * self.row_format.itemsize

    def needed_bytes(self) -> int:
        """Return the bytes that the run needs on the device of its gradient window.

        The peak comes either while blocks are computed from the largest window, or after a pruning step, while both the
        old and the new window exist.
        """
        rows, columns = self.peak()
        block_size = self.settings.block_size
        # all blocks but the last have one size: one of them and the last determine the maximum
        alike = block_size or max(columns, 1)
        distinct = min(columns, alike + columns % alike)
        blocks = partition(distinct, block_size, num_gradients=rows, itemsize=COMPUTED_ITEMSIZE, group_bytes=1)
        working = 2 * max((self._working_bytes(block, rows) for block in blocks), default=0)
        return max(self.peak_bytes() + working, self.bytes_at_once())

    def check(self, device: Device) -> int:
        """Return :meth:`needed_bytes`, or raise ``MemoryBudgetError`` if fewer are free on the device of the window."""
        needed = self.needed_bytes()
        free = device.backend.free_bytes(device.name)
        if free is None or needed <= free:
            return needed
        rows, columns = self.peak()

        def bytes_for(rows: int) -> int:
            return replace(self, settings=replace(self.settings, num_gradients=rows or 1)).needed_bytes()

        fitting = bisect_right(range(rows), free, key=bytes_for) - 1
        cure = (
            f"num_gradients (num_grads in a recipe) of at most {fitting} would fit"
            if fitting > 0
            else "choose a smaller block_size (fisher_block_size in a recipe), fewer weights in params, or a machine "
            "with more memory"
        )
        if self.settings.gradients_dtype != BFLOAT16 and self.settings.block_size is not None:
            cure += "; gradients_dtype bfloat16 (grads_dtype in a recipe) halves the window"
        raise MemoryBudgetError(
            f"the gradient window needs {needed:,} bytes on {device} ({rows} gradient samples of {columns:,} "
            "unpruned weights, and room for computation or for the window that follows a pruning step), but only "
            f"{free:,} are free; {cure}"
        )

    def _working_bytes(self, block: BlockGroup, rows: int) -> int:
        """Return the memory that the computation of one block takes, in addition to the window."""
        # of a block that is stored as it is, one chunk at a time is copied; one that is widened is copied as a whole
        is_widened = self.row_format.itemsize < COMPUTED_ITEMSIZE
        others = block.width - max(block.chunk_widths) if is_widened else 0
        return working_bytes(block, rows, COMPUTED_ITEMSIZE) + rows * others * COMPUTED_ITEMSIZE

    def _share(self, columns: int) -> int:
        """Return how many of the columns the rank stores."""
        start, stop = deal(columns, self.settings.block_size, self.num_ranks)[self.rank]
        return stop - start

    def _sequences(self, *, skips: bool) -> Iterator[list[tuple[int, int]]]:
        """Yield the rows and columns of windows that follow each other, for each pruning step and its sub-steps.

        With ``skips``, also for each pruning step that is run in place of the previous one: one that waits for rows is
        passed over when the next falls due.
        """
        sparsities, reaches = self.masks or (
            [scheduled.sparsity for scheduled in self.schedule],
            lambda sparsity: (sparsity, self.num_weights - round(self.num_weights * layer_sparsity(sparsity, ""))),
        )
        settings, last = self.settings, len(self.schedule) - 1
        # the sparsity reached before a pruning step determines the rows of its window
        before = [0.0, *(scheduled.sparsity for scheduled in self.schedule)]
        rows = [num_gradients_at(settings.num_gradients, sparsity) for sparsity in before]
        reached, columns = reaches(0.0)
        for index in range(last + 1):
            for to in range(index, min(index + skips, last) + 1):
                now, unpruned = reached, columns
                windows = [(rows[index], unpruned)]
                for substeps_left in range(num_substeps(now, sparsities[to], settings.num_recomputations), 0, -1):
                    wanted = substep_sparsity(now, sparsities[to], substeps_left, settings.recomputation_spacing)
                    now, left = reaches(wanted)
                    unpruned = min(unpruned, left)
                    windows.append((rows[to] if substeps_left > 1 else rows[to + 1], unpruned))
                if to == index:
                    after = now, unpruned
                # no window follows the last pruning step
                yield windows[:-1] if to == last else windows
            reached, columns = after


def choose_window_device(wanted: str, devices: Sequence[Device], num_bytes: int, library: str | None = None) -> Device:
    """Return the wanted device; for ``auto`` the first GPU with room for windows of so many bytes, else host memory.

    ``devices`` are those that compute; ``library`` is the one whose devices plain names mean.
    """
    if wanted != "auto":
        return resolve_device(wanted, library)
    elsewhere = [device for device in devices if not device.is_host]
    for device in elsewhere:
        free = device.backend.free_bytes(device.name)
        room = WORKING_GROUPS * device.backend.group_bytes(device.name, num_bytes)
        if free is not None and num_bytes + room <= free:
            return device
    if elsewhere:
        _logger.warning(
            "the gradient window (%s bytes) does not fit on %s: it stays in host memory and is copied block by block "
            "at each pruning step",
            f"{num_bytes:,}",
            ", ".join(map(str, elsewhere)),
        )
    return resolve_device("cpu")
