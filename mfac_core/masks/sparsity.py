"""The sparsity of existing zeros, and the sparsity that masks with a pattern can reach."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mfac_core.masks.layout import Mask
from mfac_core.masks.patterns import MaskPattern
from mfac_core.masks.selection import MaskRule
from mfac_core.schedules.substeps import Sparsity, layer_sparsity

__all__ = ["attained_sparsity", "is_reached", "out_of_reach", "pruned_fraction", "sparsity_of_zeros"]


def pruned_fraction(mask: Mask) -> float:
    """Return the pruned fraction of all weights, whatever their pattern."""
    return int(np.count_nonzero(~mask)) / len(mask)


def sparsity_of_zeros(zeros: Mask, rule: MaskRule) -> float | dict[str, float]:
    """Return the sparsity of zeros, as :func:`mfac_core.masks.selection.newly_pruned` counts it.

    Only zeros that fit the patterns count: whole groups, or up to ``M - N`` zeros of each ``M``.

    Args:
        zeros: Which of all weights are zero, shape ``(n,)``.
        rule: Which weights compete, and which are pruned together.

    Returns:
        The fraction of zeros, or of groups of zeros, in ``[0, 1]``; with scope ``layer`` a mapping by name.

    Example:
        >>> sparsity_of_zeros(np.array([True, False, False]), MaskRule({"a": (0, 2), "b": (2, 3)}, "layer"))
        {'a': 0.5, 'b': 0.0}
    """
    fitting = _fitting(zeros, rule)
    if rule.scope == "layer":
        return {name: count / total if total else 0.0 for name, (count, total) in fitting.items()}
    return sum(count for count, _ in fitting.values()) / max(sum(total for _, total in fitting.values()), 1)


def is_reached(zeros: Mask, sparsity: Sparsity, rule: MaskRule) -> bool:
    """Return whether weights that are zero or pruned certainly reach a sparsity, for any other saliencies.

    Then :func:`mfac_core.masks.selection.newly_pruned` by the same rule chooses no other weights.

    Example:
        >>> zeros = np.array([True, False, False, False])
        >>> [is_reached(zeros, sparsity, MaskRule({"a": (0, 4)}, "layer")) for sparsity in (0.0, 0.25, 0.5)]
        [True, True, False]
    """
    fitting = _fitting(zeros, rule)
    if rule.scope == "layer":
        return all(count >= round(total * layer_sparsity(sparsity, name)) for name, (count, total) in fitting.items())
    count, total = (sum(column) for column in zip((0, 0), *fitting.values(), strict=True))
    wanted = total * layer_sparsity(sparsity, "all")
    # which number of whole groups comes closest depends on the size of the next group
    of_groups = any(pattern.unpruned_per_group is None for pattern in (rule.patterns or {}).values())
    return bool(count >= (wanted if of_groups else round(wanted)))


def attained_sparsity(rule: MaskRule) -> Callable[[Sparsity], tuple[Sparsity, int]]:
    """Return a function that predicts the result of :func:`mfac_core.masks.selection.newly_pruned` for a sparsity.

    It returns the sparsity that is reached with whole weights or groups, as :func:`sparsity_of_zeros` measures it, and
    the number of weights kept. If that depends on which groups are pruned, it is the largest possible number.

    Example:
        >>> attained_sparsity(MaskRule({"a": (0, 3), "b": (3, 4)}, "layer"))(0.4)
        ({'a': 0.3333333333333333, 'b': 0.0}, 3)
    """
    sizes = {name: stop - start for name, (start, stop) in rule.segments.items()}
    patterns = rule.patterns or {}
    of_groups = {
        name: np.bincount(pattern.groups())
        for name, pattern in patterns.items()
        if pattern.unpruned_per_group is None and sizes[name]
    }
    most = {name: pattern.max_pruned for name, pattern in patterns.items()}

    def within_layers(sparsity: Sparsity) -> tuple[Sparsity, int]:
        reached, num_kept = {}, 0
        for name, size in sizes.items():
            total = len(of_groups[name]) if name in of_groups else size
            pruned = min(round(total * layer_sparsity(sparsity, name)), most.get(name, size))
            reached[name] = pruned / total if total else 0.0
            num_kept += size - (int(np.sort(of_groups[name])[:pruned].sum()) if name in of_groups else pruned)
        return reached, num_kept

    def over_all(sparsity: Sparsity) -> tuple[Sparsity, int]:
        total = sum(sizes.values())
        wanted = total * layer_sparsity(sparsity, "all")
        if of_groups:  # the closest number of groups misses by at most half of the largest group
            pruned = max(0, math.ceil(wanted - max(counts.max() for counts in of_groups.values()) / 2))
        else:
            pruned = min(round(wanted), sum(most.values()) if most else total)
        return pruned / max(total, 1), total - pruned

    return within_layers if rule.scope == "layer" else over_all


def out_of_reach(sparsity: float, rule: MaskRule) -> dict[str, float]:
    """Return name and largest sparsity of each array that cannot reach ``sparsity``.

    These are arrays whose number of inputs is not a multiple of the ``M`` of ``N:M``; with scope ``global`` there
    are none if the other arrays make up for them.

    Example:
        >>> patterns = {"a": MaskPattern((2, 3), (0, 1), outputs=1, inputs=4, unpruned_per_group=2)}
        >>> out_of_reach(0.5, MaskRule({"a": (0, 6)}, "layer", patterns))
        {'a': 0.3333333333333333}
    """
    most = {name: (pattern.max_pruned, math.prod(pattern.shape)) for name, pattern in (rule.patterns or {}).items()}
    attainable, total = (sum(column) for column in zip((0, 0), *most.values(), strict=True))
    if rule.scope == "global" and attainable >= round(total * sparsity):
        return {}
    return {name: pruned / size for name, (pruned, size) in most.items() if pruned < round(size * sparsity)}


def _fitting(zeros: Mask, rule: MaskRule) -> dict[str, tuple[int, int]]:
    """Return for each array the number of zeros that fit its pattern, and of all weights; per layer, of groups."""
    fitting = {}
    for name, (start, stop) in rule.segments.items():
        fitting[name] = (int(np.count_nonzero(zeros[start:stop])), stop - start)
        if rule.patterns is not None:
            fitting[name] = _fitting_zeros(zeros[start:stop], rule.patterns[name], by_groups=rule.scope == "layer")
    return fitting


def _fitting_zeros(zeros: Mask, pattern: MaskPattern, *, by_groups: bool) -> tuple[int, int]:
    if not len(zeros):
        return 0, 0
    if pattern.unpruned_per_group is not None:
        members = pattern.members()
        exists = members >= 0  # a short group has fewer
        most = np.maximum(exists.sum(axis=1) - pattern.unpruned_per_group, 0)
        return int(np.minimum((zeros[members] & exists).sum(axis=1), most).sum()), len(zeros)
    groups = pattern.groups()
    sizes = np.bincount(groups)
    whole = np.bincount(groups, weights=zeros) == sizes
    return (int(whole.sum()), len(sizes)) if by_groups else (int(sizes[whole].sum()), len(zeros))
