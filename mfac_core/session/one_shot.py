"""Pruning in one shot: all modifiers at once, on a model that is not being trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from mfac_core.backends import device_of
from mfac_core.ranks.agreement import together
from mfac_core.recipe.linting import lint_one_shot
from mfac_core.recipe.recommended import differs_line
from mfac_core.session.batch_statistics import ENOUGH_BATCHES, LayerStatistics, stale_statistics_line
from mfac_core.session.live_pruning import LivePruning
from mfac_core.session.session import P, Session
from mfac_core.settings.pruning import MFACSettings, PruningSettings

__all__ = ["check_has_batches", "prune_in_one_shot"]


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


def prune_in_one_shot(
    session: Session[P, Any],
    groups: Sequence[tuple[PruningSettings, PruningSettings]],
    statistics: LayerStatistics,
    *,
    modifiers: Sequence[PruningSettings],
    sampler: Any,
    recalibrate_batchnorm: bool,
    cure: str,
) -> None:
    """Run the single pruning step of all modifiers; an exception restores all weights.

    Args:
        session: The modifiers, attached to a model.
        groups: For each of them, the gradual settings and those of one shot, from
            :func:`mfac_core.schedules.one_shot.one_shot_in_order`.
        statistics: The batch normalization of the model.
        modifiers: The gradual settings of the recipe, also of modifiers that prune nothing at this epoch. The first for
            M-FAC gives the sampler options of the recalibration.
        sampler: The gradient sampler of the framework, or None.
        recalibrate_batchnorm: Whether to recalibrate the statistics over batches of the sampler.
        cure: The call that recalibrates them later, for the warning that they are stale.
    """
    log = session.logger
    for warning in lint_one_shot(groups, [pruning.sizes for pruning in session.prunings]):
        log.warning("%s", warning)
    for line in dict.fromkeys(filter(None, map(differs_line, modifiers))):
        log.info("%s", line)
    before = [_host_weights(pruning) for pruning in session.prunings]
    with ExitStack() as undo:
        for pruning, weights in zip(session.prunings, before, strict=True):
            undo.callback(pruning.write, weights)
        session.prune_if_due()
        if sampler is not None and recalibrate_batchnorm:
            options = next((each.sampler_options for each in modifiers if isinstance(each, MFACSettings)), {})
            with together(session.ranks, "recalibrating batch normalization"):
                statistics.recalibrate(sampler, ENOUGH_BATCHES, options)
        undo.pop_all()
    if not statistics.layers or recalibrate_batchnorm:
        return
    after = map(_host_weights, session.prunings)
    if any(not np.array_equal(old[name], new[name]) for old, new in zip(before, after, strict=True) for name in old):
        log.warning("%s", stale_statistics_line(statistics.layers, cure))


def _host_weights(pruning: LivePruning) -> dict[str, Any]:
    """Return copies of the weights in host memory."""
    return {name: np.array(device_of(array).to_numpy(array)) for name, array in pruning.weights().items()}
