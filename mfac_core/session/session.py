"""All modifiers of a recipe applied to one model: their order, their state, and what is logged about them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from mfac_core.masks.zero_count import ZeroCount
from mfac_core.pruners import Pruner
from mfac_core.pruners.fence import check_same
from mfac_core.ranks import Alone, Ranks
from mfac_core.ranks.logs import logger_of
from mfac_core.recipe import named_in_errors
from mfac_core.recipe.naming import log_names
from mfac_core.session.live_pruning import LivePruning, combined_masks, zeros_of
from mfac_core.session.rank_states import combined_runs
from mfac_core.settings.pruning import PruningSettings
from mfac_core.settings.training import TrainingSettings
from mfac_core.state_checks import check_keys, checked_integer, refuse

__all__ = ["Changes", "ParsedState", "Session", "attached", "gradual_in_order"]

P = TypeVar("P", bound=LivePruning)


class Changes(Protocol):
    """The changes of training other than pruning."""

    @property
    def settings(self) -> Sequence[TrainingSettings]:
        """The settings of all modifiers that do not prune."""

    def state_dict(self) -> Any:
        """Return the progress."""

    def check_state(self, state: Any) -> None:
        """Raise ValueError for a state of another recipe."""

    def load_state_dict(self, state: Any) -> None:
        """Resume from a state that fits."""


C = TypeVar("C", bound=Changes | None)


@dataclass(frozen=True)
class ParsedState:
    """A state that fits a session, checked completely before anything changes.

    Args:
        step: Completed optimizer steps when it was saved.
        steps_per_epoch: Optimizer steps per epoch then.
        pruners: For each modifier, the pruner with its state; None for one that starts over.
        changes: The state of the changes of training.
    """

    step: int
    steps_per_epoch: int
    pruners: tuple[Pruner | None, ...]
    changes: Any


def gradual_in_order(settings: Iterable[PruningSettings]) -> list[PruningSettings]:
    """Return the settings of each group of weights with one final sparsity, ordered by start epoch.

    That way, a modifier sees the zeros of those that start before it.
    """
    in_order = sorted(settings, key=lambda each: each.start_epoch)
    return [group for each in in_order for group in each.by_final_sparsity()]


def attached(settings: Sequence[PruningSettings], attach: Callable[[PruningSettings, str], P]) -> tuple[P, ...]:
    """Return modifiers attached to a model, in order; errors name the modifier.

    Args:
        settings: The settings of each modifier.
        attach: Attaches one of them, given its settings and its name in the log.
    """
    prunings = []
    for each, name in zip(settings, log_names(settings), strict=True):
        with named_in_errors(each):
            prunings.append(attach(each, name))
    return tuple(prunings)


class Session(Generic[P, C]):
    """All modifiers of a recipe applied to one model.

    Args:
        prunings: The pruning modifiers, in the order in which they prune.
        changes: Changes of training other than pruning; None for one-shot pruning.
        steps_per_epoch: Optimizer steps per epoch.
        step: Completed optimizer steps so far.
        logger: Where warnings go.
        ranks: The processes of the run; ``None`` for those of the pruning modifiers.

    Attributes:
        prunings: The pruning modifiers.
        steps_per_epoch: Optimizer steps per epoch.
        step: Completed optimizer steps so far.
        ranks: The processes of the run.
    """

    changes_key: ClassVar[str] = "changes"

    # the step of the last fence, and which modifiers had collected a row before it
    _fenced_at: int | None
    _had_row: list[bool]

    def __init__(
        self,
        prunings: Sequence[P],
        changes: C = None,  # type: ignore[assignment]  # C is None in one shot
        *,
        steps_per_epoch: int = 1,
        step: int = 0,
        logger: logging.Logger,
        ranks: Ranks | None = None,
    ) -> None:
        for pruning in prunings:
            if pruning.steps_per_epoch != steps_per_epoch:
                raise ValueError(
                    f"steps_per_epoch is {steps_per_epoch} for the session and {pruning.steps_per_epoch} for one of "
                    "its modifiers; pass the same number to both"
                )
        self.prunings = tuple(prunings)
        self.steps_per_epoch = steps_per_epoch
        self.step = step
        self.ranks: Ranks = ranks or (self.prunings[0].ranks if self.prunings else Alone())
        self.logger = logger_of(self.ranks, logger)
        self._changes = changes
        self._forget_fences()

    def zeros(self) -> ZeroCount:
        """Count the current zeros among pruned weights, whatever has written to the model.

        Never a collective: of weights in shards, this rank knows only its own; the others count as the masks say.
        """
        return zeros_of(self.prunings)

    def is_due(self) -> bool:
        """Return whether a pruning step is due."""
        return any(pruning.is_due(self.step) for pruning in self.prunings)

    def fence(self) -> None:
        """Check that all ranks are at the same point of the same run, at the steps at which that matters.

        These are the first step of this process or after a state is loaded, the step after the first row of a gradient
        window, and each step at which a pruning step is scheduled. It is collective: all ranks call it at the same
        steps, before anything asks whether a pruning step is due. For a single process it does nothing.

        Raises:
            RankError: As :meth:`mfac_core.pruners.Pruner.check_ranks` raises it, on all ranks.
        """
        if self.ranks.size == 1 or self._fenced_at == self.step:
            return
        before = self._fenced_at
        if before is None:
            scopes = "; ".join(f"{type(each.settings).__name__} {dict(each.sizes)}" for each in self.prunings)
            others = repr([] if self._changes is None else list(self._changes.settings))
            names = ("the modifiers, or the weights that they prune", "the modifiers that do not prune")
            check_same(self.ranks, dict(zip(names, (scopes, others), strict=True)))
        has_row = [before is not None and pruning.needs_gradients(before) for pruning in self.prunings]
        for pruning, now, then in zip(self.prunings, has_row, self._had_row, strict=True):
            if before is None or (now and not then) or pruning.falls_due(self.step):
                pruning.check_ranks(self.step)
        self._fenced_at, self._had_row = self.step, has_row

    def prune_if_due(self) -> None:
        """Run the pruning steps that are due. After an exception each of them is either complete or undone.

        Collective if there are several ranks.
        """
        self.fence()
        for pruning in self.prunings:
            if pruning.is_due(self.step):
                # The update of one modifier must not move weights that another has pruned.
                overlapping = (each for each in self.prunings if not each.sizes.keys().isdisjoint(pruning.sizes))
                others = combined_masks(each.masks for each in overlapping if each is not pruning)
                pruning.prune_if_due(self.step, others)

    def warn_of_unfinished(self, event: str, cause: str = "") -> None:
        """Warn about modifiers whose last pruning step is not done when training ends.

        Args:
            event: What happened, such as ``fit ended``.
            cause: A clause that names the likely cause; empty if none is known.
        """
        for warning in filter(None, (pruning.unfinished(event, self.step) for pruning in self.prunings)):
            self.logger.warning("%s%s", warning, f"; {cause}" if cause else "")

    def state_dict(self, *, gradient_window: bool = True) -> dict[str, Any]:
        """Return the progress and the state of each modifier, with or without gradient windows."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            self.changes_key: None if self._changes is None else self._changes.state_dict(),
            "prunings": [pruning.state_dict(gradient_window=gradient_window) for pruning in self.prunings],
        }

    def parsed(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]], *, strict: bool = True) -> ParsedState:
        """Check a complete state. Nothing is changed.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model; or what it returned on
                several ranks, as a sequence. Everything but the gradient windows is that of the first.
            strict: Whether all of it must fit; otherwise the rest is ignored with a warning.

        Raises:
            ValueError: If the state is broken, or belongs to another run.
        """
        state = combined_runs(state)
        check_keys("a run", state, ("step", "steps_per_epoch", self.changes_key, "prunings"))
        step = checked_integer("step", state["step"], at_most=sys.maxsize)
        steps_per_epoch = checked_integer("steps_per_epoch", state["steps_per_epoch"], at_least=1, at_most=sys.maxsize)
        pruners = self._parsed_pruners(state["prunings"], steps_per_epoch, strict=strict)
        changes = state[self.changes_key]
        if self._changes is not None:
            try:
                self._changes.check_state(changes)
            except ValueError as error:
                if strict:
                    raise
                self.logger.warning(
                    "learning rates and weight decays follow the schedule from the current epoch: %s", error
                )
                changes = self._changes.state_dict()
        return ParsedState(step, steps_per_epoch, pruners, changes)

    def resume(self, parsed: ParsedState) -> None:
        """Resume from a state that :meth:`parsed` has checked, at the same epoch."""
        self.step = self._resumed_step(parsed)
        if parsed.steps_per_epoch != self.steps_per_epoch:
            self.logger.warning(
                "the state was saved with %d steps per epoch and this run has %d (another batch size or gradient "
                "accumulation): it resumes at the same epoch, %.2f, which is step %d",
                parsed.steps_per_epoch,
                self.steps_per_epoch,
                self.step / self.steps_per_epoch,
                self.step,
            )
        for pruning, pruner in zip(self.prunings, parsed.pruners, strict=True):
            if pruner is not None:
                pruning.resume(pruner)
        self._forget_fences()
        if self._changes is not None:
            self._changes.load_state_dict(parsed.changes)

    def _forget_fences(self) -> None:
        self._fenced_at = None
        self._had_row = [False] * len(self.prunings)

    def _resumed_step(self, parsed: ParsedState) -> int:
        """Return the completed optimizer steps of this run at the epoch of a state."""
        if parsed.steps_per_epoch == self.steps_per_epoch:
            return parsed.step
        return round(parsed.step * self.steps_per_epoch / parsed.steps_per_epoch)

    def _parsed_pruners(self, states: Any, steps_per_epoch: int, *, strict: bool) -> tuple[Pruner | None, ...]:
        if not isinstance(states, list | tuple):
            refuse("prunings", states, "a list with the state of each pruning modifier")
        if len(states) != len(self.prunings):
            difference = (
                f"the state contains {len(states)} pruning modifiers, this recipe has {len(self.prunings)}; "
                "resume with the recipe that the state was saved with"
            )
            if strict:
                raise ValueError(difference)
            self.logger.warning("modifiers are matched in order, and the rest is ignored: %s", difference)
        pruners: list[Pruner | None] = []
        for pruning, state in zip(self.prunings, states, strict=False):
            try:
                pruners.append(self._parsed_pruner(pruning, state, steps_per_epoch))
            except ValueError as error:
                if strict:
                    raise
                self.logger.warning("a pruning modifier starts over, because its state does not fit: %s", error)
                pruners.append(None)
        return (*pruners, *[None] * (len(self.prunings) - len(pruners)))

    def _parsed_pruner(self, pruning: P, state: Any, steps_per_epoch: int) -> Pruner:
        check_keys("a pruning modifier", state, ())
        its_own = state.get("steps_per_epoch", steps_per_epoch)
        if not isinstance(its_own, int) or its_own != steps_per_epoch:
            refuse("steps_per_epoch of a pruning modifier", its_own, f"{steps_per_epoch}, as for the whole run")
        return pruning.parsed({**state, "steps_per_epoch": steps_per_epoch})
