"""Kernels for CuPy arrays: cuBLAS on strided operands, and small CUDA kernels. Importing this module needs CuPy."""

from __future__ import annotations

from functools import cache
from typing import Any

import cupy
import numpy as np

from mfac_core.backends import Array

__all__ = ["MAX_FACTOR", "SmallFactors", "column_sums_of_squares", "inverse_factor", "matmul", "saliency"]

MAX_FACTOR = 32
"""Rows of the largest matrix that :func:`inverse_factor` takes: one for each thread of a warp."""


def column_sums_of_squares(x: Array) -> Array:
    """Return the sums of squares over the rows of ``x``, in one pass and without an array of squares.

    ``x`` has shape ``(n, rows, columns)``, float32 or float64, with any strides; the result ``(n, columns)``.
    """
    count, rows, columns = x.shape
    with x.device:
        sums = cupy.empty((count, columns), x.dtype)
        if sums.size:
            # neighbouring threads read neighbouring columns, 32 in a warp; if there are fewer, more threads take rows
            width = min(32, 1 << (columns - 1).bit_length())
            tiles = -(-columns // width)
            strides = (stride // x.itemsize for stride in x.strides)
            kernel = _column_sums_of_squares({"f": "float", "d": "double"}[x.dtype.char])
            kernel((count * tiles,), (width, _THREADS // width), (x, sums, rows, columns, tiles, *strides))
    return sums


def saliency(weights: Array, inverse_diagonal: Array) -> Array:
    """Return ``w^2 / (2 [F^-1]_qq)`` of each weight, in one pass."""
    with weights.device:
        return _saliency(weights, inverse_diagonal)


def matmul(a: Array, b: Array) -> Array:
    """Return the products of two batches of matrices; transposed and sliced operands are not copied.

    :func:`cupy.matmul` copies every operand that is not C-contiguous. Here cuBLAS reads it in place if its rows or its
    columns are contiguous. Operands other than float32 or float64 of shapes ``(n, p, q)`` and ``(n, q, r)`` are left to
    :func:`cupy.matmul`.
    """
    with a.device:
        if not _suit_cublas(a, b):
            return cupy.matmul(a, b)
        count, rows, inner = a.shape
        columns = b.shape[2]
        product = cupy.empty((count, rows, columns), a.dtype)
        a, a_operation, a_leading, a_stride = _operand(a)
        b, b_operation, b_leading, b_stride = _operand(b)
        one, zero = np.ones(1, a.dtype), np.zeros(1, a.dtype)
        cublas = cupy.cuda.cublas
        multiply = {"f": cublas.sgemmStridedBatched, "d": cublas.dgemmStridedBatched}[a.dtype.char]
        # cuBLAS reads memory column by column, so it sees each row-major matrix transposed: (A B)^T = B^T A^T
        multiply(
            cupy.cuda.get_cublas_handle(),
            b_operation,
            a_operation,
            columns,
            rows,
            inner,
            one.ctypes.data,
            b.data.ptr,
            b_leading,
            b_stride,
            a.data.ptr,
            a_leading,
            a_stride,
            zero.ctypes.data,
            product.data.ptr,
            columns,
            rows * columns,
            count,
        )
    return product


def inverse_factor(matrices: Array, shift: Array | float) -> tuple[Array, Array]:
    """Return inverse Cholesky factors of a batch of small matrices, ``L^-1`` of ``matrices + shift * I = L L^T``.

    If a matrix is not positive definite or not finite, its results are NaN from the first row that shows it on, except
    for the zeros above the diagonal.

    Args:
        matrices: Symmetric, shape ``(n, k, k)`` with ``k`` up to :data:`MAX_FACTOR`, float32 or float64, with any
            strides; only the lower triangle is read. Not modified.
        shift: Added to the diagonal: one number, or an array of ``n`` numbers, one for each matrix.

    Returns:
        ``L^-1``, C-contiguous, shape ``(n, k, k)``, and the diagonal of ``L``, shape ``(n, k)``; same dtype and device.

    Raises:
        ValueError: If the matrices are too large.
    """
    count, _, size = matrices.shape
    if size > MAX_FACTOR:
        raise ValueError(f"matrices have {size} rows; inverse_factor takes up to {MAX_FACTOR}")
    with matrices.device:
        inverses = cupy.empty(matrices.shape, matrices.dtype)
        diagonals = cupy.empty((count, size), matrices.dtype)
        if inverses.size:
            blocks = -(-count // _WARPS)
            strides = (stride // matrices.itemsize for stride in matrices.strides)
            shifts = cupy.broadcast_to(cupy.asarray(shift, matrices.dtype).reshape(-1), (count,))
            shifts = cupy.ascontiguousarray(shifts)
            kernel = _inverse_factor({"f": "float", "d": "double"}[matrices.dtype.char])
            arguments = (matrices, inverses, diagonals, shifts, count, np.int32(size), *strides)
            kernel((blocks,), (MAX_FACTOR, _WARPS), arguments)
    return inverses, diagonals


class SmallFactors:
    """:func:`inverse_factor` as :class:`mfac_core.fisher.kernels.SmallFactors`."""

    largest = MAX_FACTOR

    def __call__(self, matrices: Array, shift: Array | float) -> tuple[Array, Array]:
        """Return ``L^-1`` and the diagonal of ``L``."""
        return inverse_factor(matrices, shift)


_THREADS = 256

_WARPS = 4  # matrices of one thread block: 34 KB of shared memory at most, of the 48 KB that need no opt-in

_MAX_INT = 2**31 - 1  # cuBLAS takes sizes and leading dimensions as 32-bit integers

# A thread block sums a tile of neighbouring columns of one matrix. Threads with one threadIdx.x share a column: each
# takes every blockDim.y-th row of it, and a tree reduction in shared memory adds up their sums.
_COLUMN_SUMS_OF_SQUARES = r"""
extern "C" __global__ void column_sums_of_squares(
    const REAL* __restrict__ x, REAL* __restrict__ sums,
    long long rows, long long columns, long long tiles,
    long long matrix_stride, long long row_stride, long long column_stride)
{
    __shared__ double partial[THREADS];
    const long long matrix = blockIdx.x / tiles;
    const long long column = blockIdx.x % tiles * blockDim.x + threadIdx.x;
    double total = 0;
    if (column < columns) {
        const REAL* top = x + matrix * matrix_stride + column * column_stride;
        // unrolled by eight, so that eight loads are in flight; the eight squares are added up in REAL, and only their
        // sum in double, of which most GPUs compute far fewer per second
        for (long long first = threadIdx.y; first < rows; first += 8 * blockDim.y) {
            REAL eight = 0;
            #pragma unroll
            for (int step = 0; step < 8; ++step) {
                const long long row = first + step * blockDim.y;
                if (row < rows) {
                    const REAL value = top[row * row_stride];
                    eight += value * value;
                }
            }
            total += eight;
        }
    }
    // blockDim.y is a power of two: each round adds the upper half of the partial sums to the lower half
    const int place = threadIdx.y * blockDim.x + threadIdx.x;
    partial[place] = total;
    for (int upper = blockDim.y / 2; upper > 0; upper /= 2) {
        __syncthreads();
        if (threadIdx.y < upper) {
            partial[place] += partial[place + upper * blockDim.x];
        }
    }
    if (threadIdx.y == 0 && column < columns) {
        sums[matrix * columns + column] = partial[place];
    }
}
"""

# One warp factors one matrix, which is at most 32 x 32, in shared memory; the lanes of a warp need no barrier but
# __syncwarp. First L by columns, left-looking: L[i][j] = (A[i][j] - sum over k < j of L[i][k] L[j][k]) / L[j][j]. Then
# its inverse X by rows, forward substitution: X[i][j] = (I[i][j] - sum over k < i of L[i][k] X[k][j]) / L[i][i].
_INVERSE_FACTOR = r"""
extern "C" __global__ void inverse_factor(
    const REAL* __restrict__ matrices, REAL* __restrict__ inverses, REAL* __restrict__ diagonals,
    const REAL* __restrict__ shifts, long long count, int size,
    long long matrix_stride, long long row_stride, long long column_stride)
{
    // the odd width puts the rows of one column in different banks of shared memory, so that lanes read them at once;
    // it also makes room for two triangles: L[i][j] is at tile[i][j], and inverse[i][j] at tile[j][i + 1]
    __shared__ REAL tiles[WARPS][LARGEST][LARGEST + 1];
    const long long matrix = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.y;
    if (matrix >= count) {
        return;
    }
    const int lane = threadIdx.x;
    REAL (*tile)[LARGEST + 1] = tiles[threadIdx.y];
    const REAL* top = matrices + matrix * matrix_stride;
    for (int row = 0; row < size; ++row) {
        if (lane <= row) {
            const REAL value = top[row * row_stride + lane * column_stride];
            tile[row][lane] = lane == row ? value + shifts[matrix] : value;
        }
    }
    __syncwarp();

    for (int column = 0; column < size; ++column) {  // of L, with one of its rows per lane
        const bool below = column <= lane && lane < size;
        REAL rest = 0;
        if (below) {
            rest = tile[lane][column];
            for (int k = 0; k < column; ++k) {
                rest -= tile[lane][k] * tile[column][k];
            }
        }
        const REAL pivot = __shfl_sync(0xffffffff, rest, column);
        // a NaN spreads to all later rows by itself, but an infinite pivot would leave finite numbers after it
        const REAL root = pivot > 0 && isfinite(pivot) ? sqrt(pivot) : static_cast<REAL>(nan(""));
        if (below) {
            tile[lane][column] = lane == column ? root : rest / root;
        }
        __syncwarp();
    }

    REAL* inverse = inverses + matrix * size * size;
    for (int row = 0; row < size; ++row) {  // of the inverse, with one of its columns per lane
        REAL value = 0;
        if (lane <= row) {
            REAL rest = lane == row;
            for (int k = 0; k < row; ++k) {  // from 0 in all lanes, so that each step reads different banks
                if (lane <= k) {
                    rest -= tile[row][k] * tile[lane][k + 1];
                }
            }
            value = rest / tile[row][row];
            tile[lane][row + 1] = value;
        }
        if (lane < size) {
            inverse[row * size + lane] = value;
        }
    }
    if (lane < size) {
        diagonals[matrix * size + lane] = tile[lane][lane];
    }
}
"""

# one pass over memory, where the expression in arrays would take three
_saliency = cupy.ElementwiseKernel("T w, T d", "T s", "s = w * w / (2 * d)", "mfac_saliency")


@cache
def _column_sums_of_squares(real: str) -> Any:
    options = (f"-DREAL={real}", f"-DTHREADS={_THREADS}")
    return cupy.RawKernel(_COLUMN_SUMS_OF_SQUARES, "column_sums_of_squares", options)


def _suit_cublas(a: Array, b: Array) -> bool:
    return bool(
        a.ndim == b.ndim == 3
        and a.shape[0] == b.shape[0]
        and a.shape[2] == b.shape[1]
        and a.dtype == b.dtype
        and a.dtype.char in "fd"
        and a.size > 0
        and b.size > 0
        and max(*a.shape, *b.shape) <= _MAX_INT
    )


def _operand(x: Array) -> tuple[Array, int, int, int]:
    """Return ``x`` or a copy of it, with its operation, leading dimension and stride between matrices for cuBLAS."""
    count, rows, columns = x.shape
    stride, row_stride, column_stride = (step // x.itemsize for step in x.strides)
    cublas = cupy.cuda.cublas
    # the stride of an axis of length 1 is arbitrary
    stride = stride if count > 1 else 0
    if stride >= 0:
        # contiguous rows, `leading` numbers apart
        leading = row_stride if rows > 1 else columns
        if (column_stride == 1 or columns == 1) and columns <= leading <= _MAX_INT:
            return x, cublas.CUBLAS_OP_N, leading, stride
        # contiguous columns, `leading` numbers apart: the same memory, to be transposed
        leading = column_stride if columns > 1 else rows
        if (row_stride == 1 or rows == 1) and rows <= leading <= _MAX_INT:
            return x, cublas.CUBLAS_OP_T, leading, stride
    return cupy.ascontiguousarray(x), cublas.CUBLAS_OP_N, columns, rows * columns


@cache
def _inverse_factor(real: str) -> Any:
    options = (f"-DREAL={real}", f"-DWARPS={_WARPS}", f"-DLARGEST={MAX_FACTOR}")
    return cupy.RawKernel(_INVERSE_FACTOR, "inverse_factor", options)
