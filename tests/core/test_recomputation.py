"""Pruning steps that are done in several parts, each by a Fisher of its own."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest

from mfac_core.pruner import MFACPruner, make_pruner
from mfac_core.settings import MFACSettings
from tests import reference

SHAPES = {"a": (5, 6), "b": (11,), "c": (2, 4, 3)}
STEPS_PER_EPOCH = 8
LAST_STEP = 3 * STEPS_PER_EPOCH


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


def make(live_gradients: bool = True, **changes: Any) -> MFACPruner:
    return make_pruner(
        settings(**changes), make_weights(), steps_per_epoch=STEPS_PER_EPOCH, live_gradients=live_gradients
    )


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in SHAPES])


def assert_oracle(result, expected: reference.Pruned) -> None:
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], expected.masks[name])
        np.testing.assert_allclose(result.weights[name], expected.weights[name], rtol=0, atol=1e-4)
    assert result.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase, rel=1e-3)


@pytest.mark.parametrize("mask_type", ["unstructured", "2:4"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_live_parts_share_the_rows_of_the_window(scope, mask_type):
    """A pruning step in parts equals the oracle's; its loss is the sum over the parts."""
    final = 0.5 if mask_type == "2:4" else 0.8
    pruner, weights, rows, steps = make(scope=scope, mask_type=mask_type, final_sparsity=final), make_weights(), [], 0
    for step in range(LAST_STEP):
        if pruner.needs_gradients(step):
            pruner.observe(gradient_at(step))
            rows.append(flat(gradient_at(step)))
        if not pruner.is_due(step + 1):
            continue
        used = np.array(rows[-pruner.num_gradients :])
        options = dict(block_size=20, damping=1e-2, scope=scope, mask_type=mask_type, masks=pruner.masks)
        options |= {"sparsity": pruner.next_step.sparsity, "num_recomputations": 3}
        expected = reference.prune(weights, used, **options)
        increases, sparsities = [], [pruner.sparsity]
        while pruner.is_due(step + 1):
            result = pruner.prune(weights, step + 1)
            weights = result.weights
            increases.append(result.predicted_loss_increase)
            sparsities.append(result.sparsity)
        assert len(increases) == 3
        if mask_type == "unstructured":  # rounded in each of three layers
            np.testing.assert_allclose(np.diff(sparsities, n=2), 0, atol=3 / 65)
        assert_oracle(
            type(result)(weights, result.masks, result.sparsity, sum(increases)),
            expected,
        )
        rows = rows[-pruner.num_gradients :]
        steps += 1
    assert steps == len(pruner.schedule) and pruner.is_finished


def test_sampled_parts_use_the_rows_drawn_for_each():
    pruner, weights, masks = make(live_gradients=False), make_weights(), None
    wanted = pruner.next_step.sparsity
    for part in range(3):
        assert pruner.is_due(STEPS_PER_EPOCH) and not pruner.is_finished
        pruner.forget_gradients()
        samples = [gradient_at(100 * part + k) for k in range(pruner.num_gradients)]
        for sample in samples:
            pruner.observe(sample)
        pruned = {} if masks is None else masks
        now = {name: float(np.mean(~pruned[name])) if pruned else 0.0 for name in SHAPES}
        expected = reference.prune(
            weights,
            np.array([flat(sample) for sample in samples]),
            sparsity={name: now[name] + (wanted - now[name]) / (3 - part) for name in SHAPES},
            masks=masks,
            block_size=20,
            damping=1e-2,
        )
        result = pruner.prune(weights, STEPS_PER_EPOCH)
        assert_oracle(result, expected)
        weights, masks = result.weights, result.masks
    assert not pruner.is_due(STEPS_PER_EPOCH) and pruner.next_step == pruner.schedule[1]
    assert {name: int(np.sum(~mask)) for name, mask in masks.items()} == {"a": 6, "b": 2, "c": 5}


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
    way = pruner.schedule[1].sparsity - first
    assert pruner.sparsity == pytest.approx(first + way / 3, abs=0.03)
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
    pruner, weights = make(start_epoch=0.0), make_weights()
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


@pytest.mark.parametrize("parts_done", [-1, 3])
def test_a_state_with_other_parts_is_refused(parts_done):
    pruner = make()
    with pytest.raises(ValueError, match=rf"{parts_done} parts .* num_recomputations is 3"):
        pruner.load_state_dict({**pruner.state_dict(), "parts_done": parts_done})
