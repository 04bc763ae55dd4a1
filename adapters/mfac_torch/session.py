"""One training run: hooks around each step of its optimizers."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from traceback import walk_stack
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from mfac_core.ranks import Ranks
from mfac_core.ranks.agreement import gathered
from mfac_core.ranks.logs import logger_of
from mfac_core.session.session import ParsedState, Session
from mfac_core.state_checks import check_keys, checked_integer
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.random_state import check_random_state, random_state, restore_random_state
from mfac_torch.rank_states import Saver, check_same_save, saver_of
from mfac_torch.refusals import refuse_join
from mfac_torch.training_changes import TrainingChanges
from mfac_torch.write_monitor import WriteMonitor

__all__ = ["TrainingSession", "is_attached"]

_logger = logging.getLogger("mfac_torch")

_KEYS = ("step", "steps_per_epoch", "changes_done", "prunings", "random")

_CREATES_STATE = "torch.distributed.checkpoint.state_dict"
"""The module that makes steps which only create optimizer state."""

_optimizers_with_hooks: WeakSet[torch.optim.Optimizer] = WeakSet()


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer has the hooks of a session now."""
    return optimizer in _optimizers_with_hooks


class TrainingSession(Session[TorchPruning, TrainingChanges]):
    """Runs the modifiers of a recipe by hooks on the optimizers of a PyTorch model.

    A step counts once the first optimizer has made it; a step that mixed precision skips does not.

    Args:
        optimizers: The optimizers of the model. They have hooks from :meth:`attach` to :meth:`detach`.
        prunings: The pruning modifiers at work, made for these optimizers.
        changes: What else changes in training.
        steps_per_epoch: Optimizer steps per epoch.
        step: Completed optimizer steps so far.
        ranks: The processes of the run.
        module: The model, in its wrappers.

    Attributes:
        optimizers: The optimizers of the model.
        monitor: Detects writes to pruned weights by other code.
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
        ranks: Ranks,
        module: nn.Module,
    ) -> None:
        super().__init__(prunings, changes, steps_per_epoch=steps_per_epoch, step=step, logger=_logger, ranks=ranks)
        self.optimizers = optimizers
        self.monitor = WriteMonitor(optimizers, prunings, steps_per_epoch, logger=logger_of(self.ranks, _logger))
        self._module = module
        self._num_trained = [_num_trained(optimizer) for optimizer in optimizers]
        # An optimizer whose step() calls that of its base class runs the hooks at both levels. So that a step counts
        # once and is observed once, the first hook at either level does the work. A counter of levels would stay wrong
        # after a step that raises.
        self._counts = False  # a step of the first optimizer has begun and is not counted yet
        self._observed_at = [-1] * len(optimizers)  # the step whose gradients of each optimizer were last observed
        # Several optimizers step in rounds. The first one after a backward pass begins a gradient sample, and pruning
        # steps are done after the last one. Which one is last shows when the second round begins.
        self._first: int | None = None
        self._last: int | None = 0 if len(optimizers) == 1 else None
        self._stepped: int | None = None  # the optimizer that has made the latest step
        self._creates_state = False  # whether the step that is being made does only this
        self._handles: list[Any] = []
        self._run = 0  # of the loaded state, until the ranks draw a number of their own
        self._has_drawn_run = False

    def attach(self) -> None:
        """Add hooks to the optimizers: to all of them or, if that fails, to none."""
        handles = []
        with ExitStack() as undo:
            for number, optimizer in enumerate(self.optimizers):
                for register, hook in (
                    (optimizer.register_step_pre_hook, self._before_step),
                    (optimizer.register_step_post_hook, self._after_step),
                ):
                    handles.append(register(_untraced(hook, number)))
                    undo.callback(handles[-1].remove)
            undo.callback(_optimizers_with_hooks.difference_update, self.optimizers)
            _optimizers_with_hooks.update(self.optimizers)
            self._changes.set_trained(self.step, undo)
            undo.pop_all()
        self._handles = handles
        self.monitor.attach(self.step)

    def detach(self) -> None:
        """Remove the hooks, and restore which parameters are trained."""
        self.monitor.detach()
        # The last round may have lacked its last optimizer. Weights that other code has written are not pruned. Other
        # ranks may not finalize, so they are not waited for.
        if len(self.optimizers) > 1 and self.ranks.size == 1 and not self.monitor.has_regrown():
            self.prune_if_due()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _optimizers_with_hooks.difference_update(self.optimizers)
        self._changes.restore()

    def state_dict(self, *, gradient_window: bool = True, warn: bool = True) -> dict[str, Any]:
        """Return the progress, the state of each pruning modifier, and that of the random number generators.

        Never a collective: gradient windows and random number generators are those of this rank.

        Args:
            gradient_window: Whether to include gradient windows.
            warn: Whether to warn about pruned weights that are not zero.
        """
        if warn and self.monitor.has_regrown():
            self.monitor.warn_of_regrown(self.step)
        return {
            **super().state_dict(gradient_window=gradient_window),
            # At the end of the first round, the next step, which shows the last optimizer, has not begun. The last one
            # is then the one that has just stepped, unless that is the first.
            "last_optimizer": self._stepped if self._last is None and self._stepped != self._first else self._last,
            "random": random_state(),
            "saved_by": Saver(self.ranks.rank, self.ranks.size, self._run)._asdict(),
        }

    def resumption(self, states: Sequence[Mapping[str, Any]], *, strict: bool, rng: bool) -> Callable[[], None]:
        """Check complete states, and return a function that resumes from them; nothing changes before it is called.

        Args:
            states: What :meth:`state_dict` returned on one or several ranks of a run with the same recipe and model.
            strict: As in :meth:`Session.parsed`.
            rng: Whether to restore the random number generators, if one of the states was saved by this rank.

        Raises:
            ValueError: If a state is broken, or does not belong to this run, or the states are not of the same save.
        """
        given: list[Any] = [*states] or [states]  # an empty list is no state
        for each in given:
            check_keys("a manager", each, _KEYS)
            check_random_state(each["random"])
        check_same_save(states)
        state = states[0]
        last = state.get("last_optimizer")  # states of older releases lack it; the first round shows it again
        if last is not None:
            last = checked_integer("last_optimizer", last, at_most=sys.maxsize)
        parsed = self.parsed(states if len(states) > 1 else state, strict=strict)

        def resume() -> None:
            self.resume(parsed)
            self._run, self._has_drawn_run = saver_of(state).run, False
            if last is not None and last < len(self.optimizers) and self._last is None:
                self._last = last
            if rng:
                self._restore_random_state(states)

        return resume

    def _restore_random_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore the random number generators if this rank has saved one of the states, and warn otherwise."""
        for state in states:
            if saver_of(state)[:2] == (self.ranks.rank, self.ranks.size):
                restore_random_state(state["random"])
                return
        _logger.warning(
            "the random number generators are left as they are: rank %d of %d has saved none of the states that it "
            "loads, and two ranks with the same generators would draw the same numbers. Seed them anew if the rest of "
            "the run must be reproducible",
            self.ranks.rank,
            self.ranks.size,
        )

    def fence(self) -> None:
        """Check that the ranks are at the same point of the same run, and let them draw its number."""
        super().fence()
        if self.ranks.size > 1 and not self._has_drawn_run:
            # not from torch's generators, which training uses
            self._run = int(gathered(self.ranks, [secrets.randbits(62)])[0, 0])
            self._has_drawn_run = True

    def resume(self, parsed: ParsedState) -> None:
        """Resume from a checked state, at the same epoch."""
        super().resume(parsed)
        self._changes.set_trained(self.step)
        self.monitor.record_versions()
        self._counts = False
        self._observed_at = [-1] * len(self.optimizers)

    def _before_step(
        self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._creates_state = _creates_state(kwargs)
        if self._creates_state:
            return None
        self._counts = self._counts or number == 0
        self._first = number if self._first is None else self._first
        self.monitor.step_begins(number)
        if self.ranks.size > 1:
            refuse_join(self._module)
        self.fence()
        self._update_trained(number)
        self._zero_regrown(number)
        if number == self._first:
            self._last = self._last if self._stepped in {None, number} else self._stepped
            self.prune_if_due()
        self._changes.set_options(self.step)
        # With a closure, the gradients are computed inside the step. args[0] is the optimizer itself.
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._observing(number, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._observing(number, args[1]), *args[2:]), kwargs
        self._observe_gradients(number)
        return None

    def _update_trained(self, number: int) -> None:
        """Register parameters that were added to an optimizer since the last step (``add_param_group``)."""
        num_trained = _num_trained(self.optimizers[number])
        if num_trained != self._num_trained[number]:
            self._num_trained[number] = num_trained
            for pruning in self.prunings:
                pruning.update_trained_by(number)

    def _zero_regrown(self, number: int) -> None:
        """Set pruned weights that other code has written to zero, with a warning."""
        if (self.is_due() or self.monitor.may_have_regrown(number, self.step)) and self.monitor.has_regrown():
            self.monitor.warn_of_regrown(self.step)
            for pruning in self.prunings:
                pruning.held_masks.zero_weights()
            self.monitor.record_versions()

    def _after_step(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._creates_state:
            return
        self._stepped = number
        for pruning in self.prunings:
            pruning.held_masks.zero_weights(pruning.trained_by(number))
        if number == 0 and self._counts and not _is_skipped(self.optimizers[0]):
            self._counts = False
            self.step += 1
            self._changes.set_trained(self.step)
        self.monitor.step_ended(number, self.step)
        if number == self._last:
            self.prune_if_due()

    def prune_if_due(self) -> None:
        """Run the pruning steps that are due."""
        self.fence()
        if self.is_due():
            super().prune_if_due()
            self.monitor.record_versions()

    def _observing(self, number: int, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that observes the gradients that it has computed."""

        def observing() -> Any:
            loss = closure()
            self._observe_gradients(number)
            return loss

        return observing

    def _observe_gradients(self, number: int) -> None:
        optimizer = self.optimizers[number]
        if _is_skipped(optimizer):
            return
        # GradScaler leaves unscaling to the kernel of a fused optimizer, and passes it the scale by this attribute.
        scale = getattr(optimizer, "grad_scale", None)
        # A line search calls its closure several times per step, for the same batch.
        is_first = self._observed_at[number] != self.step
        self._observed_at[number] = self.step
        for pruning in self.prunings:
            if is_first:
                pruning.observe_gradients(self.step, number, scale, begins_sample=number == self._first)
            pruning.held_masks.zero_gradients(pruning.trained_by(number))


def _untraced(hook: Callable[[int, Any, Any], Any], number: int) -> Callable[..., Any]:
    """Return a hook of one optimizer that torch.compile does not trace if it compiles the step."""

    def called(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        return hook(number, args, kwargs)

    untraced: Callable[..., Any] = torch.compiler.disable(called)
    return untraced


def _num_trained(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _creates_state(kwargs: Mapping[str, Any]) -> bool:
    """Return whether a step only creates optimizer state, and changes no weight.

    ``get_state_dict`` and ``set_state_dict`` of ``torch.distributed.checkpoint`` make such a step:
    ``step(closure=None)``, with learning rates and gradients of zero. Only its caller tells it from a step of training:
    in a warm-up from 0, the shards of one rank may be empty, or have zeros for gradients, and those of another not.
    """
    if kwargs.get("closure", ...) is not None:
        return False
    return any(frame.f_globals.get("__name__") == _CREATES_STATE for frame, _ in walk_stack(None))


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    # Under GradScaler, the kernel of a fused optimizer skips a step with infinite gradients by itself.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
