"""A checkpoint as a file: whole or not there, checked when it is written and when it is read."""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

import torch
from torch import nn

from mfac_core.files import PREVIOUS, write_file

__all__ = ["load_optimizers", "load_weights", "read_checkpoint", "read_tensors", "write_checkpoint", "write_tensors"]

_FORMAT = "mfac-checkpoint-1"

_logger = logging.getLogger("mfac_torch")


def write_checkpoint(path: str | os.PathLike[str], parts: Mapping[str, Any]) -> None:
    """Write a checkpoint in one step, and keep the one before it as ``<path>.previous``.

    Args:
        path: The file.
        parts: Tensors and plain values by name.

    Raises:
        TypeError: If a part holds something else. The file is as before then.
        OSError: If the file cannot be written. It is as before then.
    """
    write_tensors(path, {"format": _FORMAT, **parts}, keep_previous=True)


def read_checkpoint(path: str | os.PathLike[str], keys: Collection[str]) -> dict[str, Any]:
    """Read a checkpoint, or the one before it where that alone is whole.

    Args:
        path: The file that :func:`write_checkpoint` wrote.
        keys: Names of the parts that it must have.

    Returns:
        The parts, with tensors in host memory.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If neither is a whole checkpoint.
    """
    previous = os.fspath(path) + PREVIOUS
    try:
        return _checked(path, keys)
    except (FileNotFoundError, ValueError) as error:
        if not os.path.exists(previous):
            raise
        try:
            parts = _checked(previous, keys)
        except ValueError as of_previous:
            raise ValueError(f"{error}; and {of_previous}") from error
        _logger.warning("%s; training goes on from the one before it, %s", error, previous)
        return parts


def load_weights(model: nn.Module, weights: Any, undo: ExitStack) -> None:
    """Load the weights of a checkpoint into a model: all of them, or none.

    Args:
        model: The model.
        weights: What its ``state_dict()`` was.
        undo: Gets callbacks that take it back.

    Raises:
        ValueError: If they do not fit.
    """
    undo.callback(model.load_state_dict, copy.deepcopy(model.state_dict()))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"the weights of the checkpoint do not fit the model: {error}") from error


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], states: Any, undo: ExitStack) -> None:
    """Load the states of a checkpoint into optimizers: all of them, or none.

    Args:
        optimizers: The optimizers.
        states: What their ``state_dict()`` was.
        undo: Gets callbacks that take it back.

    Raises:
        ValueError: If they do not fit.
    """
    if not isinstance(states, list) or len(states) != len(optimizers):
        raise ValueError(
            f"the checkpoint holds the state of {len(states)} optimizers, and this run has {len(optimizers)}; pass "
            "as optimizer the ones that it was saved with, in the same order"
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
        lacking = {key for group in optimizer.param_groups for key in optimizer.defaults if key not in group}
        if lacking:
            raise ValueError(
                f"the checkpoint holds the state of another optimizer than this {type(optimizer).__name__}: it lacks "
                f"{', '.join(sorted(lacking))}; resume with the optimizer that it was saved with"
            )


def write_tensors(path: str | os.PathLike[str], content: Any, *, keep_previous: bool = False) -> None:
    """Write tensors and plain values in one step, so that ``torch.load(weights_only=True)`` reads them.

    Args:
        path: The file.
        content: What to write.
        keep_previous: Whether the old file is kept, as ``<path>.previous``.

    Raises:
        TypeError: If there is something else in it. The file is as before then.
        OSError: If the file cannot be written. It is as before then.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
            file.flush()
            torch.load(file.name, map_location="meta", mmap=True, weights_only=True)  # looks at no tensor's values
        except Exception as error:
            if isinstance(error, OSError | MemoryError):
                raise
            raise TypeError(
                f"{os.fspath(path)} is not written, because it could not be read again: "
                f"{_unreadable(content) or _first_line(error)}; save tensors and plain values only, such as the "
                "state_dict() of an object in place of the object"
            ) from error

    write_file(path, write, keep_previous=keep_previous)


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`write_tensors` wrote, and compare the checksums in it.

    Args:
        path: The file.

    Returns:
        The content, with tensors in host memory.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()  # torch does not look
        if broken is not None:
            raise ValueError(f"a checksum of it ({broken}) is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | MemoryError):
            raise
        raise ValueError(f"{os.fspath(path)} is damaged and cannot be read: {_first_line(error)}") from error


def _checked(path: str | os.PathLike[str], keys: Collection[str]) -> dict[str, Any]:
    parts = read_tensors(path)
    if not isinstance(parts, dict) or parts.get("format") != _FORMAT or not parts.keys() >= set(keys):
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint of a manager; pass a file that manager.save_checkpoint() wrote"
        )
    return parts


def _unreadable(content: Any, *place: str) -> str:
    """Return which entry could not be read again, and what it is; empty where each of them can."""
    if type(content) in {dict, OrderedDict, list, tuple}:
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        return next(filter(None, (_unreadable(value, *place, str(key)) for key, value in entries)), "")
    if type(content) is torch.Tensor:
        return ""
    file = io.BytesIO()
    try:
        torch.save(content, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return f"{'.'.join(place) or 'it'} is a {type(content).__name__}"
    return ""


def _first_line(error: Exception) -> str:
    strange = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if strange:  # what torch says around it is how to read a file that cannot be trusted
        return f"it holds an object of {strange[1]}"
    return next(iter(str(error).splitlines()), type(error).__name__)
