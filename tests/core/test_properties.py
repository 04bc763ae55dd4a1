from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mfac_core
from tests import reference
from tests.core.strict_backend import strict_devices

SEEDS = st.integers(0, 2**32 - 1)
BLOCK_SIZES = st.one_of(st.none(), st.integers(1, 45))
DAMPINGS = st.sampled_from([1e-6, 1e-4, 1e-2, 1.0])
SPARSITIES = st.floats(0.01, 0.99)
UPDATES = st.sampled_from(["independent", "joint"])
SCOPES = st.sampled_from(["layer", "global"])

few = settings(max_examples=50, deadline=None)


@st.composite
def gradient_matrices(draw) -> np.ndarray:
    m, d = draw(st.integers(1, 30)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(SEEDS))
    gradients = rng.standard_normal((m, d)) * draw(st.sampled_from([1e-3, 1.0, 30.0]))
    gradients[:, rng.random(d) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    gradients[rng.random(m) < draw(st.sampled_from([0.0, 0.5]))] = gradients[0]
    return gradients


@st.composite
def pruning_problems(draw) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights of a few arrays and gradients, with many ties: small integers, repeated columns, zeros."""
    shapes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(SEEDS))
    m, total = draw(st.integers(1, 12)), sum(shapes)
    if draw(st.booleans()):
        flat = rng.integers(-2, 3, total).astype(np.float64)
        gradients = np.repeat(rng.standard_normal((m, 1)), total, axis=1)
    else:
        flat, gradients = rng.standard_normal(total), rng.standard_normal((m, total))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    parts = np.split(flat.astype(dtype), np.cumsum(shapes)[:-1])
    return {f"layer{i}": part for i, part in enumerate(parts)}, gradients.astype(dtype)


def rounding(gradients, damping) -> float:
    """How far float64 may be off, relative to 1 / damping: its precision times the condition of the Fisher."""
    return 1e-15 * np.linalg.cond(reference.dense_fisher(gradients, damping)) + 1e-12


@few
@given(gradient_matrices(), BLOCK_SIZES, DAMPINGS, SEEDS)
def test_apply_undoes_the_fisher(gradients, block_size, damping, seed):
    x = np.random.default_rng(seed).standard_normal(gradients.shape[1])
    fisher = reference.dense_fisher(gradients, damping, block_size)
    restored = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=damping).apply(fisher @ x)
    # F x itself is rounded, which F^-1 magnifies by at most the condition number.
    np.testing.assert_allclose(restored, x, rtol=0, atol=1e-13 * np.linalg.cond(fisher) * np.max(np.abs(x)) + 1e-9)


@few
@given(gradient_matrices(), BLOCK_SIZES, DAMPINGS, SEEDS)
def test_the_inverse_is_symmetric(gradients, block_size, damping, seed):
    x, y = np.random.default_rng(seed).standard_normal((2, gradients.shape[1]))
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=damping)
    scale = np.linalg.norm(x) * np.linalg.norm(y) / damping
    assert abs(y @ fisher.apply(x) - x @ fisher.apply(y)) <= 1e-9 * scale


@few
@given(gradient_matrices(), BLOCK_SIZES, DAMPINGS, st.sampled_from([np.float32, np.float64]))
def test_the_diagonal_is_positive_and_at_most_one_over_damping(gradients, block_size, damping, dtype):
    diagonal = mfac_core.inverse_fisher(gradients.astype(dtype), block_size=block_size, damping=damping).diagonal()
    assert np.all(diagonal > 0)
    assert np.all(diagonal <= dtype(1 / damping))


@few
@given(gradient_matrices(), BLOCK_SIZES, DAMPINGS)
def test_the_diagonal_is_what_apply_gives_on_the_diagonal(gradients, block_size, damping):
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=damping)
    columns = [fisher.apply(unit) for unit in np.eye(gradients.shape[1])]
    error = rounding(gradients, damping) / damping
    np.testing.assert_allclose(fisher.diagonal(), np.diag(columns), rtol=0, atol=error)


@few
@given(gradient_matrices(), BLOCK_SIZES, DAMPINGS, SEEDS)
def test_the_order_of_rows_is_irrelevant(gradients, block_size, damping, seed):
    shuffled = np.random.default_rng(seed).permutation(gradients)
    options = dict(block_size=block_size, damping=damping)
    np.testing.assert_allclose(
        mfac_core.inverse_fisher(shuffled, **options).diagonal(),
        mfac_core.inverse_fisher(gradients, **options).diagonal(),
        rtol=0,
        atol=rounding(gradients, damping) / damping,
    )


@few
@given(gradient_matrices(), BLOCK_SIZES, DAMPINGS)
def test_more_curvature_never_raises_the_diagonal(gradients, block_size, damping):
    options = dict(block_size=block_size, damping=damping)
    once = mfac_core.inverse_fisher(gradients, **options).diagonal()
    twice = mfac_core.inverse_fisher(2 * gradients, **options).diagonal()
    assert np.all(twice <= once + rounding(2 * gradients, damping) / damping)


@few
@given(gradient_matrices(), BLOCK_SIZES, DAMPINGS, st.integers(2, 3))
def test_several_devices_equal_one(gradients, block_size, damping, count):
    options = dict(block_size=block_size, damping=damping)
    one = mfac_core.inverse_fisher(gradients, **options)
    several = mfac_core.inverse_fisher(gradients, **options, devices=strict_devices(count))
    x = np.linspace(-1, 1, gradients.shape[1])
    error = rounding(gradients, damping) / damping
    np.testing.assert_allclose(several.diagonal(), one.diagonal(), rtol=0, atol=error)
    np.testing.assert_allclose(several.apply(x), one.apply(x), rtol=0, atol=8 * error)


@few
@given(pruning_problems(), BLOCK_SIZES, st.lists(SPARSITIES, min_size=1, max_size=4), UPDATES, SCOPES)
def test_successive_pruning_only_shrinks_the_kept_set_and_counts_exactly(problem, block_size, targets, update, scope):
    weights, gradients = problem
    masks = None
    before = {name: np.ones(array.shape, dtype=bool) for name, array in weights.items()}
    options = dict(block_size=block_size, damping=1e-2, scope=scope, update=update)
    for sparsity in targets:
        result = mfac_core.prune(weights, gradients, sparsity=sparsity, masks=masks, **options)
        for name, mask in result.masks.items():
            assert not np.any(mask & ~before[name])
            assert np.all(np.isfinite(result.weights[name]))
            assert np.all(result.weights[name][~mask] == 0)
        _assert_counts(result.masks, before, sparsity, scope)
        weights, masks, before = result.weights, result.masks, result.masks


def _assert_counts(masks, before, sparsity, scope) -> None:
    names = list(masks)
    for group in [names] if scope == "global" else [[name] for name in names]:
        size = sum(masks[name].size for name in group)
        already = sum(int(np.sum(~before[name])) for name in group)
        assert sum(int(np.sum(~masks[name])) for name in group) == max(round(size * sparsity), already)


@few
@given(pruning_problems(), BLOCK_SIZES, SPARSITIES, SCOPES)
def test_what_is_pruned_has_the_smallest_saliency(problem, block_size, sparsity, scope):
    weights, gradients = problem
    options = dict(block_size=block_size, damping=1e-2, scope=scope, num_recomputations=1)
    result = mfac_core.prune(weights, gradients, sparsity=sparsity, **options)
    flat = np.concatenate(list(weights.values()))
    saliency = reference.saliency(flat, np.diag(reference.dense_inverse(gradients, 1e-2, block_size)))
    kept = np.concatenate([result.masks[name] for name in weights])
    ends = np.cumsum([array.size for array in weights.values()])[:-1]
    for values, stays in zip(
        [saliency] if scope == "global" else np.split(saliency, ends),
        [kept] if scope == "global" else np.split(kept, ends),
        strict=True,
    ):
        if stays.any() and not stays.all():
            assert values[~stays].max() <= values[stays].min() * (1 + 1e-3)


@few
@given(st.integers(1, 40), st.integers(1, 6), SPARSITIES, UPDATES, st.sampled_from([np.float32, np.float64]))
def test_ties_go_to_the_lowest_index(size, m, sparsity, update, dtype):
    weights, gradients = np.full(size, 0.5, dtype), np.zeros((m, size), dtype)
    result = mfac_core.prune(weights, gradients, sparsity=sparsity, block_size=size, damping=0.5, update=update)
    count = round(size * sparsity)
    np.testing.assert_array_equal(result.masks, np.arange(size) >= count)


@few
@given(pruning_problems(), BLOCK_SIZES, SPARSITIES, UPDATES, SCOPES)
def test_pruning_leaves_its_inputs_alone(problem, block_size, sparsity, update, scope):
    weights, gradients = problem
    masks = {name: array < 1 for name, array in weights.items()}
    inputs = [*weights.values(), *masks.values(), gradients]
    before = [array.tobytes() for array in inputs]
    options = dict(sparsity=sparsity, block_size=block_size, damping=1e-2, scope=scope, update=update)
    mfac_core.prune(weights, gradients, masks=masks, **options)
    assert [array.tobytes() for array in inputs] == before


@few
@given(pruning_problems(), BLOCK_SIZES, SPARSITIES)
def test_the_joint_update_never_predicts_more_loss(problem, block_size, sparsity):
    weights, gradients = problem
    options = dict(sparsity=sparsity, block_size=block_size, damping=1e-2, num_recomputations=1)
    joint = mfac_core.prune(weights, gradients, update="joint", **options)
    independent = mfac_core.prune(weights, gradients, update="independent", **options)
    assert 0 <= joint.predicted_loss_increase <= independent.predicted_loss_increase * (1 + 1e-4) + 1e-12


@few
@given(pruning_problems(), SEEDS)
def test_permuting_the_weights_permutes_the_result(problem, seed):
    weights, gradients = problem
    flat = np.concatenate(list(weights.values())).astype(np.float64)
    assume(len(np.unique(np.abs(flat))) == flat.size)
    order = np.random.default_rng(seed).permutation(flat.size)
    options = dict(sparsity=0.5, block_size=None, damping=1e-2, update="joint")
    straight = mfac_core.prune(flat, gradients.astype(np.float64), **options)
    permuted = mfac_core.prune(flat[order], gradients[:, order].astype(np.float64), **options)
    np.testing.assert_array_equal(permuted.masks, straight.masks[order])
    np.testing.assert_allclose(permuted.weights, straight.weights[order], rtol=1e-9, atol=1e-10)


def test_the_problems_do_reach_ties_and_zeros():
    found = []

    @settings(max_examples=50, database=None, derandomize=True)
    @given(pruning_problems())
    def look(problem):
        flat = np.concatenate(list(problem[0].values()))
        found.append((len(np.unique(flat)) < flat.size, bool(np.any(flat == 0))))

    look()
    assert any(tie for tie, _ in found) and any(zero for _, zero in found)


@few
@given(
    pruning_problems(),
    BLOCK_SIZES,
    SPARSITIES,
    UPDATES,
    SCOPES,
    st.sampled_from([(np.float32, -70), (np.float32, 66), (np.float32, 100), (np.float64, -600), (np.float64, 600)]),
)
def test_weights_of_any_scale_are_pruned_alike(problem, block_size, sparsity, update, scope, dtype_and_power):
    weights, gradients = problem
    dtype, power = dtype_and_power
    weights, gradients = {name: array.astype(dtype) for name, array in weights.items()}, gradients.astype(dtype)
    scaled = {name: np.ldexp(array, power) for name, array in weights.items()}
    options = dict(sparsity=sparsity, block_size=block_size, damping=1e-2, update=update, scope=scope)
    result = mfac_core.prune(weights, gradients, **options)
    same = mfac_core.prune(scaled, gradients, **options)
    for name in weights:
        np.testing.assert_array_equal(same.masks[name], result.masks[name])
        unscaled = np.ldexp(same.weights[name], -power)
        np.testing.assert_allclose(unscaled, result.weights[name], rtol=1e-6, atol=1e-15)
    with np.errstate(over="ignore"):
        expected = np.ldexp(result.predicted_loss_increase, 2 * power)
    assert same.predicted_loss_increase == pytest.approx(expected, rel=1e-6, abs=1e-300)
