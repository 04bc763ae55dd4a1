"""What the torch backend uses of ``torch.cuda``, on the CPU.

Memory of the GPU that is freed is handed out again at once to the same stream, as by torch's caching allocator. So a
copy that is not ordered with the work, or memory that is given back too early, shows as wrong numbers.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import contextmanager

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mfac_torch.array_backend import TorchBackend
from tests.late_queue import LateQueue

GPU = "cuda:0"


class Stream(LateQueue):
    record_event = LateQueue.record

    def _run(self, until):
        with torch._C.DisableTorchFunction():
            super()._run(until)


class Streams(TorchFunctionMode):
    """A GPU with streams; a context in which torch allocates and copies there.

    Args:
        eager: Whether copies on side streams run as early as they may.
        pins: Whether host memory may be page-locked.
    """

    def __init__(self, *, eager=False, pins=True):
        super().__init__()
        self._eager, self._pins = eager, pins
        self._current = [Stream()]
        self._free = defaultdict(list)
        self.blocks = {}  # of the GPU, by address
        self._pinned = weakref.WeakValueDictionary()
        self.most_pinned = 0  # tensors at a time

    def Stream(self):  # noqa: N802
        return Stream(eager=self._eager)

    def current_stream(self):
        return self._current[-1]

    @contextmanager
    def stream(self, stream):
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def is_here(self, x):
        return x.data_ptr() in self.blocks

    def put(self, work, *tensors):
        """Queue work on tensors of the GPU, which keeps none of them alive."""
        raw = [self._raw(x) for x in tensors]
        self.current_stream().put(lambda: work(*raw))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") == GPU:
            return self._allocate(*args, kwargs["dtype"])
        if func is torch.empty and kwargs.get("pin_memory"):
            if not self._pins:
                raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")
            x = torch.empty(*args, dtype=kwargs["dtype"])
            memory = np.empty(max(x.nbytes, 1), np.uint8)  # lives as long as a tensor or an array of it
            x = torch.from_numpy(memory[: x.nbytes]).view(x.dtype).view(x.shape)
            self._pinned[x.data_ptr()] = memory
            self.most_pinned = max(self.most_pinned, len(self._pinned))
            return x
        if func is torch.Tensor.is_pinned:
            return self._is_pinned(args[0])
        if func is torch.Tensor.copy_ and any(self.is_here(x) for x in args[:2]):
            return self._copy(*args)
        return func(*args, **kwargs)

    def _allocate(self, shape, dtype):
        num_bytes = max(torch.Size(shape).numel() * dtype.itemsize, 1)
        free = self._free[self.current_stream(), num_bytes]
        block = free.pop() if free else torch.full((num_bytes,), 255, dtype=torch.uint8)
        self.blocks[block.data_ptr()] = block
        x = block.view(dtype).view(shape)
        weakref.finalize(x, free.append, block)
        return x

    def _copy(self, to, source):
        assert source.is_contiguous()  # torch would make a copy in ordinary memory first
        if not (self.is_here(source) or self._is_pinned(source)):  # ordinary memory is read before the call returns
            self.current_stream().synchronize()
            source = source.clone()
        target, source = (self._raw(x) if self.is_here(x) else x for x in (to, source))
        self.current_stream().put(lambda: target.copy_(source))
        return to

    def _is_pinned(self, x):
        return x.data_ptr() in self._pinned

    def _raw(self, x):
        """Return a tensor as a GPU knows it: that it is in use keeps nothing alive."""
        return self.blocks[x.data_ptr()].view(x.dtype).view(x.shape)


class BackendOfStreams(TorchBackend):
    """The torch backend on such a GPU."""

    def __init__(self, streams):
        self._streams = streams

    def devices(self):
        return ("cpu", GPU)

    def device_of(self, x):
        return GPU if self._streams.is_here(x) else "cpu"

    def on(self, device):
        return super().on("cpu")

    def synchronize(self, device):
        self._streams.current_stream().synchronize()
