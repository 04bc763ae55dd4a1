"""A torch backend whose GPUs are tensors in host memory: it stands in for a machine with two GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfac_core.backends import Array
from mfac_torch.array_backend import TorchBackend


class OnGpu(torch.Tensor):
    """A tensor that the backend has placed on a GPU. Like those of real GPUs, tensors of both do not mix."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if {OnFirstGpu, OnSecondGpu} <= set(types):
            raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cuda:1")
        return super().__torch_function__(func, types, args, kwargs or {})


class OnFirstGpu(OnGpu):
    """A tensor on ``cuda:0``, where those of a model are, too."""


class OnSecondGpu(OnGpu):
    """A tensor on ``cuda:1``."""


class VirtualGpus(TorchBackend):
    """The backend of ``cuda:0`` and ``cuda:1``, which do not exist.

    Attributes:
        to_host: dtype and size of each tensor that was copied to host memory.
        to_gpus: dtype and size of each NumPy array that was copied to a GPU.
        worked: The names of the GPUs that have read groups of blocks.
        waited: The thread and the device of each wait, in order.
    """

    def __init__(self) -> None:
        self.to_host: list[tuple[np.dtype[Any], int]] = []
        self.to_gpus: list[tuple[np.dtype[Any], int]] = []
        self.worked: set[str] = set()
        self.waited: list[tuple[threading.Thread, str]] = []

    def devices(self) -> tuple[str, ...]:
        return ("cpu", "cuda:0", "cuda:1")

    def device_of(self, x: torch.Tensor) -> str:
        return "cuda:1" if isinstance(x, OnSecondGpu) else "cuda:0"

    def asarray(self, x: Array, device: str, dtype: Any = None) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            tensor = super().asarray(x, self.device_of(x), dtype)
            return tensor if self.device_of(tensor) == device else _placed(_plain(tensor).clone(), device)
        array = np.array(x, dtype, order="C")
        self.to_gpus.append((array.dtype, array.size))
        return _placed(torch.from_numpy(array).clone(), device)

    def zeros(self, shape: tuple[int, ...], device: str, dtype: Any) -> torch.Tensor:
        return _placed(super().zeros(shape, "cpu", dtype), device)

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        if isinstance(x, np.ndarray):
            return x
        array = _plain(x.detach()).numpy().copy()
        self.to_host.append((array.dtype, array.size))
        return array

    def fetch(self, x: Array) -> Callable[[], npt.NDArray[Any]]:
        array = self.to_numpy(x)
        return lambda: array

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        for load in loaders:
            self.worked.add(device)
            yield [self.asarray(x, device) for x in load()]

    def on(self, device: str) -> AbstractContextManager[None]:
        return super().on("cpu")

    def speed(self, device: str) -> float:
        return 1.0

    def group_bytes(self, device: str, total: int) -> int:
        return 2**16

    def free_bytes(self, device: str) -> int | None:
        return super().free_bytes("cpu")

    def synchronize(self, device: str) -> None:
        self.waited.append((threading.current_thread(), device))


class NoFloat64(TorchDispatchMode):
    """A device like Apple's: an operation whose result is float64 is refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


def _placed(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.as_subclass(OnSecondGpu if device == "cuda:1" else OnFirstGpu)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)
