"""The session on several ranks, shown with the framework of NumPy arrays: replicas, or rows of each array."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from mfac_core import RankError, load_recipe
from mfac_core.ranks import Shards
from mfac_core.ranks.distribution import deal
from mfac_core.schedules.one_shot import one_shot_in_order
from mfac_core.session.log_lines import shares_line
from mfac_core.session.one_shot import prune_in_one_shot
from mfac_core.session.plan_log import log_plan
from mfac_core.session.session import Session, attached
from mfac_core.settings.pruning import MFACSettings
from mfac_core.settings.training import SetLearningRate
from tests.core.numpy_framework import (
    EPOCHS,
    LOGGER,
    SHAPES,
    STEPS_PER_EPOCH,
    ArrayPruning,
    Model,
    batch,
    session_of,
    train,
)
from tests.core.rank_runs import by_rows
from tests.core.thread_ranks import ThreadRanks, outcomes, run_ranks

LAST = EPOCHS * STEPS_PER_EPOCH

MFAC = "{{params: [{params}], final_sparsity: {final}, start_epoch: {start}, end_epoch: 3, num_grads: {rows}, \
fisher_block_size: 7}}"
TWO = f"""modifiers:
  - !MFACPruningModifier {MFAC.format(params="body, head", final=0.6, start=1, rows=4)}
  - !MagnitudePruningModifier {{params: [body], final_sparsity: 0.7, start_epoch: 2, end_epoch: 3}}
"""
ONE = f"modifiers:\n  - !MFACPruningModifier {MFAC.format(params='body, head', final=0.8, start=1, rows=5)}\n"
SAMPLED = ONE.replace("num_grads: 5", "num_grads: 4, num_recomputations: 2")
ACDC = "modifiers:\n  - !ACDCPruningModifier {params: [body], compression_sparsity: 0.5, end_epoch: 4}"
CONSTANT = "modifiers:\n  - !ConstantPruningModifier {params: [body, head], start_epoch: 0}"

LAYOUTS = ["replicated", "sharded"]


class Gathered:
    """Makes the weights of a sharded model whole again, from the rows of all ranks."""

    def __init__(self, ranks: ThreadRanks, model: Model, shards: Shards | None) -> None:
        self.ranks, self.model, self.shards = ranks, model, shards

    def __call__(self) -> None:
        if self.shards is None:
            return
        for name, full in self.model.weights.items():
            own = self.shards.local(name, full, self.ranks.rank).reshape(-1)
            found = self.ranks.exchange([own] * self.ranks.size)
            for rank, part in enumerate(found):
                start, stop = self.shards.of_rank(rank)[name]
                full.reshape(-1)[start:stop] = part


def shards_of(layout: str, size: int) -> Shards | None:
    return None if layout == "replicated" else by_rows(size, SHAPES)


def on_ranks(size: int, layout: str, recipe: str, *, last: int = LAST, **options: Any) -> list[tuple[Session, Model]]:
    shards = shards_of(layout, size)

    def run(ranks: ThreadRanks) -> tuple[Session, Model]:
        model = Model()
        session = session_of(recipe, model, ranks=ranks, shards=shards, **options)
        train(session, model, last, Gathered(ranks, model, shards))
        return session, model

    return run_ranks(size, run)


def alone(recipe: str, *, last: int = LAST, **options: Any) -> tuple[Session, Model]:
    model = Model()
    session = session_of(recipe, model, **options)
    train(session, model, last)
    return session, model


def assert_same(found: list[tuple[Session, Model]], expected: tuple[Session, Model]) -> None:
    for session, model in found:
        for pruning, other in zip(session.prunings, expected[0].prunings, strict=True):
            np.testing.assert_equal(pruning.masks, other.masks)
            assert pruning.sparsity == pytest.approx(other.sparsity, abs=0)
        assert session.zeros() == expected[0].zeros()
        for name, array in model.weights.items():
            np.testing.assert_allclose(array, expected[1].weights[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("recipe", "sampled"),
    [(TWO, False), (ONE, False), (SAMPLED, True), (ACDC, False), (CONSTANT, False)],
    ids=["two", "live", "sampled", "acdc", "constant"],
)
def test_training_on_ranks_equals_training_alone(recipe, sampled, size, layout):
    assert_same(on_ranks(size, layout, recipe, sampled=sampled), alone(recipe, sampled=sampled))


def test_only_the_first_rank_logs_and_what_one_process_logs(caplog):
    caplog.set_level(logging.INFO)
    session, _ = alone(SAMPLED, sampled=True)
    log_plan(LOGGER, session.prunings, [], STEPS_PER_EPOCH, sampled=True)
    session.warn_of_unfinished("training ended")

    def lines() -> list[str]:
        # the seconds differ
        return [record.getMessage().partition(" s (")[0][:-6] for record in caplog.records]

    expected = lines()
    assert sum("measured loss change" in each for each in expected) == 2
    caplog.clear()
    found = on_ranks(2, "replicated", SAMPLED, sampled=True)
    for session, _ in found:
        log_plan(LOGGER, session.prunings, [], STEPS_PER_EPOCH, sampled=True)
        session.warn_of_unfinished("training ended")
    shares = "2 ranks: each keeps 1/2 of the gradient window (448 bytes) and computes 1/2 of the blocks"
    assert [record.getMessage() for record in caplog.records].count(shares) == 1
    said = [each for each in lines() if not shares.startswith(each)]
    assert len(said) == len(expected)
    for one, other in zip(said, expected, strict=True):
        assert one.partition("memory")[0].partition("bytes")[0][:40] == other[:40] or one == other


@pytest.mark.parametrize("block_size", [None, 1, 7, 24, 25, 33, 34, 50, 99, 100, 1000])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_line_about_shares_says_who_has_none(block_size, size):
    settings = MFACSettings(final_sparsity=0.5, end_epoch=1, block_size=block_size)
    line = shares_line(size, settings, 100, 2**20)
    with_blocks = sum(start < stop for start, stop in deal(100, block_size, size))
    assert ("each keeps" in line) == (with_blocks == size)
    if 1 < with_blocks < size:
        assert f"the first {with_blocks} keep and compute one block" in line
    if with_blocks < size:
        assert ("the first keeps the gradient window (1 MiB) and computes its only block" in line) == (with_blocks == 1)
        cure = int(line.partition("fisher_block_size: ")[2].split()[0])
        assert all(start < stop for start, stop in deal(100, cure, size))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_the_mean_over_the_batches_of_all_ranks(layout, caplog):
    caplog.set_level(logging.INFO)
    alone(SAMPLED, sampled=True)
    expected = [each for each in caplog.messages if "measured loss change" in each]
    caplog.clear()
    on_ranks(3, layout, SAMPLED, sampled=True)
    found = [each for each in caplog.messages if "measured loss change" in each]
    part = "measured loss change"
    changes = [each.partition(part)[2].split()[0] for each in expected]
    assert changes and [each.partition(part)[2].split()[0] for each in found] == changes
    batches = "3 held-out batches" if layout == "sharded" else "1 held-out batch"
    assert all(batches.replace("held-out ", "") in each for each in found)


# the fence


def test_a_fence_is_a_small_sum_at_the_steps_at_which_it_matters():
    def run(ranks: ThreadRanks) -> list[int]:
        model, fenced = Model(), []
        session = session_of(ONE, model, ranks=ranks)
        (pruning,) = session.prunings
        check = pruning.check_ranks

        def counted(step: int) -> None:
            before = len(ranks.calls)
            check(step)
            calls = ranks.calls[before:]
            assert {what for what, _ in calls} == {"sum"} and sum(sent for _, sent in calls) < 500
            fenced.append(step)

        pruning.check_ranks = counted  # type: ignore[method-assign]
        train(session, model, LAST)
        return fenced

    # the first step; the first row of each window (of five rows); each pruning step
    found = run_ranks(2, run)
    assert found[0] == found[1]
    assert sorted(set(found[0])) == [0, 6, 8, 12, 14, 18]  # the pruning step at 6, of sparsity 0, needs no rows


def test_before_the_first_window_ranks_send_nothing_in_a_training_step():
    def run(ranks: ThreadRanks) -> list[int]:
        model, calls = Model(), []
        session = session_of(ONE, model, ranks=ranks)
        session.prune_if_due()
        for _ in range(5):
            before = len(ranks.calls)
            session.step += 1
            session.prune_if_due()
            session.fence()
            calls.append(len(ranks.calls) - before)
        return calls

    assert run_ranks(2, run)[0] == [0] * 5


def test_a_rank_that_is_a_step_behind_is_named_at_its_first_step():
    def run(ranks: ThreadRanks) -> None:
        model = Model()
        session = session_of(ONE, model, ranks=ranks)
        session.step = 119 if ranks.rank == 2 else 120
        session.prune_if_due()

    for each in outcomes(3, run):
        assert isinstance(each, RankError)
        assert "119 on rank 2, 120 on the others; pass the same steps_per_epoch" in str(each)


def test_ranks_with_other_modifiers_are_named():
    def run(ranks: ThreadRanks) -> None:
        session_of(ACDC if ranks.rank == 1 else ONE, Model(), ranks=ranks).prune_if_due()

    for each in outcomes(3, run):
        assert "ranks differ in the modifiers, or the weights that they prune: rank 1 from the others; use" in str(each)


def test_ranks_with_other_learning_rates_are_named():
    class Rates:
        def __init__(self, rate):
            self.settings = [SetLearningRate(learning_rate=rate)]

    def run(ranks: ThreadRanks) -> None:
        prunings = session_of(ONE, Model(), ranks=ranks).prunings
        changes = Rates(0.1 if ranks.rank == 1 else 0.2)
        per_epoch = prunings[0].steps_per_epoch
        Session(prunings, changes, steps_per_epoch=per_epoch, logger=logging.getLogger("mfac_core")).prune_if_due()

    for each in outcomes(3, run):
        assert str(each) == (
            "ranks differ in the modifiers that do not prune: rank 1 from the others; use the same recipe on all ranks"
        )


def test_gradients_that_differ_are_named_when_the_first_row_has_come():
    def run(ranks: ThreadRanks) -> int:
        model = Model()
        model.weights["body"][...] += ranks.rank  # each rank trains a model of its own
        session = session_of(ONE.replace("start_epoch", "init_sparsity: 0.2, start_epoch"), model, ranks=ranks)
        try:
            train(session, model, LAST)
        except RankError as error:
            assert "gradients differ between ranks (rank 1 from rank 0): wrap the model" in str(error)
        return session.step

    assert run_ranks(2, run) == [2, 2]


# failures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_write_that_fails_on_one_rank_leaves_all_models_as_they_were_and_the_retry_works(layout):
    size, due = 3, 12
    shards = shards_of(layout, size)

    def run(ranks: ThreadRanks) -> tuple[Any, Session, Model]:
        model = Model()
        session = session_of(ONE, model, ranks=ranks, shards=shards)
        gather = Gathered(ranks, model, shards)
        train(session, model, due - 1, gather)
        (pruning,) = session.prunings
        write, error = pruning.write, None

        def failing(weights: Any) -> None:
            write({name: array * 0 for name, array in weights.items()})  # half done
            if ranks.rank == 1:
                raise OSError("the disk is full")

        pruning.write = failing  # type: ignore[method-assign]
        try:
            train(session, model, due, gather)
        except (OSError, RankError) as raised:
            error = raised
        pruning.write = write  # type: ignore[method-assign]
        stepped = Model()
        expected = session_of(ONE, stepped)
        train(expected, stepped, due - 1)
        stepped.step(stepped.gradients(batch(due - 1)))
        for name, array in pruning.part(stepped.weights).items():
            np.testing.assert_array_equal(pruning.weights()[name], array)
        assert pruning.sparsity == 0 and session.is_due()
        session.prune_if_due()
        gather()
        train(session, model, LAST, gather)
        return error, session, model

    found = run_ranks(size, run)
    assert isinstance(found[1][0], OSError)
    for rank in (0, 2):
        assert "rank 1 failed in writing the pruned weights: OSError: the disk is full" in str(found[rank][0])
    assert_same([(session, model) for _, session, model in found], alone(ONE))


def test_a_sample_that_cannot_be_drawn_on_one_rank_fails_on_all_before_anything_changes():
    def run(ranks: ThreadRanks) -> None:
        model = Model()
        session = session_of(SAMPLED.replace("start_epoch: 1", "start_epoch: 0"), model, ranks=ranks, sampled=True)
        (pruning,) = session.prunings

        def broken(pruner: Any, held_out: Any) -> Any:
            yield from ()
            raise ValueError("no batch")

        if ranks.rank == 1:
            pruning.gradient_samples = broken  # type: ignore[method-assign]
        try:
            train(session, model, 12)
        finally:
            assert session.step == 6
            assert pruning.sparsity == 0

    found = outcomes(2, run)
    assert str(found[1]) == "no batch"
    assert "rank 1 failed in drawing gradient samples: ValueError: no batch" in str(found[0])


def test_a_write_that_fails_is_known_to_all_ranks_before_they_measure_the_loss():
    recipe = SAMPLED.replace("start_epoch: 1", "start_epoch: 0").replace(", num_recomputations: 2", "")

    def run(ranks: ThreadRanks) -> str:
        session = session_of(recipe, Model(), ranks=ranks, sampled=True)
        (pruning,) = session.prunings

        def failing(weights: Any) -> None:
            raise OSError("the disk is full")

        session.step = 6
        if ranks.rank == 1:
            pruning.write = failing  # type: ignore[method-assign]
        with pytest.raises((OSError, RankError)) as error:
            session.prune_if_due()
        assert ranks.sum(np.ones(3)).tolist() == [3.0] * 3  # all are at the same point
        return str(error.value)

    failed = "rank 1 failed in writing the pruned weights: OSError: the disk is full; nothing has changed"
    assert run_ranks(3, run) == [failed, "the disk is full", failed]


# one shot


class NoStatistics:
    layers: dict[str, Any] = {}

    def recalibrate(self, *_: Any) -> int:
        if self.fails:
            raise OSError("no batch")
        return 0

    fails = False


def one_shot(recipe: str, model: Model, *, fails: bool = False, **options: Any) -> Session:
    modifiers = load_recipe(recipe).pruning
    groups = one_shot_in_order(modifiers)
    prunings = attached(
        [each for _, each in groups], lambda each, name: ArrayPruning(each, model, name=name, sampled=True, **options)
    )
    session = Session(prunings, steps_per_epoch=STEPS_PER_EPOCH, logger=LOGGER)
    statistics = NoStatistics()
    statistics.fails = fails
    prune_in_one_shot(
        session,
        groups,
        statistics,  # type: ignore[arg-type]
        modifiers=modifiers,
        sampler=object(),
        recalibrate_batchnorm=True,
        cure="recalibrate()",
    )
    return session


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_shot_on_ranks_equals_one_shot_alone(layout):
    shards = shards_of(layout, 3)
    expected = Model()
    one_shot(TWO, expected)

    def run(ranks: ThreadRanks) -> Model:
        model = Model()
        one_shot(TWO, model, ranks=ranks, shards=shards)
        Gathered(ranks, model, shards)()
        return model

    for model in run_ranks(3, run):
        for name, array in model.weights.items():
            assert np.array_equal(array == 0, expected.weights[name] == 0) and np.any(array == 0)
            np.testing.assert_allclose(array, expected.weights[name], rtol=1e-5, atol=1e-5)


def test_one_shot_that_fails_on_one_rank_restores_the_weights_of_all():
    def run(ranks: ThreadRanks) -> None:
        model = Model()
        try:
            one_shot(TWO, model, ranks=ranks, fails=ranks.rank == 1)
        finally:
            for name, array in Model().weights.items():
                np.testing.assert_array_equal(model.weights[name], array)

    found = outcomes(3, run)
    assert [type(each) for each in found] == [RankError, OSError, RankError]
    assert "recalibrating batch normalization" in str(found[0])


# states


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("stop", [3, 9, 14])
def test_a_session_goes_on_at_another_number_of_ranks(stop, size, layout):
    stopped = on_ranks(2, "replicated", TWO, last=stop)
    states = [session.state_dict() for session, _ in stopped]
    before = stopped[0][1]
    shards = shards_of(layout, size)

    def run(ranks: ThreadRanks) -> tuple[Session, Model]:
        model = Model()
        model.weights = {name: array.copy() for name, array in before.weights.items()}
        model.momentum = {name: array.copy() for name, array in before.momentum.items()}
        session = session_of(TWO, model, ranks=ranks, shards=shards)
        session.resume(session.parsed(states))
        train(session, model, LAST, Gathered(ranks, model, shards))
        return session, model

    assert_same(run_ranks(size, run), alone(TWO))


def test_states_of_other_steps_are_refused():
    states = [session.state_dict() for session, _ in on_ranks(2, "replicated", TWO, last=9)]
    session = session_of(TWO, Model())
    with pytest.raises(ValueError, match="not from the same run and step .step 8, 9."):
        session.parsed([states[0], {**states[1], "step": 8}])
    with pytest.raises(ValueError, match="a list with the state of each pruning modifier"):
        session.parsed([states[0], {**states[1], "prunings": 3}])
