"""What others do to the weights in scope between the steps of a session: noticed, and said with its cause and cure.

Masks are held after each step of the optimizers that are followed. In between anything may write to the model: the
weights of another epoch, an average, an optimizer that nobody told the session of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mfac_core.session.live_pruning import combined_masks
from mfac_core.weight_names import join_names
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.zeros import zeros_of

__all__ = ["OutsideChanges"]

_logger = logging.getLogger("mfac_torch")


class OutsideChanges:
    """Notices steps of optimizers that are not followed, and pruned weights that are not zero any more.

    Args:
        optimizers: The optimizers that are followed.
        prunings: The pruning modifiers at work.
        steps_per_epoch: Optimizer steps per epoch: what has grown back is said once an epoch.
    """

    def __init__(
        self, optimizers: Sequence[torch.optim.Optimizer], prunings: Sequence[TorchPruning], steps_per_epoch: int
    ) -> None:
        self._optimizers = optimizers
        self._prunings = prunings
        self._steps_per_epoch = steps_per_epoch
        self._names = {id(parameter): name for each in prunings for name, parameter in each.parameters.items()}
        self._versions: dict[int, int] = {}
        self._warned_in: int | None = None
        self._began: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
        self._warned_of: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()
        self._steps = 0  # of the optimizers that are followed
        self._under_way: set[int] = set()
        self._last_step = 0
        self._others = ""  # optimizers that have stepped since
        self._handles: list[Any] = []

    def attach(self, step: int) -> None:
        """Begin to look at the steps of all optimizers there are.

        Args:
            step: Completed optimizer steps.
        """
        self._last_step = step
        self._handles = [
            register_optimizer_step_pre_hook(_untied(self._before_any)),
            register_optimizer_step_post_hook(_untied(self._after_any)),
        ]

    def detach(self) -> None:
        """Look at nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, number: int) -> None:
        """Know that an optimizer that is followed begins its step: what steps inside it is part of it.

        Args:
            number: Which of the optimizers.
        """
        self._under_way.add(number)

    def end(self, number: int, step: int) -> None:
        """Know that an optimizer that is followed has made its step, and that its masks are held.

        Args:
            number: Which of the optimizers.
            step: Completed optimizer steps.
        """
        self._under_way.discard(number)
        self._steps += 1
        self._last_step, self._others = step, ""
        self.remember(number)

    def remember(self, number: int | None = None) -> None:
        """Take the weights as they are now for what the masks have made of them.

        Args:
            number: Those that this optimizer trains; ``None`` for all.
        """
        for pruning in self._prunings:
            for parameter in pruning.held.parameters(None if number is None else pruning.trained_by(number)).values():
                self._versions[id(parameter)] = parameter._version

    def may_have_changed(self, number: int, step: int) -> bool:
        """Return whether it is worth looking at all the weights, at next to no cost.

        Args:
            number: The optimizer that is about to step.
            step: Completed optimizer steps.

        Returns:
            Whether somebody has written to them, as far as it leaves a trace or shows in a few of them; at the first
            step of an epoch always.
        """
        return (
            step % self._steps_per_epoch == 0
            or self._is_written(number)
            or any(pruning.held.seems_regrown(pruning.trained_by(number)) for pruning in self._prunings)
        )

    def has_regrown(self) -> bool:
        """Return whether a pruned weight is not zero."""
        if (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):  # nothing can be read while a CUDA graph is recorded
            return False
        return any(pruning.held.has_regrown() for pruning in self._prunings)

    def warn_of_regrown(self, step: int) -> None:
        """Say which pruned weights are not zero and that they will be, once an epoch.

        Args:
            step: Completed optimizer steps.
        """
        epoch = step // self._steps_per_epoch
        level = logging.DEBUG if self._warned_in == epoch else logging.WARNING
        self._warned_in = epoch
        weights = {name: each for pruning in self._prunings for name, each in pruning.parameters.items()}
        _logger.log(
            level,
            "%s, at step %d. The likely cause: %s. The masks are held, so the next step sets these weights to zero; "
            "give an average of the weights its zeros with mfac_torch.apply_masks, and to train without the masks "
            "call finalize() first (said once an epoch)",
            zeros_of(weights, combined_masks(pruning.mask_tensors for pruning in self._prunings)).difference(),
            step,
            self.likely_cause(),
        )

    def likely_cause(self) -> str:
        """Return what most likely has written to the weights."""
        if self._others:
            return f"steps of {self._others}, which was not given to modify()"
        return (
            "load_state_dict of an earlier model, best weights that were restored, an average of the weights, or steps "
            f"that are not those of the {self._followed} given to modify()"
        )

    def missing_steps(self) -> str:
        """Return in a clause that the optimizers stand still while weights change, if they do; else nothing."""
        if self._steps and not self._others and not self._is_written(None):
            return ""
        since = f"since step {self._last_step}" if self._steps else "at all"
        others = f", but steps of {self._others}" if self._others else ""
        return (
            f"there was no step of the {self._followed} given to modify() {since}{others}; pass the optimizer whose "
            "step() the training loop calls: the new one where one was replaced, the inner one (base_optimizer) where "
            "the loop calls first_step() and second_step() as for SAM"
        )

    @property
    def _followed(self) -> str:
        return " and ".join(dict.fromkeys(type(each).__name__ for each in self._optimizers))

    def _is_written(self, number: int | None) -> bool:
        return any(
            self._versions.get(id(parameter), parameter._version) != parameter._version
            for pruning in self._prunings
            for parameter in pruning.held.parameters(None if number is None else pruning.trained_by(number)).values()
        )

    def _before_any(self, optimizer: torch.optim.Optimizer) -> None:
        self._began[optimizer] = self._steps

    def _after_any(self, optimizer: torch.optim.Optimizer) -> None:
        # A step inside a followed one belongs to it, and so does one that a followed step was inside of.
        followed_within = self._began.pop(optimizer, self._steps) != self._steps
        if self._under_way or followed_within or any(optimizer is each for each in self._optimizers):
            return
        moved = [
            self._names[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._names and parameter.grad is not None
        ]
        if not moved:
            return
        self._others = type(optimizer).__name__
        if optimizer in self._warned_of:
            return
        self._warned_of[optimizer] = True
        _logger.warning(
            "%s has made a step on %s without being given to modify(), so pruned weights come back and pruning steps "
            "do not fall due; %s. Where several optimizers train the model, pass all of them",
            self._others,
            join_names(moved),
            self.missing_steps(),
        )


def _untied(hook: Callable[[torch.optim.Optimizer], None]) -> Callable[..., None]:
    """Return a hook of all optimizers that keeps no session alive, and is nothing to a step that is compiled."""
    method = WeakMethod(hook)

    def called(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        bound = method()
        if bound is not None:
            bound(optimizer)

    return called
