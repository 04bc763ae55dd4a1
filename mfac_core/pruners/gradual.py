"""Gradual pruning: sparsity grows along a curve from an initial to a final one."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mfac_core.backends import Array
from mfac_core.masks.patterns import mask_patterns, snap_to_n_of_m
from mfac_core.masks.selection import newly_pruned
from mfac_core.masks.sparsity import is_reached, sparsity_of_zeros
from mfac_core.pruners.base import Mask, Outcome, Pruner, Vector
from mfac_core.pruners.step import Selection, magnitude_step
from mfac_core.schedules.pruning import ScheduledStep, pruning_schedule, sparsity_at
from mfac_core.schedules.substeps import Sparsity
from mfac_core.settings.pruning import FROM_PARAM, GradualSettings
from mfac_core.state_checks import check_keys, checked_array, refuse

__all__ = ["GradualPruner", "MagnitudePruner", "PrunedUnpruned"]

PrunedUnpruned = tuple[Vector, Mask, float | None, tuple[float, float] | None]
"""What a pruning step makes of the unpruned weights: the arguments of :meth:`Outcome.of_unpruned` but the first."""

_logger = logging.getLogger("mfac_core")


class GradualPruner(Pruner):
    """What gradual pruners share: how sparse each layer is to be at each pruning step.

    An initial sparsity ``__FROM_PARAM__`` is measured when the pruner is made: per layer with scope ``layer``, over all
    weights with scope ``global``, and of zeros that fit the mask type. Zeros are the least salient weights, so that
    the first pruning step prunes exactly them. Each layer follows the curve from its own initial sparsity; one that is
    above the final sparsity stays where it is.

    Args:
        settings: What to prune and when.
        weights: Name and array of each weight in scope, in order; not kept.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.
        axes: Name and permutation of axes into the order (output, kernel..., input) for the arrays that have another
            than PyTorch's (output, input, kernel...); see :mod:`mfac_core.masks.patterns`.

    Raises:
        SettingError: If the mask type does not fit the shape of an array, or ``final_sparsity`` is a mapping.
        ValueError: If there are no weights, or masks or axes do not fit them.
    """

    settings: GradualSettings

    def __init__(
        self,
        settings: GradualSettings,
        weights: Mapping[str, Array],
        *,
        steps_per_epoch: int,
        masks: Mapping[str, Array] | None = None,
        axes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(settings, weights, steps_per_epoch=steps_per_epoch, masks=masks)
        self._patterns = mask_patterns(settings.mask_type, self.layout.shapes, self._in_scope(axes or {}))
        self._final_sparsity = snap_to_n_of_m(settings.mask_type, self.schedule[-1].sparsity)
        self._measured: Sparsity | None = None
        if settings.initial_sparsity == FROM_PARAM:
            self._measured = self._sparsity_of((self.layout.flatten(weights) == 0) | ~self._kept)
            self._warn_of_sparser()
        self.schedule = self._schedule_at(self._steps_per_epoch)
        self._warn_of_unreachable(self._final_sparsity, settings.scope, settings.mask_type, self._patterns)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: arrays and plain numbers only."""
        measured = None if self._measured is None else np.array(_values(self._measured))
        return {**super().state_dict(), "initial_sparsities": measured}

    def _take(self, state: Mapping[str, Any]) -> None:
        check_keys("a gradual pruner", state, ("initial_sparsities",))
        saved = state["initial_sparsities"]
        expected = 0 if self._measured is None else len(_values(self._measured))
        if saved is not None:
            saved = checked_array("initial_sparsities", saved, np.float64, 1)
            if not ((saved >= 0) & (saved <= 1)).all():
                refuse("initial_sparsities", saved.tolist(), "sparsities from 0 to 1")
        held = 0 if saved is None else len(saved)
        if held != expected:
            self._refuse_as_strange([f"it holds {held} initial sparsities, and this run has {expected}"])
        if self._measured is not None:  # those that were measured then count, whatever the weights show now
            self._measured = _like(self._measured, saved.tolist())
            self.schedule = self._schedule_at(self._steps_per_epoch)
        super()._take(state)

    def _prune(self, weights: Vector, index: int) -> Outcome:
        zeros = ~self._kept | (weights == 0)
        sparsity = self._sparsity_wanted(index, zeros)

        def select(saliencies: Array) -> Array:
            return newly_pruned(
                saliencies, self._kept, sparsity, self.layout.segments, self.settings.scope, self._patterns
            )

        return Outcome.of_unpruned(self._kept, *self._prune_unpruned(weights[self._kept], select, index))

    def _sparsity_wanted(self, index: int, zeros: Mask) -> Sparsity:
        """Return the sparsity that is to be reached now: that of the pruning step.

        Args:
            index: Which pruning step.
            zeros: Which of all weights are zero, shape ``(n,)``: they go first, pruned before or not.
        """
        return self._sparsity_at(index)

    def _is_reached(self, zeros: Mask, index: int) -> bool:
        """Return whether zeros make up the sparsity of the pruning step with this index."""
        return is_reached(zeros, self._sparsity_at(index), self.layout.segments, self.settings.scope, self._patterns)

    @abstractmethod
    def _prune_unpruned(self, weights: Vector, select: Selection, index: int) -> PrunedUnpruned:
        """Return the updated unpruned weights, which are newly pruned, the predicted loss increase, and the damping."""

    def _sparsity_at(self, index: int) -> Sparsity:
        """Return the sparsity once the pruning step with this index is done."""
        if not isinstance(self._measured, Mapping):
            return self.schedule[index].sparsity
        first, last = self.schedule[0].step, self.schedule[-1].step
        passed = 1.0 if index == len(self.schedule) - 1 else (self.schedule[index].step - first) / (last - first)
        return {
            name: sparsity_at(
                passed,
                initial=initial,
                final=max(initial, self._final_sparsity),
                interpolation=self.settings.interpolation,
            )
            for name, initial in self._measured.items()
        }

    def _sparsity_of(self, zeros: Mask) -> Sparsity:
        return sparsity_of_zeros(zeros, self.layout.segments, self.settings.scope, self._patterns)

    def _schedule_at(self, steps_per_epoch: int) -> tuple[ScheduledStep, ...]:
        final = self._final_sparsity
        initial = [float(self.settings.initial_sparsity)] if self._measured is None else _values(self._measured)
        sizes = [stop - start for start, stop in self.layout.segments.values()] if len(initial) > 1 else [1]
        first = sum(size * value for size, value in zip(sizes, initial, strict=True)) / sum(sizes)
        last = sum(size * max(value, final) for size, value in zip(sizes, initial, strict=True)) / sum(sizes)
        return pruning_schedule(
            self.settings, steps_per_epoch, sparsities=(first, last if max(initial) > final else final)
        )

    def _warn_of_sparser(self) -> None:
        measured = self._measured if isinstance(self._measured, Mapping) else {"the weights": self._measured or 0.0}
        above = [name for name, initial in measured.items() if initial > self._final_sparsity]
        if above:
            _logger.warning(
                "%s: sparser than final_sparsity %g already; pruned weights never come back, so sparsity stays there",
                ", ".join(above),
                self._final_sparsity,
            )


class MagnitudePruner(GradualPruner):
    """Gradual pruning by magnitude; for its arguments see :class:`GradualPruner`.

    Example:
        >>> from mfac_core.settings.pruning import MagnitudeSettings
        >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1)
        >>> pruner = MagnitudePruner(settings, {"w": np.zeros(4)}, steps_per_epoch=10)
        >>> result = pruner.prune({"w": np.array([1.0, -4.0, 3.0, 2.0])}, step=10)
        >>> result.weights["w"].tolist()
        [0.0, -4.0, 3.0, 0.0]
    """

    def _prune_unpruned(self, weights: Vector, select: Selection, index: int) -> PrunedUnpruned:
        return *magnitude_step(weights, select), None, None


def _values(sparsity: Sparsity) -> list[float]:
    return list(sparsity.values()) if isinstance(sparsity, Mapping) else [sparsity]


def _like(sparsity: Sparsity, values: list[float]) -> Sparsity:
    return dict(zip(sparsity, values, strict=True)) if isinstance(sparsity, Mapping) else values[0]
