"""Kernels for CuPy arrays, by the batched routines of cuSOLVER and cuBLAS. Importing this module needs CuPy."""

from __future__ import annotations

import cupy
import cupyx
from cupyx.scipy.linalg import solve_triangular

from mfac_core.backends import Array

__all__ = ["SmallFactors"]


class SmallFactors:
    """Cholesky factors and triangular solves; see :class:`mfac_core.fisher.kernels.SmallFactors` for the contract."""

    largest = 128

    def __call__(self, matrices: Array, shift: Array | float) -> tuple[Array, Array]:
        """Return ``L^-1``, C-contiguous, and the diagonal of ``L``."""
        identity = cupy.eye(matrices.shape[-1], dtype=matrices.dtype)
        # by default CuPy does not look at the status that cuSOLVER returns, and a failed factor may be finite
        with cupyx.errstate(linalg="raise"):
            lower = cupy.linalg.cholesky(matrices + shift * identity)
        # the solve gives columns next to each other in memory: of L^-T these are the rows of L^-1
        transposed = solve_triangular(lower, cupy.broadcast_to(identity, lower.shape), trans="T", lower=True)
        return transposed.transpose(0, 2, 1), lower.diagonal(axis1=1, axis2=2)
