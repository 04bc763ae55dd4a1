"""Reduces the settings of a gradual run to a single pruning step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mfac_core.errors import RecipeError, SettingError
from mfac_core.schedules.pruning import MANY_STEPS, pruning_schedule
from mfac_core.settings.pruning import (
    FROM_PARAM,
    ACDCSettings,
    ConstantSettings,
    GradualSettings,
    MagnitudeSettings,
    MFACSettings,
    PruningSettings,
)

__all__ = ["NOTHING_TO_DO", "one_shot", "one_shot_in_order"]

NOTHING_TO_DO = "the recipe has no pruning modifier, so there is nothing to do; add an !MFACPruningModifier"


def one_shot(settings: PruningSettings, epoch: float = math.inf) -> list[PruningSettings]:
    """Return settings that prune in a single step, before any training, to the sparsity of a gradual run at an epoch.

    Args:
        settings: Settings of a gradual run.
        epoch: Completed epochs; infinity for the end.

    Returns:
        One for each final sparsity; an empty list if nothing is pruned at that epoch.

    Raises:
        SettingError: If the sparsity at that epoch depends on the zeros of the weights.

    Example:
        >>> settings = MagnitudeSettings(final_sparsity=0.8, start_epoch=2, end_epoch=10, update_frequency=4)
        >>> [[each.final_sparsity for each in one_shot(settings, epoch)] for epoch in (0, 6, 20)]
        [[], [0.7000000000000001], [0.8]]
    """
    if isinstance(settings, ConstantSettings):
        held = settings.start_epoch <= epoch and (epoch < settings.end_epoch or epoch == math.inf)
        return [replace(settings, start_epoch=0.0, end_epoch=math.inf)] if held else []
    reached = ((each, _sparsity_at(each, epoch)) for each in settings.by_final_sparsity())
    return [_in_one_step(each, sparsity) for each, sparsity in reached if sparsity > 0]


def one_shot_in_order(
    settings: Iterable[PruningSettings], epoch: float = math.inf
) -> list[tuple[PruningSettings, PruningSettings]]:
    """Return what several modifiers prune in one shot, in the order in which they begin: later ones see earlier zeros.

    Each pair holds the settings of the gradual run, which show whether two modifiers prune at the same time or one
    after the other, and those of :func:`one_shot`.

    Raises:
        RecipeError: If there are no settings.
    """
    in_order = sorted(settings, key=lambda each: each.start_epoch)
    if not in_order:
        raise RecipeError(NOTHING_TO_DO)
    return [(gradual, at_once) for gradual in in_order for at_once in one_shot(gradual, epoch)]


def _sparsity_at(settings: PruningSettings, epoch: float) -> float:
    is_measured = isinstance(settings, GradualSettings) and settings.initial_sparsity == FROM_PARAM
    if is_measured and settings.start_epoch <= epoch < settings.end_epoch:
        raise SettingError(
            "initial_sparsity", f"{FROM_PARAM} leaves the sparsity at epoch {epoch:g} undefined; write a number instead"
        )
    past = [scheduled.sparsity for scheduled in pruning_schedule(settings, MANY_STEPS) if scheduled.epoch <= epoch]
    return past[-1] if past else 0.0


def _in_one_step(settings: PruningSettings, sparsity: float) -> PruningSettings:
    if isinstance(settings, ACDCSettings):
        return MagnitudeSettings(
            final_sparsity=sparsity,
            end_epoch=0.0,
            params=settings.params,
            exclude=settings.exclude,
            scope=settings.scope,
            mask_type=settings.mask_type,
        )
    at_once: dict[str, Any] = {"start_epoch": 0.0, "end_epoch": 0.0, "final_sparsity": sparsity, "leave_enabled": True}
    if isinstance(settings, MFACSettings):
        at_once["gradient_origin"] = "auto"  # there are no gradients of training
    return replace(settings, **at_once)
