"""Statistics that batch normalization keeps of its inputs, estimated anew after pruning."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import numpy.typing as npt

from mfac_core.weight_names import join_names

__all__ = ["ENOUGH_BATCHES", "BatchStatistics", "estimated_anew_line", "no_statistics_line", "stale_statistics_line"]

ENOUGH_BATCHES = 256
"""How many batches one-shot pruning uses at most."""

Vector = npt.NDArray[np.float64]


class BatchStatistics:
    """Means and variances of the inputs of batch normalization layers: the average over batches.

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
        """Names of the layers that no batch has come through."""
        return [name for name, calls in self._calls.items() if not calls]

    def calls(self, layer: str) -> int:
        """Return how many batches have come through a layer.

        Args:
            layer: Its name.

        Returns:
            Their number; a layer that is called twice for each batch counts each twice.
        """
        return self._calls[layer]

    def add(self, layer: str, mean: npt.ArrayLike, variance: npt.ArrayLike, calls: int = 1) -> None:
        """Add what a layer has measured.

        Args:
            layer: Its name.
            mean: The mean of each channel.
            variance: The variance of each channel.
            calls: Of how many calls these are the average; nothing is added where it is 0.

        Raises:
            ValueError: If a number is not finite.
        """
        if not calls:
            return
        measured = np.array(mean, np.float64), np.array(variance, np.float64)
        if not all(np.isfinite(each).all() for each in measured):
            raise ValueError(
                f"what comes into the batch normalization {layer} holds NaN or Inf, or is too large for a variance, so "
                "its statistics stay as they were; look for NaN in the data and in the weights"
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


def no_statistics_line(frozen: Collection[str] = ()) -> str:
    """Return in one line that a model has no statistics to estimate anew.

    Args:
        frozen: Names of layers whose statistics are frozen.

    Returns:
        The line.

    Example:
        >>> no_statistics_line()
        'nothing to recalibrate: the model has no batch normalization with running statistics'
    """
    why = "the model has no batch normalization with running statistics"
    if frozen:
        why = f"every batch normalization of the model is frozen ({join_names(frozen)})"
    return f"nothing to recalibrate: {why}"


def estimated_anew_line(statistics: BatchStatistics, frozen: Collection[str] = ()) -> str:
    """Return in one line what was estimated anew.

    Args:
        statistics: What was measured.
        frozen: Names of layers whose statistics are frozen.

    Returns:
        The line.

    Example:
        >>> statistics = BatchStatistics(["norm", "unused"])
        >>> statistics.add("norm", [0.0], [1.0])
        >>> statistics.num_batches = 1
        >>> estimated_anew_line(statistics)
        'statistics of 1 batch normalization layer estimated anew over 1 batch; no batch comes through unused'
    """
    unused = f"; no batch comes through {join_names(statistics.unused)}" if statistics.unused else ""
    left = f"; frozen, and left as they are: {join_names(frozen)}" if frozen else ""
    layers = _counted(len(statistics.averages()), "batch normalization layer")
    return f"statistics of {layers} estimated anew over {_counted(statistics.num_batches, 'batch', 'es')}{unused}{left}"


def stale_statistics_line(layers: Collection[str], cure: str) -> str:
    """Return the warning that pruning has left statistics as they were.

    Args:
        layers: Names of the layers that have such statistics.
        cure: The call that estimates them anew.

    Returns:
        The line.

    Example:
        >>> stale_statistics_line(["norm"], "recalibrate(model)").partition(", ")[0]
        '1 batch normalization layer (norm) still has the statistics of the weights before pruning'
    """
    has = "has" if len(layers) == 1 else "have"
    return (
        f"{_counted(len(layers), 'batch normalization layer')} ({join_names(layers)}) still {has} the statistics of "
        "the "
        f"weights before pruning, which can cost accuracy; {cure} estimates them anew"
    )


def _counted(number: int, one: str, ending: str = "s") -> str:
    return f"{number:,} {one}{'' if number == 1 else ending}"
