"""The state files of several ranks, read by any number of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from mfac_core.files import PREVIOUS
from mfac_core.ranks import Ranks
from mfac_core.session.rank_states import combined_runs, file_of_rank, share_of, without_windows
from mfac_keras.state_file import SavedState, read_states

__all__ = ["read_states_of_ranks"]


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
    share = share_of(ranks.rank, ranks.size, len(files))
    if len(share) == 1:
        yield from read_states(files[share[0]], check)
    else:
        yield from _by_step(chain.from_iterable(read_states(files[number], check) for number in share))
    for number, file in enumerate(files):
        if number not in share:
            for each in read_states(file, check):
                yield each._replace(state=without_windows(each.state))


def _files(path: Path) -> list[str]:
    """Return the files that exist, in the order of the ranks that have saved them."""
    names = {each.name.removesuffix(PREVIOUS) for each in path.parent.iterdir()} if path.parent.is_dir() else set()
    matches = (re.fullmatch(rf"{re.escape(path.name)}\.rank-(\d+)-of-(\d+)", name) for name in names)
    saved_by = sorted((int(match[1]), int(match[2])) for match in matches if match)
    return [file_of_rank(path, rank, size) for rank, size in [(0, 1)] * (path.name in names) + saved_by]


def _by_step(saved: Iterable[SavedState]) -> Iterator[SavedState]:
    """Yield the states of each step as one, the latest first."""
    by_step: dict[tuple[int, str], list[SavedState]] = {}
    for each in saved:
        # a file that an earlier run with other ranks has left may be of the same step, but not of the same weights
        weights = json.dumps(each.state.get("fingerprints"), sort_keys=True)
        by_step.setdefault((int(each.state["step"]), weights), []).append(each)
    for _, group in sorted(by_step.items(), reverse=True):
        yield group[0]._replace(state=combined_runs([each.state for each in group]))
