"""What looks wrong with a recipe that is not an error, and what its schedule is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from mfac_core.recipe.loading import Recipe
from mfac_core.recipe.modifiers import EpochRange
from mfac_core.schedule import PlannedStep, num_gradients_at, planned_epochs, pruning_schedule, sparsity_at
from mfac_core.settings import GradualSettings, MFACSettings

__all__ = ["ScheduleRow", "describe", "lint"]


class ScheduleRow(NamedTuple):
    """One pruning step of a recipe.

    Attributes:
        modifier: Name of the modifier; numbered where the recipe has several that prune.
        epoch: Epoch at which the step is due.
        step: Completed optimizer steps at which it is due; ``None`` if the steps per epoch are not known.
        sparsity: Sparsity once it is done.
        num_gradients: Rows of the gradient window it draws on, by the sparsity reached before it; ``None`` for
            modifiers that need no gradients.
    """

    modifier: str
    epoch: float
    step: int | None
    sparsity: float
    num_gradients: int | None


def lint(recipe: Recipe, steps_per_epoch: int | None = None) -> tuple[str, ...]:
    """Return warnings about a recipe that can be run, but hardly as it was meant.

    Gradients are taken to be live: one row per optimizer step. With a gradient sampler, warnings about windows that are
    not full do not apply.

    Args:
        recipe: A loaded recipe.
        steps_per_epoch: Optimizer steps per epoch; without it, the check for full windows is left out.

    Returns:
        One sentence per warning.

    Raises:
        SettingError: If ``steps_per_epoch`` is not a positive integer.
    """
    return (
        *_waiting_starts(recipe, steps_per_epoch),
        *_windows_not_full(recipe, steps_per_epoch),
        *_ends_too_late(recipe),
        *_same_params(recipe),
    )


def describe(recipe: Recipe, steps_per_epoch: int | None = None) -> list[ScheduleRow]:
    """Return every pruning step of a recipe.

    Args:
        recipe: A loaded recipe.
        steps_per_epoch: Optimizer steps per epoch; without it, the rows have no step.

    Returns:
        The pruning steps, modifier by modifier, in rising order of time.

    Raises:
        SettingError: If ``steps_per_epoch`` is not a positive integer.
    """
    rows = []
    for name, settings in _named(recipe):
        reached = 0.0
        for epoch, step, sparsity in _timeline(settings, steps_per_epoch):
            rows.append(ScheduleRow(name, epoch, step, sparsity, _window(settings, reached)))
            reached = sparsity
    return rows


def _waiting_starts(recipe: Recipe, steps_per_epoch: int | None) -> Iterator[str]:
    for name, settings in _named(recipe):
        epoch, step, _ = next(iter(_timeline(settings, steps_per_epoch)))
        rows = _window(settings, 0.0)
        if rows is not None and (step == 0 or epoch == 0):
            yield (
                f"{name}: the first pruning step is due at epoch {epoch:g}, before there is any gradient; with live "
                f"gradients it waits for its first window of {rows} rows, at most until the next pruning step; start "
                "later or use a gradient sampler"
            )


def _windows_not_full(recipe: Recipe, steps_per_epoch: int | None) -> Iterator[str]:
    if steps_per_epoch is None:
        return
    for name, settings in _named(recipe):
        short = list(_short_windows(settings, steps_per_epoch))
        if not short:
            continue
        planned, rows, wanted = short[0]
        more = f" (the first of {len(short)} such steps)" if len(short) > 1 else ""
        yield (
            f"{name}: the pruning step at epoch {planned.epoch:g} (optimizer step {planned.step}) falls due while its "
            f"gradient window has {rows} of {wanted} rows, and uses those{more}; start later, prune less often, "
            "lower num_grads or use a gradient sampler"
        )


def _short_windows(settings: GradualSettings, steps_per_epoch: int) -> Iterator[tuple[PlannedStep, int, int]]:
    """Yield the pruning steps whose window is not full, with the rows it has and wants."""
    reached, rows, before = 0.0, 0, 0
    for planned in pruning_schedule(settings, steps_per_epoch):
        wanted = _window(settings, reached)
        if wanted is None:
            return
        # Rows outlive a pruning step: only the columns of newly pruned weights leave the window.
        rows = min(wanted, rows + planned.step - before)
        if 0 < rows < wanted:
            yield planned, rows, wanted
        reached, before = planned.sparsity, planned.step


def _ends_too_late(recipe: Recipe) -> Iterator[str]:
    training_ends = [modifier.end_epoch for modifier in recipe.modifiers if isinstance(modifier, EpochRange)]
    if not training_ends:
        return
    for name, settings in _named(recipe):
        if settings.end_epoch > max(training_ends):
            yield (
                f"{name}: final_sparsity {settings.final_sparsity:g} is not reached, because its end_epoch "
                f"{settings.end_epoch:g} lies after the end of training at epoch {max(training_ends):g} "
                "(EpochRangeModifier); train longer or end pruning earlier"
            )


def _same_params(recipe: Recipe) -> Iterator[str]:
    for (first, one), (second, other) in combinations(_named(recipe), 2):
        if set(one.params) == set(other.params):
            params = ", ".join(one.params)
            yield f"{first} and {second} prune the same params ({params}); give each weight to one modifier"


def _named(recipe: Recipe) -> list[tuple[str, GradualSettings]]:
    """Return the modifiers that prune with a name for each, numbered where there are several."""
    several = len(recipe.pruning) > 1
    return [
        (f"{_modifier_name(settings)} {number}" if several else _modifier_name(settings), settings)
        for number, settings in enumerate(recipe.pruning, start=1)
    ]


def _modifier_name(settings: GradualSettings) -> str:
    if isinstance(settings, MFACSettings):
        return "MFACPruningModifier"
    return "GMPruningModifier" if settings.scope == "global" else "MagnitudePruningModifier"


def _timeline(settings: GradualSettings, steps_per_epoch: int | None) -> list[tuple[float, int | None, float]]:
    """Return epoch, step and sparsity of every pruning step."""
    if steps_per_epoch is not None:
        return [
            (planned.epoch, planned.step, planned.sparsity) for planned in pruning_schedule(settings, steps_per_epoch)
        ]
    duration = settings.end_epoch - settings.start_epoch
    return [
        (
            epoch,
            None,
            sparsity_at(
                (epoch - settings.start_epoch) / duration if duration else 1.0,
                initial=settings.initial_sparsity,
                final=settings.final_sparsity,
                interpolation=settings.interpolation,
            ),
        )
        for epoch in planned_epochs(settings)
    ]


def _window(settings: GradualSettings, reached: float) -> int | None:
    """Return the rows that the next pruning step draws on; ``None`` if it needs no gradients."""
    return num_gradients_at(settings.num_gradients, reached) if isinstance(settings, MFACSettings) else None
