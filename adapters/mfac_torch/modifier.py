"""The modifiers of a recipe as Python objects."""

from __future__ import annotations

import math
from typing import Any, Self

from torch import nn

from mfac_core.recipe import display_name, settings_from_keys
from mfac_core.settings.pruning import ACDCSettings, ConstantSettings, MagnitudeSettings, MFACSettings, PruningSettings
from mfac_core.settings.training import (
    EpochRange,
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
    TrainingSettings,
)
from mfac_torch.selection import sparse_parameters

__all__ = [
    "ACDCPruningModifier",
    "ConstantPruningModifier",
    "EpochRangeModifier",
    "GMPruningModifier",
    "GlobalMagnitudePruningModifier",
    "LearningRateFunctionModifier",
    "LearningRateModifier",
    "MFACGlobalPruningModifier",
    "MFACPruningModifier",
    "MagnitudePruningModifier",
    "Modifier",
    "OBSPruningModifier",
    "PruningModifier",
    "SetLearningRateModifier",
    "SetWeightDecayModifier",
    "Settings",
    "TrainableParamsModifier",
    "modifier_for",
]

Settings = PruningSettings | TrainingSettings
"""The settings of a modifier: one entry of a loaded recipe."""


class Modifier:
    """One entry of a recipe. The subclasses have the names that recipes use.

    Args:
        **recipe_keys: The keys and values of a recipe, such as ``final_sparsity=0.85``.

    Attributes:
        settings: The settings that the keys stand for.

    Raises:
        RecipeError: If a key is unknown, missing or out of range.
    """

    settings: Settings

    def __init__(self, **recipe_keys: Any) -> None:
        self.settings = settings_from_keys(type(self).__name__, recipe_keys)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the modifier with these settings.

        Args:
            settings: The settings.

        Returns:
            The modifier.
        """
        modifier = cls.__new__(cls)
        modifier.settings = settings
        return modifier

    @property
    def start_epoch(self) -> float:
        """Epoch at which the modifier begins."""
        return self.settings.start_epoch

    @property
    def end_epoch(self) -> float:
        """Epoch at which the modifier ends; -1.0, as in recipes, if it has no end."""
        end = getattr(self.settings, "end_epoch", math.inf)
        return -1.0 if end == math.inf else float(end)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


class PruningModifier(Modifier):
    """A modifier that prunes."""

    settings: PruningSettings


class MFACPruningModifier(PruningModifier):
    """Prune by M-FAC.

    Args:
        **recipe_keys: ``params``, ``exclude``, ``init_sparsity``, ``final_sparsity``, ``start_epoch``, ``end_epoch``,
            ``update_frequency``, ``inter_func``, ``mask_type``, ``leave_enabled``, ``global_sparsity``, ``num_grads``,
            ``fisher_block_size``, ``damp``, ``available_gpus``, ``grads_device``, ``grads_dtype``, ``update``,
            ``num_recomputations``, ``grad_sampler_kwargs``, ``use_gradient_buffering``.

    Example:
        >>> modifier = MFACPruningModifier(final_sparsity=0.85, end_epoch=61.0, num_grads={0.0: 256, 0.5: 512})
        >>> modifier.settings.num_gradients
        {0.0: 256, 0.5: 512}
    """

    settings: MFACSettings


class MFACGlobalPruningModifier(MFACPruningModifier):
    """Prune by M-FAC, with saliencies compared over all layers.

    Args:
        **recipe_keys: Those of :class:`MFACPruningModifier`.

    Example:
        >>> MFACGlobalPruningModifier(final_sparsity=0.9, end_epoch=10.0).settings.scope
        'global'
    """


class OBSPruningModifier(MFACPruningModifier):
    """Prune by M-FAC with the defaults of the Optimal BERT Surgeon: small blocks, many gradients, all layers.

    Args:
        **recipe_keys: Those of :class:`MFACPruningModifier`.

    Example:
        >>> OBSPruningModifier(final_sparsity=0.9, end_epoch=10.0, fisher_block_size=50).settings.num_gradients
        {0.0: 1024}
    """


class MagnitudePruningModifier(PruningModifier):
    """Prune by magnitude, within each layer.

    Args:
        **recipe_keys: ``params``, ``exclude``, ``init_sparsity``, ``final_sparsity``, ``start_epoch``, ``end_epoch``,
            ``update_frequency``, ``inter_func``, ``mask_type``, ``leave_enabled``.

    Example:
        >>> MagnitudePruningModifier(final_sparsity=0.9, end_epoch=10.0).settings.scope
        'layer'
    """

    settings: MagnitudeSettings


class GMPruningModifier(MagnitudePruningModifier):
    """Prune by magnitude, within each layer or globally.

    Args:
        **recipe_keys: Those of :class:`MagnitudePruningModifier`, and ``global_sparsity``.

    Example:
        >>> GMPruningModifier(final_sparsity=0.9, end_epoch=10.0, global_sparsity=True).settings.scope
        'global'
    """


class GlobalMagnitudePruningModifier(MagnitudePruningModifier):
    """Prune by magnitude, globally.

    Args:
        **recipe_keys: Those of :class:`MagnitudePruningModifier`.

    Example:
        >>> GlobalMagnitudePruningModifier(final_sparsity=0.9, end_epoch=10.0).settings.scope
        'global'
    """


class ConstantPruningModifier(PruningModifier):
    """Keep existing zeros, and prune nothing more.

    Args:
        **recipe_keys: ``params``, ``exclude``, ``start_epoch``, ``end_epoch``.

    Example:
        >>> ConstantPruningModifier(params=["re:.*weight"]).settings.params
        ('re:.*weight',)
    """

    settings: ConstantSettings

    @staticmethod
    def from_sparse_model(model: nn.Module) -> list[ConstantPruningModifier]:
        """Return modifiers that keep the zeros of a pruned model, for transfer learning.

        A weight counts as pruned if it has at least two axes, and more than 10% of it are zero, but not all; frozen
        weights and those that no optimizer trains are included. To hold zeros of biases and normalization layers,
        list them in ``params`` of a modifier of your own.

        Args:
            model: The model.

        Returns:
            One modifier for each pruned weight, whatever its layer.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            >>> _ = nn.init.zeros_(model[1].weight[0].detach())
            >>> [modifier.settings.params for modifier in ConstantPruningModifier.from_sparse_model(model)]
            [('1.weight',)]
        """
        return [
            ConstantPruningModifier.from_settings(ConstantSettings(params=(name,)))
            for name in sparse_parameters(model, warn=True)
        ]


class ACDCPruningModifier(PruningModifier):
    """Alternate between compressed and decompressed phases (AC/DC), by magnitude.

    Args:
        **recipe_keys: ``params``, ``exclude``, ``compression_sparsity``, ``start_epoch``, ``end_epoch``,
            ``update_frequency``, ``global_sparsity``, ``leave_enabled``, ``mask_type``, ``momentum_buffer_reset``.

    Example:
        >>> ACDCPruningModifier(compression_sparsity=0.9, end_epoch=10.0).settings.compression_sparsity
        0.9
    """

    settings: ACDCSettings


class EpochRangeModifier(Modifier):
    """Set how long to train; only ``max_epochs`` of the manager depends on it.

    Args:
        **recipe_keys: ``start_epoch``, ``end_epoch``.

    Example:
        >>> EpochRangeModifier(end_epoch=30.0).end_epoch
        30.0
    """

    settings: EpochRange


class SetLearningRateModifier(Modifier):
    """Set the learning rate once, when its epoch arrives.

    Args:
        **recipe_keys: ``learning_rate``, ``start_epoch``, ``param_groups``.

    Example:
        >>> SetLearningRateModifier(learning_rate=0.01, start_epoch=5.0).start_epoch
        5.0
    """

    settings: SetLearningRate


class LearningRateFunctionModifier(Modifier):
    """Move the learning rate along a curve, after each optimizer step.

    Args:
        **recipe_keys: ``lr_func``, ``init_lr``, ``final_lr``, ``start_epoch``, ``end_epoch``, ``cycle_epochs``,
            ``param_groups``.

    Example:
        >>> LearningRateFunctionModifier(lr_func="linear", init_lr=0.1, final_lr=0.0, end_epoch=10.0).end_epoch
        10.0
    """

    settings: LearningRateFunction


class LearningRateModifier(Modifier):
    """Change the learning rate after each epoch, as one of PyTorch's schedulers does.

    Args:
        **recipe_keys: ``lr_class``, ``lr_kwargs``, ``init_lr``, ``start_epoch``, ``end_epoch``.

    Example:
        >>> LearningRateModifier(lr_class="ExponentialLR", lr_kwargs={"gamma": 0.9}, init_lr=0.1).end_epoch
        -1.0
    """

    settings: LearningRateSchedule


class SetWeightDecayModifier(Modifier):
    """Set the weight decay once, when its epoch arrives.

    Args:
        **recipe_keys: ``weight_decay``, ``start_epoch``, ``param_groups``.

    Example:
        >>> SetWeightDecayModifier(weight_decay=0.0, start_epoch=20.0).start_epoch
        20.0
    """

    settings: SetWeightDecay


class TrainableParamsModifier(Modifier):
    """Freeze or unfreeze parameters for some epochs.

    Args:
        **recipe_keys: ``params``, ``trainable``, ``params_strict``, ``start_epoch``, ``end_epoch``.

    Example:
        >>> TrainableParamsModifier(params="encoder", trainable=False, end_epoch=2.0).settings.trainable
        False
    """

    settings: TrainableParams


_CLASSES: dict[str, type[Modifier]] = {
    modifier.__name__: modifier
    for modifier in (
        MFACPruningModifier,
        MFACGlobalPruningModifier,
        OBSPruningModifier,
        MagnitudePruningModifier,
        GMPruningModifier,
        GlobalMagnitudePruningModifier,
        ConstantPruningModifier,
        ACDCPruningModifier,
        EpochRangeModifier,
        SetLearningRateModifier,
        LearningRateFunctionModifier,
        LearningRateModifier,
        SetWeightDecayModifier,
        TrainableParamsModifier,
    )
}


def modifier_for(settings: Settings) -> Modifier:
    """Return the modifier with these settings."""
    return _CLASSES[display_name(settings)].from_settings(settings)
