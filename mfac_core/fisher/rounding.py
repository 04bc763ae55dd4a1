"""Rounding errors in both forms of a factor: margins of their estimates, random vectors, the end of refinements."""

from __future__ import annotations

import array_api_compat
import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.fisher.chunks import concat

__all__ = [
    "BOUND_FACTOR",
    "MEASURED",
    "PROBES",
    "REFINEMENTS",
    "SAFETY",
    "bound_factor",
    "check_overflow",
    "columns_to_measure",
    "is_small",
    "random_normal",
    "random_signs",
    "smallest_square",
]

BOUND_FACTOR = 64
"""Margin of the bounds for rounding errors that add up."""

STABLE = 3e4
"""Amplification at which rounding in inverses of panels (``triangular.py``) doubles the bounds; ``dual.py`` derives it.
Over random ensembles a seventh of this growth was observed."""

PROBES = 32
"""Random vectors that measure by how much rounding is amplified in each column."""

MEASURED = 24
"""Columns of each block whose error is measured."""

SAFETY = 12
"""Margin between the error predicted from the columns measured and the largest of all columns. Over random ensembles
the error of a column was at most 9.2 times its prediction, in samples that share a mean, and 6.1 times in others."""

REFINEMENTS = 8
"""Steps, at most, that refine a solve with a float32 factor to float64 (Higham 2002, chapter 12)."""


def bound_factor(amplification: Array) -> Array:
    """Return the bound of rounding errors in units of ``eps amplification``."""
    return BOUND_FACTOR * (1 + amplification / STABLE)


def columns_to_measure(amplified: Array) -> Array:
    """Return :data:`MEASURED` columns of each block, shape ``(n, k)``, given how much each amplifies rounding.

    Half of them are those in which rounding is amplified the most. The others are spread over the rest: if samples
    share a mean, the error does not follow the amplification.
    """
    order = array_namespace(amplified).argsort(-amplified, axis=-1)
    if order.shape[-1] <= MEASURED:
        return order
    half = MEASURED // 2
    rest = order[:, half:]
    return concat([order[:, :half], rest[:, :: rest.shape[-1] // half][:, :half]], axis=-1)


def random_signs(like: Array, count: int) -> Array:
    """Return ``count`` vectors of signs, the same in each call, shape ``(1, k, count)`` for ``like`` of ``(n, k)``."""
    # drawn by NumPy, so that they are the same on every library and device
    drawn = np.random.default_rng(0).choice(np.array([-1, 1], np.int8), (1, like.shape[-1], count))
    return array_namespace(like).asarray(drawn, dtype=like.dtype, device=array_api_compat.device(like))


def random_normal(like: Array, count: int) -> Array:
    """Return ``count`` vectors of standard normal numbers, the same in each call, shape ``(1, k, count)``."""
    drawn = np.random.default_rng(0).standard_normal((1, like.shape[-1], count), np.float32)
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
