"""Hold the zeros that are there; nothing more is pruned."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from mfac_core.backends import Array
from mfac_core.left_out import is_adapter
from mfac_core.pruners.base import Mask, Outcome, Pruner, Vector
from mfac_core.schedules.pruning import ScheduledStep, pruning_schedule
from mfac_core.settings.pruning import ConstantSettings
from mfac_core.weight_names import join_names

__all__ = ["ConstantPruner"]

_logger = logging.getLogger("mfac_core")


class ConstantPruner(Pruner):
    """Hold the zeros that the weights have at ``start_epoch``, and let them go at ``end_epoch`` if that is finite.

    Both are pruning steps: the masks after the first are those of the weights that are not 0, the masks after the
    second are all True. For the arguments see :class:`Pruner`. What the schedule says of the sparsity of the
    first step is what the weights show when the pruner is made.

    An array that is zero throughout is taken for one that begins at zero, such as the second matrix of a LoRA adapter
    or a bias, which would never learn: it is held only where ``params`` of the settings has its exact name.

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
        kept, _ = self._found(self.layout.flatten(weights))
        self._held = float(np.mean(~kept))
        self.schedule = self._schedule_at(steps_per_epoch)

    @property
    def is_released(self) -> bool:
        """Whether the masks are not to be held any more: ``end_epoch`` has passed."""
        return self.is_finished and self._releases(len(self.schedule) - 1)

    def _prune(self, weights: Vector, index: int) -> Outcome:
        if self._releases(index):
            return Outcome(weights, np.ones_like(self._kept))
        kept, unheld = self._found(weights)
        unheld = [name for name in unheld if not is_adapter(name)]  # which begin at zero, as everybody knows
        if unheld:
            _logger.warning(
                "zero throughout, which is taken for how they began and not for pruned, and not held: %s; to hold "
                "them at zero, write their exact names in params",
                join_names(unheld),
            )
        return Outcome(np.where(kept, weights, np.zeros_like(weights)), kept)

    def _found(self, weights: Vector) -> tuple[Mask, list[str]]:
        """Return which weights are kept, and the arrays that are not held although all of them is zero."""
        kept = self._kept & (weights != 0)
        unheld = []
        for name, (start, stop) in self.layout.segments.items():
            if start < stop and not weights[start:stop].any() and name not in self.settings.params:
                kept[start:stop] = self._kept[start:stop]
                if kept[start:stop].any():
                    unheld.append(name)
        return kept, unheld

    def _releases(self, index: int) -> bool:
        return self.schedule[index].epoch == self.settings.end_epoch

    def _schedule_at(self, steps_per_epoch: int) -> tuple[ScheduledStep, ...]:
        return pruning_schedule(self.settings, steps_per_epoch, sparsities=(self._held, self._held))

    def _is_same_schedule(self, saved: Vector, scheduled: Vector) -> bool:
        # the sparsity that is held is not planned, it is found
        return saved.shape == scheduled.shape and np.array_equal(saved[:, 0], scheduled[:, 0])
