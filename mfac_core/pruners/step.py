"""One pruning step over the unpruned weights: inverse diagonal, saliency, mask, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mfac_core.backends import Array, Device, array_namespace, device_of, numpy_dtype
from mfac_core.fisher.blockwise import BlockwiseFisher, GradientSource
from mfac_core.fisher.obs import checked_saliency, independent_update, joint_update
from mfac_core.ranks.agreement import gathered, together
from mfac_core.ranks.base import Alone, Ranks
from mfac_core.settings.checks import Damping, Update

__all__ = ["PruneResult", "Selection", "UnprunedOutcome", "magnitude_step", "mfac_step"]

RTOL = 1e-3
"""Largest relative error of the inverse diagonal. It can move only saliencies this close to the threshold to its other
side; other gradient samples would change the saliencies far more."""

Selection = Callable[[Array], Array]
"""Chooses the newly pruned weights by the saliencies of the unpruned ones: a boolean array on the same device."""


@dataclass(frozen=True)
class PruneResult:
    """The result of a pruning step, or of one of its sub-steps.

    Args:
        weights: The updated weights in the form in which they were given: one array or a mapping; pruned ones are
            exactly 0.
        masks: Booleans of the same form and shapes; True keeps.
        sparsity: Pruned fraction of all weights in scope.
        predicted_loss_increase: ``1/2 dw^T F dw`` of the update; ``None`` for magnitude pruning, which has no model
            of the loss. It is in-sample: measured on the gradient samples that chose the update, which it suits best.
            The loss on other data grows by more, often by tens of times, so compare such numbers with each other only.
        resets_optimizer: Whether the optimizer's state for these weights is stale and should be reset.
        completes_step: Whether the pruning step is complete; False after every sub-step but the last.
        measured_loss_change: The change of the loss over the pruning step, on batches other than the gradient
            samples; ``None`` if it was not measured.
        damping: The smallest and the largest damping of a block of the Fisher, the last one if there were several;
            ``None`` if there was none, as in magnitude pruning.

    Example:
        >>> import numpy as np
        >>> from mfac_core import prune
        >>> result = prune(np.array([1.0, -3.0]), np.eye(2), sparsity=0.5)
        >>> result.weights.tolist(), result.masks.tolist(), result.sparsity
        ([0.0, -3.0], [False, True], 0.5)
    """

    weights: Array | Mapping[str, Array]
    masks: Array | Mapping[str, Array]
    sparsity: float
    predicted_loss_increase: float | None
    resets_optimizer: bool = False
    completes_step: bool = True
    measured_loss_change: float | None = None
    damping: tuple[float, float] | None = None


class UnprunedOutcome(NamedTuple):
    """The result of a pruning step or sub-step for the ``d`` weights that were unpruned before it, on their device.

    Of several ranks, each has the result for its own columns; the numbers are those of all.

    Attributes:
        weights: The updated weights, newly pruned ones exactly 0, shape ``(d,)``.
        newly_pruned: Which of them are pruned now, shape ``(d,)``.
        predicted_loss_increase: As in :class:`PruneResult`.
        damping: As in :class:`PruneResult`.
    """

    weights: Array
    newly_pruned: Array
    predicted_loss_increase: float | None = None
    damping: tuple[float, float] | None = None


def mfac_step(
    weights: Array,
    source: GradientSource,
    select: Selection,
    *,
    damping: Damping,
    update: Update,
    devices: Sequence[str | Device] | str | Device,
    ranks: Ranks | None = None,
) -> UnprunedOutcome:
    """Prune by M-FAC saliency and compensate with the OBS update.

    Args:
        weights: Unpruned weights, shape ``(d,)``, on any device; of several ranks, each has its own columns. Not
            modified.
        source: Gradient samples of these weights.
        select: Chooses the newly pruned from the saliencies; collective.
        damping: Added to the diagonal of the empirical Fisher, or ``auto``.
        update: ``independent`` or ``joint``.
        devices: Where the blocks are computed.
        ranks: The processes among which the columns are dealt, by whole blocks.
    """
    ranks = ranks or Alone()
    retain: Literal["never", "once"] = "never" if update == "joint" else "once"
    weights_device = device_of(weights)
    with together(ranks, "measuring the gradients"):
        fisher = BlockwiseFisher(source, damping=damping, devices=devices, rtol=RTOL, retain=retain)
        compute_device = fisher.home
        with compute_device.backend.on(compute_device.name):
            working = compute_device.asarray(weights_device.move(weights, compute_device), source.dtype)
            largest = _largest(working)
    # everything is linear or quadratic in the weights, and their squares may leave the range of the dtype
    scale = _power_of_two(gathered(ranks, [largest]).max())
    fisher.join(ranks)
    with compute_device.backend.on(compute_device.name):
        with together(ranks, "computing the inverse diagonal"):
            working = working / scale
            # in a unit of the Fisher, which does not change the order of saliencies
            inverse_diagonal = fisher.diagonal()
            saliencies = checked_saliency(working, inverse_diagonal)
        chosen = select(saliencies)
        del saliencies
        with together(ranks, "computing the update"):
            if update == "joint":
                change, increase = joint_update(fisher, working, chosen)
            else:
                change, increase = independent_update(fisher, working, chosen, inverse_diagonal)
            newly_pruned = compute_device.move(chosen, weights_device)
            change = compute_device.move(change * scale, weights_device)
            with weights_device.backend.on(weights_device.name):
                updated = _without(newly_pruned, weights_device.asarray(weights + change, numpy_dtype(weights)))
    # a rank without columns has no damping
    limits = fisher.damping_range if source.num_weights else (math.inf, -math.inf)
    increases, smallest, largest_damping = gathered(ranks, [increase, *limits]).T
    increase = float(increases.sum()) * scale * scale
    return UnprunedOutcome(updated, newly_pruned, increase, (float(smallest.min()), float(largest_damping.max())))


def magnitude_step(weights: Array, select: Selection) -> UnprunedOutcome:
    """Prune the smallest of the unpruned weights, chosen by their magnitudes; the others stay as they are."""
    device = device_of(weights)
    with device.backend.on(device.name):
        newly_pruned = select(array_namespace(weights).abs(weights))
        return UnprunedOutcome(_without(newly_pruned, weights), newly_pruned)


def _without(newly_pruned: Array, weights: Array) -> Array:
    xp = array_namespace(weights)
    return xp.where(newly_pruned, xp.zeros_like(weights), weights)


def _largest(x: Array) -> float:
    xp = array_namespace(x)
    return float(xp.max(xp.abs(x))) if x.shape[0] else 0.0


def _power_of_two(largest: float) -> float:
    """Return the power of two below the largest absolute value: divided by it, numbers keep their digits."""
    return math.ldexp(1.0, math.frexp(largest)[1] - 1)
