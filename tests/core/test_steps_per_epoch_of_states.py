"""A state goes on at the same epoch where an epoch has another number of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mfac_core import ACDCSettings, ConstantSettings, MagnitudeSettings, MFACSettings
from mfac_core.pruners import make_pruner
from mfac_core.settings.pruning import PruningSettings

SETTINGS: dict[str, PruningSettings] = {
    "M-FAC": MFACSettings(
        final_sparsity=0.8,
        start_epoch=1.0,
        end_epoch=5.0,
        update_frequency=1.0,
        num_gradients={0.0: 4, 0.5: 7},
        block_size=8,
        damping=0.01,
    ),
    "magnitude": MagnitudeSettings(final_sparsity=0.8, start_epoch=1.0, end_epoch=5.0, update_frequency=0.25),
    "from what is zero": MagnitudeSettings(
        initial_sparsity="__FROM_PARAM__", final_sparsity=0.8, start_epoch=1.0, end_epoch=5.0, update_frequency=1.0
    ),
    "AC/DC": ACDCSettings(compression_sparsity=0.8, start_epoch=0.0, end_epoch=5.0, update_frequency=1.0),
    "constant": ConstantSettings(start_epoch=1.0, end_epoch=4.0),
}


def weights_of(seed: int) -> dict[str, Any]:
    weights = np.random.default_rng(seed).standard_normal((6, 8))
    weights[:2] = 0
    return {"w": weights.astype(np.float32)}


def run(settings: PruningSettings, steps_per_epoch: int, first: int, last: int, pruner: Any = None) -> Any:
    pruner = pruner or make_pruner(settings, weights_of(0), steps_per_epoch=steps_per_epoch)
    weights = weights_of(0)
    weights = {name: array * pruner.masks[name] for name, array in weights.items()}
    for step in range(first, last + 1):
        while pruner.is_due(step):
            weights = dict(pruner.prune(weights, step).weights)
        if pruner.needs_gradients(step):
            pruner.observe(weights_of(step + 1))
    return pruner


@pytest.mark.parametrize("epoch", [0.0, 0.5, 1.5, 2.0, 3.2, 4.5, 5.0])
@pytest.mark.parametrize("steps", [(10, 5), (5, 10), (20, 3), (4, 1), (10, 10)])
@pytest.mark.parametrize("name", SETTINGS)
def test_progress_and_masks_stay_those_of_the_epoch(name: str, steps: tuple[int, int], epoch: float) -> None:
    then, now = steps
    before = run(SETTINGS[name], then, 0, int(epoch * then))
    state = before.state_dict()
    resumed = make_pruner(SETTINGS[name], weights_of(9), steps_per_epoch=now)
    resumed.check_state(state)
    resumed.load_state_dict(state)
    assert np.array_equal(resumed.masks["w"], before.masks["w"])
    assert resumed.num_rows == min(before.num_rows, getattr(resumed, "num_gradients", 0))
    assert resumed.is_finished == before.is_finished
    done = before.schedule[: state["pruning_steps_done"]]
    rest = resumed.schedule[resumed.state_dict()["pruning_steps_done"] :]
    if done and rest:
        assert done[-1].epoch < rest[0].epoch
    step = round(int(epoch * then) * now / then)
    if not rest:
        return
    assert not resumed.is_due(step) or rest[0].step <= step
    run(SETTINGS[name], now, step, 5 * now, resumed)
    assert resumed.is_finished


def test_the_most_recent_rows_are_kept_where_fewer_are_wanted() -> None:
    # With 4 steps per epoch the sparsity in the middle is above the threshold, with 5 it is below.
    settings = MFACSettings(
        initial_sparsity=0.0,
        final_sparsity=0.9,
        start_epoch=0.0,
        end_epoch=1.0,
        update_frequency=0.5,
        interpolation="linear",
        num_gradients={0.0: 2, 0.45: 5},
    )
    before = run(settings, 4, 0, 3)
    state = before.state_dict()
    resumed = make_pruner(settings, weights_of(0), steps_per_epoch=5)
    resumed.load_state_dict(state)
    rows, kept = state["window"]["rows"], resumed.state_dict()["window"]["rows"]
    assert (len(rows), len(kept)) == (4, 2)
    assert np.array_equal(kept, rows[-2:])


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "10", None, True, 10**30, float("nan")])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_number_of_steps_is_refused(name: str, wrong: object) -> None:
    pruner = run(SETTINGS[name], 10, 0, 20)
    before = pruner.state_dict()
    with pytest.raises(ValueError, match="steps_per_epoch"):
        pruner.load_state_dict(before | {"steps_per_epoch": wrong})
    assert pruner.state_dict()["pruning_steps_done"] == before["pruning_steps_done"]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_without_its_number_of_steps_is_of_the_same(name: str) -> None:
    pruner = run(SETTINGS[name], 10, 0, 20)
    state = pruner.state_dict()
    del state["steps_per_epoch"]
    pruner.load_state_dict(state)
    with pytest.raises(ValueError, match="another pruning schedule"):
        make_pruner(SETTINGS[name], weights_of(0), steps_per_epoch=5).load_state_dict(state)


@pytest.mark.parametrize("name", ["M-FAC", "magnitude", "AC/DC", "constant"])
def test_another_schedule_by_epoch_is_refused(name: str) -> None:
    state = run(SETTINGS[name], 10, 0, 20).state_dict()
    other = make_pruner(SETTINGS[name], weights_of(0), steps_per_epoch=5)
    with pytest.raises(ValueError, match=r"another pruning schedule \(pruning step 1 "):
        other.load_state_dict(state | {"schedule": state["schedule"] + np.array([1.0, 0.0])})
