"""One pruning step on plain arrays."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, check_float, device_of, resolve_devices
from mfac_core.errors import SettingError
from mfac_core.gradient_matrix import GradientMatrix
from mfac_core.mask_patterns import mask_patterns, meant_sparsity
from mfac_core.masks import newly_pruned, part_of_the_way, sparsity_of_zeros
from mfac_core.pruning_step import PruneResult, mfac_step
from mfac_core.settings import (
    MaskType,
    Scope,
    Update,
    check_block_size,
    check_choice,
    check_damping,
    check_number,
    checked_mask_type,
)
from mfac_core.weight_layout import WeightLayout
from mfac_core.window_checks import window_warnings

__all__ = ["prune"]

_logger = logging.getLogger("mfac_core")

_ARRAY = "weights"  # the name of a single array among the mappings below


def prune(
    weights: Array | Mapping[str, Array],
    gradients: Array | Mapping[str, Array],
    *,
    sparsity: float,
    masks: Array | Mapping[str, Array] | None = None,
    block_size: int | None = 2000,
    damping: float = 1e-5,
    scope: Scope = "layer",
    mask_type: MaskType = "unstructured",
    update: Update = "independent",
    num_recomputations: int = 1,
    axes: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    devices: Sequence[str | Device] | str | Device = ("cpu",),
) -> PruneResult:
    """Prune weights to a sparsity by M-FAC, in one pruning step.

    The weights that ``masks`` keeps are concatenated in order and cut into Fisher blocks.

    Args:
        weights: One array, or a mapping from name to array; float32 or float64, NumPy or CuPy. Not modified.
        gradients: One gradient sample per row: shape ``(m, n)`` for all ``n`` weights in order, or, in the form of
            ``weights``, arrays of shape ``(m, *shape)``. Not modified.
        sparsity: Pruned fraction to reach, in ``[0, 1)``: exactly ``round(n * sparsity)`` zeros, per layer or over
            all weights according to ``scope``. Where it is reached already, nothing changes.
        masks: Which weights are unpruned so far (True), in the form of ``weights``; ``None`` means all.
        block_size: Weights per Fisher block; ``None`` means one block.
        damping: Added to the diagonal of the empirical Fisher, positive.
        scope: Where saliencies compete: within each ``layer``, or ``global`` over all weights.
        mask_type: Pattern of the zeros: ``unstructured``, ``channel``, ``filter``, ``block4``, ``N:M`` or the shape of
            a block; for their rules see :func:`mfac_core.masks.newly_pruned`.
        update: ``independent`` (the paper's) or ``joint`` (exact OBS for the pruned set).
        num_recomputations: In how many equal parts the sparsity is reached, each by a Fisher of its own over what
            remains.
        axes: Permutation that brings the axes of an array into the order (output, kernel..., input), or a mapping from
            name to permutation; for arrays whose layout is not (output, input, kernel...). The axes of outputs and
            inputs alone mean that the others number separate matrices, as in a stack of experts.
        devices: Where the blocks are computed.

    Returns:
        Weights and masks in the form and on the device of ``weights``, the sparsity reached, and the predicted
        loss increase: the sum over the parts, in-sample.

    Raises:
        TypeError: If an argument is not an array.
        ValueError: If shapes or names do not fit, a setting is out of range, or a gradient holds NaN or Inf.
        SettingError: If the mask type does not fit the shape of an array.
        DeviceError: If a device does not exist.
        IllConditionedError: If a block cannot be inverted accurately.

    Example:
        >>> import numpy as np
        >>> gradients = np.random.default_rng(0).standard_normal((32, 4))
        >>> result = prune(np.array([0.1, 2.0, -0.2, 3.0]), gradients, sparsity=0.5)
        >>> result.masks.tolist(), result.sparsity
        ([False, True, False, True], 0.5)
    """
    check_number("sparsity", sparsity, "0 <= sparsity < 1; 0.9 prunes nine weights of ten", lambda x: 0 <= x < 1)
    check_choice("scope", scope, get_args(Scope))
    check_choice("update", update, get_args(Update))
    check_block_size(block_size)
    check_damping(damping)
    if isinstance(num_recomputations, bool) or not isinstance(num_recomputations, Integral) or num_recomputations < 1:
        raise SettingError(
            "num_recomputations", f"{num_recomputations!r} must be a positive integer; 1 computes the Fisher once"
        )
    mask_type = checked_mask_type(mask_type, [sparsity])
    sparsity = meant_sparsity(mask_type, float(sparsity)) if sparsity else 0.0

    named = _named(weights)
    for array in (*named.values(), *_named(gradients).values(), *(() if masks is None else _named(masks).values())):
        device_of(array)  # refuses what is not an array
    for name, array in named.items():
        check_float(f"weights[{name!r}]" if isinstance(weights, Mapping) else "weights", array)
    layout = WeightLayout({name: tuple(array.shape) for name, array in named.items()})
    patterns = mask_patterns(mask_type, layout.shapes, _named_axes(axes))
    vector = layout.flatten(named)
    kept = _kept(masks, layout)
    layout.check_finite(vector, kept, "prune from finite weights, or mask these")
    gradient_parts = _gradient_parts(gradients, weights, layout)
    vector[~kept] = 0
    for warning in window_warnings(GradientMatrix(gradient_parts, kept, block_size=block_size), damping=damping):
        _logger.warning(warning)
    increase = 0.0
    for parts_left in range(int(num_recomputations), 0, -1):
        reached = sparsity_of_zeros(~kept, layout.segments, scope, patterns)
        wanted = part_of_the_way(reached, sparsity, parts_left)
        source = GradientMatrix(gradient_parts, kept, block_size=block_size)
        if not source.num_weights:
            break
        updated, chosen, part_increase = mfac_step(
            vector[kept],
            source,
            partial(newly_pruned, kept=kept, sparsity=wanted, segments=layout.segments, scope=scope, patterns=patterns),
            damping=damping,
            update=update,
            devices=resolve_devices(devices),
        )
        vector[kept] = updated
        kept[kept] = ~chosen
        increase += part_increase
    return PruneResult(
        weights=_like(layout.unflatten_like(vector, named), weights, named),
        masks=_like(layout.unflatten(kept), weights, named),
        sparsity=int(np.count_nonzero(~kept)) / layout.num_weights,
        predicted_loss_increase=increase,
    )


def _named(arrays: Array | Mapping[str, Array]) -> Mapping[str, Array]:
    return arrays if isinstance(arrays, Mapping) else {_ARRAY: arrays}


def _named_axes(axes: Sequence[int] | Mapping[str, Sequence[int]] | None) -> Mapping[str, Sequence[int]] | None:
    return axes if axes is None or isinstance(axes, Mapping) else {_ARRAY: axes}


def _kept(masks: Array | Mapping[str, Array] | None, layout: WeightLayout) -> npt.NDArray[np.bool_]:
    if masks is None:
        return np.ones(layout.num_weights, bool)
    named = _named(masks)
    layout.check(named, "masks")
    for name, mask in named.items():
        if np.dtype(mask.dtype) != np.bool_:
            raise ValueError(f"masks[{name!r}] must be boolean (True keeps), got {mask.dtype}")
    return layout.flatten(named)


def _gradient_parts(
    gradients: Array | Mapping[str, Array], weights: Array | Mapping[str, Array], layout: WeightLayout
) -> list[Array]:
    if isinstance(gradients, Mapping):
        if not isinstance(weights, Mapping):
            raise ValueError("gradients is a mapping but weights is one array; pass both in the same form")
        rows = next((tuple(array.shape)[:1] for array in gradients.values()), ())
        layout.check(gradients, "gradients", leading=rows)
        parts = [gradients[name].reshape(rows[0], -1) for name in layout.names]
    elif tuple(gradients.shape[1:]) == (layout.num_weights,):
        parts = [gradients]
    elif not isinstance(weights, Mapping) and tuple(gradients.shape[1:]) == tuple(weights.shape):
        parts = [gradients.reshape(gradients.shape[0], -1)]
    else:
        raise ValueError(
            f"gradients must have one row of {layout.num_weights} numbers per sample, "
            f"got shape {tuple(gradients.shape)}"
        )
    if parts[0].shape[0] == 0:
        raise ValueError("gradients holds no sample; pass at least one row")
    for part in parts:
        check_float("gradients", part)
    wanted = np.result_type(*(part.dtype for part in parts))
    return [array_namespace(part).asarray(part, dtype=wanted) for part in parts]


def _like(arrays: Mapping[str, Any], weights: Array | Mapping[str, Array], named: Mapping[str, Array]) -> Any:
    placed = {name: device_of(named[name]).asarray(array) for name, array in arrays.items()}
    return placed if isinstance(weights, Mapping) else placed[_ARRAY]
