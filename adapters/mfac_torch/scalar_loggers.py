"""Loggers of scalars over time, such as TensorBoard's writer or SparseML's loggers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

__all__ = ["ScalarLogger", "ScalarLoggers", "log_functions"]


class ScalarLogger(Protocol):
    """Anything with a method ``log_scalar(tag, value, step)``; further arguments must have defaults."""

    def log_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Log the value of ``tag`` after ``step`` optimizer steps."""


ScalarLoggers = ScalarLogger | Sequence[ScalarLogger] | Any
"""One such object or several, or TensorBoard's ``SummaryWriter``, which has ``add_scalar`` instead."""

LogFunction = Callable[[str, float, int], object]


def log_functions(loggers: ScalarLoggers | None) -> tuple[LogFunction, ...]:
    """Return the function of each logger that takes tag, value and step.

    Raises:
        TypeError: If a logger has neither ``log_scalar`` nor ``add_scalar``.
    """
    if loggers is None:
        return ()
    return tuple(map(_log_function, loggers if isinstance(loggers, list | tuple) else [loggers]))


def _log_function(scalar_logger: Any) -> LogFunction:
    for method in ("log_scalar", "add_scalar"):
        function = getattr(scalar_logger, method, None)
        if callable(function):
            found: LogFunction = function
            return found
    raise TypeError(
        f"the logger {scalar_logger!r} has no method log_scalar(tag, value, step), nor add_scalar as TensorBoard's "
        "SummaryWriter has"
    )
