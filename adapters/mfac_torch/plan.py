"""What a recipe is going to do to a model, said in the log before it begins."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Sequence

from mfac_core.session.plan import plan_model
from mfac_core.settings.pruning import MFACSettings
from mfac_core.settings.training import TrainableParams, TrainingSettings
from mfac_torch.live_pruning import LivePruning

__all__ = ["log_plan"]

_logger = logging.getLogger("mfac_torch")


def log_plan(
    prunings: Sequence[LivePruning],
    others: Sequence[TrainingSettings],
    steps_per_epoch: int,
    *,
    sampled: bool,
    trainable: Sequence[tuple[TrainableParams, Collection[str]]] = (),
    logged: Container[str] = (),
) -> None:
    """Log what each pruning modifier matches and when it prunes, and warn of what looks wrong.

    Args:
        prunings: The pruning modifiers, on their model.
        others: The settings of all other modifiers.
        steps_per_epoch: Optimizer steps per epoch.
        sampled: Whether there is a gradient sampler.
        trainable: Which parameters each modifier that freezes or unfreezes matches.
        logged: Warnings that the log has already.
    """
    plan = plan_model(
        [*(pruning.settings for pruning in prunings), *others],
        [{name: each.numel() for name, each in pruning.parameters.items()} for pruning in prunings],
        steps_per_epoch,
        sampled=sampled,
        trainable=trainable,
    )
    for modifier, pruning in zip(plan.modifiers, prunings, strict=True):
        _logger.info("%s%s", modifier.summary(pruning.schedule), _computed(pruning))
        for step in modifier.steps:
            _logger.debug("%s", step)
    for note in plan.notes:
        _logger.info("%s", note)
    for warning in plan.warnings:
        if warning not in logged:
            _logger.warning("%s", warning)


def _computed(pruning: LivePruning) -> str:
    if not isinstance(pruning.settings, MFACSettings):
        return ""
    why = " (the recipe names no devices: where the weights are, on a GPU if CuPy is installed)"
    return f"; computed on {', '.join(pruning.devices)}{why if pruning.settings.devices == ('auto',) else ''}"
