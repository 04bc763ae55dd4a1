"""Hold masks: keep pruned weights at exactly zero while an optimizer moves the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from mfac_core.backends import Array
from mfac_torch.conversion import to_tensor

__all__ = ["HeldMasks"]


_SAMPLED = 8
"""Pruned weights of a parameter that :meth:`HeldMasks.seems_regrown` looks at."""


class HeldMasks:
    """The masks of one pruning modifier, kept on the devices of the parameters they belong to.

    Args:
        parameters: The parameters in scope by name. They are changed in place, and only at pruned entries.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._pruned: dict[str, torch.Tensor] = {}
        self._sampled: dict[str, torch.Tensor] = {}  # positions of a few pruned weights in the flattened parameter

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks that are held by parameter name: boolean, True keeps; empty before the first pruning step."""
        return {name: ~pruned for name, _, pruned in self._held()}

    @property
    def pruned(self) -> dict[str, torch.Tensor]:
        """Which weights are held at zero, by parameter name: boolean, True where pruned; not copies."""
        return {name: pruned for name, _, pruned in self._held()}

    def hold(self, masks: Mapping[str, Array]) -> None:
        """Take new masks in place of those held so far.

        Args:
            masks: Boolean arrays by parameter name, True keeps.
        """
        self._pruned = {
            name: ~to_tensor(mask).to(self._parameters[name].device, torch.bool) for name, mask in masks.items()
        }
        self._sampled = {name: _few_of(pruned).cpu() for name, pruned in self._pruned.items()}

    def release(self) -> None:
        """Hold no masks any more."""
        self._pruned, self._sampled = {}, {}

    def zero_gradients(self, names: Collection[str] | None = None) -> None:
        """Set the gradients of pruned entries to zero, so that optimizers gather no momentum for them.

        Args:
            names: Of these parameters only.

        Raises:
            TypeError: If a gradient is sparse.
        """
        for name, parameter, pruned in self._held(names):
            if parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {name} is sparse, which is not supported; make its layer with sparse=False "
                    "or take it out of params"
                )
            parameter.grad.detach().masked_fill_(pruned, 0.0)

    def zero_weights(self, names: Collection[str] | None = None) -> None:
        """Set pruned weights to exactly ``+0.0``.

        Args:
            names: Of these parameters only.
        """
        for _, parameter, pruned in self._held(names):
            parameter.detach().masked_fill_(pruned, 0.0)

    def parameters(self, names: Collection[str] | None = None) -> dict[str, nn.Parameter]:
        """Return the parameters whose masks are held.

        Args:
            names: Of these parameters only.

        Returns:
            The parameters by name.
        """
        return {name: parameter for name, parameter, _ in self._held(names)}

    def has_regrown(self, names: Collection[str] | None = None) -> bool:
        """Return whether a pruned weight is not zero, looked up on the device of the weights.

        Args:
            names: Of these parameters only.

        Returns:
            Whether there is one.
        """
        found: dict[torch.device, torch.Tensor] = {}
        for _, parameter, pruned in self._held(names):
            regrown = (parameter.detach() != 0).logical_and_(pruned).any()
            before = found.get(regrown.device)
            found[regrown.device] = regrown if before is None else before | regrown
        return any(map(bool, found.values()))  # one wait per device

    def seems_regrown(self, names: Collection[str] | None = None) -> bool:
        """Return whether one of a few pruned weights is not zero, in host memory, where a look costs next to nothing.

        Args:
            names: Of these parameters only.

        Returns:
            Whether there is one.
        """
        return any(
            bool(parameter.detach().take(self._sampled[name]).any())
            for name, parameter, pruned in self._held(names)
            if pruned.device.type == "cpu"
        )

    def _held(self, names: Collection[str] | None = None) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        for name, pruned in self._pruned.items():
            if names is not None and name not in names:
                continue
            parameter = self._parameters[name]
            if pruned.device != parameter.device:  # the model has moved since the last call
                self._pruned[name] = pruned.to(parameter.device)
            yield name, parameter, self._pruned[name]


def _few_of(pruned: torch.Tensor) -> torch.Tensor:
    positions = pruned.flatten().nonzero().flatten()
    return positions[:: max(1, len(positions) // _SAMPLED)]
