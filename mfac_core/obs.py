"""Optimal Brain Surgeon: saliency, weight updates and predicted loss increase.

Notation: ``d`` unpruned weights ``w``, ``F`` the damped empirical Fisher, ``Q`` the weights that are newly pruned.

References:
    Hassibi and Stork (1993), Second order derivatives for network pruning: Optimal Brain Surgeon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace
from mfac_core.blockwise import BlockwiseFisher
from mfac_core.inverse_fisher import factor, fisher_quadratic, gradients_times

__all__ = ["independent_update", "joint_update", "saliency"]

Vector = npt.NDArray[Any]


def saliency(weights: Array, inverse_diagonal: Array) -> Array:
    r"""Return how much the loss model grows when each weight alone is pruned.

    .. math:: \rho_q = \frac{w_q^2}{2\,[F^{-1}]_{qq}}

    Args:
        weights: Unpruned weights, shape ``(d,)``, float32 or float64.
        inverse_diagonal: ``diag(F^-1)``, shape ``(d,)``, positive, same device.

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
    xp = array_namespace(weights)
    if tuple(weights.shape) != tuple(inverse_diagonal.shape):
        raise ValueError(
            f"weights and inverse_diagonal must have one shape, got {tuple(weights.shape)} and "
            f"{tuple(inverse_diagonal.shape)}"
        )
    if not bool(xp.all(xp.isfinite(weights))):
        raise ValueError("weights must be finite, but hold NaN or Inf")
    if not bool(xp.all(xp.isfinite(inverse_diagonal) & (inverse_diagonal > 0))):
        raise ValueError(
            "inverse_diagonal must be positive and finite; the usual cause is too little damping: choose a larger one"
        )
    return weights * weights / (2 * inverse_diagonal)


def independent_update(
    fisher: BlockwiseFisher, weights: Vector, newly_pruned: npt.NDArray[np.bool_], inverse_diagonal: Vector
) -> tuple[Vector, float]:
    r"""Return the paper's update: the sum of the updates that prune each weight alone.

    .. math:: \delta w = - \sum_{q \in Q} \frac{w_q}{[F^{-1}]_{qq}} F^{-1} e_q, \qquad \delta w_Q = -w_Q

    Args:
        fisher: The Fisher over the unpruned weights.
        weights: Unpruned weights, shape ``(d,)``, host memory. Not modified.
        newly_pruned: Which of them are pruned now, shape ``(d,)``.
        inverse_diagonal: ``diag(F^-1)``, shape ``(d,)``.

    Returns:
        The change of each weight, shape ``(d,)``, and the predicted loss increase.
    """
    shares = np.where(newly_pruned, weights / inverse_diagonal, 0)

    def update(index: int, device: Device, chunks: list[Array]) -> Vector:
        return -fisher.on_group(index, device, fisher.factor(index, chunks).apply, shares[fisher.columns(index)])

    return _change(fisher, weights, newly_pruned, update)


def joint_update(fisher: BlockwiseFisher, weights: Vector, newly_pruned: npt.NDArray[np.bool_]) -> tuple[Vector, float]:
    r"""Return the update of exact OBS for the whole set of newly pruned weights.

    .. math:: \delta w_K = G_K^T (m \lambda I + G_K G_K^T)^{-1} G_Q w_Q, \qquad \delta w_Q = -w_Q

    Args:
        fisher: The Fisher over the unpruned weights.
        weights: Unpruned weights, shape ``(d,)``, host memory. Not modified.
        newly_pruned: Which of them are pruned now, shape ``(d,)``.

    Returns:
        The change of each weight, shape ``(d,)``, and the predicted loss increase.
    """
    pruned = np.where(newly_pruned, weights, 0)

    def update(index: int, device: Device, chunks: list[Array]) -> Vector:
        chunks = fisher.chunks_in_precision(index, chunks)
        kept = device.asarray(~newly_pruned[fisher.columns(index)].reshape(fisher.source.groups[index].count, -1))
        restricted = factor(_zero_columns(chunks, kept), fisher.damping)

        def kept_update(pruned_weights: Array) -> Array:
            return restricted.apply_to_rows(gradients_times(chunks, pruned_weights))

        return fisher.on_group(index, device, kept_update, pruned[fisher.columns(index)])

    return _change(fisher, weights, newly_pruned, update)


def _change(
    fisher: BlockwiseFisher,
    weights: Vector,
    newly_pruned: npt.NDArray[np.bool_],
    update: Callable[[int, Device, list[Array]], Vector],
) -> tuple[Vector, float]:
    out = np.zeros_like(weights)
    increases = np.zeros(len(fisher.source.groups))

    def task(index: int, device: Device, chunks: list[Array]) -> None:
        columns = fisher.columns(index)
        change = np.where(newly_pruned[columns], -weights[columns], update(index, device, chunks))
        out[columns] = change
        chunks = fisher.chunks_in_precision(index, chunks)

        def quadratic(x: Array) -> Array:
            return fisher_quadratic(chunks, x, fisher.damping)

        increases[index] = fisher.on_group(index, device, quadratic, change).sum()

    groups = fisher.source.groups
    fisher.run(task, [i for i, group in enumerate(groups) if newly_pruned[group.start : group.stop].any()])
    return out, float(increases.sum())


def _zero_columns(chunks: list[Array], kept: Array) -> list[Array]:
    zeroed = []
    start = 0
    for chunk in chunks:
        xp = array_namespace(chunk)
        columns = kept[:, None, start : start + chunk.shape[-1]]
        zeroed.append(xp.where(columns, chunk, xp.zeros_like(chunk)))
        start += chunk.shape[-1]
    return zeroed
