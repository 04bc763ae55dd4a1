"""Prune a trained model in one shot, in one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mfac_core.ranks.logs import logger_of
from mfac_core.recipe import Recipe
from mfac_core.recipe.recommended import recommended_keys, recommended_line
from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.modifier import MFACPruningModifier
from mfac_torch.modifier_list import ModifierList
from mfac_torch.refusals import model_and_ranks
from mfac_torch.sampling import sampler_of

__all__ = ["prune_one_shot"]

_logger = logging.getLogger("mfac_torch")


def prune_one_shot(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    sparsity: float | Mapping[float, Sequence[str]] | None = None,
    recalibrate_batchnorm: bool = False,
    layers_at_once: int | None = None,
    **recipe_keys: Any,
) -> dict[str, torch.Tensor]:
    """Prune a trained model by M-FAC in a single pruning step; its weights are changed in place.

    Keys that are not given have the recommended values (:data:`mfac_core.recipe.recommended.RECOMMENDED`), which are
    logged. After an exception, the model is unchanged.

    Args:
        model: The model, in ``DistributedDataParallel`` or after ``fully_shard`` if there are several processes, each
            of which makes this call. Other wrappers (``DataParallel``, ``torch.compile``, Fabric's) are unwrapped.
        loader: Batches to sample gradients from, in a form that :class:`GradSampler` takes, or a :class:`GradSampler`.
            Batches smaller than in training tell more about the curvature.
        loss_fn: ``loss_fn(output, target)``, which returns a scalar tensor; ``None`` uses the loss that the model
            returns, or that of the :class:`GradSampler`.
        sparsity: Pruned fraction of all weights, or a mapping from fractions to the names of the parameters that reach
            them.
        recalibrate_batchnorm: Whether to recalibrate the running statistics of batch normalization afterwards over
            batches of ``loader``, see :func:`mfac_torch.recalibrate_batchnorm`.
        layers_at_once: Number of parameters that are sampled and pruned at one time, as in
            :meth:`ScheduledModifierManager.apply`; needs ``global_sparsity=False``.
        **recipe_keys: Keys of an :class:`MFACPruningModifier`, such as ``params``, ``exclude``, ``mask_type="2:4"`` or
            ``num_grads=512``.

    Returns:
        The masks by parameter name: boolean, True keeps.

    Raises:
        RecipeError: If a key is unknown or its value out of range.
        SettingError: If a key does not fit the model.
        TypeError: If there is no sparsity, or an argument has the wrong type, such as a recipe.
        ValueError: If a batch has an unsupported form.
        NotImplementedError: If the model is distributed in another way than by ``DistributedDataParallel`` or
            ``fully_shard``.
        RankError: If another process fails.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(16)]
        >>> masks = prune_one_shot(model, batches, nn.functional.mse_loss, sparsity=0.5, num_grads=16)
        >>> sum(int((parameter == 0).sum()) for parameter in (model[0].weight, model[2].weight))
        80
    """
    _refuse_recipe(loader, loss_fn, sparsity, recipe_keys)
    keys = recommended_keys(recipe_keys, sparsity)
    manager = ScheduledModifierManager([MFACPruningModifier(**keys)])
    sampler = sampler_of(loader, loss_fn)
    line = recommended_line({**recipe_keys, "final_sparsity": keys["final_sparsity"]})
    if line:
        logger_of(model_and_ranks(model)[1], _logger).info("%s", line)
    manager.apply(
        model, grad_sampler=sampler, recalibrate_batchnorm=recalibrate_batchnorm, layers_at_once=layers_at_once
    )
    return manager.masks


def _refuse_recipe(loader: Any, loss_fn: Any, sparsity: Any, keys: Mapping[str, Any]) -> None:
    given = {"loader": loader, "loss_fn": loss_fn, "sparsity": sparsity, "recipe": keys.get("recipe")}
    for name, value in given.items():
        if name == "recipe" and value is None:
            continue
        if name == "recipe" or isinstance(value, str | os.PathLike | Recipe | ModifierList):
            raise TypeError(
                f"{name} is a {type(value).__name__}, but prune_one_shot takes no recipe: it takes batches, a loss and "
                "keys such as sparsity=0.9. To prune in one shot by a recipe, call ScheduledModifierManager"
                ".from_yaml(recipe).apply(model, grad_sampler=GradSampler(loader, loss_fn))"
            )
