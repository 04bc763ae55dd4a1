"""The optimizers inside an optimizer, and the state that each keeps for a variable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["average_of", "innermost", "optimizer_state", "set_weight_decay", "state_to_reset", "trained_by"]


def innermost(optimizer: Any) -> list[Any]:
    """Return the optimizers that update variables themselves.

    These are inside a ``LossScaleOptimizer``, a ``MultiOptimizer`` or another wrapper; for a plain optimizer, only
    itself.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return innermost(inner)
    several = getattr(optimizer, "optimizers", None)
    return [leaf for each in several for leaf in innermost(each)] if several else [optimizer]


def trained_by(optimizer: Any) -> list[Any]:
    """Return the variables that an innermost optimizer was built for, in its order; none before it is built."""
    return list(optimizer._trainable_variables)


def optimizer_state(optimizer: Any, variable: Any) -> Iterator[Any]:
    """Yield the state that an innermost, built optimizer keeps for a variable, as far as it has the variable's shape.

    These are momentum, moments, averages and accumulated gradients. Keras has no public access to them: optimizers keep
    them as attributes, in lists in the order of the variables, or in dictionaries by path.
    """
    index = _index(optimizer, variable)
    if index is None:
        return
    count = len(trained_by(optimizer))
    slot: Any
    for name, value in list(vars(optimizer).items()):
        if isinstance(value, dict):  # Muon of Keras 3.12
            slot = value.get(variable.path)
        elif name != "_variables" and isinstance(value, list | tuple) and len(value) == count:
            slot = value[index]
        else:
            continue
        is_slot = slot is not None and slot is not variable and hasattr(slot, "assign")
        if is_slot and tuple(slot.shape) == tuple(variable.shape):
            yield slot


def state_to_reset(optimizer: Any, variables: Iterable[Any]) -> Iterator[Any]:
    """Yield the state that a built optimizer, plain or not, keeps for variables, without averages of the variables."""
    for variable in variables:
        for leaf in innermost(optimizer):
            average = average_of(leaf, variable)
            yield from (slot for slot in optimizer_state(leaf, variable) if slot is not average)


def average_of(optimizer: Any, variable: Any) -> Any:
    """Return the moving average that an innermost, built optimizer keeps of a variable, or ``None``."""
    index = _index(optimizer, variable)
    averages = getattr(optimizer, "_model_variables_moving_average", None) if optimizer.use_ema else None
    return None if index is None or averages is None else averages[index]


def set_weight_decay(optimizer: Any, value: float | None) -> None:
    """Set the weight decay of an innermost optimizer, ``None`` for none; a compiled training step does not see it."""
    optimizer.weight_decay = value
    if hasattr(optimizer, "adam_weight_decay"):  # Muon trains some variables as Adam does
        optimizer.adam_weight_decay = value


def _index(optimizer: Any, variable: Any) -> int | None:
    return next((index for index, each in enumerate(trained_by(optimizer)) if each is variable), None)
