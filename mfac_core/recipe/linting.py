"""What looks wrong with a recipe that is not an error, and what its schedule is: with and without a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from mfac_core.recipe.loading import Recipe
from mfac_core.recipe.modifiers import Settings
from mfac_core.recipe.writing import name_in_messages
from mfac_core.schedules.pruning import ScheduledStep, num_gradients_at, pruning_epochs, pruning_schedule, sparsity_at
from mfac_core.schedules.substeps import num_substeps, substep_due
from mfac_core.settings.pruning import (
    FROM_PARAM,
    ACDCSettings,
    ConstantSettings,
    GradualSettings,
    MFACSettings,
    PruningSettings,
)
from mfac_core.settings.training import (
    EpochRange,
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    TrainableParams,
)
from mfac_core.weight_names import join_names

__all__ = [
    "ModifierPlan",
    "Plan",
    "ScheduleRow",
    "describe",
    "lint",
    "lint_model",
    "lint_one_shot",
    "modifier_names",
    "named_groups",
    "notes",
]

_BYTES_PER_GRADIENT = 4
_MANY_STEPS = 10**6
_LARGE_STEP = 0.5
"""A pruning step that keeps a smaller fraction than this of what it finds is a large one."""
_BETTER = "write global_sparsity: true and num_recomputations: auto (and update: joint, damp: auto)"
_NAMED = 3
"""So many parameters of a modifier are named in its summary."""


class ScheduleRow(NamedTuple):
    """One pruning step of a recipe.

    Attributes:
        modifier: Name of the modifier; numbered where the recipe has several that prune, with the final sparsity where
            the modifier has several.
        epoch: Epoch at which the step is due.
        step: Completed optimizer steps at which it is due; ``None`` if the steps per epoch are not known.
        sparsity: Sparsity once it is done; ``None`` where it depends on the sparsity that the weights begin with.
        num_gradients: Rows of the gradient window it draws on, by the sparsity reached before it; ``None`` for
            modifiers that need no gradients, and for pruning steps that ask for no further zeros.
    """

    modifier: str
    epoch: float
    step: int | None
    sparsity: float | None
    num_gradients: int | None


class ModifierPlan(NamedTuple):
    """What one pruning modifier will do to a model.

    Attributes:
        modifier: Its name, as in :class:`ScheduleRow`.
        weights: Name of each parameter that it matches -> number of weights.
        steps: Its pruning steps.
        window: Rows and columns of its largest gradient window; zeros where it needs none.
    """

    modifier: str
    weights: Mapping[str, int]
    steps: tuple[ScheduleRow, ...]
    window: tuple[int, int]

    @property
    def num_weights(self) -> int:
        """Number of all weights that it matches."""
        return sum(self.weights.values())

    @property
    def window_bytes(self) -> int:
        """Bytes of its largest gradient window."""
        return self.window[0] * self.window[1] * _BYTES_PER_GRADIENT

    def summary(self, schedule: Sequence[ScheduledStep]) -> str:
        """Return in one line what the modifier matches, and when it prunes.

        Args:
            schedule: Its pruning steps as the pruner has them, which knows what the weights are.

        Returns:
            The line.
        """
        memory = f", gradient window of up to {self.window_bytes:,} bytes" if self.window_bytes else ""
        return (
            f"{self.modifier}: {self.num_weights:,} weights in {len(self.weights)} parameters "
            f"({join_names(self.weights, _NAMED)}){memory}; {_scheduled(schedule)}"
        )


class Plan(NamedTuple):
    """What the pruning modifiers of a recipe will do to a model.

    Attributes:
        modifiers: One entry per pruning modifier, and per final sparsity where it has several.
        warnings: One sentence per thing that will run but hardly as it was meant.
        notes: One sentence per thing that is better known beforehand.
    """

    modifiers: tuple[ModifierPlan, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def window_bytes(self) -> int:
        """Bytes of the largest gradient windows of all modifiers together."""
        return sum(modifier.window_bytes for modifier in self.modifiers)


def lint(recipe: Recipe, steps_per_epoch: int | None = None, *, sampled: bool = False) -> tuple[str, ...]:
    """Return warnings about a recipe that can be run, but hardly as it was meant.

    Args:
        recipe: A loaded recipe.
        steps_per_epoch: Optimizer steps per epoch; without it, the check for full windows is left out.
        sampled: Whether gradient samples are drawn at each pruning step, so that windows are always full; otherwise
            they are those of training, one row per optimizer step.

    Returns:
        One sentence per warning.

    Raises:
        SettingError: If ``steps_per_epoch`` is not a positive integer.
    """
    named = _named(recipe.pruning)
    return (
        *(() if sampled else _window_warnings(named, steps_per_epoch)),
        *_ends_too_late(named, _end_of_training(recipe.modifiers)),
        *_begins_too_late(recipe.modifiers, _end_of_training(recipe.modifiers)),
        *_layers_in_one_pass(_parts(named)),
        *_same_params(named),
        *_same_learning_rate(recipe.modifiers),
    )


def lint_model(
    settings: Sequence[Settings],
    weights: Sequence[Mapping[str, int]],
    steps_per_epoch: int,
    *,
    epochs: float | None = None,
    sampled: bool = False,
    trainable: Sequence[tuple[TrainableParams, Collection[str]]] = (),
) -> Plan:
    """Return what settings will do to a model, with warnings about what will hardly go as it was meant.

    Args:
        settings: What each modifier says.
        weights: Which parameters each pruning modifier matches: name -> number of weights. One mapping per entry of
            ``by_final_sparsity()`` of each, in order: one for most, one per sparsity where it has several.
        steps_per_epoch: Optimizer steps per epoch.
        epochs: Epochs of the training; ``None`` takes the end of an ``EpochRange``, if there is one.
        sampled: Whether there is a gradient sampler, so that windows are full at each pruning step.
        trainable: Which parameters each modifier that freezes or unfreezes matches.

    Returns:
        Pruning steps, matched weights and memory of each pruning modifier, and the warnings.

    Raises:
        ValueError: If there are not as many ``weights`` as there must be.
        SettingError: If ``steps_per_epoch`` is not a positive integer.

    Example:
        >>> mfac = MFACSettings(final_sparsity=0.5, start_epoch=1.0, end_epoch=2.0, num_gradients=64)
        >>> plan = lint_model([mfac], [{"fc.weight": 1000}], steps_per_epoch=100, epochs=1.5)
        >>> plan.window_bytes, [(row.step, row.sparsity) for row in plan.modifiers[0].steps]
        (256000, [(100, 0.0), (200, 0.5)])
        >>> plan.warnings[0][:76]
        'MFACPruningModifier: final_sparsity 0.5 is not reached, because its end_epoc'
    """
    named = _named([each for each in settings if isinstance(each, PruningSettings)])
    parts = list(_parts(named))
    if len(weights) != len(parts):
        raise ValueError(
            f"weights: {len(weights)} mappings for {len(parts)} groups of weights; give one for each entry of "
            "by_final_sparsity() of each pruning modifier"
        )
    plans = tuple(
        _modifier_plan(name, part, matched, steps_per_epoch)
        for (name, part), matched in zip(parts, weights, strict=True)
    )
    end = (epochs, "") if epochs is not None else _end_of_training(settings)
    warnings = (
        *(() if named else ("the recipe has no pruning modifier: nothing is pruned",)),
        *(f"{plan.modifier}: no weights match params; nothing is pruned" for plan in plans if not plan.num_weights),
        *_window_warnings(named, steps_per_epoch, sampled=sampled),
        *_ends_too_late(named, end),
        *_begins_too_late(settings, end),
        *_cut_short(settings, epochs),
        *_same_learning_rate(settings),
        *_layers_in_one_pass(
            (name, part) for (name, part), plan in zip(parts, plans, strict=True) if len(plan.weights) > 1
        ),
        *_pruned_while_frozen(((part, plan) for (_, part), plan in zip(parts, plans, strict=True)), trainable),
        *_same_weights([(name, part, plan.weights) for (name, part), plan in zip(parts, plans, strict=True)]),
    )
    within_layers = (named for named, plan in zip(parts, plans, strict=True) if len(plan.weights) > 1)
    return Plan(plans, warnings, tuple(_in_one_pass(within_layers)))


def lint_one_shot(
    parts: Sequence[tuple[PruningSettings, PruningSettings]], weights: Sequence[Collection[str]]
) -> tuple[str, ...]:
    """Return warnings about what several modifiers prune in one shot.

    Args:
        parts: For each, the settings of the gradual run, which say whether two of them prune at the same time or the
            one after the other; and those of the single step, from
            :func:`mfac_core.schedules.one_shot.one_shot_in_order`.
        weights: Names of the parameters that each of them prunes.

    Returns:
        One sentence per thing that will run but hardly as it was meant.
    """
    times = _named(gradual for gradual, _ in parts)
    at_once = _named(single for _, single in parts)
    several = (named for named, names in zip(at_once, weights, strict=True) if len(names) > 1)
    return (
        *_layers_in_one_pass(several),
        *_same_weights([(*named, names) for named, names in zip(times, weights, strict=True)]),
    )


def modifier_names(pruning: Iterable[PruningSettings]) -> list[str]:
    """Return the names that tell the pruning modifiers of a run apart in its log: those that warnings have too.

    Args:
        pruning: The settings of all modifiers of the run that prune.

    Returns:
        A numbered name for each; an empty one where there is a single modifier.

    Example:
        >>> mfac = MFACSettings(final_sparsity=0.5, end_epoch=2.0)
        >>> modifier_names([mfac]), modifier_names([mfac, mfac])
        ([''], ['MFACPruningModifier 1', 'MFACPruningModifier 2'])
    """
    named = _named(pruning)
    return [name for name, _ in named] if len(named) > 1 else [""] * len(named)


def named_groups(pruning: Iterable[PruningSettings]) -> list[tuple[str, PruningSettings]]:
    """Return the groups of weights that have a final sparsity of their own, with the names that messages call them.

    Args:
        pruning: The settings of the modifiers that prune.

    Returns:
        Name and settings, one for each entry of ``by_final_sparsity()`` of each modifier, in order.
    """
    return list(_parts(_named(pruning)))


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
    return [row for name, part in _parts(_named(recipe.pruning)) for row in _rows(name, part, steps_per_epoch)]


def notes(recipe: Recipe) -> tuple[str, ...]:
    """Return what a recipe leaves to the moment when it is attached to a model.

    Args:
        recipe: A loaded recipe.

    Returns:
        One sentence per such thing.
    """
    found = []
    for name, settings in _named(recipe.pruning):
        if isinstance(settings, ConstantSettings):
            until = "" if settings.end_epoch == math.inf else f" until epoch {settings.end_epoch:g}"
            found.append(f"{name}: holds the zeros that are there at epoch {settings.start_epoch:g}{until}")
        if isinstance(settings, GradualSettings) and settings.initial_sparsity == FROM_PARAM:
            found.append(f"{name}: begins at the sparsity that the weights have then")
        found += _in_one_pass([(name, settings)])
        if isinstance(settings, MFACSettings) and settings.num_recomputations != 1:
            found.append(
                f"{name}: does each pruning step in {_in_words(settings)}, each by gradients of its own: without a "
                "gradient sampler those of the optimizer steps before it"
            )
        if isinstance(settings, MFACSettings) and settings.devices == ("auto",):
            found.append(
                f"{name}: computes where the model is: on its GPU if CuPy is installed, on the CPU otherwise; "
                "available_devices says it outright"
            )
        elif isinstance(settings, MFACSettings) and _chooses_window_device(settings):
            found.append(
                f"{name}: keeps the gradient window on the first GPU of {', '.join(settings.devices)} that has room "
                "for it, and in host memory otherwise; grads_device says it outright"
            )
    return tuple(found)


def _in_words(settings: MFACSettings) -> str:
    if settings.num_recomputations == "auto":
        return "as many parts that none removes more than about a fifth of what is left"
    how = "shrink what is left by equal factors" if settings.recomputation_spacing == "geometric" else "remove as much"
    return f"{settings.num_recomputations} parts that {how}"


def _scheduled(schedule: Sequence[ScheduledStep]) -> str:
    first, last = schedule[0], schedule[-1]
    if first == last:
        return f"one pruning step at epoch {first.epoch:g} (step {first.step}), sparsity {first.sparsity:.4g}"
    return (
        f"{len(schedule)} pruning steps from epoch {first.epoch:g} (step {first.step}), sparsity "
        f"{first.sparsity:.4g}, to epoch {last.epoch:g} (step {last.step}), sparsity {last.sparsity:.4g}"
    )


def _chooses_window_device(settings: MFACSettings) -> bool:
    return settings.gradients_device == "auto" and settings.devices != ("cpu",)


_Named = tuple[str, PruningSettings]


def _named(pruning: Iterable[PruningSettings]) -> list[_Named]:
    """Return the modifiers that prune with a name for each, numbered where there are several."""
    pruning = list(pruning)
    return [
        (f"{name_in_messages(settings)} {number}" if len(pruning) > 1 else name_in_messages(settings), settings)
        for number, settings in enumerate(pruning, start=1)
    ]


def _parts(named: Iterable[_Named]) -> Iterator[_Named]:
    """Yield the modifiers, those with several final sparsities once for each."""
    for name, settings in named:
        parts = settings.by_final_sparsity()
        for part in parts:
            several = len(parts) > 1 and isinstance(part, GradualSettings)
            yield (f"{name} ({part.final_sparsity:g})" if several else name), part  # type: ignore[attr-defined]


def _modifier_plan(
    name: str, settings: PruningSettings, weights: Mapping[str, int], steps_per_epoch: int
) -> ModifierPlan:
    rows = tuple(_rows(name, settings, steps_per_epoch))
    plan = ModifierPlan(name, dict(weights), rows, (0, 0))
    if not isinstance(settings, MFACSettings):
        return plan
    reached = [0.0, *(step.sparsity for step in pruning_schedule(_begun(settings), steps_per_epoch)[:-1])]
    windows = [
        (num_gradients_at(settings.num_gradients, sparsity), plan.num_weights - round(plan.num_weights * sparsity))
        for sparsity in reached
    ]
    return plan._replace(window=max(windows, key=lambda window: window[0] * window[1]))


def _window_warnings(named: Iterable[_Named], steps_per_epoch: int | None, *, sampled: bool = False) -> Iterator[str]:
    for name, settings in named:
        if not isinstance(settings, MFACSettings) or (sampled and settings.gradient_origin == "auto"):
            continue
        parts = settings.by_final_sparsity()
        yield from _waiting_start(name, parts[0], steps_per_epoch)
        if steps_per_epoch is not None:
            for warn in (_not_full, _share_rows):
                yield from next(filter(None, (list(warn(name, part, steps_per_epoch)) for part in parts)), [])


def _waiting_start(name: str, settings: MFACSettings, steps_per_epoch: int | None) -> Iterator[str]:
    first = _rows(name, settings, steps_per_epoch)[0]
    if first.num_gradients is not None and (first.step == 0 or first.epoch == 0):
        yield (
            f"{name}: the first pruning step is due at epoch {first.epoch:g}, before there is any gradient; with live "
            f"gradients it waits for its first window of {first.num_gradients} rows, at most until the next pruning "
            "step; start later or use a gradient sampler"
        )


def _not_full(name: str, settings: MFACSettings, steps_per_epoch: int) -> Iterator[str]:
    """Yield at most one sentence: about the first step whose window is not full."""
    short, rows, before = [], 0, 0
    for row, steps in _part_steps(name, settings, steps_per_epoch):
        wanted = row.num_gradients or 0
        # Rows outlive a pruning step: only the columns of newly pruned weights leave the window.
        rows = min(wanted, rows + steps[0] - before)
        if 0 < rows < wanted:
            short.append((row, rows))
        rows, before = min(wanted, rows + steps[-1] - steps[0]), steps[-1]
    if short:
        row, rows = short[0]
        more = f" (the first of {len(short)} such steps)" if len(short) > 1 else ""
        yield (
            f"{name}: the pruning step at epoch {row.epoch:g} (optimizer step {row.step}) falls due while its "
            f"gradient window has {rows} of {row.num_gradients} rows, and uses those{more}; start later, prune less "
            "often, lower num_grads or use a gradient sampler"
        )


def _share_rows(name: str, settings: MFACSettings, steps_per_epoch: int) -> Iterator[str]:
    """Yield at most one sentence: about the first pruning step whose parts do not have a window of rows each."""
    for row, steps in _part_steps(name, settings, steps_per_epoch):
        between = steps[1] - steps[0] if len(steps) > 1 else math.inf
        if between < (row.num_gradients or 0):
            yield (
                f"{name}: the {len(steps)} parts of the pruning step at epoch {row.epoch:g} (optimizer step {row.step})"
                f" share gradient samples: they are {between} optimizer steps apart, and a window has "
                f"{row.num_gradients} rows; start later, prune less often, lower num_recomputations or num_grads, or "
                "use a gradient sampler"
            )
            return


def _part_steps(
    name: str, settings: MFACSettings, steps_per_epoch: int
) -> Iterator[tuple[ScheduleRow, tuple[int, ...]]]:
    """Yield the pruning steps that draw on gradients of training, with the steps at which their parts are due."""
    reached, before = 0.0, None
    for row in _rows(name, settings, steps_per_epoch):
        step, sparsity = row.step or 0, reached if row.sparsity is None else row.sparsity
        if row.num_gradients is not None:
            parts = num_substeps(reached, sparsity, settings.num_recomputations)
            yield row, tuple(substep_due(step, before, part, parts, row.num_gradients) for part in range(parts))
        reached, before = sparsity, step


def _layers_in_one_pass(named: Iterable[_Named]) -> Iterator[str]:
    for name, settings in named:
        large = _large_step_within_layers(settings)
        if large is not None:
            yield (
                f"{name}: goes from sparsity {large[0]:.3g} to {large[1]:.3g} in one pass within each layer, which "
                f"most often is less accurate than global magnitude pruning; {_BETTER}, or prune in smaller steps"
            )


def _in_one_pass(named: Iterable[_Named]) -> Iterator[str]:
    for name, settings in named:
        if _is_within_layers_at_once(settings) and _large_step_within_layers(settings) is None:
            yield (
                f"{name}: gives each layer the same sparsity, and each pruning step one pass: the default of old "
                f"recipes, and not the most accurate; {_BETTER}"
            )


def _large_step_within_layers(settings: PruningSettings) -> tuple[float, float] | None:
    """Return the sparsities before and after the first large pruning step in one pass within layers, if any."""
    reached = 0.0
    for part in settings.by_final_sparsity() if _is_within_layers_at_once(settings) else ():
        for scheduled in pruning_schedule(_begun(part), _MANY_STEPS):
            if 1 - scheduled.sparsity < _LARGE_STEP * (1 - reached):
                return reached, scheduled.sparsity
            reached = scheduled.sparsity
        reached = 0.0
    return None


def _is_within_layers_at_once(settings: PruningSettings) -> bool:
    """Return whether each layer has the same sparsity, and each pruning step one Fisher."""
    if not isinstance(settings, MFACSettings) or settings.scope == "global" or settings.num_recomputations != 1:
        return False
    # of N:M each group of inputs has its share whatever the scope
    return ":" not in str(settings.mask_type) and not _names_one_weight(settings)


def _names_one_weight(settings: PruningSettings) -> bool:
    return len(settings.params) == 1 and not settings.params[0].startswith(("__", "re:"))


def _end_of_training(settings: Iterable[Settings]) -> tuple[float, str]:
    """Return the epoch at which training ends, and what says so."""
    ends = [each.end_epoch for each in settings if isinstance(each, EpochRange)]
    return (max(ends), " (EpochRangeModifier)") if ends else (math.inf, "")


def _ends_too_late(named: Iterable[_Named], end_of_training: tuple[float, str]) -> Iterator[str]:
    end, source = end_of_training
    for name, settings in named:
        if settings.end_epoch <= end or isinstance(settings, ConstantSettings):
            continue
        what = "its last compressed phase" if isinstance(settings, ACDCSettings) else _final_sparsity(settings)
        yield (
            f"{name}: {what} is not reached, because its end_epoch {settings.end_epoch:g} lies after the end of "
            f"training at epoch {end:g}{source}; train longer or end pruning earlier"
        )


def _begins_too_late(settings: Iterable[Settings], end_of_training: tuple[float, str]) -> Iterator[str]:
    end, source = end_of_training
    for each in settings:
        if not isinstance(each, PruningSettings | EpochRange) and each.start_epoch >= end:
            yield (
                f"{name_in_messages(each)}: nothing happens, because its start_epoch {each.start_epoch:g} lies at or "
                f"after the end of training at epoch {end:g}{source}; train longer or begin earlier"
            )


def _cut_short(settings: Iterable[Settings], epochs: float | None) -> Iterator[str]:
    wanted, source = _end_of_training(settings)
    if epochs is not None and source and epochs < wanted:
        yield f"training ends at epoch {epochs:g}, and the recipe is for training to epoch {wanted:g}{source}"


def _same_learning_rate(settings: Iterable[Settings]) -> Iterator[str]:
    rates = [
        each for each in settings if isinstance(each, SetLearningRate | LearningRateFunction | LearningRateSchedule)
    ]
    for one, other in combinations(rates, 2):
        first, second = sorted((one, other), key=lambda each: each.start_epoch)
        groups = [getattr(each, "param_groups", None) for each in (first, second)]
        apart = None not in groups and not set(groups[0] or ()) & set(groups[1] or ())
        end = first.start_epoch if isinstance(first, SetLearningRate) else first.end_epoch
        if first.start_epoch < second.start_epoch < end and not apart:
            yield (
                f"{name_in_messages(second)} sets the learning rate at epoch {second.start_epoch:g}, while "
                f"{name_in_messages(first)} moves it from epoch {first.start_epoch:g} to {end:g}: at each step the one "
                "that begins later is set last, and once it is done the other goes on; let one end before the other "
                "begins"
            )


def _pruned_while_frozen(
    scheduled: Iterable[tuple[PruningSettings, ModifierPlan]],
    trainable: Sequence[tuple[TrainableParams, Collection[str]]],
) -> Iterator[str]:
    for pruning, plan in scheduled:
        for freezing, names in trainable:
            shared = [name for name in plan.weights if name in names]
            at_once = pruning.start_epoch < freezing.end_epoch and freezing.start_epoch <= pruning.end_epoch
            if shared and at_once and not freezing.trainable and not isinstance(pruning, ConstantSettings):
                yield (
                    f"{plan.modifier} prunes {join_names(shared, _NAMED)} while {name_in_messages(freezing)} freezes "
                    "training there: pruning steps zero and move weights that are frozen too; let pruning end before, "
                    "or take them out of params"
                )


def _final_sparsity(settings: PruningSettings) -> str:
    finals = [part.final_sparsity for part in settings.by_final_sparsity() if isinstance(part, GradualSettings)]
    return f"final_sparsity {', '.join(f'{final:g}' for final in finals)}"


def _same_params(named: Iterable[_Named]) -> Iterator[str]:
    for (first, one), (second, other) in combinations(named, 2):
        if one.exclude != other.exclude:  # what is left of the same params then is known with a model only
            continue
        theirs = _all_params(other)
        shared = [name for name in _all_params(one) if name in theirs]
        if shared and _at_the_same_time(one, other):
            yield (
                f"{first} and {second} prune the same params ({', '.join(shared)}); give each weight to one modifier"
            )


def _same_weights(scheduled: Iterable[tuple[str, PruningSettings, Collection[str]]]) -> Iterator[str]:
    for (first, one, weights), (second, other, theirs) in combinations(scheduled, 2):
        shared = [name for name in weights if name in theirs]
        if shared and _at_the_same_time(one, other):
            yield (
                f"{first} and {second} prune the same parameters ({join_names(shared, _NAMED)}), so "
                "that more is pruned than either says; give each weight to one modifier"
            )


def _all_params(settings: PruningSettings) -> list[str]:
    return [name for part in settings.by_final_sparsity() for name in part.params]


def _at_the_same_time(one: PruningSettings, other: PruningSettings) -> bool:
    """Return whether two modifiers overlap in time; the one may begin when the other ends."""
    first, second = sorted([(one.start_epoch, one.end_epoch), (other.start_epoch, other.end_epoch)])
    return second[0] < first[1] or first == second


def _rows(name: str, settings: PruningSettings, steps_per_epoch: int | None) -> list[ScheduleRow]:
    """Return the pruning steps of settings with one final sparsity."""
    if isinstance(settings, ConstantSettings):
        return []
    rows, reached = [], 0.0
    timeline = _timeline(_begun(settings), steps_per_epoch)
    for number, (epoch, step, sparsity) in enumerate(timeline, start=1):
        window = None
        if isinstance(settings, MFACSettings) and sparsity > reached:
            window = num_gradients_at(settings.num_gradients, reached)
        unknown = getattr(settings, "initial_sparsity", None) == FROM_PARAM and number < len(timeline)
        rows.append(ScheduleRow(name, epoch, step, None if unknown else sparsity, window))
        reached = sparsity
    return rows


def _begun(settings: PruningSettings) -> PruningSettings:
    """Return the settings with an initial sparsity of 0 where it is that of the weights."""
    if isinstance(settings, GradualSettings) and settings.initial_sparsity == FROM_PARAM:
        return replace(settings, initial_sparsity=0.0)
    return settings


def _timeline(settings: PruningSettings, steps_per_epoch: int | None) -> list[tuple[float, int | None, float]]:
    """Return epoch, step and sparsity of every pruning step."""
    if steps_per_epoch is not None:
        return [
            (scheduled.epoch, scheduled.step, scheduled.sparsity)
            for scheduled in pruning_schedule(settings, steps_per_epoch)
        ]
    if not isinstance(settings, GradualSettings):
        # Phases do not depend on the steps per epoch, as long as there are enough of them.
        return [(scheduled.epoch, None, scheduled.sparsity) for scheduled in pruning_schedule(settings, _MANY_STEPS)]
    duration = settings.end_epoch - settings.start_epoch
    return [
        (
            epoch,
            None,
            sparsity_at(
                (epoch - settings.start_epoch) / duration if duration else 1.0,
                initial=float(settings.initial_sparsity),
                final=float(settings.final_sparsity),  # type: ignore[arg-type]  # one number per part
                interpolation=settings.interpolation,
            ),
        )
        for epoch in pruning_epochs(settings)
    ]
