"""Objects that take numbers over time: TensorBoard's writer, SparseML's loggers, and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

__all__ = ["ScalarLogger", "ScalarLoggers", "log_functions"]


class ScalarLogger(Protocol):
    """Anything with a method ``log_scalar(tag, value, step)``; further arguments must have defaults."""

    def log_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Take the value of ``tag`` after ``step`` optimizer steps."""


ScalarLoggers = ScalarLogger | Sequence[ScalarLogger] | Any
"""One such object or several, or TensorBoard's ``SummaryWriter``, which has ``add_scalar`` instead."""

LogFunction = Callable[[str, float, int], object]


def log_functions(loggers: ScalarLoggers | None) -> tuple[LogFunction, ...]:
    """Return what to call with tag, value and step to tell each logger.

    Args:
        loggers: One logger or a list of them; ``None`` for none.

    Returns:
        One function for each.

    Raises:
        TypeError: If one has neither ``log_scalar`` nor ``add_scalar``.
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
