"""The smallest numbers of vectors that no rank has as a whole: an exact selection, digit by digit.

The bits of a float, read as an integer, have the order of the floats if all bits of a negative one are flipped, and
the sign bit of the others. In a first pass each rank counts how often each value of the leading 8 bits occurs. The sums
of these histograms tell which of them the k-th smallest number has, and the next pass counts among the numbers that
share them. So four sums of 256 counts for each vector find a float32 exactly, whatever the numbers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.ranks.agreement import gathered
from mfac_core.ranks.base import Ranks

__all__ = ["smallest"]

_COUNTED_AT_ONCE = 2**22
"""Digits that one call counts: it makes a copy of them as 8-byte integers."""


def smallest(ranks: Ranks, vectors: Sequence[npt.NDArray[Any]], counts: Sequence[int]) -> list[npt.NDArray[np.bool_]]:
    """Choose exactly ``counts[i]`` of the smallest numbers of the i-th vector, of equal ones those that come first.

    Collective. -0.0 equals 0.0.

    Args:
        ranks: The ranks.
        vectors: The part of each vector that this rank has, float32 or float64, without NaN. The parts of all ranks, in
            the order of ranks, make up the vector.
        counts: How many of each vector are chosen, alike on all ranks; none if it is below 1.

    Returns:
        Booleans of the shapes of ``vectors``.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> [chosen.tolist() for chosen in smallest(Alone(), [np.array([2.0, 1.0, -3.0]), np.array([5.0])], [2, 0])]
        [[False, True, True], [False]]
    """
    chosen = [np.zeros(vector.shape, bool) for vector in vectors]
    wanted = [index for index, count in enumerate(counts) if count > 0]
    if not wanted:
        return chosen
    keys = [_ordered(vectors[index]) for index in wanted]
    found, num_equal, left = _kth_smallest(ranks, keys, [counts[index] - 1 for index in wanted])
    # those equal to the k-th smallest fill up the count, in the order of ranks
    equal = gathered(ranks, [len(each) for each in left])
    before = equal[: ranks.rank].sum(axis=0)
    here = np.clip(num_equal - before, 0, equal[ranks.rank])
    for index, key, of_vector, num_here in zip(wanted, found, keys, here, strict=True):
        np.less(of_vector, key, out=chosen[index])
        chosen[index][np.flatnonzero(of_vector == key)[:num_here]] = True
    return chosen


def _ordered(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return unsigned integers that are ordered as the numbers are."""
    dtype = np.dtype(f"u{values.itemsize}")
    sign = dtype.type(1 << (8 * dtype.itemsize - 1))
    keys = values.view(dtype)
    keys = np.where(keys == sign, dtype.type(0), keys)  # -0.0
    return np.where(keys >= sign, ~keys, keys | sign)


def _kth_smallest(
    ranks: Ranks, keys: list[npt.NDArray[Any]], indices: Sequence[int]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], list[npt.NDArray[Any]]]:
    """Return the key at an index of each sorted vector, the number of equal ones up to it, and those of this rank."""
    found = np.zeros(len(keys), keys[0].dtype)
    position = np.asarray(indices, np.int64)
    each = np.arange(len(keys))
    left = keys
    for shift in range(8 * found.itemsize - 8, -1, -8):
        digits = [(of_vector >> shift).astype(np.uint8) for of_vector in left]  # the lowest 8 bits are left
        up_to = np.cumsum(ranks.sum(np.stack([_histogram(of_vector) for of_vector in digits])), axis=1)
        digit = np.argmax(up_to > position[:, None], axis=1)
        position -= np.where(digit > 0, up_to[each, digit - 1], 0)
        left = [of_vector[here == at] for of_vector, here, at in zip(left, digits, digit, strict=True)]
        found |= digit.astype(found.dtype) << shift
    return found, position + 1, left


def _histogram(digits: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    counts = np.zeros(256, np.int64)
    for start in range(0, len(digits), _COUNTED_AT_ONCE):
        counts += np.bincount(digits[start : start + _COUNTED_AT_ONCE], minlength=256)
    return counts
