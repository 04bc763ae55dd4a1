"""Optimal Brain Surgeon: saliency, weight updates and predicted loss increase.

Notation: ``d`` unpruned weights ``w``, ``F`` the damped empirical Fisher, ``Q`` the newly pruned weights, ``K`` the
others. The joint update minimizes ``1/2 dw^T F dw`` subject to ``dw_Q = -w_Q``, so ``dw_K = F_KK^-1 F_KQ w_Q``. With
``F_KQ = G_K^T G_Q / m`` and ``(m damping I + G_K^T G_K)^-1 G_K^T = G_K^T (m damping I + G_K G_K^T)^-1`` this is the
form of :func:`joint_update`.

References:
    Hassibi and Stork (1993), Second order derivatives for network pruning: Optimal Brain Surgeon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mfac_core.backends import Array, Device, array_namespace, device_of
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.chunks import cache_slices, column_bounds, fisher_quadratic, gradients_times
from mfac_core.fisher.factors import evaluate

__all__ = ["checked_saliency", "independent_update", "joint_update", "saliency"]


def saliency(weights: Array, inverse_diagonal: Array) -> Array:
    r"""Return the predicted loss increase of pruning each weight alone.

    .. math:: \rho_q = \frac{w_q^2}{2\,[F^{-1}]_{qq}}

    Args:
        weights: Unpruned weights, shape ``(d,)``, float32 or float64.
        inverse_diagonal: ``diag(F^-1)``, shape ``(d,)``, positive.

    Returns:
        Saliencies, shape ``(d,)``. Inputs are not modified.

    Raises:
        ValueError: If the shapes differ, a weight is not finite, or an entry of ``inverse_diagonal`` is not positive
            and finite.

    Example:
        >>> import numpy as np
        >>> saliency(np.array([2.0, 1.0]), np.array([0.5, 0.25]))
        array([4., 2.])
    """
    device = device_of(weights)
    weights, inverse_diagonal = (device.asarray(device_of(x).move(x, device)) for x in (weights, inverse_diagonal))
    with device.backend.on(device.name):
        return checked_saliency(weights, inverse_diagonal)


def checked_saliency(weights: Array, inverse_diagonal: Array) -> Array:
    """Return :func:`saliency` of arrays on one device, in the context of that device."""
    xp = array_namespace(weights)
    if tuple(weights.shape) != tuple(inverse_diagonal.shape):
        raise ValueError(
            f"weights and inverse_diagonal must have the same shape, got {tuple(weights.shape)} and "
            f"{tuple(inverse_diagonal.shape)}"
        )
    if not bool(xp.all(xp.isfinite(weights))):
        raise ValueError("weights must be finite, but contain NaN or Inf")
    if not bool(xp.all(xp.isfinite(inverse_diagonal) & (inverse_diagonal > 0))):
        raise ValueError(
            "inverse_diagonal must be positive and finite; the usual cause is too little damping: choose a larger one"
        )
    return weights * weights / (2 * inverse_diagonal)


def independent_update(
    fisher: BlockwiseFisher, weights: Array, newly_pruned: Array, inverse_diagonal: Array
) -> tuple[Array, float]:
    r"""Return the paper's update: the sum of the updates that prune each weight alone.

    .. math:: \delta w = - \sum_{q \in Q} \frac{w_q}{[F^{-1}]_{qq}} F^{-1} e_q, \qquad \delta w_Q = -w_Q

    Args:
        fisher: The Fisher over the unpruned weights.
        weights: Unpruned weights, shape ``(d,)``, on the home device of the Fisher. Not modified.
        newly_pruned: Which of them are pruned now, shape ``(d,)``, same device.
        inverse_diagonal: The result of ``fisher.diagonal()``, shape ``(d,)``, same device.

    Returns:
        The change of each weight, shape ``(d,)``, and the predicted loss increase.
    """
    xp = array_namespace(weights)
    # the sum over Q is one product of F^-1 with these coefficients
    coefficients = xp.where(newly_pruned, weights / inverse_diagonal, xp.zeros_like(weights))

    def updates(index: int, device: Device, chunks: list[Array]) -> Iterator[_Update]:
        factor = fisher.factor(index, device, chunks)
        right = fisher.take(coefficients, index, device)
        # the diagonal is in units of `fisher.unit`, and the factor applies damping F^-1
        right = right * array_namespace(right).asarray(fisher.scale(index, device), dtype=right.dtype)[:, None]
        for blocks in cache_slices(chunks):
            selected, factored = [chunk[blocks, :, :] for chunk in chunks], factor.select_blocks(blocks)
            change = -factored.apply(selected, right[blocks, :, None])[..., 0]
            yield _Update(blocks, selected, change, factored.in_float64)

    return _change(fisher, weights, newly_pruned, updates)


def joint_update(fisher: BlockwiseFisher, weights: Array, newly_pruned: Array) -> tuple[Array, float]:
    r"""Return the update of exact OBS for the whole set of newly pruned weights.

    .. math:: \delta w_K = G_K^T (m \lambda I + G_K G_K^T)^{-1} G_Q w_Q, \qquad \delta w_Q = -w_Q

    Args:
        fisher: The Fisher over the unpruned weights.
        weights: Unpruned weights, shape ``(d,)``, on the home device of the Fisher. Not modified.
        newly_pruned: Which of them are pruned now, shape ``(d,)``, same device.

    Returns:
        The change of each weight, shape ``(d,)``, and the predicted loss increase.
    """
    xp = array_namespace(weights)
    pruned_weights = xp.where(newly_pruned, weights, xp.zeros_like(weights))

    def updates(index: int, device: Device, chunks: list[Array]) -> Iterator[_Update]:
        pruned = fisher.take(pruned_weights, index, device)
        mask = ~fisher.take(newly_pruned, index, device)
        damping = fisher.damping(index, device)  # of the whole block: F_KK is a submatrix of the same F
        for blocks in cache_slices(chunks):
            selected = [chunk[blocks, :, :] for chunk in chunks]
            # a column of zeros adds nothing to G_K G_K^T, and blocks keep one shape however many columns are pruned
            restricted = _zero_columns(selected, mask[blocks, :])
            factored, _ = evaluate(restricted, damping[blocks], fisher.rtol)
            in_float64 = factored.in_float64
            rows = gradients_times(selected, _in_precision(pruned[blocks, :], in_float64))
            yield _Update(blocks, selected, factored.apply_to_rows(restricted, rows), in_float64)

    return _change(fisher, weights, newly_pruned, updates)


@dataclass(frozen=True)
class _Update:
    """The change of the remaining weights of some blocks of a group, and whether these need float64."""

    blocks: slice
    chunks: list[Array]
    change: Array
    in_float64: bool


def _change(
    fisher: BlockwiseFisher,
    weights: Array,
    newly_pruned: Array,
    updates: Callable[[int, Device, list[Array]], Iterator[_Update]],
) -> tuple[Array, float]:
    """Return the changes of all blocks, and the predicted loss increase, ``1/2 dw^T F dw`` of the change as rounded."""
    out = fisher.home.zeros((fisher.source.num_weights,), fisher.source.dtype)
    increases = np.zeros(len(fisher.groups))

    def task(index: int, device: Device, chunks: list[Array]) -> None:
        xp = array_namespace(chunks[0])
        pruned = fisher.take(newly_pruned, index, device)
        negated = -fisher.take(weights, index, device)
        damping = fisher.damping(index, device)
        changes, increase = [], 0.0
        for update in updates(index, device, chunks):
            of_remaining = xp.asarray(update.change, dtype=negated.dtype)
            change = xp.where(pruned[update.blocks, :], negated[update.blocks, :], of_remaining)
            precise = _in_precision(change, update.in_float64)
            quadratic = fisher_quadratic(update.chunks, precise, damping[update.blocks])
            increase += float(xp.sum(quadratic))
            changes.append(change)
        increases[index] = increase
        fisher.put(out, index, device, changes[0] if len(changes) == 1 else xp.concat(changes, axis=0))

    # F is block-diagonal: groups without newly pruned weights do not change
    chosen = fisher.home.to_numpy(newly_pruned)
    fisher.run(task, [i for i, group in enumerate(fisher.groups) if chosen[group.start : group.stop].any()])
    return out, float(increases.sum())


def _in_precision(x: Array, in_float64: bool) -> Array:
    xp = array_namespace(x)
    return xp.asarray(x, dtype=xp.float64) if in_float64 else x


def _zero_columns(chunks: list[Array], mask: Array) -> list[Array]:
    """Return the chunks with zeros in the columns where ``mask``, of shape ``(n, B)``, is false."""
    zeroed = []
    for chunk, (start, stop) in zip(chunks, column_bounds(chunks), strict=True):
        xp = array_namespace(chunk)
        zeroed.append(xp.where(mask[:, None, start:stop], chunk, xp.zeros_like(chunk)))
    return zeroed
