"""Measurements by task and method: means, spreads, and which of two methods is ahead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from results_tasks import TASKS, Metric
from scipy.stats import t

__all__ = ["Comparison", "Results", "mean_and_spread"]

_CONFIDENCE = 0.95


class Comparison(NamedTuple):
    """How much better one method is than another on the same seeds.

    Attributes:
        mean: Mean of the differences; positive if the first is better.
        spread: Their standard deviation.
        verdict: ``ahead`` or ``behind``, or ``equal`` if the 95% confidence interval of the mean contains zero.
    """

    mean: float
    spread: float
    verdict: str


@dataclass
class Results:
    """The runs of all tasks.

    Args:
        kept: The results that ``results.py`` stored, one entry per task, group of runs and seed.
    """

    kept: Sequence[Mapping[str, Any]]
    _runs: dict[str, list[dict[str, Any]]] = field(init=False, default_factory=dict)
    _facts: dict[str, dict[int, Mapping[str, Any]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for each in self.kept:
            task, seed = each["task"], each["seed"]
            self._facts.setdefault(task, {})[seed] = each["facts"]
            self._runs.setdefault(task, []).extend({**run, "seed": seed} for run in each["runs"].values())

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order of :data:`TASKS`."""
        return [task for task in TASKS if task in self._runs]

    def seeds(self, task: str) -> int:
        """Return the number of seeds of a task."""
        return len(self._facts[task])

    def fact(self, task: str, name: str) -> Any:
        """Return a fact that is the same for all seeds of a task."""
        return next(iter(self._facts[task].values()))[name]

    def facts(self, name: str) -> list[str]:
        """Return the distinct values of a fact over all tasks and seeds."""
        return sorted({str(facts[name]) for by_seed in self._facts.values() for facts in by_seed.values()})

    def dense(self, task: str) -> dict[int, float]:
        """Return the metric of the dense network, by seed."""
        return {seed: facts["dense"] for seed, facts in self._facts[task].items()}

    def of(self, task: str, what: str = "value", **where: Any) -> dict[int, float]:
        """Return a number by seed, of the runs with these properties."""
        return {run["seed"]: run[what] for run in self._found(task, where)}

    def seconds_in_epochs(self, task: str, **where: Any) -> dict[int, float]:
        """Return the time of pruning in epochs of dense training, by seed."""
        return {
            run["seed"]: run["seconds"] / self._facts[task][run["seed"]]["seconds_per_epoch"]
            for run in self._found(task, where)
        }

    def choices(self, task: str, name: str, **where: Any) -> list[Any]:
        """Return the distinct values of a property among the runs with these properties, in the order of the runs."""
        return list(dict.fromkeys(run[name] for run in self._found(task, where)))

    def compared(self, task: str, first: Mapping[int, float], second: Mapping[int, float]) -> Comparison:
        """Compare two methods on the seeds that both have."""
        sign = -1 if self.metric(task).lower_is_better else 1
        differences = [sign * (first[seed] - second[seed]) for seed in first if seed in second]
        mean, spread = _mean_and_spread(differences)
        half = t.ppf((1 + _CONFIDENCE) / 2, len(differences) - 1) * spread / math.sqrt(len(differences))
        if len(differences) < 2 or abs(mean) <= half or not mean:
            return Comparison(mean, spread, "equal")
        return Comparison(mean, spread, "ahead" if mean > 0 else "behind")

    @staticmethod
    def metric(task: str) -> Metric:
        """Return the metric of a task."""
        return TASKS[task].metric

    def _found(self, task: str, where: Mapping[str, Any]) -> list[dict[str, Any]]:
        runs = self._runs.get(task, [])
        return [run for run in runs if all(run[name] == value for name, value in where.items())]


def mean_and_spread(values: Mapping[int, float] | Iterable[float]) -> tuple[float, float]:
    """Return mean and standard deviation over seeds; the latter is 0 for one seed."""
    return _mean_and_spread(list(values.values() if isinstance(values, Mapping) else values))


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
