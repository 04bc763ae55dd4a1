"""The kernels of the core for which torch has a faster form, for tensors on any device."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from mfac_core.fisher.kernels import Kernels

__all__ = ["KERNELS"]

_LARGEST_FACTOR = 128
"""Rows of the largest matrices that are factored in one call on a GPU: a whole panel of the core."""

_LARGEST_FACTOR_ON_CPU = 32


class _SmallFactors:
    """Inverse Cholesky factors by torch's batched factorization and triangular solve, without waiting for a GPU."""

    def __init__(self, like: torch.Tensor) -> None:
        self.largest = _LARGEST_FACTOR_ON_CPU if _runs_on_cpu(like) else _LARGEST_FACTOR
        self._identity = torch.eye(self.largest, dtype=like.dtype, device=like.device)

    def __call__(self, matrices: torch.Tensor, shift: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        size = matrices.shape[-1]
        identity = self._identity[:size, :size]
        lower, failed = torch.linalg.cholesky_ex(matrices + shift * identity)
        lower = lower.masked_fill(failed[:, None, None] != 0, torch.nan)
        inverse = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False)
        return inverse.contiguous(), lower.diagonal(dim1=-2, dim2=-1)


def _kth_smallest(x: torch.Tensor, k: int) -> torch.Tensor:
    if _runs_on_cpu(x):  # NumPy's selection is about twenty times as fast as torch's
        return torch.from_numpy(np.partition(x.numpy(), k))[k]
    return x.sort().values[k]  # on a GPU a sort is faster than torch's selection, which is not deterministic either


def _runs_on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


def _wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if _has_float64(x.device) else torch.float32


@cache
def _has_float64(device: torch.device) -> bool:
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps"


KERNELS = Kernels(
    small_factors=_SmallFactors, kth_smallest=_kth_smallest, runs_on_cpu=_runs_on_cpu, wide_dtype=_wide_dtype
)
"""Products and sums keep their portable forms, each of which is a single call of torch."""
