from __future__ import annotations

import math
import statistics

import pytest

from mfac_core.report.confidence import mean_and_half_width


@pytest.mark.parametrize("number", [*range(2, 13), 30, 31, 200])
def test_the_interval_is_that_of_scipy(number: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = [math.sin(each) for each in range(number)]

    mean, half_width = mean_and_half_width(values)

    low, high = stats.t.interval(0.95, number - 1, loc=statistics.fmean(values), scale=stats.sem(values))
    assert half_width is not None
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))


def test_five_runs_have_the_interval_of_the_tables() -> None:
    assert mean_and_half_width([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 2.776 * math.sqrt(2.5 / 5)), rel=1e-3)


def test_one_run_has_no_interval() -> None:
    assert mean_and_half_width([0.5]) == (0.5, None)
