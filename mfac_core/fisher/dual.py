r"""The dual form of a factor: the Cholesky factor of ``S``, of the size of the number of gradient samples.

For ``m`` gradient samples, the rows of ``G``, Woodbury's identity gives

.. math:: S = m \lambda I + G G^T = L L^T, \qquad W = L^{-1} G, \qquad \lambda F^{-1} = I - W^T W.

Rounding. An entry of ``S`` is rounded relative to the norms of its two samples: the computed matrix is ``S + E`` with
``|E_ij|`` of the order of ``eps sqrt(S_ii S_jj)``, and its Cholesky factor adds an error of the same form (Higham,
theorem 10.5). For a column ``g`` of ``G`` let ``x = L^-1 g``, ``y = S^-1 g`` and ``r = 1 - |x|^2``, the entry of
:math:`\lambda F^{-1}`. To first order ``E`` changes ``r`` by ``y^T E y``, of the size ``c eps a`` with
``a = sum_i S_ii y_i^2``; the solve adds ``c eps sqrt(a) |x|``. The factor ``c`` depends on the gradients, above all on
whether they share a large mean or repeat, and is therefore measured.

The form that does not cancel. ``r`` is the minimum of ``|e_q - G^T y|^2 + m lambda |y|^2`` over ``y`` (ridge
regression, Hoerl and Kennard): at ``y = S^-1 g`` the vector ``u = e_q - G^T y`` is :math:`\lambda F^{-1} e_q`. The sum
has positive terms only, so it is rounded relative to itself, by ``eps sqrt(a / r)``. As ``y`` minimizes it, an error of
``y`` counts to the second order: by ``rho^T S^-1 rho``, with the residual ``rho = g - S y = G u - m lambda y``. That is
computed too, as ``|L^-1 rho|^2``; what is left is of the third order. A column costs ``2 m B`` operations for
``G^T y``, and as much for ``G u``: too much for all, but not for a few.

The inverse diagonal is therefore evaluated in up to four steps, each only if the one before does not suffice:

1. ``r = 1 - |x|^2`` for all columns, and the bound ``eps (BOUND_FACTOR amplification + 8) (1 - r) / r`` of the error
   of the smallest. The amplification, the largest ``S_ii / L_ii^2``, stands in for ``a / |x|^2``, with ``L^-T`` in
   ``y = L^-T x`` replaced by its diagonal: ``L_ii^2`` is what remains of ``S_ii`` once the samples before it are
   projected out.
2. ``a`` of all columns, from random signs ``z``: ``(z^T D^(1/2) S^-1 g)^2`` with ``D = diag(S)`` has the mean ``a``
   (Johnson and Lindenstrauss). The columns with the largest ``a / r``, and as many others, are evaluated again by the
   form that does not cancel. The differences give ``c``, and ``c`` with a margin the error of every column.
3. Columns whose error is above ``rtol``, mostly those with a small ``r``, take the value that does not cancel. At most
   about ``m`` columns have a small ``r``, because all ``|x|^2`` add up to ``trace(S^-1 G G^T) < m``.
4. The whole group in float64, by the same steps (``factors.py``).

Amplifications are relative to the matrix scaled to a unit diagonal: a few large gradient samples do no harm.

References:
    Higham (2002), Accuracy and Stability of Numerical Algorithms, 2nd edition.
    Hoerl and Kennard (1970), Ridge Regression: Biased Estimation for Nonorthogonal Problems.
    Johnson and Lindenstrauss (1984), Extensions of Lipschitz mappings into a Hilbert space.
    Woodbury (1950), Inverting modified matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mfac_core.backends import Array, array_namespace
from mfac_core.backends.threads import map_on_threads, split_for_threads
from mfac_core.fisher.chunks import (
    cache_columns,
    cache_slices,
    column_bounds,
    columns_times,
    concat,
    is_column,
    over_cache_slices,
    rows_times,
    take_columns,
)
from mfac_core.fisher.kernels import column_sums_of_squares, lower_gram, runs_on_cpu
from mfac_core.fisher.rounding import (
    BOUND_FACTOR,
    PROBES,
    REFINEMENTS,
    SAFETY,
    check_overflow,
    columns_to_measure,
    is_small,
    random_signs,
)
from mfac_core.fisher.triangular import TriangularFactor, cholesky, diagonals, set_diagonals

__all__ = ["DualFactor"]

CANCELLED = 1e-4
"""Columns whose ``1 - sum`` is below this in float64 are evaluated by the form that does not cancel. The difference has
lost at most four of sixteen digits where it is used."""


@dataclass(frozen=True)
class DualFactor:
    """The Cholesky factor of ``S``, of the size of the number of gradient samples.

    Args:
        lower: The factor ``L``.
        norms: Diagonal of ``S``, the squared norm of each sample plus the shift; shape ``(n, m)``.
        shift: ``m damping`` of each block, shape ``(n,)``, in the widest dtype of the device.
        dtype: dtype of the factor.
    """

    lower: TriangularFactor
    norms: Array
    shift: Array
    dtype: Any

    @classmethod
    def of(cls, chunks: Sequence[Array], damping: Array, dtype: Any) -> DualFactor:
        """Factor ``S`` of each block in a dtype."""
        gram = over_cache_slices(chunks, dtype, _gram)
        shift = chunks[0].shape[-2] * damping
        in_dtype = array_namespace(gram).asarray(shift, dtype=dtype)
        norms = diagonals(gram) + in_dtype[:, None]
        check_overflow(norms)
        return cls(cholesky(gram, in_dtype), norms, shift, dtype)

    @property
    def in_float64(self) -> bool:
        """Whether the factor was computed in float64."""
        return bool(self.dtype == array_namespace(self.shift).float64)

    @property
    def num_bytes(self) -> int:
        """Memory of the factor in bytes."""
        return self.lower.num_bytes

    def diagonal(self, chunks: Sequence[Array], rtol: float) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and its estimated relative error in each block, not finite if unusable."""
        xp = array_namespace(chunks[0])

        def one_minus_sums(converted: Iterable[Array], blocks: slice) -> Array:
            lower = self.lower.select_blocks(blocks)
            sums = [total for chunk in converted for total in map_on_threads(lower.column_sums, cache_columns(chunk))]
            return 1 - concat(sums, axis=-1)

        remainder = over_cache_slices(chunks, self.dtype, one_minus_sums)
        smallest = xp.min(remainder, axis=-1)
        epsilon = float(xp.finfo(self.dtype).eps)
        amplification = xp.max(self.norms / self.lower.pivots, axis=-1)
        error = epsilon * (BOUND_FACTOR * amplification + 8) * (1 - smallest) / smallest
        is_bounded = (smallest > (CANCELLED if self.in_float64 else 0)) & (error <= rtol)
        if bool(xp.all(is_bounded)):
            return remainder, error
        if not bool(xp.all(xp.isfinite(remainder))):
            return remainder, xp.full_like(error, float("inf"))
        for blocks in cache_slices(chunks):
            if not bool(xp.all(is_bounded[blocks])):
                selected = [chunk[blocks, :, :] for chunk in chunks]
                measured = self.select_blocks(blocks)._measure(selected, remainder[blocks, :], rtol)
                remainder[blocks, :], error[blocks] = measured
        return remainder, error

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        """Return ``damping F^-1 x`` for ``x`` of shape ``(n, B, k)``, in its dtype, by Woodbury's identity."""
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64) if self.in_float64 else x
        shift = xp.asarray(self.shift, dtype=right.dtype)[:, None, None]
        # damping F^-1 x = x - G^T S^-1 G x
        solved = self.lower.solve_symmetric(rows_times(chunks, right))
        left = right - columns_times(chunks, solved)
        for _ in range(self._num_refinements(right)):
            # the residual G x - S y of y = S^-1 G x; written with what is left of x, little of it cancels
            change = self.lower.solve_symmetric(rows_times(chunks, left) - shift * solved)
            solved = solved + change
            left = right - columns_times(chunks, solved)
            if is_small(change, solved):
                break
        return xp.asarray(left, dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        """Return ``F^-1 G^T c / m`` for ``c`` of shape ``(n, m)``, in its dtype."""
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=self.dtype)[..., None]
        # (m damping I + G^T G)^-1 G^T = G^T S^-1: no difference, in which digits could cancel
        solved = self.lower.solve_symmetric(right)
        out = columns_times(chunks, solved)
        if not self.in_float64:
            shift = xp.asarray(self.shift, dtype=self.dtype)[:, None, None]
            residual = right - rows_times(chunks, out) - shift * solved
            out = out + columns_times(chunks, self.lower.solve_symmetric(residual))
        return xp.asarray(out[..., 0], dtype=coefficients.dtype)

    def select_blocks(self, blocks: slice) -> DualFactor:
        """Return the factor of some of the blocks."""
        lower, norms, shift = self.lower.select_blocks(blocks), self.norms[blocks, :], self.shift[blocks]
        return replace(self, lower=lower, norms=norms, shift=shift)

    def _num_refinements(self, right: Array) -> int:
        """Return the largest number of refinements of ``apply`` in the dtype of ``right``."""
        if self.in_float64:
            return 0
        return REFINEMENTS if right.dtype == array_namespace(right).float64 else 1

    def _measure(self, chunks: Sequence[Array], remainder: Array, rtol: float) -> tuple[Array, Array]:
        """Return the remainders, those not accurate enough replaced, and the estimated error of each block."""
        xp = array_namespace(remainder)
        epsilon = float(xp.finfo(self.dtype).eps)
        tiny = xp.full_like(remainder, float(xp.finfo(self.dtype).smallest_normal) / epsilon)
        positive = xp.maximum(remainder, tiny)
        amplified = xp.maximum(_with_solve(self._amplified(chunks), 1 - remainder), tiny)
        measured = columns_to_measure(amplified / positive)
        exact, second_order, exactly_amplified = self._accurately(chunks, measured, certify=True)
        errors = xp.abs(xp.take_along_axis(remainder, measured, axis=-1) - exact)
        errors = errors - 8 * epsilon  # rounding of the two values themselves, which is not amplified
        # not by their estimated amplification, which is too large just where it is the largest
        relative = _with_solve(exactly_amplified, 1 - exact)
        ratio = xp.max(errors / xp.maximum(relative, tiny[:, : relative.shape[-1]]), axis=-1, keepdims=True)
        ratio = SAFETY * xp.maximum(ratio, xp.full_like(ratio, epsilon))
        estimate = (ratio * amplified + 8 * epsilon * (1 - remainder)) / positive
        is_accurate = (estimate <= rtol) & (remainder > (CANCELLED if self.in_float64 else 0))
        count = int(xp.max(xp.count_nonzero(~is_accurate, axis=-1)))
        if not count:
            return remainder, xp.max(estimate, axis=-1)
        if count > self.norms.shape[-1] and not self.in_float64:
            return remainder, xp.full_like(estimate[:, 0], float("inf"))  # float64 is faster
        order = xp.argsort(xp.asarray(is_accurate, dtype=xp.int64), axis=-1)  # those not accurate first
        most = SAFETY * xp.max(second_order, axis=-1, keepdims=True)
        certify = self.in_float64 or not bool(xp.all(most <= rtol / 2))
        exact, error, _ = self._accurately(chunks, order[:, :count], certify=certify)
        error = error if certify else error + most
        rest = order[:, count:]
        error = concat([error, xp.take_along_axis(estimate, rest, axis=-1)], axis=-1)
        values = concat([exact, xp.take_along_axis(remainder, rest, axis=-1)], axis=-1)
        return xp.take_along_axis(values, xp.argsort(order, axis=-1), axis=-1), xp.max(error, axis=-1)

    def _amplified(self, chunks: Sequence[Array]) -> Array:
        """Return ``sum_i S_ii y_i^2`` of each column, estimated from random signs; shape ``(n, B)``."""
        xp = array_namespace(self.norms)
        probes = self.lower.solve_symmetric(xp.sqrt(self.norms)[:, :, None] * random_signs(self.norms, PROBES))
        probes = xp.matrix_transpose(probes)
        products = (probes @ xp.asarray(chunk, dtype=self.dtype) for chunk in chunks)
        return concat([column_sums_of_squares(product) for product in products], axis=-1) / PROBES

    def _accurately(self, chunks: Sequence[Array], columns: Array, *, certify: bool) -> tuple[Array, Array, Array]:
        """Return some entries by the form that does not cancel, their relative errors, and ``sum_i S_ii y_i^2``.

        Args:
            chunks: Gradients.
            columns: Which entries of each block, shape ``(n, k)``.
            certify: Whether the error counts what is left of the second order; that doubles the time.
        """
        xp = array_namespace(self.norms)
        shift = xp.asarray(self.shift, dtype=self.dtype)[:, None, None]
        solved = self.lower.solve_symmetric(xp.asarray(take_columns(chunks, columns), dtype=self.dtype))
        rows = xp.matrix_transpose(solved)
        values = shift[..., 0] * xp.sum(rows * rows, axis=-1)
        residual = -shift * rows
        for chunk, (start, stop) in zip(chunks, column_bounds(chunks), strict=True):
            converted = xp.asarray(chunk, dtype=self.dtype)
            left = rows @ converted
            left -= xp.asarray(is_column(columns, start, stop), dtype=self.dtype)
            values = values + xp.sum(left * left, axis=-1)
            if certify:
                residual = residual - left @ xp.matrix_transpose(converted)
        amplified = xp.sum(self.norms[:, :, None] * solved * solved, axis=-2)
        rounding = 4 * float(xp.finfo(self.dtype).eps) * (1 + xp.sqrt(amplified / values))
        if not certify:
            return values, rounding, amplified
        remaining = self.lower.solve(xp.matrix_transpose(residual))
        return values, xp.sum(remaining * remaining, axis=-2) / values + rounding, amplified


def _gram(chunks: Iterable[Array], blocks: slice) -> Array:
    total = norms = None
    # each thread multiplies some of the columns; the products of all add up to the Gram matrix
    for chunk in chunks:
        for product in map_on_threads(lower_gram, split_for_threads(chunk)):
            total = product if total is None else total + product
        squares = _row_sums_of_squares(chunk)
        norms = squares if norms is None else norms + squares
    # a product adds squares one by one, so that many small ones are lost: the diagonal is systematically too small
    set_diagonals(total, norms)
    return total


def _row_sums_of_squares(x: Array) -> Array:
    """Return the sums of squares over the columns of ``x`` of shape ``(n, rows, columns)``; shape ``(n, rows)``."""
    if runs_on_cpu(x):
        return (x[:, :, None, :] @ x[:, :, :, None])[..., 0, 0]  # dot products need no array of squares
    return array_namespace(x).sum(x * x, axis=-1)


def _with_solve(amplified: Array, explained: Array) -> Array:
    """Return ``a + sqrt(a) |x|``: by how much rounding is amplified, in ``S`` and in the solve."""
    xp = array_namespace(amplified)
    return amplified + xp.sqrt(amplified * xp.maximum(explained, xp.zeros_like(explained)))
