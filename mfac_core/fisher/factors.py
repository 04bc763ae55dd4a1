r"""The inverse of the damped empirical Fisher of one group of blocks.

Notation: ``n`` blocks of ``B`` weights each, ``m`` gradient samples; a *chunk* is an array of shape ``(n, m, width)``
that holds some columns of the blocks, and the chunks of a group together hold all ``B``. One Fisher per block,

.. math:: F = \lambda I + \frac{1}{m} G^T G, \qquad S = m \lambda I + G G^T = L L^T, \qquad W = L^{-1} G.

The dual form factors ``S`` (``m x m``), the primal form ``F`` itself (``B x B``); each is used if it is smaller.
Results are those of :math:`\lambda F^{-1}`, whose eigenvalues lie in ``(0, 1]`` for any scale of the gradients.

Rounding. An entry of ``S`` is rounded relative to the norms of its two samples: the computed matrix is ``S + E`` with
``|E_ij|`` of the order of ``eps sqrt(S_ii S_jj)``, and its Cholesky factor adds an error of the same form (Higham,
theorem 10.5). For a column ``g`` of ``G`` let ``y = S^-1 g``, ``|x|^2 = g^T y`` and ``r = 1 - |x|^2``, the entry of
:math:`\lambda F^{-1}`. To first order ``E`` changes ``r`` by ``y^T E y``, of the size ``c eps a`` with
``a = sum_i S_ii y_i^2``; the solve adds ``c eps sqrt(a) |x|``. The factor ``c`` depends on the gradients: it is near 1
for independent samples, near 10 if they share a large mean, and far above that if they repeat. Hence it is measured.

The form that does not cancel. ``r`` is the minimum of ``|e_q - G^T y|^2 + m lambda |y|^2`` over ``y``: at
``y = S^-1 g`` the vector ``u = e_q - G^T y`` is :math:`\lambda F^{-1} e_q`. The sum has positive terms only, so it is
rounded relative to itself, by ``eps sqrt(a / r)``. As ``y`` minimizes it, an error of ``y`` counts to the second order:
by ``rho^T S^-1 rho``, with the residual ``rho = g - S y = G u - m lambda y``. That is computed too, as
``|L^-1 rho|^2``; what is left is of the third order. A column costs ``2 m B`` operations for ``G^T y``, and as much for
``G u``: too much for all, but not for a few.

The inverse diagonal is therefore evaluated in up to four steps, each only if the one before does not suffice:

1. ``r = 1 - |x|^2`` for all columns, and the bound ``eps (64 amplification + 8) (1 - r) / r`` of the error of the
   smallest. ``a`` is taken for ``|x|^2`` times the largest ``S_ii / L_ii^2``, which replaces ``L^-T`` in
   ``y = L^-T x`` by its diagonal: ``L_ii^2`` is what remains of ``S_ii`` once the samples before it are projected out.
2. ``a`` of all columns, from random signs ``z``: ``(z^T D^(1/2) S^-1 g)^2`` with ``D = diag(S)`` has the mean ``a``
   (Johnson and Lindenstrauss). The columns with the largest ``a / r`` are evaluated again by the form that does not
   cancel. The differences give ``c``, and ``c``, with a safety factor, the error of every column.
3. Columns whose error is above ``rtol``, mostly those with a small ``r``, take the value that does not cancel. At most
   about ``m`` columns have a small ``r``, because all ``|x|^2`` add up to ``trace(S^-1 G G^T) < m``.
4. The whole group in float64, by the same steps; if its error is still above ``rtol``, the block is refused.

In the primal form ``[F^-1]_qq`` has the error ``z^T E z``, ``z = F^-1 e_q``. By Cauchy-Schwarz
``z_i^2 <= [F^-1]_ii [F^-1]_qq``, so each of its terms, relative to ``[F^-1]_qq``, is at most
``eps max_i F_ii [F^-1]_ii``: the bound. If it does not suffice, the error is measured in the columns with the largest
``sum_i F_ii z_i^2 / [F^-1]_qq``, as the difference to ``2 z_q - z^T F z``, with
``z^T F z = lambda |z|^2 + |G z|^2 / m``, to which errors of ``z`` count to the second order.

Amplifications are relative to the matrix scaled to a unit diagonal: a few large gradient samples, or a few columns with
large gradients, do no harm.

References:
    Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.
    Hoerl and Kennard (1970), Ridge Regression: Biased Estimation for Nonorthogonal Problems.
    Higham (2002), Accuracy and Stability of Numerical Algorithms, 2nd edition.
    Johnson and Lindenstrauss (1984), Extensions of Lipschitz mappings into a Hilbert space.
    Woodbury (1950), Inverting modified matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.backends.threads import map_on_threads, split_columns, split_for_threads
from mfac_core.errors import IllConditionedError
from mfac_core.fisher.damping import damping_text
from mfac_core.fisher.kernels import Float64Needed, column_sums_of_squares, lower_gram, matmul, runs_on_cpu, wide_dtype
from mfac_core.fisher.triangular import TriangularFactor, cholesky, diagonals, set_diagonals

__all__ = ["Factor", "cache_slices", "evaluate", "factor", "fisher_quadratic", "gradients_times"]

BOUND_FACTOR = 64
"""Rounding errors that add up, with a margin: at most 25 were seen, in samples that share a large mean."""

SAFETY = 8
"""Margin between the error predicted from the columns measured and the largest that is possible. Over random ensembles
the largest error of a block was at most 4.4 times the largest prediction."""

PROBES = 16
"""Random vectors that measure by how much rounding is amplified in each column."""

MEASURED = 8
"""Columns of each block whose error is measured: those in which rounding is amplified the most."""

CANCELLED = 1e-4
"""Columns whose ``1 - sum`` is below this in float64 are evaluated by the form that does not cancel. The difference has
lost at most four of sixteen digits where it is used."""

REFINEMENTS = 8
"""Steps, at most, that refine a solve with a float32 factor to float64 (Higham, chapter 12)."""

CACHE_BYTES = 2 * 2**20
"""Bytes of gradients processed at once on the CPU, so that intermediate results stay in its cache."""


class Factor(Protocol):
    """The factored Fisher of one group. Methods that need the gradients take them again, as ``chunks``."""

    @property
    def in_float64(self) -> bool:
        """Whether the factor was computed in float64."""

    @property
    def num_bytes(self) -> int:
        """Memory of the factor in bytes."""

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        """Return ``damping F^-1 x`` for ``x`` of shape ``(n, B, k)``, in the dtype of ``x``.

        For a float64 ``x`` the solves with a float32 factor are refined to float64. That matters where ``x`` is close
        to a combination of the gradients, of which ``F^-1`` leaves little.
        """

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        """Return ``F^-1 G^T c / m`` for ``c`` of shape ``(n, m)``; shape ``(n, B)``, in the dtype of ``c``."""

    def select_blocks(self, blocks: slice) -> Factor:
        """Return the factor of some of the blocks."""


def evaluate(
    chunks: Sequence[Array], damping: Array | float, rtol: float, *, float32_rtol: float | None = None
) -> tuple[Factor, Array]:
    """Factor the Fisher of one group of blocks and evaluate its inverse diagonal, in float32 if that suffices.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``, float32 or float64, all on one device. Not modified.
        damping: Added to the diagonal of the empirical Fisher, positive: one number, or one for each block, shape
            ``(n,)``, in the widest dtype of the device.
        rtol: Largest relative error of the inverse diagonal.
        float32_rtol: Largest such error at which the factor is left in float32; ``None`` means ``rtol``.

    Returns:
        The factor, and ``damping diag(F^-1)`` of shape ``(n, B)``, in the dtype of the factor.

    Raises:
        IllConditionedError: If float64 is not accurate enough either.
        Float64Needed: If float32 is not accurate enough, and the device has no float64.
    """
    xp = array_namespace(chunks[0])
    damping = _of_each_block(damping, chunks)
    # overflow shows in the results, which are then computed in float64 or refused
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if chunks[0].dtype != xp.float64:
            found = _evaluate_in(chunks[0].dtype, chunks, damping, float32_rtol or rtol)
            if found is not None and bool(xp.all(damping >= _least_damping(chunks))):
                return found
            _check_has_float64(chunks[0])
        found = _evaluate_in(xp.float64, chunks, damping, rtol)
    if found is None:
        raise IllConditionedError(
            "the Fisher of a block cannot be inverted to a relative error of "
            f"{rtol:g} with damping {damping_text(float(xp.min(damping)), float(xp.max(damping)))}: its gradients are "
            "too large relative to the damping, or too similar; choose a larger damping (or rtol of inverse_fisher)"
        )
    return found


def factor(chunks: Sequence[Array], damping: Array | float, in_float64: bool) -> Factor:
    """Factor the Fisher of one group of blocks again, in the precision that :func:`evaluate` has chosen."""
    xp = array_namespace(chunks[0])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _form(chunks).of(chunks, _of_each_block(damping, chunks), xp.float64 if in_float64 else chunks[0].dtype)


def cache_slices(chunks: Sequence[Array]) -> list[slice]:
    """Return slices of blocks whose gradients fit the cache of a CPU; on other devices one slice of all blocks."""
    count, rows, _ = chunks[0].shape
    if not runs_on_cpu(chunks[0]):
        return [slice(0, count)]
    block = sum(rows * chunk.shape[-1] * chunk.dtype.itemsize for chunk in chunks)
    at_once = max(1, CACHE_BYTES // block)
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def fisher_quadratic(chunks: Sequence[Array], x: Array, damping: Array | float) -> Array:
    r"""Return :math:`\tfrac12 x^T F x` of each block.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``.
        x: Shape ``(n, B)``, same device; its products with the gradients are computed in its dtype.
        damping: Added to the diagonal of the empirical Fisher: one number, or one for each block, shape ``(n,)``.

    Returns:
        Shape ``(n,)``, in the widest dtype of the device.
    """
    xp = array_namespace(x)
    # the squares of the products may leave the range of float32, even if the products do not
    rows, x = (xp.asarray(each, dtype=wide_dtype(x)) for each in (gradients_times(chunks, x), x))
    return 0.5 * (damping * xp.sum(x * x, axis=-1) + xp.sum(rows * rows, axis=-1) / rows.shape[-1])


def gradients_times(chunks: Sequence[Array], x: Array) -> Array:
    """Return ``G x`` of each block, shape ``(n, m)``, for ``x`` of shape ``(n, B)``, computed in the dtype of ``x``."""
    return _rows_times(chunks, x[..., None])[..., 0]


@dataclass(frozen=True)
class _DualFactor:
    """The Cholesky factor of ``S``, of the size of the number of gradients.

    Args:
        lower: ``L``.
        norms: Diagonal of ``S``, the squared norm of each sample plus the shift; shape ``(n, m)``.
        shift: ``m damping`` of each block, shape ``(n,)``, float64.
        dtype: dtype of the factor.
    """

    lower: TriangularFactor
    norms: Array
    shift: Array
    dtype: Any

    @classmethod
    def of(cls, chunks: Sequence[Array], damping: Array, dtype: Any) -> _DualFactor:
        """Factor ``S`` of each block in a dtype."""
        gram = _over_cache_slices(chunks, dtype, _gram)
        shift = chunks[0].shape[-2] * damping
        in_dtype = array_namespace(gram).asarray(shift, dtype=dtype)
        norms = diagonals(gram) + in_dtype[:, None]
        _check_overflow(norms)
        return cls(cholesky(gram, in_dtype), norms, shift, dtype)

    @property
    def in_float64(self) -> bool:
        return bool(self.dtype == array_namespace(self.shift).float64)

    @property
    def num_bytes(self) -> int:
        return self.lower.num_bytes

    def diagonal(self, chunks: Sequence[Array], rtol: float) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and its estimated relative error in each block, not finite if unusable."""
        xp = array_namespace(chunks[0])

        def one_minus_sums(converted: Iterable[Array], blocks: slice) -> Array:
            lower = self.lower.select_blocks(blocks)
            sums = [total for chunk in converted for total in map_on_threads(lower.column_sums, _cache_columns(chunk))]
            return 1 - _concat(sums, axis=-1)

        remainder = _over_cache_slices(chunks, self.dtype, one_minus_sums)
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
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64) if self.in_float64 else x
        shift = xp.asarray(self.shift, dtype=right.dtype)[:, None, None]
        # Woodbury: damping F^-1 x = x - G^T S^-1 G x
        solved = self._solve(_rows_times(chunks, right))
        left = right - _columns_times(chunks, solved)
        for _ in range(_refinements(self.dtype, right)):
            # the residual G x - S y of y = S^-1 G x; written with what is left of x, little of it cancels
            change = self._solve(_rows_times(chunks, left) - shift * solved)
            solved = solved + change
            left = right - _columns_times(chunks, solved)
            if _is_small(change, solved):
                break
        return xp.asarray(left, dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=self.dtype)
        # (m damping I + G^T G)^-1 G^T = G^T S^-1: no difference, in which digits could cancel
        return xp.asarray(_columns_times(chunks, self._solve(right[..., None]))[..., 0], dtype=coefficients.dtype)

    def select_blocks(self, blocks: slice) -> _DualFactor:
        lower, norms, shift = self.lower.select_blocks(blocks), self.norms[blocks, :], self.shift[blocks]
        return replace(self, lower=lower, norms=norms, shift=shift)

    def _solve(self, rows: Array) -> Array:
        """Return ``S^-1 rows`` for rows of shape ``(n, m, k)``, in their dtype."""
        xp = array_namespace(rows)
        right = xp.asarray(rows, dtype=self.dtype)
        return xp.asarray(self.lower.solve_transposed(self.lower.solve(right)), dtype=rows.dtype)

    def _measure(self, chunks: Sequence[Array], remainder: Array, rtol: float) -> tuple[Array, Array]:
        """Return the remainders, those not accurate enough replaced, and the estimated error of each block."""
        xp = array_namespace(remainder)
        epsilon = float(xp.finfo(self.dtype).eps)
        tiny = xp.full_like(remainder, float(xp.finfo(self.dtype).smallest_normal) / epsilon)
        positive = xp.maximum(remainder, tiny)
        amplified = xp.maximum(_with_solve(self._amplified(chunks), 1 - remainder), tiny)
        worst = xp.argsort(-amplified / positive, axis=-1)[:, : min(MEASURED, remainder.shape[-1])]
        exact, second_order, exactly_amplified = self._accurately(chunks, worst, certify=True)
        errors = xp.abs(xp.take_along_axis(remainder, worst, axis=-1) - exact)
        # not by their estimated amplification, which is too large just where it is the largest
        relative = _with_solve(exactly_amplified, 1 - exact)
        factor = xp.max(errors / xp.maximum(relative, tiny[:, : relative.shape[-1]]), axis=-1, keepdims=True)
        factor = SAFETY * xp.maximum(factor, xp.full_like(factor, epsilon))
        estimate = (factor * amplified + 8 * epsilon * (1 - remainder)) / positive
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
        error = _concat([error, xp.take_along_axis(estimate, rest, axis=-1)], axis=-1)
        values = _concat([exact, xp.take_along_axis(remainder, rest, axis=-1)], axis=-1)
        return xp.take_along_axis(values, xp.argsort(order, axis=-1), axis=-1), xp.max(error, axis=-1)

    def _amplified(self, chunks: Sequence[Array]) -> Array:
        """Return ``sum_i S_ii y_i^2`` of each column, estimated from random vectors; shape ``(n, B)``."""
        xp = array_namespace(self.norms)
        probes = self._solve(xp.sqrt(self.norms)[:, :, None] * _signs(self.norms, PROBES))
        probes = _concat([xp.matrix_transpose(probes)], axis=0)
        products = (matmul(probes, xp.asarray(chunk, dtype=self.dtype)) for chunk in chunks)
        return _concat([column_sums_of_squares(product) for product in products], axis=-1) / PROBES

    def _accurately(self, chunks: Sequence[Array], columns: Array, *, certify: bool) -> tuple[Array, Array, Array]:
        """Return some entries by the form that does not cancel, their relative errors, and ``sum_i S_ii y_i^2``.

        Args:
            chunks: Gradients.
            columns: Which entries of each block, shape ``(n, k)``.
            certify: Whether the error counts what is left of the second order; that doubles the time.
        """
        xp = array_namespace(self.norms)
        bounds = _bounds(chunks)
        gradients = None
        for chunk, (start, stop) in zip(chunks, bounds, strict=True):
            found = xp.asarray(_take_columns(chunk, columns, start, stop), dtype=self.dtype)
            gradients = found if gradients is None else gradients + found
        shift = xp.asarray(self.shift, dtype=self.dtype)[:, None, None]
        solved = self._solve(gradients)
        rows = _concat([xp.matrix_transpose(solved)], axis=0)
        values = shift[..., 0] * xp.sum(rows * rows, axis=-1)
        residual = -shift * rows
        for chunk, (start, stop) in zip(chunks, bounds, strict=True):
            converted = xp.asarray(chunk, dtype=self.dtype)
            left = matmul(rows, converted)
            left -= xp.asarray(_is_column(columns, start, stop), dtype=self.dtype)
            values = values + xp.sum(left * left, axis=-1)
            if certify:
                residual = residual - matmul(left, xp.matrix_transpose(converted))
        amplified = xp.sum(self.norms[:, :, None] * solved * solved, axis=-2)
        rounding = 4 * float(xp.finfo(self.dtype).eps) * (1 + xp.sqrt(amplified / values))
        if not certify:
            return values, rounding, amplified
        remaining = self.lower.solve(_concat([xp.matrix_transpose(residual)], axis=0))
        return values, xp.sum(remaining * remaining, axis=-2) / values + rounding, amplified


@dataclass(frozen=True)
class _PrimalFactor:
    """The Cholesky factor of ``F`` itself, of the size of a block.

    Args:
        lower: The factor, float64.
        norms: Diagonal of ``F``, shape ``(n, B)``.
        damping: That of each block, shape ``(n,)``, float64.
        dtype: dtype in which ``F`` was computed.
    """

    lower: TriangularFactor
    norms: Array
    damping: Array
    dtype: Any

    @classmethod
    def of(cls, chunks: Sequence[Array], damping: Array, dtype: Any) -> _PrimalFactor:
        """Factor ``F`` of each block in a dtype."""
        fisher = _over_cache_slices(chunks, dtype, _primal_product)
        shift = array_namespace(fisher).asarray(damping, dtype=dtype)
        norms = diagonals(fisher) + shift[:, None]
        _check_overflow(norms)
        return cls(cholesky(fisher, shift), norms, damping, dtype)

    @property
    def in_float64(self) -> bool:
        return bool(self.dtype == array_namespace(self.damping).float64)

    @property
    def num_bytes(self) -> int:
        return self.lower.num_bytes

    def diagonal(self, chunks: Sequence[Array], rtol: float) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and its estimated relative error in each block, not finite if unusable."""
        xp = array_namespace(self.norms)
        epsilon = float(xp.finfo(self.dtype).eps)
        inverse = self.lower.inverse()
        diagonal = column_sums_of_squares(inverse)  # F^-1 = L^-T L^-1
        damped = diagonal * xp.asarray(self.damping, dtype=self.dtype)[:, None]
        error = epsilon * BOUND_FACTOR * xp.max(self.norms * diagonal, axis=-1)
        if not bool(xp.all(error <= rtol)) and bool(xp.all(xp.isfinite(diagonal))):
            error = self._measured_error(chunks, inverse, diagonal)
        # the exact value is at most 1: only rounding of the sum can exceed it
        most = 1 + 16 * epsilon * math.sqrt(diagonal.shape[-1])
        usable = xp.all((damped > 0) & (damped <= most), axis=-1)
        damped = xp.where(damped > 1, xp.ones_like(damped), damped)
        return damped, xp.where(usable, error, xp.full_like(error, float("inf")))

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64) if self.in_float64 else x
        out = self._solve(right)
        damping = xp.asarray(self.damping, dtype=right.dtype)[:, None, None]
        if right.dtype != self.dtype:
            for _ in range(REFINEMENTS):
                product = _columns_times(chunks, _rows_times(chunks, out))
                product /= chunks[0].shape[-2]
                change = self._solve(right - damping * out - product)
                out = out + change
                if _is_small(change, out):
                    break
        return xp.asarray(damping * out, dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=self.dtype)
        product = _columns_times(chunks, right[..., None]) / coefficients.shape[-1]
        return xp.asarray(self._solve(product)[..., 0], dtype=coefficients.dtype)

    def select_blocks(self, blocks: slice) -> _PrimalFactor:
        lower, norms, damping = self.lower.select_blocks(blocks), self.norms[blocks, :], self.damping[blocks]
        return replace(self, lower=lower, norms=norms, damping=damping)

    def _solve(self, right: Array) -> Array:
        """Return ``F^-1 right`` for shape ``(n, B, k)``, in its dtype."""
        xp = array_namespace(right)
        in_dtype = xp.asarray(right, dtype=self.dtype)
        return xp.asarray(self.lower.solve_transposed(self.lower.solve(in_dtype)), dtype=right.dtype)

    def _measured_error(self, chunks: Sequence[Array], inverse: Array, diagonal: Array) -> Array:
        """Return the estimated error of each block, from the columns in which rounding is amplified the most."""
        xp = array_namespace(diagonal)
        probes = xp.sqrt(self.norms)[:, :, None] * _signs(self.norms, PROBES)
        amplified = xp.sum(self._solve(probes) ** 2, axis=-1) / PROBES
        width = diagonal.shape[-1]
        worst = xp.argsort(-amplified / diagonal, axis=-1)[:, : min(MEASURED, width)]
        unit = xp.asarray(xp.matrix_transpose(_is_column(worst, 0, width)), dtype=self.dtype)
        solved = self._solve(unit)
        # 2 z_q - z^T F z is accurate to the second order, and at the solution equals z_q
        products = _rows_times(chunks, solved)
        damping = xp.asarray(self.damping, dtype=self.dtype)[:, None]
        quadratic = damping * xp.sum(solved * solved, axis=-2)
        quadratic += xp.sum(products * products, axis=-2) / products.shape[-2]
        exact = 2 * xp.sum(unit * solved, axis=-2) - quadratic
        errors = xp.abs(xp.take_along_axis(diagonal, worst, axis=-1) / exact - 1)
        return SAFETY * xp.max(errors, axis=-1)


_Form = type[_DualFactor] | type[_PrimalFactor]


def _form(chunks: Sequence[Array]) -> _Form:
    return _PrimalFactor if _width(chunks) <= chunks[0].shape[-2] else _DualFactor


def _evaluate_in(
    dtype: Any, chunks: Sequence[Array], damping: Array, rtol: float
) -> tuple[_DualFactor | _PrimalFactor, Array] | None:
    """Return factor and diagonal computed in a dtype; ``None`` if their estimated error exceeds ``rtol``."""
    try:
        factored = _form(chunks).of(chunks, damping, dtype)
        diagonal, error = factored.diagonal(chunks, rtol)
    except np.linalg.LinAlgError:
        return None
    return (factored, diagonal) if bool(array_namespace(error).all(error <= rtol)) else None


def _check_has_float64(x: Array) -> None:
    if wide_dtype(x) != array_namespace(x).float64:
        raise Float64Needed


def _of_each_block(damping: Array | float, chunks: Sequence[Array]) -> Array:
    """Return the damping of each block in the widest dtype, shape ``(n,)``, on the device of the chunks."""
    # computed from a chunk, because new arrays would need the device by name
    first = chunks[0][:, 0, 0]
    return array_namespace(first).zeros_like(first, dtype=wide_dtype(first)) + damping


def _least_damping(chunks: Sequence[Array]) -> float:
    """Return the damping below which gradient squares that matter relative to it may underflow.

    Relative to the damping only squares above ``eps damping`` matter, and they must be normal numbers.
    """
    limits = array_namespace(chunks[0]).finfo(chunks[0].dtype)
    return float(limits.smallest_normal) / float(limits.eps)


def _width(chunks: Sequence[Array]) -> int:
    return sum(int(chunk.shape[-1]) for chunk in chunks)


def _over_cache_slices(
    chunks: Sequence[Array], dtype: Any, function: Callable[[Iterable[Array], slice], Array]
) -> Array:
    """Return ``function(chunks of some blocks in dtype, these blocks)`` for blocks that fit the cache, joined."""
    xp = array_namespace(chunks[0])
    results = []
    for blocks in cache_slices(chunks):
        # a generator, so that one converted chunk is in memory at a time
        converted = (xp.asarray(chunk[blocks, :, :], dtype=dtype) for chunk in chunks)
        results.append(function(converted, blocks))
    return _concat(results, axis=0)


def _cache_columns(chunk: Array) -> list[Array]:
    """Return the columns of a chunk in pieces that stay in a CPU's cache; elsewhere all of them at once."""
    count, rows, width = chunk.shape
    if not runs_on_cpu(chunk):
        return [chunk]
    at_once = max(1, CACHE_BYTES // (count * rows * chunk.dtype.itemsize))
    return split_columns(chunk, -(-width // at_once))


def _refinements(dtype: Any, right: Array) -> int:
    """Return the largest number of refinements of a solve with a factor of ``dtype``."""
    xp = array_namespace(right)
    if dtype == xp.float64:
        return 0
    return REFINEMENTS if right.dtype == xp.float64 else 1


def _is_small(change: Array, solved: Array) -> bool:
    """Return whether the last refinement of each vector, shape ``(n, k, c)``, was below ten digits."""
    xp = array_namespace(change)
    if change.dtype != xp.float64:
        return True
    return bool(xp.all(xp.max(xp.abs(change), axis=-2) <= 1e-10 * xp.max(xp.abs(solved), axis=-2)))


def _with_solve(product: Array, explained: Array) -> Array:
    """Return by how much rounding is amplified, in ``S`` and in the solve."""
    xp = array_namespace(product)
    return product + xp.sqrt(product * xp.maximum(explained, xp.zeros_like(explained)))


def _bounds(chunks: Sequence[Array]) -> list[tuple[int, int]]:
    """Return the first and one past the last column of each chunk."""
    ends = list(itertools.accumulate((int(chunk.shape[-1]) for chunk in chunks), initial=0))
    return list(itertools.pairwise(ends))


def _is_column(columns: Array, start: int, stop: int) -> Array:
    """Return which of the columns from ``start`` to ``stop`` each of ``columns`` is, shape ``(n, k, stop - start)``."""
    return columns[:, :, None] == _range(columns, stop - start)[None, None, :] + start


def _take_columns(chunk: Array, columns: Array, start: int, stop: int) -> Array:
    """Return some columns of a chunk, shape ``(n, m, k)``; zero where another chunk has them."""
    xp = array_namespace(chunk)
    is_inside = (columns >= start) & (columns < stop)
    indices = xp.where(is_inside, columns - start, xp.zeros_like(columns))[:, None, :]
    taken = xp.take_along_axis(chunk, xp.broadcast_to(indices, (*chunk.shape[:2], indices.shape[-1])), axis=-1)
    return xp.where(is_inside[:, None, :], taken, xp.zeros_like(taken))


def _signs(like: Array, count: int) -> Array:
    """Return ``count`` vectors of signs that look random, shape ``(1, k, count)`` for ``like`` of shape ``(n, k)``."""
    xp = array_namespace(like)
    rows = _range(like, like.shape[-1])[:, None] + 1
    columns = _range(like, count)[None, :] + 1
    # a generator of numbers in sequence would need the device by name
    hashed = (rows * 2654435761 + columns * 40503 + rows * rows * columns * 97) % 4294967296
    bits = (hashed * 2246822519 % 4294967296) // 65536 % 2
    return xp.asarray(1 - 2 * bits, dtype=like.dtype)[None, :, :]


def _range(like: Array, count: int) -> Array:
    """Return ``0 .. count - 1`` on the device of an array of at least one entry."""
    xp = array_namespace(like)
    ones = xp.ones_like(xp.broadcast_to(xp.reshape(like, (-1,))[:1], (count,)), dtype=xp.int64)
    return xp.cumulative_sum(ones) - 1


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


def _primal_product(chunks: Iterable[Array], blocks: slice) -> Array:
    gradients = _concat(list(chunks), axis=-1)
    product = lower_gram(array_namespace(gradients).matrix_transpose(gradients))
    product /= gradients.shape[-2]
    return product


def _rows_times(chunks: Sequence[Array], x: Array) -> Array:
    """Return ``G x`` of each block for ``x`` of shape ``(n, B, k)``, in its dtype; shape ``(n, m, k)``."""
    xp = array_namespace(x)
    total = None
    start = 0
    for chunk in chunks:
        stop = start + chunk.shape[-1]
        product = matmul(xp.asarray(chunk, dtype=x.dtype), x[:, start:stop, :])
        total = product if total is None else total + product
        start = stop
    return total


def _columns_times(chunks: Sequence[Array], coefficients: Array) -> Array:
    """Return ``G^T c`` of each block for ``c`` of shape ``(n, m, k)``, in its dtype; shape ``(n, B, k)``."""
    xp = array_namespace(coefficients)
    dtype = coefficients.dtype
    products = [matmul(xp.matrix_transpose(xp.asarray(chunk, dtype=dtype)), coefficients) for chunk in chunks]
    return _concat(products, axis=-2)


def _concat(arrays: list[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else array_namespace(arrays[0]).concat(arrays, axis=axis)


def _check_overflow(x: Array) -> None:
    if not np.isfinite(float(array_namespace(x).max(x))):
        raise np.linalg.LinAlgError("the products of the gradients overflow")
