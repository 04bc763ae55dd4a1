"""What to prune, when and how: frozen settings in the field's terms, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeGuard, get_args

from mfac_core.errors import SettingError

__all__ = [
    "Interpolation",
    "MFACSettings",
    "MagnitudeSettings",
    "MaskType",
    "PruningSettings",
    "Scope",
    "Update",
    "check_block_size",
    "check_choice",
    "check_damping",
    "check_mask_type",
]

Interpolation = Literal["linear", "cubic", "inverse_cubic"]
Scope = Literal["layer", "global"]
Update = Literal["independent", "joint"]
MaskType = Literal["unstructured"]


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """Schedule and mask of one gradual pruning run.

    Args:
        final_sparsity: Pruned fraction of the weights in scope at ``end_epoch``, in ``(0, 1)``.
        initial_sparsity: Pruned fraction at ``start_epoch``, in ``[0, 1)``, at most ``final_sparsity``.
        start_epoch: Epoch of the first pruning step, fractions allowed, ``>= 0``.
        end_epoch: Epoch of the last pruning step, ``>= start_epoch``.
        update_frequency: Epochs between pruning steps, ``> 0``.
        interpolation: How sparsity goes from initial to final: ``linear``, ``cubic`` or ``inverse_cubic``.
        params: Names of the weights to prune: exact names, ``re:`` patterns, ``__ALL__`` or ``__ALL_PRUNABLE__``.
        scope: Where saliencies compete: within each ``layer``, or ``global`` over all weights in scope.
        mask_type: Pattern of the zeros; ``unstructured``.
        leave_enabled: Whether masks go on being held after ``end_epoch``.

    Raises:
        SettingError: If a value breaks its rule; the message names the setting, the value and the rule.
    """

    final_sparsity: float
    end_epoch: float
    initial_sparsity: float = 0.0
    start_epoch: float = 0.0
    update_frequency: float = 1.0
    interpolation: Interpolation = "cubic"
    params: tuple[str, ...] = ("__ALL_PRUNABLE__",)
    scope: Scope = "layer"
    mask_type: MaskType = "unstructured"
    leave_enabled: bool = True

    def __post_init__(self) -> None:
        _check_number("final_sparsity", self.final_sparsity, "0 < final_sparsity < 1", lambda x: 0 < x < 1)
        _check_number("initial_sparsity", self.initial_sparsity, "0 <= initial_sparsity < 1", lambda x: 0 <= x < 1)
        if self.initial_sparsity > self.final_sparsity:
            raise SettingError(
                "initial_sparsity",
                f"{self.initial_sparsity} is above final_sparsity {self.final_sparsity}; pruned weights never come "
                "back, so sparsity can only grow: swap the two or lower initial_sparsity",
            )
        _check_number("start_epoch", self.start_epoch, "start_epoch >= 0", lambda x: x >= 0)
        _check_number("end_epoch", self.end_epoch, "end_epoch >= 0", lambda x: x >= 0)
        if self.end_epoch < self.start_epoch:
            raise SettingError(
                "end_epoch",
                f"{self.end_epoch} is before start_epoch {self.start_epoch}; "
                f"write an end_epoch of at least {self.start_epoch}",
            )
        _check_number("update_frequency", self.update_frequency, "update_frequency > 0 (epochs)", lambda x: x > 0)
        check_choice("interpolation", self.interpolation, get_args(Interpolation))
        check_choice("scope", self.scope, get_args(Scope))
        check_mask_type(self.mask_type)
        if not isinstance(self.leave_enabled, bool):
            raise SettingError("leave_enabled", f"{self.leave_enabled!r} is not a boolean; write true or false")
        params = (self.params,) if isinstance(self.params, str) else tuple(self.params)
        if not params or not all(isinstance(name, str) and name for name in params):
            raise SettingError(
                "params", f"{self.params!r} must be a name or a non-empty list of names, such as __ALL_PRUNABLE__"
            )
        object.__setattr__(self, "params", params)


@dataclass(frozen=True, kw_only=True)
class MagnitudeSettings(PruningSettings):
    """Pruning by magnitude: the smallest ``|w|`` go first, the others stay as they are."""


@dataclass(frozen=True, kw_only=True)
class MFACSettings(PruningSettings):
    """Pruning by M-FAC: OBS saliencies and weight updates from a window of recent gradients.

    Args (beside those of :class:`PruningSettings`):
        num_gradients: Rows of the gradient window: an integer, or a mapping from sparsity to rows that
            holds from that sparsity on; a mapping must have the key 0.
        block_size: Weights per block of the block-diagonal Fisher; ``None`` means one block.
        damping: Added to the diagonal of the empirical Fisher (lambda), ``> 0``.
        devices: Where the blocks are computed, such as ``("cpu",)`` or ``("cuda:0", "cuda:1")``.
        gradients_device: Where the gradient window is kept, such as ``"cpu"`` or ``"cuda:0"``; ``"auto"`` is the first
            GPU among ``devices`` that has room for it, and host memory otherwise.
        update: ``independent`` (the paper's sum of single-weight updates) or ``joint`` (exact OBS for the pruned set).
    """

    num_gradients: int | Mapping[float, int] = field(default=64)
    block_size: int | None = 2000
    damping: float = 1e-5
    devices: tuple[str, ...] = ("cpu",)
    gradients_device: str = "auto"
    update: Update = "independent"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "num_gradients", _num_gradients(self.num_gradients))
        check_block_size(self.block_size)
        check_damping(self.damping)
        check_choice("update", self.update, get_args(Update))
        devices = (self.devices,) if isinstance(self.devices, str) else tuple(self.devices)
        if not devices or not all(isinstance(name, str) and name for name in devices):
            raise SettingError(
                "devices", f'{self.devices!r} must be a non-empty list of device names, such as ["cpu"] or ["cuda:0"]'
            )
        if len(set(devices)) != len(devices):
            raise SettingError("devices", f"{list(devices)} names a device twice; list each device once")
        object.__setattr__(self, "devices", devices)
        if not isinstance(self.gradients_device, str) or not self.gradients_device:
            raise SettingError(
                "gradients_device",
                f'{self.gradients_device!r} must be a device name, such as "cpu" or "cuda:0", or "auto"',
            )


def check_block_size(block_size: object) -> None:
    """Refuse a block size that is neither a positive integer nor ``None``.

    Args:
        block_size: The value to check.

    Raises:
        SettingError: If it is neither.
    """
    if block_size is not None and (not _is_integer(block_size) or block_size < 1):
        raise SettingError(
            "block_size", f"{block_size!r} must be a positive integer, or null (None) for one block of all weights"
        )


def check_damping(damping: object) -> None:
    """Refuse a damping that is not a positive number.

    Args:
        damping: The value to check.

    Raises:
        SettingError: If it is not.
    """
    _check_number("damping", damping, "damping > 0", lambda x: x > 0)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices.

    Args:
        name: Name of the setting.
        value: The value to check.
        choices: The allowed values.

    Raises:
        SettingError: If ``value`` is none of them.
    """
    if value not in choices:
        raise SettingError(name, f"{value!r} is not one of {', '.join(choices)}")


def check_mask_type(mask_type: object) -> None:
    """Refuse a mask type that is not supported.

    Args:
        mask_type: The value to check.

    Raises:
        SettingError: If ``mask_type`` is not ``"unstructured"``.
    """
    if mask_type not in get_args(MaskType):
        raise SettingError(
            "mask_type", f"{mask_type!r} is not supported yet; supported is {', '.join(get_args(MaskType))}"
        )


def _num_gradients(value: object) -> Mapping[float, int]:
    rule = "must be a positive integer, or a mapping from sparsity to positive integers with the key 0.0"
    if _is_integer(value):
        value = {0.0: value}
    if not isinstance(value, Mapping) or not value:
        raise SettingError("num_gradients", f"{value!r} {rule}, such as {{0.0: 64, 0.5: 128}}")
    checked: dict[float, int] = {}
    for threshold, rows in value.items():
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise SettingError("num_gradients", f"the key {threshold!r} is not a sparsity; keys must lie in [0, 1)")
        if not _is_integer(rows) or rows < 1:
            raise SettingError(
                "num_gradients", f"{rows!r} at sparsity {threshold} is not a number of rows; write a positive integer"
            )
        if float(threshold) in checked:
            raise SettingError("num_gradients", f"the sparsity {float(threshold)} is given twice; keep one of the two")
        checked[float(threshold)] = int(rows)
    if 0.0 not in checked:
        raise SettingError(
            "num_gradients",
            f"{dict(value)} lacks the key 0.0, the rows to keep from the start; "
            f"add it, such as {{0.0: {min(checked.values())}, ...}}",
        )
    return dict(sorted(checked.items()))


def _check_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingError(name, f"{value!r} is not a finite number; the rule is {rule}")
    if not holds(value):
        raise SettingError(name, f"{value!r} is out of range; the rule is {rule}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
