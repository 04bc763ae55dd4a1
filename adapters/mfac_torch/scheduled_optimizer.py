"""``ScheduledOptimizer``: an older way to attach a recipe, which training scripts still use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.scalar_loggers import ScalarLoggers

__all__ = ["ScheduledOptimizer"]


def ScheduledOptimizer(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    manager: ScheduledModifierManager,
    steps_per_epoch: float,
    loggers: ScalarLoggers | None = None,
    initialize_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Attach a recipe to a model and its optimizer, as :meth:`ScheduledModifierManager.modify` does.

    Args:
        optimizer: The optimizer that trains the model.
        module: The model.
        manager: The manager of the recipe.
        steps_per_epoch: Optimizer steps per epoch; a fraction is rounded up.
        loggers: As in ``modify``.
        initialize_kwargs: Further keyword arguments of ``modify``, such as ``grad_sampler``.

    Returns:
        The optimizer itself.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> from mfac_torch import EpochRangeModifier
        >>> manager = ScheduledModifierManager([EpochRangeModifier(end_epoch=3.0)])
        >>> ScheduledOptimizer(optimizer, model, manager, steps_per_epoch=10) is optimizer
        True
        >>> manager.finalize(model)
    """
    return manager.modify(module, optimizer, steps_per_epoch, loggers=loggers, **(initialize_kwargs or {}))
