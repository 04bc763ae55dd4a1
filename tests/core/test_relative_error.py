"""The relative error that is asked for: kept, or the block is refused; and float64 only where it is needed for that."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mfac_core
from mfac_core.fisher import factors
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.dual import FIRST_ORDER, DualFactor
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.fisher.rounding import BOUND_FACTOR
from mfac_core.masks.selection import least_salient
from mfac_core.pruners.step import RTOL, mfac_step
from tests import reference

RTOLS = (1e-3, 1e-5)
DAMPINGS = (1e-8, 1e-5, 1e-2)
SHAPES = [(16, 300), (64, 600), (64, 40), (256, 700), (256, 100), (400, 500), (600, 650), (1400, 60)]


def _decades(rng, low, high, *shape):
    return 10 ** rng.uniform(low, high, shape)


def _mean(rng, m, width, size):
    return size * rng.standard_normal((1, width))


def realistic(rng, m, width):
    columns = _decades(rng, -4, 0, width)
    rows = rng.standard_normal((m, width)) * rng.lognormal(0, 1, (m, 1))
    return columns * (rows + 0.1 * rng.standard_normal(width))


ENSEMBLES = {
    "normal": lambda rng, m, width: rng.standard_normal((m, width)),
    "columns over six decades": lambda rng, m, width: rng.standard_normal((m, width)) * _decades(rng, -6, 0, width),
    "rows over six decades": lambda rng, m, width: rng.standard_normal((m, width)) * _decades(rng, -6, 0, m, 1),
    "rows and columns over six decades": lambda rng, m, width: (
        rng.standard_normal((m, width)) * _decades(rng, -3, 3, width) * _decades(rng, -3, 3, m, 1)
    ),
    "realistic": realistic,
    "rows in pairs": lambda rng, m, width: np.repeat(rng.standard_normal((-(-m // 2), width)), 2, axis=0)[:m],
    "rows 16 times": lambda rng, m, width: np.repeat(rng.standard_normal((-(-m // 16), width)), 16, axis=0)[:m],
    "nearly equal rows": lambda rng, m, width: _mean(rng, m, width, 1) + 1e-3 * rng.standard_normal((m, width)),
    "nearly equal pairs of rows": lambda rng, m, width: (
        np.repeat(rng.standard_normal((-(-m // 2), width)), 2, axis=0)[:m] + 1e-3 * rng.standard_normal((m, width))
    ),
    "a common mean of 10": lambda rng, m, width: 10 + rng.standard_normal((m, width)),
    "means of 100": lambda rng, m, width: _mean(rng, m, width, 100) + rng.standard_normal((m, width)),
    "means of graded columns": lambda rng, m, width: (
        (_mean(rng, m, width, 3) + rng.standard_normal((m, width))) * _decades(rng, -4, 0, width)
    ),
    "a large mean and rows 8 times": lambda rng, m, width: np.repeat(
        _mean(rng, m, width, 30) + rng.standard_normal((-(-m // 8), width)), 8, axis=0
    )[:m],
    "low rank": lambda rng, m, width: rng.standard_normal((m, 4)) @ rng.standard_normal((4, width)),
    "sparse": lambda rng, m, width: rng.standard_normal((m, width)) * (rng.random((m, width)) < 0.02),
}


@cache
def gradients(kind, m, width, seed=0):
    rng = np.random.default_rng([seed, list(ENSEMBLES).index(kind), m, width])
    return ENSEMBLES[kind](rng, m, width).astype(np.float32)


@cache
def _singular_values(kind, m, width, seed):
    _, values, vectors = np.linalg.svd(gradients(kind, m, width, seed).astype(np.float64))
    return np.concatenate([values, np.zeros(width - len(values))]), vectors**2


def damped_diagonal(kind, m, width, damping, seed=0):
    """Return ``damping diag(F^-1)`` as a sum of positive terms, from the singular values of the gradients."""
    values, weights = _singular_values(kind, m, width, seed)
    return (m * damping / (values**2 + m * damping)) @ weights


def evaluated(rows, damping, rtol):
    """Return the diagonal and whether it was computed in float64, or ``None`` for a block that is refused."""
    try:
        factored, diagonal = factors.evaluate([rows[None]], damping, rtol)
    except mfac_core.IllConditionedError as refusal:
        assert "choose a larger damping" in str(refusal)
        return None
    return diagonal[0].astype(np.float64), factored.in_float64


@pytest.mark.parametrize("kind", ["realistic", "means of graded columns", "rows and columns over six decades"])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_oracle_is_the_exact_inverse(kind, damping):
    exact = np.diag(reference.exact_inverse(gradients(kind, 8, 12), damping)) * damping
    np.testing.assert_allclose(damped_diagonal(kind, 8, 12, damping), exact, rtol=1e-7)


@pytest.mark.parametrize("m, width", SHAPES)
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_the_error_is_within_rtol_or_the_block_is_refused(kind, m, width):
    refused = 0
    for damping in DAMPINGS:
        exact = damped_diagonal(kind, m, width, damping)
        for rtol in RTOLS:
            found = evaluated(gradients(kind, m, width), damping, rtol)
            if found is None:
                refused += 1
                continue
            # entries this small are beyond the oracle
            error = np.abs(found[0] / exact - 1)[exact > 1e-9].max(initial=0)
            assert error <= rtol, (damping, rtol, found[1])
    assert refused <= 2  # only where float64 itself is doubtful


@pytest.mark.parametrize("seed", [22, 32])
def test_the_error_is_within_rtol_where_the_measured_columns_are_accurate_by_chance(seed):
    kind, m, width, damping = "means of graded columns", 200, 400, 1e-2
    exact = damped_diagonal(kind, m, width, damping, seed)
    for rtol in np.geomspace(2e-5, 6e-5, 12):
        diagonal, _ = evaluated(gradients(kind, m, width, seed), damping, float(rtol))
        np.testing.assert_allclose(diagonal, exact, rtol=rtol)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["a common mean of 10", "means of 100", "means of graded columns", "realistic"])
def test_the_error_is_within_rtol_at_the_edge_of_float32(kind, seed):
    m, width = [(64, 900), (200, 400)][seed % 2]
    for damping in (1e-5, 1e-2):
        exact = damped_diagonal(kind, m, width, damping, seed)
        for rtol in 10 ** np.linspace(-5, -2.5, 6):
            diagonal, _ = evaluated(gradients(kind, m, width, seed), damping, float(rtol))
            assert np.abs(diagonal / exact - 1).max() <= rtol


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(1, 40),
    width=st.integers(1, 60),
    kind=st.sampled_from(sorted(ENSEMBLES)),
    seed=st.integers(0, 1000),
    damping=st.floats(-8, 0).map(lambda power: 10.0**power),
    rtol=st.sampled_from(RTOLS),
    is_double=st.booleans(),
)
def test_the_public_function_keeps_the_promise_for_any_shape(m, width, kind, seed, damping, rtol, is_double):
    rows = gradients(kind, m, width, seed).astype(np.float64 if is_double else np.float32)
    exact = damped_diagonal(kind, m, width, damping, seed)
    try:
        diagonal = mfac_core.inverse_fisher(rows, block_size=None, damping=damping, rtol=rtol).diagonal() * damping
    except mfac_core.IllConditionedError:
        return
    assert np.abs(diagonal / exact - 1)[exact > 1e-9].max(initial=0) <= rtol + 2e-7  # rounded to float32


@pytest.mark.parametrize("m, width", [(64, 600), (256, 700), (400, 500), (256, 100)])
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_float64_is_not_used_where_float32_is_far_better_than_asked(kind, m, width):
    rows = gradients(kind, m, width)
    for damping in DAMPINGS:
        try:
            factored = factors._form([rows[None]]).of([rows[None]], np.full(1, damping), np.float32)
        except np.linalg.LinAlgError:
            continue
        plain = 1 - factored.lower.column_sums(rows[None])[0] if width > m else None
        if plain is None:
            plain = damping * np.sum(factored.lower.inverse()[0] ** 2, axis=0)
        error = np.abs(plain / damped_diagonal(kind, m, width, damping) - 1).max()
        for rtol in RTOLS:
            if error <= rtol / 30:
                assert not evaluated(rows, damping, rtol)[1], (damping, rtol, error)


def test_entries_that_cancel_do_not_send_their_block_to_float64():
    rows = gradients("columns over six decades", 400, 900)
    exact = damped_diagonal("columns over six decades", 400, 900, 1e-5)
    factored = DualFactor.of([rows[None]], np.full(1, 1e-5), np.float32)
    plain = 1 - factored.lower.column_sums(rows[None])[0]
    assert np.abs(plain / exact - 1).max() > 1e-3
    diagonal, in_float64 = evaluated(rows, 1e-5, 1e-3)
    assert not in_float64 and np.abs(diagonal / exact - 1).max() <= 1e-3


@pytest.mark.parametrize("width", [10, 300])
def test_what_float32_cannot_promise_is_computed_in_float64(width):
    rows = np.random.default_rng(0).standard_normal((20, width)).astype(np.float32)
    # the damping hides the gradients, so that no estimate has a reason to ask for float64
    assert [evaluated(rows, 1e6, rtol)[1] for rtol in (1e-5, 5e-6, 3e-6)] == [False, False, True]


def _scaled_inverse(rows, damping):
    exact = rows.astype(np.float64)
    gram = exact @ exact.T + len(rows) * damping * np.eye(len(rows))
    scale = np.sqrt(np.diag(gram))
    return np.linalg.inv(gram / scale / scale[:, None])


@pytest.mark.parametrize("m, width", [(5, 40), (64, 600), (200, 400)])
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_the_power_method_hardly_underestimates_the_largest_amplification(kind, m, width):
    for seed in range(3):
        rows = gradients(kind, m, width, seed)
        factored = DualFactor.of([rows[None].astype(np.float64)], np.full(1, 1e-2), np.float64)
        ratio = float(factored._kappa()[0, 0]) / np.linalg.eigvalsh(_scaled_inverse(rows, 1e-2))[-1]
        assert 0.6 <= ratio <= 1.3 * m ** (1 / 6)


@pytest.mark.parametrize("m, width", [(64, 600), (64, 3000), (256, 700)])
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_the_largest_amplification_bounds_the_error_of_each_column(kind, m, width):
    rows, epsilon = gradients(kind, m, width), float(np.finfo(np.float32).eps)
    for damping in (1e-5, 1e-2, 1.0):
        kappa = np.linalg.eigvalsh(_scaled_inverse(rows, damping))[-1]
        if BOUND_FACTOR * epsilon * kappa > FIRST_ORDER:
            continue
        exact = damped_diagonal(kind, m, width, damping)
        factored = DualFactor.of([rows[None]], np.full(1, damping), np.float32)
        plain = 1 - factored.lower.column_sums(rows[None])[0].astype(np.float64)
        bound = BOUND_FACTOR * (kappa + np.sqrt(kappa)) * (1 - exact)
        assert np.all(np.abs(plain - exact) <= epsilon * (bound / 3 + 8))  # a third: the margin is not used up
        columns = np.argsort(exact)[None, :30]
        accurate, rounding, *_ = factored._accurately([rows[None]], columns, certify=False)
        second_order = (BOUND_FACTOR * epsilon * kappa) ** 2
        found, rest = accurate[0].astype(np.float64), exact[columns[0]]
        seen = rest > 1e-9  # entries this small are beyond the oracle
        assert np.all((np.abs(found - rest) <= second_order + rounding[0] * rest)[seen])


@pytest.mark.parametrize("kind", ["realistic", "columns over six decades", "sparse"])
def test_nothing_is_measured_where_a_bound_leaves_few_columns(monkeypatch, kind):
    rtol = 2e-4

    def unwanted(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(DualFactor, "_amplified", unwanted)
    monkeypatch.setattr(DualFactor, "_measured", unwanted)
    replaced = []
    plain = DualFactor._accurately
    monkeypatch.setattr(
        DualFactor, "_accurately", lambda *args, **options: replaced.append(1) or plain(*args, **options)
    )
    diagonal, in_float64 = evaluated(gradients(kind, 30, 300), 1e-5, rtol)
    assert replaced and not in_float64
    np.testing.assert_allclose(diagonal, damped_diagonal(kind, 30, 300, 1e-5), rtol=rtol)


@pytest.mark.parametrize("pieces", [2, 5])
@pytest.mark.parametrize("kind", ["columns over six decades", "realistic", "means of 100"])
def test_a_block_in_several_chunks_keeps_the_promise(kind, pieces):
    rows = gradients(kind, 64, 600)
    chunks = [np.ascontiguousarray(part)[None] for part in np.array_split(rows, pieces, axis=1)]
    for rtol in RTOLS:
        _, diagonal = factors.evaluate(chunks, 1e-5, rtol)
        assert np.abs(diagonal[0] / damped_diagonal(kind, 64, 600, 1e-5) - 1).max() <= rtol


def realistic_layers(m=128, width=500, blocks=24):
    rng = np.random.default_rng(0)
    of_layers = np.repeat(_decades(rng, -2, 1, blocks), width)
    return (np.concatenate([realistic(rng, m, width) for _ in range(blocks)], axis=1) * of_layers).astype(np.float32)


def test_a_pruning_step_rarely_uses_float64(monkeypatch):
    used = []
    original = DualFactor.of.__func__

    def spying(cls, chunks, damping, dtype):
        used.append(dtype)
        return original(cls, chunks, damping, dtype)

    monkeypatch.setattr(DualFactor, "of", classmethod(spying))
    rows = realistic_layers()
    weights = np.random.default_rng(1).standard_normal(rows.shape[1]).astype(np.float32)
    source = GradientMatrix([rows], block_size=500)
    mfac_step(weights, source, lambda s: s < np.median(s), damping=1e-5, update="independent", devices="cpu")
    assert len(used) >= 8 and used.count(np.float64) <= len(used) / 20


def test_a_pruning_step_chooses_the_mask_of_float64_but_for_saliencies_at_the_threshold():
    rows = realistic_layers()
    weights = np.random.default_rng(1).standard_normal(rows.shape[1]).astype(np.float32)
    count = len(weights) // 2
    source = GradientMatrix([rows], block_size=500)
    step = mfac_step(
        weights, source, lambda s: least_salient(s, count), damping=1e-5, update="independent", devices="cpu"
    )
    fisher = BlockwiseFisher(GradientMatrix([rows.astype(np.float64)], block_size=500), damping=1e-5, devices="cpu")
    exact = reference.saliency(weights, fisher.diagonal())
    differ = step.newly_pruned != least_salient(exact, count)
    threshold = np.sort(exact)[count - 1]
    np.testing.assert_allclose(exact[differ], threshold, rtol=2 * RTOL)
    assert differ.mean() < 1e-3


def test_the_joint_update_refuses_no_block_whose_diagonal_is_accurate_enough():
    rng = np.random.default_rng(0)
    # of so low a rank that float64 keeps 1e-3, but not 1e-5
    rows = rng.standard_normal((300, 3)) @ rng.standard_normal((3, 56)) * 100
    weights = rng.standard_normal(56)

    def step(update):
        source = GradientMatrix([rows], block_size=7)
        return mfac_step(weights, source, lambda s: least_salient(s, 28), damping=1e-5, update=update, devices="cpu")

    independent, joint = step("independent"), step("joint")
    np.testing.assert_array_equal(joint.newly_pruned, independent.newly_pruned)
    assert np.isfinite(joint.weights).all()
    assert joint.predicted_loss_increase <= independent.predicted_loss_increase


@pytest.mark.parametrize("damping", [1e-6, 1e-3])
@pytest.mark.parametrize("update", ["independent", "joint"])
def test_the_update_of_a_pruning_step_has_four_digits_and_its_predicted_loss_increase_too(update, damping):
    rows = realistic_layers()
    weights = np.random.default_rng(1).standard_normal(rows.shape[1]).astype(np.float32)
    chosen = np.random.default_rng(2).random(len(weights)) < 0.5

    def step(gradients):
        source = GradientMatrix([gradients], block_size=500)
        return mfac_step(weights, source, lambda s: chosen, damping=damping, update=update, devices="cpu")

    found, exact = step(rows), step(rows.astype(np.float64))
    moved = np.linalg.norm(exact.weights - weights * ~chosen)
    assert np.linalg.norm(found.weights - exact.weights) <= 1e-4 * moved
    assert found.predicted_loss_increase == pytest.approx(exact.predicted_loss_increase, rel=1e-4)


@pytest.mark.parametrize("m", [26, 30, 40])
def test_equal_rows_with_little_damping_are_not_refused(m):
    # one gradient g: [F^-1]_qq = (damping + |g|^2 - g_q^2) / (damping (damping + |g|^2))
    row, damping = 30 * np.random.default_rng(0).standard_normal(26), 1e-6
    exact = (damping + row @ row - row**2) / (damping + row @ row) / damping
    diagonal = mfac_core.inverse_fisher(np.repeat(row[None], m, axis=0), damping=damping).diagonal()
    np.testing.assert_allclose(diagonal, exact, rtol=1e-8)


def nearly_equal_signs(seed, m=8, width=65_000):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-0.1, 0.1], width)
    return np.where(rng.random((m, width)) < 2e-3, -signs, signs).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_block_of_signs_keeps_the_promise(seed):
    # equal squares are rounded alike, so that the error of their sum grows with the number of columns
    rows, damping = nearly_equal_signs(seed), 1e-5
    exact = rows.astype(np.float64)
    factor = np.linalg.cholesky(exact @ exact.T + len(rows) * damping * np.eye(len(rows)))
    diagonal = 1 - np.sum(np.linalg.solve(factor, exact) ** 2, axis=0)
    for rtol in (1e-5, 2e-5, 5e-5):
        np.testing.assert_allclose(evaluated(rows, damping, rtol)[0], diagonal, rtol=rtol)


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_the_squared_norms_of_long_rows_keep_their_digits(kind):
    shape = (2, 300_000)
    rng = np.random.default_rng(0)
    rows = (0.1 * rng.choice([-1, 1], shape) if kind == "signs" else rng.standard_normal(shape)).astype(np.float32)
    exact = np.sum(rows.astype(np.float64) ** 2, axis=1)
    norms = DualFactor.of([rows[None]], np.full(1, 1e-9), np.float32).norms[0]
    np.testing.assert_allclose(norms, exact, rtol=20 * np.finfo(np.float32).eps)


def almost_of_low_rank(seed, m=8, width=300):
    rng = np.random.default_rng(seed)
    rows = 50 * rng.standard_normal((m, m - 1)) @ rng.standard_normal((m - 1, width))
    return ((rows + 1.5e-4 * rng.standard_normal((m, width))) * _decades(rng, -4, 0, width)).astype(np.float32)


@pytest.mark.parametrize("seed", range(10))
def test_the_error_is_within_rtol_where_eigenvalues_are_lost_in_rounding(seed):
    # float32 makes the least eigenvalue of S a thousand times larger, if the factorization succeeds at all
    rows = almost_of_low_rank(seed)
    values, vectors = np.linalg.svd(rows.astype(np.float64))[1:]
    exact = (8e-5 / (np.append(values, np.zeros(292)) ** 2 + 8e-5)) @ vectors**2
    for rtol in 10 ** np.linspace(-5, -2, 7):
        found = evaluated(rows, 1e-5, float(rtol))
        assert found is None or np.abs(found[0] / exact - 1)[exact > 1e-9].max() <= rtol


@pytest.mark.parametrize("seed", range(4))
def test_float64_is_within_rtol_where_samples_are_nearly_equal_in_pairs(seed):
    # inverses of ill-conditioned panels are rounded by more than eps times their condition number
    rng, m, damping = np.random.default_rng(seed), 64, 1e-8
    pairs = np.repeat(rng.standard_normal((m // 2, 300)), 2, axis=0)[rng.permutation(m)]
    rows = (pairs + 1e-4 * rng.standard_normal((m, 300))).astype(np.float32)
    values, vectors = np.linalg.svd(rows.astype(np.float64))[1:]
    exact = (m * damping / (np.append(values, np.zeros(300 - m)) ** 2 + m * damping)) @ vectors**2
    diagonal, in_float64 = evaluated(rows, damping, 1e-5)
    assert in_float64
    np.testing.assert_allclose(diagonal, exact, rtol=1e-5)
