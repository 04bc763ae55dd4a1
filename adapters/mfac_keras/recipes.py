"""From what the user passes, a recipe or its keys, to settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from mfac_core.errors import RecipeError
from mfac_core.recipe import Recipe, load_recipe, settings_from_keys
from mfac_core.schedules.one_shot import NOTHING_TO_DO
from mfac_core.settings.training import EpochRange

__all__ = ["modifiers_of"]


def modifiers_of(
    recipe: str | os.PathLike[str] | Recipe | None,
    keys: Mapping[str, Any],
    variables: Mapping[str, object] | None,
    unsupported: Literal["error", "skip"] = "error",
) -> tuple[Any, ...]:
    """Return the settings of each modifier.

    Raises:
        TypeError: If there is neither a recipe nor keys, or both.
        RecipeError: If the recipe is wrong, or does nothing.
    """
    if (recipe is None) == (not keys):
        given = "a recipe and keys of one" if keys else "neither a recipe nor keys of one"
        raise TypeError(
            f"got {given}; pass a path, a text or a Recipe, or else keys such as final_sparsity=0.9, end_epoch=8"
        )
    if recipe is not None and not isinstance(recipe, str | os.PathLike | Recipe):
        raise TypeError(
            f"recipe is a {type(recipe).__name__}; pass a path, a text or a Recipe, or the keys of one as keywords, "
            "such as final_sparsity=0.9"
        )
    if recipe is None:
        modifiers: tuple[Any, ...] = (settings_from_keys("MFACPruningModifier", keys),)
    else:
        modifiers = (recipe if isinstance(recipe, Recipe) else load_recipe(recipe, variables, unsupported)).modifiers
    if all(isinstance(modifier, EpochRange) for modifier in modifiers):
        raise RecipeError(NOTHING_TO_DO)
    return modifiers
