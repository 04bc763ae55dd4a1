"""The variables of a model that ``params`` and ``exclude`` of a recipe select."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras

from mfac_core.errors import SettingError
from mfac_core.left_out import selection_warnings, warn_once
from mfac_core.settings.checks import checked_params
from mfac_core.weight_names import ModelNames, join_names, layers_of_names, names_in_layers, selected_names
from mfac_keras.conditions import check_model

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
_TAKES_ADAPTERS = _KERNELS | {"embeddings"}
_NORMALIZATION = (
    keras.layers.BatchNormalization,
    keras.layers.LayerNormalization,
    keras.layers.GroupNormalization,
    keras.layers.RMSNormalization,
)

_logger = logging.getLogger("mfac_keras")


def select_variables(
    model: Any,
    params: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    *,
    frozen_too: bool = False,
    logged: set[str] | None = None,
    logger: logging.Logger = _logger,
) -> dict[str, Any]:
    """Return the variables that ``params`` selects, in the order of ``model.trainable_variables``, frozen ones last.

    A frozen variable (of a layer with ``trainable=False``) is left out; to select it by its exact path is an error.
    Warnings name weights that an entry for several leaves out, and normalization weights and biases that a pattern
    selects.

    Args:
        model: A built Keras model.
        params: Exact paths; names or paths of layers, for the weights of ``__ALL_PRUNABLE__`` in them; ``re:``
            patterns, matched from the start of the path (``re.match``); ``__ALL__``, every variable that a loss can
            train; ``__ALL_PRUNABLE__``, see :func:`prunable_variables`.
        exclude: Exceptions from ``params``, in the same form; a layer means everything in it.
        frozen_too: Whether to select frozen variables like others.
        logged: Warnings that have been logged already, to which new ones are added; ``None`` logs all.
        logger: Where warnings go.

    Returns:
        The selected variables by path. If several variables of a model share a path, the second is called ``path#2``,
        the third ``path#3``.

    Raises:
        SettingError: If an argument is not a name or a list of names, an entry matches nothing, a variable selected by
            its exact path is frozen, or is not of a floating-point type, or nothing is left to prune.
        TypeError: If the model is not a model of Keras 3.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3, name="body")])
        >>> [path.rpartition("/")[2] for path in select_variables(model, ["body"])]
        ['kernel']
    """
    check_model(model)
    params, exclude = checked_params(params), checked_params(exclude, "exclude")
    named = _learnable(model) if frozen_too else _to_be_pruned(model)
    names = _names(model, named, with_frozen=frozen_too)
    with _hint_for_pytorch(*params, *exclude):
        selected = selected_names(params, exclude, names)
    _refuse_other_dtypes({name: named[name] for name in selected})
    warnings = selection_warnings(params, exclude, names, selected, prunes=not frozen_too)
    warn_once(logger, [*warnings, *_dense_sums(model, {name: named[name] for name in selected})], logged)
    places = {id(variable): place for place, variable in enumerate(model.trainable_variables)}
    in_order = sorted(selected, key=lambda name: places.get(id(named[name]), len(places)))
    return {name: named[name] for name in in_order}


def matching_variables(
    model: Any, params: Sequence[str], *, strict: bool = True, logger: logging.Logger = _logger
) -> dict[str, Any]:
    """Return the variables that ``params`` matches, frozen or not, in the order of ``model.weights``.

    A layer means all variables in it. An entry that matches nothing is an error if ``strict``, otherwise a warning.
    """
    named = _learnable(model)
    with _hint_for_pytorch(*params):
        matched = names_in_layers(params, _names(model, named), logger, strict=strict)
    return {name: variable for name, variable in named.items() if name in matched}


def prunable_variables(model: Any) -> dict[str, Any]:
    """Return the variables of ``__ALL_PRUNABLE__``: the kernels of all dense and convolution layers.

    These are the kernels of ``Dense``, ``EinsumDense`` (so those of ``MultiHeadAttention``), ``Conv1D`` to ``Conv3D``,
    their transposed forms, ``DepthwiseConv`` and ``SeparableConv``, and of their subclasses. Everything else is pruned
    only if ``params`` names it: embeddings, biases, normalization and recurrent layers, and variables of custom layers.

    Args:
        model: A built Keras model.

    Returns:
        The variables by path, in the order of ``model.trainable_variables``; frozen ones are left out.

    Raises:
        TypeError: If the model is not a model of Keras 3.
        ValueError: If the model is not built.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2, name="head")], name="net")
        >>> list(prunable_variables(model))
        ['net/head/kernel']
    """
    check_model(model)
    kernels = _kernel_ids(model)
    trainable = {id(variable) for variable in model.trainable_variables}
    return {name: variable for name, variable in _named(model).items() if id(variable) in kernels & trainable}


def layers_of(model: Any) -> list[Any]:
    """Return a model and all layers in it, at any depth, each once."""
    return list(model._flatten_layers(include_self=True, recursive=True))


@contextmanager
def _hint_for_pytorch(*entries: str) -> Iterator[None]:
    """Add a hint to an error about names that PyTorch uses."""
    try:
        yield
    except SettingError as error:
        if any("weight" in entry and repr(entry) in error.message for entry in entries):
            hint = "PyTorch's `weight` is a `kernel` in Keras, and paths are written with slashes"
            raise SettingError(error.field, f"{error.message}; {hint}") from error
        raise


def _names(model: Any, named: Mapping[str, Any], *, with_frozen: bool = False) -> ModelNames:
    trainable = {id(variable) for variable in model.trainable_variables}
    kernels = _kernel_ids(model)
    name_of = {id(variable): name for name, variable in named.items()}
    layers: dict[str, dict[str, None]] = {
        name: dict.fromkeys(inside) for name, inside in layers_of_names(named).items()
    }
    normalization: set[str] = set()
    for layer in layers_of(model):
        inside = [name_of[id(variable)] for variable in layer.weights if id(variable) in name_of]
        layers.setdefault(layer.name, {}).update(dict.fromkeys(inside))
        if isinstance(layer, _NORMALIZATION):
            normalization.update(inside)
    is_quantized = not all(map(_is_float, named.values()))
    return ModelNames(
        shapes={name: tuple(map(int, variable.shape)) for name, variable in named.items()},
        prunable=frozenset(name for name, variable in named.items() if id(variable) in kernels),
        layers=layers,
        normalization=normalization,
        frozen=frozenset(name for name, variable in named.items() if id(variable) not in trainable and not with_frozen),
        kind="variable",
        frozen_because="the layer is not trainable, or quantized" if is_quantized else "the layer is not trainable",
        prunable_layers="Dense and convolution layers",
    )


def _kernel_ids(model: Any) -> set[int]:
    if not model.built:
        raise ValueError(f"{model.name} is not built, so it has no variables; call it on a batch first")
    return {
        id(variable)
        for layer in layers_of(model)
        if isinstance(layer, _PRUNABLE_LAYERS)
        for variable in layer.weights
        if variable.name in _KERNELS
    }


def _learnable(model: Any) -> dict[str, Any]:
    """Return the variables that a loss can train, frozen or not: no statistics, seeds or counters."""
    trainable = {id(variable) for layer in layers_of(model) for variable in layer._trainable_variables}
    return {
        name: variable for name, variable in _named(model).items() if id(variable) in trainable and _is_float(variable)
    }


def _to_be_pruned(model: Any) -> dict[str, Any]:
    """Return the variables that a loss can train, and integer kernels too, so that these are not ignored silently."""
    floats, kernels = _learnable(model), _kernel_ids(model)
    return {name: each for name, each in _named(model).items() if name in floats or id(each) in kernels}


def _refuse_other_dtypes(selected: Mapping[str, Any]) -> None:
    others = [name for name, variable in selected.items() if not _is_float(variable)]
    if others:
        dtypes = ", ".join(dict.fromkeys(selected[name].dtype for name in others))
        raise SettingError(
            "params",
            f"only floating-point weights can be pruned, and these are not: {join_names(others)} ({dtypes}); prune "
            "before quantization, or list them in exclude",
        )


def _dense_sums(model: Any, selected: Mapping[str, Any]) -> list[str]:
    """Return a warning about selected variables with low-rank adapters: the layer computes with the sum of both."""
    with_adapters = {
        id(variable)
        for layer in layers_of(model)
        if getattr(layer, "lora_enabled", False)
        for variable in layer.weights
    }
    sums = [name for name, each in selected.items() if id(each) in with_adapters and each.name in _TAKES_ADAPTERS]
    if not sums:
        return []
    return [
        f"low-rank adapters are added to {join_names(sums)} (enable_lora): the layer computes with the sum, and Keras "
        "saves the sum, which is dense, whatever sparsity is reported. Set the sum to zero where the masks are False "
        "after the model is saved and loaded, or train without adapters"
    ]


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
