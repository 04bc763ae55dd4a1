"""Threads that a worker may use in addition to those of BLAS, and work spread over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from mfac_core.backends.base import Array

__all__ = ["map_on_threads", "spare_threads", "split_columns", "split_for_threads"]

_threads: ContextVar[int] = ContextVar("threads", default=1)


@contextmanager
def spare_threads(count: int) -> Iterator[None]:
    """Let :func:`map_on_threads` use ``count`` threads within this context, in the thread that opens it."""
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def map_on_threads(function: Callable[[Array], Array], pieces: Sequence[Array]) -> list[Array]:
    """Return ``function(piece)`` for each piece, in order, computed on the spare threads.

    The threads of BLAS are no substitute: for thin products they can wait for each other far longer than they work.

    Example:
        >>> with spare_threads(2):
        ...     map_on_threads(float, [np.array(1), np.array(2)])
        [1.0, 2.0]
    """
    threads = min(_threads.get(), len(pieces))
    if threads < 2:
        return [function(piece) for piece in pieces]
    handling = np.geterr()  # NumPy keeps its error handling per thread: pass the caller's on

    def handled(piece: Array) -> Array:
        with np.errstate(**handling):
            return function(piece)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(handled, pieces))


def split_for_threads(x: Array) -> list[Array]:
    """Return views of the columns of a batch of matrices, one for each spare thread."""
    return split_columns(x, min(_threads.get(), x.shape[-1]))


def split_columns(x: Array, count: int) -> list[Array]:
    """Return views of the columns of a batch of matrices, in ``count`` pieces of nearly equal width.

    Example:
        >>> [piece.shape for piece in split_columns(np.zeros((1, 2, 5)), 2)]
        [(1, 2, 2), (1, 2, 3)]
    """
    bounds = [x.shape[-1] * piece // count for piece in range(count + 1)]
    return [x[:, :, start:stop] for start, stop in itertools.pairwise(bounds)]
