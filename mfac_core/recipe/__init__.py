"""Recipes: pruning runs as text.

:func:`load_recipe` turns YAML, or Markdown with a YAML front matter, into checked settings.
"""

from mfac_core.recipe.loading import Recipe, load_recipe
from mfac_core.recipe.modifiers import EpochRange, SetLearningRate

__all__ = ["EpochRange", "Recipe", "SetLearningRate", "load_recipe"]
