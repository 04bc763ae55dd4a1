"""A call at the end of a fit, after all callbacks, whatever their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["call_at_end_of_fit"]


def call_at_end_of_fit(model: Any, function: Callable[[], None]) -> None:
    """Call a function once, after the ``on_train_end`` of all callbacks of the current fit.

    Keras appends a ``History`` to the callbacks and returns it from ``fit``: the function is called after it. A
    ``History`` that the user put among the callbacks keeps its place there. A fit that raises does not call the
    function.
    """
    history = getattr(model, "history", None)
    if history is None:  # the user's own CallbackList has none
        return
    on_train_end = history.on_train_end

    def on_train_end_and_call(logs: Any = None) -> None:
        vars(history).pop("on_train_end", None)
        on_train_end(logs)
        function()

    history.on_train_end = on_train_end_and_call
