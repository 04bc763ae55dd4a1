from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from mfac_core import (
    MagnitudePruner,
    MagnitudeSettings,
    MemoryBudgetError,
    MFACPruner,
    MFACSettings,
    SettingError,
    make_pruner,
)
from mfac_core.backends import lookup
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.pruners import ACDCPruner, ConstantPruner
from mfac_core.pruners.memory import WindowMemory
from mfac_core.schedules.pruning import num_gradients_at
from mfac_core.settings.pruning import ACDCSettings, ConstantSettings
from tests import reference
from tests.core.strict_backend import strict_devices

SHAPES = {"a": (5, 6), "b": (11,), "c": (2, 3, 4)}
TOTAL = 65
STEPS_PER_EPOCH = 8
SETTINGS = MFACSettings(
    initial_sparsity=0.2,
    final_sparsity=0.8,
    start_epoch=1.0,
    end_epoch=4.0,
    update_frequency=1.0,
    num_gradients={0.0: 4, 0.5: 6},
    block_size=20,
    damping=1e-3,
)
LAST_STEP = 4 * STEPS_PER_EPOCH


def make_weights(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def gradient_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1000 + step)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def make_mfac(settings: MFACSettings = SETTINGS, **options: Any) -> MFACPruner:
    return MFACPruner(settings, make_weights(), steps_per_epoch=STEPS_PER_EPOCH, **options)


def train(pruner, weights, first: int = 0, last: int = LAST_STEP, before_step=None) -> dict[str, np.ndarray]:
    """The training loop of a user: gradients where they are wanted, a step of SGD, the pruning steps that are due."""
    for step in range(first, last):
        gradients = gradient_at(step)
        if pruner.needs_gradients(step):
            pruner.observe(gradients)
        weights = {name: (weights[name] - 0.01 * gradients[name]) * pruner.masks[name] for name in weights}
        if before_step is not None:
            before_step(step + 1, weights)
        if pruner.is_due(step + 1):
            weights = pruner.prune(weights, step + 1).weights
    return weights


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in SHAPES)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("damping", [1e-3, "auto"])
@pytest.mark.parametrize("num_gradients", [{0.0: 4, 0.5: 6}, {0.0: 6, 0.5: 3}, 11, 25])
def test_a_gradual_run_equals_dense_pruning_steps_on_the_recent_gradients(num_gradients, damping, update, scope):
    settings = replace(SETTINGS, num_gradients=num_gradients, damping=damping, update=update, scope=scope)
    pruner = make_mfac(settings)
    weights, rows, sparsities = make_weights(), [], []
    for step in range(LAST_STEP):
        gradients = gradient_at(step)
        if pruner.needs_gradients(step):
            assert pruner.observe(gradients)
            rows.append(np.concatenate([gradients[name].ravel() for name in SHAPES]))
        if pruner.is_due(step + 1):
            scheduled = pruner.next_step
            reached = sparsities[-1] if sparsities else 0.0
            recent = np.array(rows[-num_gradients_at(settings.num_gradients, reached) :])
            masks = pruner.masks
            expected = reference.prune(
                weights,
                recent,
                sparsity=scheduled.sparsity,
                masks=masks,
                block_size=20,
                damping=damping,
                scope=scope,
                update=update,
                num_recomputations=1,
            )
            kept = np.concatenate([masks[name].ravel() for name in SHAPES])
            dampings = reference.damping_of_weights(recent[:, kept], damping, 20)
            result = pruner.prune(weights, step + 1)
            assert result.damping == pytest.approx((dampings.min(), dampings.max()))
            for name in SHAPES:
                np.testing.assert_array_equal(result.masks[name], expected.masks[name])
                np.testing.assert_allclose(result.weights[name], expected.weights[name], rtol=0, atol=1e-4)
                assert result.weights[name].dtype == np.float32
            assert result.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase, rel=1e-3)
            assert result.sparsity == pruner.sparsity == pytest.approx(expected.sparsity)
            weights = result.weights
            sparsities.append(scheduled.sparsity)
            rows = rows[-num_gradients_at(settings.num_gradients, scheduled.sparsity) :]
    assert sparsities == [scheduled.sparsity for scheduled in pruner.schedule]
    assert len(sparsities) == 4


def test_gradients_are_needed_only_in_the_last_steps_before_a_pruning_step():
    pruner, asked = make_mfac(), []
    weights = make_weights()
    for step in range(LAST_STEP + 10):
        if pruner.needs_gradients(step):
            asked.append(step)
            pruner.observe(gradient_at(step))
        if pruner.is_due(step + 1):
            weights = pruner.prune(weights, step + 1).weights
    sparsities = [0.0, *(scheduled.sparsity for scheduled in pruner.schedule)]
    expected = []
    for reached, scheduled in zip(sparsities, pruner.schedule, strict=False):
        expected += range(scheduled.step - num_gradients_at(SETTINGS.num_gradients, reached), scheduled.step)
    assert asked == expected
    assert [scheduled.step for scheduled in pruner.schedule] == [8, 16, 24, 32]


def test_a_pruning_step_is_due_from_its_step_on_until_it_is_done():
    pruner = make_mfac()
    for step in range(8):
        pruner.observe(gradient_at(step))
    assert [pruner.is_due(step) for step in (0, 7, 8, 9, 15)] == [False, False, True, True, True]
    result = pruner.prune(make_weights(), 9)
    assert [pruner.is_due(step) for step in (8, 9, 15, 16)] == [False, False, False, True]
    assert result.sparsity == pytest.approx(0.2, abs=0.02)


def test_a_pruning_step_with_a_partial_window_stays_due_until_it_is_done():
    pruner = make_mfac()
    pruner.observe(gradient_at(0))
    assert [pruner.is_due(step) for step in (7, 8, 9, 15)] == [False, True, True, True]


def test_without_a_step_the_next_pruning_step_is_done():
    pruner = make_mfac()
    pruner.observe(gradient_at(0))
    pruner.prune(make_weights())
    assert pruner.next_step == pruner.schedule[1]


def test_a_late_pruning_step_does_the_latest_that_is_planned():
    pruner = make_mfac()
    pruner.observe(gradient_at(0))
    pruner.prune(make_weights(), 25)
    assert pruner.next_step == pruner.schedule[3]
    assert pruner.sparsity == pytest.approx(pruner.schedule[2].sparsity, abs=0.02)


def test_pruning_before_its_step_and_after_the_end_is_refused():
    pruner = make_mfac()
    pruner.observe(gradient_at(0))
    with pytest.raises(ValueError, match=r"step 7\b.*step 8\b"):
        pruner.prune(make_weights(), 7)
    assert not np.any(~pruner.masks["a"])
    train(pruner, make_weights())
    assert pruner.is_finished and pruner.next_step is None
    assert not pruner.is_due(10**6) and not pruner.needs_gradients(10**6)
    with pytest.raises(ValueError, match="done"):
        pruner.prune(make_weights(), 10**6)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("final", [0.5, 0.77, 0.801, 0.95])
def test_the_final_sparsity_is_exact_and_weights_are_zero_where_pruned(final, scope):
    pruner = make_mfac(replace(SETTINGS, final_sparsity=final, scope=scope))
    weights = train(pruner, make_weights())
    assert pruner.is_finished
    zeros = {name: int(np.sum(weights[name] == 0)) for name in SHAPES}
    if scope == "global":
        assert sum(zeros.values()) == round(TOTAL * final)
    else:
        assert zeros == {name: round(int(np.prod(shape)) * final) for name, shape in SHAPES.items()}
    assert all(np.array_equal(weights[name] != 0, pruner.masks[name]) for name in SHAPES)
    assert pruner.sparsity == sum(zeros.values()) / TOTAL


def test_masks_only_shrink():
    pruner, before = make_mfac(), {name: np.ones(shape, bool) for name, shape in SHAPES.items()}

    def check(step, weights):
        nonlocal before
        assert not any(np.any(pruner.masks[name] & ~before[name]) for name in SHAPES)
        before = pruner.masks

    train(pruner, make_weights(), before_step=check)
    assert not same(before, {name: np.ones(shape, bool) for name, shape in SHAPES.items()})


def test_masks_given_at_the_start_are_kept_and_count():
    masks = {name: np.arange(int(np.prod(shape))).reshape(shape) % 4 > 0 for name, shape in SHAPES.items()}
    pruner = make_mfac(masks=masks)
    assert same(pruner.masks, masks)
    assert pruner.sparsity == sum(int(np.sum(~mask)) for mask in masks.values()) / TOTAL
    weights = train(pruner, {name: array * masks[name] for name, array in make_weights().items()})
    assert not any(np.any(weights[name][~masks[name]]) for name in SHAPES)
    assert sum(int(np.sum(weights[name] == 0)) for name in SHAPES) == round(30 * 0.8) + round(11 * 0.8) + round(
        24 * 0.8
    )


def test_masks_handed_out_are_copies():
    pruner = make_mfac()
    pruner.masks["a"][:] = False
    assert pruner.sparsity == 0 and pruner.masks["a"].all()


@pytest.mark.parametrize(
    "change",
    [
        {"num_gradients": {0.0: 4, 0.5: 7}},
        {"num_gradients": 4},
        {"block_size": 19},
        {"block_size": None},
        {"damping": 2e-3},
        {"damping": "auto"},
        {"gradients_dtype": "bfloat16"},
        {"update": "joint"},
        {"scope": "global"},
        {"final_sparsity": 0.7},
        {"initial_sparsity": 0.3},
        {"interpolation": "linear"},
        {"interpolation": "inverse_cubic"},
        {"start_epoch": 1.5},
        {"end_epoch": 3.5},
        {"update_frequency": 0.5},
    ],
    ids=str,
)
def test_each_setting_changes_the_outcome(change):
    usual = train(make_mfac(), make_weights())
    assert same(usual, train(make_mfac(replace(SETTINGS)), make_weights()))
    assert not same(usual, train(make_mfac(replace(SETTINGS, **change)), make_weights()))


@pytest.mark.parametrize("killed_at", range(0, LAST_STEP + 1, 3))
def test_a_resumed_run_ends_bit_for_bit_the_same(killed_at):
    whole = make_mfac()
    expected = train(whole, make_weights())
    first = make_mfac()
    weights = train(first, make_weights(), last=killed_at)
    state = copy.deepcopy(first.state_dict())
    train(first, weights, first=killed_at)  # the state must not change with the pruner that it was taken from
    second = make_mfac()
    second.load_state_dict(state)
    resumed = train(second, weights, first=killed_at)
    assert same(resumed, expected) and same(second.masks, whole.masks)
    assert second.is_finished


def test_a_state_does_not_change_with_its_pruner():
    pruner = make_mfac()
    weights = train(pruner, make_weights(), last=12)
    state = pruner.state_dict()
    before = copy.deepcopy(state)
    train(pruner, weights, first=12)
    np.testing.assert_equal(state, before)


def test_a_state_holds_arrays_and_plain_numbers_only():
    pruner = make_mfac()
    train(pruner, make_weights(), last=12)
    assert_plain(pruner.state_dict())


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        for item in value.values():
            assert_plain(item)
    else:
        assert value is None or type(value) in {bool, int, float, str, np.ndarray}


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    pruner = make_mfac()
    weights = train(pruner, make_weights(), last=12)
    before = copy.deepcopy(pruner.state_dict())
    later = make_mfac()
    train(later, make_weights(), last=28)
    wrong = [
        {**later.state_dict(), "masks": {**later.masks, "b": np.ones(12, bool)}},
        {**later.state_dict(), "masks": {"a": later.masks["a"]}},
        {**later.state_dict(), "pruning_steps_done": 5},
        {**later.state_dict(), "pruning_steps_done": -1},
        {**later.state_dict(), "window": {"rows": np.zeros((2, 3), np.float32), "position": 2}},
    ]
    for state in wrong:
        with pytest.raises(ValueError):  # noqa: PT011
            pruner.load_state_dict(state)
        np.testing.assert_equal(pruner.state_dict(), before)
    train(pruner, weights, first=12)
    assert pruner.is_finished


def test_a_state_of_another_schedule_or_method_is_refused():
    pruner = make_mfac()
    train(pruner, make_weights(), last=12)
    state = pruner.state_dict()
    other = make_mfac(replace(SETTINGS, final_sparsity=SETTINGS.final_sparsity + 0.01))
    magnitude = MagnitudePruner(
        MagnitudeSettings(**{field.name: getattr(SETTINGS, field.name) for field in fields(MagnitudeSettings)}),
        make_weights(),
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    for stranger in (other, magnitude):
        with pytest.raises(ValueError, match="another pruning schedule|was saved by MFACPruner"):
            stranger.load_state_dict(state)
    with pytest.raises(ValueError, match="it has no masks, method"):
        pruner.load_state_dict({"schedule": state["schedule"], "pruning_steps_done": 1})


def test_a_state_of_another_run_says_what_differs():
    def refusal(**changes):
        with pytest.raises(ValueError, match="^the state belongs to another recipe or model: ") as caught:
            make_mfac().load_state_dict({**make_mfac().state_dict(), **changes})
        return str(caught.value)

    masks = make_mfac().masks
    others = {f"layer{number}": np.ones(2, bool) for number in range(7)}
    renamed = refusal(masks={"a": masks["a"], **others})
    assert "no mask for b, c; it has masks for layer0, layer1, layer2, layer3, layer4 and 2 more, which" in renamed
    assert "Resume with the recipe, the model and the steps_per_epoch" in renamed
    assert "its b has shape (3,), but (11,) in this run" in refusal(masks={**masks, "b": np.ones(3, bool)})
    schedule = make_mfac().state_dict()["schedule"]
    assert "(pruning step 4 is missing, but in this run at step 32 to sparsity 0.8)" in refusal(schedule=schedule[:3])
    doubled = schedule * [2, 1]
    assert "(pruning step 1 is at step 16 to sparsity 0.2, but in this run at step 8 to" in refusal(schedule=doubled)
    assert "it was saved by MagnitudePruner, but this run uses MFACPruner" in refusal(method="MagnitudePruner")


def test_a_state_without_a_window_collects_rows_anew():
    pruner = make_mfac()
    train(pruner, make_weights(), last=12)
    state = {key: value for key, value in pruner.state_dict().items() if key != "window"}
    other = make_mfac()
    other.load_state_dict(state)
    assert other.num_rows == 0
    assert same(other.masks, pruner.masks)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused_and_counted(value, caplog):
    pruner = make_mfac()
    bad = gradient_at(0)
    bad["b"][3] = value
    with caplog.at_level(logging.WARNING, "mfac_core"):
        assert [pruner.observe(row) for row in (gradient_at(1), bad, bad, gradient_at(2))] == [True, False, False, True]
    assert (pruner.num_rows, pruner.refused_rows) == (2, 2)
    assert len([record for record in caplog.records if "NaN" in record.message]) == 1
    clean = make_mfac()
    clean.observe(gradient_at(1))
    clean.observe(gradient_at(2))
    assert same(pruner.prune(make_weights(), 8).weights, clean.prune(make_weights(), 8).weights)
    restored = make_mfac()
    restored.load_state_dict(pruner.state_dict())
    assert restored.refused_rows == 2


def test_what_is_not_finite_at_a_pruned_weight_is_of_no_concern():
    masks = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
    masks["b"][3] = False
    pruner, row = make_mfac(masks=masks), gradient_at(0)
    row["b"][3] = np.nan
    assert pruner.observe(row)
    assert pruner.refused_rows == 0


def test_pruning_with_no_rows_at_all_is_refused():
    pruner = make_mfac(live_gradients=False)
    with pytest.raises(ValueError, match="gradient"):
        pruner.prune(make_weights(), 8)
    assert pruner.sparsity == 0 and pruner.next_step == pruner.schedule[0]


def test_a_start_at_step_zero_waits_for_its_first_window(caplog):
    pruner = make_mfac(replace(SETTINGS, start_epoch=0.0))
    weights = make_weights()
    with caplog.at_level(logging.WARNING, "mfac_core"):
        assert not pruner.is_due(0)
        for step in range(4):
            assert not pruner.is_due(step)
            assert pruner.needs_gradients(step)
            pruner.observe(gradient_at(step))
        assert pruner.is_due(4)
        result = pruner.prune(weights, 4)
    assert result.sparsity == pytest.approx(0.2, abs=0.02)
    assert len([record for record in caplog.records if "wait" in record.message]) == 1
    assert "partial" not in caplog.text
    assert pruner.next_step == pruner.schedule[1]


def test_a_waiting_pruning_step_gives_way_to_the_next(caplog):
    pruner = make_mfac(replace(SETTINGS, start_epoch=0.0, num_gradients=30))
    pruner.is_due(0)
    for step in range(8):
        assert not pruner.is_due(step)
        pruner.observe(gradient_at(step))
    assert pruner.is_due(8)
    pruner.prune(make_weights(), 8)
    assert pruner.next_step == pruner.schedule[2]


@pytest.mark.parametrize("first", [0, 9])
def test_a_waiting_pruning_step_gives_way_to_the_next_where_steps_come_several_at_once(first, caplog):
    pruner = make_mfac(replace(SETTINGS, start_epoch=0.0, num_gradients=30))
    upcoming = 1 if first == 0 else 2  # the one that waits is that of step 0, or of step 8
    assert not pruner.is_due(first)
    assert f"the pruning step at step {pruner.schedule[upcoming - 1].step} falls due" in caplog.text
    for step in range(first, pruner.schedule[upcoming].step + 1):
        pruner.observe(gradient_at(step))
        assert not pruner.is_due(first + 1)
    restored = make_mfac(replace(SETTINGS, start_epoch=0.0, num_gradients=30))
    restored.load_state_dict(pruner.state_dict())
    assert not restored.is_due(first + 1)
    for each in (pruner, restored):
        assert each.is_due(pruner.schedule[upcoming].step + 1)
        each.prune(make_weights(), pruner.schedule[upcoming].step + 1)
        assert each.next_step == each.schedule[upcoming + 1]


def test_as_long_as_there_is_no_row_the_latest_pruning_step_waits(caplog):
    """It does not begin with a single row because an earlier one has waited, in a resumed run neither."""
    pruner = make_mfac(replace(SETTINGS, start_epoch=0.0, num_gradients=30))
    for step in range(12):
        assert not pruner.is_due(step)
    restored = make_mfac(replace(SETTINGS, start_epoch=0.0, num_gradients=30))
    restored.load_state_dict(pruner.state_dict())
    for each in (pruner, restored):
        each.observe(gradient_at(12))
        assert not each.is_due(13) and each.is_due(16)
    assert len([record for record in caplog.records if "waits" in record.message]) == 1


def test_a_waiting_pruning_step_still_waits_after_a_restart():
    pruner = make_mfac(replace(SETTINGS, start_epoch=0.0))
    pruner.is_due(0)
    pruner.observe(gradient_at(0))
    restored = make_mfac(replace(SETTINGS, start_epoch=0.0))
    restored.load_state_dict(pruner.state_dict())
    assert not pruner.is_due(1) and not restored.is_due(1)


def test_a_partial_window_is_used_and_said_once(caplog):
    pruner = make_mfac(replace(SETTINGS, num_gradients=20))
    with caplog.at_level(logging.WARNING, "mfac_core"):
        weights = train(pruner, make_weights())
    logged = [record.message for record in caplog.records]
    assert len(logged) == 1
    assert re.search(r"\b8\b.*\b20\b", logged[0])
    assert sum(int(np.sum(weights[name] == 0)) for name in SHAPES) == round(30 * 0.8) + round(11 * 0.8) + round(
        24 * 0.8
    )


def test_a_full_window_says_nothing(caplog):
    with caplog.at_level(logging.DEBUG, "mfac_core"):
        train(make_mfac(), make_weights())
    assert not caplog.records


def test_sampled_gradients_are_never_asked_for_and_a_step_is_due_without_rows():
    pruner = make_mfac(live_gradients=False)
    assert not any(pruner.needs_gradients(step) for step in range(40))
    assert [pruner.is_due(step) for step in (7, 8)] == [False, True]
    pruner.observe(gradient_at(0))
    pruner.forget_gradients()
    assert pruner.num_rows == 0
    pruner.observe(gradient_at(1))
    fresh = make_mfac(live_gradients=False)
    fresh.observe(gradient_at(1))
    assert same(pruner.prune(make_weights(), 8).weights, fresh.prune(make_weights(), 8).weights)


def test_inputs_are_unchanged():
    pruner, weights, gradients = make_mfac(), make_weights(), gradient_at(0)
    arrays = [*weights.values(), *gradients.values()]
    before = [array.tobytes() for array in arrays]
    pruner.observe(gradients)
    result = pruner.prune(weights, 8)
    for name in SHAPES:
        result.weights[name][...] = 7
        result.masks[name][...] = False
    assert [array.tobytes() for array in arrays] == before
    assert pruner.sparsity == pytest.approx(0.2, abs=0.02)


def test_an_observed_gradient_is_copied():
    pruner, row = make_mfac(), gradient_at(0)
    pruner.observe(row)
    for array in row.values():
        array[...] = np.nan
    clean = make_mfac()
    clean.observe(gradient_at(0))
    assert same(pruner.prune(make_weights(), 8).weights, clean.prune(make_weights(), 8).weights)


def test_float64_weights_keep_their_dtype_and_their_digits():
    weights = make_weights(np.float64)
    masks = {name: np.arange(int(np.prod(shape))).reshape(shape) % 2 > 0 for name, shape in SHAPES.items()}
    weights = {name: weights[name] * masks[name] for name in SHAPES}
    pruner = MFACPruner(SETTINGS, weights, steps_per_epoch=STEPS_PER_EPOCH, masks=masks)
    pruner.observe(gradient_at(0))
    result = pruner.prune(weights, 8)
    assert result.weights["a"].dtype == np.float64
    assert same(result.weights, weights)


def test_the_order_of_gradients_by_name_is_irrelevant():
    one, other = make_mfac(), make_mfac()
    one.observe(gradient_at(0))
    other.observe(dict(reversed(gradient_at(0).items())))
    backwards = dict(reversed(make_weights().items()))
    assert same(one.prune(make_weights(), 8).weights, other.prune(backwards, 8).weights)


@pytest.mark.parametrize("name", SHAPES)
def test_arrays_that_do_not_fit_are_refused_by_name(name):
    pruner = make_mfac()
    with pytest.raises(ValueError, match=name):
        pruner.observe({other: array for other, array in gradient_at(0).items() if other != name})
    with pytest.raises(ValueError, match=name):
        pruner.observe({**gradient_at(0), name: np.zeros((3, 3), np.float32)})
    pruner.observe(gradient_at(0))
    with pytest.raises(ValueError, match=name):
        pruner.prune({**make_weights(), name: np.zeros((3, 3), np.float32)}, 8)
    with pytest.raises(ValueError, match=name):
        make_mfac(masks={**make_mfac().masks, name: np.ones(2, bool)})
    with pytest.raises(ValueError, match="weights"):
        MFACPruner(SETTINGS, {}, steps_per_epoch=STEPS_PER_EPOCH)


def test_a_window_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
    monkeypatch.setattr(NumpyBackend, "free_bytes", lambda self, device: 60_000)
    with pytest.raises(MemoryBudgetError, match="60,000") as refusal:
        make_mfac(replace(SETTINGS, num_gradients=5000))
    fitting = int(re.search(r"num_gradients\D+(\d+) would fit", str(refusal.value))[1])
    make_mfac(replace(SETTINGS, num_gradients=fitting))
    with pytest.raises(MemoryBudgetError):
        make_mfac(replace(SETTINGS, num_gradients=fitting + 1))


def test_memory_is_counted_at_the_largest_window_of_the_run():
    schedule = make_mfac().schedule
    early = replace(SETTINGS, num_gradients={0.0: 100, 0.5: 110})
    late = replace(SETTINGS, num_gradients={0.0: 100, 0.5: 1000})
    assert WindowMemory(early, TOTAL, schedule).peak() == (100, TOTAL)
    reached = next(scheduled.sparsity for scheduled in schedule if scheduled.sparsity >= 0.5)
    assert WindowMemory(late, TOTAL, schedule).peak() == (1000, TOTAL - round(TOTAL * reached))


def test_magnitude_pruning_takes_the_smallest_and_moves_nothing():
    settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0, start_epoch=1.0, scope="global")
    pruner = MagnitudePruner(settings, make_weights(), steps_per_epoch=4)
    weights = make_weights()
    assert [pruner.is_due(step) for step in (3, 4)] == [False, True]
    result = pruner.prune(weights, 4)
    flat = np.abs(np.concatenate([weights[name].ravel() for name in SHAPES]))
    threshold = np.sort(flat)[round(TOTAL * 0.5)]
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], np.abs(weights[name]) >= threshold)
        np.testing.assert_array_equal(result.weights[name], np.where(result.masks[name], weights[name], 0))
    assert result.predicted_loss_increase is None
    assert pruner.is_finished


def test_magnitude_pruning_wants_no_gradients():
    pruner = MagnitudePruner(MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0), make_weights(), steps_per_epoch=4)
    assert not any(pruner.needs_gradients(step) for step in range(10))
    with pytest.raises(TypeError, match="needs_gradients"):
        pruner.observe(gradient_at(0))


def test_magnitude_pruning_resumes():
    settings = MagnitudeSettings(final_sparsity=0.8, end_epoch=4.0, update_frequency=0.5)
    whole = MagnitudePruner(settings, make_weights(), steps_per_epoch=STEPS_PER_EPOCH)
    expected = train(whole, make_weights())
    first = MagnitudePruner(settings, make_weights(), steps_per_epoch=STEPS_PER_EPOCH)
    weights = train(first, make_weights(), last=13)
    second = MagnitudePruner(settings, make_weights(), steps_per_epoch=STEPS_PER_EPOCH)
    second.load_state_dict(first.state_dict())
    assert same(train(second, weights, first=13), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_pruner_is_made_for_its_settings(dtype):
    weights = make_weights(dtype)
    assert type(make_pruner(SETTINGS, weights, steps_per_epoch=8)) is MFACPruner
    magnitude = MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0)
    assert type(make_pruner(magnitude, weights, steps_per_epoch=8)) is MagnitudePruner
    masks = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    assert make_pruner(magnitude, weights, steps_per_epoch=8, masks=masks).sparsity == 1
    assert not make_pruner(SETTINGS, weights, steps_per_epoch=8, live_gradients=False).needs_gradients(7)
    assert type(make_pruner(ConstantSettings(), weights, steps_per_epoch=8)) is ConstantPruner
    acdc = ACDCSettings(compression_sparsity=0.5, end_epoch=1.0)
    assert type(make_pruner(acdc, weights, steps_per_epoch=8)) is ACDCPruner
    with pytest.raises(TypeError, match="dict"):
        make_pruner({}, weights, steps_per_epoch=8)


ALL_SETTINGS = pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0),
        ConstantSettings(),
        ACDCSettings(compression_sparsity=0.5, end_epoch=1.0),
    ],
    ids=lambda settings: type(settings).__name__,
)


@ALL_SETTINGS
def test_weights_that_are_no_mapping_are_refused(settings):
    with pytest.raises(TypeError, match="weights must be a mapping from name to array, got ndarray"):
        make_pruner(settings, np.ones(4), steps_per_epoch=8)


@ALL_SETTINGS
@pytest.mark.parametrize("dtype", [np.int64, np.float16])
def test_weights_of_other_dtypes_are_refused_by_name(settings, dtype):
    pruner = make_pruner(settings, make_weights(), steps_per_epoch=8)
    with pytest.raises(ValueError, match=rf"weights\['b'\] must be float32 or float64, got {np.dtype(dtype)}"):
        pruner.prune({**make_weights(), "b": np.ones(11, dtype)})


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float16])
def test_gradients_of_other_dtypes_are_refused_by_name(dtype):
    pruner = make_mfac()
    with pytest.raises(ValueError, match=rf"gradients\['b'\] must be float32 or float64, got {np.dtype(dtype)}"):
        pruner.observe({**gradient_at(0), "b": np.ones(11, dtype)})
    assert pruner.num_rows == 0


@pytest.mark.parametrize("settings", [SETTINGS, MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0)])
def test_several_final_sparsities_are_refused_with_the_cure(settings):
    several = replace(settings, final_sparsity={0.5: ("a",), 0.8: ("b",)}, initial_sparsity=0.0)
    with pytest.raises(SettingError, match=r"final_sparsity: .*by_final_sparsity\(\)"):
        make_pruner(several, make_weights(), steps_per_epoch=8)
    assert [make_pruner(one, make_weights(), steps_per_epoch=8) for one in several.by_final_sparsity()]


@pytest.mark.parametrize("settings", [SETTINGS, MagnitudeSettings(final_sparsity=0.5, end_epoch=2.0)])
def test_masks_are_released_right_after_the_last_pruning_step_where_they_are_not_left(settings):
    for leave_enabled in (True, False):
        pruner = make_pruner(replace(settings, leave_enabled=leave_enabled), make_weights(), steps_per_epoch=8)
        weights = make_weights()
        while not pruner.is_finished:
            assert not pruner.is_released
            if pruner.needs_gradients(pruner.next_step.step):
                pruner.observe(gradient_at(0))
            weights = pruner.prune(weights).weights
        assert pruner.is_released is not leave_enabled


def test_without_a_named_device_blocks_are_computed_where_the_weights_are(monkeypatch):
    elsewhere = strict_devices(2)[1]
    monkeypatch.setattr(lookup, "_registered", {elsewhere.backend.name: elsewhere.backend})
    monkeypatch.setattr(
        "mfac_core.pruners.mfac.mfac_step", lambda *_, devices, **__: pytest.fail(f"computed on {devices[0].name}")
    )
    here, there = make_weights(), {name: elsewhere.asarray(array) for name, array in make_weights().items()}
    for weights, devices, computed_on in [(there, "auto", "device1"), (there, "cpu", "cpu"), (here, "auto", "cpu")]:
        settings = replace(SETTINGS, gradients_device="cpu", devices=(devices,))
        pruner = MFACPruner(settings, weights, steps_per_epoch=STEPS_PER_EPOCH)
        pruner.observe(gradient_at(0))
        with pytest.raises(pytest.fail.Exception, match=f"computed on {computed_on}"):
            pruner.prune(weights, 8)


@pytest.mark.parametrize("kind", [MFACSettings, MagnitudeSettings])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pairs_become_gradually_and_end_exact(kind, scope):
    """2:4 of a convolution in another layout, from nothing to half."""
    shape = (3, 8, 4)  # kernel, input, output
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.standard_normal(shape).astype(np.float32), "other": np.ones((4, 4), np.float32)}
    options = dict(final_sparsity=0.5, end_epoch=4.0, mask_type="2:4", scope=scope)
    options |= {"block_size": 20, "num_gradients": 3, "damping": 1e-2} if kind is MFACSettings else {}
    axes = {"kernel": (2, 0, 1)}  # output, kernel, input
    pruner = make_pruner(kind(**options), weights, steps_per_epoch=2, axes=axes)
    sparsities, before = [], None
    for scheduled in pruner.schedule:
        if kind is MFACSettings:
            for _ in range(3):
                pruner.observe({name: rng.standard_normal(array.shape) for name, array in weights.items()})
        result = pruner.prune(weights, scheduled.step)
        weights, masks = result.weights, result.masks
        by_input = masks["kernel"].transpose(2, 0, 1).reshape(-1, 4).sum(axis=1)
        assert by_input.min() >= 2
        assert before is None or not np.any(masks["kernel"] & ~before)
        sparsities.append(result.sparsity)
        before = masks["kernel"]
    assert set(by_input) == set(masks["other"].sum(axis=1)) == {2}
    assert sparsities == sorted(set(sparsities)) and sparsities[-1] == 0.5
    flat = weights["kernel"].transpose(2, 0, 1).reshape(-1, 4)
    assert set((flat == 0).sum(axis=1)) == {2}


def test_a_rounded_final_sparsity_means_exactly_n_of_m():
    weights = {"a": np.arange(1.0, 301.0).reshape(1, 300)}
    settings = MagnitudeSettings(final_sparsity=0.66, end_epoch=1.0, mask_type="1:3")
    pruner = make_pruner(settings, weights, steps_per_epoch=1)
    assert pruner.schedule[-1].sparsity == 1 - 1 / 3
    assert set(pruner.prune(weights, 1).masks["a"].reshape(-1, 3).sum(axis=1)) == {1}


@pytest.mark.parametrize("mask_type", ["channel", "filter", "block4", (1, -1), "1:2"])
def test_the_mask_type_changes_the_outcome(mask_type):
    def run(mask_type, axes=None):
        settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=0.0, mask_type=mask_type)
        weights = {"a": make_weights()["a"], "c": make_weights()["c"]}
        return make_pruner(settings, weights, steps_per_epoch=1, axes=axes).prune(weights, 0).masks

    usual, grouped, turned = run("unstructured"), run(mask_type), run(mask_type, {"a": (1, 0)})
    assert np.any(usual["a"] != grouped["a"]) and np.any(usual["c"] != grouped["c"])
    assert np.any(turned["a"] != grouped["a"]) and np.array_equal(turned["c"], grouped["c"])


def test_a_mask_type_that_does_not_fit_is_refused_when_the_pruner_is_made():
    with pytest.raises(SettingError, match="'b' of shape"):
        make_mfac(replace(SETTINGS, mask_type=(1, 6)))
    with pytest.raises(ValueError, match=r"axes\['a'\]"):
        make_mfac(axes={"a": (0, 0)})


@pytest.mark.parametrize(
    "settings",
    [
        MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0, mask_type="2:4"),
        ACDCSettings(compression_sparsity=0.5, end_epoch=1.0, mask_type="2:4"),
    ],
)
def test_a_sparsity_that_a_layer_cannot_reach_is_said_once(settings, caplog):
    weights = {"first": np.ones((2, 3), np.float32), "second": np.ones((2, 8), np.float32)}
    pruner = make_pruner(settings, weights, steps_per_epoch=1)
    result = pruner.prune(weights, 1)
    assert [int(np.sum(~mask)) for mask in result.masks.values()] == [2, 8]
    said = [record.message for record in caplog.records]
    assert said == [
        "mask_type 2:4 does not divide the number of inputs of first (sparsity at most 0.333), which cannot "
        "reach sparsity 0.5; remove weights with too few inputs from params"
    ]
    make_pruner(settings, {"second": weights["second"]}, steps_per_epoch=1)
    assert len(caplog.records) == 1


def emptied(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "prunes every weight of" in record.getMessage()]


def pruned_to_the_end(settings, weights, steps_per_epoch: int = 4):
    pruner = make_pruner(settings, weights, steps_per_epoch=steps_per_epoch)
    while not pruner.is_finished:
        result = pruner.prune(weights)
        weights = {name: np.where(result.masks[name], array * 1.01, 0) for name, array in result.weights.items()}
    return pruner


def test_a_layer_that_loses_its_last_weight_is_named_once(caplog):
    weights = {"small": np.full(10, 0.01), "large": np.linspace(1, 2, 30), "tiny": np.full(5, 0.1)}
    settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=4.0, interpolation="linear", scope="global")
    pruned_to_the_end(settings, weights)
    first, second = emptied(caplog)
    assert first.startswith("the pruning step of epoch 2 prunes every weight of small, so no signal passes through")
    assert "; prune within layers (global_sparsity: false in a recipe), exclude these weights" in first
    assert second.startswith("the pruning step of epoch 3 prunes every weight of tiny,")


def test_no_layer_is_named_that_was_empty_before_or_ends_as_was_asked_for(caplog):
    weights = {"zero": np.zeros(4), "a": np.linspace(1, 2, 30)}
    pruned_to_the_end(MagnitudeSettings(final_sparsity=0.5, end_epoch=1.0, scope="global"), weights)
    pruned_to_the_end(ConstantSettings(), weights)
    pruned_to_the_end(MagnitudeSettings(final_sparsity=0.995, end_epoch=1.0), weights)
    assert not emptied(caplog)


def test_a_layer_too_small_for_its_sparsity_and_one_of_acdc_are_named(caplog):
    pruned_to_the_end(MagnitudeSettings(final_sparsity=0.9, end_epoch=1.0), {"tiny": np.ones(4), "b": np.ones(20)})
    (warning,) = emptied(caplog)
    assert warning.endswith("every weight of tiny, so no signal passes through; exclude these weights, or prune less")
    caplog.clear()
    weights = {"small": np.full(10, 0.01), "large": np.linspace(1, 2, 30)}
    pruner = make_pruner(ACDCSettings(compression_sparsity=0.5, end_epoch=8.0), weights, steps_per_epoch=4)
    while not pruner.is_finished:  # each compressed phase empties the layer anew
        pruner.prune(weights)
    (warning,) = emptied(caplog)
    assert warning.startswith("the pruning step of epoch 1 prunes every weight of small")
