"""Batched Cholesky factors and triangular solves, written as matrix products panel by panel.

BLAS and LAPACK offer these only for one matrix at a time, hold the interpreter lock, or run far below the speed
of the matrix product; panels turn nearly all of the work into matrix products of the array's own library.
"""

from __future__ import annotations

from typing import Any

from mfac_core.backends import Array, array_namespace

__all__ = ["PANEL", "TriangularFactor", "cholesky", "diagonals"]

PANEL = 64
"""Rows that are solved at once, by an explicit inverse of their diagonal panel."""

SMALLEST = 16
"""Triangular matrices up to this size are inverted by the library, larger ones in halves."""


class TriangularFactor:
    """Lower-triangular factors ``L`` of a batch of matrices ``L L^T``; made by :func:`cholesky`.

    Args:
        lower: Shape ``(n, k, k)``; entries above the panel diagonal are ignored.
        panel_inverses: Inverses of the diagonal panels, each of shape ``(n, p, p)``.
    """

    def __init__(self, lower: Array, panel_inverses: list[Array]) -> None:
        self.lower = lower
        self.panel_inverses = panel_inverses

    def astype(self, dtype: Any) -> TriangularFactor:
        """Return the factor in another floating dtype."""
        xp = array_namespace(self.lower)
        return TriangularFactor(
            xp.asarray(self.lower, dtype=dtype), [xp.asarray(p, dtype=dtype) for p in self.panel_inverses]
        )

    def pivots(self) -> Array:
        """Return the squared diagonal entries of ``L``, shape ``(n, k)``."""
        return diagonals(self.lower) ** 2

    def solve(self, b: Array) -> Array:
        """Return ``L^-1 b``.

        Args:
            b: Shape ``(n, k, c)``, dtype of the factor.

        Returns:
            A new array of the same shape.
        """
        xp = array_namespace(b)
        out = xp.empty_like(b)
        for i, inverse in enumerate(self.panel_inverses):
            rows = slice(i * PANEL, i * PANEL + inverse.shape[-1])
            right = b[:, rows, :]
            if i:
                right = right - self.lower[:, rows, : rows.start] @ out[:, : rows.start, :]
            out[:, rows, :] = inverse @ right
        return out

    def solve_transposed(self, b: Array) -> Array:
        """Return ``L^-T b``.

        Args:
            b: Shape ``(n, k, c)``, dtype of the factor.

        Returns:
            A new array of the same shape.
        """
        xp = array_namespace(b)
        out = xp.empty_like(b)
        for i in range(len(self.panel_inverses) - 1, -1, -1):
            inverse = self.panel_inverses[i]
            rows = slice(i * PANEL, i * PANEL + inverse.shape[-1])
            right = b[:, rows, :]
            if rows.stop < b.shape[-2]:
                right = right - xp.matrix_transpose(self.lower[:, rows.stop :, rows]) @ out[:, rows.stop :, :]
            out[:, rows, :] = xp.matrix_transpose(inverse) @ right
        return out

    def inverse(self) -> Array:
        """Return ``L^-1``, shape ``(n, k, k)``, lower triangular."""
        xp = array_namespace(self.lower)
        out = xp.zeros_like(self.lower)
        for i, inverse in enumerate(self.panel_inverses):
            rows = slice(i * PANEL, i * PANEL + inverse.shape[-1])
            out[:, rows, rows] = inverse
            if i:
                left = self.lower[:, rows, : rows.start] @ out[:, : rows.start, : rows.start]
                out[:, rows, : rows.start] = -(inverse @ left)
        return out


def cholesky(matrices: Array, shift: float) -> TriangularFactor:
    """Factor ``matrices + shift * I``.

    Args:
        matrices: Symmetric, shape ``(n, k, k)``; only the lower triangle is read. Overwritten.
        shift: Added to the diagonal.

    Returns:
        The lower-triangular factors.

    Raises:
        numpy.linalg.LinAlgError: If a matrix is not positive definite (NumPy; a GPU gives NaN instead).

    Example:
        >>> import numpy as np
        >>> cholesky(np.array([[[3.0]]]), shift=1.0).lower
        array([[[2.]]])
    """
    xp = array_namespace(matrices)
    size = matrices.shape[-1]
    identity = _identity_like(matrices[:1, : min(PANEL, size), : min(PANEL, size)])
    inverses = []
    for start in range(0, size, PANEL):
        rows = slice(start, min(start + PANEL, size))
        if start:
            left = matrices[:, rows.start :, :start]
            matrices[:, rows.start :, rows] -= left @ xp.matrix_transpose(matrices[:, rows, :start])
        width = rows.stop - rows.start
        panel = xp.linalg.cholesky(matrices[:, rows, rows] + shift * identity[:, :width, :width])
        inverses.append(_inverse_of_lower(panel))
        matrices[:, rows, rows] = panel
        if rows.stop < size:
            below = matrices[:, rows.stop :, rows]
            matrices[:, rows.stop :, rows] = below @ xp.matrix_transpose(inverses[-1])
    return TriangularFactor(matrices, inverses)


def diagonals(matrices: Array) -> Array:
    """Return the diagonals of a batch of square matrices.

    Args:
        matrices: Shape ``(n, k, k)``.

    Returns:
        Shape ``(n, k)``.
    """
    xp = array_namespace(matrices)
    count, size = matrices.shape[:2]
    return xp.reshape(matrices, (count, size * size))[:, :: size + 1]


def _inverse_of_lower(panel: Array) -> Array:
    # halves down to a size where the general inverse of the library is cheap
    xp = array_namespace(panel)
    size = panel.shape[-1]
    if size <= SMALLEST:
        return xp.linalg.inv(panel)
    half = size // 2
    upper = _inverse_of_lower(panel[:, :half, :half])
    lower = _inverse_of_lower(panel[:, half:, half:])
    out = xp.zeros_like(panel)
    out[:, :half, :half] = upper
    out[:, half:, half:] = lower
    out[:, half:, :half] = -(lower @ (panel[:, half:, :half] @ upper))
    return out


def _identity_like(x: Array) -> Array:
    # xp.eye would need the device by name, in a spelling that differs between libraries
    xp = array_namespace(x)
    ones = xp.ones_like(x)
    return xp.tril(ones) - xp.tril(ones, k=-1)
