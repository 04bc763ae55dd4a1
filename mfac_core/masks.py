"""Which weights are pruned next: the least salient, unstructured, per layer or over all weights in scope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.settings import Scope

__all__ = ["least_salient", "newly_pruned"]


def newly_pruned(
    saliencies: npt.NDArray[Any],
    kept: npt.NDArray[np.bool_],
    sparsity: float,
    segments: Mapping[str, tuple[int, int]],
    scope: Scope,
) -> npt.NDArray[np.bool_]:
    """Choose the weights to prune so that exactly ``round(n * sparsity)`` of ``n`` are pruned.

    Args:
        saliencies: Of the unpruned weights, shape ``(d,)``.
        kept: Which of all weights are unpruned so far, shape ``(n,)`` with ``d`` true entries.
        sparsity: Pruned fraction to reach, in ``[0, 1]``.
        segments: First and one-past-last position of each layer among the ``n`` weights.
        scope: ``layer`` reaches the sparsity in each layer, ``global`` over all.

    Returns:
        Which of the unpruned weights are pruned now, shape ``(d,)``; none where the sparsity is reached already.

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
    chosen = np.zeros(len(saliencies), bool)
    position = 0
    for start, stop in segments.values():
        unpruned = int(np.count_nonzero(kept[start:stop]))
        already = (stop - start) - unpruned
        part = slice(position, position + unpruned)
        chosen[part] = least_salient(saliencies[part], round((stop - start) * sparsity) - already)
        position += unpruned
    return chosen


def least_salient(saliencies: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
    """Choose exactly ``count`` entries with the smallest saliency; of equal ones, those that come first.

    Args:
        saliencies: Shape ``(d,)``.
        count: How many; a count below 1 chooses none.

    Returns:
        Boolean, shape ``(d,)``.

    Raises:
        ValueError: If a saliency is NaN.
    """
    chosen = np.zeros(len(saliencies), bool)
    if np.isnan(saliencies).any():
        raise ValueError("a saliency is NaN: the weights hold NaN or Inf; prune from finite weights")
    if count <= 0:
        return chosen
    threshold = np.partition(saliencies, count - 1)[count - 1]
    chosen[saliencies < threshold] = True
    ties = np.flatnonzero(saliencies == threshold)
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return chosen
