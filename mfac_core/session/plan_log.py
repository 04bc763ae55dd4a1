"""Log the plan of a run: which weights each modifier matches, when it prunes, and settings that may not be intended."""

from __future__ import annotations

import logging
from collections.abc import Collection, Container, Sequence

from mfac_core.ranks import Alone
from mfac_core.ranks.logs import logger_of
from mfac_core.session.live_pruning import LivePruning
from mfac_core.session.log_lines import shares_line
from mfac_core.session.plan import plan_model
from mfac_core.settings.pruning import MFACSettings
from mfac_core.settings.training import TrainableParams, TrainingSettings

__all__ = ["log_plan"]


def log_plan(
    logger: logging.Logger,
    prunings: Sequence[LivePruning],
    others: Sequence[TrainingSettings],
    steps_per_epoch: int,
    *,
    sampled: bool,
    epochs: float | None = None,
    trainable: Sequence[tuple[TrainableParams, Collection[str]]] = (),
    logged: Container[str] = (),
) -> None:
    """Log which weights each modifier prunes and when, and warn about settings that may not be intended.

    Args:
        logger: The logger of the adapter; of several ranks, only the first logs.
        prunings: The pruning modifiers, attached to their model.
        others: The settings of all other modifiers.
        steps_per_epoch: Optimizer steps per epoch.
        sampled: Whether there is a gradient sampler.
        epochs: Epochs of training, if known.
        trainable: The parameters that each modifier freezes or unfreezes.
        logged: Warnings that have already been logged.
    """
    ranks = prunings[0].ranks if prunings else Alone()
    logger = logger_of(ranks, logger)
    plan = plan_model(
        [*(pruning.settings for pruning in prunings), *others],
        [pruning.sizes for pruning in prunings],
        steps_per_epoch,
        epochs=epochs,
        sampled=sampled,
        trainable=trainable,
    )
    for modifier, pruning in zip(plan.modifiers, prunings, strict=True):
        known = modifier._replace(needed_bytes=pruning.needed_bytes)  # the plan does not know which weights are zero
        logger.info("%s%s", known.summary(pruning.schedule), _devices(pruning))
        if ranks.size > 1 and isinstance(pruning.settings, MFACSettings):
            num_weights = sum(pruning.sizes.values())
            shares = shares_line(ranks.size, pruning.settings, num_weights, pruning.window_bytes, pruning.name)
            logger.info("%s", shares)
        for step in modifier.steps:
            logger.debug("%s", step)
    for note in plan.notes:
        logger.info("%s", note)
    for warning in plan.warnings:
        if warning not in logged:
            logger.warning("%s", warning)


def _devices(pruning: LivePruning) -> str:
    if not isinstance(pruning.settings, MFACSettings):
        return ""
    why = " (the recipe names no devices: computed where the weights are)"
    return f"; computed on {', '.join(pruning.devices)}{why if pruning.settings.devices == ('auto',) else ''}"
