"""Where arrays live: the backend contract, its implementations, and the choice of devices by name."""

from mfac_core.backends.base import Array, Backend, Device, array_library, array_namespace, check_float, numpy_dtype
from mfac_core.backends.lookup import device_of, load_backends, readable_on, register, resolve_device, resolve_devices

__all__ = [
    "Array",
    "Backend",
    "Device",
    "array_library",
    "array_namespace",
    "check_float",
    "device_of",
    "load_backends",
    "numpy_dtype",
    "readable_on",
    "register",
    "resolve_device",
    "resolve_devices",
]
