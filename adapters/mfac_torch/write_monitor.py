"""Writes to pruned weights by other code: detected between two optimizer steps, and logged with their likely cause.

Pruned weights are set to zero after each step of the attached optimizers. In between, anything may write to the model:
``load_state_dict`` of another epoch, an average of the weights, an optimizer that was not given to ``modify``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mfac_core.session.live_pruning import combined_masks
from mfac_core.weight_names import join_names
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.zeros import zeros_of

__all__ = ["WriteMonitor"]


class WriteMonitor:
    """Detects steps of optimizers that are not attached, and pruned weights that are no longer zero.

    Args:
        optimizers: The attached optimizers.
        prunings: The pruning modifiers at work.
        steps_per_epoch: Optimizer steps per epoch; regrown weights are a warning once per epoch.
        logger: Where warnings about steps go.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        prunings: Sequence[TorchPruning],
        steps_per_epoch: int,
        *,
        logger: logging.Logger,
    ) -> None:
        self._optimizers = optimizers
        self._prunings = prunings
        self._steps_per_epoch = steps_per_epoch
        self._logger = logger
        self._names = {id(parameter): name for each in prunings for name, parameter in each.parameters.items()}
        self._versions: dict[int, int] = {}
        self._warned_in: int | None = None
        self._steps_before: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
        self._warned_of: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()
        self._num_steps = 0  # of all attached optimizers
        self._stepping: set[int] = set()
        self._last_step = 0
        self._other_optimizer = ""  # class of one that has stepped since the last step of an attached one
        self._handles: list[Any] = []
        self._known: WeakSet[torch.optim.Optimizer] = WeakSet()  # those that have begun a step

    def attach(self, step: int) -> None:
        """Add hooks to the steps of all optimizers in the process."""
        self._last_step = step
        self._handles = [
            register_optimizer_step_pre_hook(_weakly_bound(self._before_any)),
            register_optimizer_step_post_hook(_weakly_bound(self._after_any)),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def step_begins(self, number: int) -> None:
        """Note that an attached optimizer begins its step; steps of other optimizers inside it are part of it."""
        self._stepping.add(number)

    def step_ended(self, number: int, step: int) -> None:
        """Note that an attached optimizer has made its step, and that its pruned weights are zero."""
        self._stepping.discard(number)
        self._num_steps += 1
        self._last_step, self._other_optimizer = step, ""
        self.record_versions(number)

    def record_versions(self, number: int | None = None) -> None:
        """Record the version counters of pruned parameters: those that one optimizer trains, or all of them."""
        for parameter in self._pruned_parameters(number):
            self._versions[id(parameter)] = parameter._version

    def may_have_regrown(self, number: int, step: int) -> bool:
        """Return whether weights of an optimizer may have been written to, at next to no cost.

        An in-place operation raises the version counter of a tensor. A write through ``.data`` does not, so a few
        pruned weights are read as well. The first step of an epoch always returns True.
        """
        return (
            step % self._steps_per_epoch == 0
            or self._is_written(number)
            or any(pruning.held_masks.seems_regrown(pruning.trained_by(number)) for pruning in self._prunings)
        )

    def has_regrown(self) -> bool:
        """Return whether a pruned weight is not zero."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # the host cannot read values while a CUDA graph is recorded
        return any(pruning.held_masks.has_regrown() for pruning in self._prunings)

    def warn_of_regrown(self, step: int) -> None:
        """Log which pruned weights are not zero: as a warning once per epoch, otherwise for debugging."""
        epoch = step // self._steps_per_epoch
        level = logging.DEBUG if self._warned_in == epoch else logging.WARNING
        self._warned_in = epoch
        weights = {name: each for pruning in self._prunings for name, each in pruning.parameters.items()}
        self._prunings[0].weights_logger.log(
            level,
            "%s, at step %d. Likely cause: %s. The next step sets these weights to zero again. For an average of the "
            "weights use mfac_torch.apply_masks; to train without masks call finalize() first (logged once per epoch)",
            zeros_of(weights, combined_masks(pruning.mask_tensors for pruning in self._prunings)).difference(),
            step,
            self.likely_cause(),
        )

    def likely_cause(self) -> str:
        """Return what has most likely written to the weights."""
        if self._other_optimizer:
            return f"steps of {self._other_optimizer}, which was not given to modify()"
        return (
            "load_state_dict of an earlier model, restored best weights, an average of the weights, or steps of an "
            f"optimizer other than the {self._attached_classes} given to modify()"
        )

    def missing_steps(self) -> str:
        """Return a clause that the attached optimizers make no steps while weights change; empty if they do."""
        if self._num_steps and not self._other_optimizer and not self._is_written(None):
            return ""
        since = f"since step {self._last_step}" if self._num_steps else "at all"
        others = f", but {self._other_optimizer} has" if self._other_optimizer else ""
        return (
            f"the {self._attached_classes} given to modify() has taken no step {since}{others}; pass the optimizer "
            "whose step() the training loop calls: the new one if it was replaced, the inner one (base_optimizer) if "
            "the loop calls first_step() and second_step(), as for SAM"
        )

    @property
    def _attached_classes(self) -> str:
        return " and ".join(dict.fromkeys(type(each).__name__ for each in self._optimizers))

    def _pruned_parameters(self, number: int | None) -> Iterator[nn.Parameter]:
        for pruning in self._prunings:
            yield from pruning.held_masks.parameters(None if number is None else pruning.trained_by(number))

    def _is_written(self, number: int | None) -> bool:
        return any(
            self._versions.get(id(parameter), parameter._version) != parameter._version
            for parameter in self._pruned_parameters(number)
        )

    def _before_any(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer not in self._known:
            self._known.add(optimizer)
            for pruning in self._prunings:
                pruning.check_not_replaced(optimizer)
        self._steps_before[optimizer] = self._num_steps

    def _after_any(self, optimizer: torch.optim.Optimizer) -> None:
        # Wrapping optimizers nest steps both ways: one inside the step of an attached optimizer is a part of that
        # step, and one that an attached optimizer has stepped inside of wraps it.
        wraps_attached = self._steps_before.pop(optimizer, self._num_steps) != self._num_steps
        if self._stepping or wraps_attached or any(optimizer is each for each in self._optimizers):
            return
        updated = [
            self._names[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._names and parameter.grad is not None
        ]
        if not updated:
            return
        self._other_optimizer = type(optimizer).__name__
        if optimizer in self._warned_of:
            return
        self._warned_of[optimizer] = True
        self._logger.warning(
            "%s has taken a step on %s but was not given to modify(), so pruned weights regrow and its steps do not "
            "count for the schedule; %s. If several optimizers train the model, pass all of them",
            self._other_optimizer,
            join_names(updated),
            self.missing_steps(),
        )


def _weakly_bound(hook: Callable[[torch.optim.Optimizer], None]) -> Callable[..., None]:
    """Return a hook for all optimizers that does not keep its owner alive, and does nothing in a compiled step."""
    method = WeakMethod(hook)

    def called(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        bound = method()
        if bound is not None:
            bound(optimizer)

    return called
