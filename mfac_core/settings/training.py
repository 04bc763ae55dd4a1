"""What a recipe changes in training besides pruning: its length, learning rate, weight decay, trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from mfac_core.errors import SettingError
from mfac_core.settings.checks import check_choice, check_number, checked_params, is_integer
from mfac_core.settings.spellings import NamesItsFields

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

# kind -> required options, allowed options
_SCHEDULE_OPTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "StepLR": (("step_size",), ("step_size", "gamma")),
    "MultiStepLR": (("milestones",), ("milestones", "gamma")),
    "ExponentialLR": (("gamma",), ("gamma",)),
    "CosineAnnealingWarmRestarts": (("T_0",), ("T_0", "T_mult", "eta_min")),
}


@dataclass(frozen=True, kw_only=True)
class EpochRange(NamesItsFields):
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
class SetLearningRate(NamesItsFields):
    """Set the learning rate once.

    Args:
        learning_rate: The learning rate, in ``(0, 1]``.
        start_epoch: Epoch from which it applies, ``>= 0``.
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
        object.__setattr__(self, "param_groups", _checked_param_groups(self.param_groups))


@dataclass(frozen=True, kw_only=True)
class LearningRateFunction(NamesItsFields):
    """Move the learning rate along a curve, optimizer step by optimizer step.

    Args:
        function: ``linear``, ``cosine`` (half a wave) or ``cyclic_linear`` (a line in each cycle, which begins again at
            ``initial``; a last cycle that is cut short is as steep as it must be to end at ``final``).
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
        object.__setattr__(self, "param_groups", _checked_param_groups(self.param_groups))


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule(NamesItsFields):
    """Move the learning rate as one of PyTorch's schedulers does, epoch by epoch.

    Args:
        kind: Name of the scheduler.
        options: Its arguments, with PyTorch's names and defaults: ``step_size`` (epochs, fractions allowed),
            ``milestones`` (epochs of the whole training, between start and end), ``gamma``, ``T_0`` and ``T_mult``
            (whole epochs), ``eta_min``.
        initial: Learning rate at ``start_epoch``, in ``(0, 1]``.
        start_epoch: Epoch at which it begins, ``>= 0``.
        end_epoch: Epoch after which the learning rate stays constant; infinity for never.

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
        object.__setattr__(self, "options", _checked_options(self))


@dataclass(frozen=True, kw_only=True)
class SetWeightDecay(NamesItsFields):
    """Set the weight decay once.

    Args:
        weight_decay: The weight decay, ``>= 0``.
        start_epoch: Epoch from which it applies, ``>= 0``.
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
        object.__setattr__(self, "param_groups", _checked_param_groups(self.param_groups))


@dataclass(frozen=True, kw_only=True)
class TrainableParams(NamesItsFields):
    """Freeze or unfreeze parameters for some epochs.

    Args:
        params: Names of the parameters: exact names, ``re:`` patterns, ``__ALL__`` or ``__ALL_PRUNABLE__``.
        trainable: Whether they are trained in these epochs.
        strict: Whether a name that matches nothing is an error.
        start_epoch: Epoch at which it begins, ``>= 0``.
        end_epoch: Epoch at which the previous state is restored; infinity for never.

    Raises:
        SettingError: If a value breaks its rule.
    """

    params: tuple[str, ...]
    trainable: bool = True
    strict: bool = True
    start_epoch: float = 0.0
    end_epoch: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", checked_params(self.params))
        for name in ("trainable", "strict"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise SettingError(name, f"{value!r} is not a boolean; write true or false")
        _check_epochs(self.start_epoch, self.end_epoch)


TrainingSettings = (
    EpochRange | SetLearningRate | LearningRateFunction | LearningRateSchedule | SetWeightDecay | TrainableParams
)
"""The settings of a modifier that does not prune."""


def _check_epochs(start: float, end: float) -> None:
    check_number("start_epoch", start, "start_epoch >= 0", lambda x: x >= 0)
    if end != math.inf:
        check_number("end_epoch", end, f"end_epoch > start_epoch ({start})", lambda x: x > start)


def _checked_param_groups(groups: object) -> tuple[int, ...] | None:
    if groups is None:
        return None
    if (
        not isinstance(groups, list | tuple)
        or not groups
        or not all(is_integer(index) and index >= 0 for index in groups)
    ):
        raise SettingError(
            "param_groups", f"{groups!r} must be a list of indices of parameter groups, such as [0], or null for all"
        )
    return tuple(int(index) for index in groups)


def _checked_options(schedule: LearningRateSchedule) -> dict[str, object]:
    options = schedule.options
    required, known = _SCHEDULE_OPTIONS[schedule.kind]
    if not isinstance(options, Mapping):
        raise SettingError("options", f"{options!r} must be a mapping with {', '.join(required)}")
    for name in options:
        if name not in known:
            raise SettingError("options", f"{schedule.kind} has no option {name!r}; its options are {', '.join(known)}")
    for name in required:
        if name not in options:
            raise SettingError("options", f"{name} is missing; {schedule.kind} needs it")
    checked = dict(options)
    for name, value in options.items():
        match name:
            case "milestones":
                checked[name] = _checked_milestones(value, schedule.start_epoch, schedule.end_epoch)
            case "step_size" | "gamma":
                _check_option(name, value, f"{name} > 0", lambda x: x > 0)
            case "eta_min":
                _check_option(name, value, "0 <= eta_min <= 1", lambda x: 0 <= x <= 1)
            case _:
                if not is_integer(value) or value < 1:
                    raise SettingError("options", f"{name}: {value!r} must be a positive integer (epochs)")
    return checked


def _checked_milestones(milestones: object, start: float, end: float) -> tuple[float, ...]:
    if not isinstance(milestones, list | tuple) or not milestones:
        raise SettingError("options", f"milestones: {milestones!r} must be a list of epochs, such as [10, 20]")
    for milestone in milestones:
        _check_option(
            "milestones", milestone, f"start_epoch ({start}) < milestone < end_epoch ({end})", lambda x: start < x < end
        )
    return tuple(sorted(float(milestone) for milestone in milestones))


def _check_option(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    try:
        check_number(name, value, rule, holds)
    except SettingError as error:
        raise SettingError("options", f"{name}: {error.message}") from error
