"""Prune a trained model in one shot, without training."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mfac_core.ranks.logs import logger_of
from mfac_core.recipe import Recipe
from mfac_core.recipe.recommended import recommended_keys, recommended_line
from mfac_core.schedules.one_shot import one_shot_in_order
from mfac_core.session.live_pruning import combined_masks
from mfac_core.session.one_shot import attached_at_once, check_has_batches, prune_in_one_shot
from mfac_core.session.session import Session
from mfac_core.settings.pruning import PruningSettings
from mfac_keras.backends import current_backend
from mfac_keras.batchnorm import MovingStatistics
from mfac_keras.conditions import check_built, check_model, checked_verbose, refuse_keras_2
from mfac_keras.live_pruning import KerasPruning
from mfac_keras.recipes import modifiers_of
from mfac_keras.sampling import GradientSampler
from mfac_keras.selection import select_variables

__all__ = ["prune_one_shot"]

_logger = logging.getLogger("mfac_keras")


def prune_one_shot(
    model: Any,
    dataset: Any = None,
    loss: Any = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    *,
    sparsity: float | Mapping[float, Sequence[str]] | None = None,
    recalibrate_batchnorm: bool = False,
    layers_at_once: int | None = None,
    verbose: int | str = 0,
    recipe_variables: Mapping[str, object] | None = None,
    unsupported: Literal["error", "skip"] = "error",
    **recipe_keys: Any,
) -> dict[str, npt.NDArray[np.bool_]]:
    """Prune a trained model in a single pruning step; its weights are changed in place.

    Without a recipe the model is pruned by M-FAC, by the recommended settings
    (:data:`mfac_core.recipe.recommended.RECOMMENDED`) unless a key is given; the log names them.

    Args:
        model: A built Keras model.
        dataset: Batches to sample gradients from, see :class:`mfac_keras.sampling.GradientSampler`; needed by M-FAC.
            Batches smaller than in training tell more about the curvature.
        loss: A Keras loss, its name, or a function ``loss(y_true, y_pred)``; ``None`` is the loss that the model was
            compiled with.
        recipe: Path of a recipe, the text of one, or a :class:`mfac_core.Recipe`; its epochs are ignored.
        sparsity: Without a recipe, the pruned fraction to reach, or a mapping from fractions to the names of variables
            that reach them; ``final_sparsity`` is the same.
        recalibrate_batchnorm: Whether to recalibrate the moving statistics of batch normalization afterwards, as
            :func:`mfac_keras.recalibrate_batchnorm` does, over at most 256 batches of ``dataset``. Otherwise a warning
            says that they are stale.
        layers_at_once: Number of variables whose gradient samples are in memory at one time; ``None`` for all. M-FAC
            prunes groups of so many variables in the order of the model, one after the other. Each group draws samples
            of its own, after the previous one was pruned. Needs ``global_sparsity=False``.
        verbose: 1 prints a line for each modifier, 0 does not.
        recipe_variables: Values that override those of the recipe's variables.
        unsupported: ``error`` refuses modifiers that are known but not supported, such as quantization; ``skip`` leaves
            them out, with a warning.
        **recipe_keys: Instead of a recipe, further keys of an ``MFACPruningModifier``, such as ``params``,
            ``mask_type="2:4"`` or ``num_grads=512``.

    Returns:
        The masks by variable path, True keeps.

    Raises:
        RecipeError: If the recipe or a key is wrong, or the recipe does not prune.
        SettingError: If a setting does not fit the model or ``layers_at_once``.
        TypeError: If neither a recipe nor a sparsity is given, or both, if a recipe is passed as another argument, if
            M-FAC or the recalibration has no dataset, or if the model or the loss is not of Keras 3.
        ValueError: If the model is not built, has no loss, or a batch has an unsupported form.
        NotImplementedError: If there are several processes, and they share the model in a way that is not supported.
        RankError: If there are several processes, and another one has failed or differs.

    After an exception the model is as before.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        >>> data = np.ones([64, 8], "float32"), np.ones([64, 4], "float32")
        >>> masks = prune_one_shot(model, data, "mse", sparsity=0.5, num_grads=4)
        >>> int((model.layers[0].kernel.numpy() == 0).sum())
        16
    """
    check_model(model)
    prints = checked_verbose(verbose)
    refuse_keras_2("the loss", loss)
    check_built(model)
    ranks = current_backend().ranks(model)
    for name, value in {"dataset, the second argument": dataset, "loss, the third argument": loss}.items():
        if _is_recipe(value):
            raise TypeError(f"{name}, is a recipe; pass it by name: prune_one_shot(..., recipe=...)")
    if isinstance(sparsity, str | os.PathLike | Recipe):
        raise TypeError(
            f"sparsity is a {type(sparsity).__name__}; pass a number, such as 0.9, or a recipe by name: "
            "prune_one_shot(..., recipe=...)"
        )
    keys = recipe_keys if sparsity is None else {"sparsity": sparsity, **recipe_keys}
    if recipe is None and keys:
        keys = recommended_keys(recipe_keys, sparsity)
    modifiers = modifiers_of(recipe, keys, recipe_variables, unsupported)
    groups = one_shot_in_order(each for each in modifiers if isinstance(each, PruningSettings))
    settings = [at_once for _, at_once in groups]
    check_has_batches(
        settings,
        dataset,
        recalibrate_batchnorm=recalibrate_batchnorm,
        cure="pass batches (x, y) as dataset: prune_one_shot(model, dataset, ...)",
    )
    sampler = None if dataset is None else GradientSampler(dataset, loss)
    logged: set[str] = set()
    logger = logger_of(ranks, _logger)
    parts = attached_at_once(
        settings,
        lambda each, name: KerasPruning(
            each, model, steps_per_epoch=1, sampler=sampler, verbose=prints, name=name, logged=logged, ranks=ranks
        ),
        layers_at_once=layers_at_once,
        names_of=lambda each: select_variables(model, each.params, each.exclude, logged=logged, logger=logger),
    )
    prunings = tuple(pruning for each in parts for pruning in each)
    given = recipe_keys if sparsity is None else {**recipe_keys, "final_sparsity": sparsity}
    if recipe is None and (line := recommended_line(given)):
        logger.info("%s", line)
    prune_in_one_shot(
        Session(prunings, logger=logger),
        groups,
        MovingStatistics(model, ranks),
        modifiers=[gradual for gradual, _ in groups],
        sampler=sampler,
        recalibrate_batchnorm=recalibrate_batchnorm,
        cure="mfac_keras.recalibrate_batchnorm(model, dataset)",
        parts=parts,
    )
    return combined_masks(pruning.variable_masks for pruning in prunings)


def _is_recipe(value: Any) -> bool:
    is_text = isinstance(value, str) and ("\n" in value or value.endswith((".yaml", ".yml", ".md")))
    return is_text or isinstance(value, os.PathLike | Recipe)
