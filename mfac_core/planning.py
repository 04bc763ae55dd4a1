"""Bytes before the run: what a pruning run will take at most, checked against what is free."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence

from mfac_core.backends import Device, resolve_device
from mfac_core.blocks import cut, working_bytes
from mfac_core.errors import MemoryBudgetError
from mfac_core.schedule import PlannedStep, num_gradients_at
from mfac_core.settings import MFACSettings

__all__ = ["WINDOW_ITEMSIZE", "check_memory", "choose_window_device", "peak_window"]

WINDOW_ITEMSIZE = 4
"""Bytes per number of the gradient window (float32)."""

WORKING_GROUPS = 6
"""Groups of blocks that a GPU needs room for beside the window: the group, what is made of it, kept factors."""

_logger = logging.getLogger("mfac_core")


def peak_window(settings: MFACSettings, num_weights: int, schedule: Sequence[PlannedStep]) -> tuple[int, int]:
    """Return rows and columns of the largest gradient window of a run.

    Args:
        settings: What is pruned and how.
        num_weights: Number of weights in scope ``n``.
        schedule: The planned pruning steps.

    Returns:
        Rows ``m`` and columns ``d`` of the window with the most numbers.

    Example:
        >>> settings = MFACSettings(final_sparsity=0.75, end_epoch=2, num_gradients={0.0: 64, 0.5: 512})
        >>> peak_window(settings, 1000, [PlannedStep(1, 1.0, 0.5), PlannedStep(2, 2.0, 0.75)])
        (512, 500)
    """
    # the window before a pruning step is as large as the sparsity reached by the step before it demands
    reached = [0.0, *(step.sparsity for step in schedule[:-1])]
    windows = [
        (num_gradients_at(settings.num_gradients, sparsity), num_weights - round(num_weights * sparsity))
        for sparsity in reached
    ]
    return max(windows, key=lambda window: window[0] * window[1])


def choose_window_device(wanted: str, devices: Sequence[Device], num_bytes: int) -> Device:
    """Return where the gradient window is kept.

    Args:
        wanted: The name of a device, or ``"auto"`` for the first GPU with room for the window, else host memory.
        devices: Where the blocks are computed.
        num_bytes: Bytes of the largest gradient window of the run.

    Returns:
        The device.

    Raises:
        DeviceError: If the wanted device does not exist.
    """
    if wanted != "auto":
        return resolve_device(wanted)
    elsewhere = [device for device in devices if device.backend.name != "numpy"]
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


def check_memory(settings: MFACSettings, device: Device, num_weights: int, schedule: Sequence[PlannedStep]) -> int:
    """Refuse a run that would not fit, before it starts.

    Args:
        settings: What is pruned and how.
        device: Where the gradient window is kept.
        num_weights: Number of weights in scope.
        schedule: The planned pruning steps.

    Returns:
        The bytes that the run takes at most on the device of the gradient window.

    Raises:
        MemoryBudgetError: If they exceed what is free; the message names both, and settings that would fit.
    """
    rows, columns = peak_window(settings, num_weights, schedule)

    def bytes_for(rows: int) -> int:
        window = rows * columns * WINDOW_ITEMSIZE
        blocks = cut(columns, settings.block_size, num_gradients=rows, itemsize=WINDOW_ITEMSIZE, slab_bytes=1)
        working = 2 * max((working_bytes(block, rows, WINDOW_ITEMSIZE) for block in blocks), default=0)
        return window + working

    needed = bytes_for(rows)
    free = device.backend.free_bytes(device.name)
    if free is None or needed <= free:
        return needed
    fitting = bisect_right(range(rows), free, key=bytes_for) - 1
    cure = (
        f"num_gradients of at most {fitting} would fit"
        if fitting > 0
        else "choose a smaller block_size, or fewer weights in params, or a machine with more memory"
    )
    raise MemoryBudgetError(
        f"the gradient window needs {needed:,} bytes on {device} ({rows} gradients of {columns:,} unpruned weights "
        f"and room to work in), and {free:,} are free; {cure}"
    )
