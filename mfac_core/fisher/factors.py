r"""The inverse of the damped empirical Fisher of one group of blocks: the choice of its form and its precision.

Notation: ``n`` blocks of ``B`` weights each, ``m`` gradient samples, the rows of ``G``. One Fisher per block,

.. math:: F = \lambda I + \frac{1}{m} G^T G, \qquad S = m \lambda I + G G^T.

The dual form factors ``S`` (``m x m``), the primal form ``F`` itself (``B x B``), whichever is smaller. Results are
those of :math:`\lambda F^{-1}`, whose eigenvalues lie in ``(0, 1]`` for any scale of the gradients.

The inverse diagonal of float32 gradients is evaluated in float32. If its estimated error exceeds what was asked, the
whole group is evaluated again in float64, and refused if that is not accurate enough either. ``dual.py`` and
``primal.py`` derive the estimates.

References:
    Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mfac_core.backends import Array, array_namespace
from mfac_core.errors import IllConditionedError
from mfac_core.fisher.chunks import width_of
from mfac_core.fisher.damping import damping_text
from mfac_core.fisher.dual import DualFactor
from mfac_core.fisher.kernels import check_has_float64, wide_dtype
from mfac_core.fisher.primal import PrimalFactor
from mfac_core.fisher.rounding import smallest_square

__all__ = ["Factor", "evaluate", "factor"]


FEWEST_DIGITS = 32
"""Smallest ``rtol`` in units of ``eps``: below it, rounding of single operations counts, which the estimates neglect."""


class Factor(Protocol):
    """The factored Fisher of one group. Methods that need the gradients take them again, as ``chunks``."""

    @property
    def in_float64(self) -> bool:
        """Whether the factor was computed in float64."""

    @property
    def num_bytes(self) -> int:
        """Memory of the factor in bytes."""

    def apply(self, chunks: Sequence[Array], x: Array) -> Array:
        """Return ``damping F^-1 x`` for ``x`` of shape ``(n, B, k)``, in the dtype of ``x``.

        For a float64 ``x`` the solves with a float32 factor are refined to float64. That matters where ``x`` is close
        to a combination of the gradients, of which ``F^-1`` leaves little.
        """

    def apply_to_rows(self, chunks: Sequence[Array], coefficients: Array) -> Array:
        """Return ``F^-1 G^T c / m`` for ``c`` of shape ``(n, m)``; shape ``(n, B)``, in the dtype of ``c``."""

    def select_blocks(self, blocks: slice) -> Factor:
        """Return the factor of some of the blocks."""


def evaluate(chunks: Sequence[Array], damping: Array | float, rtol: float) -> tuple[Factor, Array]:
    """Factor the Fisher of one group of blocks and evaluate its inverse diagonal, in float32 if that suffices.

    Args:
        chunks: Gradients, each of shape ``(n, m, width)``, float32 or float64, all on one device. Not modified.
        damping: Added to the diagonal of the empirical Fisher, positive: one number, or one for each block, shape
            ``(n,)``, in the widest dtype of the device.
        rtol: Largest relative error of the inverse diagonal.

    Returns:
        The factor, and ``damping diag(F^-1)`` of shape ``(n, B)``, in the dtype of the factor.

    Raises:
        IllConditionedError: If float64 is not accurate enough either.
        Float64Needed: If float32 is not accurate enough, and the device has no float64.
    """
    xp = array_namespace(chunks[0])
    damping = _of_each_block(damping, chunks)
    # overflow shows in the results, which are then computed in float64 or refused
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if chunks[0].dtype != xp.float64:
            found = _evaluate_in(chunks[0].dtype, chunks, damping, rtol)
            if found is not None and bool(xp.all(damping >= smallest_square(chunks[0]))):
                return found
            check_has_float64(chunks[0])
        found = _evaluate_in(xp.float64, chunks, damping, rtol)
    if found is None:
        raise IllConditionedError(
            "the Fisher of a block cannot be inverted to a relative error of "
            f"{rtol:g} with damping {damping_text(float(xp.min(damping)), float(xp.max(damping)))}: its gradients are "
            "too large relative to the damping, or too similar; choose a larger damping (or rtol of inverse_fisher)"
        )
    return found


def factor(chunks: Sequence[Array], damping: Array | float, in_float64: bool) -> Factor:
    """Factor the Fisher of one group of blocks again, in the precision that :func:`evaluate` has chosen."""
    xp = array_namespace(chunks[0])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _form(chunks).of(chunks, _of_each_block(damping, chunks), xp.float64 if in_float64 else chunks[0].dtype)


def _form(chunks: Sequence[Array]) -> type[DualFactor] | type[PrimalFactor]:
    return PrimalFactor if width_of(chunks) <= chunks[0].shape[-2] else DualFactor


def _evaluate_in(
    dtype: Any, chunks: Sequence[Array], damping: Array, rtol: float
) -> tuple[DualFactor | PrimalFactor, Array] | None:
    """Return factor and diagonal computed in a dtype; ``None`` if their estimated error exceeds ``rtol``."""
    if rtol < FEWEST_DIGITS * float(array_namespace(chunks[0]).finfo(dtype).eps):
        return None
    try:
        factored = _form(chunks).of(chunks, damping, dtype)
        diagonal, error = factored.diagonal(chunks, rtol)
    except np.linalg.LinAlgError:
        return None
    return (factored, diagonal) if bool(array_namespace(error).all(error <= rtol)) else None


def _of_each_block(damping: Array | float, chunks: Sequence[Array]) -> Array:
    """Return the damping of each block in the widest dtype, shape ``(n,)``, on the device of the chunks."""
    # computed from a chunk, so that it is on the same device
    first = chunks[0][:, 0, 0]
    return array_namespace(first).zeros_like(first, dtype=wide_dtype(first)) + damping
