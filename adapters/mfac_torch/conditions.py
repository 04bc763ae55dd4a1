"""What must hold before a recipe is attached to a model: checked while nothing is changed yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

from mfac_torch.live_pruning import TorchPruning
from mfac_torch.session import is_followed

__all__ = ["check_optimizers", "check_trained", "refuse_distributed", "unwrapped_optimizers"]


def refuse_distributed() -> None:
    """Refuse training that is distributed over several processes.

    Raises:
        NotImplementedError: If there is more than one rank.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    world_size = torch.distributed.get_world_size()
    if world_size > 1:
        raise NotImplementedError(
            f"training is distributed over {world_size} processes, which is not supported yet: each would choose "
            "its own masks. Prune in a single process"
        )


def unwrapped_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, ...]:
    """Return one optimizer or several as a tuple, without the wrappers that trainers put around them.

    Args:
        optimizer: What was passed as the optimizer.

    Returns:
        The optimizers whose steps can be followed.

    Raises:
        TypeError: If it is anything else.
    """
    given = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    optimizers = tuple(_unwrapped_optimizer(each) for each in given)
    for each, inside in zip(given, optimizers, strict=True):
        if not isinstance(inside, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(each).__name__}; pass the torch.optim.Optimizer of the model, or a list of them"
            )
        if _hooks(inside) is None:
            raise TypeError(
                f"optimizer is a {type(each).__name__} whose steps cannot be followed, because it was made without "
                "torch.optim.Optimizer.__init__; call super().__init__(params, defaults) in its class, or pass the "
                "optimizer that it wraps"
            )
    if not optimizers:
        raise TypeError("optimizer is an empty list; pass the torch.optim.Optimizer of the model")
    return optimizers


def check_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers that a manager can be attached to.

    Args:
        optimizer: What was passed as the optimizer.

    Returns:
        As :func:`unwrapped_optimizers`.

    Raises:
        TypeError: If it is anything else.
        ValueError: If one of them is there twice.
        RuntimeError: If a manager is attached to one of them already.
    """
    optimizers = unwrapped_optimizers(optimizer)
    if len({id(each) for each in optimizers}) < len(optimizers):
        raise ValueError("the list of optimizers has one of them twice; pass each of them once")
    for each in optimizers:
        if is_followed(each):
            raise RuntimeError(
                f"another manager is attached to this {type(each).__name__} optimizer already, and two would undo each "
                "other's masks; write the modifiers of both into one recipe, or call finalize() of the first manager "
                "(where that is lost, make a new optimizer)"
            )
    return optimizers


def _unwrapped_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that a wrapper holds; one whose own steps can be followed is none, whatever it holds."""
    inside = getattr(optimizer, "optimizer", None)
    if not isinstance(inside, torch.optim.Optimizer) or not hasattr(optimizer, "param_groups"):
        return optimizer
    hooks = _hooks(optimizer)
    return _unwrapped_optimizer(inside) if hooks is None or hooks is _hooks(inside) else optimizer


def _hooks(optimizer: Any) -> Any:
    return getattr(optimizer, "__dict__", {}).get("_optimizer_step_pre_hooks")


def check_trained(prunings: Sequence[TorchPruning]) -> None:
    """Refuse parameters in scope that no optimizer trains, but for those whose zeros are only held.

    Args:
        prunings: The pruning modifiers.

    Raises:
        ValueError: If there are such; the message names them.
    """
    for pruning in prunings:
        if pruning.untrained and not pruning.holds_zeros_only:
            raise ValueError(
                f"the optimizer does not train {', '.join(pruning.untrained)}, so their masks could not be held; give "
                "them to the optimizer, or name in params only what it trains"
            )
