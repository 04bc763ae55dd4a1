"""PyTorch as an array library of the core: tensors on the CPU, on GPUs, and on torch's other accelerators."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mfac_core.backends import Array
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_torch.full_precision import full_precision

__all__ = ["TorchBackend"]

_logger = logging.getLogger("mfac_torch")

_refusals = itertools.count()

_CAPABILITIES_WITH_64_LANES = ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0))

_TYPICAL_KILOHERTZ = 1.5e6
"""Clock of a GPU, for releases of torch that do not report it."""

_TYPICAL_SPEED = 5e12
"""Float32 operations per second of an accelerator whose lanes and clock torch does not report."""


class TorchBackend:
    """The backend of torch's devices; see :class:`mfac_core.backends.Backend` for the contract.

    CUDA, ROCm and XPU have streams, on which copies overlap with work. Apple's MPS has one queue and shares the memory
    of the host: copies are plain.

    Example:
        >>> TorchBackend().devices()[0]
        'cpu'
    """

    name = "torch"

    def devices(self) -> tuple[str, ...]:
        """Return ``cpu``, and ``cuda:0``, ``xpu:0`` and so on, or ``mps``."""
        if not torch.accelerator.is_available():
            return ("cpu",)
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        if accelerator.type == "mps":
            return ("cpu", "mps")
        return ("cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())))

    def device_of(self, x: torch.Tensor) -> str:
        """Return the name of the device that holds ``x``."""
        device = x.device
        return device.type if device.type in {"cpu", "mps"} else f"{device.type}:{device.index}"

    def asarray(self, x: Array, device: str, dtype: Any = None) -> torch.Tensor:
        """Return ``x`` on ``device``, detached from autograd; on the CPU it shares the memory of a NumPy array."""
        with self.on(device):
            tensor = x.detach() if isinstance(x, torch.Tensor) else _from_numpy(x)
            # converted first: not every device has float64
            tensor = tensor if dtype is None else tensor.to(_torch_dtype(dtype))
            return tensor if self.device_of(tensor) == device else tensor.to(device)

    def zeros(self, shape: tuple[int, ...], device: str, dtype: Any) -> torch.Tensor:
        """Return a new tensor of zeros on ``device``."""
        with self.on(device):
            return torch.zeros(shape, dtype=_torch_dtype(dtype), device=device)

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Return zeros in page-locked memory, from which copies to a GPU overlap with its work."""
        if not any(_with_streams(device) for device in self.devices()):
            return np.zeros(shape, dtype)
        zeros: npt.NDArray[Any] = _page_locked(shape, _torch_dtype(dtype)).zero_().numpy()
        return zeros

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return ``x`` in host memory; it shares the memory of a tensor on the CPU."""
        if not isinstance(x, torch.Tensor):
            return np.asarray(x)
        with self.on(self.device_of(x)):
            array: npt.NDArray[Any] = x.detach().cpu().numpy()
        return array

    def fetch(self, x: Array) -> Callable[[], npt.NDArray[Any]]:
        """Start a copy of ``x`` to host memory behind the work on its device; return a function that waits for it."""
        streams = _with_streams(self.device_of(x)) if isinstance(x, torch.Tensor) else None
        if streams is None:
            array = self.to_numpy(x)
            return lambda: array
        with self.on(self.device_of(x)):
            # torch does not reuse page-locked memory before the copy is done, nor that of `x`
            host = _page_locked(x.shape, x.dtype).copy_(x.detach(), non_blocking=True)
            copied = streams.current_stream().record_event()

        def wait() -> npt.NDArray[Any]:
            copied.synchronize()
            fetched: npt.NDArray[Any] = host.numpy()
            return fetched

        return wait

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        """Yield the arrays of each load on ``device``; while one item is worked on, the next is copied.

        Work on an item belongs on the stream that is current in this thread. Arrays that are already on the device are
        yielded themselves.

        Args:
            device: One of :meth:`devices`.
            loaders: Functions that return NumPy arrays, or tensors on any device; called in order, one item ahead.
        """
        streams = _with_streams(device)
        if streams is None:
            for load in loaders:
                yield [self.asarray(x, device) for x in load()]
            return
        with self.on(device):
            copies = _Copies(self, device, streams)
        ahead: tuple[list[torch.Tensor], Any] | None = None
        try:
            for load in loaders:
                with self.on(device):
                    started = copies.start(load)
                if ahead is not None:
                    yield from copies.lend(*ahead)
                ahead = started
            if ahead is not None:
                yield from copies.lend(*ahead)
        finally:
            # from now on the host may overwrite the sources, and new work the memory of the copies
            copies.queue.synchronize()

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        """Return a context in which torch computes on ``device``, in full precision and without recording gradients.

        Whatever the training loop has set, tensors are neither inference tensors nor rounded to half precision or TF32.
        """
        kind = torch.device(device).type
        streams = _with_streams(device)
        with ExitStack() as stack:
            if streams is not None:  # MPS is a single device, and the CPU has no context
                stack.enter_context(streams.device(device))
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(full_precision)
            yield

    @contextmanager
    def workers(self, device: str, tasks: int) -> Iterator[int]:
        """Allow one worker: a single queue keeps a GPU busy, and torch spreads each operation over the cores."""
        yield 1

    def speed(self, device: str) -> float:
        """Return the float32 operations per second that lanes and clock of a GPU allow, or a typical number."""
        kind = torch.device(device).type
        if kind == "cpu":
            # measured: NumPy takes about two thirds of the time on an idle machine, and far less on a busy one
            return NumpyBackend().speed("cpu") / 2
        if kind != "cuda":
            return _TYPICAL_SPEED
        properties = torch.cuda.get_device_properties(device)
        lanes = 64 if (properties.major, properties.minor) in _CAPABILITIES_WITH_64_LANES else 128
        hertz = 1e3 * getattr(properties, "clock_rate", _TYPICAL_KILOHERTZ)
        return 2.0 * properties.multi_processor_count * lanes * hertz  # one multiplication and addition per cycle

    def group_bytes(self, device: str, total: int) -> int:
        """Return about a sixteenth of a GPU's memory, at most 2 GiB, or less so that there are at least four groups.

        Copies overlap only with work on other groups. Less than 64 MiB would not keep a GPU busy. torch rounds
        page-locked memory up to a power of two, so groups are as large as one, or a little smaller.
        """
        memory = self._memory(device)
        if memory is None:
            return NumpyBackend().group_bytes("cpu", total)
        power_of_two = 1 << ((memory // 16).bit_length() - 1)
        return max(64 * 2**20, min(power_of_two, 2 * 2**30, total // 4))

    def free_bytes(self, device: str) -> int | None:
        """Return the free memory, including what torch's caching allocator holds and does not use."""
        host = NumpyBackend().free_bytes("cpu")
        kind = torch.device(device).type
        if kind == "cpu":
            return host
        if kind == "mps":
            free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
            return free if host is None else min(free, host)  # one memory for both
        module = torch.get_device_module(device)
        if not hasattr(module, "mem_get_info"):
            return None
        with self.on(device):
            return int(module.mem_get_info()[0] + module.memory_reserved() - module.memory_allocated())

    def synchronize(self, device: str) -> None:
        """Wait for all streams of ``device``: those of other threads, and of the training loop, too."""
        if torch.device(device).type == "cpu":
            return
        with self.on(device):
            torch.get_device_module(device).synchronize()

    def _memory(self, device: str) -> int | None:
        """Return the total memory of a device in bytes; None for the CPU, and where torch does not report it."""
        kind = torch.device(device).type
        if kind == "mps":
            return torch.mps.recommended_max_memory()
        module = torch.get_device_module(device)
        if not hasattr(module, "get_device_properties"):
            return None
        return int(module.get_device_properties(device).total_memory)


class _Copies:
    """Copies to one device on a stream of their own, in order with the work of the thread that makes this object.

    The memory of a copy is allocated on the stream of the work, so torch may hand out memory that work in its queue
    still reads: each copy waits for the work queued before it, and the work on an item waits for its copy. Memory that
    is freed after that goes back to the stream of the work, as any other.
    """

    def __init__(self, backend: TorchBackend, device: str, streams: Any) -> None:
        self.queue = streams.Stream()
        self._backend = backend
        self._device = device
        self._streams = streams
        self._work = streams.current_stream()
        self._in_progress: deque[Any] = deque()
        self._waited_for: set[str] = set()
        self._wait_for_writers(device)

    def start(self, load: Callable[[], list[Array]]) -> tuple[list[torch.Tensor], Any]:
        """Start the copies of a load; return its arrays, and the event that its copies are done."""
        # two loads at most, so that the host does not run ahead and take page-locked memory for all of them
        while len(self._in_progress) > 1:
            self._in_progress.popleft().synchronize()
        sources = [x if isinstance(x, torch.Tensor) else _in_page_locked_memory(x) for x in load()]
        arrays = [self._target_of(source) for source in sources]
        self.queue.wait_event(self._work.record_event())
        with self._streams.stream(self.queue):
            for array, source in zip(arrays, sources, strict=True):
                if array is not source:
                    array.copy_(source, non_blocking=True)  # torch keeps page-locked sources until this is done
        copied = self.queue.record_event()
        self._in_progress.append(copied)
        return arrays, copied

    def lend(self, arrays: list[torch.Tensor], copied: Any) -> Iterator[list[torch.Tensor]]:
        """Yield the arrays of a load, to be worked on after their copies."""
        self._work.wait_event(copied)
        yield arrays
        arrays.clear()  # the caller may still hold the list, and the next load takes the memory

    def _target_of(self, source: torch.Tensor) -> torch.Tensor:
        """Return memory for a copy, or the source itself if it is on the device."""
        there = self._backend.device_of(source)
        if there == self._device:
            return source
        if there != "cpu":
            self._wait_for_writers(there)
        return torch.empty(source.shape, dtype=source.dtype, device=self._device)

    def _wait_for_writers(self, device: str) -> None:
        # another thread may have written to tensors there, on a stream of its own
        if device not in self._waited_for:
            self._waited_for.add(device)
            self._backend.synchronize(device)


def _with_streams(device: str) -> Any:
    """Return torch's module for the kind of a device, such as ``torch.cuda``, if it has streams; else None."""
    kind = torch.device(device).type
    module = torch.get_device_module(kind)
    return module if kind not in {"cpu", "mps"} and hasattr(module, "Stream") else None


def _from_numpy(x: Array) -> torch.Tensor:
    # tensors cannot have negative strides, and torch warns of arrays that are read-only
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


def _in_page_locked_memory(x: npt.NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor from which copies overlap with work: itself, or a copy that has no gaps."""
    if x.flags.c_contiguous and x.flags.writeable:
        tensor = torch.from_numpy(x)
        if tensor.is_pinned():
            return tensor
    host = _page_locked(x.shape, _torch_dtype(x.dtype))
    np.copyto(host.numpy(), x)
    return host


def _page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialized page-locked memory, or ordinary memory where it is refused."""
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if next(_refusals) == 0:
            _logger.warning(
                "page-locked host memory is refused (%s): ordinary memory is used, and copies to and from the GPU are "
                "slower",
                str(error).partition("\n")[0],
            )
        return torch.empty(shape, dtype=dtype, device="cpu")


@cache
def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
