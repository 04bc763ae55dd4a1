"""One training run: what happens between the training steps of one model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mfac_core.learning_rate import learning_rate_at
from mfac_core.training_settings import LearningRateFunction, LearningRateSchedule, SetLearningRate
from mfac_keras.backends.base import TrainingHooks
from mfac_keras.live_pruning import LivePruning
from mfac_keras.optimizers import innermost

__all__ = ["LearningRate", "TrainingSession", "refuse_scheduled_learning_rate"]

LearningRate = SetLearningRate | LearningRateFunction | LearningRateSchedule
"""A modifier that sets the learning rate."""

_logger = logging.getLogger("mfac_keras")


class TrainingSession:
    """Runs the pruning modifiers and sets learning rates while Keras trains.

    Args:
        optimizer: The optimizer that trains the variables in scope.
        prunings: The pruning modifiers at work.
        learning_rates: The learning rates to set.
        hooks: What runs inside the training step, for the variables of all modifiers.
        steps_per_epoch: Training steps per epoch.
        steps_per_execution: Training steps between two calls of :meth:`advance`.
        step: Completed training steps so far.
    """

    def __init__(
        self,
        optimizer: Any,
        prunings: Sequence[LivePruning],
        learning_rates: Sequence[LearningRate],
        hooks: TrainingHooks,
        *,
        steps_per_epoch: int,
        steps_per_execution: int,
        step: int,
    ) -> None:
        self.prunings = tuple(prunings)
        self.steps_per_epoch = steps_per_epoch
        self.step = step
        self._optimizer = optimizer
        self._learning_rates = sorted(learning_rates, key=lambda setting: setting.start_epoch)
        # what each has set last: until it asks for something else, the learning rate is the user's to change
        self._rates_set: list[float | None] = [None] * len(learning_rates)
        self._steps_per_execution = steps_per_execution
        self._hooks = hooks
        self._variables = [variable for pruning in prunings for variable in pruning.variables.values()]
        self._taps = False
        self._sparsity: float | None = None

    @property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The masks held now by path, True keeps."""
        return {name: mask for pruning in self.prunings for name, mask in pruning.masks.items()}

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all weights in scope."""
        if self._sparsity is None:  # asked for at every step
            weights = sum(pruning.num_weights for pruning in self.prunings)
            pruned = sum(int(np.count_nonzero(~mask)) for mask in self.masks.values())
            self._sparsity = pruned / weights if weights else 0.0
        return self._sparsity

    def begin(self) -> None:
        """Attach to the training step, and do what is due before the next one."""
        self._hooks.attach()
        self._hold_masks()
        self._do_what_is_due()

    def advance(self, step: int) -> None:
        """Take the gradients of the training steps that were made, and do what is due after them.

        Args:
            step: Completed training steps now.

        Raises:
            RuntimeError: If something has taken the hooks away.
        """
        if not self._hooks.is_attached:
            raise RuntimeError(
                "the hooks of pruning were taken out of the training step during fit, by a call of "
                "model.make_train_function, train_on_batch or compile in another callback; pruned weights would grow "
                "back. Take that call out"
            )
        if self._taps:
            for done, row in enumerate(self._hooks.rows()):
                gradients = {id(variable): array for variable, array in zip(self._variables, row, strict=True)}
                for pruning in self.prunings:
                    pruning.observe(self.step + done, gradients)
        self.step = step
        self._do_what_is_due()

    def detach(self) -> None:
        """Leave model and optimizer as they were."""
        self._hooks.detach()

    def state_dict(self, *, window: bool = True) -> dict[str, Any]:
        """Return the progress: plain values, and the state of each pruning modifier.

        Args:
            window: Whether the gradient windows belong to it.

        Returns:
            The state.
        """
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "rates_set": list(self._rates_set),
            "prunings": [pruning.state_dict(window=window) for pruning in self.prunings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; call it before :meth:`begin`.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model.

        Raises:
            ValueError: If the state does not belong to this run.
        """
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"the state was saved with {state['steps_per_epoch']} steps per epoch and this run has "
                f"{self.steps_per_epoch}; resume with the same data and batch size, or remove the state"
            )
        if len(state["prunings"]) != len(self.prunings):
            raise ValueError(
                f"the state holds {len(state['prunings'])} pruning modifiers, this recipe has {len(self.prunings)}; "
                "resume with the recipe that the state was saved with"
            )
        for pruning, saved in zip(self.prunings, state["prunings"], strict=True):
            pruning.load_state_dict(saved)
        self._sparsity = None
        self._rates_set = list(state["rates_set"])

    def resume_without_state(self) -> None:
        """Go on in the middle of a schedule of which only the weights are known."""
        if any([pruning.take_zeros_as_masks(self.step) for pruning in self.prunings]):
            _logger.warning(
                "training goes on at step %d and there is no state of pruning for it: every weight in scope that is "
                "exactly zero is taken as pruned (sparsity %.4f), and the gradient window begins empty",
                self.step,
                self.sparsity,
            )
        self._rates_set = self._rates_at(self.step - 1)

    def _do_what_is_due(self) -> None:
        if any(pruning.needs_pruning(self.step) for pruning in self.prunings):
            self._hooks.sync()
            for pruning in self.prunings:
                if pruning.prune_if_due(self.step):
                    self._hooks.forget(pruning.variables.values())
            self._hold_masks()
        self._taps = self._wants_gradients()
        self._hooks.tap(self._taps)
        self._set_learning_rates()

    def _wants_gradients(self) -> bool:
        steps = range(self.step, self.step + self._steps_per_execution)
        return any(pruning.needs_gradients(step) for step in steps for pruning in self.prunings)

    def _hold_masks(self) -> None:
        self._sparsity = None
        masks = self.masks
        self._hooks.hold([masks.get(name) for pruning in self.prunings for name in pruning.variables])

    def _set_learning_rates(self) -> None:
        for place, rate in enumerate(self._rates_at(self.step)):
            if rate is None or rate == self._rates_set[place]:
                continue
            self._hooks.sync()
            for leaf in innermost(self._optimizer):
                leaf.learning_rate = rate
            self._rates_set[place] = rate

    def _rates_at(self, step: int) -> list[float | None]:
        return [learning_rate_at(setting, step / self.steps_per_epoch) for setting in self._learning_rates]


def refuse_scheduled_learning_rate(optimizer: Any) -> None:
    """Refuse an optimizer whose learning rate cannot be set.

    Args:
        optimizer: The optimizer that trains the model.

    Raises:
        ValueError: If its learning rate is computed by a schedule or a function.
    """
    for leaf in innermost(optimizer):
        if not isinstance(leaf.learning_rate, keras.Variable):
            raise ValueError(
                f"the recipe sets learning rates, and {leaf.name} computes its own by a schedule; compile the model "
                "with a number as learning_rate, or take the learning rates out of the recipe"
            )
