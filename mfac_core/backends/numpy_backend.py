"""Arrays in host memory, computed by NumPy on all cores that this process may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends.base import Array
from mfac_core.backends.threads import spare_threads

__all__ = ["NumpyBackend"]

GROUP_BYTES = 16 * 2**20

_logger = logging.getLogger("mfac_core")


class NumpyBackend:
    """The backend of the device ``cpu``; see :class:`mfac_core.backends.base.Backend` for the contract."""

    name = "numpy"

    def devices(self) -> tuple[str, ...]:
        """Return ``("cpu",)``."""
        return ("cpu",)

    def device_of(self, x: Array) -> str:
        """Return ``cpu``."""
        return "cpu"

    def asarray(self, x: Array, device: str, dtype: Any = None) -> npt.NDArray[Any]:
        """Return ``x`` as a NumPy array."""
        return np.asarray(x, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], device: str, dtype: Any) -> npt.NDArray[Any]:
        """Return a new array of zeros; its memory is allocated when it is first written."""
        return np.zeros(shape, dtype)

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Return a new array of zeros; its memory is allocated when it is first written."""
        return np.zeros(shape, dtype)

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return ``x`` itself."""
        return np.asarray(x)

    def fetch(self, x: Array) -> Callable[[], npt.NDArray[Any]]:
        """Return a function that returns ``x`` itself."""
        return lambda: np.asarray(x)

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        """Yield the arrays of each load, which need no copy."""
        for load in loaders:
            yield [np.asarray(x) for x in load()]

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Return a context that changes nothing."""
        return nullcontext()

    @contextmanager
    def workers(self, device: str, tasks: int) -> Iterator[int]:
        """Allow as many workers as there are cores or tasks, each with its share of the cores for BLAS.

        Many small tasks run best side by side. A single task gets spare threads to spread its columns over the cores.
        """
        workers = min(tasks, _cores())
        limits = _thread_limits()
        if limits is None:
            yield 1
        elif workers < 2:
            with limits(limits=1, user_api="blas"), spare_threads(_cores()):
                yield 1
        else:
            with limits(limits=_cores() // workers, user_api="blas"):
                yield workers

    def speed(self, device: str) -> float:
        """Return the rate of all cores at two AVX2 multiply-adds per cycle and 2.5 GHz."""
        return _cores() * 32 * 2.5e9  # 2 instructions x 8 numbers x 2 operations per cycle

    def group_bytes(self, device: str, total: int) -> int:
        """Return 16 MiB, or less so that each core gets at least four groups."""
        return max(1, min(GROUP_BYTES, total // (4 * _cores())))

    def free_bytes(self, device: str) -> int | None:
        """Return the memory that this process may still allocate, of the system and of its control group."""
        left = [value for value in (_system_free_bytes(), _control_group_free_bytes()) if value is not None]
        return min(left, default=None)

    def synchronize(self, device: str) -> None:
        """Do nothing: calls return when their work is done."""


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _thread_limits() -> Any:
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        _logger.warning("threadpoolctl is not installed: blocks are computed one after another, on the threads of BLAS")
        return None
    return threadpool_limits


@cache
def _psutil() -> Any:
    try:
        import psutil
    except ImportError:
        _logger.warning("psutil is not installed: free memory is unknown, so it is not checked before a run")
        return None
    return psutil


def _system_free_bytes() -> int | None:
    psutil = _psutil()
    return None if psutil is None else int(psutil.virtual_memory().available)


def _control_group_free_bytes() -> int | None:
    # the limit of a container is often below the memory of the machine, and exceeding it kills the process
    root = Path("/sys/fs/cgroup")
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return max(limit - used, 0)
