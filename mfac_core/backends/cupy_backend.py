"""Arrays on NVIDIA GPUs, computed by CuPy. The only module that imports CuPy."""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from mfac_core.backends.base import Array

__all__ = ["LARGEST_FACTOR", "CupyBackend", "column_sums_of_squares", "inverse_factor", "matmul", "saliency"]

LARGEST_FACTOR = 32
"""Rows of the largest matrix that :func:`inverse_factor` takes: one for each thread of a warp."""

_logger = logging.getLogger("mfac_core")


class CupyBackend:
    """The backend of the devices ``cuda:0``, ``cuda:1``, ...; see :class:`mfac_core.backends.base.Backend`."""

    name = "cupy"

    def devices(self) -> tuple[str, ...]:
        """Return one name per visible GPU."""
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError:
            count = 0
        return tuple(f"cuda:{index}" for index in range(count))

    def asarray(self, x: Array, device: str, dtype: Any = None) -> Array:
        """Return ``x`` on the GPU ``device``, through DLPack or a copy from host memory."""
        with self.on(device):
            if not isinstance(x, cupy.ndarray | np.ndarray) and hasattr(x, "__dlpack__"):
                x = cupy.from_dlpack(x)
            if isinstance(x, cupy.ndarray) and x.device.id != _index(device):
                x = x.copy()  # a copy made under another device moves the array there
            return cupy.asarray(x, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], device: str, dtype: Any) -> Array:
        """Return a new array of zeros on the GPU ``device``."""
        with self.on(device):
            return cupy.zeros(shape, dtype)

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Return zeros in page-locked host memory, from which copies to a GPU run beside its work."""
        # CuPy's pool would keep these large arrays page-locked for good after they are dropped
        zeros = _page_locked(shape, dtype, _outside_the_pool)
        if zeros is None:
            return np.zeros(shape, dtype)
        zeros.fill(0)
        return zeros

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return a copy of ``x`` in host memory."""
        if not isinstance(x, cupy.ndarray):
            return np.asarray(x)
        with x.device:
            host: npt.NDArray[Any] = cupy.asnumpy(x)
            return host

    def fetch(self, x: Array) -> Callable[[], npt.NDArray[Any]]:
        """Return a function that waits for a copy of ``x`` in host memory, begun now, behind the work on its GPU."""
        if not isinstance(x, cupy.ndarray):
            array = np.asarray(x)
            return lambda: array
        with x.device:
            pinned = _page_locked(x.shape, x.dtype, cupy.cuda.alloc_pinned_memory)
            host = np.empty(x.shape, x.dtype) if pinned is None else pinned
            work = cupy.cuda.get_current_stream()
            x.get(stream=work, out=host, blocking=False)
            done = _event()
            done.record(work)
        source = [x]

        def wait() -> npt.NDArray[Any]:
            done.synchronize()
            source.clear()
            return host

        # nobody may be given the memory of a copy that is still under way, also when nobody waits for it
        weakref.finalize(wait, done.synchronize)
        return wait

    def stream(self, device: str, loads: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        """Yield the arrays of each load on the GPU ``device``; while one item is worked on, the next is copied.

        The work on an item belongs on the stream that was current when the first item was asked for. A yielded array
        may be memory that the item after the next is copied to: it is valid until the next item is asked for. Arrays
        that are on the GPU already are yielded themselves.

        Args:
            device: The GPU.
            loads: Functions that return NumPy arrays, or CuPy arrays on any GPU; called in order, one item ahead.

        Yields:
            The arrays of one load; new ones have the dtype and shape of their source and are C-contiguous.
        """
        with self.on(device):
            work = cupy.cuda.get_current_stream()
            copies = cupy.cuda.Stream(non_blocking=True)
            slots = (_Slot(work, copies), _Slot(work, copies))
        waiting: tuple[_Slot, list[Array]] | None = None
        try:
            for slot, load in zip(itertools.cycle(slots), loads, strict=False):
                with self.on(device):
                    arrays = slot.fill(load)
                if waiting:
                    yield from self._lend(device, *waiting)
                waiting = slot, arrays
            if waiting:
                yield from self._lend(device, *waiting)
        finally:
            # the memory of the slots goes back to pools that know nothing of the copies
            with self.on(device):
                copies.synchronize()
                work.synchronize()

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Return CuPy's device context; CuPy computes where the current device is."""
        context: AbstractContextManager[Any] = cupy.cuda.Device(_index(device))
        return context

    @contextmanager
    def workers(self, device: str, tasks: int) -> Iterator[int]:
        """Give one worker: a GPU runs one queue at full speed."""
        yield 1

    def speed(self, device: str) -> float:
        """Return the float32 operations per second that the GPU's lanes and clock allow."""
        index = _index(device)
        runtime = cupy.cuda.runtime
        multiprocessors = int(runtime.deviceGetAttribute(runtime.cudaDevAttrMultiProcessorCount, index))
        kilohertz = int(runtime.deviceGetAttribute(runtime.cudaDevAttrClockRate, index))
        lanes = 64 if cupy.cuda.Device(index).compute_capability in _CAPABILITIES_WITH_64_LANES else 128
        return 2e3 * multiprocessors * lanes * kilohertz  # a multiplication and an addition per lane and cycle

    def group_bytes(self, device: str, total: int) -> int:
        """Return a sixteenth of the GPU's memory, at most 2 GiB, and less where four groups are more than there are.

        Copies overlap only the work on other groups. Less than 64 MiB would not keep a GPU busy.
        """
        with self.on(device):
            _, memory = cupy.cuda.runtime.memGetInfo()
        return max(64 * 2**20, min(int(memory) // 16, 2 * 2**30, total // 4))

    def free_bytes(self, device: str) -> int | None:
        """Return the GPU's free memory, together with what CuPy's pool holds unused."""
        with self.on(device):
            free, _ = cupy.cuda.runtime.memGetInfo()
            return int(free) + int(cupy.get_default_memory_pool().free_bytes())

    def synchronize(self, device: str) -> None:
        """Wait for the GPU's queue."""
        with self.on(device):
            cupy.cuda.get_current_stream().synchronize()

    def release(self, device: str) -> None:
        """Give the unused blocks of CuPy's pool back to the GPU."""
        with self.on(device):
            cupy.get_default_memory_pool().free_all_blocks()

    def _lend(self, device: str, slot: _Slot, arrays: list[Array]) -> Iterator[list[Array]]:
        with self.on(device):
            slot.work.wait_event(slot.copied)
        yield arrays
        with self.on(device):
            slot.consumed.record(slot.work)


def column_sums_of_squares(x: Array) -> Array:
    """Return the sums of the squares over the rows of a batch of matrices, in one pass.

    Args:
        x: Shape ``(n, rows, columns)``, float32 or float64, with any strides. Not modified.

    Returns:
        Shape ``(n, columns)``, same dtype and device.
    """
    count, rows, columns = x.shape
    with x.device:
        sums = cupy.empty((count, columns), x.dtype)
        if sums.size:
            # neighbouring threads read neighbouring columns; where these are few, more of the threads take rows
            width = min(32, 1 << (columns - 1).bit_length())
            tiles = -(-columns // width)
            strides = (stride // x.itemsize for stride in x.strides)
            kernel = _column_sums_of_squares({"f": "float", "d": "double"}[x.dtype.char])
            kernel((count * tiles,), (width, _THREADS // width), (x, sums, rows, columns, tiles, *strides))
    return sums


def saliency(weights: Array, inverse_diagonal: Array) -> Array:
    """Return ``w^2 / (2 [F^-1]_qq)``, in one pass.

    Args:
        weights: Shape ``(d,)``, float32 or float64. Not modified.
        inverse_diagonal: Same shape, dtype and device. Not modified.

    Returns:
        Shape ``(d,)``, same dtype and device.
    """
    with weights.device:
        return _saliency(weights, inverse_diagonal)


def matmul(a: Array, b: Array) -> Array:
    """Return the products of two batches of matrices; transposed and sliced operands are not copied.

    :func:`cupy.matmul` copies every operand that is not C-contiguous. Here cuBLAS reads it where it is, as long as its
    rows or its columns are contiguous.

    Args:
        a: Shape ``(n, p, q)``, float32 or float64. Not modified.
        b: Shape ``(n, q, r)``, same dtype and device. Not modified.

    Returns:
        A new C-contiguous array of shape ``(n, p, r)``, same dtype and device. Operands of other shapes and dtypes are
        left to :func:`cupy.matmul`.
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
        # cuBLAS takes memory column by column, so that it sees every matrix transposed: (A B)^T = B^T A^T
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

    Where a matrix is not positive definite or not finite, the results are NaN from the first row that shows it to the
    last, except for the zeros above the diagonal.

    Args:
        matrices: Symmetric, shape ``(n, k, k)`` with ``k`` up to :data:`LARGEST_FACTOR`, float32 or float64, with any
            strides; only the lower triangle is read. Not modified.
        shift: Added to the diagonal: one number for all matrices, or an array of ``n``, that of each.

    Returns:
        ``L^-1``, C-contiguous, shape ``(n, k, k)``, and the diagonal of ``L``, shape ``(n, k)``; same dtype and device.

    Raises:
        ValueError: If the matrices are too large.
    """
    count, _, size = matrices.shape
    if size > LARGEST_FACTOR:
        raise ValueError(f"matrices have {size} rows; inverse_factor takes up to {LARGEST_FACTOR}")
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
            kernel((blocks,), (LARGEST_FACTOR, _WARPS), arguments)
    return inverses, diagonals


_CAPABILITIES_WITH_64_LANES = ("60", "70", "72", "75", "80")

_ALIGNMENT = 256  # bytes, as CUDA aligns its own allocations

_THREADS = 256

_WARPS = 4  # those of one block share 34 KB at most, of the 48 KB that a kernel can have without asking

_LARGEST_INT = 2**31 - 1

_refusals = itertools.count()

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
        // eight loads are under way at once, and only every eighth addition is one of the slow double ones
        for (long long first = threadIdx.y; first < rows; first += 8 * blockDim.y) {
            REAL part = 0;
            #pragma unroll
            for (int step = 0; step < 8; ++step) {
                const long long row = first + step * blockDim.y;
                if (row < rows) {
                    const REAL value = top[row * row_stride];
                    part += value * value;
                }
            }
            total += part;
        }
    }
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

_INVERSE_FACTOR = r"""
extern "C" __global__ void inverse_factor(
    const REAL* __restrict__ matrices, REAL* __restrict__ inverses, REAL* __restrict__ diagonals,
    const REAL* __restrict__ shifts, long long count, int size,
    long long matrix_stride, long long row_stride, long long column_stride)
{
    // the odd width keeps the rows of one column in different banks; it leaves room for two triangles, too:
    // L[i][j] is at tile[i][j], and inverse[i][j] at tile[j][i + 1]
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
        // all that comes after a NaN becomes NaN, but what comes after an infinite pivot would look sound
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
            for (int k = 0; k < row; ++k) {  // from 0 for all lanes: each step then reads different banks
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
        and max(*a.shape, *b.shape) <= _LARGEST_INT
    )


def _operand(x: Array) -> tuple[Array, int, int, int]:
    """Return ``x`` or a copy, and how cuBLAS is to read it: operation, leading dimension, stride between matrices."""
    count, rows, columns = x.shape
    stride, row_stride, column_stride = (step // x.itemsize for step in x.strides)
    cublas = cupy.cuda.cublas
    # the stride of an axis of length 1 can be anything
    stride = stride if count > 1 else 0
    if stride >= 0:
        leading = row_stride if rows > 1 else columns
        if (column_stride == 1 or columns == 1) and columns <= leading <= _LARGEST_INT:
            return x, cublas.CUBLAS_OP_N, leading, stride
        leading = column_stride if columns > 1 else rows
        if (row_stride == 1 or rows == 1) and rows <= leading <= _LARGEST_INT:
            return x, cublas.CUBLAS_OP_T, leading, stride
    return cupy.ascontiguousarray(x), cublas.CUBLAS_OP_N, columns, rows * columns


@cache
def _inverse_factor(real: str) -> Any:
    options = (f"-DREAL={real}", f"-DWARPS={_WARPS}", f"-DLARGEST={LARGEST_FACTOR}")
    return cupy.RawKernel(_INVERSE_FACTOR, "inverse_factor", options)


class _Slot:
    """Memory for one item on the current device, and in the host where the item has to be gathered first.

    Args:
        work: The stream that works on the items.
        copies: The stream that copies them.
    """

    def __init__(self, work: Any, copies: Any) -> None:
        self.work = work
        self.copies = copies
        self.copied = _event()
        self.consumed = _event()
        self._num_bytes = 0
        self._memory: Any = None
        self._host: npt.NDArray[Any] = np.empty(0, np.uint8)
        self._sources: list[Array] = []

    def fill(self, load: Callable[[], list[Array]]) -> list[Array]:
        """Return what ``load`` returns, on this device: copies are begun, and come after the work on the last item."""
        # until the last copy is done, its sources and the host memory must stay as they are
        self.copied.synchronize()
        self._sources.clear()
        arrays = load()
        here = cupy.cuda.Device().id
        stays = [isinstance(x, cupy.ndarray) and x.device.id == here for x in arrays]
        sizes = [0 if stay else _padded(x.nbytes) for x, stay in zip(arrays, stays, strict=True)]
        self._reserve(sum(sizes))
        self.copies.wait_event(self.consumed)
        offsets = itertools.accumulate(sizes, initial=0)
        filled = [x if stay else self._copy(x, offset) for x, stay, offset in zip(arrays, stays, offsets, strict=False)]
        self.copied.record(self.copies)
        return filled

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes <= self._num_bytes:
            return
        self.consumed.synchronize()
        self._memory = None
        self._memory = cupy.cuda.alloc(num_bytes)
        self._num_bytes = num_bytes
        # the pool lends memory that work queued before may still use: the copies have to come after it
        self.consumed.record(self.work)

    def _copy(self, x: Array, offset: int) -> Array:
        target = cupy.ndarray(x.shape, x.dtype, memptr=self._memory + offset)
        if isinstance(x, np.ndarray):
            source = x if x.flags.c_contiguous and _is_page_locked(x) else self._gather(x, offset)
            target.set(source, stream=self.copies)
        else:
            with x.device:
                source = cupy.ascontiguousarray(x)
                ready = _event()
                ready.record(cupy.cuda.get_current_stream())
            self.copies.wait_event(ready)
            target.data.copy_from_device_async(source.data, source.nbytes, self.copies)
        self._sources.append(source)
        return target

    def _gather(self, x: npt.NDArray[Any], offset: int) -> npt.NDArray[Any]:
        if self._host.nbytes < self._num_bytes:
            pinned = _page_locked((self._num_bytes,), np.uint8, _outside_the_pool)
            self._host = np.empty(self._num_bytes, np.uint8) if pinned is None else pinned
        gathered: npt.NDArray[Any] = np.ndarray(x.shape, x.dtype, buffer=self._host, offset=offset)
        np.copyto(gathered, x)
        return gathered


def _padded(num_bytes: int) -> int:
    return -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT


def _event() -> Any:
    return cupy.cuda.Event(block=True, disable_timing=True)


def _is_page_locked(x: npt.NDArray[Any]) -> bool:
    runtime = cupy.cuda.runtime
    return bool(runtime.pointerGetAttributes(x.ctypes.data).type == runtime.memoryTypeHost)


def _page_locked(shape: tuple[int, ...], dtype: Any, allocate: Callable[[int], Any]) -> npt.NDArray[Any] | None:
    """Return uninitialized page-locked memory, or ``None`` where CUDA refuses it."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        memory = allocate(max(num_bytes, 1))
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if next(_refusals) == 0:
            _logger.warning(
                "CUDA refuses page-locked host memory (%s): ordinary memory is used, and copies to the GPU wait for it",
                error,
            )
        return None
    return np.ndarray(shape, dtype, buffer=memory)


def _outside_the_pool(num_bytes: int) -> Any:
    memory = cupy.cuda.PinnedMemory(num_bytes, cupy.cuda.runtime.hostAllocPortable)
    return cupy.cuda.PinnedMemoryPointer(memory, 0)


def _index(device: str) -> int:
    return int(device.partition(":")[2])
