"""The model inside the wrappers that trainers put around it."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrapped"]

_INSIDE = ("_orig_mod", "_original_module")
"""The names under which ``torch.compile`` and Lightning's Fabric keep the wrapped model."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside wrappers (``DataParallel``, ``torch.compile``, Lightning's Fabric), if there are any."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model is a {type(module).__name__}; pass a torch.nn.Module")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(module.module)
    inside = next((module._modules[name] for name in _INSIDE if module._modules.get(name) is not None), None)
    return module if inside is None else unwrapped(inside)
