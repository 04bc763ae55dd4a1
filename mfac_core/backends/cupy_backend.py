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
        # CuPy's pool would keep the memory of these large arrays page-locked after they are freed
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
        """Start a copy of ``x`` to host memory behind the work on its GPU, and return a function that waits for it."""
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

        # the memory must not be reused while the copy is in progress, also if `wait` is never called
        weakref.finalize(wait, done.synchronize)
        return wait

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        """Yield the arrays of each load on the GPU ``device``; while one item is worked on, the next is copied.

        Work on an item belongs on the stream that was current when the first item was requested. The item after the
        next is copied to the same memory, so the arrays are valid until the next item is requested. Arrays that are
        already on the GPU are yielded themselves; copies are C-contiguous.

        Args:
            device: The GPU.
            loaders: Functions that return NumPy arrays, or CuPy arrays on any GPU; called in order, one item ahead.
        """
        with self.on(device):
            work = cupy.cuda.get_current_stream()
            copies = cupy.cuda.Stream(non_blocking=True)
            slots = (_Slot(work, copies), _Slot(work, copies))
        waiting: tuple[_Slot, list[Array]] | None = None
        try:
            for slot, load in zip(itertools.cycle(slots), loaders, strict=False):
                with self.on(device):
                    arrays = slot.fill(load)
                if waiting:
                    yield from self._lend(device, *waiting)
                waiting = slot, arrays
            if waiting:
                yield from self._lend(device, *waiting)
        finally:
            # the memory of the slots returns to pools that are not ordered with the copies
            with self.on(device):
                copies.synchronize()
                work.synchronize()

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

    def _lend(self, device: str, slot: _Slot, arrays: list[Array]) -> Iterator[list[Array]]:
        with self.on(device):
            slot.work.wait_event(slot.copied)
        yield arrays
        with self.on(device):
            slot.consumed.record(slot.work)


_CAPABILITIES_WITH_64_LANES = ("60", "70", "72", "75", "80")

_ALIGNMENT = 256  # bytes, as CUDA aligns its own allocations

_refusals = itertools.count()


class _Slot:
    """Memory for one item on the current device, and page-locked memory if the item has to be gathered first.

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
        """Return the arrays of a load on this device: copies are started, ordered after the work on the last item."""
        # the sources and the host memory of the last copy must not change before it is done
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
        # queued work may still use memory that the pool hands out again: copies come after it
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
                "CUDA refuses page-locked host memory (%s): ordinary memory is used, and copies to the GPU are slower",
                error,
            )
        return None
    return np.ndarray(shape, dtype, buffer=memory)


def _outside_the_pool(num_bytes: int) -> Any:
    memory = cupy.cuda.PinnedMemory(num_bytes, cupy.cuda.runtime.hostAllocPortable)
    return cupy.cuda.PinnedMemoryPointer(memory, 0)


def _index(device: str) -> int:
    return int(device.partition(":")[2])
