"""One pruning modifier applied to one model of any framework: gradients in, weights and masks out."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace, device_of
from mfac_core.masks.zero_count import ZeroCount, count_zeros
from mfac_core.pruners import MFACPruner, Pruner, make_pruner
from mfac_core.pruners.step import PruneResult
from mfac_core.ranks import Alone, Ranks, Shards
from mfac_core.ranks.agreement import together
from mfac_core.ranks.logs import logger_of
from mfac_core.sample_batches import HeldOut
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.session.log_lines import pruning_step_line, unfinished_line
from mfac_core.session.measured_loss import LossMeasurement
from mfac_core.settings.pruning import ConstantSettings, MFACSettings, PruningSettings

__all__ = ["LivePruning", "Mask", "combined_masks", "draws_samples", "zeros_of"]

Mask = npt.NDArray[np.bool_]

_M = TypeVar("_M")


def draws_samples(settings: PruningSettings) -> bool:
    """Return whether a modifier takes its gradients from a sampler if there is one."""
    return isinstance(settings, MFACSettings) and settings.gradient_origin == "auto"


def combined_masks(masks: Iterable[Mapping[str, _M]]) -> dict[str, _M]:
    """Combine the masks of several modifiers, by name: a weight is kept if all of them keep it."""
    combined: dict[str, Any] = {}
    for each in masks:
        for name, mask in each.items():
            combined[name] = combined[name] & mask if name in combined else mask
    return combined


class LivePruning(ABC):
    """The pruning steps and the masks of one modifier on one model, which is changed in place.

    A subclass gives access to the model of a framework: :meth:`weights`, :meth:`write` and :meth:`snapshot`; for a
    gradient sampler also :meth:`gradient_samples` and :meth:`loss_function`. :meth:`drawing`, :meth:`enforce_masks`,
    :meth:`report` and :meth:`after_pruning_step` are hooks for anything else that a framework needs.

    Args:
        settings: What to prune, when and how.
        sizes: The number of weights in each array in scope, by name; of shards, that of all together.
        steps_per_epoch: Optimizer steps per epoch.
        sampled: Whether there is a gradient sampler.
        axes: As in :func:`mfac_core.make_pruner`.
        ranks: As in :func:`mfac_core.make_pruner`.
        shards: As in :func:`mfac_core.make_pruner`.
        name: Name of the modifier in the log, empty if it is the only one.

    Attributes:
        ranks: The processes of the run.
        shards: Which part of each array in scope each rank has.

    Raises:
        SettingError: If ``mask_type`` of the settings does not fit the weights.
        DeviceError: If a device of the settings does not exist.
        MemoryBudgetError: If the gradient window would not fit.
    """

    logger: logging.Logger = logging.getLogger("mfac_core")
    """Where log lines go; on all ranks but the first it is silent."""

    library: ClassVar[str | None] = None
    """The array library whose devices plain names in a recipe mean; ``None`` means that of the weights."""

    def __init__(
        self,
        settings: PruningSettings,
        sizes: Mapping[str, int],
        *,
        steps_per_epoch: int,
        sampled: bool = False,
        axes: Mapping[str, Sequence[int]] | None = None,
        ranks: Ranks | None = None,
        shards: Shards | None = None,
        name: str = "",
    ) -> None:
        self.settings = settings
        self.ranks: Ranks = ranks or Alone()
        self.logger = logger_of(self.ranks, self.logger)
        self.sizes = sizes
        self.name = name
        self.steps_per_epoch = steps_per_epoch
        self._draws_samples = sampled and draws_samples(settings)
        self._pruner: Pruner = make_pruner(
            settings.of_selected(sizes),
            self.weights(),
            steps_per_epoch=steps_per_epoch,
            live_gradients=not self._draws_samples,
            axes=axes,
            library=self.library,
            ranks=ranks,
            shards=shards,
        )
        self.shards = self._pruner.shards

    @abstractmethod
    def weights(self) -> dict[str, Array]:
        """Return the weights in scope as arrays, which may share memory with the model; of shards, those of this rank.

        Their layout is the one that ``axes`` describes, by default PyTorch's.
        """

    @abstractmethod
    def write(self, weights: Mapping[str, Array]) -> None:
        """Write weights into the model in place."""

    @abstractmethod
    def snapshot(self, undo: ExitStack) -> None:
        """Register callbacks that restore the current values of the weights."""

    def gradient_samples(self, pruner: MFACPruner, held_out: HeldOut | None) -> Iterable[Mapping[str, Array]]:
        """Draw gradient samples, by name: ``pruner.num_samples_here`` of them. ``held_out`` gets further batches.

        Of several ranks, each draws samples of its own; those with shards draw each sample together, and give their
        parts of it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradient sampler")

    def loss_function(self) -> Callable[[Sequence[Any]], float] | None:
        """Return a function that computes the mean loss of batches; None if there is no sampler."""
        return None

    def drawing(self) -> AbstractContextManager[None]:
        """Return a context in which samples are drawn; after an exception, the next attempt draws the same ones."""
        return nullcontext()

    def enforce_masks(self, result: PruneResult, undo: ExitStack) -> None:
        """Enforce new masks and reset stale optimizer state; called after weights are written, before a commit.

        Each change registers a callback in ``undo`` that reverts it.
        """

    def report(self, line: str, scheduled: ScheduledStep | None, step: int) -> None:
        """Log a pruning step, or a sub-step."""
        self.logger.info("%s", line)

    def after_pruning_step(self, result: PruneResult, step: int) -> None:
        """Handle a completed pruning step; :attr:`masks` are empty if it has released them."""

    @property
    def masks(self) -> dict[str, Mask]:
        """The current masks, True keeps; empty before the first pruning step and after their release."""
        has_begun = self._pruner.sparsity > 0 or self._pruner.next_step != self._pruner.schedule[0]
        return self._pruner.masks if has_begun and not self._pruner.is_released else {}

    @property
    def sparsity(self) -> float:
        """Fraction of the weights in scope that is pruned and zero, counted from the weights.

        Never a collective: of weights in shards, this rank knows only its own; the others count as the masks say.
        """
        return zeros_of([self]).sparsity

    @property
    def needed_bytes(self) -> int:
        """Bytes that gradient windows and computation need, given the masks and the schedule."""
        return self._pruner.needed_bytes

    @property
    def schedule(self) -> Sequence[ScheduledStep]:
        """The pruning steps of the whole run."""
        return self._pruner.schedule

    @property
    def devices(self) -> tuple[str, ...]:
        """Where blocks of the Fisher are computed; empty for a modifier that uses none."""
        if not isinstance(self.settings, MFACSettings):
            return ()
        if self.settings.devices != ("auto",):
            return self.settings.devices
        return (device_of(next(iter(self.weights().values()))).name,)

    @property
    def holds_zeros_only(self) -> bool:
        """Whether the modifier only keeps existing zeros."""
        return isinstance(self.settings, ConstantSettings)

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._pruner.is_finished

    @property
    def window_bytes(self) -> int:
        """Bytes of the largest gradient window of the run, as far as this rank keeps it."""
        return self._pruner.window_bytes

    def local(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the parts that this rank has of full arrays in scope, such as masks."""
        if self.shards.is_whole:
            return dict(arrays)
        return {name: self.shards.local(name, array, self.ranks.rank) for name, array in arrays.items()}

    def check_ranks(self, step: int) -> None:
        """Check that all ranks are at the same point of the same run, as the pruner does. Collective."""
        self._pruner.check_ranks(step)

    def falls_due(self, step: int) -> bool:
        """Return whether a pruning step is scheduled, and not done, after ``step`` completed optimizer steps."""
        return self._pruner.falls_due(step)

    def needs_gradients(self, step: int) -> bool:
        """Return whether the gradient that arrives after ``step`` completed optimizer steps is needed."""
        return self._pruner.needs_gradients(step)

    def observe(self, gradients: Mapping[str, Array]) -> None:
        """Store one gradient sample of training, unscaled, by name."""
        self._pruner.observe(gradients)

    def is_due(self, step: int) -> bool:
        """Return whether a pruning step is due after ``step`` completed optimizer steps."""
        return self._pruner.is_due(step)

    def prune_if_due(self, step: int, others: Mapping[str, Mask] | None = None) -> None:
        """Run the pruning step that is due, if any, with all its sub-steps.

        An exception leaves weights, masks, optimizers and progress as they were before the sub-step that it
        interrupted, and the next call repeats this sub-step.

        Args:
            step: Completed optimizer steps.
            others: Masks of other modifiers, whose pruned weights stay zero.
        """
        if not self._pruner.is_due(step):
            return
        measurement = LossMeasurement(self.loss_function() if self._draws_samples else None, self.ranks)
        result = self._prune(step, others or {}, measurement)
        while self._pruner.is_due(step):
            result = self._prune(step, others or {}, measurement)
        self.after_pruning_step(result, step)

    def state_dict(self, *, gradient_window: bool = True) -> dict[str, Any]:
        """Return everything a resumed run needs, as arrays and plain values, with or without the gradient window."""
        state = self._pruner.state_dict()
        if not gradient_window:
            state.pop("window", None)
        return state

    def parsed(self, state: Mapping[str, Any]) -> Pruner:
        """Return a pruner with a state; nothing is changed yet.

        Raises:
            ValueError: If the state is broken, or belongs to other settings or weights.
        """
        pruner = copy(self._pruner)
        pruner.load_state_dict(state)
        return pruner

    def resume(self, pruner: Pruner) -> None:
        """Resume with a pruner that :meth:`parsed` has returned."""
        self._pruner = pruner

    def unfinished(self, event: str, step: int) -> str:
        """Return a warning that training ended before the last pruning step, or an empty string if it is done.

        Args:
            event: How training ended, such as ``fit ended``.
            step: Completed optimizer steps.
        """
        if self.is_finished:
            return ""
        return unfinished_line(
            event,
            modifier=self.name,
            names=self.sizes,
            epoch=step / self.steps_per_epoch,
            due=self.schedule[-1].epoch,
            sparsity=self.sparsity,
            refused_rows=self._pruner.refused_rows,
        )

    def _prune(self, step: int, others: Mapping[str, Mask], measurement: LossMeasurement) -> PruneResult:
        """Do one sub-step; an exception leaves everything unchanged."""
        start = time.perf_counter()
        scheduled, substep = self._pruner.next_step, self._pruner.substep(step)
        with self._sampled(step, measurement), ExitStack() as undo:
            num_rows = self._pruner.num_rows if self._pruner.uses_gradients(step) else 0
            with self._pruner.pruning(self.weights(), step) as result:
                with together(self.ranks, "writing the pruned weights"):
                    self.snapshot(undo)
                    held = self.local({name: mask for name, mask in others.items() if name in self.sizes})
                    self.write({name: _masked(array, held.get(name)) for name, array in result.weights.items()})
                    self.enforce_masks(result, undo)
                measured = measurement.end(result)
            undo.pop_all()
        line = pruning_step_line(
            measured,
            settings=self.settings,
            modifier=self.name,
            names=self.sizes,
            # sub-steps precede the scheduled step; a pruning step may be late
            step=step if scheduled is None else max(step, scheduled.step),
            steps_per_epoch=self.steps_per_epoch,
            substep=substep,
            num_rows=num_rows,
            seconds=time.perf_counter() - start,
            measured_on=measurement.where,
        )
        self.report(line, scheduled, step)
        return measured

    def _next_of(self, samples: Iterator[Mapping[str, Array]]) -> Mapping[str, Array] | None:
        with together(self.ranks, "drawing gradient samples", sharded=not self.shards.is_whole):
            return next(samples, None)

    @contextmanager
    def _sampled(self, step: int, measurement: LossMeasurement) -> Iterator[None]:
        """Fill the gradient window with fresh samples for a block, if the pruning step uses a sampler."""
        pruner = self._pruner
        if not self._draws_samples or not isinstance(pruner, MFACPruner) or not pruner.uses_gradients(step):
            yield
            return
        with self.drawing():
            try:
                pruner.forget_gradients()
                samples = iter(self.gradient_samples(pruner, measurement.held_out(pruner)))
                # in rounds, of one sample from each rank that has any left
                while pruner.observe_samples(self._next_of(samples)):
                    pass
                measurement.begin()
                yield
            finally:
                pruner.forget_gradients()


def zeros_of(prunings: Sequence[LivePruning]) -> ZeroCount:
    """Count the current zeros among the weights that modifiers of one model prune; see :attr:`LivePruning.sparsity`."""
    weights = {name: array for pruning in prunings for name, array in pruning.weights().items()}
    masks = combined_masks(pruning.masks for pruning in prunings)
    if all(pruning.shards.is_whole for pruning in prunings):
        return count_zeros(weights, masks)
    here = count_zeros(weights, combined_masks(pruning.local(pruning.masks) for pruning in prunings))
    sizes = {name: size for pruning in prunings for name, size in pruning.sizes.items()}
    pruned = sum(int(np.count_nonzero(~mask)) for mask in masks.values())
    return here._replace(weights=sum(sizes.values()), pruned=pruned)


def _masked(weights: Array, mask: Mask | None) -> Array:
    if mask is None:
        return weights
    xp, device = array_namespace(weights), device_of(weights)
    with device.backend.on(device.name):
        return xp.where(device.asarray(mask), weights, xp.zeros_like(weights))
