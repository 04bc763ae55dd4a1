"""A short digest of each array, to recognize the weights that a saved state belongs to."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from mfac_core.backends import Array, device_of

__all__ = ["fingerprint"]


def fingerprint(array: Array) -> str:
    """Return 32 hexadecimal digits: equal for equal shapes, dtypes and bits, on every machine and device.

    NaN equals NaN of the same bits, and -0.0 is not 0.0.

    Example:
        >>> fingerprint(np.zeros(2)) == fingerprint(np.zeros(2)), fingerprint(np.zeros(2)) == fingerprint(np.ones(2))
        (True, False)
    """
    values = np.asarray(device_of(array).to_numpy(array))
    values = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
    digest = blake2b(f"{values.dtype.str} {values.shape}".encode(), digest_size=16)
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
