"""One training run: what happens around each step of its optimizers."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch

from mfac_core.session.session import ParsedState, Session
from mfac_core.state_checks import check_keys, checked_integer
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.outside_changes import OutsideChanges
from mfac_torch.random_state import check_random_state, random_state, restore_random_state
from mfac_torch.training_changes import TrainingChanges

__all__ = ["TrainingSession", "is_followed"]

_logger = logging.getLogger("mfac_torch")

_KEYS = ("step", "steps_per_epoch", "changes_done", "prunings", "random")

_followed: WeakSet[torch.optim.Optimizer] = WeakSet()


def is_followed(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a session follows an optimizer now.

    Args:
        optimizer: Any optimizer.

    Returns:
        Whether one has attached to it and not detached since.
    """
    return optimizer in _followed


class TrainingSession(Session[TorchPruning]):
    """Runs the modifiers of a recipe by hooks on the optimizers of a PyTorch model.

    A step counts once the first optimizer has made it; a step that mixed precision skips does not.

    Args:
        optimizers: The optimizers to follow; the hooks are there from :meth:`attach` to :meth:`detach`.
        prunings: The pruning modifiers at work, made for these optimizers.
        changes: What else changes in training.
        steps_per_epoch: Optimizer steps per epoch.
        step: Completed optimizer steps so far.

    Attributes:
        optimizers: The optimizers that are followed.
        outside: Notices what other code does to the weights in scope.
    """

    changes_key = "changes_done"

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        prunings: Sequence[TorchPruning],
        changes: TrainingChanges,
        *,
        steps_per_epoch: int,
        step: int,
    ) -> None:
        super().__init__(prunings, changes, steps_per_epoch=steps_per_epoch, step=step, logger=_logger)
        self.optimizers = optimizers
        self._training = changes
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
        """Begin to follow the optimizers: all of them or, if that fails, none."""
        handles = []
        with ExitStack() as undo:
            for number, optimizer in enumerate(self.optimizers):
                for register, hook in (
                    (optimizer.register_step_pre_hook, self._before_step),
                    (optimizer.register_step_post_hook, self._after_step),
                ):
                    handles.append(register(_untraced(hook, number)))
                    undo.callback(handles[-1].remove)
            undo.callback(_followed.difference_update, self.optimizers)
            _followed.update(self.optimizers)
            self._training.set_trained(self.step, undo)
            undo.pop_all()
        self._handles = handles
        self.outside.attach(self.step)

    def detach(self) -> None:
        """Remove the hooks, and let each parameter be trained as before."""
        self.outside.detach()
        if len(self.optimizers) > 1 and not self.outside.has_regrown():  # what was put back is not pruned
            self.prune_if_due()  # the last round may have lacked its last optimizer
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _followed.difference_update(self.optimizers)
        self._training.restore()

    def state_dict(self, *, gradient_window: bool = True, warn: bool = True) -> dict[str, Any]:
        """Return the progress: plain numbers, tensors, and the state of each pruning modifier.

        Args:
            gradient_window: Whether gradient windows are part of it.
            warn: Whether to warn of pruned weights that are not zero.
        """
        if warn and self.outside.has_regrown():
            self.outside.warn_of_regrown(self.step)
        return {
            **super().state_dict(gradient_window=gradient_window),
            # at the end of its first round the next step, which tells so, is still to come
            "last_optimizer": self._stepped if self._last is None and self._stepped != self._first else self._last,
            "random": random_state(),
        }

    def resumption(self, state: Mapping[str, Any], *, strict: bool, rng: bool) -> Callable[[], None]:
        """Check a whole state, and return a function that continues from it. Nothing is changed before it is called.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model; with another number of
                steps per epoch it continues at the same epoch.
            strict: As in :meth:`Session.parsed`.
            rng: Whether to restore the random number generators.

        Raises:
            ValueError: If the state is broken, or does not belong to this run.
        """
        check_keys("a manager", state, _KEYS)
        check_random_state(state["random"])
        # not in states of older releases; known again after a round
        last = state.get("last_optimizer")
        if last is not None:
            last = checked_integer("last_optimizer", last, at_most=sys.maxsize)
        parsed = self.parsed(state, strict=strict)

        def resume() -> None:
            self.resume(parsed)
            if last is not None and last < len(self.optimizers) and self._last is None:
                self._last = last
            if rng:
                restore_random_state(state["random"])

        return resume

    def resume(self, parsed: ParsedState) -> None:
        """Continue from a state, at the same epoch where its steps per epoch were others."""
        self.step = parsed.step
        if parsed.steps_per_epoch != self.steps_per_epoch:
            self.step = round(parsed.step * self.steps_per_epoch / parsed.steps_per_epoch)
            self.logger.warning(
                "the state was saved with %d steps per epoch and this run has %d (another batch size, or other "
                "accumulation): it goes on at the same epoch, %.2f, which is step %d",
                parsed.steps_per_epoch,
                self.steps_per_epoch,
                parsed.step / parsed.steps_per_epoch,
                self.step,
            )
        super().resume(parsed)
        self._training.set_trained(self.step)
        self.outside.remember()
        self._counts = False
        self._observed_at = [-1] * len(self.optimizers)

    def _before_step(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._counts = self._counts or number == 0
        self._first = number if self._first is None else self._first
        self._look_outside(number)
        if number == self._first:
            self._last = self._last if self._stepped in {None, number} else self._stepped
            self.prune_if_due()
        self._training.set_options(self.step)
        # With a closure the gradients come into being inside the step.
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._observed(number, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._observed(number, args[1]), *args[2:]), kwargs
        self._take_gradients(number)
        return None

    def _look_outside(self, number: int) -> None:
        self.outside.begin(number)
        trained = _num_trained(self.optimizers[number])
        if trained != self._num_trained[number]:
            self._num_trained[number] = trained
            for pruning in self.prunings:
                pruning.follow(number)
        if (self.is_due() or self.outside.may_have_changed(number, self.step)) and self.outside.has_regrown():
            self.outside.warn_of_regrown(self.step)
            for pruning in self.prunings:
                pruning.held.zero_weights()
            self.outside.remember()

    def _after_step(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stepped = number
        for pruning in self.prunings:
            pruning.held.zero_weights(pruning.trained_by(number))
        if number == 0 and self._counts and not _is_skipped(self.optimizers[0]):
            self._counts = False
            self.step += 1
            self._training.set_trained(self.step)
        self.outside.end(number, self.step)
        if number == self._last:
            self.prune_if_due()

    def prune_if_due(self) -> None:
        """Do the pruning steps that are due."""
        if self.is_due():
            super().prune_if_due()
            self.outside.remember()

    def _observed(self, number: int, closure: Callable[[], Any]) -> Callable[[], Any]:
        def observed() -> Any:
            loss = closure()
            self._take_gradients(number)
            return loss

        return observed

    def _take_gradients(self, number: int) -> None:
        optimizer = self.optimizers[number]
        if _is_skipped(optimizer):
            return
        # A fused optimizer unscales inside its kernel and carries the scale here meanwhile.
        scale = getattr(optimizer, "grad_scale", None)
        is_first = self._observed_at[number] != self.step  # a line search calls its closure again for the same batch
        self._observed_at[number] = self.step
        for pruning in self.prunings:
            if is_first:
                pruning.observe_gradients(self.step, number, scale, begins_sample=number == self._first)
            pruning.held.zero_gradients(pruning.trained_by(number))


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
