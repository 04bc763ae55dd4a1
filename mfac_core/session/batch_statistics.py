"""The running statistics of batch normalization, recalibrated after pruning."""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.ranks import Alone, Ranks
from mfac_core.ranks.agreement import gathered, together
from mfac_core.ranks.logs import logger_of
from mfac_core.sample_batches import Sampler, in_step
from mfac_core.weight_names import join_names

__all__ = [
    "ENOUGH_BATCHES",
    "BatchStatistics",
    "LayerStatistics",
    "recalibrated_line",
    "no_statistics_line",
    "stale_statistics_line",
]

ENOUGH_BATCHES = 256
"""The maximum number of batches that one-shot pruning uses."""

Vector = npt.NDArray[np.float64]


class BatchStatistics:
    """Means and variances of the inputs of batch normalization layers, averaged over batches.

    Args:
        layers: Names of the layers.

    Attributes:
        num_batches: How many batches have been measured, for the log.

    Example:
        >>> statistics = BatchStatistics(["norm", "unused"])
        >>> for mean in (1.0, 2.0):
        ...     statistics.add("norm", np.array([mean]), np.array([4.0]))
        >>> [(name, mean.tolist(), variance.tolist()) for name, mean, variance in statistics.averages()]
        [('norm', [1.5], [4.0])]
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self.num_batches = 0
        self._calls = dict.fromkeys(layers, 0)
        self._sums: dict[str, tuple[Vector, Vector]] = {}

    @property
    def unused(self) -> list[str]:
        """Names of the layers that no batch has reached."""
        return [name for name, calls in self._calls.items() if not calls]

    def calls(self, layer: str) -> int:
        """Return how often a layer has been called: twice per batch for a layer that the model uses twice."""
        return self._calls[layer]

    def add(self, layer: str, mean: npt.ArrayLike, variance: npt.ArrayLike, calls: int = 1) -> None:
        """Add the mean and the variance of each channel, averaged over a number of calls, which may be 0.

        Raises:
            ValueError: If a number is not finite.
        """
        if not calls:
            return
        measured = np.array(mean, np.float64), np.array(variance, np.float64)
        if not all(np.isfinite(each).all() for each in measured):
            raise ValueError(
                f"the input of batch normalization layer {layer} contains NaN or Inf, or its variance overflows, so "
                "the statistics are left unchanged; look for NaN in the data and in the weights"
            )
        before = self._sums.get(layer, (0.0, 0.0))
        self._sums[layer] = (before[0] + calls * measured[0], before[1] + calls * measured[1])
        self._calls[layer] += calls

    def of_all(self, ranks: Ranks) -> BatchStatistics:
        """Return the statistics over the batches of all ranks. Collective."""
        if ranks.size == 1:
            return self
        here = [(calls, self._sums[name][0].size if calls else 0) for name, calls in self._calls.items()]
        everywhere = gathered(ranks, [self.num_batches, *(value for pair in here for value in pair)])
        found = BatchStatistics(self._calls)
        found.num_batches = int(everywhere[:, 0].sum())
        found._calls = dict(zip(self._calls, everywhere[:, 1::2].sum(axis=0).tolist(), strict=True))
        # a layer that no batch of this rank has reached contributes zeros
        sizes = dict(zip(self._calls, everywhere[:, 2::2].max(axis=0).tolist(), strict=True))
        sums = [np.ravel(self._sums.get(name, np.zeros((2, size)))) for name, size in sizes.items()]
        total = ranks.sum(np.concatenate(sums))
        offsets = itertools.accumulate((2 * size for size in sizes.values()), initial=0)
        for (name, size), start in zip(sizes.items(), offsets, strict=False):
            if size:
                found._sums[name] = total[start : start + size], total[start + size : start + 2 * size]
        return found

    def averages(self) -> list[tuple[str, Vector, Vector]]:
        """Return name, mean and variance of each layer that a batch has reached."""
        return [
            (name, mean / self._calls[name], variance / self._calls[name])
            for name, (mean, variance) in self._sums.items()
        ]


class LayerStatistics(ABC):
    """The running statistics of a model's batch normalization layers.

    An adapter says how its framework runs these layers and where they store their statistics.

    Args:
        layers: Each layer by name, including frozen ones.
        frozen: Names of the layers to leave as they are.
        logger: Where to log what was recalibrated.
        ranks: The processes that have the model, each of which measures batches of its own; ``None`` for a single one.
        sharded: Whether the ranks run the model together, because each has only a part of it.

    Attributes:
        layers: The layers whose statistics may be recalibrated, by name.
        frozen: Names of the frozen ones.
    """

    def __init__(
        self,
        layers: Mapping[str, Any],
        frozen: Collection[str],
        logger: logging.Logger,
        *,
        ranks: Ranks | None = None,
        sharded: bool = False,
    ) -> None:
        self.layers = {name: layer for name, layer in layers.items() if name not in frozen}
        self.frozen = frozen
        self._ranks = ranks or Alone()
        self._sharded = sharded
        self._logger = logger_of(self._ranks, logger)

    def recalibrate(
        self, sampler: Sampler, num_batches: int | None = None, options: Mapping[str, object] | None = None
    ) -> int:
        """Replace the statistics by averages over the batches of one pass; an exception leaves them as they were.

        Each rank reads all batches of its own pass; the averages are those over all ranks.

        Args:
            sampler: Where the batches come from.
            num_batches: The maximum number of batches; ``None`` for all of the pass.
            options: Passed to the callable that makes the batches.

        Returns:
            The number of layers whose statistics were recalibrated.
        """
        if not self.layers:
            self._logger.info("%s", no_statistics_line(self.frozen))
            return 0
        ranks, statistics = self._ranks, BatchStatistics(self.layers)
        doing = "measuring the statistics of batch normalization"
        with together(ranks, doing):
            before = self._copies()
        try:
            with self._measuring(statistics):
                for batch in in_step(sampler.one_pass(num_batches, options), ranks):
                    with together(ranks, doing, sharded=self._sharded):
                        self._measure(sampler, batch, statistics)
                    with together(ranks, doing):
                        self._collect(statistics)
                    statistics.num_batches += 1
            statistics = statistics.of_all(ranks)
            with together(ranks, "writing the statistics of batch normalization"):
                self._restore(before)  # also those of layers that no batch reached
                self._write(statistics)
        except BaseException:
            self._restore(before)
            raise
        self._logger.info("%s", recalibrated_line(statistics, self.frozen))
        return len(statistics.averages())

    @abstractmethod
    def _copies(self) -> Any:
        """Return copies of the statistics."""

    @abstractmethod
    def _restore(self, copies: Any) -> None:
        """Write copies of the statistics back."""

    @abstractmethod
    def _measuring(self, statistics: BatchStatistics) -> AbstractContextManager[None]:
        """Put the layers, and nothing else in the model, in training mode for a block."""

    @abstractmethod
    def _measure(self, sampler: Any, batch: Any, statistics: BatchStatistics) -> None:
        """Run the model on a batch, so that its layers measure it."""

    def _collect(self, statistics: BatchStatistics) -> None:
        """Add what the layers have measured, unless they add it themselves."""

    @abstractmethod
    def _write(self, statistics: BatchStatistics) -> None:
        """Write the averages into the layers."""


def no_statistics_line(frozen: Collection[str] = ()) -> str:
    """Return the log line of a model that has no statistics to recalibrate.

    Example:
        >>> no_statistics_line()
        'nothing to recalibrate: the model has no batch normalization with running statistics'
    """
    why = "the model has no batch normalization with running statistics"
    if frozen:
        why = f"every batch normalization of the model is frozen ({join_names(frozen)})"
    return f"nothing to recalibrate: {why}"


def recalibrated_line(statistics: BatchStatistics, frozen: Collection[str] = ()) -> str:
    """Return the log line about the statistics that were recalibrated.

    Example:
        >>> statistics = BatchStatistics(["norm", "unused"])
        >>> statistics.add("norm", [0.0], [1.0])
        >>> statistics.num_batches = 1
        >>> recalibrated_line(statistics)
        'statistics of 1 batch normalization layer recalibrated over 1 batch; not reached by any batch: unused'
    """
    unused = f"; not reached by any batch: {join_names(statistics.unused)}" if statistics.unused else ""
    left = f"; frozen, and left unchanged: {join_names(frozen)}" if frozen else ""
    layers = _counted(len(statistics.averages()), "batch normalization layer")
    return f"statistics of {layers} recalibrated over {_counted(statistics.num_batches, 'batch', 'es')}{unused}{left}"


def stale_statistics_line(layers: Collection[str], cure: str) -> str:
    """Return the warning that batch statistics predate the pruning, with the call that recalibrates them.

    Example:
        >>> stale_statistics_line(["norm"], "recalibrate(model)").partition(", ")[0]
        '1 batch normalization layer (norm) still has the statistics of the weights before pruning'
    """
    has = "has" if len(layers) == 1 else "have"
    return (
        f"{_counted(len(layers), 'batch normalization layer')} ({join_names(layers)}) still {has} the statistics of "
        f"the weights before pruning, which can cost accuracy; {cure} recalibrates them"
    )


def _counted(number: int, one: str, ending: str = "s") -> str:
    return f"{number:,} {one}{'' if number == 1 else ending}"
