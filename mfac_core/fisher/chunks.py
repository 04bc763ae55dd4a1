"""Operations over the chunks of a group of blocks: products with the gradients, columns, pieces that fit a cache.

A *chunk* is an array of shape ``(n, m, width)`` that holds some columns of ``n`` blocks, for ``m`` gradient samples.
The chunks of a group together hold all ``B`` columns of its blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import array_api_compat

from mfac_core.backends import Array, array_namespace
from mfac_core.backends.threads import split_columns
from mfac_core.fisher.kernels import runs_on_cpu, wide_dtype

__all__ = [
    "cache_columns",
    "cache_slices",
    "column_bounds",
    "columns_times",
    "concat",
    "fisher_quadratic",
    "gradients_times",
    "is_column",
    "over_cache_slices",
    "rows_times",
    "take_columns",
    "width_of",
]

CACHE_BYTES = 2 * 2**20
"""Bytes of gradients processed at once on the CPU, so that intermediate results stay in its cache."""


def cache_slices(chunks: Sequence[Array]) -> list[slice]:
    """Return slices of blocks whose gradients fit the cache of a CPU; on other devices one slice of all blocks."""
    count, rows, _ = chunks[0].shape
    if not runs_on_cpu(chunks[0]):
        return [slice(0, count)]
    block = sum(rows * chunk.shape[-1] * chunk.dtype.itemsize for chunk in chunks)
    at_once = max(1, CACHE_BYTES // block)
    return [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def over_cache_slices(
    chunks: Sequence[Array], dtype: Any, function: Callable[[Iterable[Array], slice], Array]
) -> Array:
    """Return ``function(chunks of some blocks in dtype, these blocks)`` for blocks that fit the cache, joined."""
    xp = array_namespace(chunks[0])
    results = []
    for blocks in cache_slices(chunks):
        # a generator, so that one converted chunk is in memory at a time
        converted = (xp.asarray(chunk[blocks, :, :], dtype=dtype) for chunk in chunks)
        results.append(function(converted, blocks))
    return concat(results, axis=0)


def cache_columns(chunk: Array) -> list[Array]:
    """Return the columns of a chunk in pieces that stay in a CPU's cache; elsewhere all of them at once."""
    count, rows, width = chunk.shape
    if not runs_on_cpu(chunk):
        return [chunk]
    at_once = max(1, CACHE_BYTES // (count * rows * chunk.dtype.itemsize))
    return split_columns(chunk, -(-width // at_once))


def width_of(chunks: Sequence[Array]) -> int:
    """Return the number of columns ``B`` of a block."""
    return sum(int(chunk.shape[-1]) for chunk in chunks)


def column_bounds(chunks: Sequence[Array]) -> list[tuple[int, int]]:
    """Return the first and one past the last column of each chunk."""
    ends = list(itertools.accumulate((int(chunk.shape[-1]) for chunk in chunks), initial=0))
    return list(itertools.pairwise(ends))


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
    return rows_times(chunks, x[..., None])[..., 0]


def rows_times(chunks: Sequence[Array], x: Array) -> Array:
    """Return ``G x`` of each block for ``x`` of shape ``(n, B, k)``, in its dtype; shape ``(n, m, k)``."""
    xp = array_namespace(x)
    total = None
    for chunk, (start, stop) in zip(chunks, column_bounds(chunks), strict=True):
        product = xp.asarray(chunk, dtype=x.dtype) @ x[:, start:stop, :]
        total = product if total is None else total + product
    return total


def columns_times(chunks: Sequence[Array], coefficients: Array) -> Array:
    """Return ``G^T c`` of each block for ``c`` of shape ``(n, m, k)``, in its dtype; shape ``(n, B, k)``."""
    xp = array_namespace(coefficients)
    converted = (xp.asarray(chunk, dtype=coefficients.dtype) for chunk in chunks)
    return concat([xp.matrix_transpose(chunk) @ coefficients for chunk in converted], axis=-2)


def take_columns(chunks: Sequence[Array], columns: Array) -> Array:
    """Return some columns of each block, shape ``(n, m, k)`` for ``columns`` of shape ``(n, k)``."""
    xp = array_namespace(columns)
    total = None
    for chunk, (start, stop) in zip(chunks, column_bounds(chunks), strict=True):
        is_inside = (columns >= start) & (columns < stop)
        indices = xp.where(is_inside, columns - start, xp.zeros_like(columns))[:, None, :]
        taken = xp.take_along_axis(chunk, xp.broadcast_to(indices, (*chunk.shape[:2], columns.shape[-1])), axis=-1)
        # zero where another chunk has the column
        found = xp.where(is_inside[:, None, :], taken, xp.zeros_like(taken))
        total = found if total is None else total + found
    return total


def is_column(columns: Array, start: int, stop: int) -> Array:
    """Return which of the columns from ``start`` to ``stop`` each of ``columns`` is, shape ``(n, k, stop - start)``."""
    there = array_namespace(columns).arange(start, stop, device=array_api_compat.device(columns))
    return columns[:, :, None] == there[None, None, :]


def concat(arrays: list[Array], axis: int) -> Array:
    """Return the arrays joined along an axis; a single one is not copied."""
    return arrays[0] if len(arrays) == 1 else array_namespace(arrays[0]).concat(arrays, axis=axis)
