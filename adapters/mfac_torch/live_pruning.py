"""One pruning modifier at work on one model: gradients in, weights and masks out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from mfac_core.backends import Array
from mfac_core.pruner import MFACPruner, make_pruner
from mfac_core.pruning_step import PruneResult
from mfac_core.settings import PruningSettings
from mfac_torch.conversion import state_to_arrays, state_to_tensors, to_array, wait_until_read, write_back
from mfac_torch.masking import HeldMasks
from mfac_torch.sampling import GradSampler
from mfac_torch.selection import select_parameters

__all__ = ["LivePruning", "ScalarLogger", "one_shot"]

_logger = logging.getLogger("mfac_torch")


class ScalarLogger(Protocol):
    """Anything that takes numbers over time."""

    def log_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Take the value of ``tag`` after ``step`` optimizer steps."""


def one_shot(settings: PruningSettings) -> PruningSettings:
    """Return settings that reach the final sparsity in a single pruning step, before any training.

    Args:
        settings: Settings of a gradual run.

    Returns:
        The same with a schedule of one step.
    """
    return dataclasses.replace(settings, start_epoch=0.0, end_epoch=0.0, leave_enabled=True)


class LivePruning:
    """The pruning steps and the masks of one modifier on one model.

    Parameters in scope are changed in place. Before each optimizer step call :meth:`prune_if_due`,
    :meth:`observe_gradients` and :meth:`zero_gradients`; after it :meth:`hold_masks` and :meth:`prune_if_due`.

    Args:
        settings: What to prune, when and how.
        model: The model, unwrapped.
        steps_per_epoch: Optimizer steps per epoch.
        grad_sampler: Where gradient samples come from; ``None`` takes those of training.
        loggers: What to tell the sparsity of each parameter after a pruning step, as ``ParamPruning/<name>``.

    Raises:
        SettingError: If ``params`` of the settings does not fit the model.
        DeviceError: If a listed device does not exist.
        MemoryBudgetError: If the gradient window would not fit.
    """

    def __init__(
        self,
        settings: PruningSettings,
        model: nn.Module,
        *,
        steps_per_epoch: int,
        grad_sampler: GradSampler | None = None,
        loggers: Sequence[ScalarLogger] = (),
    ) -> None:
        self.settings = settings
        self.parameters = select_parameters(model, settings.params)
        self._model = model
        self._steps_per_epoch = steps_per_epoch
        self._sampler = grad_sampler
        self._loggers = loggers
        self._pruner = make_pruner(
            settings, self._weights(), steps_per_epoch=steps_per_epoch, live_gradients=grad_sampler is None
        )
        self._held = HeldMasks(self.parameters)

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks held now by parameter name, True keeps; empty before the first pruning step and once released."""
        return self._held.masks

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._pruner.is_finished

    def observe_gradients(self, step: int, scale: torch.Tensor | None = None) -> None:
        """Put the gradients that an optimizer is about to use into the gradient window, when it wants them.

        Args:
            step: Completed optimizer steps.
            scale: What the gradients were multiplied by for mixed precision; ``None`` for nothing.

        Raises:
            RuntimeError: If a pruning step falls due and there has been no gradient at all.
        """
        if not self._pruner.needs_gradients(step):
            return
        if all(parameter.grad is None for parameter in self.parameters.values()):
            self._check_not_due_without_rows(step)
            return
        gradients = {name: to_array(_gradient(parameter, scale)) for name, parameter in self.parameters.items()}
        self._pruner.observe(gradients)
        wait_until_read(parameter.device for parameter in self.parameters.values())

    def zero_gradients(self) -> None:
        """Set the gradients of pruned weights to zero."""
        self._held.zero_gradients()

    def hold_masks(self) -> None:
        """Set pruned weights to exactly zero."""
        self._held.zero_weights()

    def prune_if_due(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Do the pruning step that is due, if there is one.

        Args:
            step: Completed optimizer steps.
            optimizer: What it remembers of pruned entries is set to zero.
        """
        if not self._pruner.is_due(step):
            return
        start = time.perf_counter()
        self._sample_gradients()
        rows = self._num_rows
        result = self._pruner.prune(self._weights(), step)
        for name, parameter in self.parameters.items():
            write_back(parameter, result.weights[name])
        self._held.hold(result.masks)
        self._held.zero_weights()
        if optimizer is not None:
            self._held.zero_optimizer_state(optimizer)
        self._report(step, rows, result, time.perf_counter() - start)
        self._release_if_over()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: tensors and plain values only."""
        state: dict[str, Any] = state_to_tensors(self._pruner.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; weights at pruned entries are set to zero.

        Args:
            state: What :meth:`state_dict` returned for the same settings and the same parameters.
        """
        self._pruner.load_state_dict(state_to_arrays(state))
        self._held.release()
        if self._pruner.sparsity > 0:
            self._held.hold(self._pruner.masks)
            self._release_if_over()
        self._held.zero_weights()

    def _weights(self) -> dict[str, Array]:
        return {name: to_array(parameter) for name, parameter in self.parameters.items()}

    def _check_not_due_without_rows(self, step: int) -> None:
        planned = self._pruner.next_step
        if planned is not None and planned.step <= step + 1 and not self._num_rows:
            names = list(self.parameters)
            raise RuntimeError(
                f"the pruning step of epoch {planned.epoch:g} is due and there is no gradient: .grad is None for all "
                f"{len(names)} parameters in scope ({names[0]}, ...). Call loss.backward() before optimizer.step(), "
                "check that the loss depends on them, or pass grad_sampler=GradSampler(loader, loss_fn) to modify()"
            )

    def _sample_gradients(self) -> None:
        if self._sampler is None or not isinstance(self._pruner, MFACPruner):
            return
        self._pruner.forget_gradients()
        for gradients in self._sampler.gradients(self._model, self.parameters, self._pruner.num_gradients):
            self._pruner.observe({name: to_array(gradient) for name, gradient in gradients.items()})
            wait_until_read(gradient.device for gradient in gradients.values())

    @property
    def refused_rows(self) -> int:
        """Gradient samples that were left out because they held NaN or Inf."""
        return self._pruner.refused_rows if isinstance(self._pruner, MFACPruner) else 0

    @property
    def _num_rows(self) -> int:
        return self._pruner.num_rows if isinstance(self._pruner, MFACPruner) else 0

    def _report(self, step: int, rows: int, result: PruneResult, seconds: float) -> None:
        increase = result.predicted_loss_increase
        by_mfac = "" if increase is None else f", {rows} gradient rows, predicted loss increase {increase:.3g}"
        _logger.info(
            "pruning step at epoch %.2f (step %d): sparsity %.4f%s, %.2f s",
            step / self._steps_per_epoch,
            step,
            result.sparsity,
            by_mfac,
            seconds,
        )
        for name, mask in result.masks.items():
            for scalar_logger in self._loggers:
                scalar_logger.log_scalar(f"ParamPruning/{name}", 1.0 - float(mask.mean()), step)

    def _release_if_over(self) -> None:
        if self.is_finished and not self.settings.leave_enabled:
            self._held.release()


def _gradient(parameter: nn.Parameter, scale: torch.Tensor | None) -> torch.Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    if scale is None:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)  # unscaled values may be too small for half precision
    return gradient.detach().to(wide) / scale.to(gradient.device)
