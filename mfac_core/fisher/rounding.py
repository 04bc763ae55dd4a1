"""Rounding errors in both forms of a factor: margins of their estimates, random signs, the end of refinements."""

from __future__ import annotations

import array_api_compat
import numpy as np

from mfac_core.backends import Array, array_namespace

__all__ = [
    "BOUND_FACTOR",
    "MEASURED",
    "PROBES",
    "REFINEMENTS",
    "SAFETY",
    "check_overflow",
    "is_small",
    "random_signs",
    "smallest_square",
]

BOUND_FACTOR = 64
"""Margin of the bounds for rounding errors that add up."""

SAFETY = 8
"""Margin between the error predicted from the columns measured and the largest that is possible."""

PROBES = 16
"""Random vectors that measure by how much rounding is amplified in each column."""

MEASURED = 8
"""Columns of each block whose error is measured: those in which rounding is amplified the most."""

REFINEMENTS = 8
"""Steps, at most, that refine a solve with a float32 factor to float64 (Higham 2002, chapter 12)."""


def random_signs(like: Array, count: int) -> Array:
    """Return ``count`` vectors of signs, the same in each call, shape ``(1, k, count)`` for ``like`` of ``(n, k)``."""
    # drawn by NumPy, so that they are the same on every library and device
    drawn = np.random.default_rng(0).choice(np.array([-1, 1], np.int8), (1, like.shape[-1], count))
    return array_namespace(like).asarray(drawn, dtype=like.dtype, device=array_api_compat.device(like))


def is_small(change: Array, solved: Array) -> bool:
    """Return whether the last refinement of each vector, shape ``(n, k, c)``, was below ten digits."""
    xp = array_namespace(change)
    if change.dtype != xp.float64:
        return True
    return bool(xp.all(xp.max(xp.abs(change), axis=-2) <= 1e-10 * xp.max(xp.abs(solved), axis=-2)))


def smallest_square(x: Array) -> float:
    """Return below which number, in the dtype of ``x``, squares may underflow that matter relative to it.

    Relative to a number only squares above ``eps`` times the number matter, and they must be normal numbers.
    """
    limits = array_namespace(x).finfo(x.dtype)
    return float(limits.smallest_normal) / float(limits.eps)


def check_overflow(x: Array) -> None:
    """Raise ``LinAlgError`` if an entry of ``x`` has overflowed."""
    if not np.isfinite(float(array_namespace(x).max(x))):
        raise np.linalg.LinAlgError("the products of the gradients overflow")
