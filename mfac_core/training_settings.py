"""What else a recipe says about training: how long, at which learning rate, with which weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from mfac_core.errors import SettingError
from mfac_core.settings import check_choice, check_number

__all__ = [
    "EpochRange",
    "LearningRateFunction",
    "LearningRateSchedule",
    "SetLearningRate",
    "SetWeightDecay",
    "TrainableParams",
    "TrainingSettings",
]

LearningRateCurve = Literal["linear", "cosine", "cyclic_linear"]
ScheduleKind = Literal["StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingWarmRestarts"]


@dataclass(frozen=True, kw_only=True)
class EpochRange:
    """How long to train.

    Args:
        end_epoch: Epoch at which training ends, after ``start_epoch``.
        start_epoch: Epoch at which it begins, ``>= 0``.

    Raises:
        SettingError: If a value breaks its rule.
    """

    end_epoch: float
    start_epoch: float = 0.0

    def __post_init__(self) -> None:
        _check_epochs(self.start_epoch, self.end_epoch)


@dataclass(frozen=True, kw_only=True)
class SetLearningRate:
    """Set the learning rate once.

    Args:
        learning_rate: The learning rate, in ``(0, 1]``.
        start_epoch: Epoch from which on it holds, ``>= 0``.
        param_groups: Indices of the optimizer's parameter groups; ``None`` means all.

    Raises:
        SettingError: If a value breaks its rule.
    """

    learning_rate: float
    start_epoch: float = 0.0
    param_groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, "0 < learning_rate <= 1", lambda x: 0 < x <= 1)
        check_number("start_epoch", self.start_epoch, "start_epoch >= 0 (0 is from the beginning)", lambda x: x >= 0)
        _check_param_groups(self.param_groups)


@dataclass(frozen=True, kw_only=True)
class LearningRateFunction:
    """Move the learning rate along a curve, optimizer step by optimizer step.

    Args:
        function: ``linear``, ``cosine`` (half a wave) or ``cyclic_linear`` (down and up again in each cycle).
        initial: Learning rate at ``start_epoch``, in ``[0, 1]``.
        final: Learning rate at ``end_epoch``, in ``[0, 1]``.
        end_epoch: Epoch at which the curve ends, after ``start_epoch``.
        start_epoch: Epoch at which it begins, ``>= 0``.
        cycle_epochs: Epochs per cycle of ``cyclic_linear``, ``> 0``.
        param_groups: Indices of the optimizer's parameter groups; ``None`` means all.

    Raises:
        SettingError: If a value breaks its rule.
    """

    function: LearningRateCurve
    initial: float
    final: float
    end_epoch: float
    start_epoch: float = 0.0
    cycle_epochs: float = 1.0
    param_groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("function", self.function, get_args(LearningRateCurve))
        check_number("initial", self.initial, "0 <= initial <= 1", lambda x: 0 <= x <= 1)
        check_number("final", self.final, "0 <= final <= 1", lambda x: 0 <= x <= 1)
        check_number("cycle_epochs", self.cycle_epochs, "cycle_epochs > 0", lambda x: x > 0)
        _check_epochs(self.start_epoch, self.end_epoch)
        _check_param_groups(self.param_groups)


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """Move the learning rate as one of PyTorch's schedulers does, epoch by epoch.

    Args:
        kind: Name of the scheduler.
        options: Its arguments, such as ``{"step_size": 10, "gamma": 0.1}``.
        initial: Learning rate at ``start_epoch``, in ``(0, 1]``.
        start_epoch: Epoch at which it begins, ``>= 0``.
        end_epoch: Epoch from which on the learning rate stays as it is; infinity for never.

    Raises:
        SettingError: If a value breaks its rule.
    """

    kind: ScheduleKind
    initial: float
    options: Mapping[str, object] = field(default_factory=dict)
    start_epoch: float = 0.0
    end_epoch: float = math.inf

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(ScheduleKind))
        check_number("initial", self.initial, "0 < initial <= 1", lambda x: 0 < x <= 1)
        _check_epochs(self.start_epoch, self.end_epoch)


@dataclass(frozen=True, kw_only=True)
class SetWeightDecay:
    """Set the weight decay once.

    Args:
        weight_decay: The weight decay, ``>= 0``.
        start_epoch: Epoch from which on it holds, ``>= 0``.
        param_groups: Indices of the optimizer's parameter groups; ``None`` means all.

    Raises:
        SettingError: If a value breaks its rule.
    """

    weight_decay: float
    start_epoch: float = 0.0
    param_groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_number("weight_decay", self.weight_decay, "weight_decay >= 0", lambda x: x >= 0)
        check_number("start_epoch", self.start_epoch, "start_epoch >= 0 (0 is from the beginning)", lambda x: x >= 0)
        _check_param_groups(self.param_groups)


@dataclass(frozen=True, kw_only=True)
class TrainableParams:
    """Freeze or unfreeze parameters for some epochs.

    Args:
        params: Names of the parameters: exact names, ``re:`` patterns, ``__ALL__`` or ``__ALL_PRUNABLE__``.
        trainable: Whether they are trained meanwhile.
        strict: Whether a name that matches nothing is an error.
        start_epoch: Epoch at which it begins, ``>= 0``.
        end_epoch: Epoch at which what was before is restored; infinity for never.

    Raises:
        SettingError: If a value breaks its rule.
    """

    params: tuple[str, ...]
    trainable: bool = True
    strict: bool = True
    start_epoch: float = 0.0
    end_epoch: float = math.inf

    def __post_init__(self) -> None:
        _check_epochs(self.start_epoch, self.end_epoch)


TrainingSettings = (
    EpochRange | SetLearningRate | LearningRateFunction | LearningRateSchedule | SetWeightDecay | TrainableParams
)
"""What a modifier that does not prune carries."""


def _check_epochs(start: float, end: float) -> None:
    check_number("start_epoch", start, "start_epoch >= 0", lambda x: x >= 0)
    if end != math.inf:
        check_number("end_epoch", end, f"end_epoch > start_epoch ({start})", lambda x: x > start)


def _check_param_groups(groups: tuple[int, ...] | None) -> None:
    if groups is not None and not all(isinstance(index, int) and index >= 0 for index in groups):
        raise SettingError("param_groups", f"{groups!r} must be a list of indices of parameter groups, such as [0]")
