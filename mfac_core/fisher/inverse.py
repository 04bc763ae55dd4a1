"""The inverse Fisher of plain arrays: its diagonal, and its products with vectors."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from mfac_core.backends import Array, Device, array_library, array_namespace, check_float, device_of, resolve_devices
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.settings.checks import Damping, check_block_size, check_damping

__all__ = ["InverseFisher", "inverse_fisher"]

_logger = logging.getLogger("mfac_core")


def inverse_fisher(
    gradients: Array,
    *,
    block_size: int | None = 2000,
    damping: Damping = 1e-5,
    devices: Sequence[str | Device] | str | Device = ("cpu",),
    rtol: float = 1e-5,
) -> InverseFisher:
    """Return the inverse of the damped, block-diagonal empirical Fisher of some gradient samples.

    Args:
        gradients: One gradient sample per row, shape ``(m, d)``, float32 or float64. Not modified; must
            stay unchanged while the result is in use.
        block_size: Weights per block; ``None`` means one block of all weights.
        damping: Added to the diagonal of the empirical Fisher, positive; or ``auto``, for each block 0.1 times the mean
            of that diagonal.
        devices: Where the blocks are computed, as in :func:`mfac_core.prune`.
        rtol: Largest relative error of each entry of the diagonal, before it is rounded to the dtype of the gradients.
            Blocks for which float32 is not accurate enough are computed in float64, which takes longer.

    Returns:
        An object with ``diagonal()`` and ``apply(x)``, which can also be written ``fisher @ x``.

    Raises:
        TypeError: If ``gradients`` is not an array.
        ValueError: If ``gradients`` is not a matrix of floats, or a setting is out of range; with ``auto``, which
            measures the gradients at once, also if one of their rows contains NaN or Inf.
        DeviceError: If a device does not exist.

    Example:
        >>> import numpy as np
        >>> gradients = np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> inverse_fisher(gradients, damping=0.5).diagonal()
        array([1., 1.])

        The influence of three training samples on the loss of two test samples, from the gradients of each:

        >>> training, test = np.eye(3), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        >>> fisher = inverse_fisher(training, damping=0.5)
        >>> (-test @ (fisher @ training.T)).round(2).tolist()
        [[-1.2, 0.0, 0.0], [0.0, -1.2, -1.2]]

    References:
        Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.
        Koh and Liang (2017), Understanding Black-box Predictions via Influence Functions.
    """
    _check_array("gradients", gradients, "an array of shape (m, d), one gradient sample per row")
    if gradients.ndim != 2:
        raise ValueError(f"gradients must be a matrix with one sample per row, got shape {tuple(gradients.shape)}")
    if 0 in gradients.shape:
        raise ValueError(f"gradients must have at least one row and one column, got shape {tuple(gradients.shape)}")
    check_block_size(block_size)
    check_damping(damping)
    if isinstance(rtol, bool) or not isinstance(rtol, numbers.Real) or not 0 < rtol < 1:
        raise ValueError(f"rtol must be a number between 0 and 1, such as 1e-5, got {rtol!r}")
    resolved = resolve_devices(devices, array_library(gradients))
    return InverseFisher(gradients, block_size, damping, resolved, float(rtol))


class InverseFisher:
    """The inverse Fisher of :func:`inverse_fisher`; each factor is computed once, and retained if memory allows.

    Args:
        gradients: Shape ``(m, d)``.
        block_size: Weights per block, or ``None``.
        damping: Added to the diagonal of the empirical Fisher, or ``auto``.
        devices: Where the blocks are computed.
        rtol: Largest relative error of the diagonal.
    """

    __array_ufunc__ = None  # NumPy leaves ``x @ fisher`` to this class

    def __init__(
        self,
        gradients: Array,
        block_size: int | None,
        damping: Damping,
        devices: Sequence[str | Device] | str | Device,
        rtol: float,
    ) -> None:
        self._home = device_of(gradients)
        source = GradientMatrix([gradients], block_size=block_size)
        self._on = partial(BlockwiseFisher, source, damping=damping, rtol=rtol, retain="always")
        self._fisher = self._on(devices=devices)
        self.shape = (self._fisher.source.num_weights,) * 2

    @cached_property
    def _in_float64(self) -> BlockwiseFisher:
        """The Fisher on devices that have float64: on the host if one of the chosen devices has none."""
        if self._fisher.has_float64:
            return self._fisher
        _logger.info("device %s has no float64: products are computed on the host", self._fisher.home)
        return self._on(devices="cpu")

    def diagonal(self) -> Array:
        """Return ``diag(F^-1)``, shape ``(d,)``, in the dtype and on the device of the gradients.

        Raises:
            ValueError: If a row of the gradients contains NaN or Inf.
            IllConditionedError: If a block cannot be inverted accurately, or the dtype cannot represent the result.
        """
        fisher = self._fisher
        diagonal = fisher.diagonal()
        # by a power of two, in two steps: the unit may be outside the range of the dtype where the result is not
        if fisher.unit != 1:
            half = 2.0 ** (round(math.log2(fisher.unit)) // 2)
            with np.errstate(over="ignore"):  # check_range raises an error of its own
                diagonal = diagonal / half / (fisher.unit / half)
            fisher.check_range(diagonal)
        return fisher.home.move(diagonal, self._home)

    def apply(self, x: Array) -> Array:
        """Return ``F^-1 x``, also written ``fisher @ x``.

        For many vectors pass a matrix with these as columns: each block of the gradients is then read once for all.

        Args:
            x: Shape ``(d,)``, or ``(d, k)`` for ``k`` vectors, in the dtype and on the device of the gradients. Not
                modified.

        Returns:
            The shape of ``x``, in the dtype and on the device of the gradients.

        Raises:
            TypeError: If ``x`` is not an array.
            ValueError: If the shape differs, or ``x`` or a row of the gradients contains NaN or Inf.
            IllConditionedError: If a block cannot be inverted accurately.
        """
        d = self.shape[0]
        _check_array("x", x, f"an array of shape ({d},) or ({d}, k)")
        if x.ndim not in (1, 2) or x.shape[0] != d:
            transposed = "; its vectors are columns, so pass x.T" if x.ndim == 2 and x.shape[1] == d else ""
            raise ValueError(f"x must have shape ({d},) or ({d}, k), got {tuple(x.shape)}{transposed}")
        xp = array_namespace(x)
        if not bool(xp.all(xp.isfinite(x))):
            raise ValueError("x must be finite, but contains NaN or Inf; leave these entries out or set them to zero")
        # in float64, which refines the solves: F^-1 leaves little of an x close to a combination of the gradients
        fisher = self._in_float64
        vector = fisher.home.asarray(device_of(x).move(x, fisher.home), np.float64)
        return fisher.home.move(fisher.home.asarray(fisher.apply(vector), fisher.source.dtype), self._home)

    def __matmul__(self, x: Array) -> Array:
        """Return :meth:`apply` of ``x``."""
        return self.apply(x)

    def __rmatmul__(self, x: Array) -> Array:
        """Return the product with the rows of ``x``; the matrix is symmetric."""
        _check_array("x", x, f"an array of shape ({self.shape[0]},) or (k, {self.shape[0]})")
        product = self.apply(x.T if x.ndim == 2 else x)
        return product.T if x.ndim == 2 else product


def _check_array(name: str, value: Any, expected: str) -> None:
    try:
        array_namespace(value)
    except TypeError:
        cure = "flatten its arrays and concatenate them" if isinstance(value, Mapping) else "convert it first"
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}; {cure}") from None
    try:
        device_of(value)
    except TypeError as error:  # it is not dense, has no values, or is of an unknown library
        raise TypeError(f"{name}: {error}") from None
    check_float(name, value)
