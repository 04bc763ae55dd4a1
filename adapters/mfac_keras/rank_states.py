"""The states of several ranks on disk: a file for each rank, read by any number of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mfac_core.files import PREVIOUS
from mfac_core.pruners.saved_states import combined
from mfac_core.ranks import Ranks
from mfac_keras.state_file import SavedState, read_states

__all__ = ["file_of_rank", "read_states_of_ranks"]

_OF_RANK = ".rank"


def file_of_rank(path: str | os.PathLike[str], rank: int) -> Path:
    """Return the file in which a rank saves its state: the path itself for the first.

    Example:
        >>> file_of_rank("pruning.npz", 0).name, file_of_rank("pruning.npz", 3).name
        ('pruning.npz', 'pruning.npz.rank3')
    """
    path = Path(path)
    return path.with_name(f"{path.name}{_OF_RANK}{rank}") if rank else path


def read_states_of_ranks(
    path: str | os.PathLike[str], check: Callable[[Any], object], ranks: Ranks
) -> Iterator[SavedState]:
    """Yield the states in the files of all ranks, the latest first, and those with a gradient window before others.

    Masks and progress are the same in all files of a step. Of the gradient window each file holds some columns: the
    ranks that read divide the files among them, so that none holds all of it.

    Args:
        path: The file of the first rank.
        check: As in :func:`read_states`.
        ranks: The ranks that read; the states may be of another number of ranks.

    Raises:
        ValueError: As :func:`read_states` does.
    """
    files = _files(Path(path))
    dealt = [file for saved_by, file in files.items() if saved_by % ranks.size == ranks.rank]
    if len(dealt) == 1:
        yield from read_states(dealt[0], check)
    else:
        yield from _by_step(chain.from_iterable(read_states(file, check) for file in dealt))
    for file in files.values():
        if file not in dealt:
            for each in read_states(file, check):
                yield each._replace(state=_without_windows(each.state))


def _files(path: Path) -> dict[int, Path]:
    """Return the files that exist, by the rank that has saved them, in order."""
    names = {each.name.removesuffix(PREVIOUS) for each in path.parent.iterdir()} if path.parent.is_dir() else set()
    beginning = f"{path.name}{_OF_RANK}"
    numbers = [name.removeprefix(beginning) for name in names if name.startswith(beginning)]
    saved_by = [0] * (path.name in names) + sorted(int(number) for number in numbers if number.isdecimal())
    return {rank: file_of_rank(path, rank) for rank in saved_by}


def _by_step(saved: Iterable[SavedState]) -> Iterator[SavedState]:
    """Yield the states of each step as one, the latest first."""
    by_step: dict[tuple[int, str], list[SavedState]] = {}
    for each in saved:
        # a file that an earlier run with more ranks has left may be of the same step, but not of the same weights
        weights = json.dumps(each.state.get("fingerprints"), sort_keys=True)
        by_step.setdefault((int(each.state["step"]), weights), []).append(each)
    for _, group in sorted(by_step.items(), reverse=True):
        yield group[0]._replace(state=_as_one([each.state for each in group]))


def _as_one(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of a step from those of some ranks, with the parts of the gradient window of all of them."""
    of_prunings = zip(*(state["prunings"] for state in states), strict=True)
    return {**states[0], "prunings": [combined(each) for each in of_prunings]}


def _without_windows(state: Mapping[str, Any]) -> dict[str, Any]:
    prunings = [{key: value for key, value in each.items() if key != "window"} for each in state["prunings"]]
    return {**state, "prunings": prunings}
