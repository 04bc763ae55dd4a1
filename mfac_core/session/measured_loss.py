"""What a pruning step does to the loss, measured on a few batches beside those of the gradient samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mfac_core.pruners.mfac import MFACPruner
from mfac_core.pruners.step import PruneResult
from mfac_core.sample_batches import HeldOut

__all__ = ["LossMeasurement"]

_logger = logging.getLogger("mfac_core")

NUM_HELD_OUT = 16
"""Batches that the loss is measured on, and no more than there are gradient samples."""


class LossMeasurement:
    """The measurement of one pruning step: the loss of the same batches before it and after.

    The batches come with the gradient samples of the first part of the step, and are held until the measurement is
    forgotten.

    Args:
        loss: Gives the mean loss of batches with the weights as they are; ``None`` where there are no batches.

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

    def __init__(self, loss: Callable[[list[Any]], float] | None) -> None:
        self._loss = loss
        self._held_out: HeldOut | None = None
        self._before: float | None = None
        self._num_parts = 0

    def held_out(self, pruner: MFACPruner) -> HeldOut | None:
        """Return what takes batches from the source of the gradient samples.

        Args:
            pruner: For which they are drawn.

        Returns:
            It, or ``None`` where the pruning step has begun already: it is measured as a whole, or not at all.
        """
        if pruner.is_inside_step:
            return None
        self._held_out = HeldOut(min(NUM_HELD_OUT, pruner.num_gradients))
        return self._held_out

    def begin(self) -> None:
        """Measure the loss before the weights change, once, where there are batches."""
        self._num_parts += 1
        if self._before is None and self._loss and self._held_out and self._held_out.batches:
            self._before = self._loss(self._held_out.batches)

    def end(self, result: PruneResult) -> PruneResult:
        """Measure the loss once the weights have changed, where the pruning step is done with that.

        Args:
            result: What the part at hand leaves; its weights are in the model.

        Returns:
            The result, with the change of the loss where it was measured; a loss that is no finite number is a warning.
        """
        if self._before is None or not self._loss or not self._held_out or not result.completes_step:
            return result
        after = self._loss(self._held_out.batches)
        if not math.isfinite(self._before) or not math.isfinite(after):
            _logger.warning(
                "the loss was %.3g before the pruning step and is %.3g after it, on %s, so that its change is not "
                "measured; look for NaN and for batches without examples in the data, and for NaN in the weights",
                self._before,
                after,
                self.where,
            )
            return result
        return replace(result, measured_loss_change=after - self._before)

    @property
    def where(self) -> str:
        """What it rests on: how many batches, held out if none of them can have given a sample; and of which parts."""
        if self._held_out is None:
            return ""
        # each further part draws anew, and from data that are shuffled it may draw the same examples
        is_apart = self._held_out.are_new and self._num_parts == 1
        count = len(self._held_out.batches)
        what = f"{count} {'held-out ' if is_apart else ''}batch{'' if count == 1 else 'es'}"
        return what if self._num_parts == 1 else f"{what}, over all {self._num_parts} parts"
