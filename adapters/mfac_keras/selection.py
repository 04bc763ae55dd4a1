"""Which variables of a model a recipe's ``params`` mean."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from mfac_core.errors import SettingError
from mfac_core.weight_names import matching_names

__all__ = ["prunable_variables", "select_variables"]

_KERNELS = frozenset({"kernel", "depthwise_kernel", "pointwise_kernel"})
_PRUNABLE_LAYERS = tuple(
    getattr(keras.layers, name)
    for name in (
        "Dense",
        "EinsumDense",
        *(f"Conv{rank}D" for rank in (1, 2, 3)),
        *(f"Conv{rank}DTranspose" for rank in (1, 2, 3)),
        *(f"DepthwiseConv{rank}D" for rank in (1, 2)),
        *(f"SeparableConv{rank}D" for rank in (1, 2)),
    )
)

_logger = logging.getLogger("mfac_keras")


def select_variables(model: Any, params: Sequence[str]) -> dict[str, Any]:
    """Return the variables that ``params`` selects, in the order of ``model.trainable_variables``.

    A frozen variable (of a layer with ``trainable=False``) is left out with a log line, unless it is selected by its
    exact path.

    Args:
        model: A built Keras model.
        params: Exact paths; ``re:`` patterns, matched from the start of the path (``re.match``); ``__ALL__``, every
            variable that a loss can train; ``__ALL_PRUNABLE__``, see :func:`prunable_variables`.

    Returns:
        The selected variables by path. Where several variables of a model have one path, the second is called
        ``path#2``, the third ``path#3``.

    Raises:
        SettingError: If an entry matches nothing, a variable selected by its exact path is frozen, or nothing is left
            to prune.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, name="body")])
        >>> [path.rpartition("/")[2] for path in select_variables(model, ["re:.*body"])]
        ['kernel', 'bias']
    """
    weights = _named(model.weights)
    weights = {name: variable for name, variable in weights.items() if _is_float(variable)}
    trainable = {id(variable) for variable in model.trainable_variables}
    by_name: set[str] = set()
    selected: set[str] = set()
    for entry in params:
        names = matching_names(
            entry,
            list(weights),
            prunable=lambda: prunable_variables(model),
            of_all=lambda: [name for name, variable in weights.items() if id(variable) in trainable],
            kind="variable",
        )
        selected.update(names)
        by_name.update(name for name in names if name == entry)
    for name in selected:
        if id(weights[name]) not in trainable:
            _refuse_or_tell_frozen(name, by_name=name in by_name)
    order = {id(variable): place for place, variable in enumerate(model.trainable_variables)}
    chosen = [name for name in selected if id(weights[name]) in order]
    if not chosen:
        raise SettingError(
            "params", f"{list(params)} leaves nothing to prune: every variable that it selects is frozen"
        )
    return {name: weights[name] for name in sorted(chosen, key=lambda name: order[id(weights[name])])}


def prunable_variables(model: Any) -> dict[str, Any]:
    """Return what ``__ALL_PRUNABLE__`` means: the kernels of all dense and convolution layers.

    These are the kernels of ``Dense``, ``EinsumDense`` (so those of ``MultiHeadAttention``), ``Conv1D`` to ``Conv3D``,
    their transposed forms, ``DepthwiseConv`` and ``SeparableConv``, and of their subclasses. Everything else is pruned
    only where ``params`` names it: embeddings, biases, normalization and recurrent layers, and variables of your own
    layers.

    Args:
        model: A built Keras model.

    Returns:
        The variables by path, in the order of ``model.trainable_variables``; frozen ones are left out.
    """
    kernels = {
        id(variable)
        for layer in layers_of(model)
        if isinstance(layer, _PRUNABLE_LAYERS)
        for variable in layer.weights
        if variable.name in _KERNELS
    }
    trainable = {id(variable) for variable in model.trainable_variables}
    return {name: v for name, v in _named(model.weights).items() if id(v) in kernels & trainable}


def layers_of(model: Any) -> list[Any]:
    """Return a model and all layers in it, at any depth.

    Args:
        model: A Keras model.

    Returns:
        Each layer once.
    """
    return list(model._flatten_layers(include_self=True, recursive=True))


def _named(variables: Iterable[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    seen: set[int] = set()
    for variable in variables:
        if id(variable) in seen:
            continue
        seen.add(id(variable))
        name, copies = variable.path, 1
        while name in named:
            copies += 1
            name = f"{variable.path}#{copies}"
        named[name] = variable
    return named


def _is_float(variable: Any) -> bool:
    return bool(keras.backend.is_float_dtype(variable.dtype))


def _refuse_or_tell_frozen(name: str, *, by_name: bool) -> None:
    if by_name:
        raise SettingError(
            "params",
            f"{name!r} is frozen (its layer is not trainable); set trainable=True or take its path out of params",
        )
    _logger.info("%s is frozen (its layer is not trainable) and is left out of pruning", name)
