"""Tensors on a GPU to arrays of the core, without a copy where CuPy is installed."""

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


def gpu_array(tensor: Any, index: int) -> Array:
    """Return a tensor on a GPU as an array that the core computes with.

    Args:
        tensor: A tensor of float32 or float64 on an NVIDIA GPU, of any backend.
        index: Which GPU.

    Returns:
        A CuPy array that shares its memory through DLPack, or a NumPy copy where CuPy is not installed (logged once).
    """
    device = _array_device(index)
    return np.asarray(keras.ops.convert_to_numpy(tensor)) if device is None else device.asarray(tensor)


@cache
def _array_device(index: int) -> Device | None:
    try:
        return resolve_device(f"cuda:{index}")
    except DeviceError as error:
        _logger.warning("tensors on GPU %d are copied to host memory for the pruning step: %s", index, error)
        return None
