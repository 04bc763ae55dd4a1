"""Rounding errors in both forms of a factor: margins of their estimates, random signs, the end of refinements."""

from __future__ import annotations

from dataclasses import dataclass

import array_api_compat
import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.fisher.chunks import concat

__all__ = [
    "BOUND_FACTOR",
    "REFINEMENTS",
    "Measurement",
    "check_overflow",
    "is_small",
    "measurement",
    "random_signs",
    "smallest_square",
]

BOUND_FACTOR = 64
"""Margin of the bounds for rounding errors that add up."""

REFINEMENTS = 8
"""Steps, at most, that refine a solve with a float32 factor to float64 (Higham 2002, chapter 12)."""


@dataclass(frozen=True)
class Measurement:
    """How thoroughly the error of a block is measured.

    Args:
        probes: Random vectors that measure by how much rounding is amplified in each column.
        columns: Number of columns whose error is measured. Half of them are those in which rounding is amplified the
            most. The others are spread over the rest: if samples share a mean, the error does not follow the
            amplification.
        safety: Margin between the error predicted from these columns and the largest of all columns.
    """

    probes: int
    columns: int
    safety: float

    def choose(self, amplified: Array) -> Array:
        """Return the columns to measure, shape ``(n, k)``, by how much rounding is amplified, shape ``(n, B)``."""
        order = array_namespace(amplified).argsort(-amplified, axis=-1)
        if order.shape[-1] <= self.columns:
            return order
        half = self.columns // 2
        rest = order[:, half:]
        return concat([order[:, :half], rest[:, :: rest.shape[-1] // half][:, :half]], axis=-1)


_QUICK = Measurement(probes=24, columns=16, safety=8)
"""Over random ensembles the error of a column was at most 6.3 times its prediction."""

_THOROUGH = Measurement(probes=64, columns=32, safety=4)
"""Over the same ensembles the error of a column was at most 3.4 times its prediction."""

_THOROUGH_FROM = 512
"""Size of the factor from which on a thorough measurement costs little beside it."""


def measurement(size: int) -> Measurement:
    """Return how thoroughly the error is measured, for a factor of ``size`` rows."""
    return _THOROUGH if size >= _THOROUGH_FROM else _QUICK


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
