"""Models without the wrappers that trainers put around them."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrapped"]

_INSIDE = ("_orig_mod", "_original_module")
"""What ``torch.compile`` and Lightning's Fabric call the model that they wrap."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model that wrappers (``DataParallel``, ``torch.compile``, Lightning's Fabric) hold.

    Args:
        module: A model, wrapped or not.

    Returns:
        The model itself.

    Raises:
        TypeError: If it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model is a {type(module).__name__}; pass a torch.nn.Module")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(module.module)
    inside = next((module._modules[name] for name in _INSIDE if module._modules.get(name) is not None), None)
    return module if inside is None else unwrapped(inside)
