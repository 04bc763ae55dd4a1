"""Counts the zeros of a run from the weights, and not from the masks alone.

Between two steps, other code may write to a model: the best epoch is restored, an average replaces the weights, an
optimizer that is not watched makes a step. A mask says which weights were pruned; only the weights say which are zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from mfac_core.backends import Array, array_namespace, device_of
from mfac_core.weight_names import join_names

__all__ = ["ZeroCount", "count_zeros"]


class ZeroCount(NamedTuple):
    """How many weights the masks prune, and how many of those are zero.

    Attributes:
        weights: Number of all weights in scope.
        pruned: How many of them the masks prune.
        regrown: Name of each weight array in which pruned entries are not zero -> how many.
    """

    weights: int
    pruned: int
    regrown: Mapping[str, int]

    @property
    def num_regrown(self) -> int:
        """Pruned weights that are not zero."""
        return sum(self.regrown.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the weights in scope that is pruned, and zero."""
        return (self.pruned - self.num_regrown) / self.weights if self.weights else 0.0

    @property
    def sparsity_of_masks(self) -> float:
        """Fraction of the weights in scope that the masks prune, for any values."""
        return self.pruned / self.weights if self.weights else 0.0

    def difference(self) -> str:
        """Return in a sentence how the weights differ from the masks; an empty string if they agree."""
        if not self.regrown:
            return ""
        return (
            f"{self.num_regrown:,} of {self.pruned:,} pruned weights are not zero ({join_names(self.regrown)}): the "
            f"sparsity is {self.sparsity:.4f}, but {self.sparsity_of_masks:.4f} according to the masks"
        )


def count_zeros(weights: Mapping[str, Array], masks: Mapping[str, Array]) -> ZeroCount:
    """Count the zeros of pruned weights.

    Args:
        weights: Name and array of each weight array in scope, of any shape, on any device. NaN is not zero.
        masks: Name and mask (True keeps) of each array, of its shape, on its device or in host memory. Nothing is
            pruned of an array without a mask.

    Example:
        >>> import numpy as np
        >>> count = count_zeros({"w": np.array([0.0, 2.0, 3.0, 4.0])}, {"w": np.array([False, False, True, True])})
        >>> count.sparsity, count.difference()
        (0.25, '1 of 2 pruned weights are not zero (w): the sparsity is 0.2500, but 0.5000 according to the masks')
    """
    pruned, regrown = 0, {}
    for name, mask in masks.items():
        array = weights[name]
        xp, device = array_namespace(array), device_of(array)
        with device.backend.on(device.name):
            is_pruned = ~device.asarray(mask)
            pruned += int(xp.count_nonzero(is_pruned))
            alive = int(xp.count_nonzero(is_pruned & (array != 0)))
        if alive:
            regrown[name] = alive
    return ZeroCount(sum(math.prod(array.shape) for array in weights.values()), pruned, regrown)
