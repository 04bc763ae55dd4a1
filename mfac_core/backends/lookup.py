"""Finds devices by the names that users write, such as ``cuda:0``, and the device of an array."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

from mfac_core.backends.base import Array, Backend, Device, array_library
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.errors import DeviceError

__all__ = ["device_of", "resolve_device", "resolve_devices"]


def resolve_devices(devices: Sequence[str | Device] | str | Device) -> tuple[Device, ...]:
    """Return the devices with these names.

    Args:
        devices: Names such as ``["cpu"]`` or ``["cuda:0", "cuda:1"]``; devices are returned unchanged.

    Returns:
        One device per entry, in order.

    Raises:
        DeviceError: If the list is empty or names a device twice, or a device does not exist.

    Example:
        >>> [str(device) for device in resolve_devices(["cpu"])]
        ['cpu']
    """
    if isinstance(devices, str | Device):
        devices = (devices,)
    resolved = tuple(resolve_device(device) for device in devices)
    if not resolved:
        raise DeviceError('the list of devices is empty; write at least one, such as ["cpu"]')
    names = [device.name for device in resolved]
    if len(set(names)) != len(names):
        raise DeviceError(f"{names} names a device twice; list each device once")
    return resolved


def resolve_device(device: str | Device) -> Device:
    """Return the device with this name.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:N"``; a device is returned unchanged.

    Returns:
        The device.

    Raises:
        DeviceError: If the device does not exist; the message lists those that do, or names the extra to install.

    Example:
        >>> str(resolve_device("cpu"))
        'cpu'
    """
    if isinstance(device, Device):
        return device
    name = "cuda:0" if device == "cuda" else device
    if isinstance(name, str) and name.startswith("cuda:") and not _has_cupy():
        raise DeviceError(
            f'device {device!r} needs CuPy, which is not installed; pip install "mfac-core[cuda12]" (CUDA 12) '
            f'or "mfac-core[cuda13]" (CUDA 13), or use "cpu"'
        )
    known: list[str] = []
    for backend in _backends():
        if name in backend.devices():
            return Device(backend, name)
        known.extend(backend.devices())
    raise DeviceError(
        f"device {device!r} does not exist here; the devices are {', '.join(known)} "
        "(GPUs are written cuda:0, cuda:1, ...)"
    )


def device_of(x: Array) -> Device:
    """Return the device that holds an array.

    Args:
        x: A NumPy or CuPy array.

    Returns:
        Its device.

    Raises:
        TypeError: If ``x`` is an array of neither library.

    Example:
        >>> import numpy as np
        >>> str(device_of(np.zeros(2)))
        'cpu'
    """
    match array_library(x):
        case "numpy":
            return resolve_device("cpu")
        case "cupy":
            return resolve_device(f"cuda:{x.device.id}")
    raise TypeError(
        f"{type(x).__module__}.{type(x).__qualname__} is not a NumPy or CuPy array; convert it first, "
        "such as with numpy.asarray"
    )


@cache
def _backends() -> tuple[Backend, ...]:
    """Return one backend for each installed library; a further library is listed here."""
    if not _has_cupy():
        return (NumpyBackend(),)
    from mfac_core.backends.cupy_backend import CupyBackend

    return (NumpyBackend(), CupyBackend())


def _has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None
