"""One training run: what happens around each step of one optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch

from mfac_core.recipe import SetLearningRate
from mfac_torch.live_pruning import LivePruning

__all__ = ["TrainingSession"]

_HOOKED_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
"""The code that torch wraps around every ``step`` method of an optimizer class to call its hooks."""


class TrainingSession:
    """Hooks on an optimizer that run the pruning modifiers and set learning rates.

    A step counts once the optimizer has made it; a step that mixed precision skips does not.

    Args:
        optimizer: The optimizer to follow; the hooks are there from :meth:`attach` to :meth:`detach`.
        prunings: The pruning modifiers at work.
        learning_rates: The learning rates to set.
        steps_per_epoch: Optimizer steps per epoch.
        step: Completed optimizer steps so far.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        prunings: Sequence[LivePruning],
        learning_rates: Sequence[SetLearningRate],
        *,
        steps_per_epoch: int,
        step: int,
    ) -> None:
        self.step = step
        self.steps_per_epoch = steps_per_epoch
        self._optimizer = optimizer
        self._prunings = prunings
        self._learning_rates = sorted(learning_rates, key=lambda setting: setting.start_epoch)
        self._learning_rates_set = 0
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Begin to follow the optimizer."""
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return the progress: plain numbers, and the state of each pruning modifier."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "learning_rates_set": self._learning_rates_set,
            "prunings": [pruning.state_dict() for pruning in self._prunings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model.

        Raises:
            ValueError: If the state does not belong to this run.
        """
        missing = {"step", "steps_per_epoch", "learning_rates_set", "prunings"} - set(state)
        if missing:
            raise ValueError(
                f"this is not the state of a manager: it lacks {', '.join(sorted(missing))}; "
                "pass what manager.state_dict() returned"
            )
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                f"the state was saved with {state['steps_per_epoch']} steps per epoch and this run has "
                f"{self.steps_per_epoch}; pass steps_per_epoch={state['steps_per_epoch']} to modify()"
            )
        if len(state["prunings"]) != len(self._prunings):
            raise ValueError(
                f"the state holds {len(state['prunings'])} pruning modifiers, this recipe has {len(self._prunings)}; "
                "resume with the recipe that the state was saved with"
            )
        for pruning, saved in zip(self._prunings, state["prunings"], strict=True):
            pruning.load_state_dict(saved)
        self.step = int(state["step"])
        self._learning_rates_set = int(state["learning_rates_set"])

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _is_inside_another_step(optimizer):
            return None
        self._set_learning_rates()
        for pruning in self._prunings:
            pruning.prune_if_due(self.step, optimizer)
        # With a closure the gradients come into being inside the step.
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._observed(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._observed(args[1]), *args[2:]), kwargs
        self._take_gradients()
        return None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_inside_another_step(optimizer):
            return
        for pruning in self._prunings:
            pruning.hold_masks()
        if _is_skipped(optimizer):
            return
        self.step += 1
        for pruning in self._prunings:
            pruning.prune_if_due(self.step, optimizer)

    def _observed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        is_first = True  # a line search calls the closure again for the same batch

        def observed() -> Any:
            nonlocal is_first
            loss = closure()
            self._take_gradients(observe=is_first)
            is_first = False
            return loss

        return observed

    def _take_gradients(self, *, observe: bool = True) -> None:
        if _is_skipped(self._optimizer):
            return
        # A fused optimizer unscales inside its kernel and carries the scale here meanwhile.
        scale = getattr(self._optimizer, "grad_scale", None)
        for pruning in self._prunings:
            if observe:
                pruning.observe_gradients(self.step, scale)
            pruning.zero_gradients()

    def _set_learning_rates(self) -> None:
        for setting in self._learning_rates[self._learning_rates_set :]:
            if self.step < round(setting.start_epoch * self.steps_per_epoch):
                return
            for group in self._optimizer.param_groups:
                group["lr"] = setting.learning_rate
            self._learning_rates_set += 1


def _is_inside_another_step(optimizer: torch.optim.Optimizer) -> bool:
    # A subclass whose step() calls super().step() runs the hooks at both levels. The call stack tells them apart;
    # a counter would go wrong for good once a step raises.
    levels = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        levels += frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return levels > 1


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    # A fused optimizer skips a step with infinite gradients inside its kernel, under mixed precision.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
