"""Hold masks: keep pruned weights at exactly zero while an optimizer moves the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from mfac_core.backends import Array
from mfac_torch.conversion import to_tensor
from mfac_torch.sharded import local, local_part

__all__ = ["HeldMasks"]

_NUM_PROBES = 8
"""Pruned weights of a parameter that :meth:`HeldMasks.seems_regrown` reads."""


class HeldMasks:
    """The masks of one pruning modifier, on the devices of their parameters; of a sharded one, those of this rank.

    Methods that take ``names`` apply to the parameters of these names, or to all if it is None.

    Args:
        parameters: The parameters in scope by name; changed in place, and only at pruned entries.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._pruned: dict[str, torch.Tensor] = {}
        self._probes: dict[str, torch.Tensor] = {}  # positions of a few pruned weights in the flattened parameter

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks by parameter name, True keeps; empty before the first pruning step."""
        return {name: ~pruned for name, _, pruned in self._entries()}

    @property
    def pruned(self) -> dict[str, torch.Tensor]:
        """The complements of the masks by parameter name, True where pruned; not copies."""
        return {name: pruned for name, _, pruned in self._entries()}

    def hold(self, masks: Mapping[str, Array]) -> None:
        """Replace the masks by new ones: boolean arrays by parameter name and of its full shape, True keeps."""
        self._pruned = {
            name: ~local_part(to_tensor(mask), self._parameters[name]).to(self._parameters[name].device, torch.bool)
            for name, mask in masks.items()
        }
        self._probes = {name: _probe_positions(pruned).cpu() for name, pruned in self._pruned.items()}

    def release(self) -> None:
        """Drop all masks."""
        self._pruned, self._probes = {}, {}

    def zero_gradients(self, names: Collection[str] | None = None) -> None:
        """Set the gradients of pruned entries to zero, so that optimizers accumulate no momentum for them.

        Raises:
            TypeError: If a gradient is sparse.
        """
        for name, parameter, pruned in self._entries(names):
            if parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {name} is sparse, which is not supported; create its layer with sparse=False "
                    "or remove it from params"
                )
            local(parameter.grad).masked_fill_(pruned, 0.0)

    def zero_weights(self, names: Collection[str] | None = None) -> None:
        """Set pruned weights to exactly ``+0.0``."""
        for _, parameter, pruned in self._entries(names):
            local(parameter).masked_fill_(pruned, 0.0)

    def parameters(self, names: Collection[str] | None = None) -> list[nn.Parameter]:
        """Return the parameters that have masks."""
        return [parameter for _, parameter, _ in self._entries(names)]

    def has_regrown(self, names: Collection[str] | None = None) -> bool:
        """Return whether any pruned weight is not zero, computed on the devices of the weights."""
        found: dict[torch.device, torch.Tensor] = {}
        for _, parameter, pruned in self._entries(names):
            regrown = (local(parameter) != 0).logical_and_(pruned).any()
            before = found.get(regrown.device)
            found[regrown.device] = regrown if before is None else before | regrown
        return any(map(bool, found.values()))  # one synchronization per device

    def seems_regrown(self, names: Collection[str] | None = None) -> bool:
        """Return whether one of a few pruned weights is not zero; in host memory only, where reading them is cheap."""
        return any(
            bool(local(parameter).take(self._probes[name]).any())
            for name, parameter, pruned in self._entries(names)
            if pruned.device.type == "cpu"
        )

    def _entries(self, names: Collection[str] | None = None) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
        for name, pruned in self._pruned.items():
            if names is not None and name not in names:
                continue
            parameter = self._parameters[name]
            if pruned.device != parameter.device:  # the model has moved since the last call
                self._pruned[name] = pruned.to(parameter.device)
            yield name, parameter, self._pruned[name]


def _probe_positions(pruned: torch.Tensor) -> torch.Tensor:
    positions = pruned.flatten().nonzero().flatten()
    return positions[:: max(1, len(positions) // _NUM_PROBES)]
