"""Assign values to variables, to all of them or to none."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_keras.backends import current_backend

__all__ = ["assign", "assign_all", "snapshot"]


def assign(variable: Any, value: Any) -> None:
    """Assign a value, which is the same on each rank, without waiting for the others.

    Example:
        >>> import keras
        >>> variable = keras.Variable([1.0])
        >>> assign(variable, [2.0])
        >>> variable.numpy().tolist()
        [2.0]
    """
    variable.assign(current_backend().of_all_ranks(value, variable))


def snapshot(variables: Iterable[Any], undo: ExitStack) -> None:
    """Register callbacks that restore the current values of variables.

    Example:
        >>> import keras
        >>> variable = keras.Variable([1.0])
        >>> with ExitStack() as undo:
        ...     snapshot([variable], undo)
        ...     _ = variable.assign([2.0])
        >>> variable.numpy().tolist()
        [1.0]
    """
    for variable in variables:
        undo.callback(_restore, variable, _copied(variable))


def assign_all(values: Iterable[tuple[Any, Any]]) -> None:
    """Assign a value to each variable; after an exception, all have their old values.

    Example:
        >>> import keras
        >>> one, other = keras.Variable([1.0]), keras.Variable([2.0])
        >>> try:
        ...     assign_all([(one, [3.0]), (other, [3.0, 4.0])])
        ... except ValueError:
        ...     print(one.numpy().tolist(), other.numpy().tolist())
        [1.0] [2.0]
    """
    values = list(values)
    with ExitStack() as undo:
        snapshot((variable for variable, _ in values), undo)
        for variable, value in values:
            assign(variable, value)
        undo.pop_all()


def _restore(variable: Any, before: npt.NDArray[Any]) -> None:
    if _copied(variable).tobytes() != before.tobytes():
        assign(variable, before)


def _copied(variable: Any) -> npt.NDArray[Any]:
    return np.array(variable.numpy(), copy=True)  # on torch, numpy() shares the memory of the variable
