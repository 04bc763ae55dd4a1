"""One pruning modifier at work on one model: gradients in, weights and masks out."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from mfac_core.backends import Array, device_of
from mfac_core.masks.zero_count import count_zeros
from mfac_core.pruners import MFACPruner, Pruner, make_pruner
from mfac_core.pruners.step import PruneResult
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.session.log_lines import pruning_step_line
from mfac_core.session.measured_loss import LossMeasurement
from mfac_core.settings.pruning import ConstantSettings, MFACSettings, PruningSettings
from mfac_torch.conversion import (
    check_prunable,
    state_to_arrays,
    state_to_tensors,
    to_array,
    wait_until_read,
    write_back,
)
from mfac_torch.layout import weight_axes
from mfac_torch.masking import HeldMasks
from mfac_torch.optimizer_state import forget, forget_all
from mfac_torch.random_state import random_state, restore_random_state
from mfac_torch.sampling import GradSampler
from mfac_torch.scalar_loggers import LogFunction
from mfac_torch.selection import select_parameters

__all__ = ["LivePruning", "Resumed", "masks_together"]

_logger = logging.getLogger("mfac_torch")


class Resumed(NamedTuple):
    """What a state makes of a modifier at work.

    Attributes:
        pruner: The pruner that has the state.
        held: The masks that it holds.
    """

    pruner: Pruner
    held: HeldMasks


class LivePruning:
    """The pruning steps and the masks of one modifier on one model.

    Parameters in scope are changed in place. Before each step of an optimizer call :meth:`prune_if_due`,
    :meth:`observe_gradients` and :meth:`zero_gradients`; after it :meth:`hold_masks` and :meth:`prune_if_due`.

    Args:
        settings: What to prune, when and how.
        model: The model, unwrapped.
        steps_per_epoch: Optimizer steps per epoch.
        optimizers: The optimizers that train the model.
        grad_sampler: Where gradient samples come from; ``None`` takes those of training.
        loggers: What to tell the sparsity of each parameter after a pruning step, as ``ParamPruning/<name>``.
        name: Name of the modifier in the log, from :func:`mfac_core.recipe.linting.modifier_names`.
        logged: Warnings about the selection that are in the log already, to which new ones are added.

    Attributes:
        settings: What to prune, when and how.
        parameters: The parameters in scope by name.
        name: Name of the modifier in the log; empty where it is the only one.

    Raises:
        SettingError: If ``params``, ``exclude`` or ``mask_type`` of the settings does not fit the model.
        DeviceError: If a listed device does not exist.
        MemoryBudgetError: If the gradient window would not fit.
    """

    def __init__(
        self,
        settings: PruningSettings,
        model: nn.Module,
        *,
        steps_per_epoch: int,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        grad_sampler: GradSampler | None = None,
        loggers: Sequence[LogFunction] = (),
        name: str = "",
        logged: set[str] | None = None,
    ) -> None:
        self.settings = settings
        self.name = name
        # Zeros that are held only need no training: they stay where nothing moves them.
        self.parameters = select_parameters(
            model, settings.params, settings.exclude, frozen_too=isinstance(settings, ConstantSettings), logged=logged
        )
        check_prunable(self.parameters)
        self._model = model
        self._steps_per_epoch = steps_per_epoch
        self._optimizers = optimizers
        self._trained_by = [_trained_by(optimizer, self.parameters) for optimizer in optimizers]
        uses_sampler = isinstance(settings, MFACSettings) and settings.gradient_origin == "auto"
        self._sampler = grad_sampler if uses_sampler else None
        self._loggers = loggers
        self._pruner = make_pruner(
            settings.of_selected(self.parameters),
            self._weights(),
            steps_per_epoch=steps_per_epoch,
            live_gradients=self._sampler is None,
            axes=weight_axes(model, self.parameters),
        )
        self._held = HeldMasks(self.parameters)
        self._parts: dict[str, Array] | None = None  # of a gradient sample that several optimizers give

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks held now by parameter name, True keeps; empty before the first pruning step and once released."""
        return self._held.masks

    @property
    def sparsity(self) -> float:
        """Fraction of the weights in scope that is pruned and zero, counted from the weights."""
        return count_zeros(self._weights(), self._host_masks()).sparsity

    @property
    def schedule(self) -> Sequence[ScheduledStep]:
        """The pruning steps of the whole run."""
        return self._pruner.schedule

    @property
    def devices(self) -> tuple[str, ...]:
        """Where blocks of the Fisher are computed; nothing for a modifier that uses none."""
        if not isinstance(self.settings, MFACSettings):
            return ()
        if self.settings.devices != ("auto",):
            return self.settings.devices
        return (device_of(next(iter(self._weights().values()))).name,)

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._pruner.is_finished

    @property
    def refused_rows(self) -> int:
        """Gradient samples that were left out because they held NaN or Inf."""
        return self._pruner.refused_rows

    @property
    def current_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in scope as the model has them now: those that took the place of others, too, of any shape."""
        now = dict(self._model.named_parameters(remove_duplicate=False))
        return {name: now[name] for name in self.parameters if name in now}

    @property
    def untrained(self) -> list[str]:
        """Names of the parameters in scope that no optimizer trains."""
        return [name for name in self.parameters if not any(name in names for names in self._trained_by)]

    def observe_gradients(
        self, step: int, optimizer: int = 0, scale: torch.Tensor | None = None, *, begins_sample: bool = True
    ) -> None:
        """Put the gradients that an optimizer is about to use into the gradient window, when it wants them.

        Where several optimizers train the parameters, a sample is complete when each has given its part.

        Args:
            step: Completed optimizer steps.
            optimizer: Which of the optimizers is about to make its step.
            scale: What the gradients were multiplied by for mixed precision; ``None`` for nothing.
            begins_sample: Whether this optimizer is the first to step after a backward pass.

        Raises:
            RuntimeError: If a pruning step falls due and there has been no gradient at all.
        """
        if not self._pruner.needs_gradients(step):
            self._parts = None
            return
        names = self._trained_by[optimizer]
        if len(names) < len(self.parameters):
            self._observe_part(names, scale, begins_sample=begins_sample)
        elif all(parameter.grad is None for parameter in self.parameters.values()):
            self._check_not_due_without_rows(step)
        else:
            self._pruner.observe(self._gradients(self.parameters, scale))
            wait_until_read(parameter.device for parameter in self.parameters.values())

    def zero_gradients(self, optimizer: int = 0) -> None:
        """Set the gradients of pruned weights to zero.

        Args:
            optimizer: Those of the parameters that this optimizer trains.
        """
        self._held.zero_gradients(self._trained_by[optimizer])

    def hold_masks(self, optimizer: int | None = None) -> None:
        """Set pruned weights to exactly zero.

        Args:
            optimizer: Those of the parameters that this optimizer trains; ``None`` for all.
        """
        self._held.zero_weights(None if optimizer is None else self._trained_by[optimizer])

    def held_parameters(self, optimizer: int | None = None) -> dict[str, nn.Parameter]:
        """Return the parameters whose masks are held.

        Args:
            optimizer: Those of the parameters that this optimizer trains; ``None`` for all.

        Returns:
            The parameters by name.
        """
        return self._held.parameters(None if optimizer is None else self._trained_by[optimizer])

    def has_regrown(self, optimizer: int | None = None) -> bool:
        """Return whether a pruned weight is not zero.

        Args:
            optimizer: Of the parameters that this optimizer trains only; ``None`` for all.

        Returns:
            Whether there is one.
        """
        return self._held.has_regrown(None if optimizer is None else self._trained_by[optimizer])

    def seems_regrown(self, optimizer: int) -> bool:
        """Return whether one of a few pruned weights is not zero, in host memory, at next to no cost.

        Args:
            optimizer: Of the parameters that this optimizer trains only.

        Returns:
            Whether there is one.
        """
        return self._held.seems_regrown(self._trained_by[optimizer])

    def follow(self, optimizer: int) -> None:
        """Look again which parameters an optimizer trains: it may have got more since.

        Args:
            optimizer: Which of the optimizers.
        """
        self._trained_by[optimizer] = _trained_by(self._optimizers[optimizer], self.parameters)

    def is_due(self, step: int) -> bool:
        """Return whether a pruning step is due.

        Args:
            step: Completed optimizer steps.

        Returns:
            Whether :meth:`prune_if_due` would prune.
        """
        return self._pruner.is_due(step)

    def prune_if_due(self, step: int) -> None:
        """Do the pruning step that is due, if there is one, with all its parts.

        An exception on the way leaves weights, masks, optimizers and progress as they were before the part that it
        stopped, and the next call does this part as if nothing had happened.

        Args:
            step: Completed optimizer steps.
        """
        if not self._pruner.is_due(step):
            return
        measurement = self._measurement()
        result = self._prune(step, measurement)
        while self._pruner.is_due(step):
            result = self._prune(step, measurement)
        for log in self._loggers:
            for name, mask in result.masks.items():
                log(f"ParamPruning/{name}", 1.0 - float(mask.mean()), step)
            if result.measured_loss_change is not None:
                of_modifier = f"/{self.name}" if self.name else ""
                log(f"PruningStep/measured_loss_change{of_modifier}", result.measured_loss_change, step)

    def state_dict(self, *, gradient_window: bool = True) -> dict[str, Any]:
        """Return all that a resumed run needs: tensors and plain values only.

        Args:
            gradient_window: Whether the window is part of it.

        Returns:
            The state.
        """
        state: dict[str, Any] = state_to_tensors(self._pruner.state_dict())
        if not gradient_window:
            state.pop("window", None)
        return state

    def resumed(self, state: Mapping[str, Any]) -> Resumed:
        """Return what :meth:`resume` takes over from a state. Nothing is changed yet.

        Args:
            state: What :meth:`state_dict` returned for the same settings and the same parameters.

        Returns:
            The pruner that has the state, and the masks that it holds.

        Raises:
            ValueError: If the state is broken or does not fit.
        """
        pruner = copy(self._pruner)
        pruner.load_state_dict(state_to_arrays(state))
        held = HeldMasks(self.parameters)
        has_begun = pruner.sparsity > 0 or pruner.next_step != pruner.schedule[0]
        if has_begun and not pruner.is_released:
            held.hold(pruner.masks)
        return Resumed(pruner, held)

    def resume(self, resumed: Resumed) -> None:
        """Go on from a state: its masks are held from now on, and weights at pruned entries are set to zero.

        Args:
            resumed: What :meth:`resumed` returned.
        """
        self._parts = None
        self._pruner, self._held = resumed
        difference = count_zeros(self._weights(), self._host_masks()).difference()
        if difference:
            _logger.warning(
                "%s. The masks of the loaded state are held, so these weights are set to zero; load the model's own "
                "state, saved together with it, before that of the manager",
                difference,
            )
        self._held.zero_weights()

    def _prune(self, step: int, measurement: LossMeasurement) -> PruneResult:
        """Return what one part of a pruning step leaves, once all of it is done; or nothing of it is."""
        start = time.perf_counter()
        with self._sampled(step, measurement), ExitStack() as undo:
            rows = self._pruner.num_rows if self._pruner.uses_gradients(step) else 0
            with self._pruner.pruning(self._weights(), step) as pruned:
                held = HeldMasks(self.parameters)
                held.hold(pruned.masks)
                for name, parameter in self.parameters.items():
                    values = parameter.detach()
                    undo.callback(values.copy_, values.clone())
                    write_back(parameter, pruned.weights[name])
                held.zero_weights()
                for optimizer in self._optimizers:
                    if pruned.resets_optimizer:
                        forget_all(optimizer, self.parameters.values(), undo)
                    forget(optimizer, self.parameters, held.pruned, undo)
                result = measurement.end(pruned)
            if self._pruner.is_released:
                held.release()
            self._held = held
            undo.pop_all()
        self._report(step, rows, result, time.perf_counter() - start, measurement.where)
        return result

    def _host_masks(self) -> dict[str, Array]:
        return {name: mask.cpu().numpy() for name, mask in self.masks.items()}

    def _weights(self) -> dict[str, Array]:
        return {name: to_array(parameter) for name, parameter in self.parameters.items()}

    def _gradients(self, names: Iterable[str], scale: torch.Tensor | None) -> dict[str, Array]:
        return {name: to_array(_gradient(self.parameters[name], scale)) for name in names}

    def _observe_part(self, names: Collection[str], scale: torch.Tensor | None, *, begins_sample: bool) -> None:
        if begins_sample:
            self._parts = {}
        if self._parts is None:
            return
        self._parts |= {name: array.copy() for name, array in self._gradients(names, scale).items()}
        if len(self._parts) == len(self.parameters):
            self._pruner.observe(self._parts)
            self._parts = None

    def _check_not_due_without_rows(self, step: int) -> None:
        scheduled = self._pruner.next_step
        if scheduled is not None and self._pruner.uses_gradients(step + 1) and not self._pruner.num_rows:
            names = list(self.parameters)
            raise RuntimeError(
                f"the pruning step of epoch {scheduled.epoch:g} is due and there is no gradient: .grad is None for all "
                f"{len(names)} parameters in scope ({names[0]}, ...). Call loss.backward() before optimizer.step(), "
                "check that the loss depends on them, or pass grad_sampler=GradSampler(loader, loss_fn) to modify()"
            )

    def _measurement(self) -> LossMeasurement:
        """Return a measurement of a pruning step: dropout, where it is active, drops the same before it and after."""
        if self._sampler is None:
            return LossMeasurement(None)
        sampler, draws = self._sampler, random_state()

        def loss(batches: Sequence[Any]) -> float:
            now = random_state()
            restore_random_state(draws)
            try:
                return sampler.loss(self._model, batches)
            finally:
                restore_random_state(now)

        return LossMeasurement(loss)

    @contextmanager
    def _sampled(self, step: int, measurement: LossMeasurement) -> Iterator[None]:
        """Put fresh samples into the gradient window for a block; if it fails, the next try draws the same ones."""
        if self._sampler is None or not isinstance(self._pruner, MFACPruner) or not self._pruner.uses_gradients(step):
            yield
            return
        before = random_state()
        try:
            self._pruner.forget_gradients()
            samples = self._sampler.gradients(
                self._model,
                self.parameters,
                self._pruner.num_gradients,
                self._pruner.settings.sampler_options,
                held_out=measurement.held_out(self._pruner),
            )
            for gradients in samples:
                self._pruner.observe({name: to_array(gradient) for name, gradient in gradients.items()})
                wait_until_read(gradient.device for gradient in gradients.values())
            measurement.begin()
            yield
        except BaseException:
            restore_random_state(before)
            raise
        finally:
            self._pruner.forget_gradients()

    def _report(self, step: int, rows: int, result: PruneResult, seconds: float, measured_on: str) -> None:
        line = pruning_step_line(
            result,
            settings=self._pruner.settings,
            modifier=self.name,
            names=self.parameters,
            step=step,
            steps_per_epoch=self._steps_per_epoch,
            num_rows=rows,
            seconds=seconds,
            measured_on=measured_on,
        )
        _logger.info("%s", line)


def masks_together(prunings: Iterable[LivePruning]) -> dict[str, torch.Tensor]:
    """Return the masks that several modifiers hold together.

    Args:
        prunings: The pruning modifiers at work.

    Returns:
        The masks by parameter name: what one of them prunes is pruned.
    """
    masks: dict[str, torch.Tensor] = {}
    for pruning in prunings:
        for name, mask in pruning.masks.items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


def _trained_by(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Collection[str]:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return dict.fromkeys(name for name, parameter in parameters.items() if id(parameter) in trained)


def _gradient(parameter: nn.Parameter, scale: torch.Tensor | None) -> torch.Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    if scale is None:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)  # unscaled values may be too small for half precision
    return gradient.detach().to(wide) / scale.to(gradient.device)
