"""The parameters of a model that ``params`` and ``exclude`` of a recipe select."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from mfac_core.errors import SettingError
from mfac_core.left_out import is_adapter, selection_warnings, warn_once
from mfac_core.settings.checks import checked_params
from mfac_core.weight_names import (
    ALL_PRUNABLE,
    Computed,
    ModelNames,
    join_names,
    layers_of_names,
    names_in_layers,
    selected_names,
)
from mfac_torch.layout import is_transposed_linear, own_parameters
from mfac_torch.sharded import is_sharded
from mfac_torch.wrappers import unwrapped

__all__ = ["matching_parameters", "prunable_parameters", "select_parameters", "sparse_parameters"]

_PRUNED_ON_PURPOSE = 0.1
"""A weight with a larger fraction of zeros was pruned; a smaller one may be chance."""

_NORMALIZATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_logger = logging.getLogger("mfac_torch")


def select_parameters(
    model: nn.Module,
    params: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    *,
    frozen_too: bool = False,
    logged: set[str] | None = None,
    logger: logging.Logger = _logger,
) -> dict[str, nn.Parameter]:
    """Return the parameters that ``params`` selects, in the order of ``model.named_parameters()``.

    A tied parameter counts once, under its first name, and is selected by any of its names. A frozen parameter
    (``requires_grad`` is False) is left out; to select it by its exact name is an error. Warnings name weights that an
    entry for several leaves out, and normalization weights and biases that a pattern selects.

    Args:
        model: The model to look into.
        params: Exact names; exact names of layers, for the weights of ``__ALL_PRUNABLE__`` in them; ``re:`` patterns,
            matched from the start of the dotted name (``re.match``); ``__ALL__``, every parameter;
            ``__ALL_PRUNABLE__``, see :func:`prunable_parameters`.
        exclude: Exceptions from ``params``, in the same form; the name of a layer means everything in it.
        frozen_too: Whether to select frozen parameters like others, except for those that are not dense floating-point
            tensors, such as quantized weights.
        logged: Warnings that have been logged already, to which new ones are added; ``None`` logs all.
        logger: Where warnings go.

    Returns:
        The selected parameters by name.

    Raises:
        SettingError: If an argument is not a name or a list of names, an entry matches nothing, a parameter selected by
            its exact name is frozen, a parameter has no values yet, or nothing is left to prune.

    Example:
        >>> list(select_parameters(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), ["0", "2.bias"]))
        ['0.weight', '2.bias']
    """
    model = unwrapped(model)
    params, exclude = checked_params(params), checked_params(exclude, "exclude")
    names = _names(model, with_frozen=frozen_too)
    selected = selected_names(params, exclude, names)
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in selected}
    lazy = [name for name, parameter in chosen.items() if is_lazy(parameter)]
    if lazy:
        have = f"{lazy[0]!r} has" if len(lazy) == 1 else f"{join_names(lazy)} have"
        raise SettingError("params", f"{have} no values yet; run one batch through the model first")
    warn_once(logger, selection_warnings(params, exclude, names, selected, prunes=not frozen_too), logged)
    return chosen


def matching_parameters(model: nn.Module, params: Sequence[str], *, strict: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters that ``params`` matches, frozen or not, in the order of ``model.named_parameters()``.

    The name of a layer means all parameters in it. An entry that matches nothing is an error if ``strict``, otherwise a
    warning.
    """
    matched = names_in_layers(params, _names(model), _logger, strict=strict)
    return {name: parameter for name, parameter in model.named_parameters() if name in matched}


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``__ALL_PRUNABLE__``: the weights of all Linear and convolution layers.

    These are the modules of type ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d``, ``nn.ConvTranspose1d`` to
    ``nn.ConvTranspose3d``, their subclasses, the linear layers inside other modules, such as the output projection
    of ``nn.MultiheadAttention``, and the linear layer ``Conv1D`` of transformers. A weight that is tied to such a
    layer's weight is the same parameter, so it is included.

    Everything else is pruned only if ``params`` names it: embeddings, biases, normalization layers, recurrent layers,
    ``nn.Bilinear``, the packed ``in_proj_weight`` of ``nn.MultiheadAttention``, and parameters of custom modules. A
    layer whose weight is computed from other parameters (``torch.nn.utils.parametrize``, weight norm) is left out with
    a log line.

    Args:
        model: The model to look into.

    Returns:
        The parameters by name, in the order of ``model.named_parameters()``.

    Example:
        >>> list(prunable_parameters(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 3))))
        ['0.weight', '2.weight']
    """
    model = unwrapped(model)
    for name, computed in _computed(model).items():
        by = f" ({computed.by})" if computed.by else ""
        layer = name.rpartition(".")[0]
        _logger.info(
            "%s leaves out the layer %r: its weight is computed from other parameters%s", ALL_PRUNABLE, layer, by
        )
    weights = _prunable_ids(model)
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in weights}


def sparse_parameters(model: nn.Module, *, warn: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters that have been pruned, judging by their zeros: more than 10% of a parameter, and not all.

    Parameters of all kinds of layers are included, frozen or not, if they have at least two axes: zeros of biases and
    of normalization layers are usually initial values. So are the zeros of a parameter that is zero throughout, such as
    the second matrix of a LoRA adapter before training, which could never learn if it were held at zero.

    ``warn`` logs warnings about parameters that are zero throughout, biases with zeros, and models without pruned ones.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> _ = nn.init.zeros_(attention.in_proj_weight[:6].detach())
        >>> list(sparse_parameters(attention))
        ['in_proj_weight']
    """
    found: dict[str, nn.Parameter] = {}
    empty, vectors = [], []
    for name, parameter in unwrapped(model).named_parameters():
        if is_sharded(parameter):
            raise NotImplementedError(
                f"{name} is sharded, so its zeros cannot be counted in one process; call this before fully_shard(model)"
            )
        if is_lazy(parameter) or not parameter.numel() or not _is_dense_float(parameter):
            continue
        zeros = float((parameter.detach() == 0).float().mean())
        if zeros <= _PRUNED_ON_PURPOSE:
            continue
        if zeros < 1.0:
            if parameter.ndim < 2:
                vectors.append(name)
            else:
                found[name] = parameter
        elif parameter.ndim >= 2 and not is_adapter(name):
            empty.append(name)
    if warn and not found:
        _logger.warning(
            "no weight of the model has more than %d%% zeros, so there is nothing to hold; load the pruned weights "
            "first, or name weights that are less sparse in params of a ConstantPruningModifier",
            100 * _PRUNED_ON_PURPOSE,
        )
    if warn and vectors:
        _logger.warning(
            "zeros of biases or scales are not held: %s; if they were pruned, list them in params of a "
            "ConstantPruningModifier",
            join_names(vectors),
        )
    if empty and warn:
        _logger.warning(
            "all zeros, so assumed to be initial values and not held: %s; to hold them at zero, list them by name in "
            "params of a ConstantPruningModifier",
            join_names(empty),
        )
    return found


def _is_prunable_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd) or is_transposed_linear(module)


def _prunable_ids(model: nn.Module) -> set[int]:
    # A parametrized layer shows `weight` as a property; registered parameters alone can be written to.
    weights = [module._parameters.get("weight") for module in model.modules() if _is_prunable_layer(module)]
    return {id(weight) for weight in weights if weight is not None}


def _names(model: nn.Module, *, with_frozen: bool = False) -> ModelNames:
    named = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in named.items():
        first.setdefault(id(parameter), name)
    prunable = _prunable_ids(model)
    normalization = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMALIZATION)
        for parameter in own_parameters(module)
    }
    packed = {
        id(module.in_proj_weight)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    }
    modules: dict[str, list[str]] = {name: [] for name, _ in model.named_modules(remove_duplicate=False) if name}
    return ModelNames(
        shapes={name: () if is_lazy(parameter) else tuple(parameter.shape) for name, parameter in named.items()},
        prunable=frozenset(name for name, parameter in named.items() if id(parameter) in prunable),
        layers={**modules, **layers_of_names(named)},
        normalization=frozenset(name for name, parameter in named.items() if id(parameter) in normalization),
        frozen=frozenset(
            name
            for name, parameter in named.items()
            if not parameter.requires_grad and not (with_frozen and _is_dense_float(parameter))
        ),
        packed={
            name: "in_proj_weight of MultiheadAttention" for name, parameter in named.items() if id(parameter) in packed
        },
        computed=_computed(model),
        first_names={name: first[id(parameter)] for name, parameter in named.items()},
    )


def _is_dense_float(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.layout == torch.strided


def _computed(model: nn.Module) -> dict[str, Computed]:
    """Return the weights of prunable layers that are computed from other parameters."""
    return {
        f"{name}.weight" if name else "weight": Computed(
            ", ".join(map(_in_words, _computing(module))), _computed_shape(module), keeps_zeros=_keeps_zeros(module)
        )
        for name, module in model.named_modules()
        if _is_prunable_layer(module) and module._parameters.get("weight") is None
    }


def _computing(module: nn.Module) -> list[object]:
    """Return the parametrizations or hooks that compute the weight of a layer, as far as they are known."""
    if parametrize.is_parametrized(module, "weight"):
        return list(module.parametrizations["weight"])  # type: ignore[index]  # a ModuleDict there
    hooks = module._forward_pre_hooks.values()
    return [hook for hook in hooks if "weight" in (getattr(hook, "name", ""), getattr(hook, "_tensor_name", ""))]


def _keeps_zeros(module: nn.Module) -> bool:
    kinds = _computing(module)
    return bool(kinds) and all(
        isinstance(kind, BasePruningMethod) or _in_words(kind) in {"weight_norm", "spectral_norm"} for kind in kinds
    )


def _in_words(kind: object) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(kind).__name__).strip("_").lower()


def _computed_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a weight without computing it, which may change the parameters it is computed from."""
    if parametrize.is_parametrized(module, "weight"):
        originals = module.parametrizations["weight"].parameters()  # type: ignore[index, union-attr]
        shapes = [tuple(original.shape) for original in originals]
    else:
        computed = module.__dict__.get("weight")
        shapes = [] if computed is None else [tuple(computed.shape)]
    return max(shapes, key=math.prod, default=())
