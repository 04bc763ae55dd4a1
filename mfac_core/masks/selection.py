"""Chooses the weights to prune next: the least salient, individually or in groups, per layer or globally."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace, device_of
from mfac_core.fisher.kernels import kth_smallest
from mfac_core.masks.layout import Mask
from mfac_core.masks.patterns import MaskPattern
from mfac_core.ranks.distribution import Distribution
from mfac_core.ranks.smallest import smallest
from mfac_core.schedules.substeps import Sparsity, layer_sparsity
from mfac_core.settings.checks import Scope

__all__ = ["MaskRule", "least_salient", "newly_pruned"]

Vector = npt.NDArray[Any]

_NAN = "a saliency is NaN: the weights contain NaN or Inf; prune from finite weights"


@dataclass(frozen=True)
class MaskRule:
    """The rule by which a mask is chosen: which weights compete, and which are pruned together.

    Args:
        segments: First and one-past-last position of each layer among the ``n`` weights.
        scope: ``layer`` reaches the sparsity in each layer, ``global`` over all.
        patterns: How the weights of each layer are grouped; ``None`` if each is pruned on its own.
    """

    segments: Mapping[str, tuple[int, int]]
    scope: Scope
    patterns: Mapping[str, MaskPattern] | None = None


def newly_pruned(
    saliencies: Array, mask: Mask, sparsity: Sparsity, rule: MaskRule, distribution: Distribution | None = None
) -> Array:
    """Choose the weights to prune so that a sparsity is reached.

    Without patterns exactly ``round(n * sparsity)`` of ``n`` weights are pruned. Groups are ranked by the mean saliency
    of their weights, the loss per pruned weight, so that groups of different sizes can compete; if all have one size,
    this is the order of their sums. Weights that are already pruned count with saliency 0.

    * Groups pruned as a whole: in each layer exactly ``round(groups * sparsity)``; over all weights as many of the
      least salient groups as come closest to ``n * sparsity`` weights, the smaller of two equally close numbers.
    * ``N:M``: in each group the ``M - N`` least salient are candidates. The least salient candidates are pruned until
      ``round(n * sparsity)`` weights are, or all candidates: at ``1 - N/M`` exactly ``N`` of each ``M`` are kept.

    Over several ranks the result is that of one process. Without patterns no rank has all saliencies; groups are ranked
    by those of all ranks.

    Args:
        saliencies: Of the unpruned weights, shape ``(d,)``, on any device; over several ranks of the columns of this
            rank.
        mask: Which of all weights are unpruned so far, shape ``(n,)`` with ``d`` true entries, in host memory.
        sparsity: Pruned fraction to reach, in ``[0, 1]``; one per layer only if the scope is ``layer``.
        rule: Which weights compete, and which are pruned together. Groups are ranked in host memory.
        distribution: The unpruned weights over the ranks, in which case this is collective; ``None`` for one process.

    Returns:
        Which of the unpruned weights are pruned now, in the shape and on the device of the saliencies; none if the
        sparsity is already reached.

    Raises:
        ValueError: If a saliency is NaN, on whatever rank.

    Example:
        >>> s = np.array([3.0, 1.0, 2.0, 0.5])
        >>> newly_pruned(s, np.ones(4, bool), 0.5, MaskRule({"a": (0, 2), "b": (2, 4)}, "layer")).tolist()
        [False, True, False, True]
        >>> newly_pruned(s, np.ones(4, bool), 0.5, MaskRule({"a": (0, 2), "b": (2, 4)}, "global")).tolist()
        [False, True, False, True]
        >>> pairs = {"a": MaskPattern((4,), (0,), outputs=1, inputs=2)}
        >>> newly_pruned(s, np.ones(4, bool), 0.5, MaskRule({"a": (0, 4)}, "layer", pairs)).tolist()
        [False, False, True, True]
    """
    if distribution is not None and distribution.ranks.size == 1:
        distribution = None
    if rule.patterns is not None:
        return _newly_pruned_groups(saliencies, mask, sparsity, rule, rule.patterns, distribution)
    segments = {"all": (0, len(mask))} if rule.scope == "global" else rule.segments
    columns, counts = [], []
    position = 0
    for name, (start, stop) in segments.items():
        unpruned = int(np.count_nonzero(mask[start:stop]))
        pruned = (stop - start) - unpruned
        columns.append((position, position + unpruned))
        counts.append(round((stop - start) * layer_sparsity(sparsity, name)) - pruned)
        position += unpruned
    if distribution is not None:
        return _least_salient_of_all(saliencies, columns, counts, distribution)
    chosen = [least_salient(saliencies[slice(*layer)], count) for layer, count in zip(columns, counts, strict=True)]
    return chosen[0] if len(chosen) == 1 else array_namespace(saliencies).concat(chosen)


def least_salient(saliencies: Array, count: int) -> Array:
    """Choose exactly ``count`` entries with the smallest saliency, and none if ``count`` is below 1.

    Of equal saliencies the first are chosen. The result is boolean, on the same device.

    Raises:
        ValueError: If a saliency is NaN.
    """
    xp = array_namespace(saliencies)
    is_nan = xp.isnan(saliencies)
    if bool(xp.any(is_nan)):
        raise ValueError(_NAN)
    if count <= 0:
        return is_nan
    threshold = kth_smallest(saliencies, count - 1)
    chosen = saliencies < threshold
    # the first of those equal to the threshold fill up the count
    ties = saliencies == threshold
    wanted = count - int(xp.count_nonzero(chosen))
    last = int(xp.nonzero(ties)[0][wanted - 1]) + 1
    chosen[:last] |= ties[:last]
    return chosen


def _least_salient_of_all(
    saliencies: Array, layers: Sequence[tuple[int, int]], counts: Sequence[int], distribution: Distribution
) -> Array:
    """Choose the least salient of each layer, of which this rank has the part that its columns contain."""
    device = device_of(saliencies)
    values = device.to_numpy(saliencies)
    if distribution.ranks.sum(np.array([np.count_nonzero(np.isnan(values))])).any():
        raise ValueError(_NAN)
    first, _ = distribution.columns
    parts = [values[max(start - first, 0) : max(stop - first, 0)] for start, stop in layers]
    return device.asarray(np.concatenate(smallest(distribution.ranks, parts, counts)))


def _newly_pruned_groups(
    saliencies: Array,
    mask: Mask,
    sparsity: Sparsity,
    rule: MaskRule,
    patterns: Mapping[str, MaskPattern],
    distribution: Distribution | None,
) -> Array:
    device = device_of(saliencies)
    # pruned weights have saliency 0 in the means of their groups
    values = np.zeros(len(mask))
    unpruned = device.to_numpy(saliencies)
    values[mask] = unpruned if distribution is None else distribution.complete(unpruned)
    least_salient(values, 0)  # refuses NaN
    chosen = np.zeros(len(mask), bool)
    if rule.scope == "layer":
        for name, (start, stop) in rule.segments.items():
            here, target = slice(start, stop), layer_sparsity(sparsity, name)
            chosen[here] = _choose(values[here], mask[here], [patterns[name]], target, by_groups=True)
    else:
        in_order = [patterns[name] for name in rule.segments]
        chosen = _choose(values, mask, in_order, layer_sparsity(sparsity, "all"), by_groups=False)
    chosen = chosen[mask]
    return device.asarray(chosen if distribution is None else chosen[slice(*distribution.columns)])


def _choose(values: Vector, mask: Mask, patterns: Sequence[MaskPattern], sparsity: float, *, by_groups: bool) -> Mask:
    """Choose among consecutive arrays, each with a pattern of its own."""
    if not len(mask):
        return np.zeros(0, bool)
    unpruned_per_group = patterns[0].unpruned_per_group  # the same for all arrays, as all have one mask type
    if unpruned_per_group is None:
        firsts = np.cumsum([0, *(pattern.num_groups for pattern in patterns)])
        groups = [pattern.groups() + first for pattern, first in zip(patterns, firsts, strict=False)]
        return _choose_groups(values, mask, np.concatenate(groups), sparsity, by_groups=by_groups)
    firsts = np.cumsum([0, *(math.prod(pattern.shape) for pattern in patterns)])
    members = [
        np.where(found < 0, -1, found + first)
        for found, first in zip((pattern.members() for pattern in patterns), firsts, strict=False)
    ]
    return _choose_n_of_m(values, mask, np.concatenate(members), sparsity, unpruned_per_group)


def _choose_groups(values: Vector, mask: Mask, groups: Vector, sparsity: float, *, by_groups: bool) -> Mask:
    sizes = np.bincount(groups)
    means = np.bincount(groups, weights=values) / sizes
    pruned_already = np.bincount(groups, weights=mask) == 0
    means[pruned_already] = -1.0  # first in the order, and counted
    order = np.argsort(means, kind="stable")
    if by_groups:
        count = round(len(sizes) * sparsity)
    else:
        # the number of groups, in order of saliency, whose weights come closest to those wanted
        missed = np.abs(np.cumsum([0, *sizes[order]]) - len(mask) * sparsity)
        count = int(np.argmin(missed))
    pruned = np.zeros(len(sizes), bool)
    pruned[order[:count]] = True
    return np.asarray(pruned[groups])


def _choose_n_of_m(values: Vector, mask: Mask, members: Vector, sparsity: float, unpruned_per_group: int) -> Mask:
    ranked = np.where(mask, values, -1.0)[members]
    ranked[members < 0] = -2.0  # missing inputs of a short group come first, then pruned weights
    first = np.argsort(ranked, axis=1, kind="stable")[:, : members.shape[1] - unpruned_per_group]
    candidates = np.take_along_axis(members, first, axis=1)
    # in the order of the array, so that ties are broken as without a pattern
    candidates = np.sort(candidates[candidates >= 0])
    candidates = candidates[mask[candidates]]
    wanted = round(len(mask) * sparsity) - int(np.count_nonzero(~mask))
    chosen = np.zeros(len(mask), bool)
    chosen[candidates] = least_salient(values[candidates], min(wanted, len(candidates)))
    return chosen
