"""Pruning in one shot: all modifiers at once, on a model that is not being trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from mfac_core.backends import device_of
from mfac_core.errors import MemoryBudgetError, SettingError
from mfac_core.ranks.agreement import together
from mfac_core.recipe import named_in_errors
from mfac_core.recipe.linting import lint_one_shot
from mfac_core.recipe.naming import display_name, log_names
from mfac_core.recipe.recommended import differs_line
from mfac_core.session.batch_statistics import ENOUGH_BATCHES, LayerStatistics, stale_statistics_line
from mfac_core.session.live_pruning import LivePruning
from mfac_core.session.session import P, Session, attached
from mfac_core.settings.checks import is_integer
from mfac_core.settings.pruning import MFACSettings, PruningSettings

__all__ = ["attached_at_once", "check_has_batches", "prune_in_one_shot"]


def check_has_batches(
    settings: Iterable[PruningSettings], batches: object, *, recalibrate_batchnorm: bool, cure: str
) -> None:
    """Raise TypeError if pruning in one shot needs batches and there are none; ``cure`` says how to pass them."""
    if batches is not None:
        return
    if any(isinstance(each, MFACSettings) for each in settings):
        raise TypeError(f"M-FAC in one shot needs gradients; {cure}")
    if recalibrate_batchnorm:
        raise TypeError(f"recalibrate_batchnorm needs batches; {cure}")


def attached_at_once(
    settings: Sequence[PruningSettings],
    attach: Callable[[PruningSettings, str], P],
    *,
    layers_at_once: int | None,
    names_of: Callable[[PruningSettings], Collection[str]],
) -> list[tuple[P, ...]]:
    """Return modifiers attached to a model for one shot, those for M-FAC once for each group of layers.

    Each group has gradient samples, a Fisher and a memory check of its own. Only M-FAC is divided, because nothing else
    has a gradient window.

    Args:
        settings: The settings of each modifier, from :func:`mfac_core.schedules.one_shot.one_shot`.
        attach: As in :func:`mfac_core.session.session.attached`.
        layers_at_once: The number of arrays in each group but the last; ``None`` takes all at once.
        names_of: Returns the names of the arrays in scope, in the order of the model.

    Raises:
        SettingError: If ``layers_at_once`` is not a positive integer, or weights of all layers compete.
        MemoryBudgetError: If the gradient window of a group would not fit.
    """
    if layers_at_once is None:
        try:
            return [(each,) for each in attached(settings, attach)]
        except MemoryBudgetError as error:
            error.add_note("Groups of layers need less: pass layers_at_once=k, with global_sparsity: false.")
            raise
    _check_divisible(settings, layers_at_once)
    found = []
    for each, modifier in zip(settings, log_names(settings), strict=True):
        with named_in_errors(each):
            parts: list[tuple[PruningSettings, str]] = [(each, "")]
            if isinstance(each, MFACSettings):
                parts = _divided(each, list(names_of(each)), layers_at_once)
            found.append(tuple(attach(part, ", ".join(filter(None, (modifier, label)))) for part, label in parts))
    return found


def prune_in_one_shot(
    session: Session[P, Any],
    groups: Sequence[tuple[PruningSettings, PruningSettings]],
    statistics: LayerStatistics,
    *,
    modifiers: Sequence[PruningSettings],
    sampler: Any,
    recalibrate_batchnorm: bool,
    cure: str,
    parts: Sequence[Sequence[P]] | None = None,
) -> None:
    """Run the single pruning step of all modifiers; an exception restores all weights.

    Args:
        session: The modifiers, attached to a model.
        groups: For each modifier, the gradual settings and those of one shot, from
            :func:`mfac_core.schedules.one_shot.one_shot_in_order`.
        statistics: The batch normalization of the model.
        modifiers: The gradual settings of the recipe, also of modifiers that prune nothing at this epoch. The first for
            M-FAC gives the sampler options of the recalibration.
        sampler: The gradient sampler of the framework, or None.
        recalibrate_batchnorm: Whether to recalibrate the statistics over batches of the sampler.
        cure: The call that recalibrates them later, for the warning that they are stale.
        parts: The modifiers of the session, once more, from :func:`attached_at_once`; ``None`` if none is divided.
    """
    log = session.logger
    weights = [[name for part in each for name in part.sizes] for each in parts or zip(session.prunings)]
    for warning in lint_one_shot(groups, weights):
        log.warning("%s", warning)
    for line in dict.fromkeys(filter(None, map(differs_line, modifiers))):
        log.info("%s", line)
    before = [_host_weights(pruning) for pruning in session.prunings]
    with ExitStack() as undo:
        for pruning, values in zip(session.prunings, before, strict=True):
            undo.callback(pruning.write, values)
        session.prune_if_due()
        if sampler is not None and recalibrate_batchnorm:
            options = next((each.sampler_options for each in modifiers if isinstance(each, MFACSettings)), {})
            is_sharded = any(not pruning.shards.is_whole for pruning in session.prunings)
            with together(session.ranks, "recalibrating batch normalization", sharded=is_sharded):
                statistics.recalibrate(sampler, ENOUGH_BATCHES, options)
        undo.pop_all()
    if not statistics.layers or recalibrate_batchnorm:
        return
    after = map(_host_weights, session.prunings)
    if any(not np.array_equal(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in old):
        log.warning("%s", stale_statistics_line(statistics.layers, cure))


def _check_divisible(settings: Iterable[PruningSettings], layers_at_once: object) -> None:
    """Refuse a number of layers that is none, or settings whose weights cannot be pruned group by group."""
    if not is_integer(layers_at_once) or layers_at_once < 1:
        raise SettingError(
            "layers_at_once",
            f"{layers_at_once!r} must be a positive integer, such as 7 for the seven weights of a decoder layer, or "
            "None for all layers at once",
        )
    for each in settings:
        if isinstance(each, MFACSettings) and each.scope == "global":
            raise SettingError(
                "layers_at_once",
                f"{layers_at_once} conflicts with global_sparsity of {display_name(each)}: weights of all layers "
                "compete only if they are pruned at the same time; write global_sparsity: false, or leave "
                "layers_at_once out",
            )


def _divided(settings: MFACSettings, names: Sequence[str], size: int) -> list[tuple[PruningSettings, str]]:
    """Return the settings of each group of so many arrays, with its number for the log."""
    groups = [tuple(names[first : first + size]) for first in range(0, len(names), size)]
    return [
        (replace(settings, params=group, exclude=()), f"group {number} of {len(groups)}")
        for number, group in enumerate(groups, start=1)
    ]


def _host_weights(pruning: LivePruning) -> dict[str, Any]:
    """Return copies of the weights in host memory."""
    return {name: np.array(device_of(array).to_numpy(array)) for name, array in pruning.weights().items()}
