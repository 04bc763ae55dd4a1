"""Optimizer state (momentum, moments): reset at pruned weights when masks change.

Only elementwise state, which is known to hold one number per weight, is set to zero. Another tensor of the same shape
may hold moments in a rotated basis or quantized codes, where zeros at the positions of pruned weights are harmful.
Leaving state alone is harmless: pruned weights are exactly zero after each step anyway.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from mfac_torch.sharded import imported, is_sharded, local

__all__ = ["declare_elementwise_state", "reset_pruned_state", "reset_state"]

_logger = logging.getLogger("mfac_torch")

_KEYS: Mapping[str, tuple[str, ...]] = {
    "ASGD": ("ax",),
    "Adadelta": ("square_avg", "acc_delta"),
    "Adafactor": (),  # its moments are of rows and columns
    "Adagrad": ("sum",),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "Adamax": ("exp_avg", "exp_inf"),
    "Muon": ("momentum_buffer",),
    "NAdam": ("exp_avg", "exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "RMSprop": ("square_avg", "momentum_buffer", "grad_avg"),
    "Rprop": ("prev",),  # not its step_size, since zero would keep a regrown weight from moving
    "SGD": ("momentum_buffer",),
    "SparseAdam": ("exp_avg", "exp_avg_sq"),
}
"""Elementwise state of the optimizers of PyTorch. The oldest supported release lacks some, and its AdamW does not
derive from Adam."""

_elementwise_keys: dict[type[Optimizer], Collection[str]] = {
    getattr(torch.optim, name): keys for name, keys in _KEYS.items() if hasattr(torch.optim, name)
}

_logged: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()


def declare_elementwise_state(optimizer_class: type[Optimizer], keys: Iterable[str]) -> None:
    """Declare which state of an optimizer from outside PyTorch holds one number per weight.

    When masks change, these entries are set to zero at pruned weights. Entries that are not dense floating-point
    tensors of their parameter's shape are always left alone.

    Args:
        optimizer_class: The class of the optimizer. Declare a subclass separately if it overrides ``step``.
        keys: The names of the entries in ``optimizer.state[parameter]``, such as ``["exp_avg"]``.

    Raises:
        TypeError: If ``optimizer_class`` is not an optimizer class, or ``keys`` is not a list of names.

    Example:
        >>> class Lion(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         return super().step(closure)
        >>> declare_elementwise_state(Lion, ["momentum_buffer"])
    """
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        raise TypeError(f"optimizer_class is {optimizer_class!r}; pass a subclass of torch.optim.Optimizer")
    names = [keys] if isinstance(keys, str) else list(keys)
    if isinstance(keys, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"keys is {keys!r}; pass the names of the entries as a list, such as ['exp_avg']")
    _elementwise_keys[optimizer_class] = tuple(names)


def reset_pruned_state(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    pruned: Mapping[str, torch.Tensor],
    undo: ExitStack,
    *,
    logger: logging.Logger = _logger,
) -> None:
    """Set the elementwise state of an optimizer to zero at pruned weights.

    A history over all weights (``LBFGS``) is dropped. State that is not known to be elementwise is left alone, and
    logged once.

    Args:
        optimizer: The optimizer.
        parameters: The parameters in scope by name. The optimizer need not train all of them.
        pruned: Boolean tensors by parameter name, True where pruned.
        undo: Gets a callback for each change that reverts it.
        logger: Where a warning about unknown state goes.
    """
    optimizer = _stepping(optimizer)
    if _keeps_history(optimizer):
        _drop_history(optimizer, parameters.values(), undo)
        return
    for name, mask in pruned.items():
        for value in _elementwise(optimizer, parameters[name], logger):
            here = mask.to(value.device)
            undo.callback(value.masked_scatter_, here, value[here])
            value.masked_fill_(here, 0)


def reset_state(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], undo: ExitStack, *, logger: logging.Logger = _logger
) -> None:
    """Reset the state of an optimizer for some parameters to that before its first step.

    The state is dropped, and the optimizer creates it again in its next step. An optimizer that would not, and one in a
    captured CUDA graph, which refers to the tensors, gets the initial values of its elementwise state in place.

    Args:
        optimizer: The optimizer.
        parameters: The parameters. The optimizer need not train all of them.
        undo: Gets a callback for each change that reverts it.
        logger: Where a warning about unknown state goes.
    """
    optimizer = _stepping(optimizer)
    if _keeps_history(optimizer):
        _drop_history(optimizer, parameters, undo)
        return
    drops = _creates_state_in_step(type(optimizer)) and not any(
        group.get("capturable", False) for group in optimizer.param_groups
    )
    for parameter in parameters:
        if drops:
            _drop(optimizer, parameter, undo)
            continue
        for value in _elementwise(optimizer, parameter, logger):
            undo.callback(value.copy_, value.clone())
            value.fill_(optimizer.defaults.get("initial_accumulator_value", 0.0))  # of Adagrad


def _stepping(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that keeps the state: inside ``ZeroRedundancyOptimizer``, for this rank's parameters."""
    is_zero = isinstance(optimizer, imported("torch.distributed.optim", "ZeroRedundancyOptimizer"))
    return optimizer.optim if is_zero else optimizer  # type: ignore[attr-defined]  # of ZeroRedundancyOptimizer


def _elementwise(optimizer: Optimizer, parameter: nn.Parameter, logger: logging.Logger) -> list[torch.Tensor]:
    """Return the state of a parameter that holds one number per weight; log once which other tensors are left alone."""
    # A subclass that overrides step may keep other state. The steps are unwrapped because PyTorch wraps that of a class
    # for its hooks when the first instance is created.
    step = inspect.unwrap(type(optimizer).step)
    known = (each for each in type(optimizer).__mro__ if each in _elementwise_keys)
    keys = next((_elementwise_keys[each] for each in known if inspect.unwrap(each.step) is step), None)
    found, left = [], []
    for key, value in optimizer.state.get(parameter, {}).items():
        if keys is not None and key not in keys:
            continue
        if keys is not None and _is_dense(value, parameter):
            found.append(local(value))
        elif not _is_scalar(value):
            left.append(str(key))
    _warn_of_unknown(optimizer, left, logger)
    return found


def _is_dense(value: Any, parameter: nn.Parameter) -> bool:
    return (
        (type(value) in {torch.Tensor, nn.Parameter} or (is_sharded(value) and is_sharded(parameter)))
        and value.layout == torch.strided
        and value.dtype.is_floating_point
        and value.shape == parameter.shape
        and local(value).shape == local(parameter).shape
    )


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else not isinstance(value, Collection)


def _warn_of_unknown(optimizer: Optimizer, keys: Iterable[str], logger: logging.Logger) -> None:
    logged = _logged.setdefault(optimizer, set())
    left = [key for key in keys if key not in logged]
    logged.update(left)
    if left:
        name = type(optimizer).__name__
        logger.warning(
            "the optimizer %s keeps state (%s) that is not known to hold one number per weight, so it is not reset "
            "when masks change. Pruned weights are zero after each step anyway, but their momentum is kept. If these "
            "tensors hold one number per weight, declare them before training: "
            "mfac_torch.declare_elementwise_state(%s, %s)",
            name,
            ", ".join(left),
            name,
            left,
        )


def _keeps_history(optimizer: Optimizer) -> bool:
    # A subclass that overrides step has the history of its base class as well.
    return isinstance(optimizer, torch.optim.LBFGS) and _creates_state_in_step(type(optimizer))


def _drop_history(optimizer: Optimizer, parameters: Iterable[nn.Parameter], undo: ExitStack) -> None:
    # LBFGS stores its history with the first of its parameters, which may not be in scope.
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) in trained for parameter in parameters):
        for owner in list(optimizer.state):
            _drop(optimizer, owner, undo)


def _drop(optimizer: Optimizer, owner: Any, undo: ExitStack) -> None:
    if owner in optimizer.state:
        undo.callback(optimizer.state.__setitem__, owner, optimizer.state[owner])
        del optimizer.state[owner]


def _creates_state_in_step(optimizer_class: type[Optimizer]) -> bool:
    """Return whether an optimizer creates missing state in its step. Nearly all do; Adagrad does in its constructor."""
    # The code of a constructor that creates state names `self.state`. One without readable code is assumed to.
    classes = optimizer_class.__mro__[: optimizer_class.__mro__.index(Optimizer)]
    constructors = [vars(each)["__init__"] for each in classes if "__init__" in vars(each)]
    code = [getattr(inspect.unwrap(each), "__code__", None) for each in constructors]
    return all(each is not None and "state" not in each.co_names for each in code)
