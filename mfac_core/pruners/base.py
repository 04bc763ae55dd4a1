"""What all pruners share: the schedule, the masks, and the progress through both."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, check_float, device_of
from mfac_core.mask_patterns import MaskPattern
from mfac_core.masks import out_of_reach
from mfac_core.pruning_step import PruneResult
from mfac_core.schedule import PlannedStep, pruning_schedule
from mfac_core.settings import MaskType, PruningSettings, Scope
from mfac_core.weight_layout import WeightLayout
from mfac_core.weight_names import listed

__all__ = ["Outcome", "Pruner"]

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
    """

    weights: Vector
    kept: Mask
    predicted_loss_increase: float | None = None
    resets_optimizer: bool = False

    @classmethod
    def of_unpruned(
        cls, kept: Mask, weights: Vector, newly_pruned: Mask, predicted_loss_increase: float | None = None
    ) -> Outcome:
        """Return the outcome of a pruning step that looked at the unpruned weights alone.

        Args:
            kept: Which of all weights were unpruned before, shape ``(n,)`` with ``d`` true entries.
            weights: The updated unpruned weights, newly pruned ones exactly 0, shape ``(d,)``.
            newly_pruned: Which of them are pruned now, shape ``(d,)``.
            predicted_loss_increase: As in ``PruneResult``.

        Returns:
            The outcome over all weights.
        """
        kept_now = kept.copy()
        kept_now[kept] = ~newly_pruned
        weights_now = np.zeros(kept.shape, weights.dtype)
        weights_now[kept] = weights
        return cls(weights_now, kept_now, predicted_loss_increase)


class Pruner(ABC):
    """What all pruners share. After each :meth:`prune` the masks of its result are to be held, until the next.

    ``step`` always counts completed optimizer steps. A pruning step is a change of masks: of :class:`ConstantPruner`
    and :class:`ACDCPruner` also one that lets weights go.

    Args:
        settings: What to prune and when.
        weights: Name and array of each weight in scope, in order; not kept.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.

    Raises:
        TypeError: If ``weights`` is no mapping from name to array.
        ValueError: If there are no weights, or the masks do not fit them.
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
        self.schedule: tuple[PlannedStep, ...] = pruning_schedule(settings, steps_per_epoch)
        self.layout = WeightLayout({name: tuple(array.shape) for name, array in weights.items()})
        if masks is None:
            self._kept = np.ones(self.layout.num_weights, bool)
        else:
            self.layout.check(masks, "masks")
            self._kept = self.layout.flatten(masks).astype(bool)
        self._done = 0
        self._told_empty: set[str] = set()

    @property
    def masks(self) -> dict[str, Mask]:
        """Name and mask of each weight; True keeps. Copies."""
        return self.layout.unflatten(self._kept.copy())

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all weights in scope."""
        return int(np.count_nonzero(~self._kept)) / self.layout.num_weights

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._done == len(self.schedule)

    @property
    def is_released(self) -> bool:
        """Whether the masks are not to be held any more: the run is over, and does not leave them."""
        return self.is_finished and not self.settings.leave_enabled

    @property
    def next_step(self) -> PlannedStep | None:
        """The next pruning step, or ``None`` when all are done."""
        return None if self.is_finished else self.schedule[self._done]

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
        """Do the pruning step that is due.

        Args:
            weights: Name and array of each weight in scope, float32 or float64. Not modified.
            step: Completed optimizer steps: the latest pruning step planned up to here is done, and earlier ones
                are passed over. ``None`` does the next one of the schedule.

        Returns:
            The new weights, on the devices of ``weights``, and the new masks, in host memory: they are to be held
            unless :attr:`is_released`.

        Raises:
            ValueError: If all pruning steps are done, none is planned up to ``step``, or the weights do not fit or
                hold NaN or Inf.
        """
        if self.is_finished:
            raise ValueError("all pruning steps of the schedule are done; ask is_due(step) before prune")
        index = self._done if step is None else self._latest(step)
        if index < self._done:
            raise ValueError(
                f"no pruning step is due at step {step}; the next is at step {self.schedule[self._done].step}"
            )
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
        outcome = self._prune(vector, index)
        self._warn_of_empty(vector, outcome.kept, self.schedule[index])
        self._kept = outcome.kept
        self._advance(index)
        return PruneResult(
            weights={
                name: device_of(weights[name]).asarray(array)
                for name, array in self.layout.unflatten_like(outcome.weights, weights).items()
            },
            masks=self.masks,
            sparsity=self.sparsity,
            predicted_loss_increase=outcome.predicted_loss_increase,
            resets_optimizer=outcome.resets_optimizer,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: arrays and plain numbers only."""
        return {
            "method": type(self).__name__,
            "schedule": self._planned(),
            "pruning_steps_done": self._done,
            "masks": self.masks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a pruner with the same settings and weights.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If masks or schedule do not fit; nothing is changed then.
        """
        missing = {"method", "schedule", "pruning_steps_done", "masks"} - set(state)
        if missing:
            raise ValueError(f"this is not the state of a pruner: it lacks {', '.join(sorted(missing))}")
        strange = [*self._other_weights(state["masks"]), *self._other_schedule(state)]
        if strange:
            raise ValueError(
                f"the state belongs to another recipe or model: {'; '.join(strange)}. "
                "Resume with the recipe, the model and the steps_per_epoch that it was saved with"
            )
        done = int(state["pruning_steps_done"])
        if not 0 <= done <= len(self.schedule):
            raise ValueError(f"the state is broken: it counts {done} of {len(self.schedule)} pruning steps as done")
        self._kept = self.layout.flatten(state["masks"]).astype(bool)
        self._done = done

    def _say_what_is_out_of_reach(
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

    def _other_weights(self, masks: Mapping[str, Array]) -> Iterator[str]:
        """Yield what differs between the weights of a state and these."""
        lacking = [name for name in self.layout.shapes if name not in masks]
        if lacking:
            yield f"it has no mask for {listed(lacking)}"
        unknown = [name for name in masks if name not in self.layout.shapes]
        if unknown:
            yield f"it has masks for {listed(unknown)}, which are not pruned here"
        for name, shape in self.layout.shapes.items():
            if name in masks and tuple(masks[name].shape) != shape:
                yield f"its {name} has shape {tuple(masks[name].shape)}, and here {shape}"
                return

    def _other_schedule(self, state: Mapping[str, Any]) -> Iterator[str]:
        """Yield what differs between the method and the pruning steps of a state and these."""
        what = "it has another method or schedule of pruning"
        if state["method"] != type(self).__name__:
            yield f"{what} ({state['method']}, and here {type(self).__name__})"
            return
        saved = np.asarray(state["schedule"])
        if not self._is_same_schedule(saved):
            yield f"{what} ({_first_difference(saved, self._planned())})"

    def _warn_of_empty(self, weights: Vector, kept: Mask, planned: PlannedStep) -> None:
        """Warn once of each array that this pruning step leaves without a single weight."""
        within_layers = getattr(self.settings, "scope", "layer") == "layer"
        if within_layers and planned.sparsity >= _NEARLY_ALL:
            return
        alive = self._kept & (weights != 0)
        emptied = [
            name
            for name, (start, stop) in self.layout.segments.items()
            if name not in self._told_empty and not kept[start:stop].any() and alive[start:stop].any()
        ]
        self._told_empty.update(emptied)
        if emptied:
            _logger.warning(
                "the pruning step of epoch %g prunes every weight of %s, so that nothing passes there any more; "
                "%stake it out of params, or prune less",
                planned.epoch,
                listed(emptied),
                "" if within_layers else "prune within layers (global_sparsity: false in a recipe), ",
            )

    def _planned(self) -> Vector:
        return np.array([(planned.step, planned.sparsity) for planned in self.schedule])

    def _is_same_schedule(self, saved: Vector) -> bool:
        return np.array_equal(saved, self._planned())

    def _latest(self, step: int) -> int:
        """Return the index of the latest pruning step planned up to ``step``; -1 when there is none."""
        return bisect_right(self.schedule, step, key=lambda planned: planned.step) - 1

    def _advance(self, index: int) -> None:
        """Note that a pruning step has been done."""
        self._done = index + 1

    @abstractmethod
    def _prune(self, weights: Vector, index: int) -> Outcome:
        """Return what the pruning step with this index makes of all weights. Nothing is changed."""


def _first_difference(saved: Vector, planned: Vector) -> str:
    numbered = enumerate(zip_longest(saved.tolist(), planned.tolist()), start=1)
    number, (then, now) = next(each for each in numbered if each[1][0] != each[1][1])
    return f"pruning step {number} is {_described(then)}, and here {_described(now)}"


def _described(planned: Sequence[float] | None) -> str:
    return "lacking" if planned is None else f"at step {planned[0]:g} to sparsity {planned[1]:g}"
