"""One pruning step on plain arrays."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from mfac_core.backends import (
    Array,
    Device,
    array_library,
    array_namespace,
    check_float,
    device_of,
    numpy_dtype,
    resolve_devices,
)
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.fisher.window_checks import window_warnings
from mfac_core.masks.layout import WeightLayout, scatter_unpruned, take_unpruned, zeros_of
from mfac_core.masks.patterns import mask_patterns, snap_to_n_of_m
from mfac_core.masks.selection import MaskRule, newly_pruned
from mfac_core.masks.sparsity import is_reached, pruned_fraction, sparsity_of_zeros
from mfac_core.pruners.step import PruneResult, mfac_step
from mfac_core.schedules.substeps import num_substeps, substep_sparsity
from mfac_core.settings.checks import (
    Damping,
    MaskType,
    Recomputations,
    Scope,
    Spacing,
    Update,
    check_block_size,
    check_choice,
    check_damping,
    check_number,
    check_recomputations,
    checked_mask_type,
)

__all__ = ["Gradients", "as_given", "by_name", "in_rows", "named_axes", "prune"]

_logger = logging.getLogger("mfac_core")

Gradients = Array | Mapping[str, Array]
"""Gradient samples as rows: one array, or a mapping from name to array."""

_ARRAY = "weights"  # the name of a single array among the mappings below


def prune(
    weights: Array | Mapping[str, Array],
    gradients: Gradients | Callable[..., Gradients],
    *,
    sparsity: float,
    masks: Array | Mapping[str, Array] | None = None,
    block_size: int | None = 2000,
    damping: Damping = "auto",
    scope: Scope = "global",
    mask_type: MaskType = "unstructured",
    update: Update = "joint",
    num_recomputations: Recomputations = "auto",
    recomputation_spacing: Spacing = "geometric",
    axes: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    devices: Sequence[str | Device] | str | Device = ("cpu",),
) -> PruneResult:
    """Prune weights to a sparsity by M-FAC, in one pruning step.

    The weights that ``masks`` keeps are concatenated in order and partitioned into Fisher blocks. The step is done in
    several sub-steps (``num_recomputations``), each by a Fisher of its own over the remaining weights. A sub-step moves
    the weights, and with them the gradients: pass a function that computes fresh ones.

    Args:
        weights: One array, or a mapping from name to array; float32 or float64, of NumPy, CuPy or a registered library
            such as PyTorch. Not modified.
        gradients: One gradient sample per row: shape ``(m, n)`` for all ``n`` weights in order, or, in the form of
            ``weights``, arrays of shape ``(m, *shape)``. Not modified. Or a function that returns such rows: it is
            called before each sub-step, with the weights as they are then, in the form of ``weights``; pruned ones
            are exactly 0. A function without parameters is called without arguments.
        sparsity: Pruned fraction to reach, in ``[0, 1)``: exactly ``round(n * sparsity)`` zeros, per layer or over
            all weights according to ``scope``. If it is reached already, nothing changes.
        masks: Which weights are unpruned so far (True), in the form of ``weights``; ``None`` means all.
        block_size: Weights per Fisher block; ``None`` means one block.
        damping: Added to the diagonal of the empirical Fisher, positive; or ``auto``, for each block 0.1 times the mean
            of that diagonal, measured for each Fisher. Then the scale of the gradients does not matter.
        scope: Where saliencies compete: within each ``layer``, or ``global`` over all weights.
        mask_type: Pattern of the zeros: ``unstructured``, ``channel``, ``filter``, ``block4``, ``N:M`` or the shape of
            a block; for their rules see :func:`mfac_core.masks.selection.newly_pruned`.
        update: ``independent`` (the paper's) or ``joint`` (exact OBS for the pruned set).
        num_recomputations: Number of sub-steps; ``auto`` takes enough that none removes more than about a fifth of
            what is left. Rows that are given once are shared by all sub-steps, with a warning.
        recomputation_spacing: ``geometric``: each sub-step leaves the same fraction of the weights that it finds;
            ``linear``: each removes the same number of weights.
        axes: Permutation that brings the axes of an array into the order (output, kernel..., input), or a mapping from
            name to permutation; for arrays whose layout is not (output, input, kernel...). The axes of outputs and
            inputs alone mean that the others index separate matrices, as in a stack of experts.
        devices: Where the blocks are computed. ``"cpu"`` means NumPy for arrays of any library, ``"cuda:0"`` a device
            of the library of ``weights``; see :func:`mfac_core.backends.resolve_device`.

    Returns:
        Weights and masks in the form and on the device of ``weights``, the sparsity reached, the predicted
        loss increase (in-sample, summed over the sub-steps), and the damping of the last sub-step.

    Raises:
        TypeError: If an argument is not an array, or the function does not return arrays.
        ValueError: If shapes or names do not fit, a setting is out of range, or a gradient contains NaN or Inf.
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
    check_recomputations(num_recomputations, recomputation_spacing)
    mask_type = checked_mask_type(mask_type, [sparsity])
    sparsity = snap_to_n_of_m(mask_type, float(sparsity)) if sparsity else 0.0

    named = by_name(weights)
    _check_arrays("weights", weights)
    if not callable(gradients):
        _check_arrays("gradients", gradients)
    if masks is not None:
        _check_arrays("masks", masks)
    for name, array in named.items():
        check_float(f"weights[{name!r}]" if isinstance(weights, Mapping) else "weights", array)
    layout = WeightLayout({name: tuple(array.shape) for name, array in named.items()})
    devices = resolve_devices(devices, array_library(named[layout.names[0]]))
    rule = MaskRule(layout.segments, scope, mask_patterns(mask_type, layout.shapes, named_axes(axes)))
    vector = layout.flatten(named)
    mask = _flat_mask(masks, layout)
    layout.check_finite(vector, mask, "prune from finite weights, or mask these")
    vector = scatter_unpruned(take_unpruned(vector, mask), mask)

    def in_form(values: Array) -> Any:
        return as_given(layout.unflatten_like(values, named), weights)

    rows_at = _rows_for_substeps(gradients, weights, layout, in_form)
    # zeros are pruned first, whether a mask has pruned them already or not
    reached = sparsity_of_zeros(zeros_of(vector), rule)
    substeps = num_substeps(reached, sparsity, num_recomputations)
    increase = 0.0
    used_damping = None
    for substeps_left in range(substeps, 0, -1):
        source = GradientMatrix(rows_at(vector), mask, block_size=block_size)
        if not source.num_weights:
            break
        if substeps_left == substeps:
            _warn_of_gradients(source, damping, 1 if callable(gradients) else substeps)
        wanted = substep_sparsity(reached, sparsity, substeps_left, recomputation_spacing)
        updated, chosen, substep_increase, used_damping = mfac_step(
            take_unpruned(vector, mask),
            source,
            partial(newly_pruned, mask=mask, sparsity=wanted, rule=rule),
            damping=damping,
            update=update,
            devices=devices,
        )
        vector = scatter_unpruned(updated, mask)
        mask[mask] = ~device_of(chosen).to_numpy(chosen)
        increase += substep_increase or 0.0
        if is_reached(~mask, sparsity, rule):
            break
        reached = sparsity_of_zeros(zeros_of(vector), rule)
    placed = {name: device_of(named[name]).asarray(each) for name, each in layout.unflatten(mask).items()}
    return PruneResult(
        weights=in_form(vector),
        masks=as_given(placed, weights),
        sparsity=pruned_fraction(mask),
        predicted_loss_increase=increase,
        damping=used_damping,
    )


def by_name(arrays: Array | Mapping[str, Array]) -> Mapping[str, Array]:
    """Return arrays by name; a single one gets a name of its own."""
    return arrays if isinstance(arrays, Mapping) else {_ARRAY: arrays}


def named_axes(axes: Sequence[int] | Mapping[str, Sequence[int]] | None) -> Mapping[str, Sequence[int]] | None:
    """Return permutations of axes by name, with the name that :func:`by_name` gives."""
    return axes if axes is None or isinstance(axes, Mapping) else {_ARRAY: axes}


def _flat_mask(masks: Array | Mapping[str, Array] | None, layout: WeightLayout) -> npt.NDArray[np.bool_]:
    if masks is None:
        return np.ones(layout.num_weights, bool)
    named = by_name(masks)
    layout.check(named, "masks")
    for name, mask in named.items():
        if mask.dtype != array_namespace(mask).bool:
            raise ValueError(f"masks[{name!r}] must be boolean (True keeps), got {mask.dtype}")
    flat = layout.flatten(named)
    return device_of(flat).to_numpy(flat)


def _rows_for_substeps(
    gradients: Gradients | Callable[..., Gradients],
    weights: Array | Mapping[str, Array],
    layout: WeightLayout,
    in_form: Callable[[Array], Any],
) -> Callable[[Array], list[Array]]:
    """Return a function that gives the gradient samples of a sub-step, from the weights as they are then."""
    if not callable(gradients):
        given = _rows_by_array(gradients, weights, layout)
        return lambda vector: given
    draw = gradients
    takes_weights = _takes_weights(draw)

    def drawn(vector: Array) -> list[Array]:
        device = device_of(vector)
        with device.backend.on(device.name):
            copied = array_namespace(vector).asarray(vector, copy=True)  # the function may modify what it gets
        rows = draw(in_form(copied)) if takes_weights else draw()
        _check_arrays("the result of the function gradients", rows)
        return _rows_by_array(rows, weights, layout)

    return drawn


def _takes_weights(function: Callable[..., Any]) -> bool:
    if isinstance(function, type):
        raise TypeError(f"gradients is the class {function.__name__}; pass a function gradients(weights), or an object")
    try:
        signature = inspect.signature(function)
    except ValueError:  # functions of compiled modules may have no signature
        return True
    for arguments in ([None], []):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return bool(arguments)
    raise TypeError(
        f"gradients takes the arguments {signature}, but is called with the weights alone; pass a function "
        "gradients(weights), such as a functools.partial with the other arguments, or a method of an object"
    )


def _check_arrays(what: str, arrays: object) -> None:
    named = arrays.items() if isinstance(arrays, Mapping) else [(None, arrays)]
    for name, array in named:
        try:
            device_of(array)
        except TypeError as error:
            raise TypeError(f"{what if name is None else f'{what}[{name!r}]'}: {error}") from None


def _warn_of_gradients(source: GradientMatrix, damping: Damping, num_sharing: int) -> None:
    """Warn about gradient samples without information, and of sub-steps that share the samples of the first."""
    for warning in window_warnings(source, damping=damping):
        _logger.warning(warning)
    if num_sharing > 1:
        _logger.warning(
            "the %d sub-steps of this pruning step share the given gradients, which belong to the weights before the "
            "first: pass a function gradients(weights) that computes fresh rows for each, or num_recomputations=1",
            num_sharing,
        )


def _rows_by_array(gradients: Gradients, weights: Array | Mapping[str, Array], layout: WeightLayout) -> list[Array]:
    if isinstance(gradients, Mapping):
        if not isinstance(weights, Mapping):
            raise ValueError("gradients is a mapping but weights is one array; pass both in the same form")
        rows = next((tuple(array.shape)[:1] for array in gradients.values()), ())
        layout.check(gradients, "gradients", leading=rows)
        arrays = [in_rows(gradients[name]) for name in layout.names]
    elif tuple(gradients.shape[1:]) == (layout.num_weights,):
        arrays = [gradients]
    elif not isinstance(weights, Mapping) and tuple(gradients.shape[1:]) == tuple(weights.shape):
        arrays = [in_rows(gradients)]
    else:
        raise ValueError(
            f"gradients must have one row of {layout.num_weights} numbers per sample, "
            f"got shape {tuple(gradients.shape)}"
        )
    if arrays[0].shape[0] == 0:
        raise ValueError("gradients contains no sample; pass at least one row")
    for array in arrays:
        check_float("gradients", array)
    wanted, device = np.result_type(*map(numpy_dtype, arrays)), device_of(arrays[0])
    return [device.asarray(device_of(array).move(array, device), wanted) for array in arrays]


def in_rows(gradients: Array) -> Array:
    """Return gradient samples of shape ``(m, *shape)`` as rows, a view where possible."""
    return array_namespace(gradients).reshape(gradients, (gradients.shape[0], math.prod(gradients.shape[1:])))


def as_given(arrays: Mapping[str, Array], weights: Array | Mapping[str, Array]) -> Any:
    """Return arrays in the form in which weights are given: a mapping, or one array."""
    return arrays if isinstance(weights, Mapping) else arrays[_ARRAY]
