"""The order of the axes of a weight, which tells outputs, inputs and kernel apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

__all__ = ["is_transposed_linear", "own_parameters", "weight_axes"]


def weight_axes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the axes of the named weights whose layout is not PyTorch's usual (output, input, kernel...).

    These are, by name, the permutation of a weight's axes into (output, kernel..., input); the two axes (output, input)
    of a stack of matrices; or nothing if layers share the weight and read it differently.

    A parameter of three or more axes that belongs to no convolution counts as a stack of matrices (output, input), such
    as those of fused experts; as (input, output) if its module has ``is_transposed``, as experts of transformers have.

    Example:
        >>> weight_axes(nn.ConvTranspose2d(2, 4, 3), ["weight", "bias"])
        {'weight': (1, 2, 3, 0)}
    """
    known: dict[int, set[tuple[int, ...]]] = {}
    for module in model.modules():
        for parameter, axes in _axes_in(module):
            known.setdefault(id(parameter), set()).add(axes)
    found: dict[str, tuple[int, ...]] = {}
    wanted = set(names)
    for name, parameter in model.named_parameters():
        if name not in wanted or parameter.ndim < 2:
            continue
        usual = (0, *range(2, parameter.ndim), 1)
        stacked = (parameter.ndim - 2, parameter.ndim - 1)
        layouts = known.get(id(parameter), {usual if parameter.ndim == 2 else stacked})
        if layouts != {usual}:
            found[name] = next(iter(layouts)) if len(layouts) == 1 else ()
    return found


def _axes_in(module: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[int, ...]]]:
    """Yield the parameters whose layout follows from the kind of their module, with their axes."""
    if _is_convolution(module):
        is_transposed = isinstance(module, _ConvTransposeNd) or getattr(module, "transposed", False) is True
        for parameter in module.parameters():  # those that a weight is computed from, too
            if _has_kernel(parameter, module):
                axes = range(parameter.ndim)
                yield parameter, (*axes[1:], 0) if is_transposed else (0, *axes[2:], 1)
    elif is_transposed_linear(module):
        yield from ((parameter, (1, 0)) for parameter in module.parameters() if parameter.ndim == 2)
    elif isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
        yield from ((parameter, (0, 1)) for parameter in own_parameters(module) if parameter.ndim == 2)
    elif isinstance(module, nn.Bilinear):
        yield from ((parameter, (0, 1, 2)) for parameter in own_parameters(module) if parameter.ndim == 3)
    elif getattr(module, "is_transposed", False) is True:
        yield from ((parameter, (2, 1)) for parameter in own_parameters(module) if parameter.ndim == 3)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a module itself, without those of the modules inside it."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) or any(_has_kernel(parameter, module) for parameter in own_parameters(module))


def _has_kernel(parameter: nn.Parameter, module: nn.Module) -> bool:
    """Return whether the last axes of a parameter are those of a kernel of its module's ``kernel_size``."""
    size = getattr(module, "kernel_size", None)
    if is_lazy(parameter) or parameter.ndim < 3 or not isinstance(size, int | tuple):
        return False
    window = tuple(parameter.shape[2:])
    return window == ((size,) * len(window) if isinstance(size, int) else size)


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is a ``Conv1D`` of transformers: a linear layer whose weight is (input, output)."""
    # by name, because transformers may not be installed
    if isinstance(module, _ConvNd) or not any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
        return False
    weight = module._parameters.get("weight")
    return weight is None or weight.ndim == 2
