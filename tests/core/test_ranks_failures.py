"""What fails on one rank fails on all, and changes nothing; ranks that differ are named."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mfac_core import IllConditionedError, MemoryBudgetError, RankError
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.pruners import step as pruning_step
from mfac_core.ranks import Shards
from mfac_core.settings.pruning import FROM_PARAM, ConstantSettings, MagnitudeSettings, MFACSettings
from tests.core.rank_runs import SHAPES, Run, alone, assert_same_steps, by_rows, gradient_at, on_rank, weights_at_start
from tests.core.thread_ranks import ThreadRanks, outcomes, run_ranks

SETTINGS = MFACSettings(final_sparsity=0.8, start_epoch=1.0, end_epoch=3.0, num_gradients=3, block_size=8, damping=1e-2)
MAGNITUDE = MagnitudeSettings(final_sparsity=0.8, start_epoch=0.0, end_epoch=3.0)
LAYOUTS = {"replicated": None, "sharded": by_rows(3)}

every_layout = pytest.mark.parametrize("shards", LAYOUTS.values(), ids=LAYOUTS)


def states_of(run: Run) -> Any:
    return copy.deepcopy(run.pruner.state_dict())


# one rank cannot go on


def failing(monkeypatch: pytest.MonkeyPatch, name: str, rank: int, error: Exception) -> dict[str, bool]:
    """Let a function of the pruning step fail on one rank, for as long as the returned flag is true."""
    flag = {"on": True}
    original = getattr(pruning_step, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        if flag["on"] and current.get("rank") is not None and current["rank"]() == rank:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(pruning_step, name, wrapped)
    return flag


current: dict[str, Any] = {}


@pytest.fixture
def rank_of_thread(monkeypatch):
    """Let :func:`failing` know which rank calls."""
    import threading

    local = threading.local()
    current["rank"] = lambda: getattr(local, "rank", None)
    yield lambda ranks: setattr(local, "rank", ranks.rank)
    current.clear()


STAGES = {
    "BlockwiseFisher": ("measuring the gradients", IllConditionedError("overflow")),
    "checked_saliency": ("computing the inverse diagonal", IllConditionedError("too little damping")),
    "independent_update": ("computing the update", MemoryBudgetError("no memory")),
}


@every_layout
@pytest.mark.parametrize(("stage", "expected"), STAGES.items(), ids=STAGES)
def test_an_error_on_one_rank_fails_on_all_changes_nothing_and_the_retry_works(
    stage, expected, shards, rank_of_thread, monkeypatch
):
    doing, error = expected
    flag = failing(monkeypatch, stage, 1, error)
    due = 4 + 4  # the second pruning step, the first that needs a Fisher

    def train(ranks: ThreadRanks) -> Any:
        rank_of_thread(ranks)
        run = on_rank(ranks, SETTINGS, shards).train(0, due - 1)
        run.pruner.observe(run.part(gradient_at(due - 1)))
        weights, before = run.now, states_of(run)
        kept = copy.deepcopy(weights)
        try:
            run.pruner.prune(weights, due)
        except Exception as raised:
            failed = raised
        np.testing.assert_equal(run.pruner.state_dict(), before)
        np.testing.assert_equal(weights, kept)
        assert run.pruner.is_due(due)
        ranks.sum(np.zeros(1))  # all have failed
        flag["on"] = False
        ranks.sum(np.zeros(1))
        result = run.pruner.prune(weights, due)
        run.steps.append((due, result.masks, dict(result.weights)))
        return failed, run

    found = run_ranks(3, train)
    assert found[1][0] is error
    for rank in (0, 2):
        assert isinstance(found[rank][0], RankError)
        assert str(found[rank][0]) == (
            f"rank 1 failed in {doing}: {type(error).__name__}: {error}; nothing has changed"
        )
    flag["on"] = False
    expected_run = alone(SETTINGS).train(0, due - 1)
    expected_run.pruner.observe(gradient_at(due - 1))
    result = expected_run.pruner.prune(expected_run.now, due)
    expected_run.steps.append((due, result.masks, dict(result.weights)))
    assert_same_steps([run for _, run in found], expected_run, shards)


def test_an_ill_conditioned_block_is_refused_by_all_ranks_and_the_one_that_owns_it_says_why():
    settings = replace(SETTINGS, damping=1e-39, block_size=1)

    def train(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, settings)
        for step in range(2):
            gradients = gradient_at(step)
            gradients["c"] *= 0  # all its columns are those of the last rank, and 1e39 leaves the range of float32
            run.pruner.observe(gradients)
        run.pruner.prune(run.full, 12)

    found = outcomes(2, train)
    assert [type(each) for each in found] == [RankError, IllConditionedError]
    assert "rank 1 failed in" in str(found[0]) and "IllConditionedError" in str(found[0])


@every_layout
def test_a_write_that_fails_on_one_rank_is_undone_on_all(shards):
    def train(ranks: ThreadRanks) -> Any:
        run = on_rank(ranks, MAGNITUDE, shards)
        before = states_of(run)
        written = False
        try:
            with run.pruner.pruning(run.part(run.full), 12):
                written = True
                if ranks.rank == 2:
                    raise OSError("the disk is full")
        except (OSError, RankError) as raised:
            error = raised
        assert written
        np.testing.assert_equal(run.pruner.state_dict(), before)
        return error, run.pruner.prune(run.part(run.full), 12).masks

    found = run_ranks(3, train)
    assert str(found[2][0]) == "the disk is full"
    assert "rank 2 failed in writing the pruned weights: OSError: the disk is full" in str(found[0][0])
    expected = alone(MAGNITUDE)
    masks = expected.pruner.prune(expected.full, 12).masks
    for _, of_rank in found:
        np.testing.assert_equal(of_rank, masks)


@every_layout
def test_weights_that_are_not_finite_on_one_rank_are_refused_by_all(shards):
    def train(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, MAGNITUDE, shards)
        weights = copy.deepcopy(run.part(run.full))
        if ranks.rank == 1:
            weights["b"][-1] = np.nan
        run.pruner.prune(weights, 12)

    found = outcomes(3, train)
    assert [type(each) for each in found] == [RankError, ValueError, RankError]
    assert "ValueError: weights contain NaN or Inf in b" in str(found[0])


# NaN in a gradient


@pytest.mark.parametrize("live", [True, False])
@every_layout
def test_a_row_with_nan_on_one_rank_is_refused_by_all(shards, live):
    """The shard of one rank, or the sample of one rank."""

    def train(ranks: ThreadRanks) -> Any:
        run = on_rank(ranks, SETTINGS, shards, live=live)
        for step in range(2):
            gradients = copy.deepcopy(run.part(gradient_at(step)))
            is_bad = step == 0 and ranks.rank == 2
            if is_bad and shards is not None:
                assert gradients["c"].size == 0 and gradients["b"].size
            if (is_bad and (shards is not None or not live)) or (step == 0 and live and shards is None):
                gradients["b"][-1] = np.inf
            if live:
                run.pruner.observe(gradients)
            else:
                run.pruner.observe_samples(gradients)
        return run.pruner

    pruners = run_ranks(3, train)
    assert {pruner.refused_rows for pruner in pruners} == {1}
    each = 1 if live or shards is not None else 3
    assert {pruner.num_rows for pruner in pruners} == {min(2 * each - 1, 3)}


def test_a_rank_without_columns_still_learns_that_a_row_is_refused():
    settings = replace(SETTINGS, block_size=None)

    def train(ranks: ThreadRanks) -> Any:
        run = on_rank(ranks, settings, by_rows(3))
        gradients = copy.deepcopy(run.part(gradient_at(0)))
        if ranks.rank == 1:
            gradients["a"][0] = np.nan
        run.pruner.observe(gradients)
        return run.pruner.num_rows, run.pruner.refused_rows, run.pruner.state_dict()["window"]

    assert run_ranks(3, train) == [(0, 1, None)] * 3


def test_samples_of_some_ranks_are_each_stored_once_in_the_order_of_ranks():
    settings = replace(SETTINGS, num_gradients=8)

    def train(ranks: ThreadRanks) -> Any:
        run = on_rank(ranks, settings, live=False)
        given = [run.pruner.observe_samples(gradient_at(ranks.rank))]
        given += [run.pruner.observe_samples(gradient_at(10) if ranks.rank == 1 else None)]
        given += [run.pruner.observe_samples(None)]
        return given, run.pruner.state_dict()["window"]["rows"], run.pruner.num_samples_here

    found = run_ranks(3, train)
    assert [given for given, *_ in found] == [[3, 1, 0]] * 3
    assert [number for *_, number in found] == [3, 3, 2]
    rows = np.concatenate([rows for _, rows, _ in found], axis=1)
    expected = [np.concatenate([gradient_at(k)[name].ravel() for name in SHAPES]) for k in (0, 1, 2, 10)]
    np.testing.assert_array_equal(rows, expected)


# ranks that differ


def differing(changed: Any, *, size: int = 3, rank: int = 1, settings: Any = SETTINGS, step: int = 5) -> str:
    """Return what all ranks say, when ``changed(run)`` is called on one of them before the fence."""

    def train(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, settings).train(0, 3)
        at = changed(run) if ranks.rank == rank else None
        run.pruner.check_ranks(step if at is None else at)

    messages = {str(each) for each in outcomes(size, train) if isinstance(each, RankError)}
    assert len(messages) == 1
    return messages.pop()


def test_a_rank_one_step_behind_is_named():
    assert differing(lambda run: 4) == (
        "ranks differ in step: 4 on rank 1, 5 on the others; pass the same steps_per_epoch on all ranks, and resume "
        "them from the same checkpoint"
    )


def test_another_schedule_is_named():
    def later(run: Run) -> None:
        run.pruner._progress = replace(run.pruner._progress, schedule=run.pruner.schedule[:-1])

    assert "rank 1 from the others; use the same recipe on all ranks" in differing(later)


@pytest.mark.parametrize(
    "changes", [{"gradients_dtype": "bfloat16"}, {"block_size": 3}, {"damping": 0.5}, {"scope": "global"}], ids=str
)
def test_other_settings_are_named(changes):
    made = [SETTINGS, replace(SETTINGS, **changes), SETTINGS]

    def train(ranks: ThreadRanks) -> None:
        on_rank(ranks, made[ranks.rank]).pruner.check_ranks(0)

    for each in outcomes(3, train):
        assert str(each) == "ranks differ in the settings: rank 1 from the others; use the same recipe on all ranks"


def test_shards_that_are_cut_elsewhere_are_named():
    def train(ranks: ThreadRanks) -> None:
        ranges = [(0, 15), (15, 30)] if ranks.rank == 0 else [(0, 18), (18, 30)]
        shards = Shards({"w": (5, 6)}, {"w": ranges})
        weights = {"w": np.ones((5, 6), np.float32)}
        on_rank(ranks, SETTINGS, shards, weights=weights).pruner.check_ranks(0)

    for each in outcomes(2, train):
        assert str(each) == (
            "ranks differ in which weights each of them has; build the same model on all ranks, and shard it alike"
        )


def test_each_rank_may_have_devices_and_a_sampler_of_its_own():
    def train(ranks: ThreadRanks) -> None:
        device = ("cpu", "auto")[ranks.rank]
        made = replace(SETTINGS, devices=(device,), gradients_device=device, sampler_options={"seed": ranks.rank})
        on_rank(ranks, made).pruner.check_ranks(0)

    run_ranks(2, train)


def test_other_masks_are_named():
    def pruned(run: Run) -> None:
        mask = run.pruner._mask.copy()
        mask[3] = False
        run.pruner._progress = replace(run.pruner._progress, mask=mask)

    message = differing(pruned, settings=MAGNITUDE)
    assert "ranks differ in the masks: rank 1 from the others; resume all ranks from the same checkpoint" in message


def test_another_number_of_rows_is_named():
    assert "ranks differ in gradient samples: 1 on rank 1, 0 on the others" in differing(
        lambda run: run.pruner.observe(gradient_at(2)) and None
    )


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_other_batches_are_named_with_the_cause(size):
    def train(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, SETTINGS)
        run.pruner.observe(gradient_at(ranks.rank))
        run.pruner.check_ranks(3)

    found = outcomes(size, train)
    others = "rank 1" if size == 2 else "ranks 1 and 2"
    for each in found:
        assert isinstance(each, RankError)
        assert str(each).startswith(
            f"gradients differ between ranks ({others} from rank 0): wrap the model in DistributedDataParallel"
        )


def test_gradients_that_differ_by_rounding_are_alike():
    def train(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, SETTINGS)
        rounding = np.float32(1 + 1e-6 * ranks.rank)
        run.pruner.observe({name: each * rounding for name, each in gradient_at(0).items()})
        run.pruner.check_ranks(3)

    run_ranks(3, train)


def test_weights_of_another_model_are_named_before_they_are_mixed():
    def train(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, MAGNITUDE)
        weights = {name: each * (1 + ranks.rank) for name, each in run.full.items()}
        run.pruner.prune(weights, 12)

    for each in outcomes(2, train):
        assert "weights differ between ranks (rank 1 from rank 0): wrap the model" in str(each)


@pytest.mark.parametrize("settings", [MAGNITUDE, SETTINGS], ids=["magnitude", "mfac"])
def test_a_pruning_step_without_a_fence_before_it_has_one_of_its_own(settings):
    def train(ranks: ThreadRanks) -> None:
        run = on_rank(ranks, settings).train(0, 3)
        run.pruner.prune(run.now, 4 + 4 * ranks.rank)

    for each in outcomes(2, train):
        assert "ranks differ in step: 4 on rank 0, 8 on rank 1" in str(each)


# what shards allow


@pytest.mark.parametrize("mask_type", ["channel", "block4", (2, 2)])
def test_a_group_that_is_on_several_ranks_is_refused_by_name(mask_type):
    settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0, mask_type=mask_type)
    shapes = {"whole": (4, 8), "cut": (6, 4)}
    shards = Shards(shapes, {"whole": [(0, 32), (32, 32)], "cut": [(0, 10), (10, 24)]})

    def make(ranks: ThreadRanks) -> None:
        on_rank(ranks, settings, shards, weights=weights_at_start(shapes))

    with pytest.raises(NotImplementedError, match=r"groups weights of cut that are on different ranks") as error:
        run_ranks(2, make)
    assert "whole" not in str(error.value)


@pytest.mark.parametrize("mask_type", ["filter", "block4", "2:4", (2, -1)])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_patterns_on_ranks_equal_those_of_one_process(mask_type, scope, layout):
    shapes = {"a": (8, 8), "b": (6, 4), "c": (4, 12)}
    rows = {"a": [(0, 32), (32, 64), (64, 64)], "b": [(0, 8), (8, 16), (16, 24)], "c": [(0, 0), (0, 24), (24, 48)]}
    shards = None if layout == "replicated" else Shards(shapes, rows)
    for settings in (
        replace(SETTINGS, mask_type=mask_type, scope=scope, final_sparsity=0.5),
        replace(MAGNITUDE, mask_type=mask_type, scope=scope, final_sparsity=0.5, initial_sparsity=FROM_PARAM),
    ):
        weights = weights_at_start(shapes, zeros=0.1)
        expected = alone(settings, weights=weights).train(0, 13)
        runs = run_ranks(3, lambda ranks: on_rank(ranks, settings, shards, weights=weights).train(0, 13))  # noqa: B023
        assert_same_steps(runs, expected, shards)


def test_shards_must_be_those_of_the_weights():
    def make(ranks: ThreadRanks) -> None:
        shards = by_rows(2)
        weights = {name: shards.local(name, each, ranks.rank) for name, each in weights_at_start().items()}
        on_rank(ranks, MAGNITUDE, None).pruner.check_ranks(0)
        weights["a"] = weights["a"][:1]
        from mfac_core.pruners import make_pruner

        make_pruner(MAGNITUDE, weights, steps_per_epoch=4, ranks=ranks, shards=shards)

    with pytest.raises(ValueError, match=r"weights\['a'\] has shape \(1, 6\), expected \(3, 6\)"):
        run_ranks(2, make)


# memory


def test_a_rank_counts_its_share_of_the_window_only(monkeypatch):
    def needed(ranks: ThreadRanks) -> tuple[int, int]:
        pruner = on_rank(ranks, SETTINGS).pruner
        return pruner.window_bytes, pruner.needed_bytes

    of_one = alone(SETTINGS).pruner
    assert of_one.window_bytes == 3 * 65 * 4
    shares = run_ranks(3, needed)
    assert [window for window, _ in shares] == [3 * 24 * 4, 3 * 24 * 4, 3 * 17 * 4]
    assert all(total < of_one.needed_bytes for _, total in shares)
    # what is too much for one process is enough for each of three
    monkeypatch.setattr(NumpyBackend, "free_bytes", lambda *_: of_one.needed_bytes - 1)
    with pytest.raises(MemoryBudgetError):
        alone(SETTINGS)
    run_ranks(3, needed)


def test_one_block_is_kept_by_the_first_rank_alone():
    def needed(ranks: ThreadRanks) -> int:
        return on_rank(ranks, replace(SETTINGS, block_size=None)).pruner.window_bytes

    assert run_ranks(3, needed) == [3 * 65 * 4, 0, 0]


# what is logged


def test_warnings_are_logged_by_the_first_rank_only(caplog):
    settings = replace(SETTINGS, num_gradients=30, start_epoch=0.0)
    expected = alone(settings).train(0, 13)
    alone_said = [record.getMessage() for record in caplog.records]
    assert len(alone_said) == 1 and expected.steps
    caplog.clear()
    run_ranks(3, lambda ranks: on_rank(ranks, settings).train(0, 13))
    assert [record.getMessage() for record in caplog.records] == alone_said


def test_rows_that_have_moved_to_another_rank_are_not_fresh(caplog):
    settings = replace(SETTINGS, num_recomputations=3, num_gradients=4, update_frequency=0.5)
    alone(settings).train(0, 13)
    alone_said = [record.getMessage() for record in caplog.records]
    assert any("have arrived since the previous sub-step" in each for each in alone_said)
    caplog.clear()
    run_ranks(3, lambda ranks: on_rank(ranks, settings).train(0, 13))
    assert [record.getMessage() for record in caplog.records] == alone_said


@pytest.mark.parametrize("kind", ["equal", "zero", "one column block is zero", "distinct together"])
def test_uninformative_samples_are_judged_by_the_columns_of_all_ranks(kind, caplog):
    def gradients(step: int) -> Any:
        if kind == "distinct together":  # no rank alone has three rows that differ
            made, other = gradient_at((0, 0, 1)[step]), gradient_at((0, 1, 1)[step])
            made["a"].reshape(-1)[24:] = other["a"].reshape(-1)[24:]
            return {**other, "a": made["a"]}
        made = gradient_at(0 if kind == "equal" else step)
        if kind != "equal":
            made["a"] *= 0
            made["b"] *= 0
        if kind == "zero":
            made["c"] *= 0
        return made

    def fill(run: Run) -> None:
        for step in range(3):
            run.pruner.observe(gradients(step))
        run.pruner.prune(run.full, 12)

    fill(alone(SETTINGS))
    alone_said = [record.getMessage() for record in caplog.records]
    assert any("gradient samples" in each for each in alone_said) == (kind in ("equal", "zero"))
    caplog.clear()
    run_ranks(4, lambda ranks: fill(on_rank(ranks, SETTINGS)))
    assert [record.getMessage() for record in caplog.records] == alone_said


def test_a_constant_mask_of_shards_is_that_of_one_process():
    weights = weights_at_start(zeros=0.3)
    weights["b"][:] = 0  # initialized to zero, and not held
    expected = alone(ConstantSettings(), weights=weights)
    result = expected.pruner.prune(weights, 0)
    shards = by_rows(3)

    def prune(ranks: ThreadRanks) -> Any:
        run = on_rank(ranks, ConstantSettings(), shards, weights=weights)
        found = run.pruner.prune(run.part(weights), 0)
        assert run.pruner.schedule == expected.pruner.schedule
        return found.masks

    for masks in run_ranks(3, prune):
        np.testing.assert_equal(masks, result.masks)
