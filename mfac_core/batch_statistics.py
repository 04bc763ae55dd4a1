"""Statistics that batch normalization keeps of its inputs, estimated anew after pruning."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from mfac_core.weight_names import listed

__all__ = ["BatchStatistics", "estimated_anew_line", "no_statistics_line", "stale_statistics_line"]

Vector = npt.NDArray[np.float64]


class BatchStatistics:
    """Means and variances of the inputs of batch normalization layers: the average over batches.

    Args:
        layers: Names of the layers.

    Example:
        >>> statistics = BatchStatistics(["norm", "unused"])
        >>> for mean in (1.0, 2.0):
        ...     statistics.add("norm", np.array([mean]), np.array([4.0]))
        >>> [(name, mean.tolist(), variance.tolist()) for name, mean, variance in statistics.averages()]
        [('norm', [1.5], [4.0])]
        >>> statistics.unused
        ['unused']
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._calls = dict.fromkeys(layers, 0)
        self._sums: dict[str, tuple[Vector, Vector]] = {}

    @property
    def unused(self) -> list[str]:
        """Names of the layers that no batch has come through."""
        return [name for name, calls in self._calls.items() if not calls]

    def calls(self, layer: str) -> int:
        """Return how many batches have come through a layer.

        Args:
            layer: Its name.

        Returns:
            Their number; a layer that stands in several places sees each batch several times.
        """
        return self._calls[layer]

    def add(self, layer: str, mean: npt.ArrayLike, variance: npt.ArrayLike, calls: int = 1) -> None:
        """Add what a layer has measured.

        Args:
            layer: Its name.
            mean: The mean of each channel.
            variance: The variance of each channel.
            calls: Of how many batches these are the average already.

        Raises:
            ValueError: If a number is not finite.
        """
        measured = np.array(mean, np.float64), np.array(variance, np.float64)
        if not all(np.isfinite(each).all() for each in measured):
            raise ValueError(
                f"the input of the batch normalization {layer} holds NaN or Inf, or numbers too large for its variance: "
                "the statistics stay as they were; look for NaN in the data and in the weights"
            )
        before = self._sums.get(layer, (0.0, 0.0))
        self._sums[layer] = (before[0] + calls * measured[0], before[1] + calls * measured[1])
        self._calls[layer] += calls

    def averages(self) -> list[tuple[str, Vector, Vector]]:
        """Return the averages.

        Returns:
            Name, mean and variance of each layer that a batch has come through.
        """
        return [
            (name, mean / self._calls[name], variance / self._calls[name])
            for name, (mean, variance) in self._sums.items()
        ]


def no_statistics_line(kept: Collection[str] = ()) -> str:
    """Return in one line that a model has no statistics to estimate anew.

    Args:
        kept: Names of layers whose statistics are frozen.

    Returns:
        The line.

    Example:
        >>> no_statistics_line()
        'the model has no batch normalization with running statistics: there is nothing to recalibrate'
    """
    if kept:
        return f"the statistics of every batch normalization are frozen ({listed(kept)}): there is nothing to recalibrate"
    return "the model has no batch normalization with running statistics: there is nothing to recalibrate"


def estimated_anew_line(statistics: BatchStatistics, batches: int, kept: Collection[str] = ()) -> str:
    """Return in one line what was estimated anew.

    Args:
        statistics: What was measured.
        batches: Over how many batches.
        kept: Names of layers whose statistics are frozen.

    Returns:
        The line.

    Example:
        >>> statistics = BatchStatistics(["norm", "unused"])
        >>> statistics.add("norm", [0.0], [1.0])
        >>> estimated_anew_line(statistics, 1)
        'statistics of 1 batch normalization layer estimated anew over 1 batch; no batch comes through unused'
    """
    unused = f"; no batch comes through {listed(statistics.unused)}" if statistics.unused else ""
    frozen = f"; frozen, and left as they are: {listed(kept)}" if kept else ""
    number = len(statistics.averages())
    return (
        f"statistics of {_counted(number, 'batch normalization layer')} estimated anew over "
        f"{_counted(batches, 'batch', 'batches')}{unused}{frozen}"
    )


def stale_statistics_line(layers: Collection[str], cure: str) -> str:
    """Return the warning that pruning has left statistics as they were.

    Args:
        layers: Names of the layers that have such statistics.
        cure: The call that estimates them anew.

    Returns:
        The line.

    Example:
        >>> stale_statistics_line(["norm"], "recalibrate(model)")
        '1 batch normalization layer (norm) still has the statistics of the weights before pruning, which costs accuracy; recalibrate(model) estimates them anew'
    """
    has = "has" if len(layers) == 1 else "have"
    return (
        f"{_counted(len(layers), 'batch normalization layer')} ({listed(layers)}) still {has} the statistics of the "
        f"weights before pruning, which costs accuracy; {cure} estimates them anew"
    )


def _counted(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
