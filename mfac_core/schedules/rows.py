"""The pruning steps of settings as rows: what tables show and what the linter reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mfac_core.schedules.pruning import MANY_STEPS, num_gradients_at, pruning_schedule
from mfac_core.schedules.substeps import num_substeps, substep_due
from mfac_core.settings.pruning import FROM_PARAM, ConstantSettings, MFACSettings, PruningSettings

__all__ = ["ScheduleRow", "schedule_rows", "substeps_while_training"]


class ScheduleRow(NamedTuple):
    """One pruning step of a modifier.

    Attributes:
        modifier: Name of the modifier, from :func:`mfac_core.recipe.naming.named_groups`.
        epoch: Epoch at which the step is due.
        step: Completed optimizer steps at which it is due; ``None`` if the steps per epoch are not known.
        sparsity: Sparsity after the step; ``None`` if it depends on the sparsity that the weights start with.
        num_gradients: Rows of the gradient window that it uses; ``None`` if it uses none.
    """

    modifier: str
    epoch: float
    step: int | None
    sparsity: float | None
    num_gradients: int | None


def schedule_rows(modifier: str, settings: PruningSettings, steps_per_epoch: int | None = None) -> list[ScheduleRow]:
    """Return the pruning steps of settings with one final sparsity; none for existing zeros that are only kept.

    Example:
        >>> settings = MFACSettings(final_sparsity=0.5, end_epoch=2.0)
        >>> [(row.epoch, row.step, row.num_gradients) for row in schedule_rows("MFAC", settings, steps_per_epoch=10)]
        [(0.0, 0, None), (1.0, 10, 64), (2.0, 20, 64)]
    """
    if isinstance(settings, ConstantSettings):
        return []
    schedule = pruning_schedule(settings, MANY_STEPS if steps_per_epoch is None else steps_per_epoch)
    begins_at_weights = getattr(settings, "initial_sparsity", None) == FROM_PARAM
    rows, reached = [], 0.0
    for scheduled in schedule:
        prunes_by_gradients = isinstance(settings, MFACSettings) and scheduled.sparsity > reached
        rows.append(
            ScheduleRow(
                modifier,
                scheduled.epoch,
                None if steps_per_epoch is None else scheduled.step,
                None if begins_at_weights and scheduled is not schedule[-1] else scheduled.sparsity,
                num_gradients_at(settings.num_gradients, reached) if prunes_by_gradients else None,  # type: ignore[attr-defined]
            )
        )
        reached = scheduled.sparsity
    return rows


def substeps_while_training(settings: MFACSettings, rows: Sequence[ScheduleRow]) -> list[tuple[ScheduleRow, list[int]]]:
    """Return the rows that use gradients of training, each with the steps at which its sub-steps are due."""
    found, reached, before = [], 0.0, None
    for row in rows:
        step, sparsity = row.step or 0, reached if row.sparsity is None else row.sparsity
        if row.num_gradients is not None:
            count = num_substeps(reached, sparsity, settings.num_recomputations)
            found.append((row, [substep_due(step, before, each, count, row.num_gradients) for each in range(count)]))
        reached, before = sparsity, step
    return found
