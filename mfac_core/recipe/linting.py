"""Warnings about settings that may not do what is intended, and notes on what is decided later."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice

from mfac_core.recipe.formats import Settings
from mfac_core.recipe.loading import Recipe
from mfac_core.recipe.naming import display_name, named_groups, numbered_names
from mfac_core.schedules.pruning import MANY_STEPS, pruning_schedule
from mfac_core.schedules.rows import schedule_rows, substeps_while_training
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

__all__ = ["NO_PRUNING", "lint", "lint_one_shot", "model_notes", "model_warnings", "notes"]

NO_PRUNING = "the recipe has no pruning modifier: nothing is pruned"

_LARGE_STEP = 0.5
"""A pruning step is large if it keeps less than this fraction of the weights that it finds."""

_BETTER = "write global_sparsity: true and num_recomputations: auto (and update: joint, damp: auto)"

_Named = tuple[str, PruningSettings]
"""A modifier, or one of its groups with a final sparsity of their own, with its name."""


def lint(recipe: Recipe, steps_per_epoch: int | None = None, *, sampled: bool = False) -> tuple[str, ...]:
    """Return warnings about settings of a recipe that may not do what is intended.

    Args:
        recipe: A loaded recipe.
        steps_per_epoch: Optimizer steps per epoch; without it, gradient windows are not checked.
        sampled: Whether gradient samples are drawn at each pruning step, so that windows are always full; otherwise
            they come from training, one row per optimizer step.

    Returns:
        One sentence per warning.

    Raises:
        SettingError: If ``steps_per_epoch`` is not a positive integer.
    """
    modifiers = numbered_names(recipe.pruning)
    end = _end_of_training(recipe.modifiers)
    return (
        *(() if modifiers else (NO_PRUNING,)),
        *(() if sampled else _about_windows(modifiers, steps_per_epoch)),
        *_ends_too_late(modifiers, end),
        *_begins_too_late(recipe.modifiers, end),
        *_layers_in_one_pass(named_groups(recipe.pruning)),
        *_same_params(modifiers),
        *_same_learning_rate(recipe.modifiers),
    )


def model_warnings(
    settings: Sequence[Settings],
    weights: Sequence[Mapping[str, int]],
    steps_per_epoch: int,
    *,
    epochs: float | None = None,
    sampled: bool = False,
    trainable: Sequence[tuple[TrainableParams, Collection[str]]] = (),
) -> tuple[str, ...]:
    """Return warnings about settings that meet a model; arguments as in :func:`mfac_core.session.plan.plan_model`."""
    pruning = [each for each in settings if isinstance(each, PruningSettings)]
    modifiers = numbered_names(pruning)
    matched = list(zip(named_groups(pruning), weights, strict=True))
    end = (epochs, "") if epochs is not None else _end_of_training(settings)
    return (
        *(() if modifiers else (NO_PRUNING,)),
        *(f"{name}: no weights match params; nothing is pruned" for (name, _), names in matched if not names),
        *_about_windows(modifiers, steps_per_epoch, sampled=sampled),
        *_ends_too_late(modifiers, end),
        *_begins_too_late(settings, end),
        *_cut_short(settings, epochs),
        *_same_learning_rate(settings),
        *_layers_in_one_pass(_of_several_layers(matched)),
        *_pruned_while_frozen(matched, trainable),
        *_same_weights(matched),
    )


def lint_one_shot(
    settings: Sequence[tuple[PruningSettings, PruningSettings]], weights: Sequence[Collection[str]]
) -> tuple[str, ...]:
    """Return warnings about modifiers that prune in one shot.

    Args:
        settings: For each modifier, the settings of its gradual run, which tell whether two of them prune at the same
            time, and those of the single step, from :func:`mfac_core.schedules.one_shot.one_shot_in_order`.
        weights: Names of the parameters that each of them prunes.

    Returns:
        One sentence per warning.
    """
    gradual = numbered_names(gradual for gradual, _ in settings)
    at_once = numbered_names(at_once for _, at_once in settings)
    return (
        *_layers_in_one_pass(_of_several_layers(zip(at_once, weights, strict=True))),
        *_same_weights(zip(gradual, weights, strict=True)),
    )


def notes(recipe: Recipe) -> tuple[str, ...]:
    """Return what a recipe leaves open until it is attached to a model.

    Args:
        recipe: A loaded recipe.

    Returns:
        One sentence per note.
    """
    return tuple(note for name, settings in numbered_names(recipe.pruning) for note in _notes_on(name, settings))


def model_notes(settings: Sequence[Settings], weights: Sequence[Collection[str]]) -> tuple[str, ...]:
    """Return notes on modifiers that meet a model, with the parameters that each group of weights matches."""
    groups = named_groups(each for each in settings if isinstance(each, PruningSettings))
    return tuple(
        note for named in _of_several_layers(zip(groups, weights, strict=True)) for note in _one_pass_per_step(*named)
    )


def _notes_on(name: str, settings: PruningSettings) -> Iterator[str]:
    if isinstance(settings, ConstantSettings):
        until = "" if settings.end_epoch == math.inf else f" until epoch {settings.end_epoch:g}"
        yield f"{name}: keeps the zeros that exist at epoch {settings.start_epoch:g}{until}"
    if isinstance(settings, GradualSettings) and settings.initial_sparsity == FROM_PARAM:
        yield f"{name}: starts at the sparsity that the weights have when it is attached"
    yield from _one_pass_per_step(name, settings)
    if not isinstance(settings, MFACSettings):
        return
    if settings.num_recomputations != 1:
        yield (
            f"{name}: does each pruning step in {_substeps_in_words(settings)}, each with gradients of its own; "
            "without a gradient sampler, those of the optimizer steps before it"
        )
    if settings.devices == ("auto",):
        yield (
            f"{name}: computes on the model's device (for a Keras model on a GPU only if CuPy is installed, else on "
            "the CPU); set available_devices to choose"
        )
    elif settings.gradients_device == "auto" and settings.devices != ("cpu",):
        yield (
            f"{name}: keeps the gradient window on the first GPU of {', '.join(settings.devices)} that has room for "
            "it, and in host memory otherwise; set grads_device to choose"
        )


def _substeps_in_words(settings: MFACSettings) -> str:
    if settings.num_recomputations == "auto":
        return "as many sub-steps as are needed for none to remove more than about a fifth of what is left"
    if settings.recomputation_spacing == "geometric":
        return f"{settings.num_recomputations} sub-steps that shrink what is left by equal factors"
    return f"{settings.num_recomputations} sub-steps that remove equally many weights"


def _of_several_layers(matched: Iterable[tuple[_Named, Collection[str]]]) -> list[_Named]:
    return [named for named, weights in matched if len(weights) > 1]


def _about_windows(modifiers: Iterable[_Named], steps_per_epoch: int | None, *, sampled: bool = False) -> Iterator[str]:
    """Yield at most one warning of each kind per modifier, for any number of final sparsities."""
    for name, settings in modifiers:
        if not isinstance(settings, MFACSettings) or (sampled and settings.gradient_origin == "auto"):
            continue
        groups = settings.by_final_sparsity()
        yield from _waits_for_gradients(name, groups[0], steps_per_epoch)
        if steps_per_epoch is not None:
            for check in (_not_full, _share_rows):
                yield from islice((each for group in groups for each in check(name, group, steps_per_epoch)), 1)


def _waits_for_gradients(name: str, settings: MFACSettings, steps_per_epoch: int | None) -> Iterator[str]:
    first = schedule_rows(name, settings, steps_per_epoch)[0]
    if first.num_gradients is not None and (first.step == 0 or first.epoch == 0):
        yield (
            f"{name}: the first pruning step is due at epoch {first.epoch:g}, before there is any gradient; with live "
            f"gradients it waits for its first window of {first.num_gradients} gradient samples, at most until the "
            "next pruning step; start later or use a gradient sampler"
        )


def _not_full(name: str, settings: MFACSettings, steps_per_epoch: int) -> Iterator[str]:
    """Yield at most one warning: about the first pruning step whose window is not full."""
    short, rows, before = [], 0, 0
    for row, steps in substeps_while_training(settings, schedule_rows(name, settings, steps_per_epoch)):
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
            f"gradient window has {rows} of {row.num_gradients} gradient samples, and uses those{more}; start later, "
            "prune less often, lower num_grads or use a gradient sampler"
        )


def _share_rows(name: str, settings: MFACSettings, steps_per_epoch: int) -> Iterator[str]:
    """Yield a warning about each pruning step whose sub-steps do not have a window of rows each."""
    for row, steps in substeps_while_training(settings, schedule_rows(name, settings, steps_per_epoch)):
        apart = steps[1] - steps[0] if len(steps) > 1 else math.inf
        if apart < (row.num_gradients or 0):
            yield (
                f"{name}: the {len(steps)} sub-steps of the pruning step at epoch {row.epoch:g} (optimizer step "
                f"{row.step}) share gradient samples: they are {apart} optimizer steps apart, and a window has "
                f"{row.num_gradients}; start later, prune less often, lower num_recomputations or num_grads, or "
                "use a gradient sampler"
            )


def _layers_in_one_pass(groups: Iterable[_Named]) -> Iterator[str]:
    for name, settings in groups:
        large = _large_step_within_layers(settings)
        if large is not None:
            yield (
                f"{name}: goes from sparsity {large[0]:.3g} to {large[1]:.3g} in one pass within each layer, which is "
                f"usually less accurate than global magnitude pruning; {_BETTER}, or prune in smaller steps"
            )


def _one_pass_per_step(name: str, settings: PruningSettings) -> Iterator[str]:
    if _prunes_layers_alike(settings) and _large_step_within_layers(settings) is None:
        yield (
            f"{name}: prunes each layer to the same sparsity, and does each pruning step in one pass: the default of "
            f"older recipes, and not the most accurate; {_BETTER}"
        )


def _large_step_within_layers(settings: PruningSettings) -> tuple[float, float] | None:
    """Return the sparsities before and after the first large pruning step in one pass within layers, if any."""
    for group in settings.by_final_sparsity() if _prunes_layers_alike(settings) else ():
        reached = 0.0
        for scheduled in pruning_schedule(group, MANY_STEPS):
            if 1 - scheduled.sparsity < _LARGE_STEP * (1 - reached):
                return reached, scheduled.sparsity
            reached = scheduled.sparsity
    return None


def _prunes_layers_alike(settings: PruningSettings) -> bool:
    """Return whether M-FAC prunes each layer to the same sparsity, by one Fisher per pruning step."""
    if not isinstance(settings, MFACSettings) or settings.scope == "global" or settings.num_recomputations != 1:
        return False
    names_one_weight = len(settings.params) == 1 and not settings.params[0].startswith(("__", "re:"))
    # N:M prunes the same share of each group of inputs, for any scope
    return ":" not in str(settings.mask_type) and not names_one_weight


def _end_of_training(settings: Iterable[Settings]) -> tuple[float, str]:
    """Return the epoch at which training ends, and the source of this number for messages."""
    ends = [each.end_epoch for each in settings if isinstance(each, EpochRange)]
    return (max(ends), " (EpochRangeModifier)") if ends else (math.inf, "")


def _ends_too_late(modifiers: Iterable[_Named], end_of_training: tuple[float, str]) -> Iterator[str]:
    end, source = end_of_training
    for name, settings in modifiers:
        if settings.end_epoch <= end or isinstance(settings, ConstantSettings):
            continue
        goal = "its last compressed phase" if isinstance(settings, ACDCSettings) else _final_sparsity(settings)
        yield (
            f"{name}: {goal} is not reached, because its end_epoch {settings.end_epoch:g} lies after the end of "
            f"training at epoch {end:g}{source}; train longer or end pruning earlier"
        )


def _final_sparsity(settings: PruningSettings) -> str:
    finals = [each.final_sparsity for each in settings.by_final_sparsity() if isinstance(each, GradualSettings)]
    return f"final_sparsity {', '.join(f'{final:g}' for final in finals)}"


def _begins_too_late(settings: Iterable[Settings], end_of_training: tuple[float, str]) -> Iterator[str]:
    end, source = end_of_training
    for each in settings:
        if not isinstance(each, PruningSettings | EpochRange) and each.start_epoch >= end:
            yield (
                f"{display_name(each)}: nothing happens, because its start_epoch {each.start_epoch:g} lies at or "
                f"after the end of training at epoch {end:g}{source}; train longer or begin earlier"
            )


def _cut_short(settings: Iterable[Settings], epochs: float | None) -> Iterator[str]:
    wanted, source = _end_of_training(settings)
    if epochs is not None and source and epochs < wanted:
        yield f"training ends at epoch {epochs:g}, but the recipe trains until epoch {wanted:g}{source}"


def _same_learning_rate(settings: Iterable[Settings]) -> Iterator[str]:
    rates = [
        each for each in settings if isinstance(each, SetLearningRate | LearningRateFunction | LearningRateSchedule)
    ]
    for one, other in combinations(rates, 2):
        first, second = sorted((one, other), key=lambda each: each.start_epoch)
        groups = [getattr(each, "param_groups", None) for each in (first, second)]
        are_apart = None not in groups and not set(groups[0] or ()) & set(groups[1] or ())
        end = first.start_epoch if isinstance(first, SetLearningRate) else first.end_epoch
        if first.start_epoch < second.start_epoch < end and not are_apart:
            yield (
                f"{display_name(second)} sets the learning rate at epoch {second.start_epoch:g}, while "
                f"{display_name(first)} moves it from epoch {first.start_epoch:g} to {end:g}: the one that begins "
                "later takes precedence until it ends, then the other continues; let one end before the other begins"
            )


def _pruned_while_frozen(
    matched: Iterable[tuple[_Named, Collection[str]]],
    trainable: Sequence[tuple[TrainableParams, Collection[str]]],
) -> Iterator[str]:
    for (name, pruning), weights in matched:
        for freezing, frozen in trainable:
            shared = [each for each in weights if each in frozen]
            overlap = pruning.start_epoch < freezing.end_epoch and freezing.start_epoch <= pruning.end_epoch
            if shared and overlap and not freezing.trainable and not isinstance(pruning, ConstantSettings):
                yield (
                    f"{name} prunes {join_names(shared, at_most=3)} while {display_name(freezing)} freezes them: "
                    "pruning steps change frozen weights too; end pruning before that, or remove them from params"
                )


def _same_params(modifiers: Iterable[_Named]) -> Iterator[str]:
    for (first, one), (second, other) in combinations(modifiers, 2):
        if one.exclude != other.exclude:  # which of the same params remain is known only with a model
            continue
        names = [name for group in other.by_final_sparsity() for name in group.params]
        shared = [name for group in one.by_final_sparsity() for name in group.params if name in names]
        if shared and _overlap(one, other):
            same = f"the same params ({', '.join(shared)})"
            yield _both_cover((first, one), (second, other), same, "; give each weight to one modifier")


def _same_weights(matched: Iterable[tuple[_Named, Collection[str]]]) -> Iterator[str]:
    for (one, weights), (other, names) in combinations(matched, 2):
        shared = [name for name in weights if name in names]
        if shared and _overlap(one[1], other[1]):
            same = f"the same parameters ({join_names(shared, at_most=3)})"
            effect = ", so more is pruned than either says; give each weight to one modifier"
            yield _both_cover(one, other, same, effect)


def _both_cover(one: _Named, other: _Named, same: str, effect: str) -> str:
    for name, settings in (one, other):
        if isinstance(settings, ConstantSettings):
            return (
                f"{one[0]} and {other[0]} cover {same} at the same time, and {name} only keeps zeros; let one start "
                "when the other ends, or give each weight to one modifier"
            )
    return f"{one[0]} and {other[0]} prune {same}{effect}"


def _overlap(one: PruningSettings, other: PruningSettings) -> bool:
    """Return whether two modifiers overlap in time; one may begin when the other ends."""
    first, second = sorted([(one.start_epoch, one.end_epoch), (other.start_epoch, other.end_epoch)])
    return second[0] < first[1] or first == second
