"""The sub-steps of a pruning step: how many there are, how far each goes, and when it is due.

Each sub-step has a Fisher of its own over the remaining weights (a recomputation). With geometric spacing each leaves
the same fraction of the weights that it finds, as in the M-FAC paper. With linear spacing each removes the same number,
so that the last ones remove most of what is left: the last of eight on the way to 98% removes 86% of it, where the
quadratic model of the loss does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import overload

from mfac_core.settings.checks import Recomputations, Spacing

__all__ = ["MAX_REMOVED", "Sparsity", "layer_sparsity", "num_substeps", "substep_sparsity", "substep_due"]

Sparsity = float | Mapping[str, float]
"""Pruned fraction: one number, or one per layer by name (with scope ``layer``)."""

MAX_REMOVED = 0.22
"""The largest fraction of what is left that one sub-step removes if the number of sub-steps is ``auto``."""

_NOISE = 1e-9


def num_substeps(current: Sparsity, target: Sparsity, num_recomputations: Recomputations) -> int:
    """Return the number of sub-steps of a pruning step; exactly 1 if the sparsity is reached already.

    Args:
        current: Sparsity now, as :func:`mfac_core.masks.sparsity.sparsity_of_zeros` returns it.
        target: Sparsity of the pruning step; 1 only for a layer of zeros.
        num_recomputations: The number itself; or ``auto`` for the smallest number with which none removes more than
            :data:`MAX_REMOVED` of what is left, in any layer.

    Example:
        >>> [num_substeps(0.0, sparsity, "auto") for sparsity in (0.0, 0.2, 0.9, 0.95, 0.98)]
        [1, 1, 10, 13, 16]
    """
    pairs = [(now, layer_sparsity(target, name)) for name, now in _by_name(current).items()]
    # a layer that keeps nothing has been all zeros from the beginning: these are pruned in any number of sub-steps
    left = [(1 - final) / (1 - now) for now, final in pairs if now < final < 1]
    if not left:
        return 1
    if num_recomputations != "auto":
        return num_recomputations
    return max(1, math.ceil(math.log(min(left)) / math.log(1 - MAX_REMOVED) - _NOISE))


@overload
def substep_sparsity(current: float, target: float, substeps_left: int, spacing: Spacing) -> float: ...
@overload
def substep_sparsity(current: Sparsity, target: Sparsity, substeps_left: int, spacing: Spacing) -> Sparsity: ...
def substep_sparsity(current: Sparsity, target: Sparsity, substeps_left: int, spacing: Spacing) -> Sparsity:
    """Return the sparsity that the next sub-step of a pruning step reaches.

    With ``k`` sub-steps left, each takes the unpruned fraction from ``a`` towards ``b`` by the factor
    ``(b / a) ** (1 / k)`` (geometric), or reduces it by ``(a - b) / k`` (linear).

    Args:
        current: Sparsity now, as :func:`mfac_core.masks.sparsity.sparsity_of_zeros` returns it.
        target: Sparsity of the pruning step, below 1.
        substeps_left: Sub-steps to go, the next one included.
        spacing: ``geometric`` or ``linear``.

    Returns:
        A sparsity for :func:`mfac_core.masks.selection.newly_pruned`; exactly ``target`` for the last sub-step, and if
        it is reached already.

    Example:
        >>> substep_sparsity({"a": 0.0, "b": 0.5}, 0.75, 3, "linear")
        {'a': 0.25, 'b': 0.5833333333333334}
        >>> [round(substep_sparsity(0.0, 0.75, 2, spacing), 3) for spacing in ("geometric", "linear")]
        [0.5, 0.375]
    """
    if substeps_left == 1:
        return target

    def of_next(now: float, final: float) -> float:
        if now >= final:
            return final
        if spacing == "linear":
            return now + (final - now) / substeps_left
        return 1 - (1 - now) * math.pow((1 - final) / (1 - now), 1 / substeps_left)

    if isinstance(current, Mapping):
        return {name: of_next(now, layer_sparsity(target, name)) for name, now in current.items()}
    return of_next(current, layer_sparsity(target, _ALL))


def substep_due(scheduled: int, before: int | None, substep: int, substeps: int, num_gradients: int) -> int:
    """Return the optimizer step at which a sub-step is due, with gradients of training.

    The last sub-step is due at the scheduled step. The others come before it, each ``num_gradients`` steps before the
    next, each with a window of fresh rows; closer if the previous pruning step leaves no room for that. The first
    pruning step does not begin early: all its sub-steps are due at once.

    Args:
        scheduled: The step at which the pruning step is scheduled.
        before: That of the pruning step before; ``None`` for the first.
        substep: Index of the sub-step, from 0.
        substeps: How many there are.
        num_gradients: Rows of the gradient window.

    Example:
        >>> [substep_due(100, 40, substep, 3, num_gradients=16) for substep in range(3)]
        [68, 84, 100]
        >>> [substep_due(100, 40, substep, 3, num_gradients=64) for substep in range(3)]
        [60, 80, 100]
    """
    if before is None:
        return scheduled
    return scheduled - (substeps - 1 - substep) * min(num_gradients, (scheduled - before) // substeps)


_ALL = "all"


def layer_sparsity(sparsity: Sparsity, name: str) -> float:
    """Return the sparsity of one layer."""
    return sparsity[name] if isinstance(sparsity, Mapping) else sparsity


def _by_name(sparsity: Sparsity) -> Mapping[str, float]:
    return sparsity if isinstance(sparsity, Mapping) else {_ALL: sparsity}
