"""One training run: what happens around each step of its optimizers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch

from mfac_torch.live_pruning import LivePruning
from mfac_torch.outside_changes import OutsideChanges
from mfac_torch.random_state import random_state, restore_random_state
from mfac_torch.training_changes import TrainingChanges

__all__ = ["TrainingSession", "is_followed"]

_KEYS = ("step", "steps_per_epoch", "changes_done", "prunings", "random")

_logger = logging.getLogger("mfac_torch")

_followed: WeakSet[torch.optim.Optimizer] = WeakSet()


def is_followed(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a session follows an optimizer now.

    Args:
        optimizer: Any optimizer.

    Returns:
        Whether one has attached to it and not detached since.
    """
    return optimizer in _followed


class TrainingSession:
    """Hooks on optimizers that run the modifiers of a recipe.

    A step counts once the first optimizer has made it; a step that mixed precision skips does not.

    Args:
        optimizers: The optimizers to follow; the hooks are there from :meth:`attach` to :meth:`detach`.
        prunings: The pruning modifiers at work, made for these optimizers.
        changes: What else changes in training.
        steps_per_epoch: Optimizer steps per epoch.
        step: Completed optimizer steps so far.

    Attributes:
        step: Completed optimizer steps so far.
        steps_per_epoch: Optimizer steps per epoch.
        outside: What others do to the weights in scope.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        prunings: Sequence[LivePruning],
        changes: TrainingChanges,
        *,
        steps_per_epoch: int,
        step: int,
    ) -> None:
        self.step = step
        self.steps_per_epoch = steps_per_epoch
        self._optimizers = optimizers
        self._prunings = prunings
        self._changes = changes
        self.outside = OutsideChanges(optimizers, prunings, steps_per_epoch)
        self._num_trained = [_num_trained(optimizer) for optimizer in optimizers]
        # An optimizer whose step() calls that of its base class runs the hooks at both levels, so each part of the
        # work is done at the first opportunity only. A counter of levels would go wrong for good once a step raises.
        self._counts = False
        self._observed_at = [-1] * len(optimizers)
        # Several optimizers step in rounds: one of them is the first after a backward pass, and one the last.
        self._first: int | None = None
        self._last: int | None = 0 if len(optimizers) == 1 else None
        self._stepped: int | None = None
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Begin to follow the optimizers."""
        self._changes.set_trained(self.step)
        for number, optimizer in enumerate(self._optimizers):
            self._handles += [
                optimizer.register_step_pre_hook(_untraced(self._before_step, number)),
                optimizer.register_step_post_hook(_untraced(self._after_step, number)),
            ]
        _followed.update(self._optimizers)
        self.outside.attach(self.step)

    def detach(self) -> None:
        """Remove the hooks, and let each parameter be trained as before."""
        self.outside.detach()
        if len(self._optimizers) > 1 and not self.outside.has_regrown():  # what was put back is not pruned
            self._prune_if_due()  # the last round may have lacked its last optimizer
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _followed.difference_update(self._optimizers)
        self._changes.restore()

    def state_dict(self, *, gradient_window: bool = True, warn: bool = True) -> dict[str, Any]:
        """Return the progress: plain numbers, tensors, and the state of each pruning modifier.

        Args:
            gradient_window: Whether gradient windows are part of it.
            warn: Whether pruned weights that are not zero are said.

        Returns:
            The state.
        """
        if warn and self.outside.has_regrown():
            self.outside.warn_of_regrown(self.step)
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "changes_done": self._changes.state_dict(),
            "prunings": [pruning.state_dict(gradient_window=gradient_window) for pruning in self._prunings],
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model.
            strict: Whether all of the state must fit; otherwise what fits is taken, and the rest is logged.

        Raises:
            ValueError: If the state does not belong to this run; nothing is changed then.
        """
        missing = [key for key in _KEYS if key not in state]
        if missing:
            raise ValueError(
                f"this is not the state of a manager: it lacks {', '.join(missing)}; "
                "pass what manager.state_dict() returned"
            )
        if strict:
            self._check_state(state)
        self._load_prunings(state["prunings"], strict=strict)
        self.step = int(state["step"])
        self._counts = False
        self._observed_at = [-1] * len(self._optimizers)
        if strict or len(state["changes_done"]) == len(self._changes.state_dict()):
            self._changes.load_state_dict(state["changes_done"], self.step)
        restore_random_state(state["random"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
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
        self._changes.check_state(state["changes_done"])

    def _load_prunings(self, states: Sequence[Mapping[str, Any]], *, strict: bool) -> None:
        before = [pruning.state_dict() for pruning in self._prunings] if len(self._prunings) > 1 else []
        fitting = []
        for number, (pruning, saved) in enumerate(zip(self._prunings, states, strict=strict)):
            try:
                pruning.load_state_dict(saved)
            except ValueError as error:
                if strict:
                    for earlier, state in zip(self._prunings[:number], before, strict=False):
                        earlier.load_state_dict(state)
                    raise
                _logger.warning("a pruning modifier begins anew, because its state does not fit: %s", error)
            else:
                fitting.append(pruning)
        for pruning in fitting:
            pruning.hold_loaded()
        self.outside.remember()

    def _before_step(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._counts = self._counts or number == 0
        self._first = number if self._first is None else self._first
        self._look_outside(number)
        if number == self._first:
            self._last = self._last if self._stepped in {None, number} else self._stepped
            self._prune_if_due()
        self._changes.set_options(self.step)
        # With a closure the gradients come into being inside the step.
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._observed(number, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._observed(number, args[1]), *args[2:]), kwargs
        self._take_gradients(number)
        return None

    def _look_outside(self, number: int) -> None:
        self.outside.begin(number)
        trained = _num_trained(self._optimizers[number])
        if trained != self._num_trained[number]:
            self._num_trained[number] = trained
            for pruning in self._prunings:
                pruning.follow(number)
        is_due = any(pruning.is_due(self.step) for pruning in self._prunings)
        if (is_due or self.outside.may_have_changed(number, self.step)) and self.outside.has_regrown():
            self.outside.warn_of_regrown(self.step)
            for pruning in self._prunings:
                pruning.hold_masks()
            self.outside.remember()

    def _after_step(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stepped = number
        for pruning in self._prunings:
            pruning.hold_masks(number)
        if number == 0 and self._counts and not _is_skipped(self._optimizers[0]):
            self._counts = False
            self.step += 1
            self._changes.set_trained(self.step)
        self.outside.end(number, self.step)
        if number == self._last:
            self._prune_if_due()

    def _prune_if_due(self) -> None:
        if not any(pruning.is_due(self.step) for pruning in self._prunings):
            return
        for pruning in self._prunings:
            pruning.prune_if_due(self.step)
        if len(self._prunings) > 1:  # an update may have moved what another modifier has pruned
            for pruning in self._prunings:
                pruning.hold_masks()
        self.outside.remember()

    def _observed(self, number: int, closure: Callable[[], Any]) -> Callable[[], Any]:
        def observed() -> Any:
            loss = closure()
            self._take_gradients(number)
            return loss

        return observed

    def _take_gradients(self, number: int) -> None:
        optimizer = self._optimizers[number]
        if _is_skipped(optimizer):
            return
        # A fused optimizer unscales inside its kernel and carries the scale here meanwhile.
        scale = getattr(optimizer, "grad_scale", None)
        is_first = self._observed_at[number] != self.step  # a line search calls its closure again for the same batch
        self._observed_at[number] = self.step
        for pruning in self._prunings:
            if is_first:
                pruning.observe_gradients(self.step, number, scale, begins_sample=number == self._first)
            pruning.zero_gradients(number)


def _untraced(hook: Callable[[int, Any, Any], Any], number: int) -> Callable[..., Any]:
    """Return a hook of one optimizer that torch.compile does not look into, where a step is compiled."""

    def called(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return hook(number, args, kwargs)

    untraced: Callable[..., Any] = torch.compiler.disable(called)
    return untraced


def _num_trained(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    # A fused optimizer skips a step with infinite gradients inside its kernel, under mixed precision.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
