"""Rounding errors in both forms of a factor: the margins of their estimates, random probes, refinement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.fisher.chunks import concat, indices

__all__ = [
    "BOUND_FACTOR",
    "Measurement",
    "check_overflow",
    "is_small",
    "measurement",
    "num_refinements",
    "signs",
]

BOUND_FACTOR = 64
"""Rounding errors that add up, with a margin: at most 25 were seen, in samples that share a large mean."""

REFINEMENTS = 8
"""Steps, at most, that refine a solve with a float32 factor to float64 (Higham, chapter 12)."""


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
        most = self.columns // 2
        if order.shape[-1] <= self.columns:
            return order
        rest = order[:, most:]
        return concat([order[:, :most], rest[:, :: rest.shape[-1] // most][:, :most]], axis=-1)


_QUICK = Measurement(probes=24, columns=16, safety=8)
"""Over random ensembles the error of a column was at most 6.3 times its prediction."""

_THOROUGH = Measurement(probes=64, columns=32, safety=4)
"""Over the same ensembles the error of a column was at most 3.4 times its prediction."""

_THOROUGH_FROM = 512
"""Size of the factor from which on a thorough measurement costs little beside it."""


def measurement(size: int) -> Measurement:
    """Return how thoroughly the error is measured, for a factor of ``size`` rows."""
    return _THOROUGH if size >= _THOROUGH_FROM else _QUICK


def signs(like: Array, count: int) -> Array:
    """Return ``count`` vectors of signs that look random, shape ``(1, k, count)`` for ``like`` of shape ``(n, k)``."""
    xp = array_namespace(like)
    rows = indices(like, like.shape[-1])[:, None] + 1
    columns = indices(like, count)[None, :] + 1
    # a generator of numbers in sequence would need the device by name
    hashed = (rows * 2654435761 + columns * 40503 + rows * rows * columns * 97) % 4294967296
    bits = (hashed * 2246822519 % 4294967296) // 65536 % 2
    return xp.asarray(1 - 2 * bits, dtype=like.dtype)[None, :, :]


def num_refinements(dtype: Any, right: Array) -> int:
    """Return the largest number of refinements of a solve with a factor of ``dtype``."""
    xp = array_namespace(right)
    if dtype == xp.float64:
        return 0
    return REFINEMENTS if right.dtype == xp.float64 else 1


def is_small(change: Array, solved: Array) -> bool:
    """Return whether the last refinement of each vector, shape ``(n, k, c)``, was below ten digits."""
    xp = array_namespace(change)
    if change.dtype != xp.float64:
        return True
    return bool(xp.all(xp.max(xp.abs(change), axis=-2) <= 1e-10 * xp.max(xp.abs(solved), axis=-2)))


def check_overflow(x: Array) -> None:
    """Raise ``LinAlgError`` if an entry of ``x`` has overflowed."""
    if not np.isfinite(float(array_namespace(x).max(x))):
        raise np.linalg.LinAlgError("the products of the gradients overflow")
