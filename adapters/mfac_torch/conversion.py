"""Tensors to arrays without copying where possible, and arrays back into tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mfac_core.backends import Array
from mfac_core.errors import SettingError
from mfac_core.weight_names import join_names
from mfac_torch.sharded import is_sharded, local

__all__ = [
    "check_prunable",
    "state_to_arrays",
    "state_to_tensors",
    "to_array",
    "to_tensor",
    "why_not_dense",
    "write_back",
]


def to_array(tensor: torch.Tensor) -> Array:
    """Return the values of a dense floating-point tensor as a NumPy array, or on a GPU as a tensor, which stays there.

    The array shares the memory of float32 and float64 tensors; treat it as read-only. Smaller float types are copied to
    float32.

    Example:
        >>> to_array(torch.ones(2, dtype=torch.bfloat16))
        array([1., 1.], dtype=float32)
    """
    reason = _why_not_prunable(tensor)
    if reason:
        raise TypeError(f"a tensor cannot be read as an array: it is {reason}")
    tensor = tensor.detach()
    if tensor.dtype not in {torch.float32, torch.float64}:
        tensor = tensor.to(torch.float32)
    # NumPy is the fastest on a CPU
    return tensor.numpy(force=True) if _is_on_cpu(tensor) else tensor


def check_prunable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights unless they are plain, dense, real floating-point tensors with values; the message names all.

    Of a DTensor, this rank's part has to be one.
    """
    refused: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        reason = _why_not_prunable(local(tensor) if is_sharded(tensor) else tensor)
        if reason:
            refused.setdefault(reason, []).append(name)
    if refused:
        raise SettingError(
            "params",
            "only plain, dense, real floating-point weights can be pruned, and these are not: "
            + "; ".join(f"{join_names(names)} ({reason})" for reason, names in refused.items()),
        )


def to_tensor(array: Array) -> torch.Tensor:
    """Return an array as a tensor of the same dtype on the same device; treat it as read-only.

    The tensor shares the memory of the array unless the array is read-only.
    """
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(np.require(array, requirements=["C", "W"]))


def write_back(tensor: torch.Tensor, array: Array) -> None:
    """Write the values of an array into a tensor of the same shape in place; autograd does not record the change."""
    if tuple(tensor.shape) != tuple(array.shape):
        raise ValueError(
            f"an array of shape {tuple(array.shape)} cannot be written into a tensor of shape {tuple(tensor.shape)}; "
            "the shapes must be equal"
        )
    with torch.no_grad():
        tensor.copy_(to_tensor(array))


def state_to_tensors(state: Any) -> Any:
    """Return a state with a tensor for each array, so that ``torch.load(weights_only=True)`` reads it."""
    if isinstance(state, Mapping):
        return {key: state_to_tensors(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [state_to_tensors(value) for value in state]
    if isinstance(state, np.generic):
        return state.item()
    return to_tensor(state) if isinstance(state, np.ndarray) else state


def state_to_arrays(state: Any) -> Any:
    """Return a state with a NumPy array for each tensor: the inverse of :func:`state_to_tensors`."""
    if isinstance(state, Mapping):
        return {key: state_to_arrays(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [state_to_arrays(value) for value in state]
    if not isinstance(state, torch.Tensor):
        return state
    try:
        return state.numpy(force=True)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"the state is broken: it holds a tensor of {state.dtype}; load another checkpoint") from error


def why_not_dense(tensor: torch.Tensor) -> str:
    """Return why a tensor has no memory of its own with one value per entry, and the cure; empty if it has."""
    kind = type(tensor).__name__
    if kind == "DTensor":
        return "a DTensor, of a model that is distributed (fully_shard, FSDP2); prune before the model is distributed"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {kind}, a tensor subclass with its own storage (quantized?); prune first and convert afterwards"
    if tensor.is_nested:
        return "nested, with parts of different shapes; pad them (torch.nested.to_padded_tensor)"
    if tensor.is_meta:
        return "on the meta device, without values; materialize the model first"
    if tensor.layout != torch.strided:
        return f"of the layout {tensor.layout}; make it dense (Embedding: sparse=False)"
    return ""


def _why_not_prunable(tensor: torch.Tensor) -> str:
    """Return why a tensor cannot be pruned as it is stored, and what to do about it; empty if it can."""
    reason = why_not_dense(tensor)
    if reason:
        return reason
    if tensor.is_complex():
        return f"complex ({tensor.dtype}); remove it from params, or store real and imaginary parts as two parameters"
    if not tensor.dtype.is_floating_point:
        return f"of dtype {tensor.dtype} (quantized?); prune first and convert afterwards, or remove it from params"
    return ""


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
