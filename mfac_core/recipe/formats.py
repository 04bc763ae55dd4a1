"""The modifiers that a recipe can have: the settings, keys and defaults of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mfac_core.recipe.keys import (
    ACDC_KEYS,
    CONSTANT_KEYS,
    EPOCH_RANGE_KEYS,
    GRADUAL_KEYS,
    LEARNING_RATE_FUNCTION_KEYS,
    LEARNING_RATE_KEYS,
    LEARNING_RATE_SCHEDULE_KEYS,
    MFAC_KEYS,
    MFAC_OPTIONS,
    SCOPE,
    TRAINABLE_KEYS,
    WEIGHT_DECAY_KEYS,
    Key,
    fixed,
)
from mfac_core.settings.pruning import (
    ACDCSettings,
    ConstantSettings,
    MagnitudeSettings,
    MFACSettings,
    PruningSettings,
)
from mfac_core.settings.training import (
    EpochRange,
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
    TrainingSettings,
)

__all__ = ["MODIFIERS", "Absent", "ModifierFormat", "Settings", "is_unsupported"]

Settings = PruningSettings | TrainingSettings
"""The settings of one modifier."""


class Absent(NamedTuple):
    """A log message for a key that is not given.

    Attributes:
        key: The key.
        note: What its absence means.
        if_number: Another key, if the absence matters only when that one is given as a number.
    """

    key: str
    note: str
    if_number: str = ""


@dataclass(frozen=True)
class ModifierFormat:
    """How a modifier is written in a recipe.

    Args:
        settings: The class of its settings.
        keys: Recipe key -> meaning.
        required: Keys that must be given.
        defaults: Field of the settings -> its default, if the settings class has another.
        nested: Key under which some of the keys may be given instead (``mfac_options``) -> those keys.
        absent: What to log for keys that are not given.
    """

    settings: type[Settings]
    keys: Mapping[str, Key]
    required: tuple[str, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)
    nested: Mapping[str, frozenset[str]] = field(default_factory=dict)
    absent: tuple[Absent, ...] = ()


_GRADUAL = ("final_sparsity", "end_epoch")
_NOT_GLOBAL = fixed(False, "does not fit; write !GlobalMagnitudePruningModifier for one threshold over all layers")
_NOT_LAYERED = fixed(True, "does not fit: this modifier always prunes over all layers; write the one without Global")
_BY_MAGNITUDE = fixed(
    "magnitude", "is not supported here; write !MFACPruningModifier for M-FAC; other scores are not supported"
)
_BY_MFAC = fixed("MFAC", "does not fit: this modifier always prunes by M-FAC; write !MagnitudePruningModifier instead")

MODIFIERS: Mapping[str, ModifierFormat] = {
    "MFACPruningModifier": ModifierFormat(
        settings=MFACSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": SCOPE, **MFAC_KEYS, "score_type": _BY_MFAC},
        required=_GRADUAL,
        nested={"mfac_options": frozenset(MFAC_OPTIONS)},
    ),
    "MFACGlobalPruningModifier": ModifierFormat(
        settings=MFACSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": _NOT_LAYERED, **MFAC_KEYS, "score_type": _BY_MFAC},
        required=_GRADUAL,
        defaults={"scope": "global"},
        nested={"mfac_options": frozenset(MFAC_OPTIONS)},
    ),
    "OBSPruningModifier": ModifierFormat(
        settings=MFACSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": SCOPE, **MFAC_KEYS},
        required=_GRADUAL,
        defaults={
            "scope": "global",
            "num_gradients": 1024,
            "block_size": 1,
            "damping": 1e-7,
            "recomputation_spacing": "linear",
        },
        absent=(
            Absent(
                "fisher_block_size",
                "defaults to 1 for this modifier, which makes the Fisher matrix diagonal; the recipes of oBERT use 50",
            ),
            Absent(
                "recomputation_spacing",
                "defaults to linear for this modifier; geometric, which shrinks what is left by equal factors, is more "
                "accurate at high sparsity",
                if_number="num_recomputations",
            ),
        ),
    ),
    "MagnitudePruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": _NOT_GLOBAL, "score_type": _BY_MAGNITUDE},
        required=_GRADUAL,
    ),
    "GMPruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": SCOPE, "score_type": _BY_MAGNITUDE},
        required=_GRADUAL,
    ),
    "GlobalMagnitudePruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": _NOT_LAYERED, "score_type": _BY_MAGNITUDE},
        required=_GRADUAL,
        defaults={"scope": "global"},
    ),
    "ConstantPruningModifier": ModifierFormat(settings=ConstantSettings, keys=CONSTANT_KEYS, required=()),
    "ACDCPruningModifier": ModifierFormat(
        settings=ACDCSettings, keys=ACDC_KEYS, required=("compression_sparsity", "end_epoch")
    ),
    "EpochRangeModifier": ModifierFormat(settings=EpochRange, keys=EPOCH_RANGE_KEYS, required=("end_epoch",)),
    "SetLearningRateModifier": ModifierFormat(
        settings=SetLearningRate, keys=LEARNING_RATE_KEYS, required=("learning_rate",)
    ),
    "LearningRateFunctionModifier": ModifierFormat(
        settings=LearningRateFunction,
        keys=LEARNING_RATE_FUNCTION_KEYS,
        required=("lr_func", "init_lr", "final_lr", "end_epoch"),
    ),
    "LearningRateModifier": ModifierFormat(
        settings=LearningRateSchedule,
        keys=LEARNING_RATE_SCHEDULE_KEYS,
        required=("lr_class", "lr_kwargs", "init_lr"),
    ),
    "SetWeightDecayModifier": ModifierFormat(
        settings=SetWeightDecay, keys=WEIGHT_DECAY_KEYS, required=("weight_decay",)
    ),
    "TrainableParamsModifier": ModifierFormat(settings=TrainableParams, keys=TRAINABLE_KEYS, required=("params",)),
}
"""Name of a modifier in recipes -> how it is written."""

_UNSUPPORTED = frozenset(
    {
        "ASRegModifier",
        "ActivationSparsityModifier",
        "AdaPruneModifier",
        "DistillationModifier",
        "GPTQModifier",
        "GradualParamModifier",
        "LayerPruningModifier",
        "LayerThinningModifier",
        "LegacyGMPruningModifier",
        "LegacyQuantizationModifier",
        "LogarithmicEqualizationModifier",
        "LoggingModifier",
        "MovementPruningModifier",
        "OutputDistillationModifier",
        "PerLayerDistillationModifier",
        "PowerpropagationModifier",
        "QuantizationModifier",
        "RigLPruningModifier",
        "SetParamModifier",
        "SmoothQuantModifier",
        "SparseGPTModifier",
        "SparseLlamaModifier",
        "SparseMPTModifier",
        "SparseOPTModifier",
        "SparsifyingThinningModifier",
        "StructuredPruningModifier",
        "TopKASTPruningModifier",
        "WandaPruningModifier",
        "vLLMQuantizationModifier",
    }
)


def is_unsupported(name: str) -> bool:
    """Return whether a modifier of SparseML is known and refused: it prunes by another method, or does not prune."""
    return name in _UNSUPPORTED
