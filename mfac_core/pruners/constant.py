"""Hold the zeros that are there; nothing more is pruned."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mfac_core.backends import Array
from mfac_core.pruners.base import Outcome, Pruner, Vector
from mfac_core.schedule import PlannedStep, pruning_schedule
from mfac_core.settings import ConstantSettings

__all__ = ["ConstantPruner"]


class ConstantPruner(Pruner):
    """Hold the zeros that the weights have at ``start_epoch``, and let them go at ``end_epoch`` if that is finite.

    Both are pruning steps: the masks after the first are those of the weights that are not 0, the masks after the
    second are all True. For the arguments see :class:`Pruner`. What the schedule says of the sparsity of the
    first step is what the weights show when the pruner is made.

    Example:
        >>> pruner = ConstantPruner(ConstantSettings(), {"w": np.array([0.0, 1.0])}, steps_per_epoch=10)
        >>> pruner.prune({"w": np.array([0.0, 1.5])}, step=0).masks["w"].tolist()
        [False, True]
    """

    settings: ConstantSettings

    def __init__(
        self,
        settings: ConstantSettings,
        weights: Mapping[str, Array],
        *,
        steps_per_epoch: int,
        masks: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(settings, weights, steps_per_epoch=steps_per_epoch, masks=masks)
        zeros = (self.layout.flatten(weights) == 0) | ~self._kept
        self._found = float(np.mean(zeros))
        self.schedule = self._schedule_at(steps_per_epoch)

    @property
    def is_released(self) -> bool:
        """Whether the masks are not to be held any more: ``end_epoch`` has passed."""
        return self.is_finished and self._releases(len(self.schedule) - 1)

    def _prune(self, weights: Vector, index: int) -> Outcome:
        if self._releases(index):
            return Outcome(weights, np.ones_like(self._kept))
        kept = self._kept & (weights != 0)
        return Outcome(np.where(kept, weights, np.zeros_like(weights)), kept)

    def _releases(self, index: int) -> bool:
        return self.schedule[index].epoch == self.settings.end_epoch

    def _schedule_at(self, steps_per_epoch: int) -> tuple[PlannedStep, ...]:
        return pruning_schedule(self.settings, steps_per_epoch, sparsities=(self._found, self._found))

    def _is_same_schedule(self, saved: Vector, planned: Vector) -> bool:
        # the sparsity that is held is not planned, it is found
        return saved.shape == planned.shape and np.array_equal(saved[:, 0], planned[:, 0])
