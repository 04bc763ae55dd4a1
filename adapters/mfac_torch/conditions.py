"""What must hold before a recipe is attached to a model: checked while nothing is changed yet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.distributed
from torch import nn

from mfac_core.settings import PruningSettings
from mfac_torch.live_pruning import LivePruning

__all__ = ["check_optimizers", "check_trained", "refuse_distributed", "unwrapped", "warn_of_overlap"]

_logger = logging.getLogger("mfac_torch")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model that wrappers (``DataParallel``, ``torch.compile``) hold.

    Args:
        module: A model, wrapped or not.

    Returns:
        The model itself.

    Raises:
        TypeError: If it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model is a {type(module).__name__}; pass a torch.nn.Module")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(module.module)
    compiled = module._modules.get("_orig_mod")  # what torch.compile(module) wraps
    return module if compiled is None else unwrapped(compiled)


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


def check_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, ...]:
    """Return one optimizer or several as a tuple.

    Args:
        optimizer: What was passed as the optimizer.

    Returns:
        The optimizers.

    Raises:
        TypeError: If it is anything else.
    """
    optimizers = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(each).__name__}; pass the torch.optim.Optimizer of the model, or a list of them"
            )
    if not optimizers:
        raise TypeError("optimizer is an empty list; pass the torch.optim.Optimizer of the model")
    return optimizers


def warn_of_overlap(prunings: Sequence[LivePruning], times: Sequence[PruningSettings]) -> None:
    """Warn of modifiers that prune a parameter at the same time.

    Args:
        prunings: The pruning modifiers.
        times: The settings that say when each of them prunes.
    """
    for (one, when), (other, when_other) in combinations(zip(prunings, times, strict=True), 2):
        twice = sorted(set(one.parameters) & set(other.parameters))
        if twice and _overlap(when, when_other):
            _logger.warning(
                "two pruning modifiers select %s at the same time: each holds its own masks there, so that more is "
                "pruned than either says; let one of them prune each parameter",
                ", ".join(twice),
            )


def check_trained(prunings: Sequence[LivePruning]) -> None:
    """Refuse parameters in scope that no optimizer trains.

    Args:
        prunings: The pruning modifiers.

    Raises:
        ValueError: If there are such; the message names them.
    """
    for pruning in prunings:
        if pruning.untrained:
            raise ValueError(
                f"the optimizer does not train {', '.join(pruning.untrained)}, so their masks could not be held; give "
                "them to the optimizer, or name in params only what it trains"
            )


def _overlap(one: PruningSettings, other: PruningSettings) -> bool:
    first, second = sorted((one, other), key=lambda settings: (settings.start_epoch, settings.end_epoch))
    both_at_once = (one.start_epoch, one.end_epoch) == (other.start_epoch, other.end_epoch)
    return second.start_epoch < first.end_epoch or both_at_once
