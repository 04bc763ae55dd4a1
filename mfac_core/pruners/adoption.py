"""Transfers a saved state to a pruner with other weights in scope, after layers were frozen or unfrozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mfac_core.backends import Array, device_of
from mfac_core.state_checks import checked_array, checked_integer
from mfac_core.weight_names import join_names

__all__ = ["Adoption", "adopt"]


class Adoption(NamedTuple):
    """A state for the weights in scope now.

    Attributes:
        state: For ``load_state_dict`` of the pruner.
        joined: Names of weights that came into scope after the state was saved.
        left: Names of weights that left scope.
    """

    state: Mapping[str, Any]
    joined: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def difference(self) -> str:
        """Return in one sentence how the scope has changed; empty if it has not."""
        changes = []
        if self.joined:
            is_over = self.state["pruning_steps_done"] >= len(self.state["schedule"])
            later = "no pruning step is left for them" if is_over else "the next pruning step prunes them too"
            changes.append(f"{join_names(self.joined)} came into scope ({later})")
        if self.left:
            changes.append(f"{join_names(self.left)} left it (their masks are released)")
        return (
            f"since the state was saved, {' and '.join(changes)}; the gradient window starts empty" if changes else ""
        )


def adopt(state: Mapping[str, Any], fresh: Mapping[str, Any], weights: Mapping[str, Array]) -> Adoption:
    """Adapt the state of a pruner to other weights in scope: masks are matched by name.

    Weights that have come into scope start unpruned, and the next pruning step prunes them to its sparsity with the
    others: sparsities count all zeros of a layer, or of the whole scope. A constant mask keeps their zeros. Initial
    sparsities per layer are measured again.

    Args:
        state: What ``state_dict`` of the earlier pruner returned.
        fresh: What ``state_dict`` of the pruner that resumes returns before its first pruning step.
        weights: Name and array of each weight in scope now.

    Returns:
        The state for that pruner, which may still refuse it; ``state`` itself if both scopes are the same, or have
        nothing in common.

    Raises:
        ValueError: If the state is broken.

    Example:
        >>> from mfac_core import MagnitudeSettings, make_pruner
        >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1)
        >>> head, base = np.array([1.0, 2.0]), np.array([3.0, 4.0])
        >>> before = make_pruner(settings, {"head": head}, steps_per_epoch=1).state_dict()
        >>> now = {"base": base, "head": head}
        >>> adopt(before, make_pruner(settings, now, steps_per_epoch=1).state_dict(), now).joined
        ('base',)
    """
    saved, own = state.get("masks"), fresh["masks"]
    if not isinstance(saved, Mapping):
        return Adoption(state)
    joined = tuple(name for name in own if name not in saved)
    left = tuple(name for name in saved if name not in own)
    if not (joined or left) or len(joined) == len(own):
        return Adoption(state)
    holds_zeros = state.get("method") == "ConstantPruner" and state.get("pruning_steps_done") == 1
    masks = {
        name: saved[name] if name in saved else _nonzero(weights[name]) if holds_zeros else mask
        for name, mask in own.items()
    }
    adopted = {**state, "masks": masks} | ({"window": None} if "window" in state else {})
    measured = fresh.get("initial_sparsities")
    if measured is not None and len(measured) == len(own) and _at_the_same_epochs(state, fresh):
        for key in ("initial_sparsities", "schedule", "steps_per_epoch"):
            adopted[key] = fresh[key]
    return Adoption(adopted, joined, left)


def _nonzero(weights: Array) -> Any:
    return device_of(weights).to_numpy(weights) != 0


def _at_the_same_epochs(state: Mapping[str, Any], fresh: Mapping[str, Any]) -> bool:
    epochs, rounding = [], 0.0
    for each in (state, fresh):
        length = checked_integer("steps_per_epoch", each.get("steps_per_epoch", fresh["steps_per_epoch"]), at_least=1)
        epochs.append(checked_array("schedule", each.get("schedule"), np.float64, 2)[:, 0] / length)
        rounding += 0.51 / length
    return len(epochs[0]) == len(epochs[1]) and bool((abs(epochs[0] - epochs[1]) <= rounding).all())
