"""Damping ``auto``: a share of the mean diagonal of each block's empirical Fisher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace
from mfac_core.backends.threads import map_on_threads, split_for_threads
from mfac_core.fisher.chunks import width_of
from mfac_core.fisher.kernels import check_has_float64, column_sums_of_squares, wide_dtype
from mfac_core.fisher.rounding import smallest_square
from mfac_core.ranks.base import Alone, Ranks

__all__ = ["AUTO_SHARE", "damping_text", "dampings", "mean_diagonals"]

AUTO_SHARE = 0.1
"""Damping ``auto`` of a block, relative to the mean diagonal of its empirical Fisher."""

MIN_SHARE = 1e-12
"""Lower bound of the mean diagonal of a block, relative to the mean over all weights.

The weights of a block without curvature then have the smallest saliencies, ranked by magnitude among themselves: far
below the others, but not so far that float32 could not represent them.
"""

MIN_DAMPING = 1e-200
"""The smallest damping, for any gradients: float64 can hardly represent the inverse of a smaller one."""

_Vector = npt.NDArray[np.float64]


def mean_diagonals(chunks: Sequence[Array]) -> Array:
    """Return the mean diagonal of the empirical Fisher of each block, shape ``(n,)``, in the widest dtype.

    It is Inf or NaN if the gradients are not finite, or their squares overflow float64.

    Example:
        >>> mean_diagonals([np.array([[[1.0, 3.0], [1.0, 3.0]]])])
        array([5.])
    """
    xp = array_namespace(chunks[0])
    with np.errstate(over="ignore", invalid="ignore"):
        means = _mean_diagonals(chunks, chunks[0].dtype)
        is_held = xp.isfinite(means) & (means >= smallest_square(chunks[0]))
        if chunks[0].dtype != xp.float64 and not bool(xp.all(is_held)):
            check_has_float64(chunks[0])
            means = _mean_diagonals(chunks, xp.float64)
    return means


def dampings(means: Sequence[Array], widths: Sequence[int], ranks: Ranks | None = None) -> tuple[list[_Vector], float]:
    """Return damping ``auto`` of each block, and a power of two near the mean damping.

    In units of that power of two, float32 can represent quantities proportional to the dampings. Without any curvature
    all results are 1.

    Args:
        means: Mean diagonals of the blocks of each group, finite, in host memory.
        widths: Columns of a block of each group.
        ranks: The processes among which the blocks are dealt; the mean is that of all blocks, on every rank.

    Example:
        >>> dampings([np.array([4.0, 12.0]), np.array([0.0])], [2, 1])
        ([array([0.4, 1.2]), array([6.4e-13])], 0.5)
    """
    # weighted by columns, as the last block may be narrower
    ranks = ranks or Alone()
    here = sum(len(mean) * width for mean, width in zip(means, widths, strict=True))
    num_weights = int(ranks.sum(np.array([here]))[0])
    share = sum(float(np.sum(mean)) * (width / num_weights) for mean, width in zip(means, widths, strict=True))
    overall = float(ranks.sum(np.array([share], np.float64))[0])
    if not overall:
        return [np.ones(len(mean)) for mean in means], 1.0
    shares = [AUTO_SHARE * np.maximum(mean, MIN_SHARE * overall) for mean in means]
    # frexp gives a mantissa in [0.5, 1): the unit is the power of two at or below the typical damping
    typical = max(AUTO_SHARE * overall, MIN_DAMPING)
    return [np.maximum(share, MIN_DAMPING) for share in shares], math.ldexp(1.0, math.frexp(typical)[1] - 1)


def damping_text(smallest: float, largest: float) -> str:
    """Return a range of dampings as text: one number if both are written alike.

    Example:
        >>> damping_text(1e-5, 1e-5), damping_text(1e-5, 2e-3)
        ('1e-05', '1e-05 to 0.002')
    """
    return f"{smallest:.3g}" if f"{smallest:.3g}" == f"{largest:.3g}" else f"{smallest:.3g} to {largest:.3g}"


def _mean_diagonals(chunks: Sequence[Array], dtype: Any) -> Array:
    xp = array_namespace(chunks[0])
    total = None
    for chunk in chunks:
        for sums in map_on_threads(column_sums_of_squares, split_for_threads(xp.asarray(chunk, dtype=dtype))):
            block_sums = xp.sum(xp.asarray(sums, dtype=wide_dtype(sums)), axis=-1)
            total = block_sums if total is None else total + block_sums
    return total / (chunks[0].shape[-2] * width_of(chunks))
