"""What the CuPy backend uses of CuPy, on the CPU.

Memory that is freed is handed out again at once, for each stream apart, as by CuPy's pools. So a copy that is not
ordered with the work, or memory that is given back too early, shows as wrong numbers.
"""

import weakref
from collections import defaultdict
from types import SimpleNamespace

import numpy as np

from tests.late_queue import LateQueue

_devices = [0]  # the current device is the last
_streams = defaultdict(lambda: [Stream()])  # for each device; the current stream is the last
_free = defaultdict(list)  # blocks by stream and size; page-locked blocks have no stream


class Stream(LateQueue):
    made = []

    def __init__(self, non_blocking=False):
        super().__init__()
        Stream.made.append(self)

    def __enter__(self):
        _streams[_devices[-1]].append(self)

    def __exit__(self, *_):
        _streams[_devices[-1]].pop()


class Device:
    def __init__(self, index=None):
        self.id = _devices[-1] if index is None else index

    def __enter__(self):
        _devices.append(self.id)

    def __exit__(self, *_):
        _devices.pop()


class PinnedMemory(bytearray):
    def __init__(self, num_bytes, flags=0):
        super().__init__(b"\xff" * num_bytes)  # NaN


def block_of(x):
    while isinstance(x, np.ndarray):
        x = x.base
    return x


def is_pinned(x):
    return isinstance(block_of(x), PinnedMemory)


def _without_owner(x):
    """Return page-locked memory as a GPU knows it: that it is in use keeps nothing alive."""
    offset = x.ctypes.data - np.frombuffer(block_of(x), np.uint8).ctypes.data
    return np.ndarray(x.shape, x.dtype, block_of(x), offset) if x.size else x


class ndarray:  # noqa: N801
    """An array on a virtual GPU; ``memory`` holds what the queues have written so far."""

    def __init__(self, shape, dtype):
        self.device, self.shape, self.dtype = Device(), tuple(shape), np.dtype(dtype)
        self.memory = _array_in_pool(self, current_stream(), self.shape, self.dtype)

    def set(self, source):
        if not is_pinned(source):  # CUDA reads ordinary memory before the call returns
            current_stream().synchronize()
        source = _without_owner(source) if is_pinned(source) else source.copy()
        current_stream().put(lambda to=self.memory: np.copyto(to, source, casting="no"))

    def get(self, out, blocking):
        out = _without_owner(out) if is_pinned(out) else out
        current_stream().put(lambda of=self.memory: np.copyto(out, of, casting="no"))

    def copy(self):
        copied = ndarray(self.shape, self.dtype)
        current_stream().put(lambda of=self.memory, to=copied.memory: np.copyto(to, of))
        return copied


def _array_in_pool(owner, stream, shape, dtype):
    num_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    free = _free[stream, num_bytes]
    block = free.pop() if free else PinnedMemory(num_bytes)
    array = np.ndarray(shape, dtype, buffer=block)
    weakref.finalize(array if owner is None else owner, free.append, block)
    return array


def current_stream():
    return _streams[_devices[-1]][-1]


def free_all_blocks(stream=None):
    for (owner, _), blocks in _free.items():
        if owner is stream:
            blocks.clear()


def asarray(x, dtype=None):
    array = x if isinstance(x, ndarray) else ndarray(x.shape, dtype or x.dtype)
    if array is not x:
        array.set(np.asarray(x, array.dtype))
    return array


def asnumpy(x):
    current_stream().synchronize()
    return x.memory.copy()


ascontiguousarray, empty = ndarray.copy, ndarray
pool = SimpleNamespace(free_all_blocks=free_all_blocks, free_bytes=lambda: 0)
get_default_memory_pool = get_default_pinned_memory_pool = lambda: pool
runtime = SimpleNamespace(getDeviceCount=lambda: 2, hostAllocPortable=1, CUDARuntimeError=OSError)
cuda = SimpleNamespace(
    Device=Device, Stream=Stream, PinnedMemory=PinnedMemory, PinnedMemoryPointer=lambda memory, _: memory,
    get_current_stream=current_stream, runtime=runtime,
)  # fmt: skip
cupyx = SimpleNamespace(empty_pinned=lambda shape, dtype: _array_in_pool(None, None, shape, dtype))
