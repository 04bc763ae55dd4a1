"""What optimizers remember of the weights (momentum, moments), and what of it is forgotten when masks change.

Only what is known to be one number per weight is set to zero: a tensor of the weight's shape may as well hold moments
in another basis or codes of quantized numbers, where zeros at the places of pruned weights do harm. What is left alone
does none: pruned weights are exactly zero after each step all the same.
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

__all__ = ["declare_elementwise_state", "forget", "forget_all"]

_logger = logging.getLogger("mfac_torch")

_NAMES: Mapping[str, tuple[str, ...]] = {
    "ASGD": ("ax",),
    "Adadelta": ("square_avg", "acc_delta"),
    "Adafactor": (),  # of rows and columns
    "Adagrad": ("sum",),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "Adamax": ("exp_avg", "exp_inf"),
    "Muon": ("momentum_buffer",),
    "NAdam": ("exp_avg", "exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "RMSprop": ("square_avg", "momentum_buffer", "grad_avg"),
    "Rprop": ("prev",),  # a step_size of zero would keep a weight that comes back from moving
    "SGD": ("momentum_buffer",),
    "SparseAdam": ("exp_avg", "exp_avg_sq"),
}
"""Of the optimizers of PyTorch. The oldest supported one lacks some of them, and its AdamW is not an Adam."""

_keys: dict[type[Optimizer], Collection[str]] = {
    getattr(torch.optim, name): keys for name, keys in _NAMES.items() if hasattr(torch.optim, name)
}

_logged: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()


def declare_elementwise_state(optimizer_class: type[Optimizer], keys: Iterable[str]) -> None:
    """Say what an optimizer that is not PyTorch's own remembers as one number per weight.

    When masks change, these entries of its state are set to zero at pruned weights. Entries that are not plain
    floating-point tensors of their parameter's shape are left alone all the same.

    Args:
        optimizer_class: The class of the optimizer. A subclass with a ``step`` of its own is to be declared by itself.
        keys: The names of the entries in ``optimizer.state[parameter]``, such as ``["exp_avg"]``.

    Raises:
        TypeError: If it is no class of an optimizer, or the keys are no names.

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
    _keys[optimizer_class] = tuple(names)


def forget(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], pruned: Mapping[str, torch.Tensor], undo: ExitStack
) -> None:
    """Forget what an optimizer remembers of pruned weights.

    A history over all weights (``LBFGS``) is dropped. State that is not known to be one number per weight is left alone
    and named once in the log.

    Args:
        optimizer: The optimizer.
        parameters: The parameters in scope by name. Those that the optimizer does not train are passed over.
        pruned: Which weights are pruned, boolean, by parameter name.
        undo: Gets a callback for each change, which takes it back.
    """
    if _keeps_history(optimizer):
        _drop_history(optimizer, parameters.values(), undo)
        return
    for name, mask in pruned.items():
        for value in _elementwise(optimizer, parameters[name]):
            here = mask.to(value.device)
            undo.callback(value.masked_scatter_, here, value[here])
            value.masked_fill_(here, 0)


def forget_all(optimizer: Optimizer, parameters: Iterable[nn.Parameter], undo: ExitStack) -> None:
    """Forget all that an optimizer remembers of some parameters, so that it begins anew.

    Their state is dropped, and the optimizer makes it again in its next step. Where it would not, or where a recorded
    graph knows the tensors, what is one number per weight gets its first value in place.

    Args:
        optimizer: The optimizer.
        parameters: The parameters. Those that the optimizer does not train are passed over.
        undo: Gets a callback for each change, which takes it back.
    """
    if _keeps_history(optimizer):
        _drop_history(optimizer, parameters, undo)
        return
    drops = _makes_state_in_step(type(optimizer)) and not any(
        group.get("capturable", False) for group in optimizer.param_groups
    )
    for parameter in parameters:
        if drops:
            _drop(optimizer, parameter, undo)
            continue
        for value in _elementwise(optimizer, parameter):
            undo.callback(value.copy_, value.clone())
            value.fill_(optimizer.defaults.get("initial_accumulator_value", 0.0))  # of Adagrad


def _is_of(optimizer: Optimizer, known: type[Optimizer]) -> bool:
    """Return whether an optimizer makes its steps as a class does: it is one, or a subclass without step of its own."""
    # PyTorch wraps the step of a class for its hooks, when the first of its optimizers is made.
    return isinstance(optimizer, known) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(known.step)


def _elementwise(optimizer: Optimizer, parameter: nn.Parameter) -> list[torch.Tensor]:
    """Return the state that is one number per weight, and name once in the log what may be and is left alone."""
    keys = next(
        (_keys[known] for known in type(optimizer).__mro__ if known in _keys and _is_of(optimizer, known)), None
    )
    found, left = [], []
    for key, value in optimizer.state.get(parameter, {}).items():
        if keys is not None and key not in keys:
            continue
        if keys is not None and _is_plain(value, parameter):
            found.append(value.detach())
        elif not _is_number(value):
            left.append(str(key))
    _warn_of_unknown(optimizer, left)
    return found


def _is_plain(value: Any, parameter: nn.Parameter) -> bool:
    return (
        type(value) in {torch.Tensor, nn.Parameter}
        and value.layout == torch.strided
        and value.dtype.is_floating_point
        and value.shape == parameter.shape
    )


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else not isinstance(value, Collection)


def _warn_of_unknown(optimizer: Optimizer, keys: Iterable[str]) -> None:
    logged = _logged.setdefault(optimizer, set())
    left = [key for key in keys if key not in logged]
    logged.update(left)
    if left:
        name = type(optimizer).__name__
        _logger.warning(
            "the optimizer %s remembers %s in a form that is not known to be one number per weight, so it is left as "
            "it is when masks change. Pruned weights are zero after each step all the same, but momentum may be spent "
            "on them. Where these are plain numbers, one per weight, say so before training: "
            "mfac_torch.declare_elementwise_state(%s, %s)",
            name,
            ", ".join(left),
            name,
            left,
        )


def _keeps_history(optimizer: Optimizer) -> bool:
    # A subclass with a step of its own has the history of its base class as well.
    return isinstance(optimizer, torch.optim.LBFGS) and _makes_state_in_step(type(optimizer))


def _drop_history(optimizer: Optimizer, parameters: Iterable[nn.Parameter], undo: ExitStack) -> None:
    # LBFGS keeps it with the first of its parameters, which may not be in scope.
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(id(parameter) in trained for parameter in parameters):
        for owner in list(optimizer.state):
            _drop(optimizer, owner, undo)


def _drop(optimizer: Optimizer, owner: Any, undo: ExitStack) -> None:
    if owner in optimizer.state:
        undo.callback(optimizer.state.__setitem__, owner, optimizer.state[owner])
        del optimizer.state[owner]


def _makes_state_in_step(optimizer_class: type[Optimizer]) -> bool:
    """Return whether an optimizer makes the state of a parameter when it lacks: nearly all do, Adagrad does not."""
    classes = optimizer_class.__mro__[: optimizer_class.__mro__.index(Optimizer)]
    constructors = [vars(each)["__init__"] for each in classes if "__init__" in vars(each)]
    code = [getattr(inspect.unwrap(each), "__code__", None) for each in constructors]
    return all(each is not None and "state" not in each.co_names for each in code)
