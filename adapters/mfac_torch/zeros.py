"""The zeros of a model: counted from its weights, and set by masks in copies that training does not prune."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from mfac_core.masks.zero_count import ZeroCount, count_zeros
from mfac_core.weight_names import join_names
from mfac_torch.conversion import check_prunable, to_array
from mfac_torch.sharded import is_sharded, local, local_part, mesh_of, reshard
from mfac_torch.wrappers import unwrapped

__all__ = ["HasMasks", "Masks", "apply_masks", "zeros_of"]

Masks = Mapping[str, torch.Tensor]
"""Boolean tensors by parameter name, each of its parameter's shape; True keeps."""

_WRAPPED_LAYER = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class HasMasks(Protocol):
    """An object with masks, such as a manager."""

    @property
    def masks(self) -> Masks:
        """The current masks."""


def zeros_of(parameters: Mapping[str, torch.Tensor], masks: Masks) -> ZeroCount:
    """Count how many pruned weights are zero, given all parameters in scope and the masks of some of them.

    Of sharded parameters, this rank sees its shards: pruned weights of other ranks count as zero.
    """
    count = count_zeros(
        {name: to_array(local(parameter)) for name, parameter in parameters.items()},
        {name: local_part(mask, parameters[name]).cpu().numpy() for name, mask in masks.items()},
    )
    if not any(map(is_sharded, parameters.values())):
        return count
    return count._replace(
        weights=sum(parameter.numel() for parameter in parameters.values()),
        pruned=sum(int((~mask).sum()) for mask in masks.values()),
    )


def apply_masks(model_or_state: nn.Module | Mapping[str, Any], masks: HasMasks | Masks) -> int:
    """Set pruned weights to zero in a copy that training does not prune, such as an average of the weights.

    A mask belongs to the tensor of the same name. Prefixes that ``AveragedModel``, ``DataParallel``, ``torch.compile``
    or a Lightning module add to names are ignored, and so is a prefix that only the names of the masks have.

    Args:
        model_or_state: A model, wrapped or not, or a state dict; changed in place.
        masks: The masks, or the manager that holds them. Empty masks, as before the first pruning step, change nothing.

    Returns:
        How many weights were set to zero; those that were zero before do not count, nor those that other ranks have.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a mask fits no tensor, several tensors, or one of another shape, or one that is
            quantized or sparse. Nothing is changed then.
        NotImplementedError: If a tensor is distributed in another way than by ``fully_shard``.

    Example:
        >>> average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 1))
        >>> apply_masks(average, {"weight": torch.tensor([[False, True]])})
        1
    """
    tensors = _tensors(model_or_state)
    given = masks if isinstance(masks, Mapping) else getattr(masks, "masks", None)
    if not isinstance(given, Mapping):
        raise TypeError(f"masks is a {type(masks).__name__}; pass masks by parameter name, or the manager")
    matched = _matched(given, tensors)
    check_prunable({name: tensors[name] for name in matched.values()})
    mesh_of({name: tensors[name] for name in matched.values()})
    changed = 0
    with torch.no_grad():
        for name, mask in given.items():
            tensor = local(tensors[matched[name]])
            pruned = ~local_part(mask, tensors[matched[name]]).to(tensor.device, torch.bool)
            changed += int(((tensor != 0) & pruned).sum())
            tensor.masked_fill_(pruned, 0.0)
    return changed


def _tensors(model_or_state: nn.Module | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    if isinstance(model_or_state, nn.Module):
        reshard(model_or_state)
        return dict(unwrapped(model_or_state).named_parameters(remove_duplicate=False))
    if isinstance(model_or_state, Mapping):
        return {name: value for name, value in model_or_state.items() if isinstance(value, torch.Tensor)}
    raise TypeError(f"the model is a {type(model_or_state).__name__}; pass a torch.nn.Module or a state dict")


def _matched(masks: Masks, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the name of the tensor of each mask; raise ValueError for a mask that does not fit exactly one."""
    without_wrappers = {name: _WRAPPED_LAYER.sub(r"\1", name) for name in tensors}
    matched: dict[str, str] = {}
    for name, mask in masks.items():
        found = [name] if name in tensors else _same_end(_WRAPPED_LAYER.sub(r"\1", name), without_wrappers)
        if not found:
            raise ValueError(
                f"the mask of {name} fits none of the tensors ({join_names(tensors) or 'there are none'}); pass the "
                "model or the state dict that the masks belong to"
            )
        if len(found) > 1:
            raise ValueError(
                f"the mask of {name} fits several tensors ({join_names(found)}); pass the part of the model that the "
                "masks belong to"
            )
        other = next((other for other, tensor in matched.items() if tensor == found[0]), None)
        if other is not None:
            raise ValueError(
                f"the masks of {other} and {name} both fit {found[0]}; pass the model or the state dict that the masks "
                "belong to"
            )
        if mask.shape != tensors[found[0]].shape:
            raise ValueError(
                f"the mask of {name} has the shape {tuple(mask.shape)}, and {found[0]} has "
                f"{tuple(tensors[found[0]].shape)}; pass the model or the state dict that the masks belong to"
            )
        matched[name] = found[0]
    return matched


def _same_end(name: str, without_wrappers: Mapping[str, str]) -> list[str]:
    """Return the tensors of this name; if there are none, those whose name ends with it, or else is an end of it."""
    names = without_wrappers.items()
    return (
        [tensor for tensor, other in names if other == name]
        or [tensor for tensor, other in names if f".{other}".endswith(f".{name}")]
        or [tensor for tensor, other in names if f".{name}".endswith(f".{other}")]
    )
