"""M-FAC pruning in PyTorch: recipes attached to a model and its optimizer.

Read in this order:

* ``manager``: :class:`ScheduledModifierManager`, the entry point: gradual and one-shot pruning, resuming
* ``one_shot``: :func:`prune_one_shot`, one-shot pruning in one call
* ``modifier``, ``modifier_list``: the modifiers of a recipe as Python objects
* ``conditions``: checks of arguments before anything is changed
* ``session``: hooks around each optimizer step
* ``live_pruning``: one pruning modifier at work on one model
* ``training_changes``: learning rates, weight decay, which parameters are trained
* ``wrappers``: the model inside its wrappers
* ``selection``, ``layout``: the parameters that ``params`` matches, and the order of their axes
* ``sampling``: :class:`GradSampler`, gradient samples outside the training loop
* ``batches``, ``evaluation``: how it calls a model, and leaves it as it was
* ``batchnorm``: :func:`recalibrate_batchnorm`, running statistics for the current weights
* ``layer_sensitivity``: :func:`sensitivity`, how much sparsity each parameter tolerates
* ``masking``: masks that keep pruned weights at exactly zero
* ``optimizer_state``: optimizer state, reset at pruned weights
* ``write_monitor``: writes to pruned weights by other code
* ``zeros``: zeros counted from the weights; :func:`apply_masks` for averaged copies
* ``finalization``: weights compared with masks at the end of a run
* ``random_state``: random number generators, for resumed runs
* ``checkpoint``: model, optimizers and manager in one file
* ``tensor_files``: files of tensors, whole after a kill
* ``scalar_loggers``: TensorBoard and the like
* ``conversion``: tensors to arrays and back
* ``scheduled_optimizer``: :func:`ScheduledOptimizer`, for scripts that use it
* ``digits``, ``demo``: what ``mfac demo`` runs
* ``export``, ``lightning``, ``transformers``: imported only on request
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
