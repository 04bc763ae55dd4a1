"""Bytes before the run: what a pruning run will take at most, checked against what is free."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from mfac_core.backends import Device, resolve_device
from mfac_core.errors import MemoryBudgetError
from mfac_core.fisher.partition import partition, working_bytes
from mfac_core.schedules.pruning import ScheduledStep, num_gradients_at
from mfac_core.schedules.substeps import Sparsity, num_substeps, of_layer, substep_sparsity
from mfac_core.settings.pruning import MFACSettings

__all__ = ["WINDOW_ITEMSIZE", "MasksToCome", "check_memory", "choose_window_device", "peak_window", "window_bytes"]

WINDOW_ITEMSIZE = 4
"""Bytes per number of the gradient window (float32)."""

WORKING_GROUPS = 6
"""Groups of blocks that a GPU needs room for beside the window: the group, what is made of it, kept factors."""

MasksToCome = tuple[Sequence[Sparsity], Callable[[Sparsity], tuple[Sparsity, int]]]
"""The sparsity of each pruning step, and the prediction of :func:`mfac_core.masks.sparsity.attained_sparsity`."""

_logger = logging.getLogger("mfac_core")


def peak_window(
    settings: MFACSettings, num_weights: int, schedule: Sequence[ScheduledStep], masks: MasksToCome | None = None
) -> tuple[int, int]:
    """Return rows and columns of the largest gradient window of a run.

    Args:
        settings: What is pruned and how.
        num_weights: Number of weights in scope ``n``.
        schedule: The planned pruning steps.
        masks: What they will make of the masks; ``None`` where there are none yet: then sparsities are those planned.

    Returns:
        Rows ``m`` and columns ``d`` of the window with the most numbers.

    Example:
        >>> settings = MFACSettings(final_sparsity=0.75, end_epoch=2, num_gradients={0.0: 64, 0.5: 512})
        >>> peak_window(settings, 1000, [ScheduledStep(1, 1.0, 0.5), ScheduledStep(2, 2.0, 0.75)])
        (512, 500)
    """
    chains = _chains(settings, num_weights, schedule, masks, skips=False)
    return max((window for chain in chains for window in chain), key=_size)


def window_bytes(
    settings: MFACSettings,
    num_weights: int,
    schedule: Sequence[ScheduledStep],
    masks: MasksToCome | None = None,
    *,
    live_gradients: bool = True,
) -> int:
    """Return the bytes that gradient windows of a run take at most.

    Args:
        settings: What is pruned and how.
        num_weights: Number of weights in scope.
        schedule: The planned pruning steps.
        masks: As in :func:`peak_window`.
        live_gradients: Whether rows outlive a pruning step: then the next window is made beside the one before.

    Returns:
        The bytes of the largest window, or of the two largest that stand side by side.

    Example:
        >>> settings = MFACSettings(final_sparsity=0.75, end_epoch=2, num_gradients=64)
        >>> schedule = [ScheduledStep(1, 1.0, 0.5), ScheduledStep(2, 2.0, 0.75)]
        >>> window_bytes(settings, 1000, schedule, live_gradients=False), window_bytes(settings, 1000, schedule)
        (256000, 384000)
    """
    largest = 0
    for chain in _chains(settings, num_weights, schedule, masks, skips=live_gradients):
        windows = [_size(window) for window in chain]
        together = [_size(one) + _size(other) for one, other in pairwise(chain) if one != other and live_gradients]
        largest = max(largest, *windows, *together)
    return largest * WINDOW_ITEMSIZE


def choose_window_device(wanted: str, devices: Sequence[Device], num_bytes: int) -> Device:
    """Return where the gradient window is kept.

    Args:
        wanted: The name of a device, or ``"auto"`` for the first GPU with room for the window, else host memory.
        devices: Where the blocks are computed.
        num_bytes: Bytes that gradient windows of the run take at most.

    Returns:
        The device.

    Raises:
        DeviceError: If the wanted device does not exist.
    """
    if wanted != "auto":
        return resolve_device(wanted)
    elsewhere = [device for device in devices if not device.is_host]
    for device in elsewhere:
        free = device.backend.free_bytes(device.name)
        room = WORKING_GROUPS * device.backend.group_bytes(device.name, num_bytes)
        if free is not None and num_bytes + room <= free:
            return device
    if elsewhere:
        _logger.warning(
            "the gradient window (%s bytes) has no room on %s: it is kept in host memory and copied there block by "
            "block at each pruning step",
            f"{num_bytes:,}",
            ", ".join(map(str, elsewhere)),
        )
    return resolve_device("cpu")


def check_memory(
    settings: MFACSettings,
    device: Device,
    num_weights: int,
    schedule: Sequence[ScheduledStep],
    masks: MasksToCome | None = None,
    *,
    live_gradients: bool = True,
) -> int:
    """Refuse a run that would not fit, before it starts.

    Most is taken either while blocks are computed, beside the largest window, or after a pruning step, while the next
    window is made beside the one before.

    Args:
        settings: What is pruned and how.
        device: Where the gradient window is kept.
        num_weights: Number of weights in scope.
        schedule: The planned pruning steps.
        masks: As in :func:`peak_window`.
        live_gradients: As in :func:`window_bytes`.

    Returns:
        The bytes that the run takes at most on the device of the gradient window.

    Raises:
        MemoryBudgetError: If they exceed what is free; the message names both, and settings that would fit.
    """

    def bytes_for(settings: MFACSettings) -> int:
        rows, columns = peak_window(settings, num_weights, schedule, masks)
        blocks = partition(columns, settings.block_size, num_gradients=rows, itemsize=WINDOW_ITEMSIZE, group_bytes=1)
        working = 2 * max((working_bytes(block, rows, WINDOW_ITEMSIZE) for block in blocks), default=0)
        windows = window_bytes(settings, num_weights, schedule, masks, live_gradients=live_gradients)
        return max(rows * columns * WINDOW_ITEMSIZE + working, windows)

    needed = bytes_for(settings)
    free = device.backend.free_bytes(device.name)
    if free is None or needed <= free:
        return needed
    rows, columns = peak_window(settings, num_weights, schedule, masks)
    fitting = (
        bisect_right(range(rows), free, key=lambda rows: bytes_for(replace(settings, num_gradients=rows or 1))) - 1
    )
    cure = (
        f"num_gradients of at most {fitting} would fit"
        if fitting > 0
        else "choose a smaller block_size, or fewer weights in params, or a machine with more memory"
    )
    raise MemoryBudgetError(
        f"the gradient window needs {needed:,} bytes on {device} ({rows} gradients of {columns:,} unpruned weights, "
        f"and room to work in or for the window that follows a pruning step), and {free:,} are free; {cure}"
    )


def _chains(
    settings: MFACSettings,
    num_weights: int,
    schedule: Sequence[ScheduledStep],
    masks: MasksToCome | None,
    *,
    skips: bool,
) -> Iterator[list[tuple[int, int]]]:
    """Yield rows and columns of windows that follow each other: from each pruning step on to the window after it.

    Where a pruning step may have to wait for rows, the next one may pass it over: these windows are yielded, too.
    """
    sparsities, reaches = masks or (
        [scheduled.sparsity for scheduled in schedule],
        lambda sparsity: (sparsity, num_weights - round(num_weights * of_layer(sparsity, ""))),
    )
    # a window is as large as the sparsity reached by the pruning step before demands
    before = [0.0, *(scheduled.sparsity for scheduled in schedule)]
    rows = [num_gradients_at(settings.num_gradients, sparsity) for sparsity in before]
    reached, columns = reaches(0.0)
    for index in range(len(schedule)):
        for to in range(index, min(index + 1 + skips, len(schedule))):
            now, left = reached, columns
            chain = [(rows[index], left)]
            for parts_left in range(num_substeps(now, sparsities[to], settings.num_recomputations), 0, -1):
                wanted = substep_sparsity(now, sparsities[to], parts_left, settings.recomputation_spacing)
                now, kept = reaches(wanted)
                left = min(left, kept)
                chain.append((rows[to] if parts_left > 1 else rows[to + 1], left))
            if to == index:
                after = now, left
            yield chain[:-1] if to == len(schedule) - 1 else chain  # no window follows the last pruning step
        reached, columns = after


def _size(window: tuple[int, int]) -> int:
    return window[0] * window[1]
