"""Registered libraries, devices by the names that users write, such as ``cuda:0``, and the device of an array."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import NoReturn

from mfac_core.backends.base import Array, Backend, Device, array_library
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.errors import DeviceError

__all__ = ["device_of", "load_backends", "readable_on", "register", "resolve_device", "resolve_devices"]

ENTRY_POINTS = "mfac_core.backends"
"""Group of the entry points that name, for each array library, the package whose import registers a backend."""

_BUILT_IN = ("numpy", "cupy")

_CUPY_CURE = (
    'NumPy arrays and Keras models need CuPy on a GPU: pip install "mfac-core[cuda12]" (CUDA 12) or '
    '"mfac-core[cuda13]" (CUDA 13)'
)

_NUMPY = NumpyBackend()

_registered: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Make the arrays and devices of a further library known wherever arrays and device names are accepted.

    A package that calls this function when it is imported can declare an entry point in the group
    ``mfac_core.backends``, with the name of the library. Then it need not be imported by users: it is imported when the
    first array of the library arrives, or a device name that begins with the library.

    Args:
        backend: The backend; its ``name`` is the library as :func:`array_library` names it. A second one for the same
            library replaces the first.

    Raises:
        ValueError: If the library is NumPy or CuPy, whose backends are built in.

    Example:
        >>> from mfac_core.backends.numpy_backend import NumpyBackend
        >>> class OtherBackend(NumpyBackend):
        ...     name = "otherlib"
        ...
        ...     def devices(self):
        ...         return ("npu:0",)
        >>> register(OtherBackend())
        >>> str(resolve_device("npu:0")), str(resolve_device("otherlib:npu"))
        ('npu:0', 'npu:0')
    """
    if backend.name in _BUILT_IN:
        raise ValueError(f"the backend for {backend.name} arrays is built in; register one for another library")
    _registered[backend.name] = backend


def resolve_devices(devices: Sequence[str | Device] | str | Device, library: str | None = None) -> tuple[Device, ...]:
    """Return the devices with these names.

    Args:
        devices: Names such as ``["cpu"]`` or ``["cuda:0", "cuda:1"]``, or one name; a :class:`Device` is returned
            unchanged.
        library: As in :func:`resolve_device`.

    Returns:
        One device per entry, in order.

    Raises:
        DeviceError: If the list is empty or names a device twice, in any spelling, or a device does not exist.

    Example:
        >>> [str(device) for device in resolve_devices(["cpu"])]
        ['cpu']
    """
    if isinstance(devices, str | Device):
        devices = (devices,)
    resolved = tuple(resolve_device(device, library) for device in devices)
    if not resolved:
        raise DeviceError('the list of devices is empty; write at least one, such as ["cpu"]')
    names = [device.name for device in resolved]
    if len(set(names)) != len(names):
        raise DeviceError(f"{list(map(str, devices))} names a device twice; list each device once")
    return resolved


def resolve_device(device: str | Device, library: str | None = None) -> Device:
    """Return the device with this name.

    A plain name, such as ``"cuda:0"``, is looked up in ``library`` first, then in NumPy, CuPy and the registered
    libraries, in this order. ``"cpu"`` always means NumPy, which is the fastest on a CPU. A name that begins with a
    library, such as ``"cupy:cuda:0"``, means the device of that library.

    Args:
        device: ``"cpu"``, ``"cuda:1"``, ``"cupy:cuda:1"``, ...; without a number, the first device of its kind. A
            :class:`Device` is returned unchanged.
        library: The library that brought the weights, as :func:`array_library` names it.

    Returns:
        The device.

    Raises:
        DeviceError: If the device does not exist. The message lists those that do, or names what to install.

    Example:
        >>> resolve_device("cpu").backend.name, resolve_device("numpy:cpu").backend.name
        ('numpy', 'numpy')
    """
    if isinstance(device, Device):
        return device
    first, _, rest = str(device).partition(":")
    own = _backend_of(first) if rest else None
    if own is not None:
        return _named(rest, [own]) or _refuse(device, [own])
    if rest and (first == "cupy" or entry_points(group=ENTRY_POINTS, name=first)):
        cure = _CUPY_CURE if first == "cupy" else f"pip install {first}, or use another device"
        raise DeviceError(f"device {device!r} needs {first}, which is not installed; {cure}")
    of_weights = [] if device == "cpu" or library is None else [library]
    found = [_backend_of(each) for each in (*of_weights, *_BUILT_IN, *_registered)]
    backends = [backend for backend in found if backend is not None]
    needs_cupy = library in {None, *_BUILT_IN} and str(device).startswith("cuda") and not _has_cupy()
    return _named(device, backends) or _refuse(device, backends, _CUPY_CURE if needs_cupy else "")


def device_of(x: Array) -> Device:
    """Return the device that holds an array.

    Args:
        x: An array of NumPy, CuPy or a registered library.

    Returns:
        Its device.

    Raises:
        TypeError: If ``x`` is no array, or of another library.

    Example:
        >>> import numpy as np
        >>> str(device_of(np.zeros(2)))
        'cpu'
    """
    library = array_library(x)
    backend = _backend_of(library)
    if backend is None:
        raise TypeError(
            f"{type(x).__module__}.{type(x).__qualname__} is an array of {library}, for which no backend is "
            "registered; convert it first, such as with numpy.asarray"
        )
    return Device(backend, backend.device_of(x))


def readable_on(device: Device, x: Array) -> Array:
    """Return an array in a form that the backend of a device can read.

    Args:
        device: The device.
        x: An array of any library, on any device.

    Returns:
        ``x`` itself if it is a NumPy array or of the device's library, else a NumPy array; no copy if none is needed.

    Raises:
        TypeError: As in :func:`device_of`.

    Example:
        >>> import numpy as np
        >>> readable_on(resolve_device("cpu"), np.zeros(2))
        array([0., 0.])
    """
    return x if array_library(x) in {"numpy", device.backend.name} else device_of(x).to_numpy(x)


def load_backends() -> None:
    """Import every installed package that registers a backend, so that all devices of this machine can be found.

    Example:
        >>> load_backends()
        >>> str(resolve_device("cpu"))
        'cpu'
    """
    for name in {entry.name for entry in entry_points(group=ENTRY_POINTS)}:
        _backend_of(name)


def _backend_of(library: str) -> Backend | None:
    """Return the backend of a library, or ``None`` if there is none or the library is not installed."""
    if library == "numpy":
        return _NUMPY
    if library == "cupy":
        return _cupy_backend() if _has_cupy() else None
    if library not in _registered:
        _import_package_for(library)
    return _registered.get(library)


@cache
def _import_package_for(library: str) -> None:
    for entry in entry_points(group=ENTRY_POINTS, name=library):
        try:
            entry.load()
        except ModuleNotFoundError as error:
            if error.name != library:
                raise


@cache
def _cupy_backend() -> Backend:
    from mfac_core.backends.cupy_backend import CupyBackend

    return CupyBackend()


def _has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


def _named(name: str, backends: Sequence[Backend]) -> Device | None:
    """Return the first device with this name; a name without a number means the first of its kind."""
    for backend in backends:
        for full in (name, f"{name}:0"):
            if full in backend.devices():
                return Device(backend, full)
    return None


def _refuse(device: str, backends: Sequence[Backend], cure: str = "") -> NoReturn:
    listed = [
        name if backend.name == "numpy" else f"{backend.name}:{name}"
        for backend in dict.fromkeys(backends)
        for name in backend.devices()
    ]
    devices = ", ".join(listed) or "none"
    raise DeviceError(f"device {device!r} does not exist here; the devices are {devices}{f'; {cure}' if cure else ''}")
