"""Kernels with a faster form for some array libraries, and a portable form for all others.

A library's forms are in the table of this module: those of NumPy and CuPy from the start, others by :func:`register`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from mfac_core.backends import Array, array_library, array_namespace

__all__ = [
    "Float64Needed",
    "Kernels",
    "SmallFactors",
    "column_sums_of_squares",
    "kth_smallest",
    "lower_gram",
    "matmul",
    "register",
    "runs_on_cpu",
    "small_factors",
    "wide_dtype",
]

GRAM_PANEL = 256
"""Rows of a symmetric product that are computed at once if the library does not use the symmetry."""

MAX_FACTOR = 16
"""Largest matrices that the portable form factors in one call: on a CPU, LAPACK is slow for a batch of larger ones."""


def matmul(a: Array, b: Array) -> Array:
    """Return the products ``a b`` of two batches of matrices; transposed and sliced operands are not copied.

    Example:
        >>> matmul(np.ones((1, 2, 3)), np.ones((1, 3, 1)))
        array([[[3.],
                [3.]]])
    """
    return _kernels_for(a).matmul(a, b)


def lower_gram(x: Array) -> Array:
    """Return the lower triangles of ``x x^T`` for ``x`` of shape ``(n, rows, columns)``; the rest is undefined.

    Example:
        >>> lower_gram(np.array([[[1.0], [2.0]]]))[0, 1]
        array([2., 4.])
    """
    return _kernels_for(x).lower_gram(x)


def column_sums_of_squares(x: Array) -> Array:
    """Return the sums of squares over the rows of ``x`` of shape ``(n, rows, columns)``; shape ``(n, columns)``.

    Example:
        >>> column_sums_of_squares(np.array([[[1.0, 2.0], [3.0, 4.0]]]))
        array([[10., 20.]])
    """
    return _kernels_for(x).column_sums_of_squares(x)


def kth_smallest(x: Array, k: int) -> Array:
    """Return the number with ``k`` numbers before it in the order of the vector ``x``, as an array without dimensions.

    Example:
        >>> float(kth_smallest(np.array([3.0, 1.0, 2.0]), 0))
        1.0
    """
    return _kernels_for(x).kth_smallest(x, k)


def small_factors(like: Array) -> SmallFactors:
    """Return a function that factors batches of small matrices with the batch size, dtype and device of ``like``.

    Example:
        >>> inverse, diagonal = small_factors(np.zeros((1, 1, 1)))(np.array([[[3.0]]]), 1.0)
        >>> inverse, diagonal
        (array([[[0.5]]]), array([[2.]]))
    """
    return _kernels_for(like).small_factors(like)


def runs_on_cpu(x: Array) -> bool:
    """Return whether ``x`` is computed on the CPU, where work is faster in pieces that fit the cache."""
    return _kernels_for(x).run_on_cpu(x)


def wide_dtype(x: Array) -> Any:
    """Return the most precise floating-point dtype on the device of ``x``: float64, or float32 if it has no float64.

    Example:
        >>> wide_dtype(np.zeros(1, np.float32)) == np.float64
        True
    """
    return _kernels_for(x).wide_dtype(x)


class Float64Needed(Exception):
    """A computation needs float64, and the device of its arrays has none."""


class SmallFactors(Protocol):
    """Computes inverse Cholesky factors of batches of small matrices.

    Attributes:
        largest: Number of rows of the largest matrix that it accepts.
    """

    largest: int

    def __call__(self, matrices: Array, shift: Array | float) -> tuple[Array, Array]:
        """Return ``L^-1`` and the diagonal of ``L`` of ``matrices + shift * I``; shapes ``(n, k, k)`` and ``(n, k)``.

        ``shift`` is one number, or one for each matrix in their dtype, shape ``(n, 1, 1)``.
        A matrix that is not positive definite raises ``numpy.linalg.LinAlgError`` or gives NaN.
        """


class _BorderedFactors:
    """Inverse Cholesky factors by one Cholesky factorization of a matrix of twice the size.

    Libraries have no batched triangular inverse, and their general inverse is slow. The factorization

        [A    I ]   [L     0] [L^T  L^-1]
        [I   c I] = [L^-T  M] [0    M^T ],    M M^T = c I - A^-1,

    computes ``L^-T`` below ``L``. It exists if ``c`` exceeds the largest eigenvalue of ``A^-1``.
    """

    def __init__(self, like: Array) -> None:
        self.largest = min(MAX_FACTOR, like.shape[-1])
        # the borders are the same at each call, so only the upper left corner is written again
        self._bordered = {self.largest: _bordered(like, self.largest)}

    def __call__(self, matrices: Array, shift: Array | float) -> tuple[Array, Array]:
        xp = array_namespace(matrices)
        size = matrices.shape[-1]
        if size not in self._bordered:
            self._bordered[size] = _bordered(matrices, size)
        bordered = self._bordered[size]
        bordered[:, :size, :size] = matrices
        bordered[:, :size, :size] += shift * bordered[:, size:, :size]
        both = xp.linalg.cholesky(bordered)
        # a copy in row order: products with a transposed view are several times slower
        inverse = xp.concat([xp.matrix_transpose(both[:, size:, :size])], axis=0)
        # in the flattened matrix of 2 size columns, neighbours on the diagonal are 2 size + 1 apart
        flat = xp.reshape(both, (both.shape[0], -1))
        return inverse, flat[:, : 2 * size * size : 2 * size + 1]


def _bordered(like: Array, size: int) -> Array:
    xp = array_namespace(like)
    # xp.eye would need the device by name, in a spelling that differs between libraries
    ones = xp.ones_like(like[:, :size, :size])
    identity = xp.tril(ones) - xp.tril(ones, k=-1)
    # any c between ||A^-1|| and overflow will do, as M is thrown away: this is 8e28 in float32, 1e231 in float64
    large = float(xp.finfo(ones.dtype).max) ** 0.75
    top = xp.concat([xp.zeros_like(identity), identity], axis=-1)
    return xp.concat([top, xp.concat([identity, large * identity], axis=-1)], axis=-2)


def _portable_lower_gram(x: Array) -> Array:
    xp = array_namespace(x)
    count, size, _ = x.shape
    if size <= GRAM_PANEL:
        return matmul(x, xp.matrix_transpose(x))
    # panel by panel, each only up to its diagonal: for many rows half of the multiplications of the full product
    out = xp.zeros_like(xp.broadcast_to(x[:1, :1, :1], (count, size, size)))
    for start in range(0, size, GRAM_PANEL):
        stop = min(start + GRAM_PANEL, size)
        out[:, start:stop, :stop] = matmul(x[:, start:stop, :], xp.matrix_transpose(x[:, :stop, :]))
    return out


def _portable_column_sums_of_squares(x: Array) -> Array:
    return array_namespace(x).sum(x * x, axis=-2)


def _portable_kth_smallest(x: Array, k: int) -> Array:
    return array_namespace(x).sort(x)[k]


def _float64(x: Array) -> Any:
    return array_namespace(x).float64


@dataclass(frozen=True)
class Kernels:
    """The form that a library uses of each kernel of this module; portable where it has none of its own."""

    matmul: Callable[[Array, Array], Array] = operator.matmul
    lower_gram: Callable[[Array], Array] = _portable_lower_gram
    column_sums_of_squares: Callable[[Array], Array] = _portable_column_sums_of_squares
    kth_smallest: Callable[[Array, int], Array] = _portable_kth_smallest
    small_factors: Callable[[Array], SmallFactors] = _BorderedFactors
    run_on_cpu: Callable[[Array], bool] = lambda x: False
    wide_dtype: Callable[[Array], Any] = _float64


def register(library: str, kernels: Kernels) -> None:
    """Set the kernels for the arrays of a library, as :func:`mfac_core.backends.array_library` names it."""
    _LIBRARIES[library] = lambda: kernels
    _load.cache_clear()


def _numpy_kernels() -> Kernels:
    return Kernels(
        lower_gram=lambda x: x @ np.matrix_transpose(x),  # NumPy sees that this is symmetric, and computes half of it
        column_sums_of_squares=lambda x: np.einsum("nij,nij->nj", x, x),  # one pass, without an array of squares
        kth_smallest=lambda x, k: np.partition(x, k)[k],  # a selection in linear time
        run_on_cpu=lambda x: True,
    )


def _cupy_kernels() -> Kernels:
    from mfac_core.fisher.cupy_kernels import SmallFactors as CupyFactors

    return Kernels(small_factors=lambda like: CupyFactors())


_LIBRARIES: dict[str, Callable[[], Kernels]] = {"numpy": _numpy_kernels, "cupy": _cupy_kernels}
"""For each library that has kernels of its own, by the name of its package, a function that loads them."""


@cache
def _load(library: str) -> Kernels:
    return _LIBRARIES.get(library, Kernels)()


def _kernels_for(x: Array) -> Kernels:
    return _load(array_library(x))
