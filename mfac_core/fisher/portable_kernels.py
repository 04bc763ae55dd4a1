"""The portable form of each kernel of ``kernels.py``, in operations of the array API standard."""

from __future__ import annotations

import array_api_compat

from mfac_core.backends import Array, array_namespace

__all__ = ["SmallFactors", "column_sums_of_squares", "kth_smallest", "lower_gram"]

GRAM_PANEL = 256
"""Rows of a symmetric product that are computed at once if the library does not use the symmetry."""

MAX_FACTOR = 16
"""Rows of the largest matrices that are factored in one call: on a CPU, LAPACK is slow for a batch of larger ones."""


class SmallFactors:
    """Inverse Cholesky factors by one Cholesky factorization of a matrix of twice the size.

    Libraries have no batched triangular inverse, and their general inverse is slow. The factorization

        [A    I ]   [L     0] [L^T  L^-1]
        [I   c I] = [L^-T  M] [0    M^T ],    M M^T = c I - A^-1,

    computes ``L^-T`` below ``L``. It exists if ``c`` exceeds the largest eigenvalue of ``A^-1``.
    """

    def __init__(self, like: Array) -> None:
        self.largest = min(MAX_FACTOR, like.shape[-1])
        # the borders are the same at each call, so only the upper left corner is written again
        self._bordered = {self.largest: _bordered(like, self.largest)}

    def __call__(self, matrices: Array, shift: Array | float) -> tuple[Array, Array]:
        """Return ``L^-1``, C-contiguous, and the diagonal of ``L``."""
        xp = array_namespace(matrices)
        size = matrices.shape[-1]
        if size not in self._bordered:
            self._bordered[size] = _bordered(matrices, size)
        bordered = self._bordered[size]
        bordered[:, :size, :size] = matrices
        bordered[:, :size, :size] += shift * bordered[:, size:, :size]
        both = xp.linalg.cholesky(bordered)
        # a copy in row order: products with a transposed view are several times slower
        inverse = xp.concat([xp.matrix_transpose(both[:, size:, :size])], axis=0)
        # in the flattened matrix of 2 size columns, neighbours on the diagonal are 2 size + 1 apart
        flat = xp.reshape(both, (both.shape[0], -1))
        return inverse, flat[:, : 2 * size * size : 2 * size + 1]


def _bordered(like: Array, size: int) -> Array:
    xp = array_namespace(like)
    zeros = xp.zeros_like(like[:, :size, :size])
    identity = zeros + xp.eye(size, dtype=like.dtype, device=array_api_compat.device(like))
    # any c between ||A^-1|| and overflow will do, as M is thrown away: this is 8e28 in float32, 1e231 in float64
    large = float(xp.finfo(like.dtype).max) ** 0.75
    top = xp.concat([zeros, identity], axis=-1)
    return xp.concat([top, xp.concat([identity, large * identity], axis=-1)], axis=-2)


def lower_gram(x: Array) -> Array:
    """Return the lower triangles of ``x x^T``; the rest is undefined."""
    xp = array_namespace(x)
    count, size, _ = x.shape
    if size <= GRAM_PANEL:
        return x @ xp.matrix_transpose(x)
    # panel by panel, each only up to its diagonal: for many rows half of the multiplications of the full product
    out = xp.zeros_like(xp.broadcast_to(x[:1, :1, :1], (count, size, size)))
    for start in range(0, size, GRAM_PANEL):
        stop = min(start + GRAM_PANEL, size)
        out[:, start:stop, :stop] = x[:, start:stop, :] @ xp.matrix_transpose(x[:, :stop, :])
    return out


def column_sums_of_squares(x: Array) -> Array:
    """Return the sums of squares over the rows of each matrix."""
    return array_namespace(x).sum(x * x, axis=-2)


def kth_smallest(x: Array, k: int) -> Array:
    """Return the number at index ``k`` of the sorted vector."""
    return array_namespace(x).sort(x)[k]
