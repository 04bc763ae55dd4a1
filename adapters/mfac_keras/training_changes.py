"""Changes of training other than pruning: learning rates, weight decay, which variables are trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import keras

from mfac_core.errors import SettingError
from mfac_core.recipe import named_in_errors
from mfac_core.schedules.training import OptionsSchedule, TrainableSchedule, check_param_groups
from mfac_core.settings.training import TrainableParams, TrainingSettings
from mfac_core.state_checks import check_keys, refuse
from mfac_core.weight_names import join_names
from mfac_keras.assigning import assign
from mfac_keras.backends.hooks import TrainingHooks
from mfac_keras.optimizers import innermost, set_weight_decay
from mfac_keras.selection import matching_variables

__all__ = ["TrainingChanges"]


class TrainingChanges:
    """Sets options of the optimizer and freezes variables when their epoch arrives.

    A parameter group of PyTorch is an optimizer inside a ``MultiOptimizer`` here; any other optimizer is one group.

    Args:
        settings: The settings of all modifiers that do not prune.
        model: The model, built.
        optimizer: The optimizer that trains it.
        hooks: The hooks in the training step.
        steps_per_epoch: Training steps per epoch.
        logger: Where messages go.

    Raises:
        SettingError: If ``params`` or ``param_groups`` of the settings do not fit model and optimizer.
        ValueError: If the recipe sets a learning rate that a schedule of the optimizer computes.
    """

    def __init__(
        self,
        settings: Sequence[TrainingSettings],
        model: Any,
        optimizer: Any,
        hooks: TrainingHooks,
        *,
        steps_per_epoch: int,
        logger: logging.Logger,
    ) -> None:
        self.settings = settings
        self._logger = logger
        self._groups = innermost(optimizer)
        self._hooks = hooks
        self._options = OptionsSchedule(settings, steps_per_epoch)
        self._trainable = TrainableSchedule(settings, steps_per_epoch)
        self._matched = [_matched_variables(model, each, logger) for each in self._trainable.settings]
        self._frozen_now: list[Any] = []
        self._rates: dict[int, float] = {}  # as set last, by group; setting one again takes time
        for each in self._options.settings:
            with named_in_errors(each):
                check_param_groups(each, len(self._groups))
        self._replaced: float | None = None  # the rate of the last step, if that of the next differs
        self._refuse_scheduled()
        self._refuse_unfreezing(model)

    def make_due(self, step: int) -> None:
        """Make the changes that are due for the training step that comes after ``step`` completed ones."""
        rates: dict[int, float] = {}
        decays: dict[int, float] = {}
        for change in self._options.due(step):
            values = rates if change.option == "learning_rate" else decays
            values.update((group, change.value) for group in range(len(self._groups)) if change.concerns(group))
        self._set_learning_rates({group: rate for group, rate in rates.items() if self._rates.get(group) != rate})
        self._set_weight_decays(decays)
        self._freeze(self._frozen(step), step)

    @property
    def trainable(self) -> list[tuple[TrainableParams, Collection[str]]]:
        """The settings that freeze or unfreeze variables, with the paths of these variables."""
        return [(each, found.keys()) for each, found in zip(self._trainable.settings, self._matched, strict=True)]

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the last step; ``None`` if the recipe sets none, or there are several optimizers."""
        if len(self._groups) > 1 or "learning_rate" not in self._options.options_of(0):
            return None
        if self._replaced is not None:
            return self._replaced
        self._hooks.sync()
        return _rate_of(self._groups[0])

    def state_dict(self) -> dict[str, Any]:
        """Return which changes are done, and the weight decays, which no optimizer saves."""
        return {
            "options_done": self._options.state_dict(),
            "weight_decays": {str(group): self._groups[group].weight_decay for group in self._decayed()},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state that another recipe or model saved."""
        check_keys("changes of training", state, ("options_done", "weight_decays"))
        self._options.check_state(state["options_done"])
        decays = state["weight_decays"]
        if not isinstance(decays, Mapping):
            refuse("weight_decays", decays, "a mapping")
        groups = [str(group) for group in self._decayed()]
        for group, value in decays.items():
            if group not in groups:
                raise ValueError(
                    f"the state holds the weight decay of optimizer {group}, which the recipe does not set here (it "
                    f"sets those of {', '.join(groups) or 'none'}); resume with the recipe and the optimizer that the "
                    "state was saved with"
                )
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
            ):
                refuse(f"weight_decays[{group!r}]", value, "a number of at least 0, or none")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state that :meth:`check_state` accepts."""
        self._options.load_state_dict(state["options_done"])
        for group, value in state["weight_decays"].items():
            set_weight_decay(self._groups[int(group)], value)

    def _set_learning_rates(self, rates: Mapping[int, float]) -> None:
        self._replaced = None
        if rates:
            self._hooks.sync()
            self._replaced = _rate_of(self._groups[0]) if 0 in rates else None
        for group, rate in rates.items():
            assign(self._groups[group].learning_rate, rate)
        self._rates.update(rates)

    def _set_weight_decays(self, decays: Mapping[int, float]) -> None:
        for group, decay in decays.items():
            set_weight_decay(self._groups[group], decay)
            self._logger.info("the weight decay of %s is %g", self._groups[group].name, decay)
        if decays:
            self._hooks.recompile()

    def _freeze(self, variables: list[Any], step: int) -> None:
        paths, before = [[variable.path for variable in each] for each in (variables, self._frozen_now)]
        if paths != before:
            self._logger.info(
                "from step %d, frozen: %s", step, join_names(paths) or "nothing, all variables are trained again"
            )
        self._frozen_now = variables
        self._hooks.freeze(variables)

    def _frozen(self, step: int) -> list[Any]:
        is_trained: dict[int, tuple[Any, bool]] = {}
        for each, found, active in zip(
            self._trainable.settings, self._matched, self._trainable.active(step), strict=True
        ):
            if active:
                is_trained.update({id(variable): (variable, each.trainable) for variable in found.values()})
        return [variable for variable, trained in is_trained.values() if not trained]

    def _decayed(self) -> Iterator[int]:
        return (group for group in range(len(self._groups)) if "weight_decay" in self._options.options_of(group))

    def _refuse_scheduled(self) -> None:
        for group, optimizer in enumerate(self._groups):
            is_set = "learning_rate" in self._options.options_of(group)
            if is_set and not isinstance(optimizer.learning_rate, keras.Variable):
                raise ValueError(
                    f"the recipe sets learning rates, but {optimizer.name} has a learning rate schedule; compile the "
                    "model with a number as learning_rate, or remove the learning rates from the recipe"
                )

    def _refuse_unfreezing(self, model: Any) -> None:
        trained = {id(variable) for variable in model.trainable_variables}
        for each, found in zip(self._trainable.settings, self._matched, strict=True):
            frozen = [name for name, variable in found.items() if id(variable) not in trained]
            if each.trainable and frozen:
                with named_in_errors(each):
                    raise SettingError(
                        "params",
                        f"{join_names(frozen)} cannot be unfrozen during fit: the optimizer does not train weights of "
                        "layers that were frozen at compile; set layer.trainable = True before compile, and freeze "
                        "them until then by `trainable: false` with an end_epoch",
                    )


def _rate_of(optimizer: Any) -> float:
    return float(optimizer.learning_rate.numpy())


def _matched_variables(model: Any, settings: TrainableParams, logger: logging.Logger) -> dict[str, Any]:
    with named_in_errors(settings):
        return matching_variables(model, settings.params, strict=settings.strict, logger=logger)
