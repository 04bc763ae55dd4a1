r"""The primal form of a factor: the Cholesky factor of ``F`` itself, of the size of a block.

Rounding. The computed matrix is ``F + E`` with ``|E_ij|`` of the order of ``eps sqrt(F_ii F_jj)``, as in the dual form.
To first order ``E`` changes ``[F^-1]_qq`` by ``z^T E z`` with ``z = F^-1 e_q``. By Cauchy-Schwarz
``z_i^2 <= [F^-1]_ii [F^-1]_qq``, so each term of ``z^T E z``, relative to ``[F^-1]_qq``, is at most
``eps max_i F_ii [F^-1]_ii``. The bound is ``bound_factor`` times this; ``dual.py`` derives it. If it does not suffice,
the error is measured in the columns with the largest ``sum_i F_ii z_i^2 / [F^-1]_qq``, estimated from random signs, and
in as many others. It is the difference to ``2 z_q - z^T F z``, to which errors of ``z`` count to the second order, with
``z^T F z = lambda |z|^2 + |G z|^2 / m``. Entries of a float64 factor whose error is too large take that value.

Amplifications are relative to the matrix scaled to a unit diagonal: a few columns with large gradients do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat

from mfac_core.backends import Array, array_namespace
from mfac_core.fisher.chunks import columns_times, concat, is_column, over_cache_slices, rows_times
from mfac_core.fisher.kernels import column_sums_of_squares, lower_gram
from mfac_core.fisher.rounding import (
    PROBES,
    REFINEMENTS,
    SAFETY,
    bound_factor,
    check_overflow,
    columns_to_measure,
    is_small,
    random_signs,
)
from mfac_core.fisher.triangular import TriangularFactor, cholesky, diagonals

__all__ = ["PrimalFactor"]

MAX_ERROR = 1e-3
"""Estimated relative error above which a float64 factor is refused: its solves are as inaccurate as its diagonal."""


@dataclass(frozen=True)
class PrimalFactor:
    """The Cholesky factor of ``F`` itself, of the size of a block.

    Args:
        lower: The factor.
        norms: Diagonal of ``F``, shape ``(n, B)``.
        damping: That of each block, shape ``(n,)``, in the widest dtype of the device.
        dtype: dtype of the factor.
    """

    lower: TriangularFactor
    norms: Array
    damping: Array
    dtype: Any

    @classmethod
    def of(cls, chunks: Sequence[Array], damping: Array, dtype: Any) -> PrimalFactor:
        """Factor ``F`` of each block in a dtype."""
        fisher = over_cache_slices(chunks, dtype, _primal_product)
        shift = array_namespace(fisher).asarray(damping, dtype=dtype)
        norms = diagonals(fisher) + shift[:, None]
        check_overflow(norms)
        return cls(cholesky(fisher, shift), norms, damping, dtype)

    @property
    def in_float64(self) -> bool:
        """Whether the factor was computed in float64."""
        return bool(self.dtype == array_namespace(self.damping).float64)

    @property
    def num_bytes(self) -> int:
        """Memory of the factor in bytes."""
        return self.lower.num_bytes

    def diagonal(self, chunks: Sequence[Array], rtol: float) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` and its estimated relative error in each block, not finite if unusable."""
        xp = array_namespace(self.norms)
        epsilon = float(xp.finfo(self.dtype).eps)
        inverse = self.lower.inverse()
        diagonal = column_sums_of_squares(inverse)  # F^-1 = L^-T L^-1
        damped = diagonal * xp.asarray(self.damping, dtype=self.dtype)[:, None]
        amplification = xp.max(self.norms * diagonal, axis=-1)
        error = epsilon * bound_factor(amplification) * amplification
        if not bool(xp.all(error <= rtol)) and bool(xp.all(xp.isfinite(diagonal))):
            error = self._measured_error(chunks, inverse, diagonal)
            for block in range(error.shape[0] if self.in_float64 else 0):
                if rtol < float(error[block]) <= MAX_ERROR:
                    one = slice(block, block + 1)
                    selected = [chunk[one, :, :] for chunk in chunks]
                    value, remaining = self.select_blocks(one)._accurately(selected)
                    damped[block, :], error[block] = value[0, :], remaining[0]
        # the exact value is at most 1: only rounding of the sum can exceed it
        most = 1 + 16 * epsilon * math.sqrt(diagonal.shape[-1])
        usable = xp.all((damped > 0) & (damped <= most), axis=-1)
        damped = xp.where(damped > 1, xp.ones_like(damped), damped)
        return damped, xp.where(usable, error, xp.full_like(error, float("inf")))

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        """Return ``damping F^-1 x`` for ``x`` of shape ``(n, B, k)``, in its dtype."""
        xp = array_namespace(x)
        right = xp.asarray(x, dtype=xp.float64) if self.in_float64 else x
        out = self.lower.solve_symmetric(right)
        damping = xp.asarray(self.damping, dtype=right.dtype)[:, None, None]
        if right.dtype != self.dtype:
            for _ in range(REFINEMENTS):
                product = columns_times(chunks, rows_times(chunks, out))
                product /= chunks[0].shape[-2]
                change = self.lower.solve_symmetric(right - damping * out - product)
                out = out + change
                if is_small(change, out):
                    break
        return xp.asarray(damping * out, dtype=x.dtype)

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        """Return ``F^-1 G^T c / m`` for ``c`` of shape ``(n, m)``, in its dtype."""
        xp = array_namespace(coefficients)
        right = columns_times(chunks, xp.asarray(coefficients, dtype=self.dtype)[..., None]) / coefficients.shape[-1]
        out = self.lower.solve_symmetric(right)
        if not self.in_float64:
            damping = xp.asarray(self.damping, dtype=self.dtype)[:, None, None]
            product = columns_times(chunks, rows_times(chunks, out)) / coefficients.shape[-1]
            out = out + self.lower.solve_symmetric(right - damping * out - product)
        return xp.asarray(out[..., 0], dtype=coefficients.dtype)

    def select_blocks(self, blocks: slice) -> PrimalFactor:
        """Return the factor of some of the blocks."""
        lower, norms, damping = self.lower.select_blocks(blocks), self.norms[blocks, :], self.damping[blocks]
        return replace(self, lower=lower, norms=norms, damping=damping)

    def _accurately(self, chunks: Sequence[Array]) -> tuple[Array, Array]:
        """Return ``damping diag(F^-1)`` to the second order, and its estimated relative error in each block.

        An error ``e`` of ``z = F^-1 e_q`` changes ``2 z_q - z^T F z`` by ``e^T F e = rho^T F^-1 rho``, with the
        residual ``rho = e_q - F z``. Rounding of ``G z``, of which ``|G z|^2 <= m z_q`` is left, changes it by
        ``eps sqrt(trace(F) / damping)``, relative to itself.
        """
        xp = array_namespace(self.norms)
        damping = xp.asarray(self.damping, dtype=self.dtype)
        width = self.norms.shape[-1]
        identity = xp.eye(width, dtype=self.dtype, device=array_api_compat.device(self.norms))
        unit = xp.broadcast_to(identity, (self.norms.shape[0], width, width))
        solved = self.lower.solve_symmetric(unit)
        products = rows_times(chunks, solved)
        quadratic = damping[:, None] * xp.sum(solved * solved, axis=-2)
        quadratic += xp.sum(products * products, axis=-2) / products.shape[-2]
        values = 2 * xp.sum(unit * solved, axis=-2) - quadratic
        residual = unit - damping[:, None, None] * solved - columns_times(chunks, products) / products.shape[-2]
        left = self.lower.solve(residual)
        rounding = 4 * float(xp.finfo(self.dtype).eps) * (1 + xp.sqrt(xp.sum(self.norms, axis=-1) / damping))
        error = xp.max(xp.sum(left * left, axis=-2) / values, axis=-1) + rounding
        return damping[:, None] * values, error

    def _measured_error(self, chunks: Sequence[Array], inverse: Array, diagonal: Array) -> Array:
        """Return the estimated error of each block, measured in some of its columns."""
        xp = array_namespace(diagonal)
        probes = xp.sqrt(self.norms)[:, :, None] * random_signs(self.norms, PROBES)
        amplified = xp.sum(self.lower.solve_symmetric(probes) ** 2, axis=-1) / PROBES
        width = diagonal.shape[-1]
        measured = columns_to_measure(amplified / diagonal)
        unit = xp.asarray(xp.matrix_transpose(is_column(measured, 0, width)), dtype=self.dtype)
        solved = self.lower.solve_symmetric(unit)
        # 2 z_q - z^T F z is accurate to the second order, and at the solution equals z_q
        products = rows_times(chunks, solved)
        damping = xp.asarray(self.damping, dtype=self.dtype)[:, None]
        quadratic = damping * xp.sum(solved * solved, axis=-2)
        quadratic += xp.sum(products * products, axis=-2) / products.shape[-2]
        exact = 2 * xp.sum(unit * solved, axis=-2) - quadratic
        errors = xp.abs(xp.take_along_axis(diagonal, measured, axis=-1) / exact - 1)
        return SAFETY * xp.max(errors, axis=-1)


def _primal_product(chunks: Iterable[Array], blocks: slice) -> Array:
    gradients = concat(list(chunks), axis=-1)
    product = lower_gram(array_namespace(gradients).matrix_transpose(gradients))
    product /= gradients.shape[-2]
    return product
