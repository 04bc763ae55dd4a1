"""The mean of a few runs, and its confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["mean_and_half_width"]

_LEVEL = 0.95


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of some runs, and half the width of its 95% confidence interval by Student's t.

    The half width is ``None`` for a single run, which gives no estimate of the spread.

    Example:
        >>> mean, half_width = mean_and_half_width([0.91, 0.95, 0.93])
        >>> f"{mean:.2f} ± {half_width:.2f}"
        '0.93 ± 0.05'
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, _students_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _students_t(freedom: int) -> float:
    # The quantile of |t| at the level. With t = sqrt(freedom) tan(angle), the probability for an integer number of
    # degrees of freedom is a finite sum that grows with the angle, so bisection finds the angle.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (low, angle) if _probability(angle, freedom) > _LEVEL else (angle, high)
    return math.sqrt(freedom) * math.tan(low)


def _probability(angle: float, freedom: int) -> float:
    # Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
