"""What an optimizer is made of: the optimizers inside it, and what they remember of each variable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["average_of", "innermost", "optimizer_state", "set_weight_decay", "state_to_reset", "trained_by"]


def innermost(optimizer: Any) -> list[Any]:
    """Return the optimizers that update variables themselves.

    Args:
        optimizer: A Keras optimizer: plain, a ``LossScaleOptimizer``, a ``MultiOptimizer``, or one around another.

    Returns:
        The plain optimizers inside, or the optimizer itself.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return innermost(inner)
    several = getattr(optimizer, "optimizers", None)
    return [leaf for each in several for leaf in innermost(each)] if several else [optimizer]


def trained_by(optimizer: Any) -> list[Any]:
    """Return the variables that an innermost optimizer was built for.

    Args:
        optimizer: One of :func:`innermost`.

    Returns:
        The variables in its order; none before it is built.
    """
    return list(optimizer._trainable_variables)


def optimizer_state(optimizer: Any, variable: Any) -> Iterator[Any]:
    """Yield what an innermost optimizer remembers of a variable: momentum, moments, averages, accumulated gradients.

    Args:
        optimizer: One of :func:`innermost`, built.
        variable: A variable that it trains.

    Yields:
        Optimizer variables of the variable's own shape.
    """
    place = _place(optimizer, variable)
    if place is None:
        return
    count = len(trained_by(optimizer))
    slot: Any
    for name, value in list(vars(optimizer).items()):
        if isinstance(value, dict):  # Muon of Keras 3.12
            slot = value.get(variable.path)
        elif name != "_variables" and isinstance(value, list | tuple) and len(value) == count:
            slot = value[place]
        else:
            continue
        is_slot = slot is not None and slot is not variable and hasattr(slot, "assign")
        if is_slot and tuple(slot.shape) == tuple(variable.shape):
            yield slot


def state_to_reset(optimizer: Any, variables: Iterable[Any]) -> Iterator[Any]:
    """Yield the state that an optimizer keeps of variables, except for moving averages of the variables themselves.

    Args:
        optimizer: A Keras optimizer, plain or not, built.
        variables: Variables that it trains.
    """
    for variable in variables:
        for leaf in innermost(optimizer):
            average = average_of(leaf, variable)
            yield from (slot for slot in optimizer_state(leaf, variable) if slot is not average)


def average_of(optimizer: Any, variable: Any) -> Any:
    """Return the moving average that an innermost optimizer keeps of a variable.

    Args:
        optimizer: One of :func:`innermost`, built.
        variable: A variable that it trains.

    Returns:
        The optimizer variable, or ``None`` where there is none.
    """
    place = _place(optimizer, variable)
    averages = getattr(optimizer, "_model_variables_moving_average", None) if optimizer.use_ema else None
    return None if place is None or averages is None else averages[place]


def set_weight_decay(optimizer: Any, value: float | None) -> None:
    """Set the weight decay of an innermost optimizer; a compiled training step does not see it.

    Args:
        optimizer: One of :func:`innermost`.
        value: The weight decay; ``None`` for none.
    """
    optimizer.weight_decay = value
    if hasattr(optimizer, "adam_weight_decay"):  # Muon trains some variables as Adam does
        optimizer.adam_weight_decay = value


def _place(optimizer: Any, variable: Any) -> int | None:
    return next((place for place, each in enumerate(trained_by(optimizer)) if each is variable), None)
