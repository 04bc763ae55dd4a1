"""M-FAC pruning in PyTorch: recipes attached to a model and its optimizer.

Read in this order:

* ``manager``: :class:`ScheduledModifierManager`, the entry point: gradual and one-shot pruning, resume
* ``one_shot``: :func:`prune_one_shot`, without training, in one call
* ``modifier``, ``modifier_list``: the modifiers of a recipe as Python objects
* ``conditions``: what is checked, and what is said, before anything is changed
* ``session``: what happens around each optimizer step
* ``live_pruning``: one pruning modifier at work on one model
* ``training_changes``: learning rates, weight decay, which parameters are trained
* ``wrappers``: the model inside what holds it
* ``selection``, ``layout``: which parameters ``params`` means, and the order of their axes
* ``sampling``: :class:`GradSampler`, gradient samples outside the training loop
* ``batchnorm``: :func:`recalibrate_batchnorm`, running statistics for the weights that there are now
* ``layer_sensitivity``: :func:`sensitivity`, how much sparsity each parameter tolerates
* ``masking``: pruned weights stay at exactly zero
* ``optimizer_state``: what optimizers remember of pruned weights
* ``outside_changes``: what others do to these weights between two steps
* ``zeros``: zeros counted from the weights; :func:`apply_masks` for averaged copies
* ``random_state``: random number generators, for resumed runs
* ``checkpoint``: a resumed run's files, whole after a kill
* ``scalar_loggers``: TensorBoard and the like
* ``conversion``: tensors to arrays and back
* ``scheduled_optimizer``: :func:`ScheduledOptimizer`, for scripts that call it
* ``digits``, ``demo``: what ``mfac demo`` runs
* ``export``, ``lightning``, ``transformers``: imported only when asked for
"""

from mfac_torch.batchnorm import recalibrate_batchnorm
from mfac_torch.layer_sensitivity import sensitivity
from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.modifier import (
    ACDCPruningModifier,
    ConstantPruningModifier,
    EpochRangeModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    LearningRateFunctionModifier,
    LearningRateModifier,
    MagnitudePruningModifier,
    MFACGlobalPruningModifier,
    MFACPruningModifier,
    OBSPruningModifier,
    SetLearningRateModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
)
from mfac_torch.one_shot import prune_one_shot
from mfac_torch.optimizer_state import declare_elementwise_state
from mfac_torch.sampling import GradSampler
from mfac_torch.scheduled_optimizer import ScheduledOptimizer
from mfac_torch.selection import prunable_parameters, select_parameters
from mfac_torch.zeros import apply_masks

__all__ = [
    "ACDCPruningModifier",
    "ConstantPruningModifier",
    "EpochRangeModifier",
    "GMPruningModifier",
    "GlobalMagnitudePruningModifier",
    "GradSampler",
    "LearningRateFunctionModifier",
    "LearningRateModifier",
    "MFACGlobalPruningModifier",
    "MFACPruningModifier",
    "MagnitudePruningModifier",
    "OBSPruningModifier",
    "ScheduledModifierManager",
    "ScheduledOptimizer",
    "SetLearningRateModifier",
    "SetWeightDecayModifier",
    "TrainableParamsModifier",
    "apply_masks",
    "declare_elementwise_state",
    "prunable_parameters",
    "prune_one_shot",
    "recalibrate_batchnorm",
    "select_parameters",
    "sensitivity",
]
