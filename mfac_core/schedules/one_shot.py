"""Settings that prune in a single step: the recommended ones, and those that a gradual run turns into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mfac_core.errors import SettingError
from mfac_core.recipe import settings_from_keys
from mfac_core.recipe.keys import MFAC_KEYS, SCOPE
from mfac_core.schedules.pruning import pruning_schedule
from mfac_core.settings.pruning import (
    FROM_PARAM,
    ACDCSettings,
    ConstantSettings,
    GradualSettings,
    MagnitudeSettings,
    MFACSettings,
    PruningSettings,
)

__all__ = [
    "RECOMMENDED",
    "differs_line",
    "one_shot",
    "one_shot_in_order",
    "recommended_keys",
    "recommended_line",
]

RECOMMENDED: Mapping[str, object] = {
    "global_sparsity": True,
    "update": "joint",
    "num_recomputations": "auto",
    "damp": "auto",
    "num_grads": 256,
}
"""Recipe key -> value: what prunes most accurately in one shot, on models of several kinds."""

_MODIFIER = "MFACPruningModifier"
_NESTED = "mfac_options"

_FINE = 1_000_000
"""Steps per epoch so many that no two pruning steps of a schedule become one."""


def recommended_keys(keys: Mapping[str, object], sparsity: object = None) -> dict[str, object]:
    """Return the keys of an ``MFACPruningModifier`` that prunes in one shot, the recommended ones where none is given.

    Args:
        keys: Recipe keys that are given, with their values.
        sparsity: The sparsity to reach, unless ``keys`` have it as ``final_sparsity``.

    Returns:
        The keys, those that are given first. Where the sparsity is a mapping to names of weights, each of them gets
        its own: ``global_sparsity`` is false.

    Raises:
        TypeError: If the sparsity is missing or given twice.

    Example:
        >>> keys = recommended_keys({"num_grads": 64}, 0.9)
        >>> keys["final_sparsity"], keys["num_grads"], keys["update"]
        (0.9, 64, 'joint')
    """
    if sparsity is None and "final_sparsity" not in keys:
        raise TypeError("there is no sparsity to reach; pass sparsity=0.9 to prune nine weights of ten")
    if sparsity is not None and "final_sparsity" in keys:
        raise TypeError(
            f"sparsity={sparsity!r} and final_sparsity={keys['final_sparsity']!r} are two names of the same; pass one"
        )
    given = dict(keys) if sparsity is None else {"final_sparsity": sparsity, **keys}
    return {**given, **_recommended_beside(given), **({} if "end_epoch" in given else {"end_epoch": 0.0})}


def recommended_line(keys: Mapping[str, object]) -> str:
    """Return in one line which of the recommended settings a one-shot takes.

    Args:
        keys: The recipe keys that are given.

    Returns:
        The line; nothing where all of them are given.

    Example:
        >>> recommended_line({"final_sparsity": 0.9, "damp": 0.001, "num_recomputations": 4})
        'one-shot by recommended settings where none are given: global_sparsity True, update joint, num_grads 256'
    """
    taken = ", ".join(f"{key} {value}" for key, value in _recommended_beside(keys).items())
    return f"one-shot by recommended settings where none are given: {taken}" if taken else ""


def differs_line(settings: PruningSettings) -> str:
    """Return in one line where settings differ from those that are recommended for one-shot M-FAC.

    Args:
        settings: What a modifier says.

    Returns:
        The line; nothing where they do not differ, or prune in another way.

    Example:
        >>> settings = settings_from_keys("MFACPruningModifier", {**RECOMMENDED, "final_sparsity": 0.9, "end_epoch": 0})
        >>> differs_line(settings)
        ''
        >>> differs_line(replace(settings, scope="layer"))
        'one-shot by other settings than recommended: global_sparsity False (recommended: True)'
    """
    if not isinstance(settings, MFACSettings):
        return ""
    recommended = settings_from_keys(_MODIFIER, {**RECOMMENDED, "final_sparsity": 0.5, "end_epoch": 0.0})
    differs: list[str] = []
    for key, value in RECOMMENDED.items():
        meaning = {"global_sparsity": SCOPE, **MFAC_KEYS}[key]
        says = getattr(settings, str(meaning.field))
        if says != getattr(recommended, str(meaning.field)) and meaning.write is not None:
            written = meaning.write(says)
            if isinstance(written, Mapping) and list(written) == [0.0]:  # num_grads, as it is most often given
                written = written[0.0]
            differs.append(f"{key} {written} ({'' if differs else 'recommended: '}{value})")
    return f"one-shot by other settings than recommended: {', '.join(differs)}" if differs else ""


def one_shot(settings: PruningSettings, epoch: float = math.inf) -> list[PruningSettings]:
    """Return settings that prune in a single step, before any training, as far as a gradual run is at an epoch.

    Args:
        settings: Settings of a gradual run.
        epoch: Completed epochs; infinity for the end.

    Returns:
        The settings, one for each final sparsity; none where nothing is pruned at that epoch.

    Raises:
        SettingError: If the sparsity at that epoch depends on what is zero in the weights.

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
    """Return what several modifiers prune in one shot, in the order in which they begin: one sees the zeros before it.

    Args:
        settings: Settings of a gradual run, one for each modifier.
        epoch: Completed epochs; infinity for the end.

    Returns:
        The settings of :func:`one_shot`, each after the gradual ones that it comes from. Those say whether two
        modifiers prune at the same time, or the one after the other.

    Raises:
        SettingError: If the sparsity at that epoch depends on what is zero in the weights.
    """
    in_order = sorted(settings, key=lambda each: each.start_epoch)
    return [(gradual, at_once) for gradual in in_order for at_once in one_shot(gradual, epoch)]


def _recommended_beside(given: Mapping[str, object]) -> dict[str, object]:
    nested = given.get(_NESTED)
    known = {*given, *(nested if isinstance(nested, Mapping) else ())}
    # sparsities with names of weights are those of each of them
    of_each = {"global_sparsity": False} if isinstance(given.get("final_sparsity"), Mapping) else {}
    return {key: value for key, value in {**RECOMMENDED, **of_each}.items() if key not in known}


def _sparsity_at(settings: PruningSettings, epoch: float) -> float:
    is_measured = isinstance(settings, GradualSettings) and settings.initial_sparsity == FROM_PARAM
    if is_measured and settings.start_epoch <= epoch < settings.end_epoch:
        raise SettingError(
            "initial_sparsity", f"{FROM_PARAM} leaves the sparsity at epoch {epoch:g} open; write a number for it"
        )
    past = [planned.sparsity for planned in pruning_schedule(settings, _FINE) if planned.epoch <= epoch]
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
