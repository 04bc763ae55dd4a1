"""Choose the saved state to resume from: the one that belongs to the weights that the model has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mfac_core.backends import device_of
from mfac_core.session.live_pruning import combined_masks
from mfac_keras.session import TrainingSession
from mfac_keras.state_file import SavedState

__all__ = ["resume"]

_EXACT, _WEIGHTS, _ZEROS, _NOTHING = range(4)


def resume(session: TrainingSession, saved: Iterable[SavedState]) -> SavedState | None:
    """Resume from the state that belongs to the weights that the model has now, and return it.

    This is the state that was saved with exactly these weights; of two, the one of the epoch at which training resumes.
    Otherwise, as when weights were saved with less precision, it is a state whose masks are the zeros of the weights.
    If none belongs to the weights, zeros are taken as pruned and ``None`` is returned.

    Args:
        session: The run, which has not begun.
        saved: The states, the latest first.

    Raises:
        ValueError: If the state that belongs to these weights does not fit the recipe; nothing is changed then.
    """
    best, best_rank, epochs = None, _NOTHING, []
    for each in saved:
        rank = _rank(session, each)
        epochs.append(_epoch(each.state))
        if rank < best_rank:
            best, best_rank = each, rank
        if rank == _EXACT:
            break
    if best is None:
        session.resume_without_state(
            f"no saved pruning state matches the weights (the saved states are of epoch {', '.join(map(str, epochs))})"
            if epochs
            else "there is no saved pruning state"
        )
        return None
    session.resume(session.parsed(best.state))
    _warn_of_differences(session, best, best_rank)
    if session.zeros().regrown:
        session.resume_without_state("some weights that its saved pruning state masks are no longer zero")
    return best


def _rank(session: TrainingSession, saved: SavedState) -> int:
    is_at_epoch = _epoch(saved.state) * session.steps_per_epoch == session.step
    names: dict[str, str] = {}
    for pruning, state in zip(session.prunings, saved.state["prunings"], strict=False):
        names |= pruning.own_names(state)
    if _has_weights_of(session, saved.state, names):
        return _EXACT if is_at_epoch else _WEIGHTS
    # a state in memory is of this model: a fit that was interrupted takes no fingerprints
    is_of_this_run = is_at_epoch or (saved.path is None and not saved.state["fingerprints"])
    return _ZEROS if is_of_this_run and _has_masks_of(session, saved.state, names) else _NOTHING


def _has_weights_of(session: TrainingSession, state: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    """Return whether the model has exactly the weights that a state was saved with, among those in both scopes.

    ``names`` maps each path of the state to the path here.
    """
    now = session.fingerprints or session.take_fingerprints()
    saved = {names.get(name, name): each for name, each in (state.get("fingerprints") or {}).items()}
    common = now.keys() & saved.keys()
    return bool(common) and all(now[name] == saved[name] for name in common)


def _has_masks_of(session: TrainingSession, state: Mapping[str, Any], names: Mapping[str, str]) -> bool:
    """Return whether the model is zero exactly where the masks of a state prune, for the weights in both scopes."""
    masks = combined_masks(
        {names[name]: mask for name, mask in pruning["masks"].items()} for pruning in state["prunings"]
    )
    weights = {name: array for pruning in session.prunings for name, array in pruning.weights().items()}
    common = masks.keys() & weights.keys()
    return bool(common) and all(
        np.array_equal(masks[name], device_of(weights[name]).to_numpy(weights[name]) != 0) for name in common
    )


def _warn_of_differences(session: TrainingSession, saved: SavedState, rank: int) -> None:
    now = session.step // session.steps_per_epoch
    if saved.path is None and now == saved.state["step"] // saved.state["steps_per_epoch"]:
        return  # fit was interrupted in this epoch, which starts over
    if _epoch(saved.state) != now:
        session.logger.warning(
            "training resumes at epoch %d with the weights of epoch %d (was the process killed between the two files "
            "of BackupAndRestore, or is initial_epoch wrong?); pruning resumes from its state of epoch %d",
            now,
            _epoch(saved.state),
            _epoch(saved.state),
        )
    elif rank == _ZEROS and saved.path is not None:
        session.logger.warning(
            "the weights differ from those of the pruning state of epoch %d (were they saved with less precision, or "
            "changed at the end of the epoch?); their zeros match its masks, so it is used",
            now,
        )


def _epoch(state: Mapping[str, Any]) -> int:
    return -(-int(state["step"]) // int(state["steps_per_epoch"]))  # an epoch that had begun counts
