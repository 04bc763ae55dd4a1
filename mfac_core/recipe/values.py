"""Values that a recipe can hold, from and to text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import yaml

from mfac_core.recipe.documents import FLOAT_WITHOUT_DOT

__all__ = ["flow_text", "plain"]


def plain(value: object) -> object:
    """Return a value in Python's own types: NumPy's scalars as numbers, tuples and arrays as lists.

    Args:
        value: Any value.

    Returns:
        The same in plain types; what is none of a recipe's types stays as it is.

    Example:
        >>> plain({np.float32(0.5): (np.int64(3), "a")})
        {0.5: [3, 'a']}
    """
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def flow_text(value: object, *, expressions: bool = False) -> str:
    """Return a value as YAML in one line that a recipe reads as the same value.

    Args:
        value: ``None``, a bool, a number, a string, or lists and mappings of such values.
        expressions: Whether text of the form ``eval(...)`` is meant as an expression, and not as text.

    Returns:
        The text.

    Raises:
        ValueError: If the value is, or holds, something else, or text that a recipe reads as an expression.

    Example:
        >>> flow_text({0.5: ["2:4", None, 1e-05, math.inf]})
        "{0.5: ['2:4', null, 1.0e-05, .inf]}"
    """
    _check(value, expressions)
    text = yaml.dump(plain(value), Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").removesuffix("\n")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # What a recipe reads as a number although YAML 1.1 does not, and what YAML would break into several lines.
    quoted = FLOAT_WITHOUT_DOT.fullmatch(text) or any(not character.isprintable() for character in text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def _check(value: object, expressions: bool) -> None:
    value = plain(value)
    if isinstance(value, list):
        for item in value:
            _check(item, expressions)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, expressions)
            _check(item, expressions)
    elif isinstance(value, str):
        stripped = value.strip()
        if stripped.startswith("eval(") and stripped.endswith(")") and not expressions:
            raise ValueError(f"{value!r} is text that a recipe reads as an expression")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ValueError(f"{value!r} is a {type(value).__name__}, which a recipe cannot hold")
