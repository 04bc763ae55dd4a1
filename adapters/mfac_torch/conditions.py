"""Checks of arguments and modifiers, made before anything is changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mfac_core.settings.checks import check_number
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.refusals import refuse_optimizer
from mfac_torch.session import is_attached

__all__ = [
    "check_optimizers",
    "check_trained",
    "refuse_unsupported",
    "unwrapped_optimizers",
    "whole_steps",
]


def refuse_unsupported(method: str, arguments: Mapping[str, object]) -> None:
    """Raise TypeError for further arguments of a method that are not None."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise TypeError(f"{method}() does not support {', '.join(map(repr, given))}; leave it out")


def whole_steps(steps_per_epoch: float, logger: logging.Logger) -> int:
    """Return the steps per epoch, rounded up; raise SettingError if they are not a positive number."""
    rule = "steps_per_epoch > 0, such as len(loader) for one step per batch; a fraction is rounded up"
    check_number("steps_per_epoch", steps_per_epoch, rule, lambda x: x > 0)
    whole = math.ceil(steps_per_epoch)
    if whole != steps_per_epoch:
        logger.info("steps_per_epoch %g is rounded up to %d", steps_per_epoch, whole)
    return whole


def unwrapped_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, ...]:
    """Return one optimizer or several as a tuple, without the wrappers that trainers put around them.

    Raises:
        TypeError: If one of them is not an optimizer, or cannot have hooks.
        NotImplementedError: If one of them stores weights or makes steps in a way of its own.
    """
    given = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for each in given:
        refuse_optimizer(each)
    optimizers = tuple(_unwrapped_optimizer(each) for each in given)
    for each, inside in zip(given, optimizers, strict=True):
        if not isinstance(inside, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(each).__name__}; pass the torch.optim.Optimizer of the model, or a list of them"
            )
        if _step_hooks(inside) is None:
            raise TypeError(
                f"optimizer is a {type(each).__name__} that does not support hooks, because its class does not call "
                "torch.optim.Optimizer.__init__; call super().__init__(params, defaults) in it, or pass the optimizer "
                "that it wraps"
            )
    if not optimizers:
        raise TypeError("optimizer is an empty list; pass the torch.optim.Optimizer of the model")
    return optimizers


def check_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers, unwrapped, if a manager can be attached to them.

    Raises:
        TypeError: As :func:`unwrapped_optimizers`.
        ValueError: If the same optimizer is given twice.
        RuntimeError: If a manager is attached to one of them already.
    """
    optimizers = unwrapped_optimizers(optimizer)
    if len({id(each) for each in optimizers}) < len(optimizers):
        raise ValueError("the list of optimizers contains the same one twice; pass each once")
    for each in optimizers:
        if is_attached(each):
            raise RuntimeError(
                f"another manager is attached to this {type(each).__name__} optimizer already, and two would undo each "
                "other's masks; write the modifiers of both into one recipe, or call finalize() of the first manager "
                "(if that is lost, create a new optimizer)"
            )
    return optimizers


def _unwrapped_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside a wrapper; an optimizer with hooks of its own is not one, whatever it contains."""
    # Wrappers (of accelerate, Lightning, Fabric) are optimizers by class, but skip its constructor. So they have no
    # hooks, or those of the optimizer inside if they copy its __dict__.
    inside = getattr(optimizer, "optimizer", None)
    if not isinstance(inside, torch.optim.Optimizer) or not hasattr(optimizer, "param_groups"):
        return optimizer
    hooks = _step_hooks(optimizer)
    return _unwrapped_optimizer(inside) if hooks is None or hooks is _step_hooks(inside) else optimizer


def _step_hooks(optimizer: Any) -> Any:
    return getattr(optimizer, "__dict__", {}).get("_optimizer_step_pre_hooks")


def check_trained(prunings: Sequence[TorchPruning]) -> None:
    """Raise ValueError if no optimizer trains a parameter in scope of a modifier that does more than hold zeros."""
    for pruning in prunings:
        if pruning.untrained and not pruning.holds_zeros_only:
            raise ValueError(
                f"the optimizer does not train {', '.join(pruning.untrained)}, so they could not be kept sparse; add "
                "them to the optimizer, or list in params only what it trains"
                + ("; fully_shard replaces parameters, so create the optimizer after it" if pruning.is_sharded else "")
            )
