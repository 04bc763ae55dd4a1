"""A call at the end of a fit, after the last callback, wherever in the list it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["call_at_end_of_fit"]


def call_at_end_of_fit(model: Any, function: Callable[[], None]) -> None:
    """Call a function once, when all callbacks of the current fit have had their ``on_train_end``.

    Keras appends a ``History`` to the callbacks and returns it from ``fit``: the function is called after it. A
    ``History`` that the user put among the callbacks keeps its place there. A fit that raises does not call the
    function.
    """
    history = getattr(model, "history", None)
    if history is None:  # a CallbackList of the user's, without one
        return
    on_train_end = history.on_train_end

    def on_train_end_and_call(logs: Any = None) -> None:
        vars(history).pop("on_train_end", None)
        on_train_end(logs)
        function()

    history.on_train_end = on_train_end_and_call
