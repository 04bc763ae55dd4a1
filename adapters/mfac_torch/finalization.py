"""The end of a run: weights compared with masks, and set to zero if asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from mfac_core.masks.zero_count import ZeroCount
from mfac_core.ranks.logs import logger_of
from mfac_core.session.live_pruning import combined_masks
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.write_monitor import WriteMonitor
from mfac_torch.zeros import apply_masks, zeros_of

__all__ = ["current_zeros", "reconcile", "warn_of_replaced"]

_logger = logging.getLogger("mfac_torch")


def current_zeros(prunings: Sequence[TorchPruning]) -> ZeroCount:
    """Count the zeros of the parameters that the model has now, whatever has written or replaced them."""
    return zeros_of(_parameters(prunings), _masks(prunings))


def reconcile(prunings: Sequence[TorchPruning], hold: bool | None, monitor: WriteMonitor | None) -> None:
    """Compare weights with masks, and log the difference: on the first rank, or on each that has it in its shards.

    Args:
        prunings: The pruning modifiers.
        hold: Whether regrown weights are set to zero; None does so after one-shot pruning only.
        monitor: What has watched the training run; None after one-shot pruning.
    """
    difference = current_zeros(prunings).difference()
    if not difference:
        return
    logger = prunings[0].weights_logger
    if hold or (hold is None and monitor is None):
        changed = apply_masks(_parameters(prunings), _masks(prunings))
        level = logging.INFO if hold is None else logging.WARNING  # fine-tuning after one shot regrows them as expected
        logger.log(level, "%s; finalize has set %s weights to zero", difference, f"{changed:,}")
        return
    logger.warning(
        "%s.%s These weights are left unchanged; finalize(hold=True) would have set them to zero, and "
        "mfac_torch.apply_masks(model, manager) does so now",
        difference,
        "" if monitor is None else f" Likely cause: {monitor.likely_cause()}.",
    )


def warn_of_replaced(prunings: Sequence[TorchPruning], model: nn.Module) -> None:
    """Warn about parameters in scope that the model no longer contains."""
    now = {id(parameter) for parameter in model.parameters()}
    replaced = [
        name for pruning in prunings for name, parameter in pruning.parameters.items() if id(parameter) not in now
    ]
    if replaced:
        logger_of(prunings[0].ranks, _logger).warning(
            "%s: the model has other parameters under these names than when the recipe was attached, and they are not "
            "pruned; attach the recipe once the model has its final layers, and load weights without assign=True",
            ", ".join(replaced),
        )


def _parameters(prunings: Sequence[TorchPruning]) -> dict[str, nn.Parameter]:
    return {name: each for pruning in prunings for name, each in pruning.current_parameters.items()}


def _masks(prunings: Sequence[TorchPruning]) -> dict[str, torch.Tensor]:
    """Return the masks, except those of parameters that were removed or have another shape now."""
    now = _parameters(prunings)
    masks = combined_masks(pruning.mask_tensors for pruning in prunings)
    return {name: mask for name, mask in masks.items() if name in now and now[name].shape == mask.shape}
