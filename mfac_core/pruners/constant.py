"""Keep existing zeros; nothing else is pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from mfac_core.backends import Array
from mfac_core.left_out import is_adapter
from mfac_core.masks.layout import Mask, scatter_unpruned, take_unpruned
from mfac_core.pruners.base import Outcome, Pruner
from mfac_core.pruners.saved_states import ScheduleTable
from mfac_core.schedules.pruning import ScheduledStep, pruning_schedule
from mfac_core.schedules.substeps import Sparsity
from mfac_core.settings.pruning import ConstantSettings
from mfac_core.weight_names import join_names

__all__ = ["ConstantPruner"]


class ConstantPruner(Pruner):
    """Keep the zeros that exist at ``start_epoch``, and release them at ``end_epoch`` if that is finite.

    Both are pruning steps: the masks after the first keep the weights that are not 0, the masks after the second are
    all True. For the arguments see :class:`Pruner`. The sparsity that the schedule gives for the first step is that of
    the weights when the pruner is made.

    An array of zeros is assumed to be initialized to zero, such as the second matrix of a LoRA adapter or a bias,
    and would never learn if masked: it is kept at zero only if ``params`` of the settings has its exact name.

    Example:
        >>> pruner = ConstantPruner(ConstantSettings(), {"w": np.array([0.0, 1.0])}, steps_per_epoch=10)
        >>> pruner.prune({"w": np.array([0.0, 1.5])}, step=0).masks["w"].tolist()
        [False, True]
    """

    settings: ConstantSettings

    @property
    def is_released(self) -> bool:
        """Whether masks have been released: ``end_epoch`` has passed."""
        return self.is_finished and self._releases(len(self.schedule) - 1)

    def _prune(self, weights: Array, is_zero: Mask, index: int) -> Outcome:
        if self._releases(index):
            return Outcome(weights, np.ones_like(self._mask))
        mask, unmasked = self._found(self._mask, is_zero)
        unmasked = [name for name in unmasked if not is_adapter(name)]  # adapters are known to start at zero
        if unmasked:
            self._logger.warning(
                "all zeros, so assumed to be initial values and not held: %s; to hold them at zero, list them by name "
                "in params",
                join_names(unmasked),
            )
        held = self._distributed(mask).held_mask
        return Outcome(scatter_unpruned(take_unpruned(weights, held), held), mask)

    def _found(self, mask: Mask, is_zero: Mask) -> tuple[Mask, list[str]]:
        """Return the mask of the weights that are not zero, and the all-zero arrays that are not masked."""
        found = mask & ~is_zero
        unmasked = []
        for name, (start, stop) in self.layout.segments.items():
            if start < stop and is_zero[start:stop].all() and name not in self.settings.params:
                found[start:stop] = mask[start:stop]
                if found[start:stop].any():
                    unmasked.append(name)
        return found, unmasked

    def _releases(self, index: int) -> bool:
        return self.schedule[index].epoch == self.settings.end_epoch

    def _measured_sparsity(self, zeros: Callable[[], Mask], mask: Mask) -> float:
        found, _ = self._found(mask, zeros())
        return float(np.mean(~found))

    def _schedule_at(self, steps_per_epoch: int, initial: Sparsity | None) -> tuple[ScheduledStep, ...]:
        held = cast(float, initial)  # as measured above
        return pruning_schedule(self.settings, steps_per_epoch, sparsities=(held, held))

    def _is_same_schedule(self, saved: ScheduleTable, scheduled: ScheduleTable) -> bool:
        # the sparsity that is kept comes from the weights, not from the schedule
        return saved.shape == scheduled.shape and np.array_equal(saved[:, 0], scheduled[:, 0])
