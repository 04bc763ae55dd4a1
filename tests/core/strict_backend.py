"""A backend of several virtual devices that refuse silent transfers: it stands in for a machine with several GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import array_api_strict as xp
import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device

NAMES = ("CPU_DEVICE", "device1", "device2")


class StrictBackend:
    """Arrays of ``array_api_strict`` on its virtual devices.

    Args:
        free_bytes: Free memory to report for every device; None for "not known".
        group_bytes: Gradients that one kernel call works on; the least makes every block a group.
        speeds: Speed of each device by name; 1 for those that are not named.

    Attributes:
        uploads: Device name and shape of each array that was brought there from another place.
    """

    name = "array_api_strict"

    def __init__(
        self, free_bytes: int | None = None, group_bytes: int = 1, speeds: dict[str, float] | None = None
    ) -> None:
        self.uploads: list[tuple[str, tuple[int, ...]]] = []
        self._free_bytes = free_bytes
        self._group_bytes = group_bytes
        self._speeds = speeds or {}
        self._lock = threading.Lock()

    def devices(self) -> tuple[str, ...]:
        return NAMES

    def device_of(self, x: Array) -> str:
        return str(x.device).split("'")[1]

    def asarray(self, x: Array, device: str, dtype: Any = None) -> Array:
        target = xp.Device(device)
        if not hasattr(x, "__array_namespace__") or isinstance(x, np.ndarray | np.generic):
            with self._lock:
                self.uploads.append((device, np.shape(x)))
            x = xp.asarray(np.asarray(x), device=target, copy=True)
        elif x.device != target:
            with self._lock:
                self.uploads.append((device, x.shape))
            x = x.to_device(target)
        return x if dtype is None else xp.astype(x, _strict_dtype(dtype), copy=False)

    def zeros(self, shape: tuple[int, ...], device: str, dtype: Any) -> Array:
        return xp.zeros(shape, dtype=_strict_dtype(dtype), device=xp.Device(device))

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        if isinstance(x, np.ndarray | np.generic):
            return np.asarray(x)
        return np.array(x.to_device(xp.Device("CPU_DEVICE")))

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        return np.zeros(shape, dtype)

    def fetch(self, x: Array) -> Callable[[], npt.NDArray[Any]]:
        return lambda: self.to_numpy(x)

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        for load in loaders:
            yield [self.asarray(x, device) for x in load()]

    def speed(self, device: str) -> float:
        return self._speeds.get(device, 1.0)

    def group_bytes(self, device: str, total: int) -> int:
        return self._group_bytes

    def on(self, device: str) -> AbstractContextManager[Any]:
        return nullcontext(xp.Device(device))

    @contextmanager
    def workers(self, device: str, tasks: int) -> Iterator[int]:
        yield 1

    def free_bytes(self, device: str) -> int | None:
        return self._free_bytes

    def synchronize(self, device: str) -> None:
        pass


def strict_devices(count: int, backend: StrictBackend | None = None) -> tuple[Device, ...]:
    """Return the first ``count`` virtual devices, driven by one backend."""
    shared = backend or StrictBackend()
    return tuple(Device(shared, name) for name in NAMES[:count])


def _strict_dtype(dtype: Any) -> Any:
    assert not isinstance(dtype, type(xp.float32)), "the contract of a backend names NumPy dtypes"
    return getattr(xp, np.dtype(dtype).name)
