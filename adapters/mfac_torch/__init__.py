"""M-FAC pruning in PyTorch: recipes attached to a model and its optimizer.

``manager`` and ``one_shot`` are the entry points; docs/design.md lists all modules.
"""

from mfac_core import backends
from mfac_core.fisher import kernels
from mfac_torch.array_backend import TorchBackend
from mfac_torch.array_kernels import KERNELS
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

# tensors are arrays of the core from now on
backends.register(TorchBackend())
kernels.register(TorchBackend.name, KERNELS)
