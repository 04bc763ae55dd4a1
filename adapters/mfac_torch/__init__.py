"""M-FAC pruning in PyTorch: recipes attached to a model and its optimizer.

Read in this order:

* ``manager``: :class:`ScheduledModifierManager`, the entry point: gradual and one-shot pruning, resume
* ``modifier``: the modifiers of a recipe as Python objects
* ``session``: what happens around each optimizer step
* ``live_pruning``: one pruning modifier at work on one model
* ``selection``: which parameters ``params`` means
* ``sampling``: :class:`GradSampler`, gradient samples outside the training loop
* ``masking``: pruned weights stay at exactly zero
* ``conversion``: tensors to arrays and back
"""

from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.modifier import (
    EpochRangeModifier,
    GMPruningModifier,
    MagnitudePruningModifier,
    MFACPruningModifier,
    SetLearningRateModifier,
)
from mfac_torch.sampling import GradSampler
from mfac_torch.selection import prunable_parameters, select_parameters

__all__ = [
    "EpochRangeModifier",
    "GMPruningModifier",
    "GradSampler",
    "MFACPruningModifier",
    "MagnitudePruningModifier",
    "ScheduledModifierManager",
    "SetLearningRateModifier",
    "prunable_parameters",
    "select_parameters",
]
