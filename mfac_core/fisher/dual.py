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

The bound of all columns. ``a <= kappa |x|^2`` with ``kappa`` the largest eigenvalue of ``D^(1/2) S^-1 D^(1/2)``,
``D = diag(S)``, and ``c`` is at most the norm of ``D^(-1/2) E D^(-1/2)`` in units of ``eps``, because
``y^T E y = (D^(1/2) y)^T (D^(-1/2) E D^(-1/2)) (D^(1/2) y)``. Over random ensembles in float32 with ``c eps kappa`` up
to ``FIRST_ORDER`` the error was at most ``19 eps kappa |x|^2``, less than a third of ``BOUND_FACTOR``. For a larger
``kappa`` the bound grows: panels are multiplied by inverses. An inverse ``X`` of ``L_ii`` is rounded by
``eps |X| |L_ii| |X|``, which makes ``E`` larger by up to the square of the condition number of ``L_ii``, of the order
of ``kappa``. In float64, with nearly equal samples, the error reached ``3e-4 eps kappa^2 |x|^2``. Hence the bound
``BOUND_FACTOR (1 + kappa / STABLE)`` of ``c``.
The power method estimates ``kappa`` (Kuczynski and Wozniakowski): for ``k`` standard normal vectors ``z``, the mean of
``|A^t z|^2`` is at least ``kappa^(2t) chi^2_k / k``, and on average at most ``m kappa^(2t)``. With ``k = 8`` and
``t = 3`` the estimate is below ``0.6 kappa`` with a probability below 1e-4, and at most about ``m^(1/6) kappa``.

The second order. The error of ``y`` leaves the residual ``rho = E y``, so that ``rho^T S^-1 rho`` is at most
``kappa (c eps)^2 a <= (c eps kappa)^2``. A column that is replaced needs no measurement if that, relative to its value,
is small.

The limit of the estimates. They use the factor itself, also in ``|L^-1 rho|^2``. If ``c eps kappa`` exceeds one, the
least eigenvalues of ``S`` are lost in its rounding: those of ``L L^T`` can be a thousand times larger, and what the
columns have in their directions is missed by ``x``, ``y`` and the estimates alike. In the direction ``D^(1/2) z`` it is
``(g^T z)^2 / z^T S z``, where ``z^T S z = m lambda |z|^2 + |G^T z|^2`` has positive terms only; with the factor it is
``(g^T z)^2 / |L^T z|^2``. Over the vectors with which the power method ends, the difference, added up over all columns,
must be far below ``rtol``. Samples that repeat exactly pass: no column has a part in the direction of their difference.

The inverse diagonal is therefore evaluated in up to six steps, each only if the one before does not suffice:

1. ``r = 1 - |x|^2`` for all columns, and the bound ``eps (c amplification + 8) (1 - r) / r`` of the error of the
   smallest. The amplification, the largest ``S_ii / L_ii^2``, stands in for ``a / |x|^2``, with ``L^-T`` in
   ``y = L^-T x`` replaced by its diagonal: ``L_ii^2`` is what remains of ``S_ii`` once the samples before it are
   projected out.
2. The bound of each column by ``kappa``. The columns that exceed it take the value that does not cancel: mostly a few
   with a small ``r``. At most about ``m`` columns have a small ``r``, because all ``|x|^2`` add up to
   ``trace(S^-1 G G^T) < m``.
3. The bound of ``c`` is replaced by a measured one, if that can save more than it costs. The columns with the largest
   ``a / r``, and as many others, are evaluated again by the form that does not cancel. The differences give ``c``, and
   ``c`` with the margin ``SAFETY`` the error of every column, with ``kappa |x|^2`` in place of ``a``.
4. ``a`` of all columns, from random signs ``z``: ``(z^T D^(1/2) S^-1 g)^2`` has the mean ``a`` (Johnson and
   Lindenstrauss). It is far below ``kappa |x|^2`` if samples repeat. If ``c eps kappa`` is too large for steps 2 and
   3, this one follows only where little is missed, see above. Then ``c`` as in step 3, and the errors of the
   second order of the same columns.
5. Columns whose error is above ``rtol`` take the value that does not cancel.
6. The whole group in float64, by the same steps (``factors.py``).

Amplifications are relative to the matrix scaled to a unit diagonal: a few large gradient samples do no harm.

References:
    Higham (2002), Accuracy and Stability of Numerical Algorithms, 2nd edition.
    Hoerl and Kennard (1970), Ridge Regression: Biased Estimation for Nonorthogonal Problems.
    Johnson and Lindenstrauss (1984), Extensions of Lipschitz mappings into a Hilbert space.
    Kuczynski and Wozniakowski (1992), Estimating the Largest Eigenvalue by the Power and Lanczos Algorithms with a
        Random Start.
    Woodbury (1950), Inverting modified matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mfac_core.backends import Array, array_namespace
from mfac_core.backends.threads import map_on_threads, split_columns, split_for_threads
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
    MEASURED,
    PROBES,
    REFINEMENTS,
    SAFETY,
    bound_factor,
    check_overflow,
    columns_to_measure,
    is_small,
    random_normal,
    random_signs,
)
from mfac_core.fisher.triangular import TriangularFactor, cholesky, diagonals, set_diagonals

__all__ = ["DualFactor"]

CANCELLED = 1e-4
"""Columns whose ``1 - sum`` is below this in float64 are evaluated by the form that does not cancel. The difference has
lost at most four of sixteen digits where it is used."""

FIRST_ORDER = 0.1
"""Largest ``c eps kappa`` at which errors of higher order than the first are neglected."""

HIGHER_ORDERS = 4
"""Margin of the error of the second order for those of higher orders: over random ensembles 1.9 were needed."""

AFFORDABLE = PROBES + 2 * MEASURED
"""Columns that can be evaluated by the form that does not cancel in the time that random signs and measured columns
take."""

SUMMED = 4096
"""Columns over which products are added up at once. In a sum of more numbers of like size, such as the squares of
signs, each is rounded alike relative to what has been summed: at 65,000 columns the sum was off by 200 ``eps``."""

POWER_VECTORS = 8
"""Random vectors of the power method that estimates ``kappa``."""

POWERS = 3
"""Steps of that power method."""


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

    @property
    def _epsilon(self) -> float:
        """Relative spacing of the numbers of the dtype."""
        return float(array_namespace(self.norms).finfo(self.dtype).eps)

    @property
    def _cancelled(self) -> float:
        """Remainder below which too many digits have cancelled, whatever the estimated error."""
        return CANCELLED if self.in_float64 else 0.0

    def diagonal(self, chunks: Sequence[Array], rtol: float) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and its estimated relative error in each block, not finite if unusable."""
        xp = array_namespace(chunks[0])

        def one_minus_sums(converted: Iterable[Array], blocks: slice) -> Array:
            lower = self.lower.select_blocks(blocks)
            sums = [total for chunk in converted for total in map_on_threads(lower.column_sums, cache_columns(chunk))]
            return 1 - concat(sums, axis=-1)

        remainder = over_cache_slices(chunks, self.dtype, one_minus_sums)
        smallest = xp.min(remainder, axis=-1)
        amplification = xp.max(self.norms / self.lower.pivots, axis=-1)
        error = self._epsilon * (bound_factor(amplification) * amplification + 8) * (1 - smallest) / smallest
        is_bounded = (smallest > self._cancelled) & (error <= rtol)
        if bool(xp.all(is_bounded)):
            return remainder, error
        if not bool(xp.all(xp.isfinite(remainder))):
            return remainder, xp.full_like(error, float("inf"))
        kappa = self._kappa()
        for blocks in cache_slices(chunks):
            if not bool(xp.all(is_bounded[blocks])):
                selected = [chunk[blocks, :, :] for chunk in chunks]
                checked = self.select_blocks(blocks)._check(selected, remainder[blocks, :], kappa[blocks, :], rtol)
                remainder[blocks, :], error[blocks] = checked
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

    def _kappa(self) -> Array:
        """Return the largest eigenvalue of ``D^(1/2) S^-1 D^(1/2)`` of each block, estimated; shape ``(n, 1)``."""
        return self._power_method()[0]

    def _missed(self, chunks: Sequence[Array]) -> Array:
        """Return how much of the sum of all ``|x|^2`` the factor misses where it is the least accurate, ``(n,)``.

        In the direction ``D^(1/2) z`` the sum is ``|G^T z|^2 / z^T S z``, and with the factor
        ``|G^T z|^2 / |L^T z|^2``.
        """
        xp = array_namespace(self.norms)
        right = xp.sqrt(self.norms)[:, :, None] * self._power_method()[1]
        z = self.lower.solve_symmetric(right)
        rows = xp.matrix_transpose(z)
        explained = sum(_row_sums_of_squares(rows @ xp.asarray(chunk, dtype=self.dtype)) for chunk in chunks)
        shift = xp.asarray(self.shift, dtype=self.dtype)[:, None]
        exact = explained + shift * xp.sum(z * z, axis=-2)
        missed = explained / exact * (1 - exact / xp.sum(z * right, axis=-2))
        return xp.max(xp.abs(missed), axis=-1)

    def _power_method(self) -> tuple[Array, Array]:
        """Return ``kappa`` of each block, shape ``(n, 1)``, and the vectors that the power method ends with."""
        xp = array_namespace(self.norms)
        scale = xp.sqrt(self.norms)[:, :, None]
        vectors = random_normal(self.norms, POWER_VECTORS)
        kappa: Array = 1.0
        for _ in range(POWERS):
            vectors = scale * self.lower.solve_symmetric(scale * vectors)
            growth = xp.sqrt(xp.sum(vectors * vectors, axis=(-2, -1), keepdims=True) / POWER_VECTORS)
            vectors = vectors / growth
            kappa = kappa * growth ** (1 / POWERS)
        return kappa[:, :, 0], vectors

    def _check(self, chunks: Sequence[Array], remainder: Array, kappa: Array, rtol: float) -> tuple[Array, Array]:
        """Return the remainders, those not accurate enough replaced, and the estimated error of each block."""
        xp = array_namespace(remainder)
        explained = 1 - remainder
        bound = self._epsilon * bound_factor(kappa)
        if bool(xp.all(bound * kappa <= FIRST_ORDER)):

            def errors_of(ratio: Array) -> Array:
                return (ratio * (kappa + xp.sqrt(kappa)) + 8 * self._epsilon) * explained / remainder

            ratio, errors = bound, errors_of(bound)
            # as many exceed the bound with the smallest c that could be measured
            fewest = self._most_inaccurate(remainder, errors * (SAFETY / BOUND_FACTOR), rtol)
            if self._most_inaccurate(remainder, errors, rtol) > fewest + MEASURED and fewest <= AFFORDABLE:
                ratio, _ = self._measured(chunks, remainder, -remainder, certify=False)
                errors = errors_of(ratio)
            if self._most_inaccurate(remainder, errors, rtol) <= AFFORDABLE:
                replaced = self._replace(chunks, remainder, errors, lambda exact: (ratio * kappa) ** 2 / exact, rtol)
                if bool(xp.all(replaced[1] <= rtol)):
                    return replaced
        elif not bool(xp.all(self._missed(chunks) <= rtol / SAFETY)):
            return remainder, xp.full_like(remainder[:, 0], float("inf"))
        tiny = xp.full_like(remainder, float(xp.finfo(self.dtype).smallest_normal) / self._epsilon)
        positive = xp.maximum(remainder, tiny)
        amplified = _with_solve(xp.maximum(self._amplified(chunks), tiny), explained)
        ratio, second_order = self._measured(chunks, remainder, amplified / positive, certify=True)
        errors = (ratio * amplified + 8 * self._epsilon * explained) / positive
        is_small = not self.in_float64 and bool(xp.all(second_order <= rtol / 2))
        return self._replace(chunks, remainder, errors, (lambda exact: second_order) if is_small else None, rtol)

    def _is_accurate(self, remainder: Array, errors: Array, rtol: float) -> Array:
        """Return which remainders are accurate enough."""
        return (remainder > self._cancelled) & (errors <= rtol)

    def _most_inaccurate(self, remainder: Array, errors: Array, rtol: float) -> int:
        """Return the largest number of remainders of a block that are not accurate enough."""
        xp = array_namespace(remainder)
        return int(xp.max(xp.count_nonzero(~self._is_accurate(remainder, errors, rtol), axis=-1)))

    def _measured(
        self, chunks: Sequence[Array], remainder: Array, relative: Array, *, certify: bool
    ) -> tuple[Array, Array]:
        """Return ``c eps`` of each block and the error of the accurate form, with a margin, from some of its columns.

        Args:
            chunks: Gradients.
            remainder: ``1 - |x|^2`` of each column, shape ``(n, B)``.
            relative: Orders the columns by the relative error that is expected, shape ``(n, B)``.
            certify: Whether the error of the second order is measured.
        """
        xp = array_namespace(remainder)
        columns = columns_to_measure(relative)
        exact, rounding, second_order, amplified = self._accurately(chunks, columns, certify=certify)
        errors = xp.abs(xp.take_along_axis(remainder, columns, axis=-1) - exact)
        errors = errors - 8 * self._epsilon  # rounding of the two values themselves, which is not amplified
        # not by their estimated amplification, which is too large just where it is the largest
        amplified = _with_solve(amplified, 1 - exact)
        tiny = xp.full_like(amplified, float(xp.finfo(self.dtype).smallest_normal) / self._epsilon)
        ratio = xp.max(errors / xp.maximum(amplified, tiny), axis=-1, keepdims=True)
        ratio = xp.maximum(ratio, xp.full_like(ratio, self._epsilon))
        return SAFETY * ratio, SAFETY * xp.max(second_order + rounding, axis=-1, keepdims=True)

    def _replace(
        self,
        chunks: Sequence[Array],
        remainder: Array,
        errors: Array,
        second_order: Callable[[Array], Array] | None,
        rtol: float,
    ) -> tuple[Array, Array]:
        """Return the remainders, those not accurate enough replaced, and the estimated error of each block.

        Args:
            chunks: Gradients.
            remainder: ``1 - |x|^2`` of each column, shape ``(n, B)``.
            errors: Their estimated relative errors.
            second_order: From the entries that replace some, the error of the second order that is left in them,
                relative to them; ``None`` if it must be measured.
            rtol: Largest relative error.
        """
        xp = array_namespace(remainder)
        is_accurate = self._is_accurate(remainder, errors, rtol)
        error = xp.max(xp.where(is_accurate, errors, xp.zeros_like(errors)), axis=-1)
        # how many of the columns up to each one are replaced
        places = xp.cumulative_sum(xp.asarray(~is_accurate, dtype=xp.int64), axis=-1)
        count = int(xp.max(places[:, -1]))
        if not count:
            return remainder, error
        if count > self.norms.shape[-1] and not self.in_float64:
            return remainder, xp.full_like(error, float("inf"))  # float64 is faster
        # those not accurate enough in their order, then as many others as another block has more
        columns = xp.argsort(xp.asarray(is_accurate, dtype=xp.int64), axis=-1, stable=True)[:, :count]
        exact, rounding, remaining, _ = self._accurately(chunks, columns, certify=second_order is None)
        remaining = rounding + (HIGHER_ORDERS * remaining if second_order is None else second_order(exact))
        values = xp.take_along_axis(exact, xp.maximum(places - 1, xp.zeros_like(places)), axis=-1)
        return xp.where(is_accurate, remainder, values), xp.maximum(error, xp.max(remaining, axis=-1))

    def _amplified(self, chunks: Sequence[Array]) -> Array:
        """Return ``sum_i S_ii y_i^2`` of each column, estimated from random signs; shape ``(n, B)``."""
        xp = array_namespace(self.norms)
        probes = self.lower.solve_symmetric(xp.sqrt(self.norms)[:, :, None] * random_signs(self.norms, PROBES))
        probes = xp.matrix_transpose(probes)
        products = (probes @ xp.asarray(chunk, dtype=self.dtype) for chunk in chunks)
        return concat([column_sums_of_squares(product) for product in products], axis=-1) / PROBES

    def _accurately(
        self, chunks: Sequence[Array], columns: Array, *, certify: bool
    ) -> tuple[Array, Array, Array, Array]:
        """Return some entries by the form that does not cancel, and their errors.

        Args:
            chunks: Gradients.
            columns: Which entries of each block, shape ``(n, k)``.
            certify: Whether the error of the second order is evaluated; that doubles the time.

        Returns:
            The entries, their relative errors by rounding and of the second order (zero unless certified),
            and ``sum_i S_ii y_i^2``; each of shape ``(n, k)``.
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
            values = values + _row_sums_of_squares(left)
            if certify:
                residual = residual - left @ xp.matrix_transpose(converted)
        amplified = xp.sum(self.norms[:, :, None] * solved * solved, axis=-2)
        rounding = 4 * float(xp.finfo(self.dtype).eps) * (1 + xp.sqrt(amplified / values))
        if not certify:
            return values, rounding, xp.zeros_like(values), amplified
        remaining = self.lower.solve(xp.matrix_transpose(residual))
        return values, rounding, xp.sum(remaining * remaining, axis=-2) / values, amplified


def _gram(chunks: Iterable[Array], blocks: slice) -> Array:
    total = norms = None
    # each thread multiplies some of the columns; the products of all add up to the Gram matrix
    for chunk in chunks:
        for piece in _summed_at_once(chunk):
            for product in map_on_threads(lower_gram, split_for_threads(piece)):
                total = product if total is None else total + product
        squares = _row_sums_of_squares(chunk)
        norms = squares if norms is None else norms + squares
    # a product adds squares one by one, so that many small ones are lost: the diagonal is systematically too small
    set_diagonals(total, norms)
    return total


def _row_sums_of_squares(x: Array) -> Array:
    """Return the sums of squares over the columns of ``x`` of shape ``(n, rows, columns)``; shape ``(n, rows)``."""
    xp = array_namespace(x)
    if not runs_on_cpu(x):
        return xp.sum(x * x, axis=-1)
    # dot products need no array of squares
    squares = [piece[:, :, None, :] @ piece[:, :, :, None] for piece in _summed_at_once(x)]
    return xp.sum(concat(squares, axis=-1)[..., 0, :], axis=-1)


def _summed_at_once(x: Array) -> list[Array]:
    """Return the columns of ``x`` in pieces over which sums keep their digits."""
    return split_columns(x, -(-x.shape[-1] // SUMMED))


def _with_solve(amplified: Array, explained: Array) -> Array:
    """Return ``a + sqrt(a) |x|``: by how much rounding is amplified, in ``S`` and in the solve."""
    xp = array_namespace(amplified)
    return amplified + xp.sqrt(amplified * xp.maximum(explained, xp.zeros_like(explained)))
