"""What all pruners share: the schedule, the masks, and the progress through both."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, check_float, device_of
from mfac_core.masks.layout import WeightLayout
from mfac_core.masks.patterns import MaskPattern
from mfac_core.masks.sparsity import out_of_reach
from mfac_core.pruners.step import PruneResult
from mfac_core.schedules.pruning import ScheduledStep, pruning_schedule
from mfac_core.settings.checks import MaskType, Scope
from mfac_core.settings.pruning import PruningSettings
from mfac_core.state_checks import check_keys, checked_array, checked_integer, refuse
from mfac_core.weight_names import ALL, ALL_PRUNABLE, ModelNames, join_names, layers_of_names, selected_names

__all__ = ["Outcome", "Progress", "Pruner"]

_logger = logging.getLogger("mfac_core")

Vector = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_NEARLY_ALL = 0.99
"""From this sparsity on, a layer that ends without any weight is what was asked for."""


@dataclass(frozen=True)
class Outcome:
    """What one pruning step, or one part of it, makes of all weights in scope.

    Args:
        weights: Shape ``(n,)``, pruned ones exactly 0.
        kept: Which of them are unpruned now, shape ``(n,)``.
        predicted_loss_increase: As in ``PruneResult``.
        resets_optimizer: As in ``PruneResult``.
        damping: As in ``PruneResult``.
    """

    weights: Vector
    kept: Mask
    predicted_loss_increase: float | None = None
    resets_optimizer: bool = False
    damping: tuple[float, float] | None = None

    @classmethod
    def of_unpruned(
        cls,
        kept: Mask,
        weights: Vector,
        newly_pruned: Mask,
        predicted_loss_increase: float | None = None,
        damping: tuple[float, float] | None = None,
    ) -> Outcome:
        """Return the outcome of a pruning step that looked at the unpruned weights alone.

        Args:
            kept: Which of all weights were unpruned before, shape ``(n,)`` with ``d`` true entries.
            weights: The updated unpruned weights, newly pruned ones exactly 0, shape ``(d,)``.
            newly_pruned: Which of them are pruned now, shape ``(d,)``.
            predicted_loss_increase: As in ``PruneResult``.
            damping: As in ``PruneResult``.

        Returns:
            The outcome over all weights.
        """
        kept_now = kept.copy()
        kept_now[kept] = ~newly_pruned
        weights_now = np.zeros(kept.shape, weights.dtype)
        weights_now[kept] = weights
        return cls(weights_now, kept_now, predicted_loss_increase, damping=damping)


@dataclass(frozen=True)
class Progress:
    """How far a pruner has come: a pruning step replaces all of it in one assignment, or nothing.

    Args:
        kept: Which of all weights are unpruned, shape ``(n,)``; never written to.
        done: Pruning steps of the schedule that are done or passed over.
    """

    kept: Mask
    done: int = 0


class Pruner(ABC):
    """What all pruners share. After each :meth:`prune` the masks of its result are to be held, until the next.

    ``step`` always counts completed optimizer steps. A pruning step is a change of masks: of :class:`ConstantPruner`
    and :class:`ACDCPruner` also one that lets weights go.

    Args:
        settings: What to prune and when.
        weights: Name and array of each weight, in order; not kept. Those that ``params`` of the settings names are in
            scope; the others are left as they are, wherever arrays by name are given.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.

    Raises:
        TypeError: If ``weights`` is no mapping from name to array.
        ValueError: If there are no weights, or the masks do not fit them.
        SettingError: If an entry of ``params`` names none of the weights.
    """

    def __init__(
        self,
        settings: PruningSettings,
        weights: Mapping[str, Array],
        *,
        steps_per_epoch: int,
        masks: Mapping[str, Array] | None = None,
    ) -> None:
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"weights must be a mapping from name to array, got {type(weights).__name__}; "
                'write {"weight": array} for a single one'
            )
        self.settings = settings
        self._steps_per_epoch = steps_per_epoch
        self.schedule: tuple[ScheduledStep, ...] = pruning_schedule(settings, steps_per_epoch)
        shapes = {name: tuple(array.shape) for name, array in weights.items()}
        named = _selected(settings, shapes)
        self._left_out = frozenset(weights).difference(named)
        self.layout = WeightLayout({name: shape for name, shape in shapes.items() if name in named})
        if masks is None:
            kept = np.ones(self.layout.num_weights, bool)
        else:
            masks = self._in_scope(masks)
            self.layout.check(masks, "masks")
            kept = self.layout.flatten(masks).astype(bool)
        self._progress = Progress(kept)
        self._warned_empty: set[str] = set()

    @property
    def masks(self) -> dict[str, Mask]:
        """Name and mask of each weight; True keeps. Copies."""
        return self.layout.unflatten(self._kept.copy())

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all weights in scope."""
        return _sparsity_of(self._kept)

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._done == len(self.schedule)

    @property
    def is_released(self) -> bool:
        """Whether the masks are not to be held any more: the run is over, and does not leave them."""
        return self.is_finished and not self.settings.leave_enabled

    @property
    def next_step(self) -> ScheduledStep | None:
        """The next pruning step, or ``None`` when all are done."""
        return None if self.is_finished else self.schedule[self._done]

    @property
    def is_inside_step(self) -> bool:
        """Whether a part of the next pruning step is done."""
        return False

    @property
    def num_rows(self) -> int:
        """Gradient samples that are stored now."""
        return 0

    @property
    def refused_rows(self) -> int:
        """Gradient samples that were left out because they held NaN or Inf."""
        return 0

    def needs_gradients(self, step: int) -> bool:
        """Return whether the gradient that arrives after ``step`` completed optimizer steps is wanted.

        Args:
            step: Completed optimizer steps.

        Returns:
            False: this pruner uses no gradients.
        """
        return False

    def uses_gradients(self, step: int) -> bool:
        """Return whether the pruning step that is due draws on gradient samples.

        Where they are sampled at each pruning step, ask this before drawing any.

        Args:
            step: Completed optimizer steps.

        Returns:
            False: this pruner uses no gradients.
        """
        return False

    def observe(self, gradients: Mapping[str, Array]) -> bool:
        """Refuse gradients.

        Args:
            gradients: Name and array of each gradient.

        Raises:
            TypeError: Always; ask :meth:`needs_gradients` first.
        """
        raise TypeError(f"{type(self).__name__} uses no gradients; ask needs_gradients(step) before observe")

    def is_due(self, step: int) -> bool:
        """Return whether a pruning step is due.

        Args:
            step: Completed optimizer steps.

        Returns:
            True from the planned step on until :meth:`prune` has done it.
        """
        return self._latest(step) >= self._done

    def prune(self, weights: Mapping[str, Array], step: int | None = None) -> PruneResult:
        """Do the pruning step that is due; an exception leaves the pruner as it was.

        Use :meth:`pruning` where something may still go wrong when the weights are put to use.

        Args:
            weights: Name and array of each weight, float32 or float64. Not modified; those that are not in scope may
                be left out.
            step: Completed optimizer steps: the latest pruning step planned up to here is done, and earlier ones
                are passed over. ``None`` does the next one of the schedule.

        Returns:
            The new weights, on the devices of ``weights``, those that are not in scope as they were given; and the new
            masks of those in scope, in host memory: they are to be held unless :attr:`is_released`.

        Raises:
            ValueError: If all pruning steps are done, none is planned up to ``step``, the weights do not fit or hold
                NaN or Inf, or there is no gradient sample where one is needed.
            IllConditionedError: If a block of the Fisher cannot be inverted accurately.
        """
        with self.pruning(weights, step) as result:
            return result

    @contextmanager
    def pruning(self, weights: Mapping[str, Array], step: int | None = None) -> Iterator[PruneResult]:
        """Do the pruning step that is due, once the block of the ``with`` statement has put its result to use.

        Masks, progress and gradients of the pruner change in one assignment when the block ends. An exception before
        or inside it leaves all of them as they were, and the same pruning step can be done again, with the same result.

        Args:
            weights: As in :meth:`prune`.
            step: As in :meth:`prune`.

        Yields:
            As :meth:`prune` returns.

        Raises:
            ValueError: As in :meth:`prune`.
            IllConditionedError: As in :meth:`prune`.
            RuntimeError: If the block itself prunes with this pruner, or loads a state into it.

        Example:
            >>> from mfac_core import MagnitudeSettings, make_pruner
            >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1)
            >>> pruner = make_pruner(settings, {"w": np.zeros(2)}, steps_per_epoch=1)
            >>> try:
            ...     with pruner.pruning({"w": np.array([2.0, 1.0])}, step=1) as result:
            ...         raise OSError("these weights cannot be written back")
            ... except OSError:
            ...     print(pruner.sparsity, pruner.is_due(1))
            0.0 True
        """
        if self.is_finished:
            raise ValueError("all pruning steps of the schedule are done; ask is_due(step) before prune")
        index = self._done if step is None else self._latest(step)
        if index < self._done:
            raise ValueError(
                f"no pruning step is due at step {step}; the next is at step {self.schedule[self._done].step}"
            )
        others, weights = weights, self._in_scope(weights)
        self.layout.check(weights, "weights")
        for name, array in weights.items():
            check_float(f"weights[{name!r}]", array)
        vector = self.layout.flatten(weights)
        self.layout.check_finite(
            vector,
            self._kept,
            "training has diverged; go back to finite weights, and lower the learning rate or skip the optimizer "
            "steps whose gradients are not finite",
        )
        before = self._kept
        outcome = self._prune(vector, index)
        self._warn_of_empty(vector, outcome.kept, self.schedule[index])
        after = self._after(outcome.kept, index)
        yield PruneResult(
            weights={
                **others,
                **{
                    name: device_of(weights[name]).asarray(array)
                    for name, array in self.layout.unflatten_like(outcome.weights, weights).items()
                },
            },
            masks=self.layout.unflatten(outcome.kept.copy()),
            sparsity=_sparsity_of(outcome.kept),
            predicted_loss_increase=outcome.predicted_loss_increase,
            resets_optimizer=outcome.resets_optimizer,
            completes_step=after.done > index,
            damping=outcome.damping,
        )
        if self._kept is not before:
            raise RuntimeError(
                "the pruner was used for another pruning step, or loaded a state, inside the block of pruning(); "
                "end the block first"
            )
        self._progress = after

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: arrays and plain numbers only."""
        return {
            "method": type(self).__name__,
            "steps_per_epoch": self._steps_per_epoch,
            "schedule": _table(self.schedule),
            "pruning_steps_done": self._done,
            "masks": self.masks,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse what is not a whole and fitting state. Nothing is changed.

        Arrays must be NumPy arrays of the dtype that :meth:`state_dict` gives them. Numbers may be those of Python or
        NumPy, or arrays without dimensions. How sparse the masks are is not held against the schedule.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If it is broken, or belongs to another recipe or model; the message names what.
        """
        self._loaded(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a pruner with the same settings and weights.

        The state may be one of another number of steps per epoch: it goes on at the same epoch.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: As in :meth:`check_state`; nothing is changed then.
        """
        vars(self).update(vars(self._loaded(state)))

    def _loaded(self, state: Mapping[str, Any]) -> Self:
        """Return a pruner like this one that has taken a state, which may be refused. This one is not changed."""
        check_keys("a pruner", state, ("method", "schedule", "pruning_steps_done", "masks"))
        own = type(self).__name__
        if not isinstance(state["method"], str):
            refuse("method", state["method"], "the name of a pruner")
        if state["method"] != own:
            self._refuse_as_strange(
                [f"it has another method or schedule of pruning ({state['method']}, and here {own})"]
            )
        loaded = copy(self)
        loaded._take(state)
        return loaded

    def _take(self, state: Mapping[str, Any]) -> None:
        """Check a state of this method and take it. One that is refused may be half taken: this runs on a copy."""
        check_keys("a pruner (its masks)", state["masks"], ())
        saved = checked_array("schedule", state["schedule"], np.float64, 2)
        if saved.shape[1] != 2:
            refuse("schedule", saved, "steps and sparsities, in two columns")
        scheduled = self._schedule_of(state)
        strange = [*self._other_weights(state["masks"]), *self._other_schedule(saved, _table(scheduled))]
        if strange:
            self._refuse_as_strange(strange)
        for name, shape in self.layout.shapes.items():
            checked_array(f"masks[{name!r}]", state["masks"][name], np.bool_, len(shape))
        done = checked_integer("pruning_steps_done", state["pruning_steps_done"], at_most=len(scheduled))
        if done and scheduled != self.schedule:
            done = bisect_right(self.schedule, scheduled[done - 1].epoch, key=lambda each: each.epoch)
        self._progress = Progress(self.layout.flatten(state["masks"]), done)

    def _schedule_of(self, state: Mapping[str, Any]) -> tuple[ScheduledStep, ...]:
        """Return the schedule of these settings at the steps per epoch of a state."""
        own = self._steps_per_epoch
        saved = checked_integer("steps_per_epoch", state.get("steps_per_epoch", own), at_least=1, at_most=sys.maxsize)
        return self.schedule if saved == own else self._schedule_at(saved)

    def _schedule_at(self, steps_per_epoch: int) -> tuple[ScheduledStep, ...]:
        """Return the schedule at a number of steps per epoch."""
        return pruning_schedule(self.settings, steps_per_epoch)

    def _warn_of_unreachable(
        self, sparsity: float, scope: Scope, mask_type: MaskType, patterns: Mapping[str, MaskPattern] | None
    ) -> None:
        limited = out_of_reach(sparsity, scope, patterns)
        if limited:
            _logger.warning(
                "mask_type %s does not divide the inputs of %s: the sparsity there ends below %g; take what has too "
                "few inputs out of params",
                mask_type,
                ", ".join(f"{name} (which gets a sparsity of at most {most:.3g})" for name, most in limited.items()),
                sparsity,
            )

    @staticmethod
    def _refuse_as_strange(differences: Sequence[str]) -> NoReturn:
        raise ValueError(
            f"the state belongs to another recipe or model: {'; '.join(differences)}. "
            "Resume with the recipe, the model and the steps_per_epoch that it was saved with"
        )

    def _other_weights(self, masks: Mapping[str, Array]) -> Iterator[str]:
        """Yield what differs between the weights of a state and these."""
        lacking = [name for name in self.layout.shapes if name not in masks]
        if lacking:
            yield f"it has no mask for {join_names(lacking)}"
        unknown = [str(name) for name in masks if name not in self.layout.shapes]
        if unknown:
            yield f"it has masks for {join_names(unknown)}, which are not pruned here"
        for name, shape in self.layout.shapes.items():
            if name in masks and np.shape(masks[name]) != shape:
                yield f"its {name} has shape {np.shape(masks[name])}, and here {shape}"
                return

    def _other_schedule(self, saved: Vector, scheduled: Vector) -> Iterator[str]:
        """Yield what differs between the pruning steps of a state and those planned."""
        if not self._is_same_schedule(saved, scheduled):
            yield f"it has another method or schedule of pruning ({_first_difference(saved, scheduled)})"

    def _warn_of_empty(self, weights: Vector, kept: Mask, scheduled: ScheduledStep) -> None:
        """Warn once of each array that this pruning step leaves without a single weight."""
        within_layers = getattr(self.settings, "scope", "layer") == "layer"
        if within_layers and scheduled.sparsity >= _NEARLY_ALL:
            return
        alive = self._kept & (weights != 0)
        emptied = [
            name
            for name, (start, stop) in self.layout.segments.items()
            if name not in self._warned_empty and not kept[start:stop].any() and alive[start:stop].any()
        ]
        self._warned_empty.update(emptied)
        if emptied:
            _logger.warning(
                "the pruning step of epoch %g prunes every weight of %s, so that nothing passes there any more; "
                "%stake it out of params, or prune less",
                scheduled.epoch,
                join_names(emptied),
                "" if within_layers else "prune within layers (global_sparsity: false in a recipe), ",
            )

    def _is_same_schedule(self, saved: Vector, scheduled: Vector) -> bool:
        return np.array_equal(saved, scheduled)

    def _latest(self, step: int) -> int:
        """Return the index of the latest pruning step planned up to ``step``; -1 when there is none."""
        return bisect_right(self.schedule, step, key=lambda scheduled: scheduled.step) - 1

    def _in_scope(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return arrays by name without those of the weights that ``params`` leaves out."""
        if not self._left_out or not isinstance(arrays, Mapping):
            return arrays
        return {name: array for name, array in arrays.items() if name not in self._left_out}

    @property
    def _kept(self) -> Mask:
        return self._progress.kept

    @property
    def _done(self) -> int:
        return self._progress.done

    def _after(self, kept: Mask, index: int) -> Progress:
        """Return the progress once the pruning step with this index has left these weights. Nothing is changed."""
        return Progress(kept, index + 1)

    @abstractmethod
    def _prune(self, weights: Vector, index: int) -> Outcome:
        """Return what the pruning step with this index makes of all weights. Nothing is changed."""


def _sparsity_of(kept: Mask) -> float:
    return int(np.count_nonzero(~kept)) / len(kept)


def _selected(settings: PruningSettings, shapes: Mapping[str, tuple[int, ...]]) -> Collection[str]:
    """Return the names of those arrays that settings mean; the keywords mean all of them, whatever they are called."""
    if not settings.exclude and set(settings.params) <= {ALL, ALL_PRUNABLE}:
        return shapes.keys()
    names = ModelNames(shapes=shapes, prunable=shapes.keys(), layers=layers_of_names(shapes), kind="weight")
    return selected_names(settings.params, settings.exclude, names).keys()


def _table(schedule: Sequence[ScheduledStep]) -> Vector:
    """Return steps and sparsities in two columns."""
    return np.array([(scheduled.step, scheduled.sparsity) for scheduled in schedule], np.float64)


def _first_difference(saved: Vector, scheduled: Vector) -> str:
    numbered = enumerate(zip_longest(saved.tolist(), scheduled.tolist()), start=1)
    number, (then, now) = next(each for each in numbered if each[1][0] != each[1][1])
    return f"pruning step {number} is {_described(then)}, and here {_described(now)}"


def _described(scheduled: Sequence[float] | None) -> str:
    return "lacking" if scheduled is None else f"at step {scheduled[0]:g} to sparsity {scheduled[1]:g}"
