r"""The inverse of the damped empirical Fisher of one group of blocks.

Notation: ``n`` blocks of ``B`` weights each, ``m`` gradient samples; a *chunk* is an array of shape ``(n, m, width)``
that holds some columns of the blocks, and the chunks of a group together hold all ``B``. One Fisher per block,

.. math:: F = \lambda I + \frac{1}{m} G^T G, \qquad S = m \lambda I + G G^T = L L^T, \qquad W = L^{-1} G.

The dual form factors ``S`` (``m x m``), the primal form ``F`` itself (``B x B``); each is used where it is smaller.
Results are those of :math:`\lambda F^{-1}`, whose eigenvalues lie in ``(0, 1]`` whatever the scale of the gradients is.

References:
    Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.
    Woodbury (1950), Inverting modified matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.backends.threads import split_columns, split_for_threads, spread
from mfac_core.errors import IllConditionedError
from mfac_core.fisher.damping import damping_text
from mfac_core.fisher.kernels import column_sums_of_squares, lower_gram, matmul, runs_on_cpu
from mfac_core.fisher.triangular import cholesky, diagonals

__all__ = ["Factor", "Precise", "cache_parts", "evaluate", "factor", "fisher_quadratic", "gradients_times"]

RELATIVE_ERROR = 1e-5
"""Estimated relative rounding error of ``diag(F^-1)`` above which float32 blocks are evaluated in float64.

The true error is mostly below the estimate, and up to eight times above it where many samples share a large mean: at
most 4e-5 was seen over random ensembles of up to 1400 samples.
"""

LARGEST_ERROR = 1e-4
"""Estimated relative error above which a block is refused even in float64."""

CANCELLED = 1e-4
"""Columns whose ``1 - sum`` is below this in float64 are evaluated by a form that does not cancel."""

REFINEMENTS = 2
"""Steps that refine a solve with a float32 factor to float64; each gains about five digits."""

CACHE_BYTES = 2 * 2**20
"""Gradients that are worked on at once on the CPU, so that what is made of them stays in the cache."""

Precise = Array | bool
"""Which blocks of a group need float64: all, none, or those where a mask of shape ``(n,)`` is true."""


class Factor(Protocol):
    """The factored Fisher of one group; the gradients themselves are passed in again where they are needed.

    Attributes:
        precise: Which blocks were factored in float64.
    """

    precise: Precise

    @property
    def num_bytes(self) -> int:
        """Memory of the factor in bytes."""

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        """Return ``damping F^-1 x`` for ``x`` of shape ``(n, B, k)``, in the dtype of ``x``.

        A float64 ``x`` is answered in float64 by a float32 factor too: its solves are refined. That matters where ``x``
        is close to a combination of the gradients, of which ``F^-1`` leaves a small part.
        """

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        """Return ``F^-1 G^T c / m`` for ``c`` of shape ``(n, m)``; shape ``(n, B)``, in the dtype of ``c``."""

    def part(self, blocks: slice) -> Factor:
        """Return the factor of some of the blocks."""


def evaluate(chunks: Sequence[Array], damping: Array | float) -> tuple[Factor, Array]:
    """Factor the Fisher of one group of blocks and evaluate its inverse diagonal, each block as precisely as it needs.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``, float32 or float64, all on one device. Not modified.
        damping: Added to the diagonal of the empirical Fisher, positive: that of each block, shape ``(n,)``, float64,
            or one number for all.

    Returns:
        The factor, and ``damping diag(F^-1)`` of shape ``(n, B)``; in float64 where a block needed it.

    Raises:
        IllConditionedError: If a Fisher cannot be inverted even in float64.
    """
    xp = array_namespace(chunks[0])
    damping = _of_each_block(damping, chunks)
    precise: Precise = True
    # overflow is found by looking at the result, and cured by float64 or refused
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        tried = None if chunks[0].dtype == xp.float64 else _try_in_float32(chunks, damping)
        if tried is not None:
            precise = ~((tried[2] <= RELATIVE_ERROR) & (damping >= _least_damping(chunks)))
            if not bool(xp.any(precise)):
                return tried[:2]
            if bool(xp.all(precise)):
                precise, tried = True, None
        try:
            doubtful, damping = (chunks, damping) if precise is True else _take_of_both(chunks, damping, precise)
            exact = _form(chunks)(doubtful, damping, xp.float64)
            refined, error = exact.diagonal(doubtful)
            is_accurate = bool(xp.all(error <= LARGEST_ERROR))
        except np.linalg.LinAlgError:
            is_accurate = False
    if not is_accurate:
        raise IllConditionedError(
            "the Fisher of a block cannot be inverted with damping "
            f"{damping_text(float(xp.min(damping)), float(xp.max(damping)))}: its gradients are too large beside "
            "it, or too alike; choose a larger damping"
        )
    if tried is None:
        return exact, refined
    return _MixedFactor(tried[0], exact, precise), _choose(precise, xp.asarray(tried[1], dtype=xp.float64), refined)


def factor(chunks: Sequence[Array], damping: Array | float, precise: Precise) -> Factor:
    """Factor the Fisher of one group of blocks again.

    Args:
        chunks: The same gradients as in :func:`evaluate`.
        damping: The same as there.
        precise: Which blocks need float64, as :func:`evaluate` has found.

    Returns:
        The factor.
    """
    xp = array_namespace(chunks[0])
    damping = _of_each_block(damping, chunks)
    form = _form(chunks)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if isinstance(precise, bool):
            return form(chunks, damping, xp.float64 if precise else chunks[0].dtype)
        base = form(chunks, damping, chunks[0].dtype)
        return _MixedFactor(base, form(*_take_of_both(chunks, damping, precise), xp.float64), precise)


def cache_parts(chunks: Sequence[Array]) -> list[slice]:
    """Return the blocks of a group in pieces that stay in a CPU's cache; elsewhere all of them at once.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``.

    Returns:
        Slices of the first axis.
    """
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
        damping: Added to the diagonal of the empirical Fisher: that of each block, shape ``(n,)``, or one number.

    Returns:
        Shape ``(n,)``, float64.
    """
    xp = array_namespace(x)
    # float32 can hold the products where it cannot hold their squares
    rows, x = (xp.asarray(each, dtype=xp.float64) for each in (gradients_times(chunks, x), x))
    return 0.5 * (damping * xp.sum(x * x, axis=-1) + xp.sum(rows * rows, axis=-1) / rows.shape[-1])


def gradients_times(chunks: Sequence[Array], x: Array) -> Array:
    """Return ``G x`` of each block.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``.
        x: Shape ``(n, B)``, same device; its dtype is computed in.

    Returns:
        Shape ``(n, m)``.
    """
    return _rows_times(chunks, x[..., None])[..., 0]


class _DualFactor:
    """Factors ``S``, of the size of the number of gradients."""

    def __init__(self, chunks: Sequence[Array], damping: Array | float, dtype: Any) -> None:
        xp = array_namespace(chunks[0])
        gram = _over_parts(chunks, dtype, _gram)
        self._shift = chunks[0].shape[-2] * _of_each_block(damping, chunks)
        shift = xp.asarray(self._shift, dtype=dtype)
        self._norms = diagonals(gram) + shift[:, None]
        _refuse_overflow(self._norms)
        self._factor = cholesky(gram, shift)
        self.precise: Precise = dtype == xp.float64
        self._dtype = dtype
        # S is rounded relative to the norms of its own rows, so that a few large samples do no harm
        self._amplification = xp.max(self._norms / self._factor.pivots, axis=-1)

    @property
    def num_bytes(self) -> int:
        return self._factor.num_bytes

    def needs_float64(self, width: int) -> bool:
        """Return whether no block is likely to be accurate enough: a heuristic, to save the solve.

        The column sums of ``W * W`` are taken for as large as they can be on average, ``rows / width``. A wrong guess
        costs time and no digits: what is hopeless is evaluated in float64, and the rest has its error estimated.
        """
        xp = array_namespace(self._amplification)
        rows = self._factor.pivots.shape[-1]
        error = float(xp.finfo(self._dtype).eps) * self._amplification * (rows / width)
        return not bool(xp.any(error <= RELATIVE_ERROR))

    def diagonal(self, chunks: Sequence[Array]) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and an estimate of its relative error in each block, not finite if unusable."""
        xp = array_namespace(chunks[0])

        def one_minus_sums(part: Sequence[Array], blocks: slice) -> Array:
            lower = self._factor.part(blocks)
            sums = [total for chunk in part for total in spread(lower.column_sums, _cache_columns(chunk))]
            return 1 - _concat(sums, axis=-1)

        remainder = _over_parts(chunks, self._dtype, one_minus_sums)
        smallest = xp.min(remainder, axis=-1)
        restored = xp.zeros_like(smallest)
        if self.precise and bool(xp.any(smallest < CANCELLED)):
            smallest, restored = self._restore_cancelled(chunks, remainder)
        # rounding of S, amplified by the solve, and rounding of the sums, both relative to what 1 - sum leaves
        epsilon = float(xp.finfo(self._dtype).eps)
        error = epsilon * (4 * self._amplification + 8) * (1 - smallest) / smallest
        error = xp.where(smallest > 0, error, xp.full_like(error, float("inf")))
        if self.precise and not bool(xp.all(error <= LARGEST_ERROR)):
            # the bound is far too high where samples repeat: look at the solves themselves before refusing
            error = epsilon * self._error_of_solves(chunks, remainder)
        return remainder, error + epsilon * restored

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64) if self.precise else x
        rows = _rows_times(chunks, right)
        solved = self._solve(rows)
        if right.dtype != self._dtype:
            for _ in range(REFINEMENTS):
                product = _rows_times(chunks, _columns_times(chunks, solved))
                product += self._shift[:, None, None] * solved
                solved = solved + self._solve(rows - product)
        return xp.asarray(right - _columns_times(chunks, solved), dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=self._dtype)
        return xp.asarray(_columns_times(chunks, self._solve(right[..., None]))[..., 0], dtype=coefficients.dtype)

    def part(self, blocks: slice) -> _DualFactor:
        part: _DualFactor = object.__new__(_DualFactor)
        part.__dict__ = {**self.__dict__, "_factor": self._factor.part(blocks), "_shift": self._shift[blocks]}
        return part

    def _solve(self, rows: Array) -> Array:
        """Return ``S^-1 rows`` for rows of shape ``(n, m, k)``, in their dtype."""
        xp = array_namespace(rows)
        right = xp.asarray(rows, dtype=self._dtype)
        return xp.asarray(self._factor.solve_transposed(self._factor.solve(right)), dtype=rows.dtype)

    def _restore_cancelled(self, chunks: Sequence[Array], remainder: Array) -> tuple[Array, Array]:
        """Evaluate again in place each ``1 - sum`` that has cancelled.

        For the cancelled columns ``D`` and the others ``R``, the block inverse of ``F`` gives without cancellation

            damping [F^-1]_DD = (I + G_D^T S_R^-1 G_D)^-1,    S_R = m damping I + G_R G_R^T.

        Returns:
            For each block the smallest that has not cancelled, and how much rounding is amplified in those that had.
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
            shift = self._shift[block : block + 1]
            solved = cholesky(gram, shift).solve(xp.take(gradients, columns, axis=-1))
            inner = matmul(xp.matrix_transpose(solved), solved)
            norms = diagonals(inner) + 1
            values = column_sums_of_squares(cholesky(inner, 1.0).inverse())
            amplified[block] = 8 * xp.max(norms * values)
            for position in range(columns.shape[0]):
                remainder[block, int(columns[position])] = values[0, position]
        return smallest, amplified

    def _error_of_solves(self, chunks: Sequence[Array], remainder: Array) -> Array:
        xp = array_namespace(remainder)

        def amplified(part: Sequence[Array], blocks: slice) -> Array:
            lower = self._factor.part(blocks)
            norms = self._norms[blocks, :, None]
            solves = [lower.solve_transposed(lower.solve(chunk)) for chunk in part]
            return _concat([xp.sum(norms * solve * solve, axis=-2) for solve in solves], axis=-1)

        error = (4 * _over_parts(chunks, self._dtype, amplified) + 8) / remainder
        return xp.max(xp.where(remainder < CANCELLED, xp.zeros_like(error), error), axis=-1)


class _PrimalFactor:
    """Factors ``F`` itself, of the size of a block."""

    def __init__(self, chunks: Sequence[Array], damping: Array | float, dtype: Any) -> None:
        xp = array_namespace(chunks[0])
        fisher = _over_parts(chunks, dtype, _primal_product)
        self._damping = _of_each_block(damping, chunks)
        norms = diagonals(fisher) + xp.asarray(self._damping, dtype=dtype)[:, None]
        _refuse_overflow(norms)
        # the factor is small where float32 is tried at all, and keeps the digits that the product has
        self._factor = cholesky(xp.asarray(fisher, dtype=xp.float64), self._damping)
        self._norms = norms
        self.precise: Precise = dtype == xp.float64
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        return self._factor.num_bytes

    def needs_float64(self, width: int) -> bool:
        """Return False: the solve is the smaller part here."""
        return False

    def diagonal(self, chunks: Sequence[Array]) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and an estimate of its relative error in each block, not finite if unusable."""
        xp = array_namespace(chunks[0])
        diagonal = column_sums_of_squares(self._factor.inverse())
        share = diagonal * self._damping[:, None]
        # the exact value is at most 1; only the last digits of the sum can exceed it
        share = xp.where((share > 1) & (share < 1 + 1e-9), xp.ones_like(share), share)
        usable = xp.all((share > 0) & (share <= 1 + 1e-6), axis=-1)
        # F is rounded relative to its own diagonal, so that a few large columns do no harm
        error = float(xp.finfo(self._dtype).eps) * 8 * xp.max(self._norms * diagonal, axis=-1)
        error = xp.where(usable, error, xp.full_like(error, float("inf")))
        return xp.asarray(share, dtype=self._dtype), error

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64)
        out = self._solve(right)
        if x.dtype != self._dtype and not self.precise:
            for _ in range(REFINEMENTS):
                product = _columns_times(chunks, _rows_times(chunks, out))
                product /= chunks[0].shape[-2]
                product += self._damping[:, None, None] * out
                out = out + self._solve(right - product)
        return xp.asarray(self._damping[:, None, None] * out, dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=self._dtype)
        product = _columns_times(chunks, right[..., None]) / coefficients.shape[-1]
        return xp.asarray(self._solve(xp.asarray(product, dtype=xp.float64))[..., 0], dtype=coefficients.dtype)

    def part(self, blocks: slice) -> _PrimalFactor:
        part: _PrimalFactor = object.__new__(_PrimalFactor)
        part.__dict__ = {**self.__dict__, "_factor": self._factor.part(blocks), "_damping": self._damping[blocks]}
        return part

    def _solve(self, right: Array) -> Array:
        return self._factor.solve_transposed(self._factor.solve(right))


class _MixedFactor:
    """Some blocks of the group in float32 and some in float64."""

    def __init__(self, base: _DualFactor | _PrimalFactor, exact: _DualFactor | _PrimalFactor, precise: Array) -> None:
        self.precise: Precise = precise
        self._mask = precise
        self._base = base
        self._exact = exact

    @property
    def num_bytes(self) -> int:
        return self._base.num_bytes + self._exact.num_bytes

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        refined = self._exact.apply(_take(chunks, self._mask), _take([x], self._mask)[0])
        return _choose(self._mask, self._base.apply(chunks, x), refined)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        taken = _take([coefficients], self._mask)[0]
        refined = self._exact.apply_to_rows(_take(chunks, self._mask), taken)
        return _choose(self._mask, self._base.apply_to_rows(chunks, coefficients), refined)

    def part(self, blocks: slice) -> Factor:
        xp = array_namespace(self._mask)
        first, count = (int(xp.count_nonzero(self._mask[part])) for part in (slice(0, blocks.start), blocks))
        if not count:
            return self._base.part(blocks)
        exact = self._exact.part(slice(first, first + count))
        if count == blocks.stop - blocks.start:
            return exact
        return _MixedFactor(self._base.part(blocks), exact, self._mask[blocks])


_Form = type[_DualFactor] | type[_PrimalFactor]


def _form(chunks: Sequence[Array]) -> _Form:
    return _PrimalFactor if _width(chunks) <= chunks[0].shape[-2] else _DualFactor


def _try_in_float32(chunks: Sequence[Array], damping: Array) -> tuple[_DualFactor | _PrimalFactor, Array, Array] | None:
    """Return factor, diagonal and estimated errors; ``None`` where float64 is needed for sure, or as quick."""
    form, width = _form(chunks), _width(chunks)
    if form is _PrimalFactor and 4 * width > chunks[0].shape[-2]:
        return None  # the product, which float32 would speed up, is the smaller part
    try:
        made = form(chunks, damping, chunks[0].dtype)
    except np.linalg.LinAlgError:
        return None
    return None if made.needs_float64(width) else (made, *made.diagonal(chunks))


def _of_each_block(damping: Array | float, chunks: Sequence[Array]) -> Array:
    """Return the damping of each block, shape ``(n,)``, float64."""
    xp = array_namespace(chunks[0])
    first = chunks[0][:, 0, 0]
    return xp.zeros_like(first, dtype=xp.float64) + damping


def _least_damping(chunks: Sequence[Array]) -> float:
    """Return the damping below which the squares of gradients that suit it may be too small for their dtype."""
    limits = array_namespace(chunks[0]).finfo(chunks[0].dtype)
    return float(limits.smallest_normal) / float(limits.eps)


def _width(chunks: Sequence[Array]) -> int:
    return sum(int(chunk.shape[-1]) for chunk in chunks)


def _over_parts(chunks: Sequence[Array], dtype: Any, function: Callable[[Sequence[Array], slice], Array]) -> Array:
    """Return what ``function(part of the chunks in dtype, blocks)`` gives for parts that stay in the cache, joined."""
    results = [function(_Converted(chunks, blocks, dtype), blocks) for blocks in cache_parts(chunks)]
    return _concat(results, axis=0)


def _cache_columns(chunk: Array) -> list[Array]:
    """Return the columns of a chunk in pieces that stay in a CPU's cache; elsewhere all of them at once."""
    count, rows, width = chunk.shape
    if not runs_on_cpu(chunk):
        return [chunk]
    at_once = max(1, CACHE_BYTES // (count * rows * chunk.dtype.itemsize))
    return split_columns(chunk, -(-width // at_once))


class _Converted(Sequence[Array]):
    """Some blocks of some chunks in another dtype, each made when it is asked for."""

    def __init__(self, chunks: Sequence[Array], blocks: slice, dtype: Any) -> None:
        self._chunks = chunks
        self._blocks = blocks
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | Sequence[Array]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        chunk = self._chunks[index]
        return array_namespace(chunk).asarray(chunk[self._blocks, :, :], dtype=self._dtype)


def _gram(chunks: Sequence[Array], blocks: slice) -> Array:
    total = None
    for chunk in chunks:
        for product in spread(lower_gram, split_for_threads(chunk)):
            total = product if total is None else total + product
    return total


def _primal_product(chunks: Sequence[Array], blocks: slice) -> Array:
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


def _take(chunks: Sequence[Array], mask: Array) -> list[Array]:
    xp = array_namespace(mask)
    indices = xp.nonzero(mask)[0]
    return [xp.take(chunk, indices, axis=0) for chunk in chunks]


def _take_of_both(chunks: Sequence[Array], damping: Array, mask: Array) -> tuple[list[Array], Array]:
    *taken, dampings = _take([*chunks, damping], mask)
    return taken, dampings


def _choose(mask: Array, others: Array, chosen: Array) -> Array:
    """Return ``others`` with its rows where ``mask`` is true replaced, in order, by the rows of ``chosen``."""
    xp = array_namespace(mask)
    rank = xp.cumulative_sum(xp.astype(mask, xp.int64)) - 1
    ordinal = xp.cumulative_sum(xp.ones_like(rank)) - 1
    return xp.take(xp.concat([others, chosen], axis=0), xp.where(mask, others.shape[0] + rank, ordinal), axis=0)


def _concat(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts, axis=axis)


def _refuse_overflow(x: Array) -> None:
    if not np.isfinite(float(array_namespace(x).max(x))):
        raise np.linalg.LinAlgError("the products of the gradients overflow")
