"""One pruning modifier applied to one Keras model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import keras
import numpy as np

from mfac_core.backends import Array, device_of
from mfac_core.pruners import MFACPruner, Pruner
from mfac_core.pruners.adoption import adopt
from mfac_core.pruners.step import PruneResult
from mfac_core.ranks import Alone, Ranks
from mfac_core.ranks.logs import logger_of
from mfac_core.sample_batches import HeldOut
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.session.live_pruning import LivePruning, Mask
from mfac_core.session.log_lines import scope_in_line
from mfac_core.settings.pruning import ConstantSettings, PruningSettings
from mfac_keras.assigning import assign, snapshot
from mfac_keras.backends import current_backend
from mfac_keras.layout import pytorch_forms
from mfac_keras.optimizers import state_to_reset
from mfac_keras.sampling import GradientSampler
from mfac_keras.selection import select_variables

__all__ = ["KerasPruning"]


class KerasPruning(LivePruning):
    """The pruning steps and the masks of one modifier on one model; its variables are changed in place.

    Args:
        settings: What to prune, when and how.
        model: The model, built.
        steps_per_epoch: Training steps per epoch.
        optimizer: The optimizer that trains the model, built; None in one shot.
        sampler: Where gradient samples come from, unless the settings ask for those of training; None uses those of
            training.
        verbose: Whether to print a line for each pruning step.
        name: As in :class:`LivePruning`.
        logged: Warnings about the selection that are logged already; new ones are added.
        ranks: The processes that train the model, each of which has all of its weights; None for a single one.

    Attributes:
        variables: The variables in scope by path; frozen ones only if nothing but zeros is held.
        forms: Their forms in PyTorch by path.

    Raises:
        SettingError: If ``params``, ``exclude`` or ``mask_type`` of the settings does not fit the model.
        DeviceError: If a device of the settings does not exist.
        MemoryBudgetError: If the gradient window would not fit.
    """

    logger = logging.getLogger("mfac_keras")

    def __init__(
        self,
        settings: PruningSettings,
        model: Any,
        *,
        steps_per_epoch: int,
        optimizer: Any = None,
        sampler: GradientSampler | None = None,
        verbose: bool = False,
        name: str = "",
        logged: set[str] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.variables = select_variables(
            model,
            settings.params,
            settings.exclude,
            frozen_too=isinstance(settings, ConstantSettings),
            logged=logged,
            logger=logger_of(ranks or Alone(), self.logger),
        )
        self.forms = pytorch_forms(model, self.variables)
        self._model = model
        self._optimizer = optimizer
        self._sampler = sampler
        self._verbose = verbose
        super().__init__(
            settings,
            {name: int(np.prod(variable.shape)) for name, variable in self.variables.items()},
            steps_per_epoch=steps_per_epoch,
            sampled=sampler is not None,
            axes={name: form.core_axes for name, form in self.forms.items() if form.core_axes is not None},
            name=name,
            ranks=ranks,
        )

    def weights(self) -> dict[str, Array]:
        """Return the variables in scope as arrays, in their forms in PyTorch."""
        to_array = current_backend().to_array
        return {name: self.forms[name].of(to_array(variable)) for name, variable in self.variables.items()}

    def write(self, weights: Mapping[str, Array]) -> None:
        """Write weights into the variables."""
        to_tensor = current_backend().to_tensor
        for name, variable in self.variables.items():
            assign(variable, to_tensor(self.forms[name].back(weights[name])))

    def snapshot(self, undo: ExitStack) -> None:
        """Register callbacks that restore the current values of the variables."""
        snapshot(self.variables.values(), undo)

    def gradient_samples(self, pruner: MFACPruner, held_out: HeldOut | None) -> Iterator[Mapping[str, Array]]:
        """Draw gradient samples; ``held_out`` gets further batches."""
        assert self._sampler is not None  # samples are drawn only if there is one
        variables, options = list(self.variables.values()), pruner.settings.sampler_options
        samples = self._sampler.gradients(
            self._model, variables, pruner.num_samples_here, options, held_out=held_out, ranks=self.ranks
        )
        for row in samples:
            yield {name: form.of(array) for (name, form), array in zip(self.forms.items(), row, strict=True)}

    def loss_function(self) -> Callable[[Sequence[Any]], float]:
        """Return a function that computes the mean loss of batches in inference mode."""
        assert self._sampler is not None
        return partial(self._sampler.loss, self._model)

    def enforce_masks(self, result: PruneResult, undo: ExitStack) -> None:
        """Reset the state of the optimizer if weights regrow; the hooks hold the masks."""
        if result.resets_optimizer and self._optimizer is not None:
            slots = list(state_to_reset(self._optimizer, self.variables.values()))
            snapshot(slots, undo)
            for slot in slots:
                assign(slot, keras.ops.zeros(slot.shape, slot.dtype))

    def report(self, line: str, scheduled: ScheduledStep | None, step: int) -> None:
        """Log a pruning step, print it if asked, and log if an execution of several steps has delayed it."""
        super().report(line, scheduled, step)
        if self._verbose and self.ranks.rank == 0:
            print(f"\n{line}")
        steps_per_execution = getattr(self._model, "steps_per_execution", 1)
        if scheduled is not None and scheduled.step < step and steps_per_execution > 1:
            self.logger.info(
                "the pruning step of step %d was done at step %d, where an execution of %d steps ends (%s)",
                scheduled.step,
                step,
                steps_per_execution,
                scope_in_line(self.name, self.variables),
            )

    @property
    def masks(self) -> dict[str, Mask]:
        """The current masks in the forms of PyTorch, True keeps; empty while nothing is pruned and once released."""
        return super().masks if self._pruner.sparsity else {}

    @property
    def variable_masks(self) -> dict[str, Mask]:
        """The current masks in the shapes of the variables."""
        return {name: self.forms[name].back(mask) for name, mask in self.masks.items()}

    def observe_gradients(self, step: int, gradients: Mapping[int, Array]) -> None:
        """Store the gradients of a training step, in steps where the gradient window needs them.

        Args:
            step: Completed training steps before this one.
            gradients: Id of the variable and its unscaled gradient, flat, in the order of :attr:`forms`.
        """
        if self.needs_gradients(step):
            self.observe(
                {name: gradients[id(each)].reshape(self.forms[name].shape) for name, each in self.variables.items()}
            )

    def parsed(self, state: Mapping[str, Any]) -> Pruner:
        """Return a pruner with a state, which may have been saved with other paths and with another scope."""
        names = self.own_names(state)
        masks = {names[name]: mask for name, mask in state["masks"].items()}
        adoption = adopt({**state, "masks": masks}, self._pruner.state_dict(), self.weights())
        pruner = super().parsed(adoption.state)
        if adoption.difference():
            self.logger.warning("%s", adoption.difference())
        return pruner

    def own_names(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Return the path here for each path of a state.

        Keras numbers layers in the order in which a process makes them: variables of the same shapes in the same order
        are the same variables.
        """
        names, shapes = list(state["masks"]), [np.shape(mask) for mask in state["masks"].values()]
        if set(names) != set(self.variables) and shapes == [form.shape for form in self.forms.values()]:
            return dict(zip(names, self.variables, strict=True))
        return dict(zip(names, names, strict=True))

    def resume_from_zeros(self, step: int) -> bool:
        """Count every zero weight as pruned, if pruning steps were done and their state is lost.

        Returns:
            Whether there were such pruning steps.
        """
        done = sum(scheduled.step <= step for scheduled in self.schedule)
        if not done:
            return False
        is_dense = self.schedule[done - 1].sparsity == 0  # zeros may grow: a decompressed phase, or released masks
        masks = {name: (device_of(array).to_numpy(array) != 0) | is_dense for name, array in self.weights().items()}
        state = self._pruner.state_dict()
        unknown = {"window": None, "parts_done": 0, "parts": 0, "waits": False}
        begun = {key: value for key, value in unknown.items() if key in state}
        self._pruner.load_state_dict({**state, **begun, "masks": masks, "pruning_steps_done": done})
        return True
