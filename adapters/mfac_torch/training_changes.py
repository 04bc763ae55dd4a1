"""Changes of training other than pruning: learning rates, weight decay, which parameters are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mfac_core.errors import SettingError
from mfac_core.recipe import named_in_errors
from mfac_core.schedules.training import OptionChange, OptionsSchedule, TrainableSchedule, check_param_groups
from mfac_core.settings.training import TrainableParams, TrainingSettings
from mfac_torch.selection import matching_parameters

__all__ = ["TrainingChanges"]

_OPTIONS = {"learning_rate": "lr", "weight_decay": "weight_decay"}
"""The key in a parameter group for each setting."""


class TrainingChanges:
    """Sets the options of optimizers and the ``requires_grad`` of parameters when their epoch arrives.

    Args:
        settings: The settings of all modifiers that do not prune.
        model: The model, unwrapped.
        optimizers: Its optimizers. ``param_groups`` of the settings numbers their groups in this order.
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
        self.settings = settings
        self._optimizers = optimizers
        self._options = OptionsSchedule(settings, steps_per_epoch)
        self._trainable = TrainableSchedule(settings, steps_per_epoch)
        self._parameters = [_parameters(model, each) for each in self._trainable.settings]
        self._trained_before = {
            parameter: parameter.requires_grad for found in self._parameters for parameter in found.values()
        }
        self._active = (False,) * len(self._parameters)
        self._check_groups()

    @property
    def trainable(self) -> list[tuple[TrainableParams, Collection[str]]]:
        """The settings that freeze or unfreeze parameters, with the names of these parameters."""
        return [(each, found.keys()) for each, found in zip(self._trainable.settings, self._parameters, strict=True)]

    def set_options(self, step: int) -> None:
        """Set the learning rates and weight decays that are due after ``step`` completed optimizer steps."""
        for change in self._options.due(step):
            for number, group in enumerate(self._groups()):
                if change.concerns(number):
                    _set_option(group, change)

    def set_trained(self, step: int, undo: ExitStack | None = None) -> None:
        """Freeze and unfreeze parameters for the time after ``step`` completed optimizer steps.

        An exception leaves all parameters unchanged; ``undo`` gets a callback for each change that reverts it.
        """
        active = self._trainable.active(step)
        if active == self._active:
            return
        wanted = dict(self._trained_before)
        for each, found, is_active in zip(self._trainable.settings, self._parameters, active, strict=True):
            if is_active:
                wanted.update(dict.fromkeys(found.values(), each.trainable))
        changed = _require_gradients(wanted)
        if undo is not None:
            undo.callback(setattr, self, "_active", self._active)
            undo.enter_context(changed)
        self._active = active

    def restore(self) -> None:
        """Restore which parameters were trained before."""
        if any(self._active):
            _require_gradients(self._trained_before)
            self._active = (False,) * len(self._parameters)

    def state_dict(self) -> list[bool]:
        """Return for each setting of optimizer options whether it is done."""
        return self._options.state_dict()

    def check_state(self, state: Sequence[bool]) -> None:
        """Raise ValueError for the state of another recipe."""
        self._options.check_state(state)

    def load_state_dict(self, state: Sequence[bool]) -> None:
        """Resume from :meth:`state_dict`."""
        self._options.load_state_dict(state)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self._optimizers:
            yield from optimizer.param_groups

    def _check_groups(self) -> None:
        groups = list(self._groups())
        for each in self._options.settings:
            with named_in_errors(each):
                check_param_groups(each, len(groups))
        for number, group in enumerate(groups):
            for option in map(_OPTIONS.__getitem__, self._options.options_of(number)):
                if option not in group:
                    raise SettingError(
                        option,
                        f"parameter group {number} of the optimizer has no such option; it has {', '.join(group)}",
                    )


def _parameters(model: nn.Module, settings: TrainableParams) -> dict[str, nn.Parameter]:
    with named_in_errors(settings):
        return matching_parameters(model, settings.params, strict=settings.strict)


def _set_option(group: dict[str, Any], change: OptionChange) -> None:
    option = _OPTIONS[change.option]
    if isinstance(group[option], torch.Tensor):  # a compiled or captured step reads this very tensor
        group[option].fill_(change.value)
    else:
        group[option] = change.value


def _require_gradients(wanted: Mapping[nn.Parameter, bool]) -> ExitStack:
    """Set ``requires_grad`` of each parameter, and return the callbacks that revert it."""
    with ExitStack() as undo:
        for parameter, is_trained in wanted.items():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.grad = None  # optimizers would still apply it
        return undo.pop_all()
