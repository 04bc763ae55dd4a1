"""The state of a pruning run on disk, beside what Keras saves: plain numbers and arrays, in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_states", "write_state"]

_ARRAY = "__array__"


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state; the one that was there before is kept beside it.

    A process that is killed while it writes leaves the earlier states whole.

    Args:
        path: Path of the file.
        state: Plain values and arrays, and dictionaries and lists of these.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: list[Any] = []
    structure = json.dumps(_without_arrays(state, arrays))
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        np.savez(file, structure=np.array(structure), **{str(place): array for place, array in enumerate(arrays)})
    if path.exists():
        os.replace(path, _previous(path))
    os.replace(unfinished, path)


def read_states(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the states that were written last, the latest first.

    Args:
        path: Path of the file.

    Yields:
        Up to two states.

    Raises:
        ValueError: If a file is not a state.
    """
    for each in (Path(path), _previous(Path(path))):
        if not each.exists():
            continue
        try:
            with np.load(each, allow_pickle=False) as file:
                yield _with_arrays(json.loads(str(file["structure"])), file)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{each} is not the state of a pruning run, or is damaged; remove it or name another"
            ) from error


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


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
