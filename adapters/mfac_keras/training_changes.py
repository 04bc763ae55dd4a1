"""What a recipe changes in training beside pruning: learning rates, weight decay, which variables are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from mfac_core.errors import SettingError
from mfac_core.training_schedule import OptionsSchedule, TrainableSchedule
from mfac_core.training_settings import TrainingSettings
from mfac_keras.backends.base import TrainingHooks
from mfac_keras.optimizers import innermost, set_weight_decay
from mfac_keras.selection import matching_variables

__all__ = ["TrainingChanges"]


class TrainingChanges:
    """Sets options of the optimizer, and says which variables are trained, when their epoch arrives.

    What PyTorch calls a parameter group is an optimizer inside a ``MultiOptimizer``; any other is a single group.

    Args:
        settings: The settings of all modifiers that do not prune.
        model: The model, built.
        optimizer: The optimizer that trains it.
        hooks: What runs inside the training step.
        steps_per_epoch: Training steps per epoch.

    Raises:
        SettingError: If ``params`` or ``param_groups`` of the settings do not fit model and optimizer.
        ValueError: If a learning rate that is to be set is computed by a schedule of the optimizer.
    """

    def __init__(
        self,
        settings: Sequence[TrainingSettings],
        model: Any,
        optimizer: Any,
        hooks: TrainingHooks,
        *,
        steps_per_epoch: int,
    ) -> None:
        self._groups = innermost(optimizer)
        self._hooks = hooks
        self._options = OptionsSchedule(settings, steps_per_epoch)
        self._trainable = TrainableSchedule(settings, steps_per_epoch)
        self._found = [
            list(matching_variables(model, each.params, strict=each.strict).values())
            for each in self._trainable.settings
        ]
        self._rates: dict[int, float] = {}  # set last, by group: to set one again would cost a step some time
        self._options.check_param_groups(len(self._groups))
        self._refuse_scheduled()
        self._refuse_unfreezing(model)

    def make(self, step: int) -> None:
        """Make the changes that are due for the training step that comes after ``step`` completed ones.

        Args:
            step: Completed training steps.
        """
        rates: dict[int, float] = {}
        decays: dict[int, float] = {}
        for change in self._options.due(step):
            values = rates if change.option == "learning_rate" else decays
            values.update((group, change.value) for group in range(len(self._groups)) if change.concerns(group))
        self._set_learning_rates({group: rate for group, rate in rates.items() if self._rates.get(group) != rate})
        self._set_weight_decays(decays)
        self._hooks.freeze(self._frozen(step))

    def state_dict(self) -> dict[str, Any]:
        """Return which changes are done with, and the weight decays, which no optimizer saves."""
        return {
            "options_done": self._options.state_dict(),
            "weight_decays": {str(group): self._groups[group].weight_decay for group in self._decayed()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model.

        Raises:
            ValueError: If it does not fit.
        """
        self._options.load_state_dict(state["options_done"])
        for group, value in state["weight_decays"].items():
            set_weight_decay(self._groups[int(group)], value)

    def _set_learning_rates(self, rates: Mapping[int, float]) -> None:
        if rates:
            self._hooks.sync()
        for group, rate in rates.items():
            self._groups[group].learning_rate = rate
        self._rates.update(rates)

    def _set_weight_decays(self, decays: Mapping[int, float]) -> None:
        for group, decay in decays.items():
            set_weight_decay(self._groups[group], decay)
        if decays:
            self._hooks.recompile()

    def _frozen(self, step: int) -> list[Any]:
        is_trained: dict[int, tuple[Any, bool]] = {}
        for each, found, active in zip(
            self._trainable.settings, self._found, self._trainable.active(step), strict=True
        ):
            if active:
                is_trained.update({id(variable): (variable, each.trainable) for variable in found})
        return [variable for variable, trained in is_trained.values() if not trained]

    def _decayed(self) -> Iterator[int]:
        return (group for group in range(len(self._groups)) if "weight_decay" in self._options.options_of(group))

    def _refuse_scheduled(self) -> None:
        for group, optimizer in enumerate(self._groups):
            is_set = "learning_rate" in self._options.options_of(group)
            if is_set and not isinstance(optimizer.learning_rate, keras.Variable):
                raise ValueError(
                    f"the recipe sets learning rates, and {optimizer.name} computes its own by a schedule; compile the "
                    "model with a number as learning_rate, or take the learning rates out of the recipe"
                )

    def _refuse_unfreezing(self, model: Any) -> None:
        trained = {id(variable) for variable in model.trainable_variables}
        for each, found in zip(self._trainable.settings, self._found, strict=True):
            frozen = [variable.path for variable in found if id(variable) not in trained]
            if each.trainable and frozen:
                raise SettingError(
                    "params",
                    f"{', '.join(frozen)} cannot be unfrozen during fit, because the layer is not trainable and so the "
                    "optimizer does not know it; set layer.trainable = True before compile, and let "
                    "`trainable: false` with an end_epoch keep it as it is until then",
                )
