"""How a gradient window stores its rows: as floats, or rounded to bfloat16, which takes half the memory of float32.

NumPy has no bfloat16. It is the upper half of a float32: sign, exponent, and the first 7 bits of the fraction. All
libraries store it as 16-bit integers, which every backend can allocate, copy and index.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mfac_core.backends import Array, array_namespace, device_of

__all__ = ["BFLOAT16", "RowFormat", "widened"]

BFLOAT16 = "bfloat16"

_QUIET_NAN = 0x7FC0
_LARGEST_ROUNDED_DOWN = float(np.array(0x7F7F7FFF, np.uint32).view(np.float32))
"""The largest float32 that does not round to infinity: one more is halfway to the number after the largest bfloat16."""


class RowFormat(NamedTuple):
    """How rows are stored.

    Attributes:
        name: ``bfloat16``, or the name of a dtype of NumPy.
        dtype: dtype of the rows when they are read.
        stored_dtype: dtype of the arrays that hold them.
        largest: The largest absolute value that stays finite.

    Example:
        >>> RowFormat.named("float32").itemsize, RowFormat.named("bfloat16").itemsize
        (4, 2)
    """

    name: str
    dtype: np.dtype[Any]
    stored_dtype: np.dtype[Any]
    largest: float

    @classmethod
    def named(cls, name: Any) -> RowFormat:
        """Return the format with this name; ``name`` may also be a floating-point dtype."""
        if isinstance(name, str) and name == BFLOAT16:
            return cls(BFLOAT16, np.dtype(np.float32), np.dtype(np.int16), _LARGEST_ROUNDED_DOWN)
        dtype = np.dtype(name)
        return cls(dtype.name, dtype, dtype, float(np.finfo(dtype).max))

    @property
    def itemsize(self) -> int:
        """Bytes per stored number."""
        return self.stored_dtype.itemsize

    def limited(self, x: Array) -> Array:
        """Return numbers of :attr:`dtype`, Inf in place of those that cannot be stored: a check for Inf finds them."""
        if self.dtype == self.stored_dtype:
            return x
        xp = array_namespace(x)
        if xp is np:
            with np.errstate(over="ignore"):  # overflow proves nothing
                if np.isfinite(np.dot(x, x)):
                    return x
        return xp.where(xp.abs(x) <= self.largest, x, xp.full_like(x, xp.inf))

    def stored(self, x: Array) -> Array:
        """Return numbers of :attr:`dtype` as they are stored."""
        return x if self.dtype == self.stored_dtype else _rounded_to_bfloat16(x)


def widened(x: Array) -> Array:
    """Return stored numbers as floats on the same device: bfloat16 as float32, and floats as they are.

    Example:
        >>> stored = RowFormat.named("bfloat16").stored(np.array([1.0, 1 / 3], np.float32))
        >>> widened(stored).tolist()
        [1.0, 0.333984375]
    """
    xp = array_namespace(x)
    if x.dtype != xp.int16:
        return x
    if not hasattr(x, "view"):  # the array API standard cannot reinterpret bits: the host can
        device = device_of(x)
        return device.asarray(widened(device.to_numpy(x)))
    bits = xp.asarray(x, dtype=xp.int32)
    bits <<= 16  # in place: this is the copy
    return bits.view(xp.float32)


def _rounded_to_bfloat16(x: Array) -> Array:
    """Return float32 numbers as the nearest bfloat16, of two equally near the even one; NaN stays NaN."""
    xp = array_namespace(x)
    if not hasattr(x, "view"):
        device = device_of(x)
        return device.asarray(_rounded_to_bfloat16(device.to_numpy(x)))
    bits = x.view(xp.int32)
    # adds half of the last place that stays, or a little less if that place is even; a carry reaches the exponent
    upper = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    # a NaN might carry into its sign, or lose all that makes it one
    return xp.asarray(xp.where(xp.isnan(x), xp.full_like(upper, _QUIET_NAN), upper), dtype=xp.int16)
