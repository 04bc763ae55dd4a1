"""The sensitivity of the layers of a framework's model: check, sample, measure, restore."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mfac_core.backends import Array, array_namespace, device_of, numpy_dtype
from mfac_core.errors import SettingError
from mfac_core.layer_sensitivity import Sensitivity, sensitivity
from mfac_core.pruners.memory import WindowMemory
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.settings.checks import Damping, MaskType, Recomputations, is_integer
from mfac_core.settings.pruning import MFACSettings
from mfac_core.settings.spellings import RECIPE_SPELLINGS
from mfac_core.weight_names import join_names

__all__ = ["check_rows_fit", "model_sensitivity", "stacked_rows"]

_logger = logging.getLogger("mfac_core")


@contextmanager
def _named_as_in_recipes() -> Iterator[None]:
    """Raise errors about a setting under its name in recipes, which is that of the adapters' arguments too."""
    try:
        yield
    except SettingError as error:
        keys = {field: key for key, field in RECIPE_SPELLINGS.items()}
        key = keys.get(error.field, error.field)
        raise SettingError(key, re.sub(rf"\b{error.field}\b", key, error.message)) from error


@_named_as_in_recipes()
def model_sensitivity(
    weights: Mapping[str, Array],
    *,
    write: Callable[[str, Array], None],
    gradients: Callable[[Sequence[str], int], Iterable[Mapping[str, Array]]],
    loss: Callable[[list[Any]], float],
    batches: Callable[[int], list[Any]],
    axes: Mapping[str, Sequence[int]],
    sparsities: Sequence[float],
    num_grads: int,
    fresh_grads: bool,
    num_recomputations: Recomputations,
    num_batches: int,
    fisher_block_size: int | None,
    damp: Damping,
    mask_type: MaskType,
    progress: bool,
) -> Sensitivity:
    """Measure the sensitivity of a model's layers; then, or after an exception, restore the model's weights.

    Args:
        weights: Name and weights of each layer: copies, which do not change with the model.
        write: Writes an array into the layer with this name.
        gradients: Yields gradient samples of the named layers, as many as requested, at the weights that the model has
            now; samples may be overwritten once the next one is asked for.
        loss: Returns the mean loss over batches at the model's current weights.
        batches: Draws batches to measure the loss on.
        axes: As in :func:`mfac_core.sensitivity`.
        sparsities: As in :func:`mfac_core.sensitivity`.
        num_grads: Gradient samples for each pruning.
        fresh_grads: Whether they are drawn again for each layer and sparsity, or once for all layers.
        num_recomputations: As in :func:`mfac_core.sensitivity`.
        num_batches: How many batches the loss is measured on.
        fisher_block_size: Weights per Fisher block.
        damp: As in :func:`mfac_core.sensitivity`.
        mask_type: As in :func:`mfac_core.sensitivity`.
        progress: As in :func:`mfac_core.sensitivity`.
    """
    if not is_integer(num_batches) or num_batches < 1:
        raise SettingError("num_batches", f"{num_batches!r} must be a positive integer")
    check_rows_fit(weights, num_grads, fisher_block_size, together=not fresh_grads)
    drawn = batches(num_batches)
    written = dict(weights)

    def write_changed(changed: Mapping[str, Array]) -> None:
        for name, array in changed.items():
            if array is not written[name]:
                written[name] = array
                write(name, array)

    def loss_of(pruned: Mapping[str, Array]) -> float:
        write_changed(pruned)
        return loss(drawn)

    def fresh(layer: Mapping[str, Array]) -> dict[str, Array]:
        write_changed({**weights, **layer})
        return stacked_rows(gradients(list(layer), num_grads), num_grads)

    try:
        return sensitivity(
            weights,
            loss_of,
            fresh if fresh_grads else stacked_rows(gradients(list(weights), num_grads), num_grads),
            sparsities=sparsities,
            block_size=fisher_block_size,
            damping=damp,
            num_recomputations=num_recomputations,
            mask_type=mask_type,
            axes=axes,
            devices=device_of(next(iter(weights.values()))).name,
            progress=progress,
        )
    finally:
        write_changed(weights)


def stacked_rows(rows: Iterable[Mapping[str, Array]], count: int) -> dict[str, Array]:
    """Return gradient samples that come one by one, at most ``count``, as an array of shape ``(m, *shape)`` by layer.

    Samples with NaN or Inf are left out, with a warning; it is an error if none is left.

    Example:
        >>> import numpy as np
        >>> stacked_rows(({"a": np.full(2, value)} for value in (1.0, 2.0)), 3)
        {'a': array([[1., 1.],
               [2., 2.]])}
    """
    stacked: dict[str, Array] = {}
    taken = refused = 0
    for row in rows:
        for name, gradient in row.items():
            if name not in stacked:
                stacked[name] = device_of(gradient).zeros((count, *gradient.shape), numpy_dtype(gradient))
            stacked[name][taken] = gradient
        if all(bool(array_namespace(gradient).all(abs(gradient) < math.inf)) for gradient in row.values()):
            taken += 1
        else:
            refused += 1
    if not taken:
        raise ValueError(f"no gradient sample is finite ({refused} contain NaN or Inf); check the loss")
    if refused:
        _logger.warning("gradient samples with NaN or Inf are left out of the sensitivity of %s", join_names(stacked))
    return {name: array[:taken] for name, array in stacked.items()}


def check_rows_fit(weights: Mapping[str, Array], num_gradients: int, block_size: int | None, *, together: bool) -> None:
    """Refuse gradient samples that would not fit into memory: those of all layers ``together``, or of one at a time."""
    if not is_integer(num_gradients):
        raise SettingError("num_gradients", f"{num_gradients!r} must be a positive integer, the same for all layers")
    sizes = [math.prod(array.shape) for array in weights.values()]
    settings = MFACSettings(final_sparsity=0.5, end_epoch=0.0, num_gradients=num_gradients, block_size=block_size)
    device = device_of(next(iter(weights.values())))
    step = ScheduledStep(step=0, epoch=0.0, sparsity=0.5)
    WindowMemory(settings, sum(sizes) if together else max(sizes), [step], live_gradients=False).check(device)
