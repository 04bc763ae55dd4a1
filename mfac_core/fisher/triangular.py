"""Batched Cholesky factors and triangular solves, written as matrix products panel by panel.

BLAS and LAPACK offer these only for one matrix at a time, hold the interpreter lock, or run far below the speed of the
matrix product. Panels turn nearly all of the work into matrix products of the array's own library.

A panel is a range of rows, and its diagonal panel the square block of ``L`` on the diagonal. A factor stores the
inverses of the diagonal panels, so that a solve multiplies by them:

    x_i = L_ii^-1 (b_i - sum over j < i of L_ij x_j).
"""

from __future__ import annotations

import math

from mfac_core.backends import Array, array_namespace
from mfac_core.fisher.kernels import SmallFactors, column_sums_of_squares, runs_on_cpu, small_factors

__all__ = ["PANEL", "TriangularFactor", "cholesky", "diagonals", "set_diagonals"]

PANEL = 128
"""Rows that are solved at once, by the explicit inverse of their diagonal panel."""

CPU_PANEL = 64
"""The same on a CPU, where smaller products are as fast: the inverses take half of the work, with half of the error."""

CPU_ROWS = 32
"""Rows of a product with the inverse of a panel that a CPU computes at once, to leave out the zeros right of them."""


class TriangularFactor:
    """Lower-triangular factors ``L`` of a batch of matrices ``L L^T``, in panels of rows; made by :func:`cholesky`.

    Args:
        left: For each panel the part left of its diagonal panel, negated, shape ``(n, p, start)``.
        inverses: Inverses of the diagonal panels, each of shape ``(n, p, p)``.
        pivots: The squared diagonal entries of ``L``, shape ``(n, k)``.
    """

    def __init__(self, left: list[Array], inverses: list[Array], pivots: Array) -> None:
        self.left = left
        self.inverses = inverses
        self.pivots = pivots

    @property
    def num_bytes(self) -> int:
        """Memory of the panels in bytes."""
        itemsize = array_namespace(self.pivots).finfo(self.pivots.dtype).bits // 8
        return int(itemsize * sum(math.prod(x.shape) for x in (*self.left, *self.inverses)))

    def select_blocks(self, blocks: slice) -> TriangularFactor:
        """Return the factors of some of the matrices, as views."""
        return TriangularFactor(
            [x[blocks, :, :] for x in self.left], [x[blocks, :, :] for x in self.inverses], self.pivots[blocks, :]
        )

    def solve(self, b: Array) -> Array:
        """Return ``L^-1 b``, a new array, for ``b`` of shape ``(n, k, c)`` in the dtype of the factor."""
        if len(self.inverses) == 1:
            return self.inverses[0] @ b
        out = array_namespace(b).empty_like(b)
        start = 0
        for left, inverse in zip(self.left, self.inverses, strict=True):
            rows = slice(start, start + inverse.shape[-1])
            right = b[:, rows, :]
            if start:
                solved = left @ out[:, :start, :]
                solved += right
                right = solved
            out[:, rows, :] = inverse @ right
            start = rows.stop
        return out

    def column_sums(self, b: Array) -> Array:
        """Return the column sums of the squares of ``L^-1 b``, shape ``(n, c)``, for ``b`` of shape ``(n, k, c)``."""
        xp = array_namespace(b)
        # only solved rows that a later panel reads are stored
        above: Array = xp.empty_like(b[:, : -self.inverses[-1].shape[-1], :])
        sums: Array = None
        start = 0
        for left, inverse in zip(self.left, self.inverses, strict=True):
            rows = slice(start, start + inverse.shape[-1])
            right = b[:, rows, :]
            if start:
                product = left @ above[:, :start, :]
                product += right
                right = product
            is_read_later = rows.stop < b.shape[-2]
            for first, stop in _row_slices(inverse):
                solved = inverse[:, first:stop, :stop] @ right[:, :stop, :]
                squares = column_sums_of_squares(solved)
                sums = squares if sums is None else sums + squares
                if is_read_later:
                    above[:, start + first : start + stop, :] = solved
            start = rows.stop
        return sums

    def solve_transposed(self, b: Array) -> Array:
        """Return ``L^-T b``, a new array, for ``b`` of shape ``(n, k, c)`` in the dtype of the factor."""
        xp = array_namespace(b)
        if len(self.inverses) == 1:
            return xp.matrix_transpose(self.inverses[0]) @ b
        out = xp.asarray(b, copy=True)
        stop = b.shape[-2]
        for left, inverse in zip(reversed(self.left), reversed(self.inverses), strict=True):
            rows = slice(stop - inverse.shape[-1], stop)
            solved = xp.matrix_transpose(inverse) @ out[:, rows, :]
            out[:, rows, :] = solved
            # `left` is negated: this subtracts L_ij^T x_i from every panel j above
            if rows.start:
                out[:, : rows.start, :] += xp.matrix_transpose(left) @ solved
            stop = rows.start
        return out

    def solve_symmetric(self, b: Array) -> Array:
        """Return ``(L L^T)^-1 b`` in the dtype of ``b``, of shape ``(n, k, c)``; computed in that of the factor."""
        xp = array_namespace(b)
        in_dtype = xp.asarray(b, dtype=self.pivots.dtype)
        return xp.asarray(self.solve_transposed(self.solve(in_dtype)), dtype=b.dtype)

    def inverse(self) -> Array:
        """Return ``L^-1``, shape ``(n, k, k)``, lower triangular."""
        if len(self.inverses) == 1:
            return self.inverses[0]
        xp = array_namespace(self.pivots)
        count, size = self.pivots.shape
        out = xp.zeros_like(xp.broadcast_to(self.inverses[0][:1, :1, :1], (count, size, size)))
        start = 0
        for left, inverse in zip(self.left, self.inverses, strict=True):
            rows = slice(start, start + inverse.shape[-1])
            out[:, rows, rows] = inverse
            # the rows of L^-1 left of the diagonal solve L_ii x_i = -sum of L_ij x_j
            if start:
                out[:, rows, :start] = inverse @ (left @ out[:, :start, :start])
            start = rows.stop
        return out


def cholesky(matrices: Array, shift: Array | float) -> TriangularFactor:
    """Factor ``matrices + shift * I``.

    Args:
        matrices: Symmetric, shape ``(n, k, k)``, float32 or float64; only the lower triangle is read. Overwritten.
        shift: Added to the diagonal: one number, or one for each matrix in their dtype, shape ``(n,)``.

    Raises:
        numpy.linalg.LinAlgError: If a matrix is not positive definite (NumPy; a GPU returns NaN instead).

    Example:
        >>> import numpy as np
        >>> cholesky(np.array([[[3.0]]]), shift=1.0).solve(np.array([[[6.0]]]))
        array([[[3.]]])
    """
    xp = array_namespace(matrices)
    size = matrices.shape[-1]
    shift = shift if isinstance(shift, float | int) else shift[:, None, None]
    small = small_factors(matrices)
    left, inverses, pivots = [], [], []
    panel = CPU_PANEL if runs_on_cpu(matrices) else PANEL
    for start in range(0, size, panel):
        rows = slice(start, min(start + panel, size))
        # left-looking: columns left of `start` hold those of L, and are now subtracted from the columns of this panel
        if start:
            negated = -matrices[:, rows, :start]
            matrices[:, start:, rows] += matrices[:, start:, :start] @ xp.matrix_transpose(negated)
            left.append(negated)
        inverse, diagonal = _inverse_factor(matrices[:, rows, rows], shift, small)
        if not start:
            left.append(inverse[:, :, :0])  # an empty array, of the right dtype and device
        inverses.append(inverse)
        pivots.append(diagonal**2)
        # below the diagonal panel, L_ji = A_ji L_ii^-T
        if rows.stop < size:
            below = matrices[:, rows.stop :, rows]
            matrices[:, rows.stop :, rows] = below @ xp.matrix_transpose(inverse)
    return TriangularFactor(left, inverses, pivots[0] if len(pivots) == 1 else xp.concat(pivots, axis=-1))


def diagonals(matrices: Array) -> Array:
    """Return the diagonals of a batch of square matrices, shape ``(n, k)``."""
    xp = array_namespace(matrices)
    count, size = matrices.shape[:2]
    # by stride: the array API standard has a diagonal only in its extension for linear algebra
    return xp.reshape(matrices, (count, size * size))[:, :: size + 1]


def set_diagonals(matrices: Array, values: Array) -> None:
    """Set the diagonals of a batch of square matrices in contiguous memory to ``values`` of shape ``(n, k)``."""
    count, size = values.shape
    flat = array_namespace(matrices).reshape(matrices, (count, size * size), copy=False)
    flat[:, :: size + 1] = values


def _inverse_factor(matrices: Array, shift: Array | float, small: SmallFactors) -> tuple[Array, Array]:
    """Return ``L^-1`` and the diagonal of ``L`` of ``matrices + shift * I``, by recursion over halves.

    With ``L = [L1 0; C L2]``: ``L1 L1^T = A11``, ``C = A21 L1^-T`` and ``L2 L2^T = A22 - C C^T``; and
    ``L^-1 = [L1^-1 0; -L2^-1 C L1^-1 L2^-1]``.
    """
    xp = array_namespace(matrices)
    size = matrices.shape[-1]
    if size <= small.largest:
        return small(matrices, shift)
    # the upper half is the largest power of two times `small.largest` below `size`, so that most pieces have one size
    half = small.largest
    while 2 * half < size:
        half *= 2
    upper, upper_diagonal = _inverse_factor(matrices[:, :half, :half], shift, small)
    corner = matrices[:, half:, :half] @ _transposed(upper)
    rest = matrices[:, half:, half:] - corner @ _transposed(corner)
    lower, lower_diagonal = _inverse_factor(rest, shift, small)
    inverse = xp.zeros_like(matrices)
    inverse[:, :half, :half] = upper
    inverse[:, half:, :half] = -(lower @ (corner @ upper))
    inverse[:, half:, half:] = lower
    return inverse, xp.concat([upper_diagonal, lower_diagonal], axis=-1)


def _row_slices(inverse: Array) -> list[tuple[int, int]]:
    """Return the rows of a lower-triangular matrix that are multiplied at once."""
    size = inverse.shape[-1]
    at_once = CPU_ROWS if runs_on_cpu(inverse) else size
    return [(start, min(start + at_once, size)) for start in range(0, size, at_once)]


def _transposed(x: Array) -> Array:
    # a copy: small products of a matrix with a transposed view, above all its own, are several times slower
    xp = array_namespace(x)
    return xp.concat([xp.matrix_transpose(x)], axis=0)
