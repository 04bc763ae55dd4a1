"""Arrays on NVIDIA GPUs, computed by CuPy. The only module that imports CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from mfac_core.backends.base import Array

__all__ = ["CupyBackend"]


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

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return a copy of ``x`` in host memory."""
        if not isinstance(x, cupy.ndarray):
            return np.asarray(x)
        with x.device:
            host: npt.NDArray[Any] = cupy.asnumpy(x)
            return host

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Return CuPy's device context; CuPy computes where the current device is."""
        context: AbstractContextManager[Any] = cupy.cuda.Device(_index(device))
        return context

    @contextmanager
    def workers(self, device: str, tasks: int) -> Iterator[int]:
        """Give one worker: a GPU runs one queue at full speed."""
        yield 1

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


def _index(device: str) -> int:
    return int(device.partition(":")[2])
