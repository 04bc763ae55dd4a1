"""A textbook implementation of the paper's recursion, the baseline of the benchmark, in NumPy and in PyTorch.

For one block with gradients ``g_1 .. g_m`` and damping ``lambda``:

    v_i = F_{i-1}^-1 g_i = g_i / lambda - sum over j < i of (v_j . g_i) / (m + g_j . v_j) * v_j
    F^-1 x = x / lambda - sum over i of (v_i . x) / (m + g_i . v_i) * v_i

Each new row reads all earlier rows again, so this is matrix-vector work. So compute the public implementations: one
block at a time (SparseML, ``FisherInverseFast``) or several at once (the authors, ``HInvFastBatch``). For small blocks
the same rank-one updates are applied to dense ``B x B`` inverses instead (``FisherInverseFastSmallBlocks``). Here the
diagonal is summed in one expression, not row by row, and a dense inverse is updated as a whole: both are faster.

:func:`dynamic_torch` is the paper's other algorithm, with which the authors precondition gradients in their optimizer.
It needs matrix products only, but no public implementation computes a diagonal by it.
"""

from __future__ import annotations

import numpy as np
import torch


def single_block_numpy(gradients, damping):
    """Return the diagonal of one block after another; gradients of shape (n, m, B)."""
    return np.stack([_diagonal_numpy(block, damping) for block in gradients])


def _diagonal_numpy(block, damping):
    m = len(block)
    v = np.empty_like(block)
    scales = np.empty(m, block.dtype)
    for i, g in enumerate(block):
        v[i] = g / damping - ((v[:i] @ g) / scales[:i]) @ v[:i]
        scales[i] = m + g @ v[i]
    return 1 / damping - ((v * v) / scales[:, None]).sum(axis=0)


def batched_numpy(gradients, damping):
    """Return the diagonals of all blocks at once; gradients of shape (n, m, B)."""
    n, m, _ = gradients.shape
    v = np.empty_like(gradients)
    scales = np.empty((n, m), gradients.dtype)
    for i in range(m):
        g = gradients[:, i, :]
        coefficients = np.matmul(v[:, :i], g[:, :, None])[..., 0] / scales[:, :i]
        v[:, i] = g / damping - np.matmul(coefficients[:, None, :], v[:, :i])[:, 0]
        scales[:, i] = m + (g * v[:, i]).sum(axis=-1)
    return 1 / damping - ((v * v) / scales[:, :, None]).sum(axis=1)


def single_block_torch(gradients, damping):
    """As :func:`single_block_numpy`, on torch tensors."""
    return torch.stack([_diagonal_torch(block, damping) for block in gradients])


def _diagonal_torch(block, damping):
    m = len(block)
    v = torch.empty_like(block)
    scales = torch.empty(m, dtype=block.dtype, device=block.device)
    for i in range(m):
        g = block[i]
        v[i] = g / damping - ((v[:i] @ g) / scales[:i]) @ v[:i]
        scales[i] = m + g @ v[i]
    return 1 / damping - ((v * v) / scales[:, None]).sum(dim=0)


def batched_torch(gradients, damping):
    """As :func:`batched_numpy`, on torch tensors."""
    n, m, _ = gradients.shape
    v = torch.empty_like(gradients)
    scales = torch.empty((n, m), dtype=gradients.dtype, device=gradients.device)
    for i in range(m):
        g = gradients[:, i, :]
        coefficients = torch.bmm(v[:, :i], g[:, :, None])[..., 0] / scales[:, :i]
        v[:, i] = g / damping - torch.bmm(coefficients[:, None, :], v[:, :i])[:, 0]
        scales[:, i] = m + (g * v[:, i]).sum(dim=-1)
    return 1 / damping - ((v * v) / scales[:, :, None]).sum(dim=1)


def dense_blocks_torch(gradients, damping):
    """Return the diagonals by rank-one updates of dense B x B inverses; for small blocks."""
    n, m, width = gradients.shape
    inverse = torch.eye(width, dtype=gradients.dtype, device=gradients.device).repeat(n, 1, 1) / damping
    for i in range(m):
        g = gradients[:, i, :, None]
        product = torch.bmm(inverse, g)
        scale = m + (g * product).sum(dim=1, keepdim=True)
        inverse -= product @ product.transpose(1, 2) / scale
    return inverse.diagonal(dim1=1, dim2=2).clone()


def dynamic_torch(gradients, damping):
    """Return the diagonals by the paper's dynamic algorithm, from the Gram matrix ``G G^T``.

    With ``D_ij = g_i . F_{i-1}^-1 g_j`` for ``i <= j``, the rows are ``V = C G``, where row ``i`` of the triangular
    ``C`` is ``e_i / lambda - sum over k < i of D_ki / (m + D_kk) C_k``.
    """
    n, m, _ = gradients.shape
    d = torch.bmm(gradients, gradients.transpose(1, 2)) / damping
    for k in range(m - 1):
        # what remains of the products of the later samples once sample k is accounted for
        row = d[:, k, k + 1 :]
        d[:, k + 1 :, k + 1 :] -= (row / (m + d[:, k, k, None]))[:, :, None] * row[:, None, :]
    scales = m + d.diagonal(dim1=1, dim2=2)
    factors = (d / scales[:, :, None]).transpose(1, 2).contiguous()
    coefficients = torch.eye(m, dtype=d.dtype, device=d.device).repeat(n, 1, 1) / damping
    for i in range(1, m):
        coefficients[:, i, :i] = -torch.bmm(factors[:, i, None, :i], coefficients[:, :i, :i])[:, 0]
    v = torch.bmm(coefficients, gradients)
    return 1 / damping - ((v * v) / scales[:, :, None]).sum(dim=1)
