from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mfac_core import MFACPruner, MFACSettings
from mfac_core.sample_batches import batches_to_sample
from mfac_core.session.log_lines import pruning_step_line
from mfac_core.session.measured_loss import NUM_HELD_OUT, LossMeasurement


def pruner_for(**settings: Any) -> MFACPruner:
    changes = {"final_sparsity": 0.5, "end_epoch": 0.0, "num_gradients": 4, **settings}
    return MFACPruner(MFACSettings(**changes), {"w": np.arange(1.0, 9.0)}, steps_per_epoch=1, live_gradients=False)


def prune(pruner: MFACPruner, measurement: LossMeasurement, weights: dict[str, Any], source: Any) -> list[Any]:
    """The results of the parts of a pruning step, as an adapter does them; a batch is the seed of its gradient."""
    results = []
    while pruner.is_due(0):
        pruner.forget_gradients()
        for batch in batches_to_sample(source, pruner.num_gradients, held_out=measurement.held_out(pruner)):
            pruner.observe({"w": np.random.default_rng(batch).standard_normal(8)})
        measurement.begin()
        with pruner.pruning(weights, 0) as result:
            weights["w"] = result.weights["w"]
            results.append(measurement.end(result))
    return results


@pytest.mark.parametrize("parts", [1, 3])
def test_the_loss_is_measured_on_the_same_batches_before_the_first_part_and_after_the_last(parts: int) -> None:
    weights, measured = {"w": np.arange(1.0, 9.0)}, []

    def loss(batches: list[int]) -> float:
        measured.append((list(batches), weights["w"].copy()))
        return float(weights["w"].sum())

    measurement = LossMeasurement(loss)
    results = prune(pruner_for(num_recomputations=parts), measurement, weights, range(100))
    assert len(results) == parts
    assert [result.completes_step for result in results] == [False] * (parts - 1) + [True]
    assert [result.measured_loss_change is None for result in results] == [True] * (parts - 1) + [False]
    assert results[-1].measured_loss_change == pytest.approx(weights["w"].sum() - 36)
    (before, dense), (after, pruned) = measured
    assert before == after == [4, 5, 6, 7]  # no more than gradient samples
    assert dense.tolist() == list(range(1, 9))
    assert pruned.tolist() == weights["w"].tolist()
    # later parts may draw what was held out from the first
    assert measurement.where == ("4 held-out batches" if parts == 1 else "4 batches, over all 3 sub-steps")


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([0.5, float("nan")], "was 0.5 before the pruning step and is nan after it, on 4 held-out batches"),
        ([float("inf"), 0.5], "was inf before the pruning step and is 0.5 after it, on 4 held-out batches"),
    ],
)
def test_a_loss_that_is_not_finite_is_a_warning_and_no_measurement(
    losses: list[float], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = iter(losses)
    (result,) = prune(pruner_for(), LossMeasurement(lambda batches: next(values)), {"w": np.ones(8)}, range(100))
    assert result.completes_step and result.measured_loss_change is None
    (record,) = caplog.records
    assert said in record.getMessage() and record.levelname == "WARNING"


@pytest.mark.parametrize(
    ("source", "rows", "where"),
    [
        (range(100), 64, f"{NUM_HELD_OUT} held-out batches"),
        (range(70), 64, f"{NUM_HELD_OUT} batches"),
        (range(65), 64, f"{NUM_HELD_OUT} batches"),
        (range(100), 1, "1 held-out batch"),
    ],
)
def test_what_it_rests_on_is_said(source: range, rows: int, where: str) -> None:
    measurement = LossMeasurement(lambda batches: float(len(batches)))
    (result,) = prune(pruner_for(num_gradients=rows), measurement, {"w": np.arange(1.0, 9.0)}, source)
    line = pruning_step_line(
        result,
        settings=pruner_for().settings,
        modifier="",
        names=["w"],
        step=0,
        steps_per_epoch=1,
        num_rows=rows,
        seconds=0.0,
        measured_on=measurement.where,
    )
    assert f" (in-sample), measured loss change +0 on {where}, 0.00 s (w)" in line


def test_without_batches_or_a_loss_nothing_is_measured() -> None:
    for loss, source in ((None, range(100)), (lambda batches: 1 / 0, iter(range(100)))):
        measurement = LossMeasurement(loss)
        (result,) = prune(pruner_for(), measurement, {"w": np.arange(1.0, 9.0)}, source)
        assert result.measured_loss_change is None
        assert result.predicted_loss_increase > 0


def test_a_pruning_step_that_goes_on_inside_is_not_measured() -> None:
    pruner, weights = pruner_for(num_recomputations=3), {"w": np.arange(1.0, 9.0)}
    assert not pruner.is_inside_step
    for batch in range(4):
        pruner.observe({"w": np.random.default_rng(batch).standard_normal(8)})
    weights["w"] = pruner.prune(weights, 0).weights["w"]
    resumed = pruner_for(num_recomputations=3)
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.is_inside_step
    results = prune(resumed, LossMeasurement(lambda batches: 1 / 0), weights, range(100))
    assert [result.measured_loss_change for result in results] == [None, None]
    assert results[-1].completes_step
    assert not resumed.is_inside_step
