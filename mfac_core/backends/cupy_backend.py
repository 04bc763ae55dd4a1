"""Arrays on NVIDIA GPUs, computed by CuPy. Importing this module needs CuPy."""

from __future__ import annotations

import itertools
import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

from mfac_core.backends.base import Array

__all__ = ["CupyBackend"]

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

    def device_of(self, x: Array) -> str:
        """Return the name of the GPU that holds ``x``."""
        return f"cuda:{x.device.id}"

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
        """Return zeros in page-locked host memory, from which copies to a GPU overlap with its work."""
        zeros = _page_locked(_empty_outside_the_pool, shape, dtype)
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
        """Start a copy of ``x`` to host memory behind the work on its GPU, and return a function that waits for it."""
        if not isinstance(x, cupy.ndarray):
            array = np.asarray(x)
            return lambda: array
        with x.device:
            host = _page_locked(cupyx.empty_pinned, x.shape, x.dtype)
            x.get(out=host, blocking=False)
            done = cupy.cuda.get_current_stream().record()
        source = [x]

        def wait() -> npt.NDArray[Any]:
            done.synchronize()
            source.clear()
            return host

        # the memory must not be reused while the copy is in progress, also if `wait` is never called
        weakref.finalize(wait, done.synchronize)
        return wait

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        """Yield the arrays of each load on the GPU ``device``; while one item is worked on, the next is copied.

        Work on an item belongs on the stream that was current when the first item was requested. The list of an item is
        emptied when the next is requested, so that no more than two items take memory. Arrays that are already on the
        GPU are yielded themselves; copies are C-contiguous.

        Args:
            device: The GPU.
            loaders: Functions that return NumPy arrays, or CuPy arrays on any GPU; called in order, one item ahead.
        """
        with self.on(device):
            work = cupy.cuda.get_current_stream()
            copies = cupy.cuda.Stream(non_blocking=True)
        ahead: _Item | None = None
        try:
            for load in loaders:
                item = _Item()
                with self.on(device):
                    item.copy(load(), work, copies)
                if ahead is not None:
                    yield from ahead.lend(work)
                ahead = item
            if ahead is not None:
                yield from ahead.lend(work)
        finally:
            # until then the copies use their sources, and the work the memory of the last items
            copies.synchronize()
            work.synchronize()
            with self.on(device):
                cupy.get_default_memory_pool().free_all_blocks(copies)
            cupy.get_default_pinned_memory_pool().free_all_blocks()

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Return CuPy's device context: CuPy computes on the current device."""
        context: AbstractContextManager[Any] = cupy.cuda.Device(_index(device))
        return context

    @contextmanager
    def workers(self, device: str, tasks: int) -> Iterator[int]:
        """Allow one worker: a single queue keeps a GPU busy."""
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
        """Return a sixteenth of the GPU's memory, at most 2 GiB, or less so that there are at least four groups.

        Copies overlap only with work on other groups. Less than 64 MiB would not keep a GPU busy.
        """
        with self.on(device):
            _, memory = cupy.cuda.runtime.memGetInfo()
        return max(64 * 2**20, min(int(memory) // 16, 2 * 2**30, total // 4))

    def free_bytes(self, device: str) -> int | None:
        """Return the GPU's free memory, including the unused memory of CuPy's pool."""
        with self.on(device):
            free, _ = cupy.cuda.runtime.memGetInfo()
            return int(free) + int(cupy.get_default_memory_pool().free_bytes())

    def synchronize(self, device: str) -> None:
        """Wait for the GPU's queue."""
        with self.on(device):
            cupy.cuda.get_current_stream().synchronize()


_CAPABILITIES_WITH_64_LANES = ("60", "70", "72", "75", "80")

_refusals = itertools.count()


class _Item:
    """The arrays of one load on a GPU, and what they are copied from."""

    def __init__(self) -> None:
        self._arrays: list[Array] = []
        self._sources: list[Array] = []
        self._copied: Any = None

    def copy(self, arrays: list[Array], work: Any, copies: Any) -> None:
        """Start to copy the arrays to the current device; those that are there already are taken themselves."""
        here = cupy.cuda.Device().id
        # memory that the copies take from CuPy's pool may still be read by the work queued so far
        copies.wait_event(work.record())
        for x in arrays:
            if not isinstance(x, cupy.ndarray):
                self._arrays.append(self._from_host(x, copies))
            elif x.device.id == here:
                self._arrays.append(x)
            else:
                self._arrays.append(self._from_device(x, copies))
        self._copied = copies.record()

    def lend(self, work: Any) -> Iterator[list[Array]]:
        """Yield the arrays, after which the host may change what they were copied from."""
        work.wait_event(self._copied)
        yield self._arrays
        self._copied.synchronize()
        self._arrays.clear()
        self._sources.clear()

    def _from_host(self, x: npt.NDArray[Any], copies: Any) -> Array:
        source = x
        if not x.flags.c_contiguous:
            source = _page_locked(cupyx.empty_pinned, x.shape, x.dtype)
            np.copyto(source, x)
        self._sources.append(source)
        # the pool keeps memory for each stream apart: what `copies` takes and gives back, only later copies reuse
        with copies:
            copied = cupy.empty(x.shape, x.dtype)
            copied.set(source)
        return copied

    def _from_device(self, x: Array, copies: Any) -> Array:
        with x.device:
            source = cupy.ascontiguousarray(x)
            copies.wait_event(cupy.cuda.get_current_stream().record())
        self._sources.append(source)
        with copies:
            return source.copy()


def _page_locked(empty: Callable[..., npt.NDArray[Any]], shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Return ``empty(shape, dtype)``, uninitialized page-locked memory, or ordinary memory where CUDA refuses it."""
    try:
        return empty(shape, dtype)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if next(_refusals) == 0:
            _logger.warning(
                "CUDA refuses page-locked host memory (%s): ordinary memory is used, and copies to the GPU are slower",
                error,
            )
        return np.empty(shape, dtype)


def _empty_outside_the_pool(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    # CuPy's pool would keep the memory of a window page-locked after the window is gone
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = cupy.cuda.PinnedMemory(num_bytes, cupy.cuda.runtime.hostAllocPortable)
    return np.ndarray(shape, dtype, buffer=cupy.cuda.PinnedMemoryPointer(memory, 0))


def _index(device: str) -> int:
    return int(device.partition(":")[2])
