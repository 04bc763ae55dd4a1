from __future__ import annotations

import tracemalloc
from functools import partial

import numpy as np
import pytest

import mfac_core
from tests import reference

SHAPES = {"first": (6, 4), "second": (3,), "third": (2, 3, 5)}
TOTAL = 57
TOLERANCE = {np.float32: 1e-4, np.float64: 1e-9}

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
UPDATES = pytest.mark.parametrize("update", ["independent", "joint"])
SCOPES = pytest.mark.parametrize("scope", ["layer", "global"])


def make_weights(dtype=np.float64, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def make_gradients(m=7, dtype=np.float64, seed=1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, TOTAL)).astype(dtype)


def make_masks(pruned=0.3, seed=2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.random(shape) >= pruned for name, shape in SHAPES.items()}


def by_name(gradients: np.ndarray) -> dict[str, np.ndarray]:
    parts, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        parts[name] = gradients[:, start : start + size].reshape(len(gradients), *shape)
        start += size
    return parts


def assert_same(result, expected: reference.Pruned, dtype) -> None:
    assert list(result.weights) == list(result.masks) == list(expected.weights)
    largest = max(np.max(np.abs(weights)) for weights in expected.weights.values())
    for name, weights in expected.weights.items():
        assert result.masks[name].dtype == np.bool_
        np.testing.assert_array_equal(result.masks[name], expected.masks[name])
        assert result.weights[name].dtype == dtype
        np.testing.assert_allclose(result.weights[name], weights, rtol=0, atol=TOLERANCE[dtype] * largest)
        assert not np.any(result.weights[name][~result.masks[name]])
    assert result.sparsity == pytest.approx(expected.sparsity, rel=1e-12)
    assert result.predicted_loss_increase == pytest.approx(
        expected.predicted_loss_increase, rel=10 * TOLERANCE[dtype], abs=1e-30
    )


@DTYPES
@UPDATES
@SCOPES
@pytest.mark.parametrize("m, block_size", [(7, 10), (10, 10), (25, 10), (7, 100), (7, None), (70, None), (1, 8)])
@pytest.mark.parametrize("masked", [False, True], ids=["from dense", "with masks"])
def test_matches_the_dense_oracle(m, block_size, masked, scope, update, dtype):
    weights, gradients = make_weights(dtype), make_gradients(m, dtype)
    masks = make_masks() if masked else None
    options = dict(sparsity=0.6, masks=masks, block_size=block_size, damping=1e-3, scope=scope, update=update)
    result = mfac_core.prune(weights, gradients, **options)
    assert_same(result, reference.prune(weights, gradients, **options), dtype)


@DTYPES
@UPDATES
@pytest.mark.parametrize("damping", [1e-6, 1e-1, 10.0])
@pytest.mark.parametrize("sparsity", [0.02, 0.5, 0.97])
def test_matches_the_dense_oracle_over_dampings_and_sparsities(sparsity, damping, update, dtype):
    weights, gradients = make_weights(dtype), make_gradients(12, dtype)
    options = dict(sparsity=sparsity, block_size=20, damping=damping, scope="global", update=update)
    assert_same(mfac_core.prune(weights, gradients, **options), reference.prune(weights, gradients, **options), dtype)


def test_the_defaults():
    weights, gradients = make_weights(), make_gradients()
    assert_same(
        mfac_core.prune(weights, gradients, sparsity=0.5), reference.prune(weights, gradients, sparsity=0.5), np.float64
    )


@UPDATES
def test_blocks_are_cut_over_the_unpruned_weights_across_arrays(update):
    weights, gradients, masks = make_weights(), make_gradients(), make_masks(0.5)
    options = dict(block_size=9, damping=1e-3, update=update, scope="global")
    result = mfac_core.prune(weights, gradients, masks=masks, sparsity=40 / TOTAL, **options)
    kept = np.concatenate([masks[name].ravel() for name in SHAPES])
    unpruned = np.concatenate([weights[name].ravel() for name in SHAPES])[kept]
    left = (40 - np.sum(~kept)) / np.sum(kept)
    expected = mfac_core.prune(unpruned, gradients[:, kept], sparsity=left, **options)
    flat = np.concatenate([result.weights[name].ravel() for name in SHAPES])
    np.testing.assert_allclose(flat[kept], expected.weights, rtol=1e-9)
    assert np.count_nonzero(flat) == TOTAL - 40


@SCOPES
@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 0.99])
def test_zero_counts_are_exact(sparsity, scope):
    result = mfac_core.prune(make_weights(), make_gradients(), sparsity=sparsity, scope=scope)
    zeros = {name: int(np.sum(~mask)) for name, mask in result.masks.items()}
    if scope == "global":
        assert sum(zeros.values()) == round(TOTAL * sparsity)
    else:
        assert zeros == {name: round(int(np.prod(shape)) * sparsity) for name, shape in SHAPES.items()}
    assert result.sparsity == sum(zeros.values()) / TOTAL
    for name, weights in result.weights.items():
        assert np.count_nonzero(weights == 0) == zeros[name]


def test_the_two_scopes_differ():
    weights, gradients = make_weights(), make_gradients()
    weights["first"] *= 100
    layer = mfac_core.prune(weights, gradients, sparsity=0.5, scope="layer")
    overall = mfac_core.prune(weights, gradients, sparsity=0.5, scope="global")
    assert np.sum(~layer.masks["first"]) == 12
    assert np.sum(~overall.masks["first"]) < 12


def test_the_joint_update_has_the_least_predicted_loss_of_the_same_pruned_set():
    weights, gradients = make_weights(), make_gradients(20)
    options = dict(sparsity=0.5, block_size=30, damping=1e-3, num_recomputations=1)
    joint = mfac_core.prune(weights, gradients, update="joint", **options)
    independent = mfac_core.prune(weights, gradients, update="independent", **options)
    for name in SHAPES:
        np.testing.assert_array_equal(joint.masks[name], independent.masks[name])
    assert 0 < joint.predicted_loss_increase < independent.predicted_loss_increase


def test_both_updates_are_the_same_for_a_single_pruned_weight():
    weights, gradients = make_weights(), make_gradients(20)
    options = dict(sparsity=1 / TOTAL, block_size=30, damping=1e-3, scope="global")
    joint = mfac_core.prune(weights, gradients, update="joint", **options)
    independent = mfac_core.prune(weights, gradients, update="independent", **options)
    for name in SHAPES:
        np.testing.assert_allclose(joint.weights[name], independent.weights[name], rtol=1e-9)
    flat = np.concatenate([weights[name].ravel() for name in SHAPES])
    inverse = reference.exact_inverse(gradients, 1e-3, 30)
    assert joint.predicted_loss_increase == pytest.approx(reference.saliency(flat, np.diag(inverse)).min(), rel=1e-9)


def test_without_gradients_pruning_is_by_magnitude_and_moves_nothing():
    weights = make_weights()
    for update in ("independent", "joint"):
        result = mfac_core.prune(
            weights, np.zeros((3, TOTAL)), sparsity=0.5, scope="global", block_size=10, update=update, damping=0.5
        )
        flat = np.concatenate([w.ravel() for w in weights.values()])
        smallest = np.sort(np.abs(flat))[: round(TOTAL / 2)]
        for name, mask in result.masks.items():
            np.testing.assert_array_equal(result.weights[name], np.where(mask, weights[name], 0))
        assert result.predicted_loss_increase == pytest.approx(0.25 * np.sum(smallest**2), rel=1e-12)


@DTYPES
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)])
def test_one_array_gives_one_array(shape, dtype):
    rng = np.random.default_rng(3)
    weights, gradients = rng.standard_normal(shape).astype(dtype), rng.standard_normal((5, 12)).astype(dtype)
    result = mfac_core.prune(weights, gradients, sparsity=0.5, block_size=5, damping=1e-2)
    expected = reference.prune({"w": weights}, gradients, sparsity=0.5, block_size=5, damping=1e-2)
    assert isinstance(result.weights, np.ndarray) and isinstance(result.masks, np.ndarray)
    assert result.weights.dtype == dtype and result.masks.dtype == np.bool_
    assert result.weights.shape == result.masks.shape == shape
    np.testing.assert_array_equal(result.masks, expected.masks["w"])
    np.testing.assert_allclose(result.weights, expected.weights["w"], atol=TOLERANCE[dtype] * np.abs(weights).max())


def test_one_array_with_an_existing_mask():
    rng = np.random.default_rng(3)
    weights, gradients, mask = (
        rng.standard_normal((3, 4)),
        rng.standard_normal((5, 12)),
        np.arange(12).reshape(3, 4) % 3 > 0,
    )
    result = mfac_core.prune(weights, gradients, sparsity=0.5, masks=mask, block_size=5, damping=1e-2)
    expected = reference.prune({"w": weights}, gradients, sparsity=0.5, masks={"w": mask}, block_size=5, damping=1e-2)
    np.testing.assert_array_equal(result.masks, expected.masks["w"])
    np.testing.assert_allclose(result.weights, expected.weights["w"], rtol=1e-9, atol=1e-12)
    assert np.count_nonzero(result.weights) == 6


@SCOPES
def test_gradients_by_name_equal_the_matrix(scope):
    weights, gradients = make_weights(), make_gradients()
    options = dict(sparsity=0.6, block_size=10, scope=scope)
    named = by_name(gradients)
    reordered = {name: named[name] for name in reversed(named)}
    matrix = mfac_core.prune(weights, gradients, **options)
    for mapping in (named, reordered):
        result = mfac_core.prune(weights, mapping, **options)
        for name in SHAPES:
            np.testing.assert_array_equal(result.weights[name], matrix.weights[name])
            np.testing.assert_array_equal(result.masks[name], matrix.masks[name])


def test_the_order_of_masks_by_name_is_irrelevant():
    weights, gradients, masks = make_weights(), make_gradients(), make_masks()
    options = dict(sparsity=0.6, block_size=10)
    expected = mfac_core.prune(weights, gradients, masks=masks, **options)
    result = mfac_core.prune(weights, gradients, masks=dict(reversed(masks.items())), **options)
    for name in SHAPES:
        np.testing.assert_array_equal(result.weights[name], expected.weights[name])


@UPDATES
def test_a_weight_that_is_zero_is_pruned_first(update):
    weights, gradients = make_weights(), make_gradients(12)
    weights["first"][1, 2] = weights["third"][1, 1, 1] = 0
    options = dict(sparsity=2 / TOTAL, block_size=20, scope="global", update=update)
    result = mfac_core.prune(weights, gradients, **options)
    assert not result.masks["first"][1, 2] and not result.masks["third"][1, 1, 1]
    assert result.predicted_loss_increase == 0
    for name in SHAPES:
        np.testing.assert_array_equal(result.weights[name], weights[name])


def test_a_masked_weight_that_is_not_zero_comes_out_zero_and_takes_no_part():
    weights, gradients, masks = make_weights(), make_gradients(), make_masks()
    options = dict(sparsity=0.6, masks=masks, block_size=10)
    expected = mfac_core.prune({name: weights[name] * masks[name] for name in SHAPES}, gradients, **options)
    other = make_gradients(seed=9)
    mixed = np.where(np.concatenate([masks[name].ravel() for name in SHAPES]), gradients, other)
    result = mfac_core.prune(weights, mixed, **options)
    for name in SHAPES:
        np.testing.assert_array_equal(result.weights[name], expected.weights[name])
    assert result.predicted_loss_increase == expected.predicted_loss_increase


@SCOPES
@pytest.mark.parametrize("sparsity", [0.1, 0.5])
def test_a_sparsity_already_reached_changes_nothing(sparsity, scope):
    masks = {name: np.arange(int(np.prod(shape))).reshape(shape) % 3 == 0 for name, shape in SHAPES.items()}
    weights = {name: array * masks[name] for name, array in make_weights().items()}
    result = mfac_core.prune(weights, make_gradients(), sparsity=sparsity, masks=masks, scope=scope)
    for name in SHAPES:
        np.testing.assert_array_equal(result.weights[name], weights[name])
        np.testing.assert_array_equal(result.masks[name], masks[name])
    assert result.predicted_loss_increase == 0
    assert result.sparsity == sum(int(np.sum(~mask)) for mask in masks.values()) / TOTAL


@UPDATES
def test_float64_weights_keep_their_digits_where_float32_gradients_change_nothing(update):
    weights, gradients = make_weights(np.float64), make_gradients(7, np.float32)
    gradients[:, 30:] = 0
    weights["first"].reshape(-1)[4] = 1e-9
    options = dict(block_size=10, update=update, scope="global")
    untouched = mfac_core.prune(weights, gradients, sparsity=0.0, **options)
    one_pruned = mfac_core.prune(weights, gradients, sparsity=1 / TOTAL, **options)
    for name in SHAPES:
        np.testing.assert_array_equal(untouched.weights[name], weights[name])
        assert one_pruned.weights[name].dtype == np.float64
    np.testing.assert_array_equal(one_pruned.weights["third"], weights["third"])
    assert not one_pruned.masks["first"].reshape(-1)[4]
    assert one_pruned.weights["first"].reshape(-1)[4] == 0


def test_each_array_keeps_its_dtype():
    weights = make_weights(np.float32)
    weights["second"] = weights["second"].astype(np.float64)
    result = mfac_core.prune(weights, make_gradients(), sparsity=0.5, block_size=10)
    assert {name: array.dtype for name, array in result.weights.items()} == {
        "first": np.float32, "second": np.float64, "third": np.float32
    }  # fmt: skip


def test_everything_pruned_already_is_left_alone():
    masks = {name: np.zeros(shape, dtype=bool) for name, shape in SHAPES.items()}
    weights = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    result = mfac_core.prune(weights, make_gradients(), sparsity=0.5, masks=masks)
    assert result.sparsity == 1
    assert all(not mask.any() for mask in result.masks.values())


def test_a_layer_pruned_beyond_the_target_stays_while_the_others_reach_it():
    weights, gradients = make_weights(), make_gradients()
    masks = {name: np.ones(shape, dtype=bool) for name, shape in SHAPES.items()}
    masks["first"].reshape(-1)[:20] = False
    result = mfac_core.prune(weights, gradients, sparsity=0.5, masks=masks, scope="layer", block_size=10)
    np.testing.assert_array_equal(result.masks["first"], masks["first"])
    assert int(np.sum(~result.masks["third"])) == 15
    assert int(np.sum(~result.masks["second"])) == round(1.5)


def test_sparsity_zero_changes_nothing():
    weights = make_weights()
    result = mfac_core.prune(weights, make_gradients(), sparsity=0.0)
    assert result.sparsity == 0
    assert result.predicted_loss_increase == 0
    for name in SHAPES:
        np.testing.assert_array_equal(result.weights[name], weights[name])
        assert result.masks[name].all()


@UPDATES
@DTYPES
def test_inputs_are_unchanged_and_results_are_new(update, dtype):
    weights, gradients, masks = make_weights(dtype), make_gradients(7, dtype), make_masks()
    inputs = [*weights.values(), gradients, *masks.values()]
    before = [array.tobytes() for array in inputs]
    for sparsity in (0.6, 0.01):
        result = mfac_core.prune(weights, gradients, sparsity=sparsity, masks=masks, block_size=10, update=update)
        for name in SHAPES:
            assert not np.shares_memory(result.weights[name], weights[name])
            assert not np.shares_memory(result.masks[name], masks[name])
            result.weights[name][...] = 5
            result.masks[name][...] = True
    assert [array.tobytes() for array in inputs] == before


@UPDATES
def test_the_working_memory_is_a_few_blocks(update, monkeypatch):
    monkeypatch.setattr("mfac_core.backends.numpy_backend._cores", lambda: 2)  # each works on a block of its own
    m, block_size, blocks = 128, 16384, 6
    d = blocks * block_size
    rng = np.random.default_rng(0)
    weights, gradients = rng.standard_normal(d, dtype=np.float32), rng.standard_normal((m, d), dtype=np.float32)
    tracemalloc.start()
    try:
        mfac_core.prune(weights, gradients, sparsity=0.5, block_size=block_size, update=update)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 6 * m * block_size * 4 + 12 * d * 8
    assert peak < d * block_size * 4 / 50


def test_memory_with_small_blocks_stays_below_one_inverse_per_block():
    m, block_size, d = 64, 50, 300_000
    rng = np.random.default_rng(0)
    weights, gradients = rng.standard_normal(d, dtype=np.float32), rng.standard_normal((m, d), dtype=np.float32)
    tracemalloc.start()
    try:
        mfac_core.prune(weights, gradients, sparsity=0.5, block_size=block_size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < d * block_size * 4  # what dense float32 inverses of all blocks would take


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), 50])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        mfac_core.prune(make_weights(), make_gradients(), sparsity=sparsity)


@pytest.mark.parametrize(
    "option, value",
    [
        ("scope", "network"),
        ("update", "both"),
        ("mask_type", "blocks"),
        ("num_recomputations", 0),
        ("num_recomputations", 1.5),
        ("num_recomputations", True),
        ("num_recomputations", "all"),
        ("recomputation_spacing", "cubic"),
        ("recomputation_spacing", "linear"),
        ("block_size", 0),
        ("block_size", -4),
        ("damping", 0.0),
        ("damping", -1.0),
        ("damping", float("nan")),
    ],
)
def test_an_option_outside_its_choices_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        mfac_core.prune(make_weights(), make_gradients(), sparsity=0.5, **{option: value})


def test_a_matrix_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"gradients.*57|57.*gradients"):
        mfac_core.prune(make_weights(), make_gradients()[:, :-1], sparsity=0.5)


def test_gradients_of_another_shape_are_refused_by_name():
    named = by_name(make_gradients())
    named["second"] = named["second"][:, :2]
    with pytest.raises(ValueError, match="second"):
        mfac_core.prune(make_weights(), named, sparsity=0.5)


def test_gradients_of_different_lengths_are_refused_by_name():
    named = by_name(make_gradients())
    named["third"] = named["third"][:-1]
    with pytest.raises(ValueError, match="third"):
        mfac_core.prune(make_weights(), named, sparsity=0.5)


@pytest.mark.parametrize("missing", SHAPES)
def test_missing_gradients_are_refused_by_name(missing):
    named = by_name(make_gradients())
    del named[missing]
    with pytest.raises(ValueError, match=missing):
        mfac_core.prune(make_weights(), named, sparsity=0.5)


def test_unknown_gradients_are_refused_by_name():
    with pytest.raises(ValueError, match="fourth"):
        mfac_core.prune(make_weights(), by_name(make_gradients()) | {"fourth": np.zeros((7, 2))}, sparsity=0.5)


def test_masks_of_another_shape_are_refused_by_name():
    masks = make_masks()
    masks["third"] = masks["third"].reshape(-1)
    with pytest.raises(ValueError, match="third"):
        mfac_core.prune(make_weights(), make_gradients(), sparsity=0.5, masks=masks)


def test_missing_masks_are_refused_by_name():
    masks = make_masks()
    del masks["second"]
    with pytest.raises(ValueError, match="second"):
        mfac_core.prune(make_weights(), make_gradients(), sparsity=0.5, masks=masks)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_by_number(value):
    gradients = make_gradients()
    gradients[5, 30] = value
    with pytest.raises(ValueError, match=r"(?s)row.*\b5\b"):
        mfac_core.prune(make_weights(), gradients, sparsity=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    weights = make_weights()
    weights["second"][1] = value
    with pytest.raises(ValueError, match="second"):
        mfac_core.prune(weights, make_gradients(), sparsity=0.5)


@pytest.mark.parametrize("weights", [{}, {"empty": np.zeros((0, 3))}, np.zeros(0)])
def test_no_weights_at_all_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        mfac_core.prune(weights, np.zeros((3, 0)), sparsity=0.5)


def test_an_empty_array_beside_others_is_carried_along():
    weights = {"empty": np.zeros((0, 3)), **make_weights()}
    result = mfac_core.prune(weights, make_gradients(), sparsity=0.5, block_size=10)
    expected = mfac_core.prune(make_weights(), make_gradients(), sparsity=0.5, block_size=10)
    assert result.weights["empty"].shape == (0, 3)
    for name in SHAPES:
        np.testing.assert_array_equal(result.weights[name], expected.weights[name])


def test_a_scalar_weight_takes_part():
    weights = {"scalar": np.array(1e-3), **make_weights()}
    gradients = np.concatenate([np.ones((7, 1)), make_gradients()], axis=1)
    result = mfac_core.prune(weights, gradients, sparsity=2 / (TOTAL + 1), scope="global", block_size=10, damping=1e-2)
    expected = reference.prune(
        weights, gradients, sparsity=2 / (TOTAL + 1), scope="global", block_size=10, damping=1e-2
    )
    assert result.weights["scalar"].shape == ()
    assert_same(result, expected, np.float64)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="gradients"):
        mfac_core.prune(make_weights(), np.zeros((0, TOTAL)), sparsity=0.5)


@DTYPES
def test_saliency_is_half_the_square_over_the_inverse_diagonal(dtype):
    weights, diagonal = np.array([1.0, -2.0, 0.0, 4.0], dtype), np.array([0.5, 1.0, 2.0, 8.0], dtype)
    result = mfac_core.saliency(weights, diagonal)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, [1.0, 2.0, 0.0, 1.0])


def test_saliency_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        mfac_core.saliency(np.ones(3), np.ones(4))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_saliency_refuses_a_diagonal_that_is_not_positive_and_finite(value):
    with pytest.raises((ValueError, mfac_core.IllConditionedError), match="diagonal"):
        mfac_core.saliency(np.ones(3), np.array([1.0, value, 1.0]))


def test_saliency_refuses_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="weights"):
        mfac_core.saliency(np.array([1.0, np.nan]), np.ones(2))


def test_what_is_not_an_array_is_refused_by_type():
    with pytest.raises(TypeError, match=r"weights: .*list is not an array; convert it first"):
        mfac_core.prune([1.0, 2.0], np.ones((1, 2)), sparsity=0.5)
    with pytest.raises(TypeError, match=r"gradients: .*list is not an array"):
        mfac_core.prune(np.ones(2), [[1.0, 2.0]], sparsity=0.5)
    with pytest.raises(TypeError, match=r"masks\['a'\]: .*list is not an array"):
        mfac_core.prune({"a": np.ones(2)}, np.ones((1, 2)), sparsity=0.5, masks={"a": [True, True]})
    with pytest.raises(TypeError, match=r"the result of the function gradients\['a'\]: .*NoneType is not"):
        mfac_core.prune({"a": np.ones(2)}, lambda weights: {"a": None}, sparsity=0.5)


class Samples:
    def __call__(self, weights):
        return np.ones((2, weights.size)) + np.eye(2, weights.size)

    def of(self, weights):
        return self(weights)


@pytest.mark.parametrize(
    "gradients",
    [Samples(), Samples().of, partial(Samples.of, Samples()), lambda *both: Samples()(both[0])],
    ids=["object", "method", "partial", "any number"],
)
def test_whatever_can_be_called_with_the_weights_gives_gradients(gradients):
    assert mfac_core.prune(np.array([1.0, 2.0, 3.0, 4.0]), gradients, sparsity=0.5).sparsity == 0.5


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (lambda weights, count: None, r"gradients takes the arguments \(weights, count\), but is called with the"),
        (Samples.of, r"gradients takes the arguments \(self, weights\)"),
        (lambda *, count: None, r"gradients takes the arguments \(\*, count\)"),
        (Samples, r"gradients is the class Samples; pass a function gradients\(weights\)"),
    ],
    ids=["two", "unbound method", "by name", "class"],
)
def test_a_function_that_the_weights_do_not_fit_is_refused_by_its_arguments(gradients, message):
    with pytest.raises(TypeError, match=message):
        mfac_core.prune(np.ones(4), gradients, sparsity=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_without_finite_numbers_are_an_error_and_no_warning(caplog, value):
    with pytest.raises(ValueError, match="NaN or Inf in 5 of their rows"):
        mfac_core.prune(np.ones(4), lambda weights: np.full((5, 4), value), sparsity=0.5)
    assert not caplog.records


def test_a_long_list_of_bad_rows_is_cut_short():
    gradients = np.full((50, 4), np.nan)
    with pytest.raises(ValueError, match=r"50 of their rows: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.;"):
        mfac_core.prune(np.ones(4), gradients, sparsity=0.5)


GROUPED = {"linear": (6, 8), "conv": (4, 6, 3, 1), "kernel": (2, 3, 6, 4)}
GROUPED_TOTAL = 48 + 72 + 144
MASK_TYPES = pytest.mark.parametrize(
    "mask_type, sparsity", [("channel", 0.5), ("filter", 0.5), ("block4", 0.6), ((2, 2), 0.6), ((2, -1), 0.4),
                            ("2:4", 0.5), ("1:2", 0.3), ("unstructured", 0.7)]
)  # fmt: skip


def make_grouped(dtype=np.float64):
    rng = np.random.default_rng(4)
    weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in GROUPED.items()}
    return weights, rng.standard_normal((12, GROUPED_TOTAL)).astype(dtype)


@MASK_TYPES
@SCOPES
@UPDATES
@pytest.mark.parametrize("num_recomputations", [1, 3])
def test_mask_types_and_recomputations_match_the_dense_oracle(mask_type, sparsity, scope, update, num_recomputations):
    weights, gradients = make_grouped()
    options = dict(
        sparsity=sparsity,
        mask_type=mask_type,
        axes={"kernel": (3, 0, 1, 2)},
        scope=scope,
        update=update,
        num_recomputations=num_recomputations,
        block_size=50,
        damping=1e-2,
    )
    result = mfac_core.prune(weights, gradients, **options)
    assert_same(result, reference.prune(weights, gradients, **options), np.float64)
    if mask_type in ("unstructured", (2, 2), (2, -1)) and scope == "layer":
        for name, mask in result.masks.items():
            groups = [[q] for q in range(mask.size)]
            if mask_type != "unstructured":
                groups = reference.groups_of(mask.shape, mask_type, options["axes"].get(name))
            assert sum(not mask.ravel()[group].any() for group in groups) == round(len(groups) * sparsity)


@MASK_TYPES
def test_mask_types_go_on_from_masks(mask_type, sparsity):
    weights, gradients = make_grouped()
    rng = np.random.default_rng(5)
    masks = {name: rng.random(shape) > 0.3 for name, shape in GROUPED.items()}
    options = dict(sparsity=sparsity, mask_type=mask_type, masks=masks, block_size=50, damping=1e-2)
    options |= {"num_recomputations": 2, "axes": {"kernel": (3, 0, 1, 2)}}
    assert_same(
        mfac_core.prune(weights, gradients, **options), reference.prune(weights, gradients, **options), np.float64
    )


def test_recomputing_after_joint_updates_loses_less_and_the_parts_add_up():
    weights, gradients = make_weights(), make_gradients(80)
    options = dict(sparsity=0.7, block_size=None, damping=1e-3, scope="global", update="joint")
    once, often = (mfac_core.prune(weights, gradients, num_recomputations=r, **options) for r in (1, 8))
    assert once.sparsity == often.sparsity == round(0.7 * TOTAL) / TOTAL
    assert often.predicted_loss_increase < once.predicted_loss_increase
    change = np.concatenate([(often.weights[name] - weights[name]).ravel() for name in SHAPES])
    loss = reference.predicted_loss_increase(reference.dense_fisher(gradients, 1e-3), change)
    assert often.predicted_loss_increase == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("sparsity", [0.66, 0.67])
def test_a_rounded_sparsity_means_exactly_n_of_m(sparsity):
    rng = np.random.default_rng(7)
    weights, gradients = rng.standard_normal((1, 300)), rng.standard_normal((9, 300))
    result = mfac_core.prune(weights, gradients, sparsity=sparsity, mask_type="1:3")
    assert set(result.masks.reshape(-1, 3).sum(axis=1)) == {1}


def test_axes_of_a_single_array_are_a_permutation():
    rng = np.random.default_rng(6)
    weights, gradients = rng.standard_normal((3, 8)), rng.standard_normal((9, 24))
    plain = mfac_core.prune(weights, gradients, sparsity=0.5, mask_type="2:4")
    turned = mfac_core.prune(weights, gradients, sparsity=2 / 3, mask_type="1:3", axes=(1, 0))
    assert set(plain.masks.reshape(3, 2, 4).sum(axis=2).ravel()) == {2}
    assert set(turned.masks.sum(axis=0)) == {1}
    with pytest.raises(ValueError, match=r"axes\['weights'\].*permutation"):
        mfac_core.prune(weights, gradients, sparsity=0.5, axes=(1, 1))


@pytest.mark.parametrize("sparsity", ["x", None, [0.5], float("nan"), True, 1.0, -0.1])
def test_a_sparsity_that_is_no_fraction_is_refused_by_name(sparsity):
    with pytest.raises(ValueError, match=r"sparsity: .*0 <= sparsity < 1"):
        mfac_core.prune(make_weights(), make_gradients(), sparsity=sparsity)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float16, np.complex64, bool])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=rf"gradients must be float32 or float64, got {np.dtype(dtype)}"):
        mfac_core.prune(make_weights(), make_gradients().astype(dtype), sparsity=0.5)
    named = by_name(make_gradients())
    named["second"] = named["second"].astype(dtype)
    with pytest.raises(ValueError, match=rf"gradients must be float32 or float64, got {np.dtype(dtype)}"):
        mfac_core.prune(make_weights(), named, sparsity=0.5)
    weights = make_weights()
    weights["second"] = weights["second"].astype(dtype)
    with pytest.raises(ValueError, match=rf"weights\['second'\] must be float32 or float64, got {np.dtype(dtype)}"):
        mfac_core.prune(weights, make_gradients(), sparsity=0.5)


def test_weights_that_are_not_finite_are_refused_without_a_word_on_training():
    weights = make_weights()
    weights["second"][1] = np.inf
    with pytest.raises(ValueError, match="weights contain NaN or Inf in second: prune from finite weights") as refusal:
        mfac_core.prune(weights, make_gradients(), sparsity=0.5)
    assert "training" not in str(refusal.value)


def rows_at(weights: dict[str, np.ndarray], m: int = 12) -> np.ndarray:
    """Return gradient samples that depend on where the weights are: those of a sum of cosines."""
    w = np.concatenate([np.asarray(array, np.float64).ravel() for array in weights.values()])
    directions = np.random.default_rng(8).standard_normal((m, w.size))
    return np.sin(directions @ w)[:, None] * directions


@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    "parts", [{"num_recomputations": 3}, {"num_recomputations": 3, "recomputation_spacing": "linear"}, {}]
)
def test_a_function_gives_fresh_rows_for_each_part(parts, scope, update, caplog):
    options = dict(sparsity=0.8, block_size=20, damping=1e-2, scope=scope, update=update, **parts)
    result = mfac_core.prune(make_weights(), rows_at, **options)
    assert_same(result, reference.prune(make_weights(), rows_at, **options), np.float64)
    stale = mfac_core.prune(make_weights(), rows_at(make_weights()), **options)
    assert any(np.any(stale.weights[name] != result.weights[name]) for name in SHAPES)
    (record,) = caplog.records
    count = parts.get("num_recomputations", 7)
    assert record.getMessage().startswith(f"the {count} sub-steps of this pruning step share the given gradients")


def test_the_function_sees_the_weights_of_each_part_and_cannot_change_them():
    seen = []

    def gradients(weights):
        seen.append({name: array.copy() for name, array in weights.items()})
        rows = {name: np.random.default_rng(len(seen)).standard_normal((5, *w.shape)) for name, w in weights.items()}
        for array in weights.values():
            array[...] = np.nan
        return rows

    before = make_weights()
    result = mfac_core.prune(before, gradients, sparsity=0.75, num_recomputations=2, damping=1e-2)
    assert [list(each) for each in seen] == [list(SHAPES)] * 2
    for name, array in make_weights().items():
        np.testing.assert_array_equal(before[name], array)
        np.testing.assert_array_equal(seen[0][name], array)
        assert np.all(result.weights[name][seen[1][name] == 0] == 0)
    assert sum(np.count_nonzero(array == 0) for array in seen[1].values()) == TOTAL // 2
    assert all(np.isfinite(array).all() for array in result.weights.values())


def test_a_function_of_one_array_gets_one_array():
    shapes = []

    def gradients(weights):
        shapes.append((type(weights), weights.shape, weights.dtype))
        return np.random.default_rng(0).standard_normal((4, *weights.shape)).astype(np.float32)

    weights = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)
    result = mfac_core.prune(weights, gradients, sparsity=0.5)
    assert shapes == [(np.ndarray, (3, 4), np.float32)] * 3
    assert result.weights.shape == (3, 4) and np.count_nonzero(result.weights) == 6


def test_a_function_without_arguments_is_called_without():
    rng = np.random.default_rng(0)
    calls = []
    weights = np.linspace(1, 2, 40)
    mfac_core.prune(weights, lambda: (calls.append(1), rng.standard_normal((4, 40)))[1], sparsity=0.5)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "NoneType"),
        ([[1.0] * 4], TypeError, "list"),
        (np.ones((3, 5)), ValueError, "one row of 4 numbers per sample"),
        (np.ones((0, 4)), ValueError, "no sample"),
        (np.full((2, 4), np.nan), ValueError, "NaN"),
    ],
)
def test_what_a_function_returns_is_checked(returned, error, message):
    with pytest.raises(error, match=message):
        mfac_core.prune(np.arange(1.0, 5.0), lambda weights: returned, sparsity=0.5)


def test_rows_that_are_shared_are_named_only_where_parts_share_them(caplog):
    weights, rows = np.linspace(1, 2, 40), np.random.default_rng(0).standard_normal((4, 40))
    mfac_core.prune(weights, rows, sparsity=0.5, num_recomputations=1)
    mfac_core.prune(weights, rows, sparsity=0.2)
    mfac_core.prune(weights, rows, sparsity=0.5, masks=np.arange(40) >= 20)
    assert not caplog.records


def test_geometric_parts_keep_equal_fractions_and_linear_ones_remove_equal_numbers():
    kept = {"geometric": [], "linear": []}
    for spacing, counts in kept.items():

        def gradients(weights, counts=counts):
            counts.append(np.count_nonzero(weights))
            return np.random.default_rng(0).standard_normal((4, 1000))

        mfac_core.prune(
            np.linspace(1, 2, 1000), gradients, sparsity=0.9, num_recomputations=3, recomputation_spacing=spacing
        )
    assert kept == {"geometric": [1000, 464, 215], "linear": [1000, 700, 400]}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_parts_begin_at_the_zeros_that_are_there(scope):
    weights = {name: np.where(np.arange(w.size).reshape(w.shape) % 2, w, 0.0) for name, w in make_weights().items()}
    calls = []

    def gradients(now):
        calls.append(sum(np.count_nonzero(array) for array in now.values()))
        return rows_at(now)

    options = dict(sparsity=0.8, block_size=20, damping=1e-2, scope=scope)
    result = mfac_core.prune(weights, gradients, **options)
    assert_same(result, reference.prune(weights, rows_at, **options), np.float64)
    assert len(calls) == 4  # from half to four fifths, and not from none
    assert calls == sorted(set(calls), reverse=True)
