"""Which parameters a model has, from a file that says so, and which of them a modifier means."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence

__all__ = ["matching", "read_shapes"]

_LONGEST_HEADER = 100_000_000


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a model's parameters.

    Args:
        path: A JSON file that maps names to shapes, such as ``{"fc.weight": [10, 84]}``, or a ``.safetensors`` file, of
            which only the header is read.

    Returns:
        Name of each parameter -> its shape.

    Raises:
        ValueError: If the file holds no such thing.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        size = int.from_bytes(file.read(8), "little") if name.endswith(".safetensors") else None
        if size is not None and size > _LONGEST_HEADER:
            raise ValueError(f"{name}: this is not a safetensors file")
        content = file.read() if size is None else file.read(size)
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name}: this is neither JSON nor a safetensors file ({error})") from error
    if not isinstance(found, Mapping):
        raise ValueError(f'{name}: this must map names to shapes, such as {{"fc.weight": [10, 84]}}')
    if size is not None:
        found = {key: entry.get("shape") for key, entry in found.items() if key != "__metadata__"}
    for key, shape in found.items():
        if not isinstance(shape, list) or not all(isinstance(length, int) and length >= 0 for length in shape):
            raise ValueError(f"{name}: {key}: {shape!r} is not a shape; write a list of lengths, such as [10, 84]")
    return {key: tuple(shape) for key, shape in found.items()}


def matching(params: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the parameters that a modifier means.

    Layers are not known here, so that ``__ALL_PRUNABLE__`` is every parameter of two or more dimensions.

    Args:
        params: Exact names, ``re:`` patterns, ``__ALL__`` or ``__ALL_PRUNABLE__``.
        shapes: Name of each parameter -> its shape.

    Returns:
        Name of each parameter that is meant -> number of its weights, in the order of ``shapes``.

    Raises:
        ValueError: If a pattern is not a regular expression.

    Example:
        >>> matching(["re:fc.*"], {"fc.weight": (10, 84), "fc.bias": (10,), "conv.weight": (6, 3, 5, 5)})
        {'fc.weight': 840, 'fc.bias': 10}
    """
    tests = [_meaning(name, shapes) for name in params]
    return {name: math.prod(shape) for name, shape in shapes.items() if any(name in test for test in tests)}


def _meaning(entry: str, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    if entry == "__ALL__":
        return set(shapes)
    if entry == "__ALL_PRUNABLE__":
        return {name for name, shape in shapes.items() if len(shape) > 1}
    if not entry.startswith("re:"):
        return {entry} & set(shapes)
    try:
        pattern = re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"params: {entry!r} is not a regular expression ({error})") from error
    return {name for name in shapes if pattern.match(name)}
