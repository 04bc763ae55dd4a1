r"""The inverse of the damped empirical Fisher of one group of blocks.

Notation: ``n`` blocks of ``B`` weights each, ``m`` gradient samples; a *chunk* is an array of shape ``(n, m, width)``
that holds some columns of the blocks, and the chunks of a group together hold all ``B``. One Fisher per block,

.. math:: F = \lambda I + \frac{1}{m} G^T G, \qquad S = m \lambda I + G G^T = L L^T, \qquad W = L^{-1} G.

The dual form factors ``S`` (``m x m``), the primal form ``F`` itself (``B x B``); each is used where it is smaller.

References:
    Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.
    Woodbury (1950), Inverting modified matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.errors import IllConditionedError
from mfac_core.triangular import cholesky, diagonals

__all__ = ["Factor", "factor", "fisher_quadratic", "gradients_times"]

RELATIVE_ERROR = 2e-5
"""Estimated relative rounding error of ``diag(F^-1)`` above which float32 blocks are evaluated in float64."""

LARGEST_ERROR = 1e-4
"""Estimated relative error above which a block is refused even in float64."""

CANCELLED = 1e-4
"""Columns whose ``1 - sum`` is below this in float64 are evaluated by a form that does not cancel."""


class Factor(Protocol):
    """The factored Fisher of one group; both forms answer the same questions.

    Attributes:
        precise: Whether the group had to be evaluated in float64.
    """

    precise: bool

    def diagonal(self) -> Array:
        """Return ``diag(F^-1)``, shape ``(n, B)``."""

    def apply(self, x: Array) -> Array:
        """Return ``F^-1 x`` for ``x`` of shape ``(n, B)``."""

    def apply_to_rows(self, coefficients: Array) -> Array:
        """Return ``F^-1 G^T c / m`` for ``c`` of shape ``(n, m)``; shape ``(n, B)``."""


def factor(chunks: Sequence[Array], damping: float, *, precise: bool | None = None) -> Factor:
    """Factor the Fisher of one group of blocks.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``, float32 or float64, all on one device. Not modified.
        damping: Added to the diagonal of the empirical Fisher, positive.
        precise: Whether to evaluate in float64, as an earlier call with these gradients has found; ``None`` decides
            by the estimated rounding error.

    Returns:
        The factored group, in the dtype of the chunks or, where that is not accurate enough, in float64.

    Raises:
        IllConditionedError: If the Fisher cannot be inverted even in float64.
    """
    xp = array_namespace(chunks[0])
    is_known = precise is not None
    form: type[_DualFactor | _PrimalFactor] = _DualFactor
    if sum(chunk.shape[-1] for chunk in chunks) <= chunks[0].shape[-2]:
        # the product is the smaller part of this form, so that trying it in float32 first does not pay
        form, precise = _PrimalFactor, True
    # overflow is found by looking at the result, and cured by float64 or refused
    with np.errstate(over="ignore", invalid="ignore"):
        if precise is None and chunks[0].dtype != xp.float64:
            try:
                candidate = form(chunks, damping)
                if candidate.relative_error() <= RELATIVE_ERROR:
                    return candidate
            except np.linalg.LinAlgError:
                pass  # not positive definite in float32: evaluated again below
        if precise is not False:
            chunks = [xp.asarray(chunk, dtype=xp.float64) for chunk in chunks]
        try:
            candidate = form(chunks, damping, precise=precise is not False)
            if is_known or candidate.relative_error() <= LARGEST_ERROR:
                return candidate
        except np.linalg.LinAlgError:
            pass
    raise IllConditionedError(
        f"the Fisher of a block cannot be inverted with damping {damping:g}: its gradients are too large beside it, "
        "or too alike; choose a larger damping"
    )


def fisher_quadratic(chunks: Sequence[Array], x: Array, damping: float) -> Array:
    r"""Return :math:`\tfrac12 x^T F x` of each block.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``.
        x: Shape ``(n, B)``, same dtype and device.
        damping: Added to the diagonal of the empirical Fisher.

    Returns:
        Shape ``(n,)``.
    """
    xp = array_namespace(x)
    rows = gradients_times(chunks, x)
    return 0.5 * (damping * xp.sum(x * x, axis=-1) + xp.sum(rows * rows, axis=-1) / rows.shape[-1])


def gradients_times(chunks: Sequence[Array], x: Array) -> Array:
    """Return ``G x`` of each block.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``.
        x: Shape ``(n, B)``, same dtype and device.

    Returns:
        Shape ``(n, m)``.
    """
    total = None
    start = 0
    for chunk in chunks:
        stop = start + chunk.shape[-1]
        product = (chunk @ x[:, start:stop, None])[..., 0]
        total = product if total is None else total + product
        start = stop
    return total


class _DualFactor:
    """Factors ``S``, of the size of the number of gradients."""

    def __init__(self, chunks: Sequence[Array], damping: float, *, precise: bool = False) -> None:
        xp = array_namespace(chunks[0])
        self.precise = precise
        self._chunks = chunks
        self._damping = damping
        gram = chunks[0] @ xp.matrix_transpose(chunks[0])
        for chunk in chunks[1:]:
            gram += chunk @ xp.matrix_transpose(chunk)
        _refuse_overflow(diagonals(gram))
        shift = chunks[0].shape[-2] * damping
        gram = xp.asarray(gram, dtype=xp.float64)
        self._norms = diagonals(gram) + shift
        self._factor = cholesky(gram, shift)
        self._remainder: Array | None = None
        self._smallest = 1.0

    def diagonal(self) -> Array:
        return self._one_minus_sums() / self._damping

    def apply(self, x: Array) -> Array:
        rows = gradients_times(self._chunks, x)
        return (x - self.apply_to_rows(rows)) / self._damping

    def apply_to_rows(self, coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        right = xp.asarray(coefficients, dtype=xp.float64)[..., None]
        solved = xp.asarray(self._factor.solve_transposed(self._factor.solve(right)), dtype=coefficients.dtype)
        parts = [(xp.matrix_transpose(chunk) @ solved)[..., 0] for chunk in self._chunks]
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)

    def relative_error(self) -> float:
        """Return an estimate of the relative rounding error of the diagonal; not finite when it is not usable."""
        remainder = self._one_minus_sums()
        if not 0 < self._smallest:
            return float("inf")
        xp = array_namespace(remainder)
        epsilon = float(xp.finfo(remainder.dtype).eps)
        # rounding of S, amplified by the solve, and rounding of the sums, both relative to what 1 - sum leaves;
        # S is rounded relative to the norms of its own rows, so that a few large samples do no harm
        amplification = float(xp.max(self._norms / self._factor.pivots()))
        bound = (4 * amplification + 8) * (1 - self._smallest) / self._smallest
        if remainder.dtype != xp.float64 or epsilon * bound <= LARGEST_ERROR:
            return epsilon * bound
        # the bound is far too high where samples repeat: look at the solves themselves before refusing the block
        solves = [self._factor.solve_transposed(self._factor.solve(chunk)) for chunk in self._chunks]
        norms = self._norms[:, :, None]
        amplified = xp.concat([xp.sum(norms * solve * solve, axis=-2) for solve in solves], axis=-1)
        error = (4 * amplified + 8) / remainder
        return epsilon * float(xp.max(xp.where(remainder < CANCELLED, xp.zeros_like(error), error)))

    def _one_minus_sums(self) -> Array:
        if self._remainder is None:
            xp = array_namespace(self._chunks[0])
            lower = self._factor.astype(self._chunks[0].dtype)
            parts = []
            for chunk in self._chunks:
                solved = lower.solve(chunk)
                solved *= solved
                parts.append(1 - xp.sum(solved, axis=-2))
            remainder = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
            if remainder.dtype == xp.float64:
                self._restore_cancelled(remainder)
            else:
                self._smallest = float(xp.min(remainder))
            self._remainder = remainder
        return self._remainder

    def _restore_cancelled(self, remainder: Array) -> None:
        """Evaluate again the columns where ``1 - sum`` has cancelled.

        For the cancelled columns ``D`` and the others ``R``, the block inverse of ``F`` gives without cancellation

            damping [F^-1]_DD = (I + G_D^T S_R^-1 G_D)^-1,    S_R = m damping I + G_R G_R^T.
        """
        xp = array_namespace(remainder)
        cancelled = remainder < CANCELLED
        self._smallest = float(xp.min(xp.where(cancelled, xp.ones_like(remainder), remainder)))
        blocks = xp.any(cancelled, axis=-1)
        for block in range(blocks.shape[0]):
            if not bool(blocks[block]):
                continue
            parts = [chunk[block : block + 1, :, :] for chunk in self._chunks]
            gradients = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
            columns = xp.nonzero(cancelled[block, :])[0]
            others = xp.where(cancelled[block, :], xp.zeros_like(gradients), gradients)
            gram = others @ xp.matrix_transpose(others)
            solved = cholesky(gram, gradients.shape[-2] * self._damping).solve(xp.take(gradients, columns, axis=-1))
            inverse = cholesky(xp.matrix_transpose(solved) @ solved, 1.0).inverse()
            values = xp.sum(inverse * inverse, axis=-2)
            for position in range(columns.shape[0]):
                remainder[block, int(columns[position])] = values[0, position]


class _PrimalFactor:
    """Factors ``F`` itself, of the size of a block."""

    def __init__(self, chunks: Sequence[Array], damping: float, *, precise: bool = False) -> None:
        xp = array_namespace(chunks[0])
        self.precise = precise
        self._gradients = chunks[0] if len(chunks) == 1 else xp.concat(list(chunks), axis=-1)
        self._damping = damping
        fisher = xp.matrix_transpose(self._gradients) @ self._gradients
        fisher /= self._gradients.shape[-2]
        _refuse_overflow(diagonals(fisher))
        fisher = xp.asarray(fisher, dtype=xp.float64)
        self._norms = diagonals(fisher) + damping
        self._factor = cholesky(fisher, damping)
        self._diagonal: Array | None = None

    def diagonal(self) -> Array:
        if self._diagonal is None:
            xp = array_namespace(self._gradients)
            inverse = self._factor.inverse()
            inverse *= inverse
            diagonal = xp.sum(inverse, axis=-2)
            # the exact value is at most 1 / damping; only the last digits of the sum can exceed it
            ceiling = 1 / self._damping
            diagonal = xp.where((diagonal > ceiling) & (diagonal < ceiling * (1 + 1e-9)), ceiling, diagonal)
            self._diagonal = xp.asarray(diagonal, dtype=self._gradients.dtype)
        return self._diagonal

    def apply(self, x: Array) -> Array:
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64)[..., None]
        solved = self._factor.solve_transposed(self._factor.solve(right))[..., 0]
        return xp.asarray(solved, dtype=x.dtype)

    def apply_to_rows(self, coefficients: Array) -> Array:
        xp = array_namespace(coefficients)
        product = (xp.matrix_transpose(self._gradients) @ coefficients[..., None])[..., 0]
        return self.apply(product / self._gradients.shape[-2])

    def relative_error(self) -> float:
        """Return an estimate of the relative rounding error of the diagonal; not finite when it is not usable."""
        xp = array_namespace(self._gradients)
        diagonal = self.diagonal()
        if not 0 < float(xp.min(diagonal)) <= float(xp.max(diagonal)) <= 1 / self._damping * (1 + 1e-6):
            return float("nan")
        # F is rounded relative to its own diagonal, so that a few large columns do no harm
        return float(xp.finfo(diagonal.dtype).eps) * 8 * float(xp.max(self._norms * diagonal))


def _refuse_overflow(x: Array) -> None:
    if not np.isfinite(float(array_namespace(x).max(x))):
        raise np.linalg.LinAlgError("the products of the gradients overflow")
