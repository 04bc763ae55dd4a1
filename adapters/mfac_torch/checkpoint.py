"""Checkpoints: model, optimizers and manager in one file, written and loaded completely or not at all.

Of several ranks, rank 0 writes this file. Each of the others writes the state of its manager into a file beside it.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mfac_core.files import PREVIOUS
from mfac_torch.rank_states import saver_of
from mfac_torch.sharded import is_sharded
from mfac_torch.state_files import write_state
from mfac_torch.tensor_files import read_tensors, write_tensors

__all__ = ["load_checkpoint", "write_checkpoint"]

_FORMAT = "mfac-checkpoint-1"
_KEYS = {"format", "model", "optimizers", "manager", "more"}

_logger = logging.getLogger("mfac_torch")


def write_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    manager_state: Mapping[str, Any],
    more: Mapping[str, Any],
) -> None:
    """Write the file of this rank in one step, and keep the one before it as ``<path>.previous``.

    Raises:
        NotImplementedError: If the weights are distributed over ranks.
        TypeError: If a part is not made of tensors and plain values. The file is unchanged then.
        OSError: If the file cannot be written. It is unchanged then.
    """
    _refuse_sharded(model, "save_checkpoint", "save", "save_state")
    if saver_of(manager_state).rank:
        write_state(path, manager_state, keep_previous=True)
        return
    content = {
        "format": _FORMAT,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "manager": manager_state,
        "more": more,
    }
    write_tensors(path, content, keep_previous=True)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    resumption: Callable[[Mapping[str, Any]], Callable[[], None]],
) -> dict[str, Any]:
    """Load a checkpoint, and return its further entries.

    Args:
        path: The file that :func:`write_checkpoint` wrote.
        model: The model.
        optimizers: The optimizers.
        resumption: Checks the state of the manager, and returns a function that resumes from it.

    Raises:
        NotImplementedError: If the weights are distributed over ranks.
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete checkpoint, or does not fit. Nothing is changed then.
    """
    _refuse_sharded(model, "load_checkpoint", "load", "load_state")
    parts = _read(path)
    resume = resumption(parts["manager"])
    with ExitStack() as undo:
        _load_weights(model, parts["model"], undo)
        _load_optimizers(optimizers, parts["optimizers"], undo)
        resume()
        undo.pop_all()
    more: dict[str, Any] = parts["more"]
    return more


def _refuse_sharded(model: nn.Module, method: str, verb: str, instead: str) -> None:
    if any(map(is_sharded, model.parameters())):
        raise NotImplementedError(
            f"{method}() does not support the {type(model).__name__}, whose weights are distributed over ranks "
            f"(fully_shard): no rank has the whole model. On every rank, {verb} model and optimizers with "
            f"torch.distributed.checkpoint, and the pruning state with manager.{instead}(path)"
        )


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, or the previous one if only that is intact."""
    previous = os.fspath(path) + PREVIOUS
    try:
        return _checked(path)
    except (FileNotFoundError, ValueError) as error:
        if not os.path.exists(previous):
            raise
        try:
            parts = _checked(previous)
        except ValueError as of_previous:
            raise ValueError(f"{error}; and {of_previous}") from error
        _logger.warning("%s; training resumes from the previous checkpoint, %s", error, previous)
        return parts


def _checked(path: str | os.PathLike[str]) -> dict[str, Any]:
    parts = read_tensors(path)
    if not isinstance(parts, dict) or parts.get("format") != _FORMAT or not parts.keys() >= _KEYS:
        raise ValueError(
            f"{os.fspath(path)} is not a checkpoint of a manager; pass a file that manager.save_checkpoint() wrote"
        )
    return parts


def _load_weights(model: nn.Module, weights: Any, undo: ExitStack) -> None:
    undo.callback(model.load_state_dict, copy.deepcopy(model.state_dict()))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights of the checkpoint do not fit the model: {error}") from error


def _load_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Any, undo: ExitStack) -> None:
    if not isinstance(states, list):
        raise ValueError(
            f"the checkpoint is broken: optimizers is a {type(states).__name__} and must be a list; load another "
            "checkpoint"
        )
    if len(states) != len(optimizers):
        raise ValueError(
            f"the checkpoint holds the state of {len(states)} optimizers, and this run has {len(optimizers)}; pass "
            "the optimizers that it was saved with, in the same order"
        )
    for optimizer, state in zip(optimizers, states, strict=True):
        before = {"state": optimizer.state, "param_groups": optimizer.param_groups}
        undo.callback(vars(optimizer).update, before)
        try:
            optimizer.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the state of the {type(optimizer).__name__} optimizer in the checkpoint does not fit: {error}"
            ) from error
        # load_state_dict takes the state of another class if groups and sizes agree; its groups lack options then.
        missing = {key for group in optimizer.param_groups for key in optimizer.defaults if key not in group}
        if missing:
            raise ValueError(
                f"the checkpoint holds the state of another optimizer than this {type(optimizer).__name__}: it lacks "
                f"{', '.join(sorted(missing))}; resume with the optimizer that it was saved with"
            )
