"""The change of the loss over a pruning step, measured on a few batches that are not among the gradient samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mfac_core.pruners.mfac import MFACPruner
from mfac_core.pruners.step import PruneResult
from mfac_core.ranks import Alone, Ranks
from mfac_core.ranks.agreement import gathered, together
from mfac_core.ranks.logs import logger_of
from mfac_core.sample_batches import HeldOut

__all__ = ["LossMeasurement"]

NUM_HELD_OUT = 16
"""The maximum number of batches to measure the loss on; never more than there are gradient samples."""


class LossMeasurement:
    """The measurement of one pruning step: the loss of the same batches before and after it.

    The batches are drawn together with the gradient samples of the first sub-step.

    Args:
        loss: Returns the mean loss over batches at the model's current weights; ``None`` if there are no batches.
        ranks: The processes of the run: each measures batches of its own, and the loss is the mean over all of them.

    Example:
        >>> import numpy as np
        >>> from mfac_core import MFACSettings
        >>> weights = {"w": np.ones(2)}
        >>> pruner = MFACPruner(MFACSettings(final_sparsity=0.5, end_epoch=1), weights, steps_per_epoch=1)
        >>> losses = iter([0.25, 0.75])
        >>> measurement = LossMeasurement(lambda batches: next(losses))
        >>> measurement.held_out(pruner).batches += ["one", "another"]
        >>> measurement.begin()
        >>> result = measurement.end(PruneResult(np.zeros(2), np.zeros(2, bool), 0.5, 0.01))
        >>> result.measured_loss_change, measurement.where
        (0.5, '2 held-out batches')
    """

    def __init__(self, loss: Callable[[list[Any]], float] | None, ranks: Ranks | None = None) -> None:
        self._loss = loss
        self._ranks = ranks or Alone()
        self._logger = logger_of(self._ranks, logging.getLogger("mfac_core"))
        self._is_sharded = False
        self._held_out: HeldOut | None = None
        self._before: float | None = None
        self._num_batches, self._are_new = 0, False
        self._num_substeps = 0

    def held_out(self, pruner: MFACPruner) -> HeldOut | None:
        """Return a new holder for the batches to measure on, to be filled when gradient samples are drawn.

        ``None`` after the first sub-step: a pruning step is measured as a whole, or not at all.
        """
        if pruner.is_inside_step:
            return None
        self._is_sharded = not pruner.shards.is_whole
        wanted = min(NUM_HELD_OUT, pruner.num_gradients)
        self._held_out = HeldOut(pruner.share_of(wanted))
        return self._held_out

    def begin(self) -> None:
        """Measure the loss before the first sub-step changes the weights, if there are batches. Collective."""
        self._num_substeps += 1
        if self._before is None and self._loss and self._held_out:
            drawn = gathered(self._ranks, [len(self._held_out.batches), self._held_out.are_new])
            if self._is_sharded:  # each loss is computed by all ranks together
                drawn[:, 0] = drawn[:, 0].min()
                del self._held_out.batches[int(drawn[0, 0]) :]
            self._num_batches, self._are_new = int(drawn[:, 0].sum()), bool(drawn[:, 1].all())
            if self._num_batches:
                self._before = self._measured(self._loss, self._held_out.batches)

    def end(self, result: PruneResult) -> PruneResult:
        """Return the result of a sub-step, whose weights are in the model, with the change of the loss.

        The change is measured only after the last sub-step; a non-finite loss causes a warning. Collective.
        """
        if self._before is None or not self._loss or not self._held_out or not result.completes_step:
            return result
        after = self._measured(self._loss, self._held_out.batches)
        if not math.isfinite(self._before) or not math.isfinite(after):
            self._logger.warning(
                "the loss was %.3g before the pruning step and is %.3g after it, on %s, so its change is not "
                "measured; look for NaN or empty batches in the data, and for NaN in the weights",
                self._before,
                after,
                self.where,
            )
            return result
        return replace(result, measured_loss_change=after - self._before)

    def _measured(self, loss: Callable[[list[Any]], float], batches: list[Any]) -> float:
        """Return the mean loss over the batches of all ranks."""
        with together(self._ranks, "measuring the loss", sharded=self._is_sharded):
            share = loss(batches) * (len(batches) / self._num_batches) if batches else 0.0
        return float(gathered(self._ranks, [float(share)]).sum())

    @property
    def where(self) -> str:
        """The batches that the loss is measured on: held-out if none can be among the gradient samples."""
        if self._held_out is None:
            return ""
        # every sub-step draws new samples, and from shuffled data these may be the same examples
        is_apart = self._are_new and self._num_substeps == 1
        count = self._num_batches
        batches = f"{count} {'held-out ' if is_apart else ''}batch{'' if count == 1 else 'es'}"
        return batches if self._num_substeps == 1 else f"{batches}, over all {self._num_substeps} sub-steps"
