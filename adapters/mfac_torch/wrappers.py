"""The model inside the wrappers that trainers put around it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["layers_of", "unwrapped"]

_INSIDE = ("_orig_mod", "_original_module")
"""The names under which ``torch.compile`` and Lightning's Fabric keep the wrapped model."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model inside wrappers (``DataParallel``, ``torch.compile``, Lightning's Fabric), if there are any."""
    *_, model = layers_of(module)
    return model


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a model in its wrappers, from the outermost wrapper to the model itself."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model is a {type(module).__name__}; pass a torch.nn.Module")
    inside: nn.Module | None = module
    while inside is not None:
        yield inside
        inside = _inside(inside)


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inside: nn.Module = module.module
        return inside
    return next((module._modules[name] for name in _INSIDE if module._modules.get(name) is not None), None)
