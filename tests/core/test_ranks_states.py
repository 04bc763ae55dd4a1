"""Runs that are stopped on some ranks and resumed on others: at another number, with other shards, alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core import RankError
from mfac_core.pruners import MFACPruner
from mfac_core.ranks import Shards
from mfac_core.settings.pruning import FROM_PARAM, MFACSettings
from tests.core.rank_runs import Arrays, Run, alone, assert_same_steps, by_rows, on_rank, whole
from tests.core.thread_ranks import ThreadRanks, run_ranks

LAST = 16
SETTINGS = MFACSettings(
    final_sparsity=0.8, start_epoch=1.0, end_epoch=4.0, num_gradients={0.0: 4, 0.5: 6}, block_size=8, scope="global"
)

Stopped = tuple[list[dict[str, Any]], Arrays, list[Run]]


def stopped(size: int, shards: Shards | None, step: int, settings: MFACSettings = SETTINGS) -> Stopped:
    """Return the states of all ranks after a step, the weights then, and the runs."""
    runs = run_ranks(size, lambda ranks: on_rank(ranks, settings, shards).train(0, step))
    states = [copy.deepcopy(run.pruner.state_dict()) for run in runs]
    return states, whole([run.now for run in runs], shards), runs


def resumed(
    size: int, shards: Shards | None, step: int, given: list[Any], weights: Arrays, settings: MFACSettings = SETTINGS
) -> list[Run]:
    """Resume with a state, or several, on each rank."""

    def resume(ranks: ThreadRanks) -> Run:
        run = on_rank(ranks, settings, shards, weights=weights)
        run.pruner.check_state(given[ranks.rank])
        run.pruner.load_state_dict(given[ranks.rank])
        return run.train(step, LAST)

    return run_ranks(size, resume)


def steps_after(run: Run, step: int) -> Run:
    """Return the run without the pruning steps up to this one."""
    return Run(run.pruner, run.full, run.part, steps=[each for each in run.steps if each[0] > step])


layouts = st.sampled_from(["replicated", "sharded"])


def shards_of(layout: str, size: int) -> Shards | None:
    return None if layout == "replicated" else by_rows(size)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), layouts, st.integers(1, 4), layouts, st.integers(0, LAST - 1), st.integers(0, 5))
def test_a_run_goes_on_at_another_number_of_ranks_as_if_it_had_not_stopped(size, layout, size_now, now, step, seed):
    whole_run = alone(SETTINGS).train(0, LAST)
    states, weights, _ = stopped(size, shards_of(layout, size), step)
    # every rank gets at least one state, in any order, and all states are somewhere
    rng = np.random.default_rng(seed)
    order = rng.permutation(size)
    given = [[states[k] for k in order[rank::size_now]] or [states[0]] for rank in range(size_now)]
    runs = resumed(size_now, shards_of(now, size_now), step, given, weights)
    assert_same_steps(runs, steps_after(whole_run, step), shards_of(now, size_now))


@pytest.mark.parametrize("size_now", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_states_may_be_given_to_every_rank(size, size_now):
    whole_run = alone(SETTINGS).train(0, LAST)
    states, weights, _ = stopped(size, None, 6)
    runs = resumed(size_now, None, 6, [states if size > 1 else states[0]] * size_now, weights)
    assert_same_steps(runs, steps_after(whole_run, 6), None)


def test_states_may_overlap():
    whole_run = alone(SETTINGS).train(0, LAST)
    states, weights, _ = stopped(3, None, 6)
    everything = alone(SETTINGS).train(0, 6).pruner.state_dict()
    shares = [[states[1], everything], [states[2], states[1], states[2]]]
    for given_now in (shares, shares[::-1], [everything, [everything, states[1]]]):
        assert_same_steps(resumed(2, None, 6, given_now, weights), steps_after(whole_run, 6), None)


def test_the_state_of_one_process_is_as_before_and_says_nothing_of_columns():
    states, weights, runs = stopped(1, None, 6)
    without, with_one = alone(SETTINGS).train(0, 6).pruner.state_dict(), states[0]
    np.testing.assert_equal(with_one, without)
    assert sorted(with_one["window"]) == ["position", "rows"]


def test_each_rank_saves_its_own_columns_without_any_collective():
    def run(ranks: ThreadRanks) -> tuple[Any, int, Run]:
        run = on_rank(ranks, SETTINGS).train(0, 6)
        before = len(ranks.calls)
        return run.pruner.state_dict(), len(ranks.calls) - before, run

    found = run_ranks(3, run)
    assert [calls for _, calls, _ in found] == [0, 0, 0]
    windows = [state["window"] for state, *_ in found]
    assert [window["columns"] for window in windows] == [[0, 24], [24, 48], [48, 65]]
    assert {window["num_columns"] for window in windows} == {65}
    rows = np.concatenate([window["rows"] for window in windows], axis=1)
    np.testing.assert_array_equal(rows, alone(SETTINGS).train(0, 6).pruner.state_dict()["window"]["rows"])


@pytest.mark.parametrize("size_now", [1, 2, 3])
def test_with_the_state_of_rank_0_only_rows_are_collected_anew_and_this_is_said_once(size_now, caplog):
    caplog.set_level(logging.WARNING)
    states, weights, _ = stopped(2, None, 7)
    with_columns = [states[0]] * size_now
    caplog.clear()
    runs = resumed(size_now, None, 7, with_columns, weights)
    said = [record.getMessage() for record in caplog.records if "without" in record.getMessage()]
    assert len(said) == 1 and "without 25 of its 65 columns" in said[0] and "collected anew" in said[0]
    # the same as from a state without any rows
    caplog.clear()
    without = [{**states[0], "window": None}] * size_now
    expected = resumed(size_now, None, 7, without, weights)
    assert not any("without" in record.getMessage() for record in caplog.records)
    assert runs[0].pruner.is_finished and runs[0].steps[0][0] == 8
    assert_same_steps(runs, expected[0], None)


def test_a_state_that_is_saved_again_before_the_first_step_has_the_rows_that_were_loaded():
    states, weights, _ = stopped(3, None, 6)

    def reload(ranks: ThreadRanks) -> Any:
        pruner = on_rank(ranks, SETTINGS, weights=weights).pruner
        pruner.load_state_dict([states[0], states[2]] if ranks.rank == 0 else states[1])
        assert pruner.num_rows == states[0]["window"]["rows"].shape[0]
        with pytest.raises(RuntimeError, match=r"check_ranks\(step\) on all ranks"):
            pruner.observe(weights)
        saved = pruner.state_dict()
        pruner.check_ranks(6)
        return saved, pruner.state_dict()

    found = run_ranks(2, reload)
    again = [saved for saved, _ in found]
    assert [len(again[0]["window"]), sorted(again[1]["window"])] == [
        2,
        ["columns", "num_columns", "position", "rows"],
    ]
    whole_run = alone(SETTINGS).train(0, LAST)
    for of_now in (again, [dealt for _, dealt in found]):
        assert_same_steps(resumed(3, None, 6, [of_now] * 3, weights), steps_after(whole_run, 6), None)


def test_fewer_rows_than_were_saved_keep_the_most_recent():
    """With other steps per epoch, the window of the run that resumes may be smaller."""
    states, weights, _ = stopped(2, None, 7)
    fewer = MFACSettings(**{**SETTINGS.__dict__, "num_gradients": {0.0: 4, 0.9: 6}})
    rows = np.concatenate([state["window"]["rows"] for state in states], axis=1)

    def run(ranks: ThreadRanks) -> Any:
        pruner = on_rank(ranks, fewer, weights=weights).pruner
        assert isinstance(pruner, MFACPruner)
        collector = pruner._collector
        collector.load_window([state["window"] for state in states], 4)
        collector.num_gradients = 2
        collector.settle()
        return collector.window.to_rows()

    found = run_ranks(3, run)
    np.testing.assert_array_equal(np.concatenate(found, axis=1), rows[-2:])


def test_states_of_other_steps_are_refused_by_the_rank_that_loads_both():
    early, late = stopped(2, None, 6)[0], stopped(2, None, 9)[0]
    pruner = alone(SETTINGS).pruner
    before = copy.deepcopy(pruner.state_dict())
    with pytest.raises(ValueError, match="not from the same step"):
        pruner.load_state_dict([early[0], late[1]])
    # the same masks, but one more row
    later = stopped(2, None, 7)[0]
    with pytest.raises(ValueError, match="hold 2 and 3 gradient samples"):
        pruner.load_state_dict([early[0], later[1]])
    np.testing.assert_equal(pruner.state_dict(), before)


def test_ranks_that_load_rows_of_other_steps_are_named():
    early, later = stopped(2, None, 6)[0], stopped(2, None, 7)[0]
    weights = alone(SETTINGS).full
    with pytest.raises(RankError, match="gradient windows with 2 and 3 rows; resume all ranks"):
        resumed(2, None, 6, [early[0], later[1]], weights)


def test_a_rank_that_has_loaded_nothing_is_named():
    states, weights, _ = stopped(2, None, 3)

    def resume(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, SETTINGS, weights=weights)
        if ranks.rank:
            run.pruner.load_state_dict(states)
        run.pruner.check_ranks(3)

    with pytest.raises(RankError, match=r"whether a state is loaded: .*; resume all ranks from the same checkpoint"):
        run_ranks(2, resume)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"num_columns": 64}, "one of 64 weights, this one is of 65"),
        ({"columns": [0, 66]}, "last column"),
        ({"columns": [3, 1]}, "last column"),
        ({"columns": "0:5"}, "columns of the gradient window"),
        ({"columns": [0, 20]}, r"shape \(2, 40\), this one holds 4 gradient samples of 20"),
        ({"num_columns": None}, "num_columns"),
    ],
)
def test_a_broken_share_is_refused_and_changes_nothing(changed, match):
    states, _, _ = stopped(2, None, 6)
    broken = {**states[0], "window": {**states[0]["window"], **changed}}
    pruner = alone(SETTINGS).pruner
    before = copy.deepcopy(pruner.state_dict())
    with pytest.raises(ValueError, match=match):
        pruner.load_state_dict([broken, states[1]])
    np.testing.assert_equal(pruner.state_dict(), before)


@pytest.mark.parametrize("size", [2, 3])
def test_an_initial_sparsity_of_shards_is_measured_by_all_ranks_before_it_can_be_saved(size):
    settings = MFACSettings(**{**SETTINGS.__dict__, "initial_sparsity": FROM_PARAM, "scope": "layer"})
    weights = alone(settings).full
    for array in weights.values():
        array[:2] = 0
    expected = alone(settings, weights=weights).pruner

    def run(ranks: ThreadRanks) -> Any:
        pruner = on_rank(ranks, settings, by_rows(size), weights=weights).pruner
        with pytest.raises(RuntimeError, match=r"call check_ranks\(step\) on all ranks"):
            pruner.state_dict()
        pruner.check_ranks(0)
        assert pruner.schedule == expected.schedule
        return pruner.state_dict()

    for state in run_ranks(size, run):
        np.testing.assert_equal(state["initial_sparsities"], expected.state_dict()["initial_sparsities"])
        np.testing.assert_equal(state["schedule"], expected.state_dict()["schedule"])
    # what is loaded is not measured again
    zeros = {name: np.zeros_like(array) for name, array in weights.items()}
    states, _, _ = stopped(2, None, 2, settings)

    def load(ranks: ThreadRanks) -> Any:
        pruner = on_rank(ranks, settings, by_rows(size), weights=zeros).pruner
        pruner.load_state_dict(states)
        pruner.check_ranks(2)
        return pruner.schedule

    assert run_ranks(size, load) == [alone(settings).pruner.schedule] * size
