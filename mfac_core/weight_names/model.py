"""What has to be known of a model to read ``params`` and ``exclude``: its weights, its layers, their names."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = [
    "ALL",
    "ALL_PRUNABLE",
    "PATTERN",
    "Computed",
    "ModelNames",
    "join_names",
    "layer_of",
    "layers_of_names",
    "names_of_shapes",
]

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"
PATTERN = "re:"


@dataclass(frozen=True)
class Computed:
    """A weight of a layer that is no parameter, because the layer computes it from others.

    Args:
        by: What computes it, such as ``weight_norm``; empty if that is not known.
        shape: Its shape.
        keeps_zeros: Whether it is zero where the weights are that it is computed from.
    """

    by: str
    shape: tuple[int, ...]
    keeps_zeros: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """The names of a model's weights and layers.

    Args:
        shapes: Every name of every weight -> its shape, in the order of the model.
        prunable: Names of the weights that ``__ALL_PRUNABLE__`` means, frozen ones too.
        layers: Name of each layer -> names of the weights in it, at any depth.
        normalization: Names of the weights of normalization layers.
        frozen: Names of the weights that are left out because they are not trained.
        packed: Names of weights that ``__ALL_PRUNABLE__`` leaves out although they are like prunable ones -> why.
        computed: Name that the weight of a prunable layer would have -> why it has none.
        first_names: Further name of a weight that has several -> its first one.
        kind: What a name names, for messages.
        frozen_because: Why a weight counts as frozen, for messages.
        prunable_layers: Which layers the prunable weights belong to, for messages.

    Example:
        >>> names = ModelNames(shapes={"fc.weight": (2, 3)}, prunable=["fc.weight"], layers={"fc": ["fc.weight"]})
        >>> names.weights("fc.weight")
        6
    """

    shapes: Mapping[str, tuple[int, ...]]
    prunable: Collection[str] = ()
    layers: Mapping[str, Collection[str]] = field(default_factory=dict)
    normalization: Collection[str] = ()
    frozen: Collection[str] = ()
    packed: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Computed] = field(default_factory=dict)
    first_names: Mapping[str, str] = field(default_factory=dict)
    kind: str = "parameter"
    frozen_because: str = "requires_grad is False"
    prunable_layers: str = "Linear and convolution layers"

    def first(self, name: str) -> str:
        """Return the first name of a weight, by which it is known."""
        return self.first_names.get(name, name)

    def weights(self, name: str) -> int:
        """Return the number of weights in a parameter, or in a computed one."""
        return math.prod(self.shapes[name] if name in self.shapes else self.computed[name].shape)

    def is_rarely_pruned(self, name: str) -> bool:
        """Return whether pruning a weight harms the model and saves nothing.

        So it is for weights of normalization layers, biases, and arrays with a single axis, such as scales; never for
        weights that ``__ALL_PRUNABLE__`` means.
        """
        if name in self.prunable:
            return False
        own = re.split("[./]", name.partition("#")[0])[-1]
        is_bias = own == "bias" or own.startswith("bias_") or own.endswith("_bias")
        return name in self.normalization or is_bias or self.num_axes(name) < 2  # noqa: PLR2004

    def num_axes(self, name: str) -> int:
        """Return how many axes of a weight have more than one entry."""
        return sum(extent > 1 for extent in self.shapes[name])

    def computed_in(self, layer: str) -> list[str]:
        """Return the computed weights in a layer."""
        return [name for name in self.computed if name.startswith((f"{layer}.", f"{layer}/"))]


def names_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ModelNames:
    """Return the names of a model of which only the shapes are known: weights of two or more axes are prunable.

    Example:
        >>> names_of_shapes({"body.fc.weight": (2, 3)}).layers
        {'body': ['body.fc.weight'], 'body.fc': ['body.fc.weight']}
    """
    prunable = [name for name, shape in shapes.items() if len(shape) > 1]
    return ModelNames(shapes=shapes, prunable=prunable, layers=layers_of_names(shapes))


def layers_of_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of layers, which end before a dot or slash in names of weights, and the weights in them.

    Example:
        >>> layers_of_names(["body/fc/kernel"])
        {'body': ['body/fc/kernel'], 'body/fc': ['body/fc/kernel']}
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        for sign in re.finditer("[./]", name):
            layers.setdefault(name[: sign.start()], []).append(name)
    return layers


def layer_of(name: str) -> str:
    """Return the name of the innermost layer that a weight or layer is in; empty at the top."""
    return name[: max(name.rfind("."), name.rfind("/"), 0)]


def join_names(names: Iterable[str], at_most: int = 5) -> str:
    """Return names for one line, and how many more there are.

    Example:
        >>> join_names(["a", "b", "c", "d"], at_most=2)
        'a, b and 2 more'
    """
    every = list(names)
    more = f" and {len(every) - at_most} more" if len(every) > at_most else ""
    return ", ".join(every[:at_most]) + more
