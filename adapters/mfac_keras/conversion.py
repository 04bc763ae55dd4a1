"""Tensors on a GPU to arrays of the core, on the same GPU if CuPy is installed."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import keras
import numpy as np

from mfac_core.backends import Array, Device, resolve_device
from mfac_core.errors import DeviceError

__all__ = ["gpu_array"]

_logger = logging.getLogger("mfac_keras")


def gpu_array(tensor: Any, index: int, *, on_default_stream: bool) -> Array:
    """Return a float32 or float64 tensor on an NVIDIA GPU as a CuPy array, or as a NumPy array if CuPy is missing.

    The array shares the tensor's memory if the framework computes on CUDA's default stream, as torch does. The core
    reads asynchronously on that stream; a framework with other streams would reuse the memory without waiting, so its
    tensor is copied. Exporting a tensor without a stream waits until its values are computed.
    """
    device = _array_device(index)
    if device is None:
        return np.asarray(keras.ops.convert_to_numpy(tensor))
    if on_default_stream:
        return device.asarray(tensor)
    with device.backend.on(device.name):
        copy = device.asarray(_WithoutStream(tensor)).copy()
    device.backend.synchronize(device.name)
    return copy


class _WithoutStream:
    """Exports a tensor without a stream: TensorFlow refuses one."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._tensor.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


@cache
def _array_device(index: int) -> Device | None:
    try:
        return resolve_device(f"cupy:cuda:{index}")
    except DeviceError as error:
        _logger.warning("tensors on GPU %d are copied to host memory for the pruning step: %s", index, error)
        return None
