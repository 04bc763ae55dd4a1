"""Assign values to variables: to all of them or to none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["assign_all", "assigned"]


@contextmanager
def assigned(values: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Assign values to variables; if an assignment or the block fails, every variable gets its old value back.

    All values are computed before the first is assigned.

    Example:
        >>> import keras
        >>> one, other = keras.Variable([1.0]), keras.Variable([2.0])
        >>> try:
        ...     with assigned([(one, [3.0]), (other, [3.0, 4.0])]):
        ...         print("both have them")
        ... except ValueError:
        ...     print(one.numpy().tolist(), other.numpy().tolist())
        [1.0] [2.0]
    """
    touched = []
    try:
        for variable, value in list(values):
            touched.append((variable, _copied(variable)))
            variable.assign(value)
        yield
    except BaseException:
        for variable, before in reversed(touched):
            if _copied(variable).tobytes() != before.tobytes():
                variable.assign(before)
        raise


def assign_all(values: Iterable[tuple[Any, Any]]) -> None:
    """Assign values to variables, to all of them or to none."""
    with assigned(values):
        pass


def _copied(variable: Any) -> npt.NDArray[Any]:
    return np.array(variable.numpy(), copy=True)  # on torch, numpy() shares the memory of the variable
