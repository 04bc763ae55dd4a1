"""Gradual pruning: sparsity grows along a curve from an initial to a final one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mfac_core.backends import Array
from mfac_core.masks.layout import Mask, take_unpruned
from mfac_core.masks.patterns import snap_to_n_of_m
from mfac_core.masks.sparsity import is_reached, sparsity_of_zeros
from mfac_core.pruners.base import Outcome, Progress, Pruner
from mfac_core.pruners.saved_states import refuse_other_run
from mfac_core.pruners.step import Selection, UnprunedOutcome, magnitude_step
from mfac_core.schedules.pruning import ScheduledStep, one_final_sparsity, pruning_schedule, sparsity_at
from mfac_core.schedules.substeps import Sparsity
from mfac_core.settings.pruning import FROM_PARAM, GradualSettings
from mfac_core.state_checks import check_keys, checked_array, refuse

__all__ = ["GradualPruner", "MagnitudePruner"]


class GradualPruner(Pruner):
    """What gradual pruners share: how sparse each layer is after each pruning step. For arguments see :class:`Pruner`.

    An initial sparsity ``__FROM_PARAM__`` is measured when the pruner is made: per layer with scope ``layer``, over all
    weights with scope ``global``, and of zeros that fit the mask type. Zeros are the least salient weights, so the
    first pruning step prunes exactly them. Each layer follows the curve from its own initial sparsity; one that is
    above the final sparsity stays where it is.
    """

    settings: GradualSettings

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as arrays and numbers only.

        Returns:
            The state, to be passed to :meth:`load_state_dict`.

        Raises:
            RuntimeError: If the initial sparsity is that of weights in shards, and :meth:`check_ranks` has not measured
                it yet.
        """
        measured = self._progress.initial_sparsity
        if self._zeros_here is not None:
            raise RuntimeError(
                "the initial sparsity of weights in shards is measured before the first pruning step; call "
                "check_ranks(step) on all ranks before state_dict()"
            )
        return {
            **super().state_dict(),
            "initial_sparsities": None if measured is None else np.array(_values(measured)),
        }

    @property
    def _final_sparsity(self) -> float:
        return snap_to_n_of_m(self.settings.mask_type, one_final_sparsity(self.settings))

    def _measured_sparsity(self, zeros: Callable[[], Mask], mask: Mask) -> Sparsity | None:
        if self.settings.initial_sparsity != FROM_PARAM:
            return None
        return sparsity_of_zeros(zeros() | ~mask, self._rule)

    def _parsed_initial_sparsity(self, state: Mapping[str, Any]) -> Sparsity | None:
        # the sparsity measured by the saved run applies, not that of the current weights
        check_keys("a gradual pruner", state, ("initial_sparsities",))
        own, saved = self._progress.initial_sparsity, state["initial_sparsities"]
        if saved is not None:
            saved = checked_array("initial_sparsities", saved, np.float64, 1)
            if not ((saved >= 0) & (saved <= 1)).all():
                refuse("initial_sparsities", saved.tolist(), "sparsities from 0 to 1")
        held, expected = 0 if saved is None else len(saved), len(_values(own))
        if held != expected:
            refuse_other_run([f"it contains {held} initial sparsities, but this run has {expected}"])
        if isinstance(own, Mapping):
            return dict(zip(own, saved.tolist(), strict=True))
        return own if saved is None else float(saved[0])

    def _prune(self, weights: Array, is_zero: Mask, index: int) -> Outcome:
        zeros = ~self._mask | is_zero
        select = partial(self._newly_pruned, sparsity=self._target_sparsity(zeros, index))
        distribution = self._distribution_of(self._mask)
        unpruned = distribution.to_owners(take_unpruned(weights, distribution.held_mask))
        return Outcome.of_unpruned(distribution, self._prune_unpruned(unpruned, zeros, select, index))

    def _target_sparsity(self, zeros: Mask, index: int) -> Sparsity:
        """Return the target sparsity of the current sub-step of the pruning step with this index.

        Zeros, shape ``(n,)``, go first, whether they are pruned already or not.
        """
        return self._sparsity_at(self._progress, index)

    @abstractmethod
    def _prune_unpruned(self, weights: Array, zeros: Mask, select: Selection, index: int) -> UnprunedOutcome:
        """Return what becomes of the unpruned weights; ``zeros`` says which of all weights are zero or pruned."""

    def _is_reached(self, zeros: Mask, progress: Progress, index: int) -> bool:
        """Return whether zeros make up the sparsity of the pruning step with this index."""
        wanted = self._sparsity_at(progress, index)
        return is_reached(zeros, wanted, self._rule)

    def _sparsity_at(self, progress: Progress, index: int) -> Sparsity:
        """Return the sparsity after the pruning step with this index."""
        schedule, measured = progress.schedule, progress.initial_sparsity
        if not isinstance(measured, Mapping):
            return schedule[index].sparsity
        first, last = schedule[0].step, schedule[-1].step
        passed = 1.0 if index == len(schedule) - 1 else (schedule[index].step - first) / (last - first)
        final, interpolation = self._final_sparsity, self.settings.interpolation
        return {
            name: sparsity_at(passed, initial=initial, final=max(initial, final), interpolation=interpolation)
            for name, initial in measured.items()
        }

    def _schedule_at(self, steps_per_epoch: int, initial: Sparsity | None) -> tuple[ScheduledStep, ...]:
        final = self._final_sparsity
        values = _values(initial) or [float(self.settings.initial_sparsity)]
        sizes = [stop - start for start, stop in self.layout.segments.values()] if len(values) > 1 else [1]
        first = sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)
        last = sum(size * max(value, final) for size, value in zip(sizes, values, strict=True)) / sum(sizes)
        return pruning_schedule(
            self.settings, steps_per_epoch, sparsities=(first, last if max(values) > final else final)
        )

    def _warn_at_start(self) -> None:
        measured = self._progress.initial_sparsity or 0.0
        by_name = measured if isinstance(measured, Mapping) else {"the weights": measured}
        above = [name for name, initial in by_name.items() if initial > self._final_sparsity]
        if above:
            self._logger.warning(
                "%s: already sparser than final_sparsity %g; pruned weights never regrow, so this sparsity stays",
                ", ".join(above),
                self._final_sparsity,
            )
        self._warn_of_unreachable(self._final_sparsity)


class MagnitudePruner(GradualPruner):
    """Gradual pruning by magnitude; for its arguments see :class:`Pruner`.

    Example:
        >>> from mfac_core.settings.pruning import MagnitudeSettings
        >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1)
        >>> pruner = MagnitudePruner(settings, {"w": np.zeros(4)}, steps_per_epoch=10)
        >>> result = pruner.prune({"w": np.array([1.0, -4.0, 3.0, 2.0])}, step=10)
        >>> result.weights["w"].tolist()
        [0.0, -4.0, 3.0, 0.0]
    """

    def _prune_unpruned(self, weights: Array, zeros: Mask, select: Selection, index: int) -> UnprunedOutcome:
        return magnitude_step(weights, select)


def _values(sparsity: Sparsity | None) -> list[float]:
    if sparsity is None:
        return []
    return list(sparsity.values()) if isinstance(sparsity, Mapping) else [sparsity]
