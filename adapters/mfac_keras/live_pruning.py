"""One pruning modifier at work on one model: gradients in, weights and masks out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array
from mfac_core.pruner import MFACPruner, make_pruner
from mfac_core.pruning_step import PruneResult
from mfac_core.schedule import PlannedStep
from mfac_core.settings import MFACSettings, PruningSettings
from mfac_core.weight_names import ALL
from mfac_keras.backends import current_backend
from mfac_keras.layout import pytorch_forms
from mfac_keras.sampling import GradientSampler
from mfac_keras.selection import select_variables

__all__ = ["LivePruning", "combined_masks", "prune_if_due", "variables_in_scope"]

_logger = logging.getLogger("mfac_keras")


class LivePruning:
    """The pruning steps and the masks of one modifier on one model. Variables in scope are changed in place.

    Args:
        settings: What to prune, when and how.
        model: The model, built.
        steps_per_epoch: Training steps per epoch.
        sampler: Where gradient samples come from, unless the settings ask for those of training; ``None`` takes those
            of training.
        verbose: Whether to print a line for each pruning step.

    Attributes:
        settings: What to prune, when and how.
        variables: The variables in scope by path.
        forms: Their forms in PyTorch by path.

    Raises:
        SettingError: If ``params`` of the settings does not fit the model.
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
    ) -> None:
        self.settings = settings
        self.variables = select_variables(model, settings.params)
        self.forms = pytorch_forms(model, self.variables)
        self._model = model
        self._steps_per_epoch = steps_per_epoch
        uses_sampler = isinstance(settings, MFACSettings) and settings.gradient_origin == "auto"
        self._sampler = sampler if uses_sampler else None
        self._verbose = verbose
        self._pruner = make_pruner(
            replace(settings, params=(ALL,)),  # which variables that means has been decided above
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
    def sparsity(self) -> float:
        """Pruned fraction of the weights in scope."""
        return self._pruner.sparsity

    @property
    def schedule(self) -> tuple[PlannedStep, ...]:
        """Its pruning steps."""
        return self._pruner.schedule

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._pruner.is_finished

    @property
    def refused_rows(self) -> int:
        """Gradient samples that were left out because they held NaN or Inf."""
        return self._pruner.refused_rows if isinstance(self._pruner, MFACPruner) else 0

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

    def prune_if_due(self, step: int) -> bool:
        """Do the pruning step that is due, if there is one.

        Args:
            step: Completed training steps.

        Returns:
            Whether what optimizers remember of the variables in scope is stale, and to be set to zero.
        """
        is_stale = False
        while self._pruner.is_due(step):
            planned = self._pruner.next_step
            start = time.perf_counter()
            self._sample_gradients(step)
            rows = self._pruner.num_rows if self._pruner.uses_gradients(step) else 0
            result = self._pruner.prune(self._weights(), step)
            for name, variable in self.variables.items():
                variable.assign(current_backend().to_tensor(self.forms[name].back(result.weights[name])))
            self._report(planned, step, rows, result, time.perf_counter() - start)
            is_stale = is_stale or result.resets_optimizer
        return is_stale

    def hold_zeros(self) -> int:
        """Set pruned weights to exactly zero.

        Returns:
            How many were not.
        """
        wrong = 0
        for name, mask in self.masks.items():
            weights = self.variables[name].numpy()
            found = int(np.count_nonzero(weights[~mask]))
            if found:
                self.variables[name].assign(np.where(mask, weights, np.zeros_like(weights)))
            wrong += found
        return wrong

    def take_zeros_as_masks(self, step: int) -> bool:
        """Take every weight that is zero as pruned, where pruning steps have been done that nothing is known of.

        Args:
            step: Completed training steps.

        Returns:
            Whether there were such pruning steps.
        """
        done = sum(planned.step <= step for planned in self._pruner.schedule)
        if not done:
            return False
        masks = {name: self.forms[name].of(each.numpy() != 0) for name, each in self.variables.items()}
        self._pruner.load_state_dict(self._pruner.state_dict() | {"masks": masks, "pruning_steps_done": done})
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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; call :meth:`hold_zeros` after it.

        Args:
            state: What :meth:`state_dict` returned for the same settings and variables of the same shapes in the same
                order. Their paths may differ: Keras numbers layers in the order in which a process makes them.
        """
        masks = state["masks"]
        if [np.shape(mask) for mask in masks.values()] == [form.shape for form in self.forms.values()]:
            masks = dict(zip(self.variables, masks.values(), strict=True))
        self._pruner.load_state_dict({**state, "masks": masks})

    def _weights(self) -> dict[str, Array]:
        to_array = current_backend().to_array
        return {name: self.forms[name].of(to_array(variable)) for name, variable in self.variables.items()}

    def _sample_gradients(self, step: int) -> None:
        if self._sampler is None or not isinstance(self._pruner, MFACPruner) or not self._pruner.uses_gradients(step):
            return
        self._pruner.forget_gradients()
        variables = list(self.variables.values())
        options = self._pruner.settings.sampler_options
        for row in self._sampler.gradients(self._model, variables, self._pruner.num_gradients, options):
            self._pruner.observe(
                {name: form.of(array) for (name, form), array in zip(self.forms.items(), row, strict=True)}
            )

    def _report(self, planned: PlannedStep | None, step: int, rows: int, result: PruneResult, seconds: float) -> None:
        increase = result.predicted_loss_increase
        by_mfac = "" if increase is None else f", {rows} gradient rows, predicted loss increase {increase:.3g}"
        line = (
            f"pruning step at epoch {step / self._steps_per_epoch:.2f} (step {step}): "
            f"sparsity {result.sparsity:.4f}{by_mfac}, {seconds:.2f} s"
        )
        _logger.info(line)
        if self._verbose:
            print(f"\n{line}")
        steps_per_execution = getattr(self._model, "steps_per_execution", 1)
        if planned is not None and planned.step < step and steps_per_execution > 1:
            _logger.info(
                "the pruning step of step %d was done at step %d, where an execution of %d steps ends",
                planned.step,
                step,
                steps_per_execution,
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


def prune_if_due(prunings: Sequence[LivePruning], step: int) -> list[Any]:
    """Do the pruning steps that are due.

    Args:
        prunings: The modifiers at work on one model.
        step: Completed training steps.

    Returns:
        The variables of which optimizers have to forget everything, because their weights have come back.
    """
    stale = [variable for pruning in prunings if pruning.prune_if_due(step) for variable in pruning.variables.values()]
    if sum(len(pruning.variables) for pruning in prunings) > len(variables_in_scope(prunings)):
        for pruning in prunings:  # the update of one may have moved what another has pruned
            pruning.hold_zeros()
    return stale
