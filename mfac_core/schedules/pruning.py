"""When to prune and how much: pure functions from epochs and optimizer steps to sparsity.

A *step* counts completed optimizer steps: step 0 is before the first, step ``round(epoch * steps_per_epoch)``
is the moment at which ``epoch`` epochs are done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from mfac_core.errors import SettingError
from mfac_core.settings.checks import Interpolation
from mfac_core.settings.pruning import FROM_PARAM, ACDCSettings, ConstantSettings, GradualSettings, PruningSettings

__all__ = [
    "MANY_STEPS",
    "ScheduledStep",
    "interpolate",
    "num_gradients_at",
    "pruning_epochs",
    "pruning_schedule",
    "sparsity_at",
]

MANY_STEPS = 1_000_000
"""So many steps per epoch that no two pruning steps coincide: for schedules whose steps per epoch are unknown."""

_MAX_PRUNING_STEPS = 1_000_000
# fraction of `update_frequency`: a step closer than this before `end_epoch` is rounding noise of the step at the end
_NOISE = 1e-6


class ScheduledStep(NamedTuple):
    """One pruning step of a schedule.

    Attributes:
        step: Completed optimizer steps at which it is due.
        epoch: Its epoch, as the settings name it.
        sparsity: Pruned fraction of the weights in scope once it is done.
    """

    step: int
    epoch: float
    sparsity: float


def interpolate(fraction: float, kind: Interpolation) -> float:
    """Return the shape of a sparsity curve: the fraction of the increase reached after a ``fraction`` of the time.

    Args:
        fraction: Passed fraction of the time from first to last pruning step; clamped into ``[0, 1]``.
        kind: ``linear`` (x), ``cubic`` (1 - (1 - x)^3) or ``inverse_cubic`` (1 - (1 - x)^(1/3)).

    Returns:
        A number in ``[0, 1]``: exactly 0.0 at the start and exactly 1.0 at the end.

    Example:
        >>> interpolate(0.5, "linear"), interpolate(0.5, "cubic")
        (0.5, 0.875)
    """
    passed = min(max(fraction, 0.0), 1.0)
    left = 1.0 - passed
    match kind:
        case "linear":
            return float(passed)
        case "cubic":
            return 1.0 - left * left * left
        case "inverse_cubic":
            return float(1.0 - left ** (1.0 / 3.0))
    raise SettingError("interpolation", f"{kind!r} is not one of linear, cubic, inverse_cubic")


def sparsity_at(fraction: float, *, initial: float, final: float, interpolation: Interpolation) -> float:
    """Return the sparsity when a ``fraction`` of the time from first to last pruning step has passed.

    It never falls as ``fraction`` grows, and is exactly ``initial`` and ``final`` at the two ends.

    Example:
        >>> sparsity_at(0.5, initial=0.1, final=0.9, interpolation="linear")
        0.5
    """
    if fraction <= 0.0:
        return initial
    if fraction >= 1.0:
        return final
    return min(final, initial + (final - initial) * interpolate(fraction, interpolation))


def checked_steps_per_epoch(value: object) -> int:
    """Return the optimizer steps per epoch, or refuse a value that is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(
            "steps_per_epoch", f"{value!r} must be a positive integer, such as len(loader) for one step per batch"
        )
    return value


def pruning_schedule(
    settings: PruningSettings, steps_per_epoch: int, *, sparsities: tuple[float, float] | None = None
) -> tuple[ScheduledStep, ...]:
    """Return the pruning steps of a whole run as exact optimizer steps, in ascending order.

    A pruning step of an epoch is due at the optimizer step ``round(epoch * steps_per_epoch)``. Of epochs that fall on
    the same optimizer step only one counts: the first, except that the last of a run, and the latest phase of AC/DC,
    win.

    * Gradual pruning: the step of ``end_epoch`` is always among them and has exactly the final sparsity. Sparsity never
      falls.
    * AC/DC: a phase starts every ``update_frequency`` from ``start_epoch``: a decompressed one (sparsity 0) first,
      then a compressed one, and so on. A decompressed phase starts only if a compressed one follows it, so that the
      run ends compressed, and the step of ``end_epoch`` is always a compressed one.
    * Constant: masks are taken at ``start_epoch`` and, unless ``end_epoch`` is infinite, released there (sparsity 0).

    Args:
        settings: Start, end, frequency and sparsities of the run.
        steps_per_epoch: Optimizer steps per epoch, at least 1.
        sparsities: First and last sparsity, measured from the weights, in place of those of the settings; ``None``
            if there are no weights yet: then ``__FROM_PARAM__`` and the sparsity that ``Constant`` keeps are 0.

    Returns:
        The pruning steps.

    Raises:
        SettingError: If ``steps_per_epoch`` is not a positive integer, or the settings ask for more than a million
            pruning steps, or for more than one final sparsity.
        TypeError: If the settings are of no kind that has pruning steps.

    Example:
        >>> settings = GradualSettings(final_sparsity=0.8, start_epoch=1.0, end_epoch=2.0, update_frequency=0.5)
        >>> [tuple(scheduled) for scheduled in pruning_schedule(settings, steps_per_epoch=10)]
        [(10, 1.0, 0.0), (15, 1.5, 0.7000000000000001), (20, 2.0, 0.8)]
        >>> settings = ACDCSettings(compression_sparsity=0.9, end_epoch=5.0)
        >>> [tuple(scheduled) for scheduled in pruning_schedule(settings, steps_per_epoch=10)]
        [(0, 0.0, 0.0), (10, 1.0, 0.9), (20, 2.0, 0.0), (30, 3.0, 0.9), (50, 5.0, 0.9)]
    """
    checked_steps_per_epoch(steps_per_epoch)
    match settings:
        case GradualSettings():
            return _gradual(settings, steps_per_epoch, sparsities)
        case ACDCSettings():
            epochs = pruning_epochs(settings)
            scheduled = [
                (epoch, settings.compression_sparsity if k % 2 else 0.0) for k, epoch in enumerate(epochs[:-1])
            ]
            return _last_of_each_step([*scheduled, (epochs[-1], settings.compression_sparsity)], steps_per_epoch)
        case ConstantSettings():
            held = 0.0 if sparsities is None else sparsities[0]
            scheduled = [(epoch, 0.0 if epoch == settings.end_epoch else held) for epoch in pruning_epochs(settings)]
            return _last_of_each_step(scheduled, steps_per_epoch)
    raise TypeError(f"{type(settings).__name__} has no schedule of pruning steps")


def pruning_epochs(settings: PruningSettings) -> tuple[float, ...]:
    """Return the epochs at which pruning steps are due: ``start_epoch``, every ``update_frequency``, and ``end_epoch``.

    There is one epoch only if the two are equal, or the end is infinite. More than a million are refused.

    Example:
        >>> pruning_epochs(GradualSettings(final_sparsity=0.8, start_epoch=1.0, end_epoch=4.0, update_frequency=2.0))
        (1.0, 3.0, 4.0)
    """
    start, end = float(settings.start_epoch), float(settings.end_epoch)
    if end == math.inf:
        return (start,)
    if start == end:
        return (end,)
    if not isinstance(settings, GradualSettings | ACDCSettings):
        return (start, end)
    frequency = settings.update_frequency
    periods = (end - start) / frequency
    if periods > _MAX_PRUNING_STEPS:
        raise SettingError(
            "update_frequency",
            f"{frequency} epochs makes more than {_MAX_PRUNING_STEPS} pruning steps from epoch {start} to {end}; "
            "write a larger number of epochs between two pruning steps",
        )
    before_end = max(1, math.ceil(periods - _NOISE))
    if isinstance(settings, ACDCSettings) and before_end % 2 and before_end > 1:
        before_end -= 1
    return (*(start + k * frequency for k in range(before_end)), end)


def num_gradients_at(num_gradients: int | Mapping[float, int], sparsity: float) -> int:
    """Return how many rows the gradient window has once a sparsity is reached.

    The comparison is exact: a layer of 1001 weights that was pruned "to 0.5" has reached 500/1001 = 0.4995, which is
    below the threshold 0.5. Callers that mean the scheduled sparsity pass the scheduled one.

    Args:
        num_gradients: Sparsity threshold -> rows that apply from that sparsity, with the key 0.0; an integer applies
            at every sparsity.
        sparsity: Sparsity reached, in ``[0, 1]``.

    Returns:
        The rows of the largest threshold that is not above ``sparsity``.

    Example:
        >>> num_gradients_at({0.0: 256, 0.5: 512}, 0.49), num_gradients_at({0.0: 256, 0.5: 512}, 0.5)
        (256, 512)
    """
    if isinstance(num_gradients, int):
        return num_gradients
    reached = [threshold for threshold in num_gradients if threshold <= sparsity]
    if not reached:
        raise SettingError(
            "num_gradients", f"{dict(num_gradients)} has no threshold at or below sparsity {sparsity}; add the key 0.0"
        )
    return num_gradients[max(reached)]


def _gradual(
    settings: GradualSettings, steps_per_epoch: int, sparsities: tuple[float, float] | None
) -> tuple[ScheduledStep, ...]:
    if sparsities is None:
        initial = 0.0 if settings.initial_sparsity == FROM_PARAM else float(settings.initial_sparsity)
        sparsities = (initial, one_final_sparsity(settings))
    first = round(settings.start_epoch * steps_per_epoch)
    last = round(settings.end_epoch * steps_per_epoch)
    *before_end, end = pruning_epochs(settings)
    epochs: dict[int, float] = {}
    for epoch in before_end:
        epochs.setdefault(round(epoch * steps_per_epoch), epoch)
    epochs.pop(last, None)
    between = [
        ScheduledStep(
            step,
            epoch,
            sparsity_at(
                (step - first) / (last - first),
                initial=sparsities[0],
                final=sparsities[1],
                interpolation=settings.interpolation,
            ),
        )
        for step, epoch in epochs.items()
    ]
    return (*between, ScheduledStep(last, end, sparsities[1]))


def one_final_sparsity(settings: GradualSettings) -> float:
    if isinstance(settings.final_sparsity, Mapping):
        raise SettingError(
            "final_sparsity",
            f"{dict(settings.final_sparsity)} describes one run per entry; "
            "take each of settings.by_final_sparsity() separately",
        )
    return settings.final_sparsity


def _last_of_each_step(scheduled: list[tuple[float, float]], steps_per_epoch: int) -> tuple[ScheduledStep, ...]:
    by_step = {round(epoch * steps_per_epoch): (epoch, sparsity) for epoch, sparsity in scheduled}
    return tuple(ScheduledStep(step, epoch, sparsity) for step, (epoch, sparsity) in by_step.items())
