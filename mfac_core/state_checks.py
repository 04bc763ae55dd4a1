"""Checks of saved states: each value is checked before any is used."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

__all__ = ["check_keys", "checked_array", "checked_flag", "checked_integer", "refuse"]


def refuse(name: str, value: object, rule: str) -> NoReturn:
    """Raise ``ValueError`` for a value that no saved state can contain.

    Example:
        >>> refuse("position", 1.5, "an integer")
        Traceback (most recent call last):
        ValueError: the state is broken: position is 1.5 and must be an integer; load another checkpoint
    """
    raise ValueError(f"the state is broken: {name} is {_described(value)} and must be {rule}; load another checkpoint")


def check_keys(what: str, state: object, keys: Collection[str]) -> None:
    """Refuse a state that is not a mapping with all of the keys; ``what`` names its owner, such as ``a pruner``."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"this is not the state of {what}: a mapping is expected, and this is {_described(state)}; "
            "pass what state_dict() returned"
        )
    missing = set(keys) - set(state)
    if missing:
        raise ValueError(
            f"this is not the state of {what}: it has no {', '.join(sorted(missing))}; pass what state_dict() returned"
        )


def checked_integer(name: str, value: object, at_least: int = 0, at_most: int | None = None) -> int:
    """Return an integer of a state: one of Python or NumPy, or an integer array without dimensions.

    Example:
        >>> checked_integer("position", np.array(3), at_most=4)
        3
    """
    number = _as_python(value)
    if isinstance(number, int) and not isinstance(number, bool):
        if at_least <= number and (at_most is None or number <= at_most):
            return number
    rule = f"an integer of at least {at_least}" if at_most is None else f"an integer from {at_least} to {at_most}"
    refuse(name, value, rule)


def checked_flag(name: str, value: object) -> bool:
    """Return a boolean of a state: one of Python or NumPy, or a boolean array without dimensions."""
    flag = _as_python(value)
    if not isinstance(flag, bool):
        refuse(name, value, "true or false")
    return flag


def checked_array(name: str, value: object, dtype: Any, num_dimensions: int) -> npt.NDArray[Any]:
    """Return an array of a state: a finite NumPy array with this dtype and number of dimensions."""
    wanted = np.dtype(dtype)
    if not isinstance(value, np.ndarray) or value.dtype != wanted or value.ndim != num_dimensions:
        refuse(name, value, f"a NumPy array of {wanted} with {num_dimensions} dimensions")
    if wanted.kind == "f" and not np.isfinite(value).all():
        refuse(name, value, "finite: it contains NaN or Inf")
    return value


def _as_python(value: object) -> object:
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "biu":
        return value.item()
    return value.item() if isinstance(value, np.bool_ | np.integer) else value


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer with too many digits to be written
        return f"a value of type {type(value).__name__}"
