"""When a recipe changes learning rate, weight decay and trainable parameters, and to what, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from mfac_core.errors import SettingError
from mfac_core.schedules.learning_rate import learning_rate_at
from mfac_core.settings.training import (
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
    TrainingSettings,
)
from mfac_core.state_checks import checked_flag, refuse

__all__ = ["OptionChange", "OptionSettings", "OptionsSchedule", "TrainableSchedule", "check_param_groups"]

OptionSettings = SetLearningRate | LearningRateFunction | LearningRateSchedule | SetWeightDecay
"""Settings that change an option of the optimizer."""


class OptionChange(NamedTuple):
    """A value to set.

    Args:
        option: Which option of the optimizer.
        value: Its new value.
        param_groups: Indices of the parameter groups that get it; ``None`` means all.
    """

    option: Literal["learning_rate", "weight_decay"]
    value: float
    param_groups: tuple[int, ...] | None

    def concerns(self, group: int) -> bool:
        """Return whether a parameter group gets the value."""
        return self.param_groups is None or group in self.param_groups


def check_param_groups(settings: OptionSettings, count: int) -> None:
    """Refuse ``param_groups`` with an index that the optimizer does not have; it has ``count`` groups."""
    for group in _param_groups(settings) or ():
        if group >= count:
            raise SettingError(
                "param_groups",
                f"{group} is not the index of a parameter group; the optimizer has {count}, counted from 0",
            )


class OptionsSchedule:
    """The learning rates and weight decays of a recipe.

    A single value is due once; a curve at each step from its start to its end, inclusive. At all other times a
    value that other code has set stays.

    Args:
        settings: The settings of all modifiers that do not prune.
        steps_per_epoch: Optimizer steps per epoch.

    Example:
        >>> schedule = OptionsSchedule([SetLearningRate(learning_rate=0.1, start_epoch=1.0)], steps_per_epoch=10)
        >>> [change.value for step in (9, 10, 11) for change in schedule.due(step)]
        [0.1]
    """

    def __init__(self, settings: Sequence[TrainingSettings], steps_per_epoch: int) -> None:
        of_options = [each for each in settings if isinstance(each, OptionSettings)]
        self.settings = tuple(sorted(of_options, key=lambda each: each.start_epoch))
        self._steps_per_epoch = steps_per_epoch
        self._is_done = [False] * len(self.settings)

    def due(self, step: int) -> Iterator[OptionChange]:
        """Yield what to set for the optimizer step after ``step`` completed ones, in order of effect.

        Each change is yielded once; ``step`` must not go back.
        """
        for index, each in enumerate(self.settings):
            if self._is_done[index] or step < _step_of(each.start_epoch, self._steps_per_epoch):
                continue
            end = _end_epoch(each)
            self._is_done[index] = step >= _step_of(end, self._steps_per_epoch)
            epoch = end if self._is_done[index] else max(each.start_epoch, step / self._steps_per_epoch)
            value = each.weight_decay if isinstance(each, SetWeightDecay) else learning_rate_at(each, epoch)
            if value is not None:
                yield OptionChange(_option_of(each), value, _param_groups(each))

    def options_of(self, group: int) -> list[str]:
        """Return which of ``learning_rate`` and ``weight_decay`` will be set in a parameter group."""
        concerned = [each for each in self.settings if group in (_param_groups(each) or (group,))]
        return sorted({_option_of(each) for each in concerned})

    def state_dict(self) -> list[bool]:
        """Return which settings have taken effect for the last time."""
        return list(self._is_done)

    def check_state(self, state: Sequence[bool]) -> None:
        """Raise ``ValueError`` for the state of another recipe."""
        if not isinstance(state, list | tuple):
            refuse("progress of learning rate and weight decay", state, "a list of booleans")
        for each in state:
            checked_flag("progress of learning rate and weight decay", each)
        if len(state) != len(self._is_done):
            raise ValueError(
                f"the state contains {len(state)} modifiers of learning rate and weight decay, this recipe has "
                f"{len(self._is_done)}; resume with the recipe that the state was saved with"
            )

    def load_state_dict(self, state: Sequence[bool]) -> None:
        """Resume from :meth:`state_dict`; a state that :meth:`check_state` refuses changes nothing."""
        self.check_state(state)
        self._is_done = [bool(done) for done in state]


class TrainableSchedule:
    """Which parameters a recipe freezes or unfreezes, and when.

    Args:
        settings: The settings of all modifiers that do not prune.
        steps_per_epoch: Optimizer steps per epoch.
    """

    def __init__(self, settings: Sequence[TrainingSettings], steps_per_epoch: int) -> None:
        of_parameters = [each for each in settings if isinstance(each, TrainableParams)]
        self.settings = tuple(sorted(of_parameters, key=lambda each: each.start_epoch))
        self._steps_per_epoch = steps_per_epoch

    def active(self, step: int) -> tuple[bool, ...]:
        """Return for each of :attr:`settings` whether it applies after ``step`` completed optimizer steps.

        Later settings win.
        """
        return tuple(
            _step_of(each.start_epoch, self._steps_per_epoch) <= step < _step_of(each.end_epoch, self._steps_per_epoch)
            for each in self.settings
        )


def _step_of(epoch: float, steps_per_epoch: int) -> float:
    return epoch if math.isinf(epoch) else round(epoch * steps_per_epoch)


def _end_epoch(settings: OptionSettings) -> float:
    if isinstance(settings, LearningRateFunction | LearningRateSchedule):
        return settings.end_epoch
    return settings.start_epoch


def _option_of(settings: OptionSettings) -> Literal["learning_rate", "weight_decay"]:
    return "weight_decay" if isinstance(settings, SetWeightDecay) else "learning_rate"


def _param_groups(settings: OptionSettings) -> tuple[int, ...] | None:
    return None if isinstance(settings, LearningRateSchedule) else settings.param_groups
