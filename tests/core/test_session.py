"""The core's session does all that adapters share, shown with a framework of NumPy arrays."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from mfac_core import MemoryBudgetError, load_recipe
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.schedules.one_shot import one_shot_in_order
from mfac_core.session.one_shot import prune_in_one_shot
from mfac_core.session.plan_log import log_plan
from mfac_core.session.session import Session, attached
from tests.core.numpy_framework import EPOCHS, LOGGER, SHAPES, STEPS_PER_EPOCH, ArrayPruning, Model, session_of, train

MFAC = """
  - !MFACPruningModifier
    params: [{params}]
    final_sparsity: {final}
    start_epoch: {start}
    end_epoch: {end}
    num_grads: 4
    fisher_block_size: 10
"""
TWO = (
    "modifiers:"
    + MFAC.format(params="body", final=0.6, start=1, end=3)
    + """
  - !MagnitudePruningModifier {params: [body, head], final_sparsity: 0.5, start_epoch: 2, end_epoch: 3}
"""
)
ACDC = "modifiers:\n  - !ACDCPruningModifier {params: [body], compression_sparsity: 0.5, end_epoch: 4}"


def test_two_modifiers_prune_gradually_and_what_one_prunes_stays_zero(caplog):
    caplog.set_level(logging.INFO)
    model = Model()
    session = session_of(TWO, model)
    log_plan(LOGGER, session.prunings, [], STEPS_PER_EPOCH, sampled=False)
    train(session, model, until=EPOCHS * STEPS_PER_EPOCH)
    session.warn_of_unfinished("training ended")

    assert [pruning.sparsity for pruning in session.prunings] == [0.6, pytest.approx(0.5, abs=0.2)]
    assert not session.zeros().regrown
    assert "MFACPruningModifier 1: 30 weights in 1 parameter (body)" in caplog.text
    assert "(MFACPruningModifier 1: body)" in caplog.text and "(MagnitudePruningModifier 2: body, head)" in caplog.text
    assert "training ended" not in caplog.text


def test_a_modifier_that_begins_later_comes_later_and_each_final_sparsity_is_one():
    recipe = """modifiers:
  - !MagnitudePruningModifier {params: [body], final_sparsity: 0.5, start_epoch: 2, end_epoch: 3}
  - !MagnitudePruningModifier {final_sparsity: {0.8: [body], 0.4: [head]}, start_epoch: 1, end_epoch: 2}
"""
    session = session_of(recipe, Model())

    assert [(each.settings.start_epoch, each.settings.final_sparsity) for each in session.prunings] == [
        (1.0, 0.8),
        (1.0, 0.4),
        (2.0, 0.5),
    ]


def test_an_update_leaves_zero_what_another_modifier_has_pruned():
    model = Model()
    (pruning,) = session_of(
        "modifiers:" + MFAC.format(params="body", final=0.2, start=0, end=0), model, sampled=True
    ).prunings
    others = np.ones(SHAPES["body"], bool)
    others[0] = False
    pruning.prune_if_due(0, {"body": others})

    assert not model.weights["body"][0].any()
    assert np.count_nonzero(model.weights["body"][1:]) > 0.7 * model.weights["body"].size / 6 * 5


def test_zeros_that_a_constant_modifier_finds_before_the_first_step_stay():
    model = Model()
    model.weights["body"][:3] = 0
    session = session_of("modifiers:\n  - !ConstantPruningModifier {params: [body], start_epoch: 0}", model)
    train(session, model, until=STEPS_PER_EPOCH)

    assert not model.weights["body"][:3].any()
    assert model.weights["body"][3:].all()


def test_a_session_and_its_modifiers_have_the_same_steps_per_epoch():
    prunings = session_of(ACDC, Model()).prunings

    with pytest.raises(ValueError, match="steps_per_epoch is 5 for the session and 6 for one of its modifiers"):
        Session(prunings, steps_per_epoch=5, logger=LOGGER)


def test_a_run_that_ends_early_is_named_with_its_modifier(caplog):
    model = Model()
    session = session_of(TWO, model)
    train(session, model, until=2 * STEPS_PER_EPOCH)
    session.warn_of_unfinished("training ended", "the data ended early")

    assert "without the pruning step of epoch 3 (MFACPruningModifier 1: body)" in caplog.text
    assert caplog.text.count("; the data ended early") == 2


def test_the_log_says_the_bytes_that_the_check_before_the_run_counts(caplog, monkeypatch):
    item = MFAC.format(params="body", final=0.6, start=1, end=2).replace("num_grads: 4", "num_grads: 40")
    recipe = f"modifiers:{item.replace('size: 10', 'size: 1')}    init_sparsity: __FROM_PARAM__\n"
    caplog.set_level(logging.INFO)
    needed = []
    for zeros in (0, 15):
        model = Model()
        model.weights["body"].flat[:zeros] = 0
        caplog.clear()
        (pruning,) = session_of(recipe, model).prunings
        log_plan(LOGGER, [pruning], [], STEPS_PER_EPOCH, sampled=False)
        assert f"up to {pruning.needed_bytes:,} bytes of memory" in caplog.text
        needed.append(pruning.needed_bytes)
        monkeypatch.setattr(NumpyBackend, "free_bytes", lambda *_, free=pruning.needed_bytes - 1: free)
        with pytest.raises(MemoryBudgetError, match=f"needs {pruning.needed_bytes:,} bytes"):
            session_of(recipe, model)
        monkeypatch.undo()
    # the 15 zeros leave the window at the first pruning step: the next one is created while the previous one exists
    assert needed == [4 * 40 * 30 + 2 * (2 * 4 * 40 + 8 * 8), 4 * 40 * (30 + 15)]


def test_samples_are_drawn_for_each_pruning_step_and_the_loss_is_measured(caplog):
    caplog.set_level(logging.INFO)
    model = Model()
    session = session_of("modifiers:" + MFAC.format(params="body", final=0.6, start=0, end=1), model, sampled=True)
    train(session, model, until=STEPS_PER_EPOCH)

    assert session.zeros().sparsity == pytest.approx(0.6)
    assert "4 gradient samples" in caplog.text and "measured loss change" in caplog.text


@pytest.mark.parametrize("stop", [5, 13, 17])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(stop):
    whole, resumed = Model(), Model()
    session = session_of(TWO, whole)
    train(session, whole, until=stop)
    state = session.state_dict()
    for kind in ("weights", "momentum"):
        setattr(resumed, kind, {name: array.copy() for name, array in getattr(whole, kind).items()})
    later = session_of(TWO, resumed)
    later.resume(later.parsed(state))
    for each, model in ((session, whole), (later, resumed)):
        train(each, model, until=EPOCHS * STEPS_PER_EPOCH)

    for name in SHAPES:
        np.testing.assert_array_equal(whole.weights[name], resumed.weights[name])


def test_a_state_is_checked_as_a_whole_before_anything_changes():
    model = Model()
    session = session_of(TWO, model)
    train(session, model, until=15)
    state, fresh = session.state_dict(), session_of(TWO, model)
    state["prunings"][1]["pruning_steps_done"] = 99

    with pytest.raises(ValueError, match="pruning_steps_done"):
        fresh.resume(fresh.parsed(state))
    assert fresh.zeros().pruned == 0


@pytest.mark.parametrize("method", ["write", "enforce_masks"])
@pytest.mark.parametrize("recipe", [TWO, ACDC])
def test_a_pruning_step_that_fails_changes_nothing_and_its_retry_is_the_same(monkeypatch, method, recipe):
    failing, other = Model(), Model()
    sessions = [session_of(recipe, failing), session_of(recipe, other)]
    original = getattr(ArrayPruning, method)

    def interrupted(self, *args):
        original(self, *args)
        if self.model is failing and not interrupted.done:
            interrupted.done = True
            for name in self.names:
                self.model.weights[name] += 1  # as if it was half done
            raise KeyboardInterrupt

    monkeypatch.setattr(ArrayPruning, method, interrupted)
    for until in range(1, EPOCHS * STEPS_PER_EPOCH + 1):
        interrupted.done = False
        try:
            train(sessions[0], failing, until)
        except KeyboardInterrupt:
            train(sessions[0], failing, until)
        train(sessions[1], other, until)
        for name in SHAPES:
            np.testing.assert_array_equal(failing.weights[name], other.weights[name])
            np.testing.assert_array_equal(failing.momentum[name], other.momentum[name])


class NoStatistics:
    layers = ()


def test_one_shot_prunes_all_modifiers_or_none(monkeypatch):
    model = Model()
    before = {name: array.copy() for name, array in model.weights.items()}
    groups = one_shot_in_order(load_recipe(TWO).pruning)

    def run():
        prunings = attached(
            [at_once for _, at_once in groups], lambda each, name: ArrayPruning(each, model, sampled=True, name=name)
        )
        session = Session(prunings, steps_per_epoch=STEPS_PER_EPOCH, logger=LOGGER)
        prune_in_one_shot(
            session, groups, NoStatistics(), modifiers=[], sampler=None, recalibrate_batchnorm=False, cure=""
        )
        return session

    with monkeypatch.context() as patch:
        patch.setattr(ArrayPruning, "after_pruning_step", lambda self, *_: 1 / (self.names == ["body"]))
        with pytest.raises(ZeroDivisionError):
            run()
        for name in SHAPES:
            np.testing.assert_array_equal(model.weights[name], before[name])
    session = run()
    assert session.prunings[0].sparsity == 0.6 and not session.zeros().regrown


def test_the_log_counts_the_sub_steps_of_a_pruning_step(caplog):
    def lines_of(start, end, until, **options):
        caplog.clear()
        model = Model()
        recipe = "modifiers:" + MFAC.format(params="body", final=0.6, start=start, end=end)
        session = session_of(recipe + "    num_recomputations: 3\n", model, **options)
        session.prune_if_due()
        train(session, model, until)
        messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
        return [message.partition(":")[0] for message in messages]

    caplog.set_level(logging.INFO)

    assert lines_of(1, 2, until=12) == [
        "pruning step at epoch 1.00 (step 6)",
        *(f"sub-step {number} of 3 of the pruning step at epoch 2.00 (step 12)" for number in (1, 2, 3)),
    ]
    assert lines_of(0, 0, until=0, sampled=True) == [f"pruning step, sub-step {number} of 3" for number in (1, 2, 3)]
