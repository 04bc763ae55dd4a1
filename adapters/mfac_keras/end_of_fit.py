"""The moment when every callback of a fit is done, those that come later in the list included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["call_at_end_of_fit"]


def call_at_end_of_fit(model: Any, function: Callable[[], None]) -> None:
    """Have a function called once, when the callbacks of the fit that has begun have had their ``on_train_end``.

    Keras puts a ``History`` behind the callbacks that it is given and returns it from ``fit``: this one is followed. A
    ``History`` that stands among the callbacks is followed at its own place.

    Args:
        model: The model that is fitted.
        function: What to call; it is not called where ``fit`` raises.
    """
    history = getattr(model, "history", None)
    if history is None:  # a CallbackList of the user's, without one
        return
    on_train_end = history.on_train_end

    def followed(logs: Any = None) -> None:
        vars(history).pop("on_train_end", None)  # plain again
        on_train_end(logs)
        function()

    history.on_train_end = followed
