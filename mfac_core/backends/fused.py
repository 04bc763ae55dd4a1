"""Elementwise work that one pass over memory should do: each library's own way, and the plain one for any other."""

from __future__ import annotations

import numpy as np

from mfac_core.backends.base import Array, array_namespace

__all__ = ["column_sums_of_squares", "saliency"]


def column_sums_of_squares(x: Array) -> Array:
    """Return the sums of the squares over the rows of a batch of matrices.

    Args:
        x: Shape ``(n, rows, columns)``. Not modified.

    Returns:
        Shape ``(n, columns)``, same dtype and device.

    Example:
        >>> column_sums_of_squares(np.array([[[1.0, 2.0], [3.0, 4.0]]]))
        array([[10., 20.]])
    """
    xp = array_namespace(x)
    if xp is np:
        return np.einsum("nij,nij->nj", x, x)
    if xp.__name__ == "cupy":
        from mfac_core.backends import cupy_backend

        return cupy_backend.column_sums_of_squares(x)
    return xp.sum(x * x, axis=-2)


def saliency(weights: Array, inverse_diagonal: Array) -> Array:
    """Return ``w^2 / (2 [F^-1]_qq)``.

    Args:
        weights: Shape ``(d,)``. Not modified.
        inverse_diagonal: Shape ``(d,)``, same device. Not modified.

    Returns:
        Shape ``(d,)``.

    Example:
        >>> saliency(np.array([2.0, 1.0]), np.array([0.5, 0.25]))
        array([4., 2.])
    """
    xp = array_namespace(weights)
    if xp.__name__ == "cupy":
        from mfac_core.backends import cupy_backend

        return cupy_backend.saliency(weights, inverse_diagonal)
    return weights * weights / (2 * inverse_diagonal)
