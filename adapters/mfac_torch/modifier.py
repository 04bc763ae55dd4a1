"""The modifiers of a recipe as Python objects: what to prune or to set, when and how."""

from __future__ import annotations

from textwrap import indent
from typing import Any, Self

import yaml

from mfac_core.errors import RecipeError
from mfac_core.recipe import EpochRange, SetLearningRate, load_recipe
from mfac_core.settings import MagnitudeSettings, MFACSettings, PruningSettings

__all__ = [
    "EpochRangeModifier",
    "GMPruningModifier",
    "MFACPruningModifier",
    "MagnitudePruningModifier",
    "Modifier",
    "PruningModifier",
    "SetLearningRateModifier",
    "Settings",
    "modifier_for",
]

Settings = PruningSettings | EpochRange | SetLearningRate
"""What a modifier carries: one entry of a loaded recipe."""


class Modifier:
    """One entry of a recipe. The subclasses carry the names that recipes use.

    Args:
        **recipe_keys: The keys and values that a recipe would give, such as ``final_sparsity=0.85``.

    Attributes:
        settings: What the keys mean, checked.

    Raises:
        RecipeError: If a key is unknown, missing or out of range, as for a recipe.
        TypeError: If a value is of a type that a recipe cannot hold.
    """

    settings: Settings

    def __init__(self, **recipe_keys: Any) -> None:
        self.settings = _settings_from_keys(type(self).__name__, recipe_keys)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the modifier with these settings.

        Args:
            settings: The settings, in the terms of the code.

        Returns:
            The modifier.
        """
        modifier = cls.__new__(cls)
        modifier.settings = settings
        return modifier

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


class PruningModifier(Modifier):
    """A modifier that prunes."""

    settings: PruningSettings


class MFACPruningModifier(PruningModifier):
    """Prune by M-FAC.

    Args:
        **recipe_keys: ``params``, ``init_sparsity``, ``final_sparsity``, ``start_epoch``, ``end_epoch``,
            ``update_frequency``, ``inter_func``, ``mask_type``, ``leave_enabled``, ``global_sparsity``, ``num_grads``,
            ``fisher_block_size``, ``damp``, ``available_gpus``, ``grads_device``, ``update``.

    Example:
        >>> modifier = MFACPruningModifier(final_sparsity=0.85, end_epoch=61.0, num_grads={0.0: 256, 0.5: 512})
        >>> modifier.settings.num_gradients
        {0.0: 256, 0.5: 512}
    """


class MagnitudePruningModifier(PruningModifier):
    """Prune by magnitude, within each layer.

    Args:
        **recipe_keys: ``params``, ``init_sparsity``, ``final_sparsity``, ``start_epoch``, ``end_epoch``,
            ``update_frequency``, ``inter_func``, ``mask_type``, ``leave_enabled``.
    """


class GMPruningModifier(MagnitudePruningModifier):
    """Prune by magnitude, within each layer or over all of them.

    Args:
        **recipe_keys: Those of :class:`MagnitudePruningModifier`, and ``global_sparsity``.
    """


class EpochRangeModifier(Modifier):
    """Say how long to train; only ``max_epochs`` of the manager depends on it.

    Args:
        **recipe_keys: ``start_epoch``, ``end_epoch``.
    """

    settings: EpochRange


class SetLearningRateModifier(Modifier):
    """Set the learning rate of every parameter group once, when its epoch arrives.

    Args:
        **recipe_keys: ``learning_rate``, ``start_epoch``.
    """

    settings: SetLearningRate


_CLASSES: dict[type, type[Modifier]] = {
    MFACSettings: MFACPruningModifier,
    MagnitudeSettings: GMPruningModifier,
    EpochRange: EpochRangeModifier,
    SetLearningRate: SetLearningRateModifier,
}


def modifier_for(settings: Settings) -> Modifier:
    """Return the modifier that carries these settings.

    Args:
        settings: One of a loaded recipe's ``modifiers``.

    Returns:
        The modifier.
    """
    return _CLASSES[type(settings)].from_settings(settings)


def _settings_from_keys(name: str, keys: dict[str, Any]) -> Any:
    # Written out as a recipe, so that one table of keys serves both.
    lines = "".join(_as_yaml(name, key, value) for key, value in keys.items()) or "{}"
    try:
        return load_recipe(f"modifiers:\n- !{name}\n{indent(lines, '  ')}\n").modifiers[0]
    except RecipeError as error:
        _, _, message = str(error).partition(": ")  # without the line of the written-out recipe
        raise RecipeError(message) from error


def _as_yaml(name: str, key: str, value: object) -> str:
    try:
        return yaml.safe_dump({key: value})
    except yaml.representer.RepresenterError as error:
        raise TypeError(
            f"{name}: {key}={value!r} is a {type(value).__name__}; write a number, string, boolean, list or dictionary"
        ) from error
