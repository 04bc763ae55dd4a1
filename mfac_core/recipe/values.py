"""Values that a recipe can contain: in Python's types, and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import yaml

from mfac_core.recipe.nodes import FLOAT_WITHOUT_DOT

__all__ = ["flow_text", "as_python"]


def as_python(value: object) -> object:
    """Return a value in Python's own types: NumPy's scalars as numbers, tuples and arrays as lists.

    Example:
        >>> as_python({np.float32(0.5): (np.int64(3), "a")})
        {0.5: [3, 'a']}
    """
    if isinstance(value, np.generic | np.ndarray):
        return as_python(value.tolist())
    if isinstance(value, list | tuple):
        return [as_python(item) for item in value]
    if isinstance(value, Mapping):
        return {as_python(key): as_python(item) for key, item in value.items()}
    return value


def flow_text(value: object) -> str:
    """Return a value as one line of YAML that a recipe reads as the same value.

    Text of the form ``eval(...)`` is refused, because a recipe reads it as an expression.

    Example:
        >>> flow_text({0.5: ["2:4", None, 1e-05, math.inf]})
        "{0.5: ['2:4', null, 1.0e-05, .inf]}"
    """
    _check(value)
    text = yaml.dump(as_python(value), Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").removesuffix("\n")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Quoted: text that a recipe reads as a number although YAML 1.1 does not, and text that YAML breaks into lines.
    quoted = FLOAT_WITHOUT_DOT.fullmatch(text) or any(not character.isprintable() for character in text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def _check(value: object) -> None:
    value = as_python(value)
    if isinstance(value, list):
        for item in value:
            _check(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key)
            _check(item)
    elif isinstance(value, str):
        stripped = value.strip()
        if stripped.startswith("eval(") and stripped.endswith(")"):
            raise ValueError(f"{value!r} is text that a recipe reads as an expression")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ValueError(f"{value!r} is of type {type(value).__name__}, which a recipe cannot contain")
