"""Pruning steps that ask for no more zeros than there are: no Fisher, no rows, no waiting, no warning."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mfac_core import MagnitudeSettings, MFACPruner, MFACSettings, make_pruner
from mfac_core.masks.layout import WeightLayout
from mfac_core.masks.patterns import mask_patterns
from mfac_core.masks.selection import MaskRule, newly_pruned
from mfac_core.masks.sparsity import is_reached
from mfac_core.settings.pruning import FROM_PARAM
from tests import reference

SHAPES = {"a": (5, 6), "b": (2, 5)}
STEPS_PER_EPOCH = 8


def make_weights(zeros: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    weights = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    for array in weights.values():
        array[:, :zeros] = 0
    return weights


def gradient_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1000 + step)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def make(weights: Any = None, live_gradients: bool = True, **changes: Any) -> MFACPruner:
    usual = dict(final_sparsity=0.8, start_epoch=1.0, end_epoch=3.0, num_gradients=5, block_size=20, damping=1e-2)
    return make_pruner(
        MFACSettings(**{**usual, **changes}),
        make_weights() if weights is None else weights,
        steps_per_epoch=STEPS_PER_EPOCH,
        live_gradients=live_gradients,
    )


@pytest.fixture
def no_fisher(monkeypatch, caplog):
    """No Fisher is computed, and nothing is said."""
    caplog.set_level(logging.INFO, "mfac_core")
    with monkeypatch.context() as patch:
        patch.setattr("mfac_core.pruners.mfac.mfac_step", lambda *_, **__: pytest.fail("a Fisher is computed"))
        yield
    assert not caplog.records


@pytest.mark.parametrize("num_recomputations", [1, 3])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("mask_type", ["unstructured", "1:2", "filter", (1, -1)])
@pytest.mark.parametrize("start_epoch", [0.0, 1.0])
def test_the_first_step_at_sparsity_0_needs_nothing(start_epoch, mask_type, scope, num_recomputations, no_fisher):
    changes = dict(start_epoch=start_epoch, mask_type=mask_type, scope=scope, final_sparsity=0.5)
    pruner, weights = make(**changes, num_recomputations=num_recomputations), make_weights()
    first = round(start_epoch * STEPS_PER_EPOCH)
    first_part = first + STEPS_PER_EPOCH - (num_recomputations - 1) * 2
    assert not any(pruner.needs_gradients(step) for step in range(first_part - 5))
    assert pruner.is_due(first) and not pruner.uses_gradients(first)
    result = pruner.prune(weights, first)
    assert result.predicted_loss_increase == 0.0 and result.sparsity == 0
    assert all(np.array_equal(result.weights[name], weights[name]) for name in SHAPES)
    assert all(mask.all() for mask in result.masks.values())
    assert not pruner.is_due(first) and pruner.next_step == pruner.schedule[1]
    assert pruner.uses_gradients(pruner.schedule[1].step)


@pytest.mark.parametrize("num_gradients", [3, 12, {0.0: 5, 0.3: 12}])
def test_the_step_that_follows_has_the_last_rows(num_gradients):
    """Its window may begin before the step that prunes nothing."""
    pruner, weights, rows = make(num_gradients=num_gradients, end_epoch=2.0), make_weights(), []
    wanted = 5 if isinstance(num_gradients, dict) else num_gradients
    for step in range(2 * STEPS_PER_EPOCH):
        assert pruner.needs_gradients(step) == (step >= 16 - wanted)
        if pruner.needs_gradients(step):
            pruner.observe(gradient_at(step))
            rows.append(np.concatenate([array.ravel() for array in gradient_at(step).values()]))
        if pruner.is_due(step + 1):
            masks, sparsity = pruner.masks, pruner.next_step.sparsity
            result = pruner.prune(weights, step + 1)
    assert pruner.is_finished and len(rows) == wanted
    one_pass = dict(scope="layer", update="independent", num_recomputations=1)
    expected = reference.prune(
        weights, np.array(rows), sparsity=sparsity, masks=masks, block_size=20, damping=1e-2, **one_pass
    )
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], expected.masks[name])
        np.testing.assert_allclose(result.weights[name], expected.weights[name], rtol=0, atol=1e-4)


def test_rows_are_kept_over_a_step_that_prunes_nothing():
    pruner = make(num_gradients=5)
    for number in range(3):
        pruner.observe(gradient_at(number))
    before = copy.deepcopy(pruner.state_dict()["window"])
    pruner.prune(make_weights(), 8)
    np.testing.assert_equal(pruner.state_dict()["window"], before)


def test_a_plateau_asks_for_nothing_once_it_is_reached(monkeypatch):
    pruner, weights = make(initial_sparsity=0.5, final_sparsity=0.5), make_weights()
    for step in range(8):
        assert pruner.needs_gradients(step) == (step >= 3)
        pruner.observe(gradient_at(step))
    weights = pruner.prune(weights, 8).weights
    assert pruner.sparsity == 0.5 and pruner.num_rows == 0
    moved = {name: array * 1.5 for name, array in weights.items()}
    monkeypatch.setattr("mfac_core.pruners.mfac.mfac_step", lambda *_, **__: pytest.fail("a Fisher is computed"))
    for step in (16, 24):
        assert not any(pruner.needs_gradients(before) for before in range(step - 8, step))
        assert pruner.is_due(step) and not pruner.uses_gradients(step)
        result = pruner.prune(moved, step)
        assert all(np.array_equal(result.weights[name], moved[name]) for name in SHAPES)
        assert result.sparsity == 0.5 and result.predicted_loss_increase == 0
    assert pruner.is_finished


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("num_recomputations", [1, 2])
def test_zeros_that_are_there_become_masks_before_training(scope, num_recomputations, no_fisher):
    weights = make_weights(zeros=2)
    pruner = make(
        weights, initial_sparsity=FROM_PARAM, start_epoch=0.0, scope=scope, num_recomputations=num_recomputations
    )
    assert pruner.is_due(0) and not pruner.uses_gradients(0)
    while pruner.is_due(0):
        result = pruner.prune(weights, 0)
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], weights[name] != 0)
        np.testing.assert_array_equal(result.weights[name], weights[name])
    assert result.predicted_loss_increase == 0


def test_zeros_that_are_still_there_later_become_masks_without_a_fisher(no_fisher):
    weights = make_weights(zeros=2)
    pruner = make(weights, initial_sparsity=FROM_PARAM)
    assert pruner.needs_gradients(7), "they may have moved by then"
    pruner.observe(gradient_at(7))
    result = pruner.prune(weights, 8)
    assert all(np.array_equal(result.masks[name], weights[name] != 0) for name in SHAPES)
    assert result.predicted_loss_increase == 0


def test_zeros_that_have_moved_meanwhile_are_chosen_by_a_fisher():
    pruner = make(make_weights(zeros=2), initial_sparsity=FROM_PARAM)
    assert not pruner.is_due(8), "it waits for rows"
    pruner.observe(gradient_at(7))
    result = pruner.prune(make_weights(), 8)
    assert result.predicted_loss_increase > 0 and result.sparsity == pytest.approx(pruner.schedule[0].sparsity)


def test_layers_that_are_too_sparse_already_ask_for_nothing():
    masks = {name: np.arange(np.prod(shape)).reshape(shape) % 10 == 0 for name, shape in SHAPES.items()}
    settings = MFACSettings(final_sparsity=0.8, end_epoch=3.0, num_gradients=4)
    pruner = make_pruner(settings, make_weights(), steps_per_epoch=STEPS_PER_EPOCH, masks=masks)
    assert not any(pruner.needs_gradients(step) for step in range(40))
    assert not any(pruner.uses_gradients(scheduled.step) for scheduled in pruner.schedule)
    while not pruner.is_finished:
        pruner.prune(make_weights())
    assert pruner.sparsity == 0.9


def test_with_a_sampler_no_samples_are_asked_for(no_fisher):
    pruner = make(live_gradients=False)
    assert pruner.is_due(8) and not pruner.uses_gradients(8)
    pruner.prune(make_weights(), 8)
    assert not pruner.uses_gradients(15) and pruner.uses_gradients(16) and pruner.is_due(16)
    assert not any(pruner.needs_gradients(step) for step in range(20))


def test_a_resumed_run_knows_which_steps_prune():
    pruner, resumed = make(), make()
    pruner.prune(make_weights(), 8)
    resumed.load_state_dict(pruner.state_dict())
    steps = range(8, 30)
    for ask in ("needs_gradients", "uses_gradients", "is_due"):
        assert [getattr(resumed, ask)(step) for step in steps] == [getattr(pruner, ask)(step) for step in steps]


def test_other_pruners_use_no_gradients():
    settings = MagnitudeSettings(final_sparsity=0.8, end_epoch=3.0)
    assert not make_pruner(settings, make_weights(), steps_per_epoch=8).uses_gradients(16)


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["layer", "global"]),
    st.sampled_from(["unstructured", "1:2", "2:3", "filter", "channel", (2, 1)]),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_a_sparsity_that_is_reached_chooses_nothing(scope, mask_type, sparsity, seed):
    rng = np.random.default_rng(seed)
    layout = WeightLayout({"a": (4, 6), "b": (2, 12), "c": (6, 2)})
    patterns = mask_patterns(mask_type, layout.shapes, None)
    kept = rng.random(layout.num_weights) < rng.random()
    rule = MaskRule(layout.segments, scope, patterns)
    chosen = newly_pruned(rng.random(int(kept.sum())), kept, sparsity, rule)
    if is_reached(~kept, sparsity, rule):
        assert not chosen.any()
    elif patterns is None:
        assert chosen.any()
    weights = np.where(rng.random(layout.num_weights) < 0.5, 0.0, rng.random(layout.num_weights))
    if is_reached(~kept | (weights == 0), sparsity, rule):
        assert not weights[kept][newly_pruned(weights[kept], kept, sparsity, rule)].any()
