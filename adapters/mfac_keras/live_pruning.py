"""One pruning modifier at work on one model: gradients in, weights and masks out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, device_of
from mfac_core.masks.zero_count import count_zeros
from mfac_core.pruners import MFACPruner, make_pruner
from mfac_core.pruners.adoption import Adoption, adopt
from mfac_core.pruners.step import PruneResult
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.session.log_lines import pruning_step_line, scope_in_line, unfinished_line
from mfac_core.session.measured_loss import LossMeasurement
from mfac_core.settings.pruning import ConstantSettings, MFACSettings, PruningSettings
from mfac_keras.assigning import assigned
from mfac_keras.backends import current_backend
from mfac_keras.layout import pytorch_forms
from mfac_keras.sampling import GradientSampler
from mfac_keras.selection import select_variables

__all__ = ["LivePruning", "combined_masks", "prune_if_due", "variables_in_scope"]

_logger = logging.getLogger("mfac_keras")

SlotsOf = Callable[[Iterable[Any]], Iterable[Any]]


def _no_slots(variables: Iterable[Any]) -> Iterable[Any]:
    return ()


class LivePruning:
    """The pruning steps and the masks of one modifier on one model. Variables in scope are changed in place.

    Args:
        settings: What to prune, when and how.
        model: The model, built.
        steps_per_epoch: Training steps per epoch.
        sampler: Where gradient samples come from, unless the settings ask for those of training; ``None`` takes those
            of training.
        verbose: Whether to print a line for each pruning step.
        name: Name of the modifier in the log, from :func:`mfac_core.recipe.naming.modifier_names`.
        logged: Warnings about the selection that are in the log already, to which new ones are added.

    Attributes:
        settings: What to prune, when and how.
        variables: The variables in scope by path; frozen ones among them only where nothing but zeros is held.
        forms: Their forms in PyTorch by path.

    Raises:
        SettingError: If ``params``, ``exclude`` or ``mask_type`` of the settings does not fit the model.
        DeviceError: If a listed device does not exist.
        MemoryBudgetError: If the gradient window would not fit.
    """

    def __init__(
        self,
        settings: PruningSettings,
        model: Any,
        *,
        steps_per_epoch: int,
        sampler: GradientSampler | None = None,
        verbose: bool = False,
        name: str = "",
        logged: set[str] | None = None,
    ) -> None:
        self.settings = settings
        self.variables = select_variables(
            model, settings.params, settings.exclude, frozen_too=isinstance(settings, ConstantSettings), logged=logged
        )
        self.forms = pytorch_forms(model, self.variables)
        self._model = model
        self._steps_per_epoch = steps_per_epoch
        uses_sampler = isinstance(settings, MFACSettings) and settings.gradient_origin == "auto"
        self._sampler = sampler if uses_sampler else None
        self._verbose = verbose
        self._name = name
        self._pruner = make_pruner(
            settings.of_selected(self.variables),
            self._weights(),
            steps_per_epoch=steps_per_epoch,
            live_gradients=self._sampler is None,
            axes={name: form.core_axes for name, form in self.forms.items() if form.core_axes is not None},
        )

    @property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The masks held now by path, True keeps; empty before the first pruning step and once released."""
        if self._pruner.is_released or not self._pruner.sparsity:
            return {}
        return {name: self.forms[name].back(mask) for name, mask in self._pruner.masks.items()}

    @property
    def only_holds(self) -> bool:
        """Whether it prunes nothing, and holds the zeros that are there."""
        return isinstance(self.settings, ConstantSettings)

    @property
    def sparsity(self) -> float:
        """Pruned fraction of the weights in scope."""
        return self._pruner.sparsity

    @property
    def is_finished(self) -> bool:
        """Whether no pruning step is left."""
        return self._pruner.is_finished

    @property
    def schedule(self) -> tuple[ScheduledStep, ...]:
        """Its pruning steps."""
        return self._pruner.schedule

    def unfinished(self, what: str, step: int) -> str:
        """Return a sentence for the log where training ends before the last pruning step, and none where it is done.

        Args:
            what: What has happened, such as ``fit ended``.
            step: Completed training steps.

        Returns:
            The sentence, or nothing.
        """
        if self._pruner.is_finished:
            return ""
        return unfinished_line(
            what,
            modifier=self._name,
            names=self.variables,
            epoch=step / self._steps_per_epoch,
            due=self.schedule[-1].epoch,
            sparsity=count_zeros(self._weights(), self._pruner.masks if self.masks else {}).sparsity,
            refused_rows=self._pruner.refused_rows if isinstance(self._pruner, MFACPruner) else 0,
        )

    def needs_gradients(self, step: int) -> bool:
        """Return whether the gradient that arrives after ``step`` completed steps is wanted.

        Args:
            step: Completed training steps.

        Returns:
            Whether it is.
        """
        return self._pruner.needs_gradients(step)

    def observe(self, step: int, gradients: Mapping[int, Array]) -> None:
        """Put the gradients of a training step into the gradient window, when it wants them.

        Args:
            step: Completed training steps before this one.
            gradients: Id of the variable and its unscaled gradient, flat, in the order of :attr:`forms`.
        """
        if self._pruner.needs_gradients(step):
            self._pruner.observe(
                {name: gradients[id(each)].reshape(self.forms[name].shape) for name, each in self.variables.items()}
            )

    def needs_pruning(self, step: int) -> bool:
        """Return whether a pruning step is due.

        Args:
            step: Completed training steps.

        Returns:
            Whether :meth:`prune_if_due` would change weights and masks.
        """
        return self._pruner.is_due(step)

    def prune_if_due(
        self, step: int, slots_of: SlotsOf = _no_slots, held: Mapping[str, npt.NDArray[np.bool_]] | None = None
    ) -> None:
        """Do the pruning step that is due, if there is one. An exception leaves weights, slots and masks as they were.

        Args:
            step: Completed training steps.
            slots_of: Gives what optimizers remember of variables: it is set to zero where weights have come back.
            held: Masks of other modifiers by path, True keeps; what they prune stays zero.
        """
        measurement = LossMeasurement(None if self._sampler is None else partial(self._sampler.loss, self._model))
        while self._pruner.is_due(step):
            scheduled = self._pruner.next_step
            start = time.perf_counter()
            self._sample_gradients(step, measurement)
            rows = self._pruner.num_rows if self._pruner.uses_gradients(step) else 0
            with self._pruner.pruning(self._weights(), step) as pruned:
                values = [
                    (variable, self._to_write(name, pruned.weights[name], held or {}))
                    for name, variable in self.variables.items()
                ]
                if pruned.resets_optimizer:
                    stale = slots_of(self.variables.values())
                    values += [(slot, np.zeros(slot.shape, slot.dtype)) for slot in stale]
                with assigned(values):
                    result = measurement.end(pruned)
            self._report(scheduled, step, rows, result, time.perf_counter() - start, measurement.where)

    def take_zeros_as_masks(self, step: int) -> bool:
        """Take every weight that is zero as pruned, where pruning steps have been done that nothing is known of.

        Args:
            step: Completed training steps.

        Returns:
            Whether there were such pruning steps.
        """
        done = sum(scheduled.step <= step for scheduled in self._pruner.schedule)
        if not done:
            return False
        is_dense = self._pruner.schedule[done - 1].sparsity == 0  # its zeros may grow: a decompressed phase, or the end
        masks = {name: self.forms[name].of((each.numpy() != 0) | is_dense) for name, each in self.variables.items()}
        state = self._pruner.state_dict()
        anew = (("window", None), ("parts_done", 0), ("parts", 0), ("waits", False))
        begun = {key: value for key, value in anew if key in state}
        self._pruner.load_state_dict({**state, **begun, "masks": masks, "pruning_steps_done": done})
        return True

    def state_dict(self, *, window: bool = True) -> dict[str, Any]:
        """Return all that a resumed run needs: arrays and plain values only.

        Args:
            window: Whether the gradient window belongs to it.

        Returns:
            The state.
        """
        state = self._pruner.state_dict()
        return state if window else {**state, "window": None}

    def own_names(self, state: Mapping[str, Any]) -> dict[str, str]:
        """Return under which paths the variables of a state are known here.

        Args:
            state: What :meth:`state_dict` returned. Where its variables have the shapes of these, in the same order,
                they are these: Keras numbers layers in the order in which a process makes them.

        Returns:
            Path there and path here.
        """
        names, shapes = list(state["masks"]), [np.shape(mask) for mask in state["masks"].values()]
        if set(names) != set(self.variables) and shapes == [form.shape for form in self.forms.values()]:
            return dict(zip(names, self.variables, strict=True))
        return dict(zip(names, names, strict=True))

    def adopt(self, state: Mapping[str, Any]) -> Adoption:
        """Return a state as this modifier would have saved it, with its variables under these paths.

        Args:
            state: What :meth:`state_dict` returned for the same settings.

        Returns:
            The state, and which variables have come into scope and left it since.

        Raises:
            ValueError: If it does not fit.
        """
        names = self.own_names(state)
        masks = {names[name]: mask for name, mask in state["masks"].items()}
        adoption = adopt({**state, "masks": masks}, self._pruner.state_dict(), self._weights())
        self._pruner.check_state(adoption.state)
        return adoption

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: What :meth:`state_dict` returned for the same settings and variables, or that of :meth:`adopt`.
        """
        self._pruner.load_state_dict(state)

    def _weights(self) -> dict[str, Array]:
        to_array = current_backend().to_array
        return {name: self.forms[name].of(to_array(variable)) for name, variable in self.variables.items()}

    def _to_write(self, name: str, weights: Array, held: Mapping[str, npt.NDArray[np.bool_]]) -> Any:
        values = self.forms[name].back(weights)
        if name not in held:
            return current_backend().to_tensor(values)
        return np.where(held[name], device_of(values).to_numpy(values), 0).astype(values.dtype, copy=False)

    def _sample_gradients(self, step: int, measurement: LossMeasurement) -> None:
        if self._sampler is None or not isinstance(self._pruner, MFACPruner) or not self._pruner.uses_gradients(step):
            return
        self._pruner.forget_gradients()
        variables = list(self.variables.values())
        options = self._pruner.settings.sampler_options
        rows = self._sampler.gradients(
            self._model,
            variables,
            self._pruner.num_gradients,
            options,
            held_out=measurement.held_out(self._pruner),
        )
        for row in rows:
            self._pruner.observe(
                {name: form.of(array) for (name, form), array in zip(self.forms.items(), row, strict=True)}
            )
        measurement.begin()

    def _report(
        self,
        scheduled: ScheduledStep | None,
        step: int,
        rows: int,
        result: PruneResult,
        seconds: float,
        measured_on: str,
    ) -> None:
        line = pruning_step_line(
            result,
            settings=self._pruner.settings,
            modifier=self._name,
            names=self.variables,
            step=step,
            steps_per_epoch=self._steps_per_epoch,
            num_rows=rows,
            seconds=seconds,
            measured_on=measured_on,
        )
        _logger.info("%s", line)
        if self._verbose:
            print(f"\n{line}")
        steps_per_execution = getattr(self._model, "steps_per_execution", 1)
        if scheduled is not None and scheduled.step < step and steps_per_execution > 1:
            _logger.info(
                "the pruning step of step %d was done at step %d, where an execution of %d steps ends (%s)",
                scheduled.step,
                step,
                steps_per_execution,
                scope_in_line(self._name, self.variables),
            )


def variables_in_scope(prunings: Sequence[LivePruning]) -> dict[str, Any]:
    """Return every variable that modifiers prune.

    Args:
        prunings: The modifiers at work on one model.

    Returns:
        The variables by path, each once.
    """
    return {name: variable for pruning in prunings for name, variable in pruning.variables.items()}


def combined_masks(prunings: Sequence[LivePruning]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the masks held now; where several modifiers hold one, a weight is kept that all of them keep.

    Args:
        prunings: The modifiers at work on one model.

    Returns:
        The masks by path, True keeps.
    """
    combined: dict[str, npt.NDArray[np.bool_]] = {}
    for pruning in prunings:
        for name, mask in pruning.masks.items():
            combined[name] = combined[name] & mask if name in combined else mask
    return combined


def prune_if_due(prunings: Sequence[LivePruning], step: int, slots_of: SlotsOf = _no_slots) -> None:
    """Do the pruning steps that are due. An exception leaves each of them done as a whole, or not at all.

    Args:
        prunings: The modifiers at work on one model.
        step: Completed training steps.
        slots_of: Gives what optimizers remember of variables.
    """
    share = sum(len(pruning.variables) for pruning in prunings) > len(variables_in_scope(prunings))
    for pruning in prunings:
        # the update of one must not move what another has pruned
        others = [each for each in prunings if each is not pruning] if share else []
        if pruning.needs_pruning(step):
            pruning.prune_if_due(step, slots_of, combined_masks(others))
