"""What to prune, when and how: frozen settings in the field's terms, checked on construction."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self, get_args

from mfac_core.errors import SettingError
from mfac_core.settings.checks import (
    Damping,
    GradientOrigin,
    GradientsDtype,
    Interpolation,
    MaskType,
    Recomputations,
    Scope,
    Spacing,
    Update,
    check_block_size,
    check_choice,
    check_damping,
    check_number,
    check_recomputations,
    checked_groups,
    checked_mask_type,
    checked_num_gradients,
    checked_params,
)
from mfac_core.settings.spellings import NamesItsFields

__all__ = [
    "FROM_PARAM",
    "ACDCSettings",
    "ConstantSettings",
    "GradualSettings",
    "MFACSettings",
    "MagnitudeSettings",
    "PruningSettings",
]

FROM_PARAM = "__FROM_PARAM__"
"""In place of an initial sparsity: the sparsity that the weights have when pruning is attached to them."""


@dataclass(frozen=True, kw_only=True)
class PruningSettings(NamesItsFields):
    """The settings that all kinds of pruning share: which weights, and when.

    Args:
        end_epoch: Epoch of the last pruning step, ``>= start_epoch``.
        start_epoch: Epoch of the first pruning step, fractions allowed, ``>= 0``.
        params: Which weights to prune: names of weights or of layers, ``re:`` patterns, ``__ALL__`` or
            ``__ALL_PRUNABLE__``. Of plain arrays the last two mean all that are given.
        exclude: Which of them to leave out, written in the same way.
        leave_enabled: Whether masks stay enforced after ``end_epoch``.
        written_as: Name of the modifier in the recipe, for messages; empty without a recipe. It does not count when
            settings are compared.

    Raises:
        SettingError: If a value breaks its rule; the message names the setting, the value and the rule.
    """

    end_epoch: float
    start_epoch: float = 0.0
    params: tuple[str, ...] = ("__ALL_PRUNABLE__",)
    exclude: tuple[str, ...] = ()
    leave_enabled: bool = True
    written_as: str = field(default="", repr=False, compare=False)

    _may_be_endless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("start_epoch", self.start_epoch, "start_epoch >= 0", lambda x: x >= 0)
        if self.end_epoch != math.inf or not self._may_be_endless:
            check_number("end_epoch", self.end_epoch, "end_epoch >= 0", lambda x: x >= 0)
        if self.end_epoch < self.start_epoch:
            raise SettingError(
                "end_epoch",
                f"{self.end_epoch} is before start_epoch {self.start_epoch}; "
                f"write an end_epoch of at least {self.start_epoch}",
            )
        if not isinstance(self.leave_enabled, bool):
            raise SettingError("leave_enabled", f"{self.leave_enabled!r} is not a boolean; write true or false")
        object.__setattr__(self, "params", checked_params(self.params))
        object.__setattr__(self, "exclude", checked_params(self.exclude, "exclude"))

    def of_selected(self, names: Collection[str]) -> Self:
        """Return these settings for weights that ``params`` and ``exclude`` have selected already.

        Names that ``params`` has exactly stay in it, because they mark weights to mask even if they are entirely zero.

        Args:
            names: Names of the selected weights.

        Returns:
            The settings, which select all of these names.
        """
        by_name = tuple(name for name in self.params if name in names)
        return replace(self, params=(*by_name, "__ALL__"), exclude=())

    def by_final_sparsity(self) -> tuple[Self, ...]:
        """Return the settings of each group of weights that has a final sparsity of its own.

        Returns:
            These settings alone, unless ``final_sparsity`` is a mapping: then one for each of its entries, with the
            entry's sparsity as ``final_sparsity`` and its names as ``params``.
        """
        return (self,)


@dataclass(frozen=True, kw_only=True)
class GradualSettings(PruningSettings):
    """Schedule and mask of a gradual pruning run. Also takes the arguments of :class:`PruningSettings`.

    Args:
        final_sparsity: Pruned fraction of the weights in scope at ``end_epoch``, in ``(0, 1)``; or a mapping from such
            fractions to names of weights, in place of ``params``.
        initial_sparsity: Pruned fraction at ``start_epoch``, in ``[0, 1)``, at most ``final_sparsity``; or
            :data:`FROM_PARAM` for the sparsity that the weights have.
        update_frequency: Epochs between pruning steps, ``> 0``.
        interpolation: How sparsity goes from initial to final: ``linear``, ``cubic`` or ``inverse_cubic``.
        scope: Where saliencies compete: within each ``layer``, or ``global`` over all weights in scope.
        mask_type: Pattern of the zeros, see :data:`MaskType`.
    """

    final_sparsity: float | Mapping[float, tuple[str, ...]]
    initial_sparsity: float | str = 0.0
    update_frequency: float = 1.0
    interpolation: Interpolation = "cubic"
    scope: Scope = "layer"
    mask_type: MaskType = "unstructured"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.final_sparsity, Mapping):
            object.__setattr__(self, "final_sparsity", checked_groups(self.final_sparsity))
            if self.params != PruningSettings.params:
                raise SettingError(
                    "params",
                    f"{list(self.params)} conflicts with final_sparsity, which names weights itself; "
                    "remove params, or write final_sparsity as a number",
                )
        finals = list(self.final_sparsity) if isinstance(self.final_sparsity, Mapping) else [self.final_sparsity]
        for final in finals:
            check_number(
                "final_sparsity", final, "0 < final_sparsity < 1 (0.9 prunes nine weights of ten)", lambda x: 0 < x < 1
            )
        if self.initial_sparsity != FROM_PARAM:
            check_number(
                "initial_sparsity",
                self.initial_sparsity,
                f"0 <= initial_sparsity < 1, or {FROM_PARAM}",
                lambda x: 0 <= x < 1,
            )
            if self.initial_sparsity > min(finals):  # type: ignore[operator]  # a number by now
                raise SettingError(
                    "initial_sparsity",
                    f"{self.initial_sparsity} is above final_sparsity {min(finals)}; pruned weights never "
                    "regrow, so sparsity can only grow: swap the two or lower initial_sparsity",
                )
        check_number("update_frequency", self.update_frequency, "update_frequency > 0 (epochs)", lambda x: x > 0)
        check_choice("interpolation", self.interpolation, get_args(Interpolation))
        check_choice("scope", self.scope, get_args(Scope))
        object.__setattr__(self, "mask_type", checked_mask_type(self.mask_type, finals))

    def by_final_sparsity(self) -> tuple[Self, ...]:
        """Return the settings of each group of weights that has a final sparsity of its own.

        Returns:
            As in :meth:`PruningSettings.by_final_sparsity`.

        Example:
            >>> settings = GradualSettings(final_sparsity={0.8: ("a",), 0.9: ("b", "c")}, end_epoch=1)
            >>> [(each.final_sparsity, each.params) for each in settings.by_final_sparsity()]
            [(0.8, ('a',)), (0.9, ('b', 'c'))]
        """
        if not isinstance(self.final_sparsity, Mapping):
            return (self,)
        return tuple(
            replace(self, final_sparsity=final, params=params) for final, params in self.final_sparsity.items()
        )


@dataclass(frozen=True, kw_only=True)
class MagnitudeSettings(GradualSettings):
    """Pruning by magnitude: the smallest ``|w|`` are pruned first, the others do not change.

    Also takes the arguments of :class:`GradualSettings` and :class:`PruningSettings`.

    Example:
        >>> MagnitudeSettings(final_sparsity=0.9, start_epoch=1, end_epoch=11, scope="global").scope
        'global'
    """


@dataclass(frozen=True, kw_only=True)
class MFACSettings(GradualSettings):
    """Pruning by M-FAC: OBS saliencies and weight updates from a window of recent gradients.

    Also takes the arguments of :class:`GradualSettings` and :class:`PruningSettings`.

    Args:
        num_gradients: Rows of the gradient window: an integer, or a mapping from sparsity to rows that
            applies from that sparsity; a mapping must have the key 0.
        block_size: Weights per block of the block-diagonal Fisher; ``None`` means one block.
        damping: Added to the diagonal of the empirical Fisher (lambda), ``> 0``; or ``auto``, for each block 0.1 times
            the mean diagonal of its empirical Fisher, measured for each Fisher.
        devices: Where the blocks are computed, such as ``("cpu",)`` or ``("cuda:0", "cuda:1")``; ``("auto",)`` is where
            the weights are. ``"cuda:0"`` means a device of the weights' library, ``"cupy:cuda:0"`` one of CuPy; see
            :func:`mfac_core.backends.resolve_device`.
        gradients_device: Where the gradient window is kept, such as ``"cpu"`` or ``"cuda:0"``; ``"auto"`` is the first
            GPU among ``devices`` that has room for it, and host memory otherwise.
        gradients_dtype: How the gradient window stores its numbers: ``float32``, or rounded to ``bfloat16``, which
            takes half the memory. Sums and factors are in float32 or float64 either way.
        update: ``independent`` (the paper's sum of single-weight updates) or ``joint`` (exact OBS for the pruned set).
        num_recomputations: Number of sub-steps of a pruning step, each by a Fisher of its own over the remaining
            weights; ``auto`` takes enough that none removes more than about a fifth of what is left.
        recomputation_spacing: How far each sub-step goes: ``geometric`` shrinks what is left by equal factors,
            ``linear`` removes equally many weights in each.
        gradient_origin: ``auto`` takes gradient samples from the sampler if there is one, and those of training
            otherwise; ``training`` always takes those of training.
        sampler_options: Keyword arguments for the function that makes the sampler's batches.

    Example:
        >>> MFACSettings(final_sparsity=0.9, end_epoch=10, num_gradients={0: 64, 0.5: 128}).num_gradients
        {0.0: 64, 0.5: 128}
    """

    num_gradients: int | Mapping[float, int] = field(default=64)
    block_size: int | None = 2000
    damping: Damping = 1e-5
    devices: tuple[str, ...] = ("auto",)
    gradients_device: str = "auto"
    gradients_dtype: GradientsDtype = "float32"
    update: Update = "independent"
    num_recomputations: Recomputations = 1
    recomputation_spacing: Spacing = "geometric"
    gradient_origin: GradientOrigin = "auto"
    sampler_options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "num_gradients", checked_num_gradients(self.num_gradients))
        check_block_size(self.block_size)
        check_damping(self.damping)
        check_choice("update", self.update, get_args(Update))
        check_recomputations(self.num_recomputations, self.recomputation_spacing)
        check_choice("gradients_dtype", self.gradients_dtype, get_args(GradientsDtype))
        if self.gradients_dtype == "bfloat16" and self.block_size is None:
            raise SettingError(
                "gradients_dtype",
                "bfloat16 saves no memory with a single block: blocks are computed in float32, and this one is the "
                "whole window; set block_size, or write float32",
            )
        check_choice("gradient_origin", self.gradient_origin, get_args(GradientOrigin))
        options = self.sampler_options
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise SettingError("sampler_options", f"{options!r} must be a mapping from argument to value")
        one = isinstance(self.devices, str) or not isinstance(self.devices, Iterable)
        devices = (self.devices,) if one else tuple(self.devices)
        if not devices or not all(isinstance(name, str) and name for name in devices):
            raise SettingError(
                "devices", f'{self.devices!r} must be a non-empty list of device names, such as ["cpu"] or ["cuda:0"]'
            )
        if "auto" in devices and len(devices) > 1:
            raise SettingError("devices", f"{list(devices)} mixes auto with names; write auto alone, or names only")
        if len(set(devices)) != len(devices):
            raise SettingError("devices", f"{list(devices)} names a device twice; list each device once")
        object.__setattr__(self, "devices", devices)
        if not isinstance(self.gradients_device, str) or not self.gradients_device:
            raise SettingError(
                "gradients_device",
                f'{self.gradients_device!r} must be a device name, such as "cpu" or "cuda:0", or "auto"',
            )


@dataclass(frozen=True, kw_only=True)
class ConstantSettings(PruningSettings):
    """Keep the zeros that exist at ``start_epoch``; nothing else is pruned.

    Also takes the arguments of :class:`PruningSettings`.

    Args:
        end_epoch: Epoch at which the masks are released, unless ``leave_enabled``; infinity keeps them to the end.
        leave_enabled: As in :class:`PruningSettings`.

    Example:
        >>> ConstantSettings(params=("fc.weight",)).end_epoch
        inf
    """

    end_epoch: float = math.inf
    leave_enabled: bool = False

    _may_be_endless: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ACDCSettings(PruningSettings):
    """Alternating compressed and decompressed training (AC/DC), by magnitude.

    Also takes the arguments of :class:`PruningSettings`.

    Args:
        compression_sparsity: Pruned fraction in the compressed phases, in ``(0, 1)``.
        update_frequency: Epochs per phase, ``> 0``.
        scope: Where magnitudes compete.
        mask_type: Pattern of the zeros, see :data:`MaskType`.
        reset_momentum: Whether the state of the optimizer is reset when weights regrow, at the beginning of each
            decompressed phase but the first.

    Example:
        >>> ACDCSettings(compression_sparsity=0.9, end_epoch=100, update_frequency=5).reset_momentum
        True

    References:
        Peste et al. (2021), AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks.
    """

    compression_sparsity: float
    update_frequency: float = 1.0
    scope: Scope = "global"
    mask_type: MaskType = "unstructured"
    reset_momentum: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(
            "compression_sparsity", self.compression_sparsity, "0 < compression_sparsity < 1", lambda x: 0 < x < 1
        )
        check_number("update_frequency", self.update_frequency, "update_frequency > 0 (epochs)", lambda x: x > 0)
        check_choice("scope", self.scope, get_args(Scope))
        object.__setattr__(self, "mask_type", checked_mask_type(self.mask_type, [self.compression_sparsity]))
        if not isinstance(self.reset_momentum, bool):
            raise SettingError("reset_momentum", f"{self.reset_momentum!r} is not a boolean; write true or false")
