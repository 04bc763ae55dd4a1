"""The contract of an array backend: it handles where arrays live, never what is computed.

To add an array library, implement :class:`Backend`, for which ``numpy_backend.py`` is the shortest example, and pass it
to :func:`mfac_core.backends.register`. The section "Adding an array library" of ``docs/design.md`` names every step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import array_api_compat
import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Backend", "Device", "array_library", "array_namespace", "check_float", "numpy_dtype"]

Array = Any
"""An array of NumPy, or of any library that ``array_api_compat`` knows and that has a :class:`Backend`."""


class Backend(Protocol):
    """Places arrays on the devices of one array library.

    ``device`` is always one of the names that :meth:`devices` returns. The arrays that a backend returns are detached
    from automatic differentiation.

    Attributes:
        name: The library, as :func:`array_library` names it.

    Example:
        >>> from mfac_core.backends import resolve_device
        >>> resolve_device("cpu").backend.devices()
        ('cpu',)
    """

    name: str

    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices that exist, such as ``("cuda:0", "cuda:1")``."""

    def device_of(self, x: Array) -> str:
        """Return the name of the device that holds ``x``, an array of this library."""

    def asarray(self, x: Array, device: str, dtype: Any = None) -> Array:
        """Return ``x``, an array of this library or of NumPy, on ``device``; no copy if none is needed.

        ``dtype`` is a NumPy dtype, here and in the other methods.
        """

    def zeros(self, shape: tuple[int, ...], device: str, dtype: Any) -> Array:
        """Return a new array of zeros on ``device``."""

    def host_zeros(self, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """Return zeros in the kind of host memory from which copies to the devices are fastest."""

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return ``x`` in host memory; no copy if none is needed."""

    def fetch(self, x: Array) -> Callable[[], npt.NDArray[Any]]:
        """Start a copy of ``x`` to host memory, and return a function that waits for it and returns it."""

    def stream(self, device: str, loaders: Iterable[Callable[[], list[Array]]]) -> Generator[list[Array]]:
        """Yield the arrays of each load on ``device``, and copy those of the next load meanwhile.

        The arrays are valid until the next item is requested.
        """

    def on(self, device: str) -> AbstractContextManager[Any]:
        """Return a context in which this thread's work runs on ``device``, without automatic differentiation."""

    def workers(self, device: str, tasks: int) -> AbstractContextManager[int]:
        """Return a context whose value is the number of threads that should work on ``tasks`` at the same time.

        Within the context these threads do not oversubscribe the cores.
        """

    def speed(self, device: str) -> float:
        """Return the estimated float32 operations per second, the same at every call."""

    def group_bytes(self, device: str, total: int) -> int:
        """Return how many bytes of gradients one kernel call should work on, of ``total`` bytes in all."""

    def free_bytes(self, device: str) -> int | None:
        """Return the free memory of ``device`` in bytes, or ``None`` if it is unknown."""

    def synchronize(self, device: str) -> None:
        """Wait until ``device`` has finished all queued work."""


@dataclass(frozen=True)
class Device:
    """One device together with the backend that drives it.

    Args:
        backend: The backend that places arrays there.
        name: One of ``backend.devices()``.

    Example:
        >>> from mfac_core.backends import resolve_device
        >>> device = resolve_device("cpu")
        >>> device.is_host, device.zeros((2,), np.float32)
        (True, array([0., 0.], dtype=float32))
    """

    backend: Backend
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def is_host(self) -> bool:
        """Whether arrays of this device are NumPy arrays in host memory."""
        return self.backend.name == "numpy"

    def asarray(self, x: Array, dtype: Any = None) -> Array:
        """Return an array on this device; no copy if none is needed.

        Args:
            x: An array of the backend's library, or a NumPy array.
            dtype: NumPy dtype of the result; ``None`` keeps that of ``x``.

        Returns:
            The array.
        """
        return self.backend.asarray(x, self.name, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array of zeros on this device.

        Args:
            shape: Its shape.
            dtype: Its NumPy dtype.

        Returns:
            The array.
        """
        return self.backend.zeros(shape, self.name, dtype)

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return an array in host memory; no copy if none is needed.

        Args:
            x: An array on this device.

        Returns:
            A NumPy array.
        """
        return self.backend.to_numpy(x)

    def move(self, x: Array, to: Device) -> Array:
        """Return an array on another device, ready for use there; no copy if none is needed.

        Args:
            x: An array on this device.
            to: The other device.

        Returns:
            The array on the other device.
        """
        if self == to:
            return x
        if self.backend is not to.backend:
            return to.asarray(self.to_numpy(x))
        # the queues of the two devices are not ordered: wait for the array, and then for its copy
        self.backend.synchronize(self.name)
        moved = to.asarray(x)
        to.backend.synchronize(to.name)
        return moved


def array_library(x: Array) -> str:
    """Return the name of an array's library; code that treats libraries differently uses only this.

    Args:
        x: An array of any library; subclasses, such as parameters of a model, are arrays too.

    Returns:
        The name of the top-level package, such as ``numpy`` or ``cupy``.

    Raises:
        TypeError: If ``x`` is no array.

    Example:
        >>> array_library(np.zeros(2))
        'numpy'
    """
    name: str = array_namespace(x).__name__
    return name.removeprefix("array_api_compat.").partition(".")[0]


def array_namespace(x: Array) -> Any:
    """Return the module whose functions work on an array.

    Args:
        x: An array of any library that ``array_api_compat`` knows, or that follows the array API standard.

    Returns:
        ``numpy``, or a namespace of the array API standard.

    Raises:
        TypeError: If ``x`` is no array.

    Example:
        >>> array_namespace(np.zeros(2)).__name__
        'numpy'
    """
    if isinstance(x, np.ndarray | np.generic):
        return np  # NumPy follows the standard itself, and a wrapper would only cost time
    try:
        return array_api_compat.array_namespace(x)
    except TypeError:
        raise TypeError(
            f"{type(x).__module__}.{type(x).__qualname__} is not an array; convert it first, such as with numpy.asarray"
        ) from None


def numpy_dtype(x: Array) -> np.dtype[Any]:
    """Return the dtype of an array as a NumPy dtype.

    Args:
        x: An array of any library.

    Returns:
        The NumPy dtype of the same name.

    Raises:
        TypeError: If NumPy has no such dtype.

    Example:
        >>> import array_api_strict
        >>> numpy_dtype(array_api_strict.zeros(2))
        dtype('float64')
    """
    return x.dtype if isinstance(x.dtype, np.dtype) else np.dtype(str(x.dtype).rpartition(".")[2])


def check_float(name: str, x: Array) -> None:
    """Raise an error if an array is neither float32 nor float64.

    Args:
        name: Name of the array in the message.
        x: The array.

    Raises:
        ValueError: If the dtype is another one.

    Example:
        >>> check_float("gradients", np.zeros(2, np.int64))
        Traceback (most recent call last):
        ValueError: gradients must be float32 or float64, got int64; convert them first, such as with astype("float32")
    """
    xp = array_namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        # libraries differ in the name of the method
        cure = f"to({xp.float32})" if hasattr(x, "to") else 'astype("float32")'
        raise ValueError(f"{name} must be float32 or float64, got {x.dtype}; convert them first, such as with {cure}")
