"""One module for each backend of Keras, imported when Keras runs on it; ``base`` is their contract."""

from __future__ import annotations

from importlib import import_module
from typing import cast

import keras

from mfac_keras.backends.base import Backend

__all__ = ["current_backend"]

SUPPORTED = ("tensorflow", "torch", "jax")


def current_backend() -> Backend:
    """Return the module for the backend that Keras runs on.

    Raises:
        RuntimeError: If pruning does not support this backend.
    """
    name = keras.backend.backend()
    if name not in SUPPORTED:
        raise RuntimeError(
            f"Keras runs on the backend {name!r}; pruning supports {', '.join(SUPPORTED)}: "
            "set KERAS_BACKEND to one of them before Keras is imported"
        )
    return cast(Backend, import_module(f"mfac_keras.backends.{name}"))
