"""The kernels for which an array library may have a faster form, and the table of these forms.

Those of NumPy and CuPy are in the table from the start, others by :func:`register`. A library without a form of its own
uses that of ``portable_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from mfac_core.backends import Array, array_library, array_namespace
from mfac_core.fisher import portable_kernels

__all__ = [
    "Float64Needed",
    "Kernels",
    "SmallFactors",
    "check_has_float64",
    "column_sums_of_squares",
    "kth_smallest",
    "lower_gram",
    "register",
    "runs_on_cpu",
    "small_factors",
    "wide_dtype",
]


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
    return _kernels_for(x).runs_on_cpu(x)


def wide_dtype(x: Array) -> Any:
    """Return the most precise floating-point dtype on the device of ``x``: float64, or float32 if it has no float64.

    Example:
        >>> wide_dtype(np.zeros(1, np.float32)) == np.float64
        True
    """
    return _kernels_for(x).wide_dtype(x)


def check_has_float64(x: Array) -> None:
    """Raise :class:`Float64Needed` if the device of ``x`` has no float64."""
    if wide_dtype(x) != array_namespace(x).float64:
        raise Float64Needed


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


def _float64(x: Array) -> Any:
    return array_namespace(x).float64


@dataclass(frozen=True)
class Kernels:
    """The form that a library uses of each kernel of this module; portable where it has none of its own."""

    lower_gram: Callable[[Array], Array] = portable_kernels.lower_gram
    column_sums_of_squares: Callable[[Array], Array] = portable_kernels.column_sums_of_squares
    kth_smallest: Callable[[Array, int], Array] = portable_kernels.kth_smallest
    small_factors: Callable[[Array], SmallFactors] = portable_kernels.SmallFactors
    runs_on_cpu: Callable[[Array], bool] = lambda x: False
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
        runs_on_cpu=lambda x: True,
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
