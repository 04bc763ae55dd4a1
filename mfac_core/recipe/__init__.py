"""Recipes: pruning runs as text.

:func:`load_recipe` turns YAML, or Markdown with a YAML front matter, into checked settings; :func:`recipe_text` turns
settings into YAML.
"""

from mfac_core.recipe.formats import Settings
from mfac_core.recipe.loading import Recipe, load_recipe
from mfac_core.recipe.modifiers import settings_from_keys
from mfac_core.recipe.naming import display_name, modifier_name, named_in_errors
from mfac_core.recipe.writing import recipe_text
from mfac_core.settings.training import EpochRange, SetLearningRate

__all__ = [
    "EpochRange",
    "Recipe",
    "SetLearningRate",
    "Settings",
    "load_recipe",
    "modifier_name",
    "display_name",
    "named_in_errors",
    "recipe_text",
    "settings_from_keys",
]
