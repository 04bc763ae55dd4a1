"""The state of a pruning run on disk: plain numbers and arrays in one file, in addition to what Keras saves."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mfac_core.files import PREVIOUS, write_file
from mfac_core.state_checks import check_keys, checked_integer, refuse

__all__ = ["SavedState", "check_state", "read_state", "read_states", "write_state"]

_ARRAY = "__array__"

_logger = logging.getLogger("mfac_keras")


class SavedState(NamedTuple):
    """A state and where it comes from.

    Attributes:
        state: The state.
        path: Its file; ``None`` for a state in memory.
        is_previous: Whether a later state was written to the file.
    """

    state: Mapping[str, Any]
    path: Path | None = None
    is_previous: bool = False


def check_state(state: Any) -> None:
    """Raise ValueError for anything that is not the state of a run, whatever the run."""
    check_keys("a run", state, ("step", "steps_per_epoch", "changes", "prunings"))
    checked_integer("step", state["step"])
    checked_integer("steps_per_epoch", state["steps_per_epoch"], at_least=1)
    for key in ("fingerprints", "changes"):
        if not isinstance(state.get(key, {}), Mapping | None):
            refuse(key, state[key], "a mapping")
    if not isinstance(state["prunings"], list):
        refuse("prunings", state["prunings"], "a list of states of pruners")
    for pruning in state["prunings"]:
        check_keys("a pruner", pruning, ("masks",))
        masks = pruning["masks"]
        if not isinstance(masks, Mapping) or not all(isinstance(mask, np.ndarray) for mask in masks.values()):
            refuse("masks", masks, "a mapping from name to array")


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any], *, keep_previous: bool = True) -> None:
    """Write a state: plain values and arrays, and dictionaries and lists of these.

    With ``keep_previous`` the state in the file becomes the previous one; without, it is replaced, and the previous one
    stays. A process that is killed while it writes leaves the earlier states intact.
    """
    arrays: list[Any] = []
    structure = json.dumps(_without_arrays(state, arrays))
    named = {str(place): array for place, array in enumerate(arrays)}
    write_file(
        path,
        lambda file: np.savez(file, structure=np.array(structure), **named),
        keep_previous=keep_previous,
    )


def read_state(path: str | os.PathLike[str], check: Callable[[Any], object] | None = None) -> dict[str, Any]:
    """Return the state in a file; ``check`` raises ValueError for anything that is not the state of a run.

    Raises:
        ValueError: If the file is not a state, or is damaged in any way.
        OSError: If the file cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        try:
            state = _read(file, path.stat().st_size)
            if check is not None:
                check(state)
        except Exception as error:  # the bytes may be anything, and three decoders read them
            raise ValueError(
                f"{path} is not the state of a pruning run, or is damaged; remove it or name another"
            ) from error
    return state


def read_states(path: str | os.PathLike[str], check: Callable[[Any], object] | None = None) -> Iterator[SavedState]:
    """Yield the two states that were written last, the latest first; skip a damaged one if the other is intact.

    Raises:
        ValueError: If there are files, and none is intact.
    """
    latest = Path(os.path.realpath(path))
    damaged: list[ValueError] = []
    is_found = False
    for each in (latest, _previous(latest)):
        if not each.exists():
            continue
        try:
            state = read_state(each, check)
        except ValueError as error:
            damaged.append(error)
            if is_found:
                _logger.warning("%s", error)
            continue
        if damaged:
            _logger.warning("%s. The state that was written before it is used, %s", damaged[0], each)
        is_found = True
        yield SavedState(state, each, is_previous=each != latest)
    if damaged and not is_found:
        raise damaged[0]


def _previous(path: Path) -> Path:
    return path.with_name(path.name + PREVIOUS)


def _read(file: Any, size: int) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        # np.savez compresses nothing, so the parts of a true state add up to less than the file
        if sum(part.file_size for part in archive.infolist()) > size:
            raise ValueError("it unpacks to more bytes than the file has")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        state = _with_arrays(json.loads(str(arrays["structure"])), arrays)
    if not isinstance(state, dict):
        raise ValueError("it does not hold a dictionary")
    return state


def _without_arrays(value: Any, arrays: list[Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_arrays(each, arrays) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(each, arrays) for each in value]
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {_ARRAY: len(arrays) - 1}
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(value: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return arrays[str(value[_ARRAY])]
        return {key: _with_arrays(each, arrays) for key, each in value.items()}
    return [_with_arrays(each, arrays) for each in value] if isinstance(value, list) else value
