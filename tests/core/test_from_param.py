"""Initial sparsities that are measured from the weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from mfac_core.pruners import make_pruner
from mfac_core.schedules.pruning import sparsity_at
from mfac_core.settings.pruning import FROM_PARAM, MagnitudeSettings, MFACSettings

SHAPES = {"a": (10, 10), "b": (8, 5), "c": (60,)}
ZEROS = {"a": 30, "b": 20, "c": 0}
TOTAL = 200
KINDS = pytest.mark.parametrize("kind", ["mfac", "magnitude"])


def make_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    weights = {}
    for name, shape in SHAPES.items():
        flat = rng.standard_normal(int(np.prod(shape))).astype(np.float32) * 1e-3
        flat[rng.permutation(len(flat))[: ZEROS[name]]] = 0
        weights[name] = flat.reshape(shape)
    return weights


def make(kind: str = "magnitude", weights=None, **changes: Any):
    options = dict(
        initial_sparsity=FROM_PARAM,
        final_sparsity=0.9,
        start_epoch=1.0,
        end_epoch=4.0,
        interpolation="linear",
        **({"num_gradients": 6, "block_size": 30, "damping": 1e-4} if kind == "mfac" else {}),
    )
    made = {"mfac": MFACSettings, "magnitude": MagnitudeSettings}[kind](**{**options, **changes})
    return make_pruner(made, weights or make_weights(), steps_per_epoch=8)


def prune(pruner, weights, step):
    if hasattr(pruner, "num_gradients"):
        rng = np.random.default_rng(step)
        for _ in range(6):
            pruner.observe({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()})
    return pruner.prune(weights, step)


@KINDS
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_first_pruning_step_prunes_exactly_the_zeros(kind, scope):
    pruner, weights = make(kind, scope=scope), make_weights()
    assert pruner.sparsity == 0 and pruner.schedule[0].sparsity == 50 / TOTAL
    result = prune(pruner, weights, 8)
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], weights[name] != 0)
        np.testing.assert_array_equal(result.weights[name], weights[name])
    assert result.sparsity == 50 / TOTAL
    assert result.predicted_loss_increase == (0 if kind == "mfac" else None)


@KINDS
@pytest.mark.parametrize("interpolation", ["linear", "cubic", "inverse_cubic"])
def test_each_layer_follows_its_own_curve(kind, interpolation):
    pruner, weights = make(kind, interpolation=interpolation), make_weights()
    for k, scheduled in enumerate(pruner.schedule):
        result = prune(pruner, weights, scheduled.step)
        weights = result.weights
        for name, shape in SHAPES.items():
            size = int(np.prod(shape))
            wanted = sparsity_at(k / 3, initial=ZEROS[name] / size, final=0.9, interpolation=interpolation)
            assert np.sum(~result.masks[name]) == round(size * wanted)
        assert result.sparsity == pytest.approx(scheduled.sparsity, abs=0.01)
    assert k == 3 and scheduled.sparsity == 0.9


def test_over_all_weights_there_is_one_curve():
    pruner, weights = make(scope="global"), make_weights()
    for k, scheduled in enumerate(pruner.schedule):
        result = prune(pruner, weights, scheduled.step)
        weights = result.weights
        assert scheduled.sparsity == sparsity_at(k / 3, initial=0.25, final=0.9, interpolation="linear")
        assert result.sparsity == round(TOTAL * scheduled.sparsity) / TOTAL


def test_a_measured_sparsity_differs_from_none():
    measured, none = make(), make(initial_sparsity=0.0)
    assert prune(measured, make_weights(), 8).sparsity == 0.25
    assert prune(none, make_weights(), 8).sparsity == 0


def test_masks_given_at_the_start_count_as_zeros():
    masks = {name: np.ones(shape, bool) for name, shape in SHAPES.items()}
    masks["c"][:15] = False
    settings = MagnitudeSettings(initial_sparsity=FROM_PARAM, final_sparsity=0.9, end_epoch=2.0)
    pruner = make_pruner(settings, make_weights(), steps_per_epoch=8, masks=masks)
    assert pruner.schedule[0].sparsity == (30 + 20 + 15) / TOTAL


@KINDS
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_sparser_than_the_final_sparsity_stays_and_is_said_once(kind, scope, caplog):
    pruner, weights = make(kind, scope=scope, final_sparsity=0.2), make_weights()
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "sparser than final_sparsity 0.2" in said[0]
    assert said[0].startswith("a, b:" if scope == "layer" else "the weights:")
    for scheduled in pruner.schedule:
        result = prune(pruner, weights, scheduled.step)
        weights = result.weights
    zeros = {name: int(np.sum(~mask)) for name, mask in result.masks.items()}
    assert zeros == {"a": 30, "b": 20, "c": 12 if scope == "layer" else 0}
    assert len([record for record in caplog.records if "final_sparsity" in record.message]) == 1
    assert scheduled.sparsity == pytest.approx((62 if scope == "layer" else 50) / TOTAL)


def test_a_single_pruning_step_takes_all_zeros_of_what_is_sparser_than_the_final_sparsity():
    pruner, weights = make(start_epoch=1.0, end_epoch=1.0, final_sparsity=0.4), make_weights()
    result = prune(pruner, weights, 8)
    assert {name: int(np.sum(~mask)) for name, mask in result.masks.items()} == {"a": 40, "b": 20, "c": 24}


@pytest.mark.parametrize("final", [0.516, 0.543, 0.77, 0.95])
def test_the_last_pruning_step_has_exactly_the_final_sparsity(final):
    assert make(final_sparsity=final).schedule[-1].sparsity == final


def test_nothing_is_said_where_all_are_below(caplog):
    make()
    assert not caplog.records


def test_only_zeros_that_fit_the_mask_type_count():
    weights = {"a": np.ones((4, 4), np.float32)}
    weights["a"][0] = 0
    weights["a"][1, :2] = 0
    settings = MagnitudeSettings(
        initial_sparsity=FROM_PARAM, final_sparsity=0.75, end_epoch=1.0, mask_type="filter", interpolation="linear"
    )
    pruner = make_pruner(settings, weights, steps_per_epoch=8)
    assert pruner.schedule[0].sparsity == 0.25
    result = pruner.prune(weights, 0)
    assert result.masks["a"].all(axis=1).tolist() == [False, True, True, True]
    pairs = MagnitudeSettings(initial_sparsity=FROM_PARAM, final_sparsity=0.5, end_epoch=1.0, mask_type="2:4")
    assert make_pruner(pairs, weights, steps_per_epoch=8).schedule[0].sparsity == 4 / 16


@KINDS
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_a_resumed_run_goes_on_from_the_sparsities_of_its_start(kind, scope, steps_before):
    def run(pruner, weights, first, last):
        for scheduled in pruner.schedule[first:last]:
            result = prune(pruner, weights, scheduled.step)
            weights = result.weights
        return weights

    whole = make(kind, scope=scope)
    expected = run(whole, make_weights(), 0, 4)
    first = make(kind, scope=scope)
    weights = run(first, make_weights(), 0, steps_before)
    sparser = {name: np.where(np.abs(array) > 1e-3, array, np.float32(0)) for name, array in weights.items()}
    second = make(kind, weights=sparser, scope=scope)
    assert second.schedule != whole.schedule
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.schedule == whole.schedule
    resumed = run(second, weights, steps_before, 4)
    for name in SHAPES:
        np.testing.assert_array_equal(resumed[name], expected[name])


def test_a_state_whose_sparsities_do_not_fit_is_refused_and_changes_nothing():
    pruner = make()
    schedule, state = pruner.schedule, pruner.state_dict()
    other = make(scope="global").state_dict()
    for wrong in (
        {**state, "initial_sparsities": np.array([0.5])},
        {**state, "initial_sparsities": np.array([0.3, 0.5, np.nan])},
        {**state, "initial_sparsities": np.array([0.3, 0.5, 0.1])},
        {**state, "masks": {"a": np.ones((10, 10), bool)}},
        {**make(initial_sparsity=0.1).state_dict()},
        other,
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            pruner.load_state_dict(wrong)
        assert pruner.schedule == schedule
        np.testing.assert_equal(pruner.state_dict(), state)


def test_a_state_of_another_number_of_layers_is_refused_by_name():
    pruner = make()
    with pytest.raises(
        ValueError, match="another recipe or model: it contains 2 initial sparsities, but this run has 3"
    ):
        pruner.load_state_dict({**pruner.state_dict(), "initial_sparsities": np.array([0.1, 0.2])})


def test_weights_that_are_all_zero_stay_so():
    weights = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for scope in ("layer", "global"):
        pruner = make(weights=weights, scope=scope)
        assert prune(pruner, weights, 8).sparsity == 1


@pytest.mark.parametrize("parts", [1, 3, "auto"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_single_pruning_step_at_step_0_draws_on_gradients(scope, parts):
    """It is the first, which prunes the zeros that are there, and the last, which prunes more."""
    changes = dict(scope=scope, start_epoch=0.0, end_epoch=0.0, num_recomputations=parts)
    pruner, weights = make("mfac", **changes), make_weights()
    assert pruner.uses_gradients(0) and not pruner.is_due(0)
    for step in range(6):
        assert pruner.needs_gradients(step)
        rng = np.random.default_rng(step)
        pruner.observe({name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()})
    while pruner.is_due(6):
        weights = pruner.prune(weights, 6).weights
    assert pruner.sparsity == 0.9


def test_a_single_pruning_step_at_step_0_that_is_reached_waits_for_nothing():
    weights = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    pruner = make("mfac", weights, start_epoch=0.0, end_epoch=0.0)
    assert pruner.is_due(0) and not pruner.uses_gradients(0)
    assert pruner.prune(weights, 0).sparsity == 1


@pytest.mark.parametrize("parts", [3, "auto"])
def test_a_layer_of_zeros_is_no_matter_to_the_parts_of_the_others(parts):
    weights = {**make_weights(), "b": np.zeros(SHAPES["b"], np.float32)}
    pruner = make("mfac", weights, num_recomputations=parts, final_sparsity=0.8)
    for step in range(8, 33):
        while pruner.is_due(step) or (step == 8 and not pruner.sparsity):
            weights = prune(pruner, weights, step).weights
    assert {name: int(np.sum(~mask)) for name, mask in pruner.masks.items()} == {"a": 80, "b": 40, "c": 48}
