"""Which parameters of a model a recipe's ``params`` mean."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from mfac_core.errors import SettingError
from mfac_core.weight_names import ALL, ALL_PRUNABLE, PATTERN, listed, matching_names

__all__ = ["matching_parameters", "prunable_parameters", "select_parameters", "sparse_parameters", "weight_axes"]

_PRUNED_ON_PURPOSE = 0.1
"""A weight with more zeros than this fraction was pruned; fewer may be chance."""

_logger = logging.getLogger("mfac_torch")


def select_parameters(model: nn.Module, params: Sequence[str], *, frozen: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters that ``params`` selects, in the order of ``model.named_parameters()``.

    A tied parameter counts once, under its first name, and is selected by any of its names. A frozen parameter
    (``requires_grad`` is False) is left out with a log line, a warning where a pattern selects it, unless it is
    selected by its exact name.

    Args:
        model: The model to look into.
        params: Exact names; ``re:`` patterns, matched from the start of the dotted name (``re.match``);
            ``__ALL__``, every parameter; ``__ALL_PRUNABLE__``, see :func:`prunable_parameters`.
        frozen: Whether frozen parameters are selected like others; those that are not dense floating-point tensors,
            such as quantized weights, are left out all the same.

    Returns:
        The selected parameters by name.

    Raises:
        SettingError: If an entry matches nothing, a parameter selected by its exact name is frozen,
            a parameter has no values yet, or nothing is left to prune.

    Example:
        >>> list(select_parameters(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), ["re:0[.]"]))
        ['0.weight', '0.bias']
    """
    selected = _selected(model, params, strict=True)
    chosen: dict[str, nn.Parameter] = {}
    left_out: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in selected:
            continue
        if is_lazy(parameter):
            raise SettingError("params", f"{name!r} has no values yet; run one batch through the model first")
        if parameter.requires_grad or (frozen and _is_dense_float(parameter)):
            chosen[name] = parameter
        else:
            left_out[name] = selected[id(parameter)]
    _check_not_by_name(left_out)
    if not chosen:
        raise SettingError(
            "params", f"{list(params)} leaves nothing to prune: every parameter that it selects is frozen"
        )
    _tell_left_out(left_out)
    return chosen


def matching_parameters(model: nn.Module, params: Sequence[str], *, strict: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters that ``params`` matches, frozen or not, in the order of ``model.named_parameters()``.

    Args:
        model: The model to look into.
        params: As in :func:`select_parameters`.
        strict: Whether an entry that matches nothing is an error; otherwise it is left out with a log line.

    Returns:
        The parameters by name, a tied one once.

    Raises:
        SettingError: If an entry matches nothing, and ``strict``.
    """
    selected = _selected(model, params, strict=strict)
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in selected}


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what ``__ALL_PRUNABLE__`` means: the weights of all Linear and convolution layers.

    These are the modules of type ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d``, ``nn.ConvTranspose1d`` to
    ``nn.ConvTranspose3d``, their subclasses, the linear layers inside other modules, such as the output projection
    of ``nn.MultiheadAttention``, and the linear layer ``Conv1D`` of transformers. A weight that is tied to such a
    layer's weight is the same parameter, so it counts.

    Everything else is pruned only where ``params`` names it: embeddings, biases, normalization layers, recurrent
    layers, ``nn.Bilinear``, the packed ``in_proj_weight`` of ``nn.MultiheadAttention``, and parameters of your own
    modules. A layer whose weight is computed from other parameters (``torch.nn.utils.parametrize``, weight norm) is
    left out with a log line.

    Args:
        model: The model to look into.

    Returns:
        The parameters by name, in the order of ``model.named_parameters()``.

    Example:
        >>> list(prunable_parameters(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 3, 3))))
        ['0.weight', '2.weight']
    """
    weights: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | _ConvNd) and not _is_transposed_linear(module):
            continue
        # A parametrized layer shows `weight` as a property; registered parameters alone can be written to.
        weight = module._parameters.get("weight")
        if weight is None:
            _logger.info("%s leaves out the layer %r: its weight is computed from other parameters", ALL_PRUNABLE, name)
        else:
            weights.add(id(weight))
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in weights}


def sparse_parameters(model: nn.Module, *, warn: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters that were pruned, to judge by their zeros: more than 10%, and not all of them.

    Whatever layer a parameter belongs to, and whether it is frozen or not, it counts if it has at least two axes: zeros
    of biases and of normalization layers are most often those they began with. So are those of a parameter that is zero
    throughout, such as the second matrix of a LoRA adapter before training, which would never learn if it was held.

    Args:
        model: The model to look into.
        warn: Whether a warning names those that are zero throughout.

    Returns:
        The parameters by name, a tied one once, in the order of ``model.named_parameters()``.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> _ = nn.init.zeros_(attention.in_proj_weight[:6].detach())
        >>> list(sparse_parameters(attention))
        ['in_proj_weight']
    """
    found: dict[str, nn.Parameter] = {}
    empty = []
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.ndim < 2 or not parameter.numel() or not _is_dense_float(parameter):
            continue
        zeros = float((parameter.detach() == 0).float().mean())
        if zeros == 1.0:
            empty.append(name)
        elif zeros > _PRUNED_ON_PURPOSE:
            found[name] = parameter
    if empty and warn:
        _logger.warning(
            "zero throughout, which is taken for how they began and not for pruned: %s; to hold them at zero, name "
            "them in params of a ConstantPruningModifier",
            listed(empty),
        )
    return found


def weight_axes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return how weights lie whose first axis is not that of the outputs.

    Args:
        model: The model.
        names: Names of parameters to look at.

    Returns:
        For weights of transposed convolutions and of ``Conv1D`` of transformers the permutation of their axes into
        (output, kernel..., input), by name; all others lie as PyTorch's (output, input, kernel...).

    Example:
        >>> weight_axes(nn.ConvTranspose2d(2, 4, 3), ["weight", "bias"])
        {'weight': (1, 2, 3, 0)}
    """
    turned = {
        id(module._parameters["weight"])
        for module in model.modules()
        if (isinstance(module, _ConvTransposeNd) or _is_transposed_linear(module)) and "weight" in module._parameters
    }
    wanted = set(names)
    return {
        name: (*range(1, parameter.ndim), 0)
        for name, parameter in model.named_parameters()
        if name in wanted and id(parameter) in turned
    }


def _is_dense_float(parameter: nn.Parameter) -> bool:
    return parameter.dtype.is_floating_point and parameter.layout == torch.strided


def _is_transposed_linear(module: nn.Module) -> bool:
    # Conv1D of transformers, a linear layer whose weight is (in, out). Its package is not imported for this.
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2


def _selected(model: nn.Module, params: Sequence[str], *, strict: bool) -> dict[int, list[str]]:
    """Return the ids of the parameters that match, and the entries that each matches."""
    named = dict(model.named_parameters(remove_duplicate=False))
    selected: dict[int, list[str]] = {}
    for entry in params:
        names = matching_names(
            entry, list(named), prunable=lambda: prunable_parameters(model), kind="parameter", strict=strict
        )
        if not names:
            _logger.info("%r matches no parameter of the model and is left out", entry)
        for name in names:
            selected.setdefault(id(named[name]), []).append(entry)
    return selected


def _check_not_by_name(frozen: Mapping[str, Sequence[str]]) -> None:
    for name, entries in frozen.items():
        if not all(entry in (ALL, ALL_PRUNABLE) or entry.startswith(PATTERN) for entry in entries):
            raise SettingError(
                "params",
                f"{name!r} is frozen (requires_grad is False); unfreeze the parameter or take its name out of params",
            )


def _tell_left_out(frozen: Mapping[str, Sequence[str]]) -> None:
    """Say which frozen parameters are left out; where a pattern was meant to select them, as a warning."""
    by_pattern = [name for name, entries in frozen.items() if any(entry.startswith(PATTERN) for entry in entries)]
    others = [name for name in frozen if name not in by_pattern]
    for level, names in ((logging.WARNING, by_pattern), (logging.INFO, others)):
        if names:
            _logger.log(level, "frozen (requires_grad is False) and left out of pruning: %s", listed(names))
