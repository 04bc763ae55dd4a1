"""Alternating compressed and decompressed training (AC/DC)."""

from __future__ import annotations

from functools import partial

import numpy as np

from mfac_core.backends import Array
from mfac_core.masks.layout import Mask, scatter_unpruned, take_unpruned
from mfac_core.masks.patterns import snap_to_n_of_m
from mfac_core.pruners.base import Outcome, Pruner
from mfac_core.pruners.step import magnitude_step
from mfac_core.settings.pruning import ACDCSettings

__all__ = ["ACDCPruner"]


class ACDCPruner(Pruner):
    """Compressed phases keep only the largest weights; decompressed phases train all, the pruned ones from zero.

    For the phases see :func:`mfac_core.schedules.pruning.pruning_schedule`; for the arguments :class:`Pruner`.
    With ``reset_momentum``, a decompressed phase that follows a compressed one asks for a reset of the optimizer, whose
    state of the weights that regrow is stale.

    Example:
        >>> settings = ACDCSettings(compression_sparsity=0.5, end_epoch=2)
        >>> pruner = ACDCPruner(settings, {"w": np.zeros(2)}, steps_per_epoch=10)
        >>> [pruner.prune({"w": np.array([2.0, 1.0])}, step).masks["w"].tolist() for step in (0, 10)]
        [[True, True], [True, False]]

    References:
        Peste et al. (2021), AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks.
    """

    settings: ACDCSettings

    @property
    def _sparsity(self) -> float:
        return snap_to_n_of_m(self.settings.mask_type, self.settings.compression_sparsity)

    def _warn_at_start(self) -> None:
        self._warn_of_unreachable(self._sparsity)

    def _prune(self, weights: Array, is_zero: Mask, index: int) -> Outcome:
        distribution = self._distribution_of(self._mask)
        unpruned = take_unpruned(weights, distribution.held_mask)
        if not self.schedule[index].sparsity:
            was_compressed = self._done > 0 and self.schedule[self._done - 1].sparsity > 0
            return Outcome(
                scatter_unpruned(unpruned, distribution.held_mask),
                np.ones_like(self._mask),
                resets_optimizer=self.settings.reset_momentum and was_compressed,
            )
        select = partial(self._newly_pruned, sparsity=self._sparsity)
        unpruned = distribution.to_owners(unpruned)
        return Outcome.of_unpruned(distribution, magnitude_step(unpruned, select))
