"""One pruning modifier applied to one PyTorch model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mfac_core.backends import Array
from mfac_core.pruners import MFACPruner, Pruner
from mfac_core.pruners.step import PruneResult
from mfac_core.ranks import Alone
from mfac_core.ranks.logs import logger_of
from mfac_core.sample_batches import HeldOut
from mfac_core.session.live_pruning import LivePruning
from mfac_core.settings.pruning import ConstantSettings, PruningSettings
from mfac_torch.conversion import (
    check_prunable,
    state_to_arrays,
    state_to_tensors,
    to_array,
    to_tensor,
    write_back,
)
from mfac_torch.layout import weight_axes
from mfac_torch.masking import HeldMasks
from mfac_torch.optimizer_state import reset_pruned_state, reset_state
from mfac_torch.random_state import random_state, restore_random_state
from mfac_torch.ranks import TorchRanks
from mfac_torch.refusals import refuse_replaced
from mfac_torch.sampling import GradSampler
from mfac_torch.scalar_loggers import LogFunction
from mfac_torch.selection import select_parameters
from mfac_torch.sharded import is_sharded, local, reshard, shards_of
from mfac_torch.zeros import zeros_of

__all__ = ["TorchPruning"]


class TorchPruning(LivePruning):
    """The pruning steps and the masks of one modifier on one model; its parameters are changed in place.

    Args:
        settings: What to prune, when and how.
        model: The model, unwrapped.
        steps_per_epoch: Optimizer steps per epoch.
        optimizers: The optimizers that train the model.
        grad_sampler: Where gradient samples come from; None uses those of training.
        loggers: Functions that get the sparsity of each parameter after a pruning step, as ``ParamPruning/<name>``.
        name: As in :class:`LivePruning`.
        logged: Warnings about the selection that are logged already; new ones are added.
        ranks: The ranks that train the model.

    Attributes:
        parameters: The parameters in scope by name.
        held_masks: Their masks, on the devices of the parameters.

    Raises:
        SettingError: If ``params``, ``exclude`` or ``mask_type`` of the settings does not fit the model.
        DeviceError: If a device of the settings does not exist.
        MemoryBudgetError: If the gradient window would not fit.
    """

    logger = logging.getLogger("mfac_torch")
    library = "torch"

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
        ranks: TorchRanks | Alone | None = None,
    ) -> None:
        self.parameters = select_parameters(
            model,
            settings.params,
            settings.exclude,
            frozen_too=isinstance(settings, ConstantSettings),  # one that only holds zeros
            logged=logged,
            logger=logger_of(ranks or Alone(), self.logger),
        )
        check_prunable(self.parameters)
        self._model = model
        self._optimizers = optimizers
        self._trained_by = [_trained_by(optimizer, self.parameters) for optimizer in optimizers]
        self._sampler = grad_sampler
        self._loggers = loggers
        super().__init__(
            settings,
            {name: parameter.numel() for name, parameter in self.parameters.items()},
            steps_per_epoch=steps_per_epoch,
            sampled=grad_sampler is not None,
            axes=weight_axes(model, self.parameters),
            name=name,
            ranks=ranks,
            shards=shards_of(self.parameters, getattr(ranks, "group", None)),
        )
        self.held_masks = HeldMasks(self.parameters)
        self._sample: dict[str, Array] | None = None  # an incomplete sample, where several optimizers step in turn

    def weights(self) -> dict[str, Array]:
        """Return what this rank has of the parameters in scope, as arrays."""
        return {name: to_array(local(parameter)) for name, parameter in self.parameters.items()}

    def write(self, weights: Mapping[str, Array]) -> None:
        """Write weights into the parameters."""
        reshard(self._model)
        for name, parameter in self.parameters.items():
            write_back(local(parameter), weights[name])

    def snapshot(self, undo: ExitStack) -> None:
        """Register callbacks that restore the current values of the parameters."""
        for parameter in self.parameters.values():
            values = local(parameter)
            undo.callback(values.copy_, values.clone())

    def gradient_samples(self, pruner: MFACPruner, held_out: HeldOut | None) -> Iterator[Mapping[str, Array]]:
        """Draw this rank's share of the gradient samples, or its part of each; ``held_out`` gets further batches."""
        assert self._sampler is not None  # the caller draws samples only from a sampler
        options = pruner.settings.sampler_options
        samples = self._sampler.gradients(
            self._model, self.parameters, pruner.num_samples_here, options, held_out=held_out, ranks=self.ranks
        )
        for gradients in samples:
            yield {name: to_array(gradient) for name, gradient in gradients.items()}

    def loss_function(self) -> Callable[[Sequence[Any]], float]:
        """Return a function that computes the mean loss of batches, each time with the same dropout masks."""
        sampler, start = self._sampler, random_state()
        assert sampler is not None

        def loss(batches: Sequence[Any]) -> float:
            now = random_state()
            restore_random_state(start)
            try:
                return sampler.loss(self._model, batches)
            finally:
                restore_random_state(now)

        return loss

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Restore the random number generators after an exception."""
        before = random_state()
        try:
            yield
        except BaseException:
            restore_random_state(before)
            raise

    def enforce_masks(self, result: PruneResult, undo: ExitStack) -> None:
        """Hold the new masks, and reset optimizer state at pruned weights."""
        held_masks = HeldMasks(self.parameters)
        held_masks.hold(result.masks)
        held_masks.zero_weights()
        for optimizer in self._optimizers:
            if result.resets_optimizer:
                reset_state(optimizer, self.parameters.values(), undo, logger=self.logger)
            reset_pruned_state(optimizer, self.parameters, held_masks.pruned, undo, logger=self.logger)
        undo.callback(setattr, self, "held_masks", self.held_masks)
        self.held_masks = held_masks

    def after_pruning_step(self, result: PruneResult, step: int) -> None:
        """Release the masks if the pruner has, and pass the sparsity of each parameter to the loggers."""
        if not self.masks:
            self.held_masks.release()
        for log in self._loggers if self.ranks.rank == 0 else ():
            for name, mask in result.masks.items():
                log(f"ParamPruning/{name}", 1.0 - float(mask.mean()), step)
            if result.measured_loss_change is not None:
                of_modifier = f"/{self.name}" if self.name else ""
                log(f"PruningStep/measured_loss_change{of_modifier}", result.measured_loss_change, step)

    def state_dict(self, *, gradient_window: bool = True) -> dict[str, Any]:
        """Return everything a resumed run needs, with tensors in place of arrays."""
        state: dict[str, Any] = state_to_tensors(super().state_dict(gradient_window=gradient_window))
        return state

    def parsed(self, state: Mapping[str, Any]) -> Pruner:
        """Return a pruner with a state that holds tensors in place of arrays."""
        return super().parsed(state_to_arrays(state))

    def resume(self, pruner: Pruner) -> None:
        """Resume from a parsed state: hold its masks, and set pruned weights to zero."""
        super().resume(pruner)
        reshard(self._model)
        self._sample = None
        self.held_masks = HeldMasks(self.parameters)
        self.held_masks.hold(self.masks)
        difference = zeros_of(self.parameters, self.mask_tensors).difference()
        if difference:
            self.weights_logger.warning(
                "%s. The loaded masks set these weights to zero now; load the model's own state, saved together with "
                "them, before that of the manager",
                difference,
            )
        self.held_masks.zero_weights()

    @property
    def mask_tensors(self) -> dict[str, torch.Tensor]:
        """The complete masks as tensors on the devices of their parameters; in host memory if those are sharded."""
        if self.is_sharded:
            return {name: to_tensor(mask) for name, mask in self.masks.items()}
        return self.held_masks.masks

    @property
    def current_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the model has now under the names in scope; a replaced one may have another shape."""
        reshard(self._model)
        now = dict(self._model.named_parameters(remove_duplicate=False))
        return {name: now[name] for name in self.parameters if name in now}

    @property
    def is_sharded(self) -> bool:
        """Whether this rank has only a part of the parameters."""
        return any(map(is_sharded, self.parameters.values()))

    @property
    def weights_logger(self) -> logging.Logger:
        """Where differences between weights and masks are logged: on the first rank, or on each about its shards."""
        return type(self).logger if self.is_sharded else logger_of(self.ranks, type(self).logger)

    def check_not_replaced(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise an error if the model that an optimizer trains has been sharded since it was attached."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(each) in trained for each in (*self.parameters.values(), *self._model.parameters())):
            refuse_replaced(self._model, self.parameters)

    @property
    def untrained(self) -> list[str]:
        """Names of the parameters in scope that no optimizer trains."""
        return [name for name in self.parameters if not any(name in names for names in self._trained_by)]

    def observe_gradients(
        self, step: int, optimizer: int = 0, scale: torch.Tensor | None = None, *, begins_sample: bool = True
    ) -> None:
        """Store the gradients that an optimizer is about to use, if the gradient window needs them in this step.

        If several optimizers train the parameters, a sample is complete once each of them has been about to step.

        Args:
            step: Completed optimizer steps.
            optimizer: Index of the optimizer that is about to step.
            scale: The loss scale of mixed precision; None if gradients are unscaled.
            begins_sample: Whether this optimizer is the first to step after a backward pass.

        Raises:
            RuntimeError: If a pruning step is due and no parameter has had a gradient.
        """
        if not self._pruner.needs_gradients(step):
            self._sample = None
            return
        names = self._trained_by[optimizer]
        if len(names) < len(self.parameters):
            self._complete_sample(names, scale, begins_sample=begins_sample)
        elif all(parameter.grad is None for parameter in self.parameters.values()):
            self._check_not_due_without_rows(step)
        else:
            self._pruner.observe({name: to_array(_gradient(each, scale)) for name, each in self.parameters.items()})

    def trained_by(self, optimizer: int) -> Collection[str]:
        """Return the names of the parameters in scope that an optimizer trains, by its index."""
        return self._trained_by[optimizer]

    def update_trained_by(self, optimizer: int) -> None:
        """Look up again which parameters an optimizer trains, after it has been given more."""
        self._trained_by[optimizer] = _trained_by(self._optimizers[optimizer], self.parameters)

    def _complete_sample(self, names: Collection[str], scale: torch.Tensor | None, *, begins_sample: bool) -> None:
        if begins_sample:
            self._sample = {}
        if self._sample is None:  # the window has needed gradients only since the middle of a round
            return
        # Copies, because the gradients may be overwritten before the last optimizer of the round steps.
        self._sample |= {name: to_array(_gradient(self.parameters[name], scale).clone()) for name in names}
        if len(self._sample) == len(self.parameters):
            self._pruner.observe(self._sample)
            self._sample = None

    def _check_not_due_without_rows(self, step: int) -> None:
        scheduled = self._pruner.next_step
        if scheduled is not None and self._pruner.uses_gradients(step + 1) and not self._pruner.num_rows:
            names = list(self.parameters)
            raise RuntimeError(
                f"the pruning step of epoch {scheduled.epoch:g} is due and there is no gradient: .grad is None for all "
                f"{len(names)} parameters in scope ({names[0]}, ...). Call loss.backward() before optimizer.step(), "
                "check that the loss depends on them, or pass grad_sampler=GradSampler(loader, loss_fn) to modify()"
            )


def _trained_by(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Collection[str]:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return dict.fromkeys(name for name, parameter in parameters.items() if id(parameter) in trained)


def _gradient(parameter: nn.Parameter, scale: torch.Tensor | None) -> torch.Tensor:
    """Return what this rank has of a gradient."""
    if parameter.grad is None:
        return torch.zeros_like(local(parameter))
    gradient = local(parameter.grad)
    if scale is None:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)  # unscaled values may underflow in half precision
    return gradient.to(wide) / scale.to(gradient.device)
