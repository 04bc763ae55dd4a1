"""Checks of model, optimizer and loss before anything is changed; the errors name what cannot be pruned, and a cure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras

from mfac_keras.optimizers import innermost, trained_by

__all__ = [
    "check_built",
    "check_model",
    "check_optimizer",
    "check_trained",
    "refuse_keras_2",
]

_KERAS_2 = ("tf_keras", "tensorflow.python.keras")


def check_model(model: Any) -> None:
    """Check that something is a model of Keras 3.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(model, keras.Model):
        return
    refuse_keras_2("the model", model)
    is_torch = any(base.__module__.startswith("torch.") for base in type(model).__mro__)
    cure = "use mfac_torch, which prunes torch modules" if is_torch else "pass the model itself"
    if isinstance(model, keras.layers.Layer):  # on the torch backend layers are torch modules too
        cure = "put the layer into a model, such as keras.Sequential([layer])"
    raise TypeError(f"the model is a {_class_of(model)}, but pruning needs a keras.Model of Keras 3; {cure}")


def checked_verbose(verbose: object) -> bool:
    """Return whether to print, or raise TypeError for a value that Keras does not accept as ``verbose`` either."""
    if verbose not in (0, 1, 2, "auto"):
        raise TypeError(f"verbose is {verbose!r}; pass 1 or 'auto' to print a line for each pruning step, or 0 not to")
    return verbose != 0


def check_built(model: Any) -> None:
    """Check that a model is built.

    Raises:
        ValueError: If it is not.
    """
    if not model.built:
        raise ValueError(f"{model.name} is not built, so it has no weights; call it on a batch first")


def check_optimizer(optimizer: Any) -> None:
    """Check that something is an optimizer of Keras 3.

    Raises:
        TypeError: If it is not.
    """
    if isinstance(optimizer, keras.optimizers.Optimizer):
        return
    refuse_keras_2("the optimizer", optimizer)
    found = "there is none" if optimizer is None else f"it is a {_class_of(optimizer)}"
    raise TypeError(
        f"pruning follows the optimizer that trains the model, but {found}; compile the model with an optimizer, or "
        "pass the keras.optimizers.Optimizer that train_step uses as optimizer=..."
    )


def refuse_keras_2(what: str, thing: Any) -> None:
    """Refuse an object of Keras 2, which Keras 3 cannot work with.

    Raises:
        TypeError: If its class, or a base class of it, belongs to Keras 2; ``what`` names the object.
    """
    modules = [f"{base.__module__}." for base in type(thing).__mro__]
    package = next((package for package in _KERAS_2 for module in modules if module.startswith(f"{package}.")), None)
    if package is not None:
        raise TypeError(
            f"{what} is a {_class_of(thing)} of Keras 2 ({package}), but pruning needs Keras 3: create it with `import "
            "keras`; if TF_USE_LEGACY_KERAS is set, tf.keras is Keras 2, so unset it"
        )


def check_trained(scopes: Iterable[Mapping[str, Any]], optimizer: Any) -> None:
    """Check that the optimizer, which is built, trains the variables that each modifier prunes.

    Raises:
        ValueError: If it does not train one.
    """
    trained = {id(variable) for leaf in innermost(optimizer) for variable in trained_by(leaf)}
    for variables in scopes:
        missing = [name for name, variable in variables.items() if id(variable) not in trained]
        if missing:
            raise ValueError(
                f"{optimizer.name} does not train {', '.join(missing)}, so they could not be kept sparse; pass the "
                "optimizer that trains them as optimizer=..., or list in params only what it trains"
            )


def _class_of(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
