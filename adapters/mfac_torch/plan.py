"""What a recipe is going to do to a model, said in the log before it begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mfac_core.recipe.linting import ModifierPlan, lint_model
from mfac_core.settings import MFACSettings
from mfac_core.training_settings import TrainingSettings
from mfac_torch.live_pruning import LivePruning

__all__ = ["log_plan"]

_NAMED = 3
"""So many parameters of a modifier are named in the log, and the last."""

_logger = logging.getLogger("mfac_torch")


def log_plan(
    prunings: Sequence[LivePruning], others: Sequence[TrainingSettings], steps_per_epoch: int, *, sampled: bool
) -> None:
    """Log what each pruning modifier matches and when it prunes, and warn of what looks wrong.

    Args:
        prunings: The pruning modifiers, on their model.
        others: The settings of all other modifiers.
        steps_per_epoch: Optimizer steps per epoch.
        sampled: Whether there is a gradient sampler.
    """
    plan = lint_model(
        [*(pruning.settings for pruning in prunings), *others],
        [{name: each.numel() for name, each in pruning.parameters.items()} for pruning in prunings],
        steps_per_epoch,
        sampled=sampled,
    )
    for modifier, pruning in zip(plan.modifiers, prunings, strict=True):
        _logger.info("%s: %s; %s%s", modifier.modifier, _matched(modifier), _scheduled(pruning), _computed(pruning))
        for step in modifier.steps:
            _logger.debug("%s", step)
    for warning in plan.warnings:
        _logger.warning("%s", warning)


def _matched(plan: ModifierPlan) -> str:
    names = list(plan.weights)
    named = ", ".join(names if len(names) <= _NAMED + 1 else [*names[:_NAMED], "...", names[-1]])
    return f"{plan.num_weights:,} weights in {len(names)} parameters ({named})"


def _scheduled(pruning: LivePruning) -> str:
    first, last = pruning.schedule[0], pruning.schedule[-1]
    if first == last:
        return f"one pruning step at epoch {first.epoch:g} (step {first.step}), sparsity {first.sparsity:.4g}"
    return (
        f"{len(pruning.schedule)} pruning steps from epoch {first.epoch:g} (step {first.step}), sparsity "
        f"{first.sparsity:.4g}, to epoch {last.epoch:g} (step {last.step}), sparsity {last.sparsity:.4g}"
    )


def _computed(pruning: LivePruning) -> str:
    if not isinstance(pruning.settings, MFACSettings):
        return ""
    why = " (the recipe names no devices: where the weights are, on a GPU if CuPy is installed)"
    return f"; computed on {', '.join(pruning.devices)}{why if pruning.settings.devices == ('auto',) else ''}"
