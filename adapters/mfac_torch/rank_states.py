"""The states of several ranks: which rank saved one, and all of them gathered on rank 0."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mfac_core.ranks import Ranks
from mfac_core.ranks.agreement import gathered, together
from mfac_core.state_checks import check_keys, checked_integer

__all__ = ["Saver", "check_same_save", "gathered_states", "saver_of"]

_PIECE = 1 << 24
"""Bytes that each rank sends to rank 0 at a time, which may hold them in the memory of its GPU."""


class Saver(NamedTuple):
    """The rank that saved a state.

    Args:
        rank: The rank.
        size: Number of ranks of its run.
        run: A number that the ranks have drawn together when the run began, unlike that of any other run.
    """

    rank: int = 0
    size: int = 1
    run: int = 0


def saver_of(state: Any) -> Saver:
    """Return which rank saved a state of a manager; raise ValueError if the state is broken."""
    check_keys("a manager", state, ())
    saver = state.get("saved_by")
    if saver is None:  # a state of an older release, which ran in a single process
        return Saver()
    check_keys("the rank that saved the state", saver, Saver._fields)
    size = checked_integer("saved_by['size']", saver["size"], at_least=1, at_most=sys.maxsize)
    rank = checked_integer("saved_by['rank']", saver["rank"], at_most=size - 1)
    return Saver(rank, size, checked_integer("saved_by['run']", saver["run"], at_most=sys.maxsize))


def check_same_save(states: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for states that are not those of different ranks of the same run."""
    savers = [saver_of(state) for state in states]
    if len({saver[1:] for saver in savers}) > 1 or len(set(savers)) < len(savers):
        raise ValueError(
            f"the {len(states)} states are not those of different ranks of the same run; load the states of one "
            "checkpoint"
        )


def gathered_states(ranks: Ranks, own_state: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the states of all ranks on rank 0, and none on the others. Collective.

    Masks are sent by no rank, because they are the same on all: the states have those of rank 0 in common.
    """
    with together(ranks, "gathering the states of all ranks"):
        state = own_state()
        file = io.BytesIO()
        if ranks.rank:
            torch.save({**state, "prunings": [{**each, "masks": None} for each in state["prunings"]]}, file)
    content = np.frombuffer(file.getbuffer(), np.uint8)
    lengths = gathered(ranks, [len(content)])[:, 0].tolist()
    arrived = [bytearray() for _ in lengths]
    for start in range(0, max(lengths), _PIECE):
        parts = [content[start : start + _PIECE], *[content[:0]] * (ranks.size - 1)]
        for received, piece in zip(arrived, ranks.exchange(parts), strict=True):
            received.extend(piece.tobytes())
    if ranks.rank:
        return []
    return [state, *(_with_masks(_unpacked(received), state) for received in arrived[1:])]


def _unpacked(content: bytearray) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


def _with_masks(state: dict[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    pairs = zip(state["prunings"], like["prunings"], strict=True)
    return {**state, "prunings": [{**each, "masks": other["masks"]} for each, other in pairs]}
