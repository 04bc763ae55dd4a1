"""Damping auto: measured per block, in all forms of the Fisher, whatever the scale of the gradients is."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mfac_core
from mfac_core import MagnitudeSettings, MFACPruner, MFACSettings
from mfac_core.backends import Device
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.fisher import chunks
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.damping import dampings, mean_diagonals
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.fisher.partition import partition
from mfac_core.fisher.rounding import smallest_square
from mfac_core.fisher.window import GradientWindow
from mfac_core.pruners.step import mfac_step
from mfac_core.session.log_lines import pruning_step_line
from tests import reference
from tests.core.strict_backend import StrictBackend, strict_devices

few = settings(max_examples=40, deadline=None)

TOLERANCE = {np.float32: 1e-4, np.float64: 1e-9}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
UPDATES = pytest.mark.parametrize("update", ["independent", "joint"])
SHAPES = {
    "dual": (5, 24, 8),
    "primal": (20, 24, 8),
    "much primal": (60, 24, 8),
    "short last block": (6, 23, 8),
    "last block shorter than rows": (5, 19, 8),
    "one block, dual": (6, 26, None),
    "one block, primal": (30, 11, None),
    "blocks of one": (3, 7, 1),
    "one row": (1, 12, 4),
    "factors of several panels": (150, 450, 200),
}


class OneGroup(NumpyBackend):
    """Host memory with all blocks of a stored group in one group."""

    def group_bytes(self, device, total):
        return 10**9


DEVICES = {
    "NumPy": lambda: ("cpu",),
    "one group on NumPy": lambda: Device(OneGroup(), "cpu"),
    "one group": lambda: strict_devices(1, StrictBackend(group_bytes=10**9)),
    "three devices": lambda: strict_devices(3),
}


def uneven_gradients(m: int, d: int, dtype=np.float64, scale: float = 1.0) -> np.ndarray:
    """Return gradients whose size differs much between the blocks."""
    rng = np.random.default_rng(100 * m + d)
    return (scale * rng.standard_normal((m, d)) * np.logspace(-2, 1, d)).astype(dtype)


def numbered_weights(d: int, dtype=np.float64) -> np.ndarray:
    return np.random.default_rng(d).standard_normal(d).astype(dtype)


def assert_same(result, expected, dtype) -> None:
    np.testing.assert_array_equal(result.masks, expected.masks["w"])
    largest = np.abs(expected.weights["w"]).max()
    np.testing.assert_allclose(result.weights, expected.weights["w"], rtol=0, atol=TOLERANCE[dtype] * largest)
    assert result.predicted_loss_increase == pytest.approx(
        expected.predicted_loss_increase, rel=10 * TOLERANCE[dtype], abs=0
    )


def test_the_documented_rule():
    gradients = np.array([[1.0, 3.0, 0.5], [1.0, 1.0, 0.5]])  # mean diagonals: (1 + 5) / 2 and 0.25
    by_hand = np.zeros((3, 3))
    by_hand[:2, :2] = [[1 + 0.3, 2], [2, 5 + 0.3]]
    by_hand[2, 2] = 0.25 + 0.025
    found = mfac_core.inverse_fisher(gradients, block_size=2, damping="auto")
    np.testing.assert_allclose(found.diagonal(), np.diag(np.linalg.inv(by_hand)))
    result = mfac_core.prune(np.array([1.0, 2.0, 3.0]), gradients, sparsity=0.4, block_size=2, damping="auto")
    assert result.damping == pytest.approx((0.025, 0.3))


@DTYPES
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1.0, 1e15])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_inverse_fisher_matches_the_dense_oracle(shape, scale, devices, dtype):
    m, d, block_size = SHAPES[shape]
    gradients = uneven_gradients(m, d, dtype, scale)
    inverse = reference.dense_inverse(gradients, "auto", block_size)
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, damping="auto", devices=DEVICES[devices]())
    np.testing.assert_allclose(fisher.diagonal(), np.diag(inverse), rtol=TOLERANCE[dtype])
    x = np.random.default_rng(7).standard_normal((d, 3)).astype(dtype)
    for found, wanted in (
        (fisher.apply(x[:, 0]), inverse @ x[:, 0].astype(np.float64)),
        (fisher @ x, inverse @ x.astype(np.float64)),
        (x.T @ fisher, x.T.astype(np.float64) @ inverse),
    ):
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@DTYPES
@UPDATES
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pruning_step_matches_the_dense_oracle(shape, devices, update, dtype):
    m, d, block_size = SHAPES[shape]
    weights, gradients = numbered_weights(d, dtype), uneven_gradients(m, d, dtype)
    options = dict(sparsity=0.6, block_size=block_size, damping="auto", update=update, num_recomputations=1)
    result = mfac_core.prune(weights, gradients, devices=DEVICES[devices](), **options)
    assert_same(result, reference.prune({"w": weights}, gradients, **options), dtype)
    values = reference.damping_of_weights(gradients, "auto", block_size)
    assert result.damping == pytest.approx((values.min(), values.max()), rel=1e-5)


@DTYPES
@UPDATES
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_that_stay_in_the_cache_keep_their_own_damping(shape, update, dtype, monkeypatch):
    monkeypatch.setattr(chunks, "CACHE_BYTES", 1)
    m, d, block_size = SHAPES[shape]
    weights, gradients = numbered_weights(d, dtype), uneven_gradients(m, d, dtype)
    options = dict(sparsity=0.6, block_size=block_size, damping="auto", update=update)
    result = mfac_core.prune(weights, gradients, devices=Device(OneGroup(), "cpu"), **options)
    assert_same(result, reference.prune({"w": weights}, gradients, **options), dtype)
    inverse = reference.dense_inverse(gradients, "auto", block_size)
    fisher = mfac_core.inverse_fisher(
        gradients, block_size=block_size, damping="auto", devices=Device(OneGroup(), "cpu")
    )
    wanted = inverse @ weights.astype(np.float64)
    np.testing.assert_allclose(fisher @ weights, wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@UPDATES
def test_each_part_of_a_pruning_step_measures_anew(update):
    weights, gradients = numbered_weights(40), uneven_gradients(9, 40)
    options = dict(block_size=8, damping="auto", update=update)
    result = mfac_core.prune(weights, gradients, sparsity=0.8, num_recomputations=2, **options)
    assert_same(
        result, reference.prune({"w": weights}, gradients, sparsity=0.8, num_recomputations=2, **options), np.float64
    )
    halfway = reference.prune({"w": weights}, gradients, sparsity=1 - 0.2**0.5, num_recomputations=1, **options)
    values = reference.damping_of_weights(gradients[:, halfway.masks["w"]], "auto", 8)
    assert result.damping == pytest.approx((values.min(), values.max()))


class ChunkedMatrix(GradientMatrix):
    """Gradients whose one block is split into several chunks."""

    def __init__(self, gradients: np.ndarray, chunk_bytes: int) -> None:
        super().__init__([gradients], block_size=None)
        self.stored_groups = partition(
            self.num_weights,
            None,
            num_gradients=self.count,
            itemsize=self.dtype.itemsize,
            group_bytes=1,
            chunk_bytes=chunk_bytes,
        )


@DTYPES
@UPDATES
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("m, d", [(6, 26), (30, 11)])
def test_one_block_of_several_chunks_has_one_damping(m, d, devices, update, dtype):
    weights, gradients = numbered_weights(d, dtype), uneven_gradients(m, d, dtype)
    source = ChunkedMatrix(gradients, chunk_bytes=m * 5 * gradients.itemsize)
    assert len(source.stored_groups[0].chunk_widths) > 2
    pruned = np.arange(d) % 2 == 0
    device = DEVICES[devices]()

    def select(saliencies):
        return BlockwiseFisher(source, damping=1.0, devices=device).home.asarray(pruned)

    updated, _, increase, damping = mfac_step(weights, source, select, damping="auto", update=update, devices=device)
    inverse = reference.dense_inverse(gradients, "auto")
    wanted = {"independent": reference.independent_update, "joint": reference.joint_update}[update](
        weights, inverse, pruned
    )
    np.testing.assert_allclose(updated - weights, wanted, rtol=0, atol=2 * TOLERANCE[dtype] * np.abs(wanted).max())
    expected = reference.predicted_loss_increase(reference.dense_fisher(gradients, "auto"), wanted)
    assert increase == pytest.approx(expected, rel=10 * TOLERANCE[dtype])
    assert damping == pytest.approx((0.1 * np.mean(gradients.astype(float) ** 2),) * 2, rel=1e-5)


@UPDATES
def test_a_window_on_several_devices_matches_the_dense_oracle(update):
    weights, gradients = numbered_weights(43, np.float32), uneven_gradients(6, 43, np.float32)
    backend = StrictBackend()
    window = GradientWindow(43, 6, block_size=8, device=Device(backend, "device1"))
    for row in gradients:
        window.push(row)
    options = dict(sparsity=0.5, block_size=8, damping="auto", update=update, num_recomputations=1)
    expected = reference.prune({"w": weights}, gradients, **options)
    home = strict_devices(1, backend)[0]
    updated, pruned, increase, _ = mfac_step(
        weights,
        window,
        lambda saliencies: home.asarray(~expected.masks["w"]),
        damping="auto",
        update=update,
        devices=strict_devices(3, backend),
    )
    np.testing.assert_array_equal(pruned, ~expected.masks["w"])
    np.testing.assert_allclose(updated, expected.weights["w"], rtol=0, atol=1e-4 * np.abs(weights).max())
    assert increase == pytest.approx(expected.predicted_loss_increase, rel=1e-3)


@UPDATES
@pytest.mark.parametrize("m", [5, 40], ids=["dual", "primal"])
def test_blocks_that_need_float64_keep_their_own_damping(m, update):
    # alike but for a little: where damping is too little for float32, some blocks of a group are made in float64
    rng = np.random.default_rng(0)
    gradients = rng.standard_normal((m, 120)).astype(np.float32)
    gradients[:, 20:40] = 100 * gradients[:1, 20:40] * (1 + 1e-3 * gradients[:, 20:40])
    gradients[:, 100:] *= 1e-18  # float32 does not hold the squares
    weights = numbered_weights(120, np.float32)
    options = dict(sparsity=0.5, block_size=20, damping="auto", update=update)
    result = mfac_core.prune(weights, gradients, **options)
    assert_same(result, reference.prune({"w": weights}, gradients, **options), np.float32)


@DTYPES
def test_a_diagonal_that_cancels_is_restored_with_the_damping_of_its_block(dtype):
    gradients = np.random.default_rng(0).standard_normal((3, 6000)).astype(dtype)
    gradients[:, :3000] *= 100
    gradients[:, [5, 1700, 4000]] *= 1e5
    fisher = mfac_core.inverse_fisher(gradients, block_size=1500, damping="auto", devices=Device(OneGroup(), "cpu"))
    inverse = reference.dense_inverse(gradients, "auto", 1500)
    np.testing.assert_allclose(fisher.diagonal(), np.diag(inverse), rtol=TOLERANCE[dtype])


@UPDATES
def test_the_loss_of_a_small_update_by_small_gradients_does_not_underflow(update):
    weights = numbered_weights(24, np.float32)
    weights[::4] *= 1e-7
    gradients = np.random.default_rng(0).standard_normal((5, 24))
    options = dict(sparsity=0.25, block_size=8, damping="auto", update=update)
    result = mfac_core.prune(weights, (4e-15 * gradients).astype(np.float32), **options)
    expected = reference.prune({"w": weights}, 4e-15 * gradients, **options)
    np.testing.assert_array_equal(np.flatnonzero(~result.masks), np.arange(0, 24, 4))
    assert result.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase, rel=1e-3, abs=0)


@st.composite
def problems(draw):
    m, d = draw(st.integers(1, 20)), draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    options = dict(
        block_size=draw(st.none() | st.integers(1, 45)),
        sparsity=draw(st.floats(0.1, 0.9)),
        update=draw(st.sampled_from(["independent", "joint"])),
        num_recomputations=draw(st.integers(1, 2)),
    )
    return rng.standard_normal(d), rng.standard_normal((m, d)), options


@few
@given(problems(), st.sampled_from([(np.float32, 40), (np.float64, 300)]), st.integers(-100, 100))
def test_gradients_of_any_scale_prune_alike(problem, dtype_and_range, percent):
    weights, gradients, options = problem
    dtype, most = dtype_and_range
    power = most * percent // 100
    weights, gradients = weights.astype(dtype), gradients.astype(dtype)
    result = mfac_core.prune(weights, gradients, damping="auto", **options)
    scaled = mfac_core.prune(weights, np.ldexp(gradients, power), damping="auto", **options)
    np.testing.assert_array_equal(scaled.masks, result.masks)
    np.testing.assert_allclose(scaled.weights, result.weights, rtol=1e-6, atol=1e-6)
    assert scaled.damping == pytest.approx(tuple(np.ldexp(result.damping, 2 * power)), rel=1e-6, abs=0)
    expected = np.ldexp(result.predicted_loss_increase, 2 * power)
    assert scaled.predicted_loss_increase == pytest.approx(expected, rel=1e-5, abs=0)


@UPDATES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2.0**-110, 1e-25, 1e-15, 1e-4, 1e15, 1e25, 2.0**110])
def test_scales_at_the_ends_of_float32_prune_alike(scale, shape, update):
    m, d, block_size = SHAPES[shape]
    gradients = np.random.default_rng(3).standard_normal((m, d))
    weights = numbered_weights(d, np.float32)
    options = dict(sparsity=0.6, block_size=block_size, damping="auto", update=update)
    result = mfac_core.prune(weights, gradients.astype(np.float32), **options)
    scaled = mfac_core.prune(weights, (scale * gradients).astype(np.float32), **options)
    np.testing.assert_array_equal(scaled.masks, result.masks)
    np.testing.assert_allclose(scaled.weights, result.weights, rtol=0, atol=1e-4)
    assert scaled.predicted_loss_increase == pytest.approx(result.predicted_loss_increase * scale**2, rel=1e-3, abs=0)


def test_a_small_loss_equals_magnitude_with_a_number_and_not_with_auto():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(60)
    gradients = 1e-4 * rng.standard_normal((20, 60)) * np.logspace(-1, 1, 60)
    magnitude = np.abs(weights) > np.median(np.abs(weights))
    by_number = mfac_core.prune(weights, gradients, sparsity=0.5, damping=1e-5)
    by_auto = mfac_core.prune(weights, gradients, sparsity=0.5, damping="auto")
    unscaled = mfac_core.prune(weights, 1e4 * gradients, sparsity=0.5, damping="auto")
    np.testing.assert_array_equal(by_number.masks, magnitude)
    assert np.any(by_auto.masks != magnitude)
    np.testing.assert_array_equal(by_auto.masks, unscaled.masks)


@DTYPES
@UPDATES
@pytest.mark.parametrize("m", [3, 20], ids=["dual", "primal"])
@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1.0, 1e15])
def test_a_block_without_curvature_goes_first_and_by_magnitude(scale, m, update, dtype):
    gradients = uneven_gradients(m, 40, dtype, scale)
    gradients[:, 10:20] = 0
    weights = numbered_weights(40, dtype)
    dead = np.sort(np.abs(weights[10:20]))
    for pruned in (4, 10, 12):
        options = dict(sparsity=pruned / 40, block_size=10, damping="auto", update=update, num_recomputations=1)
        result = mfac_core.prune(weights, gradients, **options)
        gone = np.flatnonzero(~result.masks)
        assert np.count_nonzero((gone >= 10) & (gone < 20)) == min(pruned, 10)
        if pruned <= 10:
            np.testing.assert_array_equal(np.sort(np.abs(weights[gone])), dead[:pruned])
        kept = result.masks[10:20]
        np.testing.assert_array_equal(result.weights[10:20][kept], weights[10:20][kept])
        assert_same(result, reference.prune({"w": weights}, gradients, **options), dtype)


@DTYPES
@UPDATES
@pytest.mark.parametrize("block_size", [4, 8, None])
def test_gradients_that_are_all_zero_prune_by_magnitude(block_size, update, dtype):
    weights = numbered_weights(20, dtype)
    result = mfac_core.prune(
        weights, np.zeros((6, 20), dtype), sparsity=0.5, block_size=block_size, damping="auto", update=update
    )
    np.testing.assert_array_equal(result.masks, np.abs(weights) > np.sort(np.abs(weights))[9])
    np.testing.assert_array_equal(result.weights, np.where(result.masks, weights, 0))
    assert result.damping == (1.0, 1.0)
    assert np.isfinite(result.predicted_loss_increase)
    fisher = mfac_core.inverse_fisher(np.zeros((6, 20), dtype), block_size=block_size, damping="auto")
    np.testing.assert_array_equal(fisher.diagonal(), np.ones(20, dtype))
    np.testing.assert_array_equal(fisher @ weights, weights)


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e-155])
def test_the_smallest_gradients_of_float64_do_no_harm(scale):
    gradients = np.full((3, 8), scale)
    gradients[:, 4:] = 0
    result = mfac_core.prune(numbered_weights(8), gradients, sparsity=0.5, block_size=4, damping="auto")
    assert np.isfinite(result.weights).all()
    assert min(result.damping) > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_named(value):
    gradients = uneven_gradients(6, 20, np.float32)
    gradients[3, 13] = value
    for make in (
        lambda: mfac_core.inverse_fisher(gradients, block_size=8, damping="auto"),
        lambda: mfac_core.prune(numbered_weights(20, np.float32), gradients, sparsity=0.5, damping="auto"),
    ):
        with pytest.raises(ValueError, match="NaN or Inf in 1 of their rows: 3; leave"):
            make()


def test_gradients_whose_squares_float64_cannot_hold_are_refused():
    with pytest.raises(
        mfac_core.IllConditionedError, match="damping auto cannot be measured.*scale the gradients down"
    ):
        mfac_core.inverse_fisher(np.full((2, 4), 1e200), damping="auto")


def test_an_inverse_that_float32_cannot_hold_is_refused_with_the_cure():
    fisher = mfac_core.inverse_fisher(np.full((2, 4), 1e-25, np.float32), damping="auto")
    with pytest.raises(mfac_core.IllConditionedError, match=r"damping 1e-51 gives .* float32 cannot hold; scale the"):
        fisher.diagonal()


@pytest.mark.parametrize("damping", ["Auto", "", "0.1", None, True, -1.0, 0, float("nan")])
def test_what_is_neither_a_number_nor_auto_is_refused(damping):
    for make in (
        lambda: mfac_core.inverse_fisher(np.ones((2, 4)), damping=damping),
        lambda: mfac_core.prune(np.ones(4), np.ones((2, 4)), sparsity=0.5, damping=damping),
        lambda: MFACSettings(final_sparsity=0.5, end_epoch=1.0, damping=damping),
    ):
        with pytest.raises(mfac_core.SettingError, match='damping: .* the rule is damping > 0, or "auto"'):
            make()


@UPDATES
def test_a_number_reads_the_gradients_no_more_often_than_before(update):
    class Counting(GradientMatrix):
        reads = 0

        def chunks(self, group):
            Counting.reads += 1
            return super().chunks(group)

    counts = {}
    for damping in (1e-3, "auto"):
        source, Counting.reads = Counting([uneven_gradients(5, 24)], block_size=8), 0
        fisher = BlockwiseFisher(source, damping=damping, devices="cpu")
        made = Counting.reads
        mfac_step(
            numbered_weights(24), source, lambda s: s < np.median(s), damping=damping, update=update, devices="cpu"
        )
        counts[damping] = (made, Counting.reads - made, len(fisher.groups))
    (made, step, groups), (auto_made, auto_step, _) = counts.values()
    assert (made, step) == (0, 2 * groups)
    assert (auto_made, auto_step) == (groups, 3 * groups)


def test_a_number_is_the_damping_of_all_blocks_and_magnitude_has_none():
    weights, gradients = numbered_weights(20), uneven_gradients(5, 20)
    assert mfac_core.prune(weights, gradients, sparsity=0.5, block_size=4, damping=1e-3).damping == (1e-3, 1e-3)
    pruner = mfac_core.MagnitudePruner(
        MagnitudeSettings(final_sparsity=0.5, end_epoch=1), {"w": weights}, steps_per_epoch=1
    )
    assert pruner.prune({"w": weights}).damping is None


def test_a_pruning_step_that_prunes_no_more_has_no_damping():
    weights = {"w": np.array([0.0, 0.0, 1.0, 2.0])}
    pruner = MFACPruner(MFACSettings(final_sparsity=0.5, end_epoch=1, damping="auto"), weights, steps_per_epoch=1)
    assert pruner.prune(weights).damping is None


def test_the_log_names_the_dampings_that_were_measured():
    weights, gradients = numbered_weights(20), uneven_gradients(5, 20)
    by_auto = MFACSettings(final_sparsity=0.5, end_epoch=1, damping="auto")
    others = dict(modifier="", names=["w"], step=1, steps_per_epoch=1, num_rows=5, seconds=0.1)

    def line(block_size, settings=by_auto):
        result = mfac_core.prune(
            weights, gradients, sparsity=0.5, block_size=block_size, damping=settings.damping, update="joint"
        )
        return pruning_step_line(result, settings=settings, **others), result.damping

    said, (smallest, largest) = line(4)
    assert f", damping {smallest:.3g} to {largest:.3g}, predicted" in said
    said, (only, _) = line(None)
    assert f", damping {only:.3g}, predicted" in said
    assert "damping" not in line(4, replace(by_auto, damping=1e-3))[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1.0, 1e25, 1e37])
def test_mean_diagonals_are_measured_where_float32_holds_no_squares(scale):
    gradients = (scale * np.random.default_rng(0).standard_normal((2, 5, 6))).astype(np.float32)
    wanted = np.mean(gradients.astype(np.float64) ** 2, axis=(1, 2))
    np.testing.assert_allclose(mean_diagonals([gradients]), wanted, rtol=1e-6)
    np.testing.assert_allclose(mean_diagonals([gradients[:, :, :4], gradients[:, :, 4:]]), wanted, rtol=1e-6)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=6), st.integers(1, 100))
def test_dampings_are_positive_and_near_their_unit(means, width):
    (found,), unit = dampings([np.array(means)], [width])
    assert np.all(found > 0) and np.all(np.isfinite(found))
    assert np.frexp(unit)[0] == 0.5
    if max(means) > 1e-190:
        assert np.all(found / unit >= 1e-12)
        assert 0.5 <= np.mean(found) / unit <= 2.1


def test_auto_is_no_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="mfac_core"):
        mfac_core.prune(
            numbered_weights(20), uneven_gradients(5, 20), sparsity=0.5, damping="auto", num_recomputations=1
        )
    assert not caplog.records


def test_float32_is_left_where_damping_says_that_it_holds_no_squares():
    assert 1e-32 < smallest_square(np.ones(1, np.float32)) < 1e-30
