"""How the saved state of a pruner differs from the run that it is loaded into: other weights, another schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.state_checks import check_keys
from mfac_core.weight_names import join_names

__all__ = ["ScheduleTable", "combined", "other_schedule", "other_weights", "refuse_other_run", "schedule_table"]

ScheduleTable = npt.NDArray[Any]


def refuse_other_run(differences: Sequence[str]) -> NoReturn:
    """Refuse a state that differs from this run."""
    raise ValueError(
        f"the state belongs to another recipe or model: {'; '.join(differences)}. "
        "Resume with the recipe, the model and the steps_per_epoch that it was saved with"
    )


def other_weights(masks: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return how the weights that a state has masks for differ from those in scope."""
    differences = []
    lacking = [name for name in shapes if name not in masks]
    if lacking:
        differences.append(f"it has no mask for {join_names(lacking)}")
    unknown = [str(name) for name in masks if name not in shapes]
    if unknown:
        differences.append(f"it has masks for {join_names(unknown)}, which this run does not prune")
    reshaped = [name for name, shape in shapes.items() if name in masks and np.shape(masks[name]) != shape]
    if reshaped:
        name = reshaped[0]
        differences.append(f"its {name} has shape {np.shape(masks[name])}, but {shapes[name]} in this run")
    return differences


def combined(states: Any) -> Any:
    """Return one state from those that several ranks have saved at the same step: it has the windows of all.

    A single state, and what is no state at all, is returned as it is.
    """
    if not isinstance(states, list | tuple) or not states:
        return states
    for state in states:
        check_keys("a pruner", state, ("pruning_steps_done", "masks"))
        check_keys("a pruner (its masks)", state["masks"], ())
    first = states[0]
    windows: list[Any] = []
    for state in states:
        if not _is_of_the_same_step(first, state):
            raise ValueError(
                "the states of several ranks are not from the same step: their masks or the pruning steps done differ; "
                "load the states that all ranks have saved at one step"
            )
        window = state.get("window")
        windows += window if isinstance(window, list | tuple) else [] if window is None else [window]
    return {**first, "window": windows or None} if "window" in first else first


def _is_of_the_same_step(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ("pruning_steps_done", "parts_done", "refused_rows")
    return (
        all(np.array_equal(one.get(key, 0), other.get(key, 0)) for key in keys)
        and one["masks"].keys() == other["masks"].keys()
        and all(np.array_equal(mask, other["masks"][name]) for name, mask in one["masks"].items())
    )


def schedule_table(schedule: Sequence[ScheduledStep]) -> ScheduleTable:
    """Return steps and sparsities in two columns, as states hold them."""
    return np.array([(scheduled.step, scheduled.sparsity) for scheduled in schedule], np.float64)


def other_schedule(saved: ScheduleTable, scheduled: ScheduleTable) -> str:
    """Return the first difference between two tables of pruning steps that are not the same."""
    numbered = enumerate(zip_longest(saved.tolist(), scheduled.tolist()), start=1)
    number, (then, now) = next(each for each in numbered if each[1][0] != each[1][1])
    return (
        f"it has another pruning schedule (pruning step {number} is {_described(then)}, but in this run "
        f"{_described(now)})"
    )


def _described(scheduled: Sequence[float] | None) -> str:
    return "missing" if scheduled is None else f"at step {scheduled[0]:g} to sparsity {scheduled[1]:g}"
