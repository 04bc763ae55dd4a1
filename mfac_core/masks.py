"""Which weights are pruned next: the least salient, unstructured, per layer or over all weights in scope."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace
from mfac_core.settings import Scope

__all__ = ["least_salient", "newly_pruned"]


def newly_pruned(
    saliencies: Array,
    kept: npt.NDArray[np.bool_],
    sparsity: float,
    segments: Mapping[str, tuple[int, int]],
    scope: Scope,
) -> Array:
    """Choose the weights to prune so that exactly ``round(n * sparsity)`` of ``n`` are pruned.

    Args:
        saliencies: Of the unpruned weights, shape ``(d,)``, on any device.
        kept: Which of all weights are unpruned so far, shape ``(n,)`` with ``d`` true entries, in host memory.
        sparsity: Pruned fraction to reach, in ``[0, 1]``.
        segments: First and one-past-last position of each layer among the ``n`` weights.
        scope: ``layer`` reaches the sparsity in each layer, ``global`` over all.

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
    """
    if scope == "global":
        segments = {"all": (0, len(kept))}
    chosen = []
    position = 0
    for start, stop in segments.values():
        unpruned = int(np.count_nonzero(kept[start:stop]))
        already = (stop - start) - unpruned
        part = saliencies[position : position + unpruned]
        chosen.append(least_salient(part, round((stop - start) * sparsity) - already))
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
