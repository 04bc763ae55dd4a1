"""What a recipe changes in training beside pruning: learning rates, weight decay, which parameters are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mfac_core.errors import SettingError
from mfac_core.learning_rate import learning_rate_at
from mfac_core.training_settings import (
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
    TrainingSettings,
)
from mfac_torch.selection import matching_parameters

__all__ = ["TrainingChanges"]

GroupSettings = SetLearningRate | LearningRateFunction | LearningRateSchedule | SetWeightDecay


class TrainingChanges:
    """Sets the options of optimizers and the ``requires_grad`` of parameters when their epoch arrives.

    A value is set once, and along a curve at each step from its start to its end and a last time there; at all other
    times what you or your scheduler set stays.

    Args:
        settings: The settings of all modifiers that do not prune.
        model: The model, unwrapped.
        optimizers: The optimizers that train it. ``param_groups`` of the settings counts their groups in this order.
        steps_per_epoch: Optimizer steps per epoch.

    Raises:
        SettingError: If ``params`` or ``param_groups`` of the settings do not fit model and optimizers.
    """

    def __init__(
        self,
        settings: Sequence[TrainingSettings],
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        steps_per_epoch: int,
    ) -> None:
        self._optimizers = optimizers
        self._steps_per_epoch = steps_per_epoch
        in_order = sorted(settings, key=lambda each: each.start_epoch)
        self._of_groups = [each for each in in_order if isinstance(each, GroupSettings)]
        self._is_done = [False] * len(self._of_groups)
        self._of_parameters = [
            (each, matching_parameters(model, each.params, strict=each.strict))
            for each in in_order
            if isinstance(each, TrainableParams)
        ]
        self._trained_before = {
            parameter: parameter.requires_grad for _, found in self._of_parameters for parameter in found.values()
        }
        self._active = [False] * len(self._of_parameters)
        for each in self._of_groups:
            _check_groups(each, list(self._groups()))

    def set_options(self, step: int) -> None:
        """Set learning rates and weight decays for the optimizer step that comes after ``step`` completed ones.

        Args:
            step: Completed optimizer steps.
        """
        for index, each in enumerate(self._of_groups):
            if self._is_done[index] or step < self._step_of(each.start_epoch):
                continue
            end = _end_epoch(each)
            self._is_done[index] = step >= self._step_of(end)
            epoch = end if self._is_done[index] else max(each.start_epoch, step / self._steps_per_epoch)
            for number, group in enumerate(self._groups()):
                if _chosen(each, number):
                    _set_option(group, each, epoch)

    def set_trained(self, step: int) -> None:
        """Freeze and unfreeze what the settings say for the time after ``step`` completed optimizer steps.

        Args:
            step: Completed optimizer steps.
        """
        active = [
            self._step_of(each.start_epoch) <= step < self._step_of(each.end_epoch) for each, _ in self._of_parameters
        ]
        if active == self._active:
            return
        self._active = active
        wanted = dict(self._trained_before)
        for (each, found), is_active in zip(self._of_parameters, active, strict=True):
            if is_active:
                wanted.update(dict.fromkeys(found.values(), each.trainable))
        _require_gradients(wanted)

    def restore(self) -> None:
        """Let each parameter be trained, or not, as it was before."""
        if any(self._active):
            self._active = [False] * len(self._of_parameters)
            _require_gradients(self._trained_before)

    def state_dict(self) -> list[bool]:
        """Return which settings of optimizers are done with."""
        return list(self._is_done)

    def check_state(self, state: Sequence[bool]) -> None:
        """Refuse the state of another recipe.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If it does not fit.
        """
        if len(state) != len(self._is_done):
            raise ValueError(
                f"the state holds {len(state)} modifiers of learning rate and weight decay, this recipe has "
                f"{len(self._is_done)}; resume with the recipe that the state was saved with"
            )

    def load_state_dict(self, state: Sequence[bool], step: int) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What :meth:`state_dict` returned.
            step: Completed optimizer steps.
        """
        self._is_done = [bool(done) for done in state]
        self.set_trained(step)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    def _step_of(self, epoch: float) -> float:
        return epoch if math.isinf(epoch) else round(epoch * self._steps_per_epoch)


def _check_groups(settings: GroupSettings, groups: Sequence[Mapping[str, Any]]) -> None:
    option = _option_of(settings)
    for number in getattr(settings, "param_groups", None) or ():
        if number >= len(groups):
            raise SettingError(
                "param_groups", f"{number} is not the index of a parameter group; there are {len(groups)}, from 0 on"
            )
    for number, group in enumerate(groups):
        if _chosen(settings, number) and option not in group:
            raise SettingError(
                option, f"parameter group {number} of the optimizer has no such option; it has {', '.join(group)}"
            )


def _end_epoch(settings: GroupSettings) -> float:
    return (
        settings.end_epoch
        if isinstance(settings, LearningRateFunction | LearningRateSchedule)
        else settings.start_epoch
    )


def _chosen(settings: GroupSettings, number: int) -> bool:
    chosen = getattr(settings, "param_groups", None)
    return chosen is None or number in chosen


def _option_of(settings: GroupSettings) -> str:
    return "weight_decay" if isinstance(settings, SetWeightDecay) else "lr"


def _set_option(group: dict[str, Any], settings: GroupSettings, epoch: float) -> None:
    value = settings.weight_decay if isinstance(settings, SetWeightDecay) else learning_rate_at(settings, epoch)
    option = _option_of(settings)
    if value is None:
        return
    if isinstance(group[option], torch.Tensor):  # a compiled or captured step reads the tensor that it knows
        group[option].fill_(value)
    else:
        group[option] = value


def _require_gradients(wanted: Mapping[nn.Parameter, bool]) -> None:
    for parameter, is_trained in wanted.items():
        parameter.requires_grad_(is_trained)
        if not is_trained:
            parameter.grad = None  # an optimizer would go on using it
