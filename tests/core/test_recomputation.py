"""Pruning steps that are done in several parts, each by a Fisher of its own."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest

from mfac_core.pruners import MFACPruner, make_pruner
from mfac_core.settings.pruning import MFACSettings
from tests import reference

SHAPES = {"a": (5, 6), "b": (11,), "c": (2, 4, 3)}
STEPS_PER_EPOCH = 8
LAST_STEP = 3 * STEPS_PER_EPOCH
LONG = 40
"""Steps per epoch that leave room for three windows of rows between two pruning steps."""


def settings(**changes: Any) -> MFACSettings:
    usual = dict(
        initial_sparsity=0.2,
        final_sparsity=0.8,
        start_epoch=1.0,
        end_epoch=3.0,
        num_gradients={0.0: 5, 0.5: 7},
        block_size=20,
        damping=1e-2,
        num_recomputations=3,
    )
    return MFACSettings(**{**usual, **changes})


def make_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def gradient_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1000 + step)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def make(live_gradients: bool = True, steps_per_epoch: int = STEPS_PER_EPOCH, **changes: Any) -> MFACPruner:
    return make_pruner(
        settings(**changes), make_weights(), steps_per_epoch=steps_per_epoch, live_gradients=live_gradients
    )


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in SHAPES])


def assert_oracle(result, expected: reference.Pruned | None) -> None:
    if expected is None:
        assert result.sparsity == result.predicted_loss_increase == 0
        return
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], expected.masks[name])
        np.testing.assert_allclose(result.weights[name], expected.weights[name], rtol=0, atol=1e-4)
    assert result.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase, rel=1e-3)


def way(now: float, wanted: float, parts_left: int, spacing: str) -> float:
    """The sparsity of the next of several parts, from its definition."""
    if spacing == "linear":
        return now + (wanted - now) / parts_left
    factor = ((1 - wanted) / (1 - now)) ** (1 / parts_left)
    return 1 - (1 - now) * factor


def reached(masks: dict[str, np.ndarray], scope: str) -> dict[str, float]:
    if scope == "layer":
        return {name: float(np.mean(~mask)) for name, mask in masks.items()}
    return {"all": float(np.mean(~flat(masks)))}


def parts_of_live_run(pruner: MFACPruner, last_step: int = 3 * LONG):
    """Yield each part of a whole run: its step, what the oracle makes of the rows before it, and the result."""
    weights, rows = make_weights(), []
    for step in range(last_step):
        if pruner.needs_gradients(step):
            assert pruner.observe(gradient_at(step))
            rows.append(flat(gradient_at(step)))
        while pruner.is_due(step + 1):
            if not pruner.uses_gradients(step + 1):
                yield step + 1, pruner.prune(weights, step + 1), None
                continue
            masks, scheduled, used = pruner.masks, pruner.next_step, np.array(rows[-pruner.num_gradients :])
            settings, part = pruner.settings, pruner.state_dict()["parts_done"]
            left = pruner._progress.substeps - part
            now = reached(masks, settings.scope)
            wanted = {
                name: way(value, scheduled.sparsity, left, settings.recomputation_spacing)
                if left > 1
                else scheduled.sparsity
                for name, value in now.items()
            }
            expected = reference.prune(
                weights,
                used,
                sparsity=wanted if settings.scope == "layer" else wanted["all"],
                masks=masks,
                block_size=20,
                damping=1e-2,
                scope=settings.scope,
                update=settings.update,
                mask_type=settings.mask_type,
                num_recomputations=1,
            )
            result = pruner.prune(weights, step + 1)
            weights = result.weights
            yield step + 1, result, expected
    assert pruner.is_finished


@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("spacing", ["geometric", "linear"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_live_parts_come_one_window_of_rows_after_the_other(scope, spacing, update, caplog):
    """Each part equals the oracle's on the rows that arrived since the part before; the last is done at its time."""
    pruner = make(steps_per_epoch=LONG, scope=scope, recomputation_spacing=spacing, update=update, initial_sparsity=0.0)
    steps = []
    for step, result, expected in parts_of_live_run(pruner):
        assert_oracle(result, expected)
        steps.append(step)
    rows = 7 if pruner.schedule[1].sparsity >= 0.5 else 5
    assert steps == [40, 70, 75, 80, 120 - 2 * rows, 120 - rows, 120]
    assert not caplog.records


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_live_parts_of_a_pattern(scope):
    pruner = make(steps_per_epoch=LONG, scope=scope, mask_type="2:4", initial_sparsity=0.1, final_sparsity=0.5)
    assert [assert_oracle(result, expected) for _, result, expected in parts_of_live_run(pruner)]
    assert all(np.count_nonzero(mask) * 2 == mask.size for name, mask in pruner.masks.items() if name == "c")


def test_live_parts_share_rows_where_there_are_too_few_steps_and_it_is_said_once(caplog):
    pruner = make(initial_sparsity=0.0)  # 8 steps for three parts with 5 rows, then 7
    steps = []
    for step, result, expected in parts_of_live_run(pruner, LAST_STEP):
        assert_oracle(result, expected)
        steps.append(step)
    assert steps == [8, 12, 14, 16, 20, 22, 24]
    (record,) = [each for each in caplog.records if "sub-step" in each.getMessage()]
    assert (
        "sub-step 2 of a pruning step uses 5 gradient samples, of which only 2 have arrived since"
        in record.getMessage()
    )


def test_the_first_pruning_step_does_not_begin_before_its_time(caplog):
    pruner = make(steps_per_epoch=LONG, initial_sparsity=0.5)
    steps = [step for step, result, expected in parts_of_live_run(pruner) if not assert_oracle(result, expected)]
    assert steps[:3] == [40, 40, 40]
    assert "sub-step 2 of a pruning step uses 5 gradient samples, of which only 0 have arrived" in caplog.text


@pytest.mark.parametrize("spacing", ["geometric", "linear"])
def test_sampled_parts_use_the_rows_drawn_for_each(spacing):
    pruner, weights, masks = make(live_gradients=False, recomputation_spacing=spacing), make_weights(), None
    wanted = pruner.next_step.sparsity
    for part in range(3):
        assert pruner.is_due(STEPS_PER_EPOCH) and not pruner.is_finished
        pruner.forget_gradients()
        samples = [gradient_at(100 * part + k) for k in range(pruner.num_gradients)]
        for sample in samples:
            pruner.observe(sample)
        now = {name: 0.0 for name in SHAPES} if masks is None else reached(masks, "layer")
        expected = reference.prune(
            weights,
            np.array([flat(sample) for sample in samples]),
            sparsity={name: way(now[name], wanted, 3 - part, spacing) if part < 2 else wanted for name in SHAPES},
            masks=masks,
            block_size=20,
            damping=1e-2,
            scope="layer",
            update="independent",
            num_recomputations=1,
        )
        result = pruner.prune(weights, STEPS_PER_EPOCH)
        assert_oracle(result, expected)
        weights, masks = result.weights, result.masks
    assert not pruner.is_due(STEPS_PER_EPOCH) and pruner.next_step == pruner.schedule[1]
    assert {name: int(np.sum(~mask)) for name, mask in masks.items()} == {"a": 6, "b": 2, "c": 5}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("final", "parts"), [(0.2, 1), (0.5, 3), (0.9, 10), (0.95, 13)])
def test_auto_removes_about_a_fifth_of_what_is_left_at_most(final, parts, scope):
    weights = {"a": np.linspace(1, 2, 2000).reshape(40, 50), "b": np.linspace(3, 4, 1000)}
    settings = MFACSettings(
        final_sparsity=final, end_epoch=0, num_gradients=4, num_recomputations="auto", scope=scope, damping=1e-2
    )
    pruner = make_pruner(settings, weights, steps_per_epoch=1, live_gradients=False)
    kept = [3000]
    while pruner.is_due(0):
        pruner.forget_gradients()
        for k in range(4):
            rng = np.random.default_rng(k)
            pruner.observe({name: rng.standard_normal(array.shape) for name, array in weights.items()})
        weights = pruner.prune(weights, 0).weights
        kept.append(sum(np.count_nonzero(array) for array in weights.values()))
    assert len(kept) == parts + 1 and kept[-1] == round(3000 * (1 - final))
    factors = np.divide(kept[1:], kept[:-1])
    assert factors.min() > 0.77
    np.testing.assert_allclose(factors, (1 - final) ** (1 / parts), atol=0.01)


def test_auto_counts_from_what_is_pruned_already():
    weights = {"w": np.linspace(1, 2, 100)}
    settings = MFACSettings(final_sparsity=0.9, end_epoch=0, num_gradients=1, num_recomputations="auto")
    for pruned, parts in ((0, 10), (50, 7), (80, 3), (88, 1), (90, 1)):
        pruner = make_pruner(settings, weights, steps_per_epoch=1, masks={"w": np.arange(100) >= pruned})
        assert pruner._progress.substeps == parts


def test_a_step_that_is_reached_early_has_no_further_parts():
    """Two channels: the first part of three that prunes one of them reaches the half."""
    settings = MFACSettings(
        final_sparsity=0.5, end_epoch=0, num_gradients=1, num_recomputations=3, mask_type="channel", damping=1.0
    )
    weights = {"w": np.array([[1.0, 2.0], [1.0, 2.0]])}
    pruner, parts = make_pruner(settings, weights, steps_per_epoch=1, live_gradients=False), 0
    while pruner.is_due(0):
        pruner.forget_gradients()
        pruner.observe({"w": np.ones((2, 2))})
        weights = pruner.prune(weights, 0).weights
        parts += 1
    assert pruner.is_finished and parts <= 3
    np.testing.assert_array_equal(weights["w"][:, 0], 0)


@pytest.mark.parametrize("parts_before", [1, 2, 4, 7])
def test_a_run_resumed_within_a_pruning_step_of_auto_has_the_parts_that_it_began_with(parts_before):
    def run(pruner, weights, done):
        parts = 0
        while pruner.is_due(0):
            if parts == done:
                break
            pruner.forget_gradients()
            part = pruner.state_dict()["parts_done"]
            for k in range(pruner.num_gradients):
                pruner.observe(gradient_at(100 * part + k))
            weights = pruner.prune(weights, 0).weights
            parts += 1
        return weights, parts

    changes = dict(live_gradients=False, start_epoch=0.0, end_epoch=0.0, num_recomputations="auto", final_sparsity=0.9)
    whole, first, second = (make(**changes) for _ in range(3))
    expected, parts = run(whole, make_weights(), None)
    assert parts == 10
    weights, _ = run(first, make_weights(), parts_before)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed, rest = run(second, weights, None)
    assert rest == 10 - parts_before
    for name in SHAPES:
        np.testing.assert_array_equal(resumed[name], expected[name])


def test_the_number_of_parts_changes_the_outcome():
    results = []
    for parts in (1, 2, 3):
        pruner, weights = make(num_recomputations=parts, initial_sparsity=0.8), make_weights()
        for step in range(3, 8):
            pruner.observe(gradient_at(step))
        while pruner.is_due(8):
            weights = pruner.prune(weights, 8).weights
        results.append(weights)
        assert {name: int(np.sum(weights[name] == 0)) for name in SHAPES} == {"a": 24, "b": 9, "c": 19}
    assert all(np.any(results[0]["a"] != other["a"]) for other in results[1:])
    assert np.any(results[1]["a"] != results[2]["a"])


def test_without_a_step_each_call_does_one_part():
    pruner, weights = make(), make_weights()
    pruner.observe(gradient_at(0))
    for done in range(1, 10):
        pruner.observe(gradient_at(done))
        weights = pruner.prune(weights).weights
        assert pruner.next_step == (pruner.schedule[done // 3] if done < 9 else None)
    with pytest.raises(ValueError, match="done"):
        pruner.prune(weights)


def test_a_later_pruning_step_passes_over_the_parts_that_are_left():
    pruner, weights = make(), make_weights()
    for step in range(3, 8):
        pruner.observe(gradient_at(step))
    weights = pruner.prune(weights, 8).weights
    first = pruner.sparsity
    assert pruner.next_step == pruner.schedule[0]
    weights = pruner.prune(weights, 17).weights
    assert pruner.next_step == pruner.schedule[1]
    assert pruner.sparsity == pytest.approx(way(first, pruner.schedule[1].sparsity, 3, "geometric"), abs=0.03)
    while pruner.is_due(17):
        weights = pruner.prune(weights, 17).weights
    assert pruner.next_step == pruner.schedule[2]
    assert pruner.sparsity == pytest.approx(pruner.schedule[1].sparsity, abs=0.02)


def test_a_run_resumes_within_a_pruning_step_that_passed_another_over():
    changes = {"initial_sparsity": 0.6, "num_gradients": {0.0: 6, 0.5: 3}}
    pruner, resumed = make(**changes), make(**changes)
    for step in range(2, 8):
        pruner.observe(gradient_at(step))
    weights = pruner.prune(make_weights(), 17).weights
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    assert resumed.num_rows == pruner.num_rows == 3
    expected, found = (each.prune(weights, 17).weights for each in (pruner, resumed))
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_pruning_step_that_waited_does_all_its_parts_at_once():
    pruner, weights = make(start_epoch=0.0, steps_per_epoch=LONG), make_weights()
    assert not pruner.is_due(0)
    for step in range(5):
        assert not pruner.is_due(step) and pruner.needs_gradients(step)
        pruner.observe(gradient_at(step))
    for _ in range(3):
        assert pruner.is_due(5)
        weights = pruner.prune(weights, 5).weights
    assert not pruner.is_due(5) and pruner.next_step == pruner.schedule[1]


def test_parts_that_come_later_see_the_rows_of_the_meantime():
    pruner, weights = make(), make_weights()
    for step in range(3, 8):
        pruner.observe(gradient_at(step))
    pruner.prune(weights, 8)
    assert pruner.needs_gradients(8) and pruner.is_due(9)
    pruner.observe(gradient_at(8))
    assert pruner.num_rows == 5


def test_a_refused_part_changes_nothing():
    pruner, weights = make(), make_weights()
    pruner.observe(gradient_at(0))
    weights = pruner.prune(weights, 8).weights
    before = copy.deepcopy(pruner.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        pruner.prune({**weights, "a": np.full((5, 6), np.nan)}, 8)
    np.testing.assert_equal(pruner.state_dict(), before)


@pytest.mark.parametrize("live_gradients", [True, False])
@pytest.mark.parametrize("parts_before", [1, 2, 3, 4, 8])
def test_a_run_resumed_within_a_pruning_step_ends_the_same(parts_before, live_gradients, caplog):
    def run(pruner, weights, parts, done=0):
        for part in range(done, done + parts):
            if live_gradients:
                pruner.observe(gradient_at(part))
            else:
                pruner.forget_gradients()
                for k in range(pruner.num_gradients):
                    pruner.observe(gradient_at(100 * part + k))
            weights = pruner.prune(weights).weights
        return weights

    caplog.set_level(logging.ERROR, "mfac_core")
    whole = make(live_gradients)
    expected = run(whole, make_weights(), 9)
    first, second = make(live_gradients), make(live_gradients)
    weights = run(first, make_weights(), parts_before)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.next_step == first.next_step
    resumed = run(second, weights, 9 - parts_before, parts_before)
    for name in SHAPES:
        np.testing.assert_array_equal(resumed[name], expected[name])
    assert second.is_finished


@pytest.mark.parametrize(("parts_done", "parts"), [(-1, 0), (-1, 3), (3, 3), (1, 0), (1, 2), (0, 3)])
def test_a_state_with_other_parts_is_refused(parts_done, parts):
    pruner = make()
    with pytest.raises(ValueError, match=rf"{parts_done} of {parts} sub-steps .* num_recomputations is 3"):
        pruner.load_state_dict({**pruner.state_dict(), "parts_done": parts_done, "parts": parts})


def test_a_state_of_an_older_release_has_the_parts_of_the_recipe():
    pruner, weights = make(), make_weights()
    pruner.observe(gradient_at(0))
    pruner.prune(weights, 8)
    state = pruner.state_dict()
    assert (state["parts_done"], state.pop("parts")) == (1, 3)
    resumed = make()
    resumed.load_state_dict(state)
    np.testing.assert_equal(resumed.state_dict(), pruner.state_dict())


@pytest.mark.parametrize("number", [3, "auto"])
def test_parts_begin_at_the_zeros_that_are_there(number):
    weights = {"w": np.where(np.arange(1000) % 2, np.linspace(1, 2, 1000), 0.0)}
    settings = MFACSettings(final_sparsity=0.9, end_epoch=0, num_gradients=4, num_recomputations=number, damping=1e-2)
    pruner, kept = make_pruner(settings, weights, steps_per_epoch=1, live_gradients=False), [500]
    while pruner.is_due(0):
        pruner.forget_gradients()
        for k in range(4):
            pruner.observe({"w": np.random.default_rng(k).standard_normal(1000)})
        weights = pruner.prune(weights, 0).weights
        kept.append(np.count_nonzero(weights["w"]))
    assert len(kept) == (4 if number == 3 else 11) and kept[-1] == 100
    np.testing.assert_allclose(np.divide(kept[1:], kept[:-1]), 0.2 ** (1 / (len(kept) - 1)), atol=0.02)
