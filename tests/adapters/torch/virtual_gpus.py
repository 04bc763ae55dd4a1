"""A torch backend whose GPUs are tensors in host memory: it stands in for a machine with two GPUs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mfac_core.backends import Array
from mfac_torch.array_backend import TorchBackend


class OnSecondGpu(torch.Tensor):
    """A tensor on ``cuda:1``; plain tensors are on ``cuda:0``. Like real GPUs, the two refuse to compute together."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not all(isinstance(x, OnSecondGpu) for x in tensors):
            raise RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cuda:1")
        return super().__torch_function__(func, types, args, kwargs or {})


class VirtualGpus(TorchBackend):
    """The backend of ``cuda:0`` and ``cuda:1``, which do not exist.

    Attributes:
        to_host: Shape of each tensor that was copied to host memory.
        to_gpus: Device and shape of each NumPy array that was copied to a GPU.
    """

    def __init__(self) -> None:
        self.to_host: list[tuple[int, ...]] = []
        self.to_gpus: list[tuple[str, tuple[int, ...]]] = []

    def devices(self) -> tuple[str, ...]:
        return ("cpu", "cuda:0", "cuda:1")

    def device_of(self, x: torch.Tensor) -> str:
        return "cuda:1" if isinstance(x, OnSecondGpu) else "cuda:0"

    def asarray(self, x: Array, device: str, dtype: Any = None) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            tensor = super().asarray(x, self.device_of(x), dtype)
            return tensor if self.device_of(tensor) == device else self._placed(_plain(tensor).clone(), device)
        self.to_gpus.append((device, x.shape))
        return self._placed(torch.from_numpy(np.array(x, dtype, order="C")), device)

    def zeros(self, shape: tuple[int, ...], device: str, dtype: Any) -> torch.Tensor:
        return self._placed(super().zeros(shape, "cpu", dtype), device)

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        if isinstance(x, np.ndarray):
            return x
        self.to_host.append(tuple(x.shape))
        return _plain(x.detach()).numpy().copy()

    def fetch(self, x: Array) -> Callable[[], npt.NDArray[Any]]:
        array = self.to_numpy(x)
        return lambda: array

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        for load in loaders:
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
        pass

    def _placed(self, tensor: torch.Tensor, device: str) -> torch.Tensor:
        return tensor.as_subclass(OnSecondGpu) if device == "cuda:1" else tensor


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)
