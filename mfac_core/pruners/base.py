"""What all pruners share: the schedule, the masks, and the progress through both."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mfac_core.backends import Array, check_float, device_of
from mfac_core.masks.layout import Mask, WeightLayout, scatter_unpruned, zeros_of
from mfac_core.masks.patterns import MaskPattern, mask_patterns
from mfac_core.masks.selection import MaskRule, newly_pruned
from mfac_core.masks.sparsity import out_of_reach, pruned_fraction
from mfac_core.pruners.fence import check_alike, check_same, digest, strided
from mfac_core.pruners.saved_states import (
    ScheduleTable,
    combined,
    other_schedule,
    other_weights,
    refuse_other_run,
    schedule_table,
)
from mfac_core.pruners.step import PruneResult, UnprunedOutcome
from mfac_core.ranks.agreement import together
from mfac_core.ranks.base import Alone, Ranks
from mfac_core.ranks.distribution import Distribution
from mfac_core.ranks.logs import logger_of
from mfac_core.ranks.shards import Shards
from mfac_core.schedules.pruning import ScheduledStep, pruning_schedule
from mfac_core.schedules.substeps import Sparsity
from mfac_core.settings.checks import MaskType, Scope
from mfac_core.settings.pruning import PruningSettings
from mfac_core.state_checks import check_keys, checked_array, checked_integer, refuse
from mfac_core.weight_names import ALL, ALL_PRUNABLE, ModelNames, join_names, layers_of_names, selected_names

__all__ = ["Outcome", "Progress", "Pruner"]

_NEARLY_ALL = 0.99
"""At or above this sparsity, layers without any weight are expected: no warning."""

_MAY_DIFFER = {"devices", "gradients_device", "sampler_options", "written_as"}
"""Settings that each rank may have of its own."""


@dataclass(frozen=True)
class Outcome:
    """The weights and the mask after a pruning step or sub-step; for the other fields see :class:`PruneResult`.

    Args:
        weights: All weights in scope that this rank has, as a vector on the device of those before; pruned ones are
            exactly 0.
        mask: Which of them are unpruned now, shape ``(n,)``, in host memory.
        predicted_loss_increase: As in ``PruneResult``.
        resets_optimizer: As in ``PruneResult``.
        damping: As in ``PruneResult``.
    """

    weights: Array
    mask: Mask
    predicted_loss_increase: float | None = None
    resets_optimizer: bool = False
    damping: tuple[float, float] | None = None

    @classmethod
    def of_unpruned(cls, distribution: Distribution, unpruned: UnprunedOutcome) -> Outcome:
        """Return the outcome over all weights, from what became of those that were unpruned before."""
        newly_pruned = device_of(unpruned.newly_pruned).to_numpy(unpruned.newly_pruned)
        mask = distribution.mask.copy()
        mask[distribution.mask] = ~distribution.columns_everywhere(newly_pruned)
        weights = scatter_unpruned(distribution.to_holders(unpruned.weights), distribution.held_mask)
        return cls(weights, mask, unpruned.predicted_loss_increase, damping=unpruned.damping)


@dataclass(frozen=True)
class Progress:
    """Everything that pruning steps and loaded states change; replaced in one assignment, so it stays consistent.

    Args:
        mask: Which of all weights are unpruned, shape ``(n,)``; never written to.
        schedule: The pruning steps of the run.
        initial_sparsity: The sparsity that the schedule starts from if it is measured from the weights.
        done: Pruning steps of the schedule that are done or skipped.
    """

    mask: Mask
    schedule: tuple[ScheduledStep, ...]
    initial_sparsity: Sparsity | None = None
    done: int = 0


class Pruner(ABC):
    """What all pruners share. The caller keeps the masks of each :meth:`prune` applied until the next.

    ``step`` always counts completed optimizer steps. A pruning step is a change of masks; :class:`ConstantPruner`
    and :class:`ACDCPruner` also have pruning steps that release masks.

    Args:
        settings: What to prune and when.
        weights: Name and array of each weight, in order; not stored. Those that ``params`` of the settings names are in
            scope; the others are left as they are, wherever arrays by name are given.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.
        axes: Name and permutation of axes into the order (output, kernel..., input) for the arrays whose layout is not
            PyTorch's (output, input, kernel...); see :mod:`mfac_core.masks.patterns`.
        ranks: The processes of the run, each with a pruner like this one; ``None`` for a single process.
        shards: Which part of each array each rank has, by full shapes; ``None`` if every rank has everything. All
            arrays of weights and gradients are then the parts of this rank, and all masks are complete.

    Attributes:
        ranks: The processes of the run.
        shards: Which part of each array in scope each rank has.

    Raises:
        TypeError: If ``weights`` is not a mapping from name to array.
        ValueError: If there are no weights, or masks, axes or shards do not fit them.
        SettingError: If an entry of ``params`` names none of the weights, the mask type does not fit the shape of an
            array, or ``final_sparsity`` is a mapping.
    """

    needed_bytes: int = 0
    """Bytes that gradient windows and computation need, as the check before the run counts them."""

    window_bytes: int = 0
    """Bytes of the largest gradient window of the run, as far as this rank keeps it."""

    def __init__(
        self,
        settings: PruningSettings,
        weights: Mapping[str, Array],
        *,
        steps_per_epoch: int,
        masks: Mapping[str, Array] | None = None,
        axes: Mapping[str, Sequence[int]] | None = None,
        ranks: Ranks | None = None,
        shards: Shards | None = None,
    ) -> None:
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"weights must be a mapping from name to array, got {type(weights).__name__}; "
                'write {"weight": array} for a single one'
            )
        self.settings = settings
        self.ranks: Ranks = ranks or Alone()
        self._logger = logger_of(self.ranks, logging.getLogger("mfac_core"))
        self._steps_per_epoch = steps_per_epoch
        if shards is None:
            shards = Shards.whole({name: tuple(array.shape) for name, array in weights.items()}, self.ranks.size)
        elif shards.size != self.ranks.size:
            raise ValueError(
                f"shards are those of {shards.size} ranks, and there are {self.ranks.size}; pass both or none"
            )
        shapes = shards.shapes
        named = _selected(settings, shapes)
        self._out_of_scope = frozenset(shapes).difference(named)
        self.shards = shards.restricted(named)
        self.layout = WeightLayout(self.shards.shapes)
        self._here = WeightLayout(
            {name: self.shards.local_shape(name, self.ranks.rank) for name in self.layout.names}, may_be_empty=True
        )
        self._is_sharded = not self.shards.is_whole
        self._here.check(self._in_scope(weights), "weights")
        if masks is None:
            mask = np.ones(self.layout.num_weights, bool)
        else:
            masks = self._in_scope(masks)
            self.layout.check(masks, "masks")
            flat = self.layout.flatten(masks)
            mask = device_of(flat).to_numpy(flat).astype(bool)
        # constant masks choose no weights: their settings have neither scope nor mask type
        scope: Scope = getattr(settings, "scope", "layer")
        self._mask_type: MaskType = getattr(settings, "mask_type", "unstructured")
        patterns = mask_patterns(self._mask_type, self.layout.shapes, self._in_scope(axes or {}))
        self._check_shards(patterns)
        self._rule = MaskRule(self.layout.segments, scope, patterns)
        self._latest_distribution = mask, self._distributed(mask)
        self._latest_digest: tuple[Mask | None, str] = None, ""
        self._zeros_here: Mask | None = None  # of a shard, from which the initial sparsity will be measured
        here = self._in_scope(weights)
        initial = self._measured_sparsity(lambda: self._zeros_at_start(here), mask)
        self._progress = Progress(mask, self._schedule_at(steps_per_epoch, initial), initial)
        self._warned_empty: set[str] = set()
        self._warn_at_start()

    @property
    def schedule(self) -> tuple[ScheduledStep, ...]:
        """The pruning steps of the run."""
        return self._progress.schedule

    @property
    def masks(self) -> dict[str, Mask]:
        """Copies of the masks by name; True keeps."""
        return self.layout.unflatten(self._mask.copy())

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all weights in scope."""
        return pruned_fraction(self._mask)

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._done == len(self.schedule)

    @property
    def is_released(self) -> bool:
        """Whether masks have been released: the run has finished and ``leave_enabled`` is false."""
        return self.is_finished and not self.settings.leave_enabled

    @property
    def next_step(self) -> ScheduledStep | None:
        """The next pruning step, or ``None`` when all are done."""
        return None if self.is_finished else self.schedule[self._done]

    @property
    def is_inside_step(self) -> bool:
        """Whether some sub-steps of the next pruning step are done."""
        return False

    def substep(self, step: int) -> tuple[int, int]:
        """Return which sub-step of a pruning step is due, counted from 1, and how many sub-steps there are.

        Args:
            step: Completed optimizer steps, at which a pruning step is due.

        Returns:
            1 and 1: this pruner does a pruning step at once.
        """
        return 1, 1

    @property
    def num_rows(self) -> int:
        """Gradient samples that are stored now."""
        return 0

    @property
    def refused_rows(self) -> int:
        """Gradient samples that were left out because they contained NaN or Inf."""
        return 0

    def needs_gradients(self, step: int) -> bool:
        """Return whether the pruner needs the gradient that arrives after ``step`` completed optimizer steps.

        Args:
            step: Completed optimizer steps.

        Returns:
            False: this pruner uses no gradients.
        """
        return False

    def uses_gradients(self, step: int) -> bool:
        """Return whether the pruning step that is due uses gradient samples.

        If samples are drawn at each pruning step, call this first.

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

        Returns:
            Whether the sample was stored, in pruners that use gradients.

        Raises:
            TypeError: Always; ask :meth:`needs_gradients` first.
        """
        raise TypeError(
            f"{type(self).__name__} uses no gradients; check needs_gradients(step) before calling observe()"
        )

    def falls_due(self, step: int) -> bool:
        """Return whether a pruning step is scheduled, and not done: it may still have to wait for gradient samples.

        Unlike :meth:`is_due` it is the same on all ranks that are at the same step of the same schedule, so that all
        call :meth:`check_ranks` or none.

        Args:
            step: Completed optimizer steps.

        Returns:
            True from the scheduled step until :meth:`prune` has run it.
        """
        return self._latest(step) >= self._done

    def is_due(self, step: int) -> bool:
        """Return whether a pruning step is due.

        Args:
            step: Completed optimizer steps.

        Returns:
            True from the scheduled step until :meth:`prune` has run it.
        """
        return self.falls_due(step)

    def prune(self, weights: Mapping[str, Array], step: int | None = None) -> PruneResult:
        """Run the pruning step that is due; an exception leaves the pruner unchanged.

        Use :meth:`pruning` if writing the weights back may fail.

        Args:
            weights: Name and array of each weight, float32 or float64. Not modified; those that are not in scope may
                be left out.
            step: Completed optimizer steps: the latest pruning step scheduled up to here is done, and earlier ones
                are skipped. ``None`` runs the next one of the schedule.

        Returns:
            The new weights, on the devices of ``weights``, those that are not in scope as they were given; and the new
            masks of those in scope, in host memory. Keep them applied unless :attr:`is_released`.

        Raises:
            ValueError: If all pruning steps are done, none is scheduled up to ``step``, the weights do not fit or
                contain NaN or Inf, or a gradient sample is needed and none is stored.
            IllConditionedError: If a block of the Fisher cannot be inverted accurately.
        """
        with self.pruning(weights, step) as result:
            return result

    @contextmanager
    def pruning(self, weights: Mapping[str, Array], step: int | None = None) -> Iterator[PruneResult]:
        """Run the pruning step that is due, and commit it when the ``with`` block ends.

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
            raise ValueError("all pruning steps of the schedule are done; check is_due(step) before calling prune()")
        index = self._done if step is None else self._latest(step)
        if index < self._done:
            raise ValueError(
                f"no pruning step is due at step {step}; the next is at step {self.schedule[self._done].step}"
            )
        self.check_ranks(self.schedule[index].step if step is None else step)
        given, weights = weights, self._in_scope(weights)
        before = self._mask
        distribution = self._distribution_of(before)
        with together(self.ranks, "reading the weights"):
            self._here.check(weights, "weights")
            for name, array in weights.items():
                check_float(f"weights[{name!r}]", array)
            vector = self._here.flatten(weights)
            self._here.check_finite(
                vector,
                distribution.held_mask,
                "training has diverged; restore finite weights, and lower the learning rate or skip the optimizer "
                "steps whose gradients are not finite",
            )
            zeros_here = zeros_of(vector)
        if self.ranks.size > 1 and not self._is_sharded:
            check_alike(self.ranks, "weights", strided([vector]))
        is_zero = distribution.everywhere(zeros_here)
        outcome = self._prune(vector, is_zero, index)
        self._warn_of_empty(before & ~is_zero, outcome.mask, self.schedule[index])
        after = self._after(outcome.mask, index)
        with together(self.ranks, "writing the pruned weights"):
            yield PruneResult(
                weights={**given, **self._here.unflatten_like(outcome.weights, weights)},
                masks=self.layout.unflatten(outcome.mask.copy()),
                sparsity=pruned_fraction(outcome.mask),
                predicted_loss_increase=outcome.predicted_loss_increase,
                resets_optimizer=outcome.resets_optimizer,
                completes_step=after.done > index,
                damping=outcome.damping,
            )
            if self._mask is not before:
                raise RuntimeError(
                    "the pruner was used for another pruning step, or loaded a state, inside the block of pruning(); "
                    "end the block first"
                )
        self._progress = after

    def check_ranks(self, step: int) -> None:
        """Check that all ranks are at the same point of the same run: the fence before they prune together.

        Collective: all ranks call it. A single process has nothing to check. What ranks have loaded from saved states
        is brought together here, and so is an initial sparsity that is measured from weights in shards.

        Args:
            step: Completed optimizer steps.

        Raises:
            RankError: If ranks differ in step, settings, masks or gradient samples, or if each trains a model of its
                own; the message names the ranks and the cure. All ranks raise it.
        """
        if self.ranks.size > 1:
            check_same(self.ranks, self._compared(step))
            self._meet()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as arrays and numbers only.

        Never a collective: of several ranks, each returns what all have, and its own share of the rest.

        Returns:
            The state, to be passed to :meth:`load_state_dict`.
        """
        return {
            "method": type(self).__name__,
            "steps_per_epoch": self._steps_per_epoch,
            "schedule": schedule_table(self.schedule),
            "pruning_steps_done": self._done,
            "masks": self.masks,
        }

    def check_state(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Refuse a state that is broken or belongs to another run; the pruner does not change.

        Arrays must be NumPy arrays of the dtype that :meth:`state_dict` gives them. Numbers may be those of Python or
        NumPy, or arrays without dimensions. The sparsity of the masks is not compared with the schedule.

        Args:
            state: What :meth:`state_dict` returned; or what it returned on several ranks, as a sequence.

        Raises:
            ValueError: If it is broken, or belongs to another recipe or model; the message names what differs.
        """
        self._parsed(combined(state))

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Resume from :meth:`state_dict` of a pruner with the same settings and weights.

        Its run may have had another number of steps per epoch: this one resumes at the same epoch. It may also have had
        another number of ranks, and other shards.

        Never a collective: each rank takes what it is given. Masks and progress are those of the first state. Of the
        gradient window, the columns that all ranks have loaded are dealt to their owners by the next
        :meth:`check_ranks`; if some are missing, rows are collected anew, which is logged.

        Args:
            state: What :meth:`state_dict` returned; or what it returned on several ranks, as a sequence.

        Raises:
            ValueError: As in :meth:`check_state`; the pruner does not change then.
        """
        self._progress = self._parsed(combined(state))
        self._zeros_here = None

    def _parsed(self, state: Mapping[str, Any]) -> Progress:
        """Return the progress that a state contains, or raise ``ValueError``."""
        check_keys("a pruner", state, ("method", "schedule", "pruning_steps_done", "masks"))
        own = type(self).__name__
        if not isinstance(state["method"], str):
            refuse("method", state["method"], "the name of a pruner")
        if state["method"] != own:
            refuse_other_run([f"it was saved by {state['method']}, but this run uses {own}"])
        initial = self._parsed_initial_sparsity(state)
        check_keys("a pruner (its masks)", state["masks"], ())
        saved = checked_array("schedule", state["schedule"], np.float64, 2)
        if saved.shape[1] != 2:
            refuse("schedule", saved, "steps and sparsities, in two columns")
        scheduled = self._schedule_at(self._saved_steps_per_epoch(state), initial)
        differences = other_weights(state["masks"], self.layout.shapes)
        if not self._is_same_schedule(saved, schedule_table(scheduled)):
            differences.append(other_schedule(saved, schedule_table(scheduled)))
        if differences:
            refuse_other_run(differences)
        for name, shape in self.layout.shapes.items():
            checked_array(f"masks[{name!r}]", state["masks"][name], np.bool_, len(shape))
        done = checked_integer("pruning_steps_done", state["pruning_steps_done"], at_most=len(scheduled))
        schedule = self._schedule_at(self._steps_per_epoch, initial)
        if done and scheduled != schedule:
            done = bisect_right(schedule, scheduled[done - 1].epoch, key=lambda each: each.epoch)
        return Progress(self.layout.flatten(state["masks"]), schedule, initial, done)

    def _check_shards(self, patterns: Mapping[str, MaskPattern] | None) -> None:
        """Refuse mask types whose groups are cut by shards."""
        if patterns is None or not self._is_sharded:
            return
        ranges = [self.shards.of_rank(rank) for rank in range(self.ranks.size)]
        bounds = {name: {bound for of_rank in ranges for bound in of_rank[name]} for name in patterns}
        cut = [name for name, pattern in patterns.items() if pattern.is_cut_at(bounds[name])]
        if cut:
            raise NotImplementedError(
                f"mask_type {self._mask_type} groups weights of {join_names(cut)} that are on different ranks; shard "
                "these arrays along an axis that no group crosses, leave them out of params, or train with replicas "
                "(DistributedDataParallel)"
            )

    def _measured_sparsity(self, zeros: Callable[[], Mask], mask: Mask) -> Sparsity | None:
        """Return the sparsity that the schedule starts from, if the settings leave it to the zeros of the weights."""
        return None

    def _zeros_at_start(self, weights: Mapping[str, Array]) -> Mask:
        """Return which weights are zero at the start; of shards, those of this rank until :meth:`check_ranks`."""
        zeros_here = zeros_of(self._here.flatten(weights))
        if not self._is_sharded:
            return zeros_here
        self._zeros_here = zeros_here
        found = np.zeros(self.layout.num_weights, bool)
        for name, (start, stop) in self.shards.of_rank(self.ranks.rank).items():
            first, last = self._here.segments[name]
            offset = self.layout.segments[name][0]
            found[offset + start : offset + stop] = zeros_here[first:last]
        return found

    def _meet(self) -> None:
        """Do what all ranks must do together: measure an initial sparsity of weights in shards. Collective."""
        zeros_here, self._zeros_here = self._zeros_here, None
        if zeros_here is not None:
            mask = self._mask
            zeros = self._distribution_of(mask).everywhere(zeros_here)
            initial = self._measured_sparsity(lambda: zeros, mask)
            schedule = self._schedule_at(self._steps_per_epoch, initial)
            self._progress = replace(self._progress, schedule=schedule, initial_sparsity=initial)

    def _distributed(self, mask: Mask) -> Distribution:
        """Return where the weights that a mask keeps are, and which rank computes which of them."""
        # without blocks, the work of single weights is dealt
        return Distribution(self.ranks, self.shards, mask, block_size=1)

    def _distribution_of(self, mask: Mask) -> Distribution:
        """Return :meth:`_distributed`, remembered for the latest mask."""
        if self._latest_distribution[0] is not mask:
            self._latest_distribution = mask, self._distributed(mask)
        return self._latest_distribution[1]

    def _compared(self, step: int) -> dict[str, int | str]:
        """Return what must be the same on all ranks, by the name that a message gives it."""
        return {
            "step": step,
            "steps_per_epoch": self._steps_per_epoch,
            "the schedule": digest(schedule_table(self.schedule)[:, 0]),
            "the settings": repr([each for each in vars(self.settings).items() if each[0] not in _MAY_DIFFER]),
            "which weights each of them has": repr([self.shards.of_rank(rank) for rank in range(self.ranks.size)]),
            "the pruning steps that are done": self._done,
            "the masks": self._digest_of_mask(),
        }

    def _digest_of_mask(self) -> str:
        mask = self._mask
        if self._latest_digest[0] is not mask:
            self._latest_digest = mask, digest(np.packbits(mask))
        return self._latest_digest[1]

    def _parsed_initial_sparsity(self, state: Mapping[str, Any]) -> Sparsity | None:
        """Return the sparsity that the schedule of a state starts from; by default that of this run."""
        return self._progress.initial_sparsity

    def _schedule_at(self, steps_per_epoch: int, initial: Sparsity | None) -> tuple[ScheduledStep, ...]:
        """Return the schedule at a number of steps per epoch, for what :meth:`_measured_sparsity` has returned."""
        return pruning_schedule(self.settings, steps_per_epoch)

    def _saved_steps_per_epoch(self, state: Mapping[str, Any]) -> int:
        saved = state.get("steps_per_epoch", self._steps_per_epoch)
        return checked_integer("steps_per_epoch", saved, at_least=1, at_most=sys.maxsize)

    def _newly_pruned(self, saliencies: Array, sparsity: Sparsity) -> Array:
        """Choose which of the unpruned weights are pruned so that a sparsity is reached."""
        return newly_pruned(saliencies, self._mask, sparsity, self._rule, self._distribution_of(self._mask))

    def _warn_at_start(self) -> None:
        """Warn about settings that do not fit the weights; by default there is nothing to warn about."""

    def _warn_of_unreachable(self, sparsity: float) -> None:
        limited = out_of_reach(sparsity, self._rule)
        if limited:
            self._logger.warning(
                "mask_type %s does not divide the number of inputs of %s, which cannot reach sparsity %g; remove "
                "weights with too few inputs from params",
                self._mask_type,
                ", ".join(f"{name} (sparsity at most {most:.3g})" for name, most in limited.items()),
                sparsity,
            )

    def _is_same_schedule(self, saved: ScheduleTable, scheduled: ScheduleTable) -> bool:
        return np.array_equal(saved, scheduled)

    def _warn_of_empty(self, nonzero: Mask, mask: Mask, scheduled: ScheduledStep) -> None:
        """Warn once of each array whose last weights this pruning step prunes."""
        if self._rule.scope == "layer" and scheduled.sparsity >= _NEARLY_ALL:
            return
        emptied = [
            name
            for name, (start, stop) in self.layout.segments.items()
            if name not in self._warned_empty and not mask[start:stop].any() and nonzero[start:stop].any()
        ]
        self._warned_empty.update(emptied)
        if emptied:
            self._logger.warning(
                "the pruning step of epoch %g prunes every weight of %s, so no signal passes through; %sexclude these "
                "weights, or prune less",
                scheduled.epoch,
                join_names(emptied),
                "" if self._rule.scope == "layer" else "prune within layers (global_sparsity: false in a recipe), ",
            )

    def _latest(self, step: int) -> int:
        """Return the index of the latest pruning step scheduled up to ``step``; -1 for none."""
        return bisect_right(self.schedule, step, key=lambda scheduled: scheduled.step) - 1

    def _in_scope(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return arrays by name without the weights that ``params`` leaves out."""
        if not self._out_of_scope or not isinstance(arrays, Mapping):
            return arrays
        return {name: array for name, array in arrays.items() if name not in self._out_of_scope}

    @property
    def _mask(self) -> Mask:
        return self._progress.mask

    @property
    def _done(self) -> int:
        return self._progress.done

    def _after(self, mask: Mask, index: int) -> Progress:
        """Return the progress after the pruning step with this index, which resulted in this mask."""
        return Progress(mask, self.schedule, self._progress.initial_sparsity, index + 1)

    @abstractmethod
    def _prune(self, weights: Array, is_zero: Mask, index: int) -> Outcome:
        """Return the outcome of the pruning step with this index. The pruner does not change.

        ``weights`` are all weights in scope, on the device of the first; ``is_zero`` says in host memory which of them
        are 0, whether pruned or not.
        """


def _selected(settings: PruningSettings, shapes: Mapping[str, tuple[int, ...]]) -> Collection[str]:
    """Return the names of the arrays in scope; the keywords mean all arrays, whatever their names."""
    if not settings.exclude and set(settings.params) <= {ALL, ALL_PRUNABLE}:
        return shapes.keys()
    names = ModelNames(shapes=shapes, prunable=shapes.keys(), layers=layers_of_names(shapes), kind="weight")
    return selected_names(settings.params, settings.exclude, names).keys()
