"""Which variables of a model a recipe's ``params`` mean."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import keras

from mfac_core.errors import SettingError
from mfac_core.weight_names import PATTERN, listed, matching_names

__all__ = ["layers_of", "matching_variables", "prunable_variables", "select_variables"]

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


def select_variables(model: Any, params: Sequence[str], *, frozen_too: bool = False) -> dict[str, Any]:
    """Return the variables that ``params`` selects, in the order of ``model.trainable_variables``.

    A frozen variable (of a layer with ``trainable=False``) is left out with a log line, a warning where a pattern
    matches it; selected by its exact path it is an error.

    Args:
        model: A built Keras model.
        params: Exact paths; ``re:`` patterns, matched from the start of the path (``re.match``); ``__ALL__``, every
            variable that a loss can train; ``__ALL_PRUNABLE__``, see :func:`prunable_variables`.
        frozen_too: Whether frozen variables are selected like any other: their zeros are held without doing anything.

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
    if frozen_too:
        return matching_variables(model, params, frozen_keywords=True)
    selected: dict[str, str] = {}
    for entry in params:
        for name in _matching(model, entry, strict=True):
            selected.setdefault(name, entry)
    named = _trainable_by_nature(model)
    trainable = {id(variable): place for place, variable in enumerate(model.trainable_variables)}
    frozen = [name for name in selected if id(named[name]) not in trainable]
    by_name = next((name for name in frozen if name in params), None)
    if by_name is not None:
        raise SettingError(
            "params",
            f"{by_name!r} is frozen (its layer is not trainable); set trainable=True or take its path out of params",
        )
    _tell_left_out(frozen, by_pattern=any(selected[name].startswith(PATTERN) for name in frozen))
    chosen = [name for name in selected if name not in frozen]
    if not chosen:
        raise SettingError(
            "params", f"{list(params)} leaves nothing to prune: every variable that it selects is frozen"
        )
    return {name: named[name] for name in sorted(chosen, key=lambda name: trainable[id(named[name])])}


def matching_variables(
    model: Any, params: Sequence[str], *, strict: bool = True, frozen_keywords: bool = False
) -> dict[str, Any]:
    """Return the variables that ``params`` matches, frozen or not, in the order of ``model.weights``.

    Args:
        model: A built Keras model.
        params: As in :func:`select_variables`.
        strict: Whether an entry that matches nothing is an error; otherwise it is left out with a log line.
        frozen_keywords: Whether ``__ALL__`` and ``__ALL_PRUNABLE__`` mean frozen variables too.

    Returns:
        The variables by path.

    Raises:
        SettingError: If an entry matches nothing, and ``strict``.
    """
    found: set[str] = set()
    for entry in params:
        names = _matching(model, entry, strict=strict, frozen_too=frozen_keywords)
        if not names:
            _logger.warning("params: %r matches no variable of the model and is left out", entry)
        found.update(names)
    return {name: variable for name, variable in _trainable_by_nature(model).items() if name in found}


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

    Raises:
        ValueError: If the model is not built.
    """
    return _kernels(model, {id(variable) for variable in model.trainable_variables})


def layers_of(model: Any) -> list[Any]:
    """Return a model and all layers in it, at any depth.

    Args:
        model: A Keras model.

    Returns:
        Each layer once.
    """
    return list(model._flatten_layers(include_self=True, recursive=True))


def _matching(model: Any, entry: str, *, strict: bool, frozen_too: bool = False) -> list[str]:
    named = _trainable_by_nature(model)
    trainable = {id(variable) for variable in (named.values() if frozen_too else model.trainable_variables)}
    try:
        return matching_names(
            entry,
            list(named),
            prunable=lambda: _kernels(model, trainable),
            of_all=lambda: [name for name, variable in named.items() if id(variable) in trainable],
            kind="variable",
            strict=strict,
        )
    except SettingError as error:
        if "weight" in entry:
            hint = "PyTorch's `weight` is a `kernel` in Keras, and paths are written with slashes"
            raise SettingError(error.field, f"{error.message}; {hint}") from error
        raise


def _kernels(model: Any, among: Collection[int]) -> dict[str, Any]:
    if not model.built:
        raise ValueError(f"{model.name} is not built, so it has no variables; call it on a batch first")
    kernels = {
        id(variable)
        for layer in layers_of(model)
        if isinstance(layer, _PRUNABLE_LAYERS)
        for variable in layer.weights
        if variable.name in _KERNELS
    }
    return {name: variable for name, variable in _named(model).items() if id(variable) in kernels.intersection(among)}


def _trainable_by_nature(model: Any) -> dict[str, Any]:
    """Return what a loss can train, frozen or not: no statistics, seeds or counters."""
    nature = {id(variable) for layer in layers_of(model) for variable in layer._trainable_variables}
    return {
        name: variable for name, variable in _named(model).items() if id(variable) in nature and _is_float(variable)
    }


def _named(model: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    seen: set[int] = set()
    for variable in model.weights:
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


def _tell_left_out(frozen: Sequence[str], *, by_pattern: bool) -> None:
    if frozen:
        _logger.log(
            logging.WARNING if by_pattern else logging.INFO,
            "frozen (the layer is not trainable) and left out of pruning: %s",
            listed(frozen),
        )
