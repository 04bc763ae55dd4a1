"""The states of one run on several ranks: their files, which rank loads which, and several as one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mfac_core.pruners.saved_states import combined
from mfac_core.state_checks import check_keys, checked_integer, refuse
from mfac_core.weight_names import join_names

__all__ = ["combined_runs", "file_of_rank", "share_of", "without_windows"]


def file_of_rank(path: str | os.PathLike[str], rank: int, size: int) -> str:
    """Return the file of one of several ranks: that of rank 0 has the path itself, the others are beside it.

    Example:
        >>> file_of_rank("checkpoint.pt", 0, 8), file_of_rank("checkpoint.pt", 3, 8)
        ('checkpoint.pt', 'checkpoint.pt.rank-3-of-8')
    """
    return f"{os.fspath(path)}.rank-{rank}-of-{size}" if rank else os.fspath(path)


def share_of(rank: int, size: int, num_states: int) -> range:
    """Return which of several saved states a rank loads: about those whose columns it owns; each rank others."""
    first, stop = (-(-each * num_states // size) for each in (rank, rank + 1))
    return range(first, stop)


def combined_runs(states: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return one state from those that several ranks have saved at the same step: it has the windows of all.

    A single state, and what is no state at all, is returned as it is.

    Raises:
        ValueError: If a state is broken, or they are not of the same run and step.
    """
    if not isinstance(states, list | tuple) or not states:
        return states  # type: ignore[return-value]  # checked by the caller
    for state in states:
        check_keys("a run", state, ("step", "prunings"))
        if not isinstance(state["prunings"], list | tuple):
            refuse("prunings", state["prunings"], "a list with the state of each pruning modifier")
    of_prunings = [state["prunings"] for state in states]
    steps = sorted({checked_integer("step", state["step"]) for state in states})
    if len(steps) > 1 or len({len(each) for each in of_prunings}) > 1:
        raise ValueError(
            f"the states of several ranks are not from the same run and step (step {join_names(map(str, steps))}); "
            "load the states that all ranks have saved at one step"
        )
    return {**states[0], "prunings": [combined(each) for each in zip(*of_prunings, strict=True)]}


def without_windows(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state without gradient windows; a broken one stays broken, which loading it finds."""
    prunings = state.get("prunings")
    if not isinstance(prunings, list | tuple):
        return dict(state)
    kept = [{**each, "window": None} if isinstance(each, Mapping) and "window" in each else each for each in prunings]
    return {**state, "prunings": kept}
