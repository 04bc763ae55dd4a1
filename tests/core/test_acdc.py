"""Alternating compressed and decompressed training, and zeros that are held: masks that let weights go again."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from mfac_core.pruners import ACDCPruner, ConstantPruner, make_pruner
from mfac_core.settings.pruning import ACDCSettings, ConstantSettings
from tests import reference

SHAPES = {"a": (4, 6), "b": (2, 8), "c": (6, 2, 3)}
TOTAL = 76
STEPS_PER_EPOCH = 4


def make_weights(seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def acdc(**changes: Any) -> ACDCPruner:
    usual = dict(compression_sparsity=0.75, start_epoch=1.0, end_epoch=7.0, update_frequency=1.5)
    return make_pruner(ACDCSettings(**{**usual, **changes}), make_weights(), steps_per_epoch=STEPS_PER_EPOCH)


def constant(weights=None, **changes: Any) -> ConstantPruner:
    return make_pruner(ConstantSettings(**changes), weights or make_weights(), steps_per_epoch=STEPS_PER_EPOCH)


def train(pruner, weights, first: int, last: int) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Move all weights a little in each step, hold the masks, and prune when it is due."""
    results = []
    masks = pruner.masks
    for step in range(first, last):
        while pruner.is_due(step):
            results.append((step, pruner.prune(weights, step)))
            weights, masks = results[-1][1].weights, results[-1][1].masks
        rng = np.random.default_rng(step)
        moved = {name: array + 0.5 * rng.standard_normal(array.shape) for name, array in weights.items()}
        weights = {name: (moved[name] * masks[name]).astype(np.float32) for name in SHAPES}
    return weights, results


def test_phases_alternate_and_the_run_ends_compressed():
    pruner = acdc()
    assert [tuple(scheduled) for scheduled in pruner.schedule] == [
        (4, 1.0, 0.0),
        (10, 2.5, 0.75),
        (16, 4.0, 0.0),
        (22, 5.5, 0.75),
        (28, 7.0, 0.75),
    ]
    _, results = train(pruner, make_weights(), 0, 30)
    assert [step for step, _ in results] == [4, 10, 16, 22, 28]
    assert [result.sparsity for _, result in results] == [0.0, 0.75, 0.0, 0.75, 0.75]
    assert all(mask.all() for mask in results[2][1].masks.values())
    assert pruner.is_finished and not pruner.is_released and pruner.sparsity == 0.75
    for name in SHAPES:
        np.testing.assert_array_equal(results[3][1].masks[name], results[4][1].masks[name])


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("mask_type", ["unstructured", "2:4"])
def test_a_compressed_phase_keeps_the_largest_of_all_weights(scope, mask_type):
    sparsity = 0.75 if mask_type == "unstructured" else 0.5
    pruner = acdc(scope=scope, mask_type=mask_type, compression_sparsity=sparsity)
    weights, _ = train(pruner, make_weights(), 0, 22)
    result = pruner.prune(weights, 22)
    # without gradients the dense oracle prunes by magnitude and moves nothing
    expected = reference.prune(weights, np.zeros((1, TOTAL)), sparsity=sparsity, scope=scope, mask_type=mask_type)
    for name in SHAPES:
        np.testing.assert_array_equal(result.masks[name], expected.masks[name])
        np.testing.assert_array_equal(result.weights[name], expected.weights[name])
    assert result.predicted_loss_increase is None


def test_a_second_compression_may_choose_other_weights():
    _, results = train(acdc(), make_weights(), 0, 30)
    first, second = results[1][1].masks, results[3][1].masks
    assert any(np.any(second[name] & ~first[name]) for name in SHAPES)


def test_weights_come_back_from_zero():
    pruner = acdc()
    weights, _ = train(pruner, make_weights(), 0, 16)
    zeros = {name: weights[name] == 0 for name in SHAPES}
    result = pruner.prune(weights, 16)
    for name in SHAPES:
        np.testing.assert_array_equal(result.weights[name], weights[name])
        assert np.any(zeros[name])


@pytest.mark.parametrize("reset_momentum", [True, False])
def test_the_optimizer_is_reset_where_weights_come_back(reset_momentum):
    _, results = train(acdc(reset_momentum=reset_momentum), make_weights(), 0, 30)
    assert [result.resets_optimizer for _, result in results] == [False, False, reset_momentum, False, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"compression_sparsity": 0.5},
        {"update_frequency": 1.0},
        {"start_epoch": 2.0},
        {"end_epoch": 4.0},
        {"scope": "layer"},
        {"mask_type": "filter"},
    ],
    ids=str,
)
def test_each_setting_changes_the_outcome(changes):
    usual, _ = train(acdc(), make_weights(), 0, 26)
    again, _ = train(acdc(), make_weights(), 0, 26)
    other, _ = train(acdc(**changes), make_weights(), 0, 26)
    assert all(np.array_equal(usual[name], again[name]) for name in SHAPES)
    assert any(np.any(usual[name] != other[name]) for name in SHAPES)


def test_axes_turn_the_groups():
    weights = {"a": np.arange(1.0, 7.0).reshape(2, 3)}
    settings = ACDCSettings(compression_sparsity=0.5, end_epoch=0.0, mask_type="filter", scope="layer")
    plain = make_pruner(settings, weights, steps_per_epoch=1).prune(weights, 0)
    turned = make_pruner(settings, weights, steps_per_epoch=1, axes={"a": (1, 0)}).prune(weights, 0)
    np.testing.assert_array_equal(plain.masks["a"], [[False] * 3, [True] * 3])
    np.testing.assert_array_equal(turned.masks["a"], [[False, False, True]] * 2)


def test_a_rounded_sparsity_means_exactly_n_of_m():
    weights = {"a": np.arange(1.0, 301.0).reshape(1, 300)}
    settings = ACDCSettings(compression_sparsity=0.66, end_epoch=0.0, mask_type="1:3")
    result = make_pruner(settings, weights, steps_per_epoch=1).prune(weights, 0)
    assert set(result.masks["a"].reshape(-1, 3).sum(axis=1)) == {1}


def test_masks_are_released_after_the_end_where_they_are_not_left():
    pruner = acdc(leave_enabled=False)
    train(pruner, make_weights(), 0, 28)
    assert not pruner.is_released
    train(pruner, make_weights(), 28, 29)
    assert pruner.is_released


def test_missed_phases_are_passed_over():
    pruner = acdc()
    result = pruner.prune(make_weights(), 23)
    assert result.sparsity == 0.75 and pruner.next_step == pruner.schedule[4]
    pruner = acdc()
    pruner.prune(make_weights(), 10)
    assert pruner.prune(make_weights(), 17).resets_optimizer


@pytest.mark.parametrize("killed_at", range(0, 30, 3))
def test_a_resumed_run_ends_bit_for_bit_the_same(killed_at):
    expected, _ = train(acdc(), make_weights(), 0, 30)
    first, second = acdc(), acdc()
    weights, _ = train(first, make_weights(), 0, killed_at)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed, _ = train(second, weights, killed_at, 30)
    for name in SHAPES:
        np.testing.assert_array_equal(resumed[name], expected[name])


@pytest.mark.parametrize("pruner", [acdc(), constant()], ids=["acdc", "constant"])
def test_no_gradients_are_wanted(pruner):
    assert not any(pruner.needs_gradients(step) for step in range(30))
    assert (pruner.num_rows, pruner.refused_rows) == (0, 0)
    with pytest.raises(TypeError, match="uses no gradients"):
        pruner.observe(make_weights())


def sparse_weights() -> dict[str, np.ndarray]:
    return {name: np.where(np.abs(array) > 0.5, array, np.float32(0)) for name, array in make_weights().items()}


def test_zeros_are_held_from_the_start_and_let_go_at_the_end():
    weights = sparse_weights()
    zeros = sum(int(np.sum(array == 0)) for array in weights.values())
    pruner = constant(weights, start_epoch=1.0, end_epoch=3.0)
    assert [tuple(scheduled) for scheduled in pruner.schedule] == [(4, 1.0, zeros / TOTAL), (12, 3.0, 0.0)]
    assert not pruner.is_due(3) and pruner.is_due(4)
    held = pruner.prune(weights, 4)
    for name in SHAPES:
        np.testing.assert_array_equal(held.masks[name], weights[name] != 0)
        np.testing.assert_array_equal(held.weights[name], weights[name])
    assert held.sparsity == zeros / TOTAL and not pruner.is_released and not held.resets_optimizer
    assert not pruner.is_due(11) and pruner.is_due(12)
    released = pruner.prune(held.weights, 12)
    assert all(mask.all() for mask in released.masks.values())
    for name in SHAPES:
        np.testing.assert_array_equal(released.weights[name], weights[name])
    assert pruner.is_released and pruner.is_finished and pruner.sparsity == 0


def test_the_zeros_of_the_start_count_and_not_those_of_the_beginning():
    pruner = constant(make_weights(), start_epoch=1.0)
    assert pruner.schedule[0].sparsity == 0
    assert pruner.prune(sparse_weights(), 4).sparsity > 0.2


def test_without_an_end_zeros_are_held_to_the_end():
    for leave_enabled in (True, False):
        pruner = constant(sparse_weights(), leave_enabled=leave_enabled)
        result = pruner.prune(sparse_weights(), 0)
        assert pruner.is_finished and not pruner.is_released and result.sparsity > 0.2
        assert not pruner.is_due(10**9) and pruner.next_step is None


def test_an_end_that_is_the_start_holds_nothing():
    pruner = constant(sparse_weights(), end_epoch=0.0)
    result = pruner.prune(sparse_weights(), 0)
    assert pruner.is_released and result.sparsity == 0
    for name, array in sparse_weights().items():
        np.testing.assert_array_equal(result.weights[name], array)


def test_zeros_that_are_held_resume_whatever_the_weights_show_then():
    first = constant(sparse_weights(), end_epoch=3.0)
    weights = first.prune(sparse_weights(), 0).weights
    second = constant(make_weights(), end_epoch=3.0)
    second.load_state_dict(first.state_dict())
    for name in SHAPES:
        np.testing.assert_array_equal(second.masks[name], weights[name] != 0)
    assert not second.is_due(11) and second.is_due(12)
    with pytest.raises(ValueError, match="another pruning schedule"):
        constant(end_epoch=2.0).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="was saved by ConstantPruner"):
        acdc().load_state_dict(first.state_dict())


def test_masks_given_at_the_start_are_held_with_the_zeros():
    masks = {name: np.arange(array.size).reshape(array.shape) % 3 > 0 for name, array in make_weights().items()}
    pruner = make_pruner(ConstantSettings(), sparse_weights(), steps_per_epoch=1, masks=masks)
    result = pruner.prune(sparse_weights(), 0)
    for name, array in sparse_weights().items():
        np.testing.assert_array_equal(result.masks[name], masks[name] & (array != 0))
        assert not np.any(result.weights[name][~masks[name]])


def test_what_is_zero_throughout_is_not_held_unless_it_is_named(caplog):
    weights = {"a": np.array([0.0, 1.0]), "b": np.zeros(2), "c": np.zeros(2)}
    pruner = constant(weights, params=("__ALL__", "c"))
    assert pruner.schedule[0].sparsity == 0.5
    result = pruner.prune({name: array.copy() for name, array in weights.items()}, step=0)
    assert {name: mask.tolist() for name, mask in result.masks.items()} == {
        "a": [False, True],
        "b": [True, True],
        "c": [False, False],
    }
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "not held: b; to hold them at zero, list them by name in params" in warning
