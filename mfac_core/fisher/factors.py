r"""The inverse of the damped empirical Fisher of one group of blocks.

Notation: ``n`` blocks of ``B`` weights each, ``m`` gradient samples; a *chunk* is an array of shape ``(n, m, width)``
that holds some columns of the blocks, and the chunks of a group together hold all ``B``. One Fisher per block,

.. math:: F = \lambda I + \frac{1}{m} G^T G, \qquad S = m \lambda I + G G^T = L L^T, \qquad W = L^{-1} G.

The dual form factors ``S`` (``m x m``), the primal form ``F`` itself (``B x B``); each is used if it is smaller.
Results are those of :math:`\lambda F^{-1}`, whose eigenvalues lie in ``(0, 1]`` for any scale of the gradients.

Error estimates. An entry of ``S`` is rounded relative to the norms of its two samples: the computed matrix is ``S + E``
with ``|E_ij|`` of the order of ``eps sqrt(S_ii S_jj)``, and its Cholesky factor adds an error of the same form (Higham,
theorem 10.5). To first order the dual form then evaluates ``g^T S^-1 g``, for a column ``g`` of ``G``, with the error
``y^T E y``, ``y = S^-1 g``. If the signs of ``E_ij`` are independent, this has the size ``eps sum_i S_ii y_i^2``. With
``x = L^-1 g``, ``y`` is ``L^-T x``. The estimate replaces ``L^-T`` by its diagonal, so the sum is at most
``max_i (S_ii / L_ii^2) |x|^2``. Here ``L_ii^2`` is what remains of ``S_ii`` once the samples before it are projected
out.

In the primal form ``[F^-1]_qq`` has the error ``z^T E z``, ``z = F^-1 e_q``. By Cauchy-Schwarz
``z_i^2 <= [F^-1]_ii [F^-1]_qq``, so each of its terms, relative to ``[F^-1]_qq``, is at most
``eps max_i F_ii [F^-1]_ii``. Both amplifications are relative to the matrix scaled to a unit diagonal: a few large
gradient samples, or a few columns with large gradients, do no harm.

The factors 4 and 8 in the code stand for the number of such errors that add up; :data:`RELATIVE_ERROR` compares the
estimate with true errors.

References:
    Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.
    Higham (2002), Accuracy and Stability of Numerical Algorithms, 2nd edition.
    Woodbury (1950), Inverting modified matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.backends.threads import map_on_threads, split_columns, split_for_threads
from mfac_core.errors import IllConditionedError
from mfac_core.fisher.damping import damping_text
from mfac_core.fisher.kernels import column_sums_of_squares, lower_gram, matmul, runs_on_cpu, wide_dtype
from mfac_core.fisher.triangular import TriangularFactor, cholesky, diagonals

__all__ = ["Factor", "Float64Needed", "cache_slices", "evaluate", "factor", "fisher_quadratic", "gradients_times"]

CANCELLED = 1e-4
"""Columns whose ``1 - sum`` is below this in float64 are evaluated by a form that does not cancel. The difference has
lost at most four of sixteen digits where it is used."""

REFINEMENTS = 2
"""Steps that refine a solve with a float32 factor to float64; each gains about five digits (Higham, chapter 12)."""

CACHE_BYTES = 2 * 2**20
"""Bytes of gradients processed at once on the CPU, so that intermediate results stay in its cache."""


class Float64Needed(Exception):
    """A group needs float64, and its device has none: it can be evaluated on the host."""


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


def evaluate(chunks: Sequence[Array], damping: Array | float, rtol: float) -> tuple[Factor, Array]:
    """Factor the Fisher of one group of blocks and evaluate its inverse diagonal, in float32 if that suffices.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``, float32 or float64, all on one device. Not modified.
        damping: Added to the diagonal of the empirical Fisher, positive: one number, or one for each block, shape
            ``(n,)``, in the widest dtype of the device.
        rtol: Largest relative error of the inverse diagonal.

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
            found = _evaluate_in(chunks[0].dtype, chunks, damping, rtol)
            if found is not None and bool(xp.all(damping >= _least_damping(chunks))):
                return found
            _check_has_float64(chunks[0])
        found = _evaluate_in(xp.float64, chunks, damping, max(rtol, 1e-4))
    if found is None:
        raise IllConditionedError(
            "the Fisher of a block cannot be inverted to a relative error of "
            f"{rtol:g} with damping {damping_text(float(xp.min(damping)), float(xp.max(damping)))}: its gradients are "
            "too large relative to the damping, or too similar; choose a larger damping"
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

    def diagonal(self, chunks: Sequence[Array]) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and an estimate of its relative error in each block, not finite if unusable."""
        xp = array_namespace(chunks[0])

        def one_minus_sums(converted: Iterable[Array], blocks: slice) -> Array:
            lower = self.lower.select_blocks(blocks)
            sums = [total for chunk in converted for total in map_on_threads(lower.column_sums, _cache_columns(chunk))]
            return 1 - _concat(sums, axis=-1)

        remainder = _over_cache_slices(chunks, self.dtype, one_minus_sums)
        smallest = xp.min(remainder, axis=-1)
        restored = xp.zeros_like(smallest)
        if self.in_float64 and bool(xp.any(smallest < CANCELLED)):
            smallest, restored = self._restore_cancelled(chunks, remainder)
        # |x|^2 = 1 - remainder: rounding of S, amplified by the solve, and rounding of the sum of squares itself,
        # both relative to the remainder; (1 - r) / r is largest for the smallest
        epsilon = float(xp.finfo(self.dtype).eps)
        error = epsilon * (4 * self._amplification() + 8) * (1 - smallest) / smallest
        error = xp.where(smallest > 0, error, xp.full_like(error, float("inf")))
        if self.in_float64 and not bool(xp.all(error <= 1e-5)):
            # the estimate is far too high if samples repeat: measure the solves themselves before refusing
            error = epsilon * self._error_of_solves(chunks, remainder)
        return remainder, error + epsilon * restored

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64) if self.in_float64 else x
        # Woodbury: damping F^-1 x = x - G^T S^-1 G x
        rows = _rows_times(chunks, right)
        solved = self._solve(rows)
        if right.dtype != self.dtype:
            # iterative refinement, with residuals in float64
            for _ in range(REFINEMENTS):
                product = _rows_times(chunks, _columns_times(chunks, solved))
                product += self.shift[:, None, None] * solved
                solved = solved + self._solve(rows - product)
        return xp.asarray(right - _columns_times(chunks, solved), dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=self.dtype)
        # (m damping I + G^T G)^-1 G^T = G^T S^-1: no difference, in which digits could cancel
        return xp.asarray(_columns_times(chunks, self._solve(right[..., None]))[..., 0], dtype=coefficients.dtype)

    def select_blocks(self, blocks: slice) -> _DualFactor:
        lower, norms, shift = self.lower.select_blocks(blocks), self.norms[blocks, :], self.shift[blocks]
        return replace(self, lower=lower, norms=norms, shift=shift)

    def _amplification(self) -> Array:
        """Return how much rounding of ``S`` grows in a solve: the largest ``S_ii / L_ii^2`` of each block."""
        return array_namespace(self.norms).max(self.norms / self.lower.pivots, axis=-1)

    def _solve(self, rows: Array) -> Array:
        """Return ``S^-1 rows`` for rows of shape ``(n, m, k)``, in their dtype."""
        xp = array_namespace(rows)
        right = xp.asarray(rows, dtype=self.dtype)
        return xp.asarray(self.lower.solve_transposed(self.lower.solve(right)), dtype=rows.dtype)

    def _restore_cancelled(self, chunks: Sequence[Array], remainder: Array) -> tuple[Array, Array]:
        """Evaluate again, in place, each ``1 - sum`` that has cancelled.

        For the cancelled columns ``D`` and the others ``R``, ``[F^-1]_DD`` is the inverse of the Schur complement
        ``F_DD - F_DR F_RR^-1 F_RD``. With ``I - G_R (m damping I + G_R^T G_R)^-1 G_R^T = m damping S_R^-1`` this is

            damping [F^-1]_DD = (I + G_D^T S_R^-1 G_D)^-1,    S_R = m damping I + G_R G_R^T,

        a sum of positive terms, in which nothing cancels.

        Returns:
            For each block the smallest that has not cancelled, and how much rounding is amplified in those that have.
        """
        xp = array_namespace(remainder)
        cancelled = remainder < CANCELLED
        smallest = xp.min(xp.where(cancelled, xp.ones_like(remainder), remainder), axis=-1)
        amplified = xp.zeros_like(smallest)
        blocks = xp.any(cancelled, axis=-1)
        for block in range(blocks.shape[0]):
            if not bool(blocks[block]):
                continue
            gradients = _concat([chunk[block : block + 1, :, :] for chunk in chunks], axis=-1)
            gradients = xp.asarray(gradients, dtype=xp.float64)
            columns = xp.nonzero(cancelled[block, :])[0]
            others = xp.where(cancelled[block, :], xp.zeros_like(gradients), gradients)
            gram = lower_gram(others)
            shift = self.shift[block : block + 1]
            solved = cholesky(gram, shift).solve(xp.take(gradients, columns, axis=-1))
            inner = matmul(xp.matrix_transpose(solved), solved)
            norms = diagonals(inner) + 1
            # diag((C C^T)^-1) are the column sums of squares of C^-1
            values = column_sums_of_squares(cholesky(inner, 1.0).inverse())
            # the estimate of the primal form
            amplified[block] = 8 * xp.max(norms * values)
            for position in range(columns.shape[0]):
                remainder[block, int(columns[position])] = values[0, position]
        return smallest, amplified

    def _error_of_solves(self, chunks: Sequence[Array], remainder: Array) -> Array:
        """Return the largest relative error in units of eps, from ``sum_i S_ii y_i^2`` of each column not cancelled."""
        xp = array_namespace(remainder)

        def amplified(converted: Iterable[Array], blocks: slice) -> Array:
            lower = self.lower.select_blocks(blocks)
            norms = self.norms[blocks, :, None]
            solves = [lower.solve_transposed(lower.solve(chunk)) for chunk in converted]
            return _concat([xp.sum(norms * solve * solve, axis=-2) for solve in solves], axis=-1)

        error = (4 * _over_cache_slices(chunks, self.dtype, amplified) + 8) / remainder
        return xp.max(xp.where(remainder < CANCELLED, xp.zeros_like(error), error), axis=-1)


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
        """Factor ``F`` of each block, computed in a dtype."""
        xp = array_namespace(chunks[0])
        fisher = _over_cache_slices(chunks, dtype, _primal_product)
        norms = diagonals(fisher) + xp.asarray(damping, dtype=dtype)[:, None]
        _check_overflow(norms)
        # where float32 is tried the factor is much smaller than the product; in float64 it adds no error to that of F
        return cls(cholesky(xp.asarray(fisher, dtype=xp.float64), damping), norms, damping, dtype)

    @property
    def in_float64(self) -> bool:
        return bool(self.dtype == array_namespace(self.damping).float64)

    @property
    def num_bytes(self) -> int:
        return self.lower.num_bytes

    def diagonal(self, chunks: Sequence[Array]) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and an estimate of its relative error in each block, not finite if unusable."""
        xp = array_namespace(chunks[0])
        # F^-1 = L^-T L^-1
        diagonal = column_sums_of_squares(self.lower.inverse())
        damped = diagonal * self.damping[:, None]
        # the exact value is at most 1: only rounding of the sum can exceed it
        damped = xp.where((damped > 1) & (damped < 1 + 1e-9), xp.ones_like(damped), damped)
        usable = xp.all((damped > 0) & (damped <= 1 + 1e-6), axis=-1)
        error = float(xp.finfo(self.dtype).eps) * 8 * xp.max(self.norms * diagonal, axis=-1)
        error = xp.where(usable, error, xp.full_like(error, float("inf")))
        return xp.asarray(damped, dtype=self.dtype), error

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64)
        out = self._solve(right)
        if x.dtype != self.dtype and not self.in_float64:
            # iterative refinement: F was rounded to float32, the residuals are computed from the gradients
            for _ in range(REFINEMENTS):
                product = _columns_times(chunks, _rows_times(chunks, out))
                product /= chunks[0].shape[-2]
                product += self.damping[:, None, None] * out
                out = out + self._solve(right - product)
        return xp.asarray(self.damping[:, None, None] * out, dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=self.dtype)
        product = _columns_times(chunks, right[..., None]) / coefficients.shape[-1]
        return xp.asarray(self._solve(xp.asarray(product, dtype=xp.float64))[..., 0], dtype=coefficients.dtype)

    def select_blocks(self, blocks: slice) -> _PrimalFactor:
        lower, norms, damping = self.lower.select_blocks(blocks), self.norms[blocks, :], self.damping[blocks]
        return replace(self, lower=lower, norms=norms, damping=damping)

    def _solve(self, right: Array) -> Array:
        return self.lower.solve_transposed(self.lower.solve(right))


_Form = type[_DualFactor] | type[_PrimalFactor]


def _form(chunks: Sequence[Array]) -> _Form:
    return _PrimalFactor if _width(chunks) <= chunks[0].shape[-2] else _DualFactor


def _evaluate_in(
    dtype: Any, chunks: Sequence[Array], damping: Array, rtol: float
) -> tuple[_DualFactor | _PrimalFactor, Array] | None:
    """Return factor and diagonal computed in a dtype; ``None`` if their estimated error exceeds ``rtol``."""
    try:
        factored = _form(chunks).of(chunks, damping, dtype)
        diagonal, error = factored.diagonal(chunks)
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


def _gram(chunks: Iterable[Array], blocks: slice) -> Array:
    total = None
    # each thread multiplies some of the columns; the products of all add up to the Gram matrix
    for chunk in chunks:
        for product in map_on_threads(lower_gram, split_for_threads(chunk)):
            total = product if total is None else total + product
    return total


def _primal_product(chunks: Iterable[Array], blocks: slice) -> Array:
    gradients = _concat(list(chunks), axis=-1)
    product = matmul(array_namespace(gradients).matrix_transpose(gradients), gradients)
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
