"""The state of a manager in files: one for each rank that saves, found again by any number of ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from mfac_core.files import PREVIOUS
from mfac_core.ranks import Ranks
from mfac_core.session.rank_states import file_of_rank, share_of, without_windows
from mfac_torch.rank_states import saver_of
from mfac_torch.tensor_files import read_tensors, write_tensors

__all__ = ["states_beside", "write_state"]

_logger = logging.getLogger("mfac_torch")


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any], *, keep_previous: bool = False) -> None:
    """Write a state into the file of the rank that it is of; no two ranks write the same file."""
    saver = saver_of(state)
    write_tensors(file_of_rank(path, saver.rank, saver.size), state, keep_previous=keep_previous)


def states_beside(path: str | os.PathLike[str], state: Mapping[str, Any], ranks: Ranks) -> list[Mapping[str, Any]]:
    """Return what this rank loads of a save: the state of rank 0, and its share of those of the other ranks.

    Each file is read by one rank, and all but one leave the gradient windows of rank 0 out. A file that is missing,
    damaged or of another save is left out: its columns of the windows are collected anew.

    Args:
        path: The file of rank 0.
        state: The state in it.
        ranks: The ranks that load.
    """
    saver = saver_of(state)
    share = share_of(ranks.rank, ranks.size, saver.size)
    found = (_of_same_save(file_of_rank(path, rank, saver.size), state, rank) for rank in share if rank != saver.rank)
    return [state if saver.rank in share else without_windows(state), *(each for each in found if each is not None)]


def _of_same_save(path: str, state: Mapping[str, Any], rank: int) -> Mapping[str, Any] | None:
    """Return the state of a rank that was saved with another one; None if there is none that is intact."""
    wanted = saver_of(state)._replace(rank=rank), state.get("step")
    problems = []
    for file in (path, path + PREVIOUS):
        try:
            found: Mapping[str, Any] = read_tensors(file)
            if (saver_of(found), found.get("step")) == wanted:
                return found
            problems.append(f"{file} belongs to another checkpoint")
        except FileNotFoundError:
            continue
        except ValueError as error:
            problems.append(str(error))
    if problems:
        _logger.warning(
            "%s; the gradient samples in it are not used, and the masks are those of the checkpoint",
            "; and ".join(problems),
        )
    return None
