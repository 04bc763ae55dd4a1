import logging
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.sample_batches import Sampler
from mfac_core.session.batch_statistics import (
    BatchStatistics,
    LayerStatistics,
    no_statistics_line,
    recalibrated_line,
    stale_statistics_line,
)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(1, 3)), min_size=1, max_size=8))
def test_each_call_counts_the_same(measured):
    statistics = BatchStatistics(["norm"])
    for mean, variance, calls in measured:
        statistics.add("norm", [mean], [variance], calls)
    ((_, mean, variance),) = statistics.averages()
    calls = [each[2] for each in measured]
    np.testing.assert_allclose(mean, np.average([each[0] for each in measured], weights=calls), atol=1e-6)
    np.testing.assert_allclose(variance, np.average([each[1] for each in measured], weights=calls), atol=1e-6)
    assert statistics.calls("norm") == sum(calls)


def test_numbers_of_half_precision_are_added_up_in_more():
    statistics = BatchStatistics(["norm"])
    for _ in range(4096):  # the sum of so many 3s is no number of half precision, and stops growing in it
        statistics.add("norm", np.full(2, 3, np.float16), np.full(2, 5, np.float16))
    ((_, mean, variance),) = statistics.averages()
    assert (mean.tolist(), variance.tolist()) == ([3, 3], [5, 5])


def test_a_layer_without_a_call_has_no_average():
    statistics = BatchStatistics(["norm", "head"])
    statistics.add("norm", [1.0], [1.0])
    statistics.add("head", [np.nan], [np.nan], calls=0)
    assert statistics.unused == ["head"]
    assert [name for name, _, _ in statistics.averages()] == ["norm"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_refused_with_the_name_of_the_layer(bad, place):
    measured = [np.ones(3), np.ones(3)]
    measured[place][1] = bad
    with pytest.raises(ValueError, match="of batch normalization layer body.norm contains NaN or Inf.*look for NaN"):
        BatchStatistics(["body.norm"]).add("body.norm", *measured)


def test_lines_name_layers_and_count_them():
    statistics = BatchStatistics(["a", "b", "c"])
    statistics.add("a", [0.0], [1.0])
    statistics.add("b", [0.0], [1.0])
    statistics.num_batches = 1200
    assert recalibrated_line(statistics, ["d"]) == (
        "statistics of 2 batch normalization layers recalibrated over 1,200 batches; not reached by any batch: c; "
        "frozen, and left unchanged: d"
    )
    assert no_statistics_line(["d"]) == "nothing to recalibrate: every batch normalization of the model is frozen (d)"
    assert stale_statistics_line(["a", "b"], "cure()") == (
        "2 batch normalization layers (a, b) still have the statistics of the weights before pruning, which can cost "
        "accuracy; cure() recalibrates them"
    )


class Norms(LayerStatistics):
    """Layers that keep the mean of a column of each batch."""

    def __init__(self, layers, frozen=()):
        super().__init__({name: [0.0] for name in layers}, frozen, logging.getLogger("mfac_core"))

    def _copies(self):
        return {name: list(layer) for name, layer in self.layers.items()}

    def _restore(self, copies):
        for name, values in copies.items():
            self.layers[name][:] = values

    @contextmanager
    def _measuring(self, statistics):
        self._restore(dict.fromkeys(self.layers, [7.0]))  # as running a framework's layers does
        yield

    def _measure(self, sampler, batch, statistics):
        for name, value in batch.items():
            statistics.add(name, [value], [1.0])

    def _write(self, statistics):
        for name, mean, _ in statistics.averages():
            self.layers[name][:] = mean


def test_layers_get_the_averages_and_what_no_batch_comes_through_stays(caplog):
    norms = Norms(["a", "b", "c"], frozen=["c"])
    with caplog.at_level(logging.INFO, logger="mfac_core"):
        assert norms.recalibrate(Sampler([{"a": 1.0}, {"a": 3.0}])) == 1
    assert norms.layers == {"a": [2.0], "b": [0.0]}
    assert "over 2 batches; not reached by any batch: b; frozen, and left unchanged: c" in caplog.text
    assert Norms(["c"], frozen=["c"]).recalibrate(Sampler([])) == 0


def test_an_exception_leaves_statistics_as_they_were():
    norms = Norms(["a", "b"])
    for batches in ([{"a": 1.0}, {"b": np.nan}], []):
        with pytest.raises(ValueError, match="contains NaN or Inf|yields no batch"):
            norms.recalibrate(Sampler(batches))
        assert norms.layers == {"a": [0.0], "b": [0.0]}
