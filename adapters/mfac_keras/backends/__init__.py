"""What differs between the backends of Keras, one module each; a module is imported when its backend is in use."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import keras

__all__ = ["current_backend"]

SUPPORTED = ("tensorflow", "torch", "jax")


def current_backend() -> ModuleType:
    """Return the module of the backend that Keras runs on.

    Returns:
        A module with ``Hooks`` (see :class:`mfac_keras.backends.base.TrainingHooks`), ``to_array(tensor)``,
        ``to_tensor(array)``, ``loss_gradients(...)``, ``loss_function(model, loss_of)``, ``no_gradients()`` and
        ``refuse_unsupported(model)``.

    Raises:
        RuntimeError: If Keras runs on a backend that cannot train or is not supported.
    """
    name = keras.backend.backend()
    if name not in SUPPORTED:
        raise RuntimeError(
            f"Keras runs on the backend {name!r}; pruning supports {', '.join(SUPPORTED)}: "
            "set KERAS_BACKEND to one of them before Keras is imported"
        )
    return import_module(f"mfac_keras.backends.{name}")
