"""Which weights a saved state belongs to: a short digest of each array."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from mfac_core.backends import Array, device_of

__all__ = ["fingerprint"]


def fingerprint(array: Array) -> str:
    """Return a digest of an array: equal for equal shapes, dtypes and bits, on every machine and device.

    NaN equals NaN of the same bits, and -0.0 is not 0.0.

    Args:
        array: Of any shape and numeric dtype, on any device.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> fingerprint(np.zeros(2)) == fingerprint(np.zeros(2)), fingerprint(np.zeros(2)) == fingerprint(np.ones(2))
        (True, False)
    """
    values = np.asarray(device_of(array).to_numpy(array))
    values = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
    digest = blake2b(f"{values.dtype.str} {values.shape}".encode(), digest_size=16)
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
