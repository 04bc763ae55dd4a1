"""The few kernels that each library has to do its own way to be quick, and the plain way for any other library."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np

from mfac_core.backends.base import Array, array_namespace

__all__ = [
    "SmallFactors",
    "column_sums_of_squares",
    "lower_gram",
    "matmul",
    "saliency",
    "small_factors",
    "spare_threads",
    "split_columns",
    "split_for_threads",
    "spread",
]

GRAM_PANEL = 256
"""Rows of a symmetric product that are made at once where the library does not use the symmetry."""

LARGEST_FACTOR = 16
"""Matrices up to this size are left to the library, whose factorisation is quick on the CPU only up to this size."""


_threads: ContextVar[int] = ContextVar("threads", default=1)


@contextmanager
def spare_threads(count: int) -> Iterator[None]:
    """Let :func:`spread` use threads within this context, in the thread that opens it.

    Args:
        count: How many threads.
    """
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def spread(function: Callable[[Array], Array], pieces: Sequence[Array]) -> list[Array]:
    """Return what a function gives for each piece, computed on the spare threads.

    The threads of BLAS are no substitute: for thin products they can wait for each other far longer than they work.

    Args:
        function: Takes a piece.
        pieces: Arrays of any kind.

    Returns:
        The results in order.

    Example:
        >>> with spare_threads(2):
        ...     spread(float, [np.array(1), np.array(2)])
        [1.0, 2.0]
    """
    threads = min(_threads.get(), len(pieces))
    if threads < 2:
        return [function(piece) for piece in pieces]
    handling = np.geterr()  # what the caller says of overflow holds in its threads too

    def handled(piece: Array) -> Array:
        with np.errstate(**handling):
            return function(piece)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(handled, pieces))


def split_for_threads(x: Array) -> list[Array]:
    """Return the columns of a batch of matrices in one piece for each spare thread.

    Args:
        x: Shape ``(n, rows, columns)``.

    Returns:
        Views.

    Example:
        >>> [piece.shape for piece in split_for_threads(np.zeros((1, 2, 5)))]
        [(1, 2, 5)]
    """
    return split_columns(x, min(_threads.get(), x.shape[-1]))


def split_columns(x: Array, count: int) -> list[Array]:
    """Return the columns of a batch of matrices in pieces that are as even as can be.

    Args:
        x: Shape ``(n, rows, columns)``.
        count: How many pieces.

    Returns:
        Views.

    Example:
        >>> [piece.shape for piece in split_columns(np.zeros((1, 2, 5)), 2)]
        [(1, 2, 2), (1, 2, 3)]
    """
    bounds = [x.shape[-1] * piece // count for piece in range(count + 1)]
    return [x[:, :, start:stop] for start, stop in itertools.pairwise(bounds)]


def matmul(a: Array, b: Array) -> Array:
    """Return the products of two batches of matrices; transposed and sliced operands are not copied.

    Args:
        a: Shape ``(n, p, q)``. Not modified.
        b: Shape ``(n, q, r)``, same dtype and device. Not modified.

    Returns:
        Shape ``(n, p, r)``.

    Example:
        >>> matmul(np.ones((1, 2, 3)), np.ones((1, 3, 1)))
        array([[[3.],
                [3.]]])
    """
    return _of_cupy().matmul(a, b) if _is_cupy(a) else a @ b


def lower_gram(x: Array) -> Array:
    """Return the lower triangles of ``x x^T``; what stands above them is not defined.

    Args:
        x: Shape ``(n, rows, columns)``. Not modified.

    Returns:
        Shape ``(n, rows, rows)``, same dtype and device.

    Example:
        >>> lower_gram(np.array([[[1.0], [2.0]]]))[0, 1]
        array([2., 4.])
    """
    xp = array_namespace(x)
    count, size, _ = x.shape
    if xp is np or size <= GRAM_PANEL:  # NumPy sees that the product is symmetric
        return matmul(x, xp.matrix_transpose(x))
    out = xp.zeros_like(xp.broadcast_to(x[:1, :1, :1], (count, size, size)))
    for start in range(0, size, GRAM_PANEL):
        stop = min(start + GRAM_PANEL, size)
        out[:, start:stop, :stop] = matmul(x[:, start:stop, :], xp.matrix_transpose(x[:, :stop, :]))
    return out


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
    if _is_cupy(x):
        return _of_cupy().column_sums_of_squares(x)
    if isinstance(x, np.ndarray):
        return np.einsum("nij,nij->nj", x, x)
    return array_namespace(x).sum(x * x, axis=-2)


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
    if _is_cupy(weights):
        return _of_cupy().saliency(weights, inverse_diagonal)
    return weights * weights / (2 * inverse_diagonal)


class SmallFactors(Protocol):
    """Inverse Cholesky factors of batches of small matrices.

    Attributes:
        largest: The largest matrices that are small.
    """

    largest: int

    def __call__(self, matrices: Array, shift: Array | float) -> tuple[Array, Array]:
        """Return ``L^-1`` and the diagonal of ``L`` of ``matrices + shift * I``; shapes ``(n, k, k)`` and ``(n, k)``.

        ``shift`` is one number, or in the dtype of the matrices that of each, shape ``(n, 1, 1)``.
        A matrix that is not positive definite raises ``numpy.linalg.LinAlgError`` or gives NaN.
        """


def small_factors(like: Array) -> SmallFactors:
    """Return what factors small matrices of the kind of a batch.

    Args:
        like: Shape ``(n, k, k)``.

    Returns:
        It, for as many matrices of the same dtype on the same device.

    Example:
        >>> inverse, diagonal = small_factors(np.zeros((1, 1, 1)))(np.array([[[3.0]]]), 1.0)
        >>> inverse, diagonal
        (array([[[0.5]]]), array([[2.]]))
    """
    return _CupyFactors() if _is_cupy(like) else _BorderedFactors(like)


class _CupyFactors:
    def __init__(self) -> None:
        self.largest: int = _of_cupy().LARGEST_FACTOR

    def __call__(self, matrices: Array, shift: Array | float) -> tuple[Array, Array]:
        inverse, diagonal = _of_cupy().inverse_factor(matrices, shift)
        return inverse, diagonal


class _BorderedFactors:
    """Takes both from one call of the library.

    Libraries have no batched triangular inverse, and their general inverse is slow. But the Cholesky factor of
    ``[[A, I], [I, c I]]`` with a large ``c`` holds ``L^-T`` below ``L``.
    """

    def __init__(self, like: Array) -> None:
        self.largest = min(LARGEST_FACTOR, like.shape[-1])
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
        # a copy in rows, beside which the products with transposed views are several times slower
        inverse = xp.concat([xp.matrix_transpose(both[:, size:, :size])], axis=0)
        flat = xp.reshape(both, (both.shape[0], -1))
        return inverse, flat[:, : 2 * size * size : 2 * size + 1]


def _bordered(like: Array, size: int) -> Array:
    xp = array_namespace(like)
    # xp.eye would need the device by name, in a spelling that differs between libraries
    ones = xp.ones_like(like[:, :size, :size])
    identity = xp.tril(ones) - xp.tril(ones, k=-1)
    large = float(xp.finfo(ones.dtype).max) ** 0.75
    top = xp.concat([xp.zeros_like(identity), identity], axis=-1)
    return xp.concat([top, xp.concat([identity, large * identity], axis=-1)], axis=-2)


def _is_cupy(x: Array) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy"


def _of_cupy() -> Any:
    from mfac_core.backends import cupy_backend

    return cupy_backend
