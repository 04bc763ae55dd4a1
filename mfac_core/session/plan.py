"""What a recipe will do, with or without a model: for ``mfac check``, ``mfac plan`` and the log of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mfac_core.pruners.memory import WindowMemory
from mfac_core.pruners.rank_costs import RankCosts, rank_costs
from mfac_core.recipe.formats import Settings
from mfac_core.recipe.linting import model_notes, model_warnings
from mfac_core.recipe.loading import Recipe
from mfac_core.recipe.naming import named_groups
from mfac_core.schedules.pruning import ScheduledStep, pruning_schedule
from mfac_core.schedules.rows import ScheduleRow, schedule_rows
from mfac_core.settings.pruning import MFACSettings, PruningSettings
from mfac_core.settings.training import TrainableParams
from mfac_core.weight_names import join_names

__all__ = ["ModifierPlan", "Plan", "describe", "plan_model"]


class ModifierPlan(NamedTuple):
    """What one pruning modifier will do to a model.

    Attributes:
        modifier: Its name, from :func:`mfac_core.recipe.naming.named_groups`.
        weights: Name of each parameter that it matches -> number of weights.
        steps: Its pruning steps.
        window: Rows and columns of its largest gradient window; zeros if it needs none.
        window_bytes: Bytes of that window.
        needed_bytes: Bytes that it needs for gradient windows and computation; a run with less free memory is refused.
        of_rank: What the rank with the most blocks keeps, computes and sends, if it has a window and several ranks are
            planned for; the other fields are those of a single process.
    """

    modifier: str
    weights: Mapping[str, int]
    steps: tuple[ScheduleRow, ...]
    window: tuple[int, int] = (0, 0)
    window_bytes: int = 0
    needed_bytes: int = 0
    of_rank: RankCosts | None = None

    @property
    def num_weights(self) -> int:
        """Number of all weights that it matches."""
        return sum(self.weights.values())

    def summary(self, schedule: Sequence[ScheduledStep]) -> str:
        """Return in one line what the modifier matches and when it prunes, by the schedule of its pruner."""
        parameters = f"{len(self.weights)} parameter{'s' if len(self.weights) != 1 else ''}"
        memory = f", up to {self.needed_bytes:,} bytes of memory" if self.needed_bytes else ""
        return (
            f"{self.modifier}: {self.num_weights:,} weights in {parameters} "
            f"({join_names(self.weights, at_most=3)}){memory}; {_in_words(schedule)}"
        )


class Plan(NamedTuple):
    """What the pruning modifiers of a recipe will do to a model.

    Attributes:
        modifiers: One entry for each pruning modifier, and for each final sparsity of one that has several.
        warnings: One sentence for each setting that may not do what is intended.
        notes: One sentence for each fact worth knowing before training.
    """

    modifiers: tuple[ModifierPlan, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def window_bytes(self) -> int:
        """Bytes of the largest gradient windows of all modifiers together."""
        return sum(modifier.window_bytes for modifier in self.modifiers)

    @property
    def needed_bytes(self) -> int:
        """Bytes that all modifiers need together."""
        return sum(modifier.needed_bytes for modifier in self.modifiers)

    @property
    def needed_bytes_of_rank(self) -> int:
        """Bytes that all modifiers need together on the rank with the most blocks; 0 if no ranks are planned for."""
        return sum(modifier.of_rank.needed_bytes for modifier in self.modifiers if modifier.of_rank)


def describe(recipe: Recipe, steps_per_epoch: int | None = None) -> list[ScheduleRow]:
    """Return every pruning step of a recipe, modifier by modifier.

    Args:
        recipe: A loaded recipe.
        steps_per_epoch: Optimizer steps per epoch; without it, the rows have no step.

    Returns:
        The pruning steps of each modifier, in chronological order.

    Raises:
        SettingError: If ``steps_per_epoch`` is not a positive integer.
    """
    groups = named_groups(recipe.pruning)
    return [row for name, group in groups for row in schedule_rows(name, group, steps_per_epoch)]


def plan_model(
    settings: Sequence[Settings],
    weights: Sequence[Mapping[str, int]],
    steps_per_epoch: int,
    *,
    epochs: float | None = None,
    sampled: bool = False,
    trainable: Sequence[tuple[TrainableParams, Collection[str]]] = (),
    num_ranks: int | None = None,
) -> Plan:
    """Return what modifiers will do to a model, with warnings about what may not be intended.

    Args:
        settings: The settings of each modifier.
        weights: The parameters that each pruning modifier matches, name -> number of weights: one mapping for each
            entry of ``by_final_sparsity()``, in order.
        steps_per_epoch: Optimizer steps per epoch.
        epochs: Epochs of training; ``None`` uses the end of an ``EpochRange``, if there is one.
        sampled: Whether there is a gradient sampler, so that windows are full at each pruning step.
        trainable: The parameters that each modifier that freezes or unfreezes matches.
        num_ranks: Number of processes; ``None`` plans for one, and says nothing of several.

    Returns:
        The plan.

    Raises:
        ValueError: If the number of ``weights`` is wrong.
        SettingError: If ``steps_per_epoch`` is not a positive integer.

    Example:
        >>> mfac = MFACSettings(final_sparsity=0.5, start_epoch=1.0, end_epoch=2.0, num_gradients=64)
        >>> plan = plan_model([mfac], [{"fc.weight": 1000}], steps_per_epoch=100, epochs=1.5)
        >>> plan.window_bytes, [(row.step, row.sparsity) for row in plan.modifiers[0].steps]
        (256000, [(100, 0.0), (200, 0.5)])
        >>> plan.warnings[0][:76]
        'MFACPruningModifier: final_sparsity 0.5 is not reached, because its end_epoc'
    """
    groups = named_groups(each for each in settings if isinstance(each, PruningSettings))
    if len(weights) != len(groups):
        raise ValueError(
            f"weights: {len(weights)} mappings for {len(groups)} groups of weights; give one for each entry of "
            "by_final_sparsity() of each pruning modifier"
        )
    modifiers = tuple(
        _modifier_plan(name, group, matched, steps_per_epoch, sampled=sampled, num_ranks=num_ranks)
        for (name, group), matched in zip(groups, weights, strict=True)
    )
    warnings = model_warnings(settings, weights, steps_per_epoch, epochs=epochs, sampled=sampled, trainable=trainable)
    return Plan(modifiers, warnings, model_notes(settings, weights))


def _modifier_plan(
    name: str,
    settings: PruningSettings,
    weights: Mapping[str, int],
    steps_per_epoch: int,
    *,
    sampled: bool,
    num_ranks: int | None,
) -> ModifierPlan:
    plan = ModifierPlan(name, dict(weights), tuple(schedule_rows(name, settings, steps_per_epoch)))
    if not isinstance(settings, MFACSettings):
        return plan
    is_live = not sampled or settings.gradient_origin == "training"
    schedule = pruning_schedule(settings, steps_per_epoch)
    memory = WindowMemory(settings, plan.num_weights, schedule, live_gradients=is_live)
    of_rank = None if num_ranks is None else rank_costs(replace(memory, num_ranks=num_ranks))
    return plan._replace(
        window=memory.peak(),
        window_bytes=memory.peak_bytes(),
        needed_bytes=memory.needed_bytes(),
        of_rank=of_rank,
    )


def _in_words(schedule: Sequence[ScheduledStep]) -> str:
    first, last = schedule[0], schedule[-1]
    if first == last:
        return f"one pruning step at epoch {first.epoch:g} (step {first.step}), sparsity {first.sparsity:.4g}"
    return (
        f"{len(schedule)} pruning steps from epoch {first.epoch:g} (step {first.step}), sparsity "
        f"{first.sparsity:.4g}, to epoch {last.epoch:g} (step {last.step}), sparsity {last.sparsity:.4g}"
    )
