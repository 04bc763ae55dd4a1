"""Which weights are pruned next: the least salient, alone or in groups, per layer or over all weights in scope."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace, device_of
from mfac_core.masks.patterns import MaskPattern
from mfac_core.schedules.substeps import Sparsity, of_layer
from mfac_core.settings.checks import Scope

__all__ = [
    "is_reached",
    "least_salient",
    "newly_pruned",
    "out_of_reach",
    "reaches",
    "sparsity_of_zeros",
]

Vector = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def newly_pruned(
    saliencies: Array,
    mask: Mask,
    sparsity: Sparsity,
    segments: Mapping[str, tuple[int, int]],
    scope: Scope,
    patterns: Mapping[str, MaskPattern] | None = None,
) -> Array:
    """Choose the weights to prune so that a sparsity is reached.

    Without patterns exactly ``round(n * sparsity)`` of ``n`` are pruned. Groups are ranked by the mean saliency of
    their weights: that is the loss per weight that is gained, and so groups of different sizes can compete; where all
    have one size it is the order of their sums. What is pruned already has saliency 0 and counts.

    * Groups pruned as a whole: in each layer exactly ``round(groups * sparsity)``; over all weights as many of the
      least salient groups as come closest to ``n * sparsity`` weights, of two equally close numbers the smaller.
    * ``N:M``: in each group the ``M - N`` least salient are candidates, and of them the least salient are pruned until
      ``round(n * sparsity)`` weights are, or all candidates: at ``1 - N/M`` exactly ``N`` of each ``M`` stay.

    Args:
        saliencies: Of the unpruned weights, shape ``(d,)``, on any device.
        mask: Which of all weights are unpruned so far, shape ``(n,)`` with ``d`` true entries, in host memory.
        sparsity: Pruned fraction to reach, in ``[0, 1]``; one per layer only where the scope is ``layer``.
        segments: First and one-past-last position of each layer among the ``n`` weights.
        scope: ``layer`` reaches the sparsity in each layer, ``global`` over all.
        patterns: How the weights of each layer are grouped; ``None`` where each stands alone. Groups are ranked in
            host memory.

    Returns:
        Which of the unpruned weights are pruned now, shape ``(d,)``, on the device of the saliencies; none where the
        sparsity is reached already.

    Raises:
        ValueError: If a saliency is NaN.

    Example:
        >>> s = np.array([3.0, 1.0, 2.0, 0.5])
        >>> newly_pruned(s, np.ones(4, bool), 0.5, {"a": (0, 2), "b": (2, 4)}, "layer").tolist()
        [False, True, False, True]
        >>> newly_pruned(s, np.ones(4, bool), 0.5, {"a": (0, 2), "b": (2, 4)}, "global").tolist()
        [False, True, False, True]
        >>> pairs = {"a": MaskPattern((4,), (0,), outputs=1, inputs=2)}
        >>> newly_pruned(s, np.ones(4, bool), 0.5, {"a": (0, 4)}, "layer", pairs).tolist()
        [False, False, True, True]
    """
    if patterns is not None:
        return _newly_pruned_groups(saliencies, mask, sparsity, segments, scope, patterns)
    if scope == "global":
        segments = {"all": (0, len(mask))}
    chosen = []
    position = 0
    for name, (start, stop) in segments.items():
        unpruned = int(np.count_nonzero(mask[start:stop]))
        already = (stop - start) - unpruned
        part = saliencies[position : position + unpruned]
        chosen.append(least_salient(part, round((stop - start) * of_layer(sparsity, name)) - already))
        position += unpruned
    return chosen[0] if len(chosen) == 1 else array_namespace(saliencies).concat(chosen)


def least_salient(saliencies: Array, count: int) -> Array:
    """Choose exactly ``count`` entries with the smallest saliency; of equal ones, those that come first.

    Args:
        saliencies: Shape ``(d,)``, on any device.
        count: How many; a count below 1 chooses none.

    Returns:
        Boolean, shape ``(d,)``, on the same device.

    Raises:
        ValueError: If a saliency is NaN.
    """
    xp = array_namespace(saliencies)
    nowhere = xp.isnan(saliencies)
    if bool(xp.any(nowhere)):
        raise ValueError("a saliency is NaN: the weights hold NaN or Inf; prune from finite weights")
    if count <= 0:
        return nowhere
    ordered = xp.partition(saliencies, count - 1) if hasattr(xp, "partition") else xp.sort(saliencies)
    threshold = ordered[count - 1]
    chosen = saliencies < threshold
    ties = saliencies == threshold
    wanted = count - int(xp.count_nonzero(chosen))
    last = int(xp.nonzero(ties)[0][wanted - 1]) + 1
    chosen[:last] |= ties[:last]
    return chosen


def sparsity_of_zeros(
    zeros: Mask,
    segments: Mapping[str, tuple[int, int]],
    scope: Scope,
    patterns: Mapping[str, MaskPattern] | None = None,
) -> float | dict[str, float]:
    """Return the sparsity that zeros make, in the terms in which :func:`newly_pruned` is asked for one.

    Args:
        zeros: Which of all weights are zero, shape ``(n,)``.
        segments: First and one-past-last position of each layer.
        scope: ``layer`` for one sparsity per layer, ``global`` for one over all.
        patterns: How the weights of each layer are grouped: then only zeros that fit the pattern count, which are
            groups of zeros, or up to ``M - N`` zeros of each ``M``.

    Returns:
        The fraction of zeros, or of groups of zeros, in ``[0, 1]``; per layer a mapping by name.

    Example:
        >>> sparsity_of_zeros(np.array([True, False, False]), {"a": (0, 2), "b": (2, 3)}, "layer")
        {'a': 0.5, 'b': 0.0}
    """
    fitting = _fitting(zeros, segments, scope, patterns)
    if scope == "layer":
        return {name: count / total if total else 0.0 for name, (count, total) in fitting.items()}
    return sum(count for count, _ in fitting.values()) / max(sum(total for _, total in fitting.values()), 1)


def is_reached(
    zeros: Mask,
    sparsity: Sparsity,
    segments: Mapping[str, tuple[int, int]],
    scope: Scope,
    patterns: Mapping[str, MaskPattern] | None = None,
) -> bool:
    """Return whether zeros make up a sparsity, so that :func:`newly_pruned` would choose no other weights.

    Args:
        zeros: Which of all weights are zero or pruned, shape ``(n,)``.
        sparsity: As in :func:`newly_pruned`.
        segments: As in :func:`newly_pruned`.
        scope: As in :func:`newly_pruned`.
        patterns: As in :func:`newly_pruned`; only zeros that fit them count.

    Returns:
        True where it is certain, whatever the saliencies of the others are.

    Example:
        >>> zeros = np.array([True, False, False, False])
        >>> [is_reached(zeros, sparsity, {"a": (0, 4)}, "layer") for sparsity in (0.0, 0.25, 0.5)]
        [True, True, False]
    """
    fitting = _fitting(zeros, segments, scope, patterns)
    if scope == "layer":
        return all(count >= round(total * of_layer(sparsity, name)) for name, (count, total) in fitting.items())
    count, total = (sum(column) for column in zip((0, 0), *fitting.values(), strict=True))
    wanted = total * of_layer(sparsity, "all")
    # the number of whole groups that comes closest depends on which of them is next
    of_groups = any(pattern.kept_of_each is None for pattern in (patterns or {}).values())
    return bool(count >= (wanted if of_groups else round(wanted)))


def reaches(
    segments: Mapping[str, tuple[int, int]], scope: Scope, patterns: Mapping[str, MaskPattern] | None = None
) -> Callable[[Sparsity], tuple[Sparsity, int]]:
    """Return what tells beforehand what :func:`newly_pruned` makes of a sparsity, which prunes whole weights or groups.

    Args:
        segments: As in :func:`newly_pruned`.
        scope: As in :func:`newly_pruned`.
        patterns: As in :func:`newly_pruned`.

    Returns:
        A function of a sparsity: what is reached, as by :func:`sparsity_of_zeros`, and how many weights are kept. Where
        that depends on which groups go, over layers, the most that may be kept.

    Example:
        >>> reaches({"a": (0, 3), "b": (3, 4)}, "layer")(0.4)
        ({'a': 0.3333333333333333, 'b': 0.0}, 3)
    """
    sizes = {name: stop - start for name, (start, stop) in segments.items()}
    of_groups = {
        name: np.bincount(pattern.groups())
        for name, pattern in (patterns or {}).items()
        if pattern.kept_of_each is None and sizes[name]
    }
    most = {name: pattern.most_pruned for name, pattern in (patterns or {}).items()}

    def within_layers(sparsity: Sparsity) -> tuple[Sparsity, int]:
        reached, num_kept = {}, 0
        for name, size in sizes.items():
            total = len(of_groups[name]) if name in of_groups else size
            pruned = min(round(total * of_layer(sparsity, name)), most.get(name, size))
            reached[name] = pruned / total if total else 0.0
            num_kept += size - (int(np.sort(of_groups[name])[:pruned].sum()) if name in of_groups else pruned)
        return reached, num_kept

    def over_all(sparsity: Sparsity) -> tuple[Sparsity, int]:
        total = sum(sizes.values())
        wanted = total * of_layer(sparsity, "all")
        if of_groups:  # at most half a group from it
            pruned = max(0, math.ceil(wanted - max(counts.max() for counts in of_groups.values()) / 2))
        else:
            pruned = min(round(wanted), sum(most.values()) if most else total)
        return pruned / max(total, 1), total - pruned

    return within_layers if scope == "layer" else over_all


def out_of_reach(sparsity: float, scope: Scope, patterns: Mapping[str, MaskPattern] | None) -> dict[str, float]:
    """Return what keeps a sparsity from being reached: arrays whose inputs ``M`` of ``N:M`` does not divide.

    Args:
        sparsity: The sparsity wanted.
        scope: As in :func:`newly_pruned`.
        patterns: As in :func:`newly_pruned`.

    Returns:
        Name and largest sparsity of each array that cannot have the wanted one; none where, with scope ``global``, the
        others make up for it.

    Example:
        >>> patterns = {"a": MaskPattern((2, 3), (0, 1), outputs=1, inputs=4, kept_of_each=2)}
        >>> out_of_reach(0.5, "layer", patterns)
        {'a': 0.3333333333333333}
    """
    most = {name: (pattern.most_pruned, math.prod(pattern.shape)) for name, pattern in (patterns or {}).items()}
    can, total = (sum(column) for column in zip((0, 0), *most.values(), strict=True))
    if scope == "global" and can >= round(total * sparsity):
        return {}
    return {name: can / size for name, (can, size) in most.items() if can < round(size * sparsity)}


def _newly_pruned_groups(
    saliencies: Array,
    mask: Mask,
    sparsity: Sparsity,
    segments: Mapping[str, tuple[int, int]],
    scope: Scope,
    patterns: Mapping[str, MaskPattern],
) -> Array:
    device = device_of(saliencies)
    values = np.zeros(len(mask))
    values[mask] = device.to_numpy(saliencies)
    if np.isnan(values).any():
        raise ValueError("a saliency is NaN: the weights hold NaN or Inf; prune from finite weights")
    chosen = np.zeros(len(mask), bool)
    if scope == "layer":
        for name, (start, stop) in segments.items():
            here = slice(start, stop)
            chosen[here] = _choose(values[here], mask[here], [patterns[name]], of_layer(sparsity, name), by_groups=True)
    else:
        in_order = [patterns[name] for name in segments]
        chosen = _choose(values, mask, in_order, of_layer(sparsity, "all"), by_groups=False)
    return device.asarray(chosen[mask])


def _choose(values: Vector, mask: Mask, patterns: Sequence[MaskPattern], sparsity: float, *, by_groups: bool) -> Mask:
    # the arrays of the patterns stand one after the other
    if not len(mask):
        return np.zeros(0, bool)
    kept_of_each = patterns[0].kept_of_each  # the same for all arrays, as all have one mask type
    if kept_of_each is None:
        firsts = np.cumsum([0, *(pattern.num_groups for pattern in patterns)])
        groups = [pattern.groups() + first for pattern, first in zip(patterns, firsts, strict=False)]
        return _choose_groups(values, mask, np.concatenate(groups), sparsity, by_groups=by_groups)
    firsts = np.cumsum([0, *(math.prod(pattern.shape) for pattern in patterns)])
    members = [
        np.where(found < 0, -1, found + first)
        for found, first in zip((pattern.members() for pattern in patterns), firsts, strict=False)
    ]
    return _choose_n_of_m(values, mask, np.concatenate(members), sparsity, kept_of_each)


def _choose_groups(values: Vector, mask: Mask, groups: Vector, sparsity: float, *, by_groups: bool) -> Mask:
    sizes = np.bincount(groups)
    means = np.bincount(groups, weights=values) / sizes
    pruned_already = np.bincount(groups, weights=mask) == 0
    means[pruned_already] = -1.0
    order = np.argsort(means, kind="stable")
    if by_groups:
        count = round(len(sizes) * sparsity)
    else:
        missed = np.abs(np.cumsum([0, *sizes[order]]) - len(mask) * sparsity)
        count = int(np.argmin(missed))
    pruned = np.zeros(len(sizes), bool)
    pruned[order[:count]] = True
    return np.asarray(pruned[groups])


def _choose_n_of_m(values: Vector, mask: Mask, members: Vector, sparsity: float, kept_of_each: int) -> Mask:
    ranked = np.where(mask, values, -1.0)[members]
    ranked[members < 0] = -2.0  # inputs that are lacking go first, then those that are pruned already
    first = np.argsort(ranked, axis=1, kind="stable")[:, : members.shape[1] - kept_of_each]
    candidates = np.take_along_axis(members, first, axis=1)
    candidates = np.sort(candidates[candidates >= 0])
    candidates = candidates[mask[candidates]]
    wanted = round(len(mask) * sparsity) - int(np.count_nonzero(~mask))
    chosen = np.zeros(len(mask), bool)
    chosen[candidates] = least_salient(values[candidates], min(wanted, len(candidates)))
    return chosen


def _fitting(
    zeros: Mask, segments: Mapping[str, tuple[int, int]], scope: Scope, patterns: Mapping[str, MaskPattern] | None
) -> dict[str, tuple[int, int]]:
    """Return for each array how many zeros fit its pattern and of how many weights; or groups, within layers."""
    fitting = {}
    for name, (start, stop) in segments.items():
        fitting[name] = (int(np.count_nonzero(zeros[start:stop])), stop - start)
        if patterns is not None:
            fitting[name] = _fitting_zeros(zeros[start:stop], patterns[name], by_groups=scope == "layer")
    return fitting


def _fitting_zeros(zeros: Mask, pattern: MaskPattern, *, by_groups: bool) -> tuple[int, int]:
    if not len(zeros):
        return 0, 0
    if pattern.kept_of_each is not None:
        members = pattern.members()
        lacking = members < 0
        most = np.maximum((~lacking).sum(axis=1) - pattern.kept_of_each, 0)
        return int(np.minimum((zeros[members] & ~lacking).sum(axis=1), most).sum()), len(zeros)
    groups = pattern.groups()
    sizes = np.bincount(groups)
    whole = np.bincount(groups, weights=zeros) == sizes
    return (int(whole.sum()), len(sizes)) if by_groups else (int(sizes[whole].sum()), len(zeros))
