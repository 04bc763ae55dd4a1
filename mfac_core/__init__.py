"""Second-order (M-FAC) pruning of neural networks, on plain arrays.

Start with :func:`prune` for one-shot pruning, and with :class:`MFACPruner` inside a training loop.
The packages ``mfac_torch`` and ``mfac_keras`` connect this core to their frameworks.
"""

from mfac_core.errors import DeviceError, IllConditionedError, MemoryBudgetError, RankError, RecipeError, SettingError
from mfac_core.fisher.inverse import inverse_fisher
from mfac_core.fisher.obs import saliency
from mfac_core.layer_sensitivity import Sensitivity, sensitivity
from mfac_core.one_shot import prune
from mfac_core.pruners import ACDCPruner, ConstantPruner, MagnitudePruner, MFACPruner, make_pruner
from mfac_core.pruners.step import PruneResult
from mfac_core.recipe import Recipe, load_recipe
from mfac_core.settings.pruning import FROM_PARAM, ACDCSettings, ConstantSettings, MagnitudeSettings, MFACSettings

__version__ = "0.1.0"

__all__ = [
    # One-shot, on plain arrays
    "prune",
    "PruneResult",
    "inverse_fisher",
    "saliency",
    "sensitivity",
    "Sensitivity",
    # Gradual, inside a training loop
    "make_pruner",
    "MFACPruner",
    "MagnitudePruner",
    "ACDCPruner",
    "ConstantPruner",
    "MFACSettings",
    "MagnitudeSettings",
    "ACDCSettings",
    "ConstantSettings",
    "FROM_PARAM",
    # Recipes
    "load_recipe",
    "Recipe",
    # Errors
    "DeviceError",
    "IllConditionedError",
    "MemoryBudgetError",
    "RankError",
    "RecipeError",
    "SettingError",
    # About
    "__version__",
]
