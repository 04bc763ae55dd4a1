from __future__ import annotations

import re
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mfac_core
from mfac_core.fisher import chunks
from mfac_core.fisher.matrix import GradientMatrix
from tests import reference
from tests.core.strict_backend import strict_devices

few = settings(max_examples=60, deadline=None)

TOLERANCE = {np.float32: 1e-4, np.float64: 1e-9}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])

SHAPES = {
    "fewer rows than block": (5, 24, 8),
    "as many rows as block": (8, 24, 8),
    "more rows than block": (20, 24, 8),
    "short last block": (6, 23, 8),
    "last block shorter than rows": (5, 19, 8),
    "block above d": (6, 10, 64),
    "one block, dual": (6, 26, None),
    "one block, primal": (30, 11, None),
    "one row": (1, 12, 4),
    "one weight": (3, 1, 8),
    "one row, one weight": (1, 1, None),
    "blocks of one": (3, 7, 1),
}


@cache
def gaussian(m: int, d: int, scale: float, dtype: type) -> np.ndarray:
    rng = np.random.default_rng(100 * m + d)
    return (scale * rng.standard_normal((m, d))).astype(dtype)


@cache
def exact(shape: str, scale: float, damping: float, dtype: type) -> np.ndarray:
    m, d, block_size = SHAPES[shape]
    return reference.exact_inverse(gaussian(m, d, scale, dtype), damping, block_size)


def assert_matches(gradients, block_size, damping, inverse, tolerance=0.0) -> None:
    dtype = gradients.dtype.type
    tolerance = max(tolerance, TOLERANCE[dtype])
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=damping)
    x = np.random.default_rng(7).standard_normal(gradients.shape[1]).astype(dtype)
    diagonal, product = fisher.diagonal(), fisher.apply(x)
    assert diagonal.shape == product.shape == (gradients.shape[1],)
    assert diagonal.dtype == product.dtype == dtype
    expected = inverse @ x.astype(np.float64)
    diagonal_error = np.max(np.abs(diagonal.astype(np.float64) / np.diag(inverse) - 1))
    product_error = np.max(np.abs(product - expected)) / np.max(np.abs(expected))
    assert diagonal_error <= tolerance
    assert product_error <= tolerance


@DTYPES
@pytest.mark.parametrize("damping", [1e-8, 1e-5, 1e-2, 1.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_exact_inverse(shape, scale, damping, dtype):
    m, d, block_size = SHAPES[shape]
    assert_matches(gaussian(m, d, scale, dtype), block_size, damping, exact(shape, scale, damping, dtype))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_recursion_of_the_paper(shape, dtype):
    m, d, block_size = SHAPES[shape]
    gradients = gaussian(m, d, 1.0, dtype)
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=1e-3)
    x = np.linspace(-1, 2, d).astype(dtype)
    expected = reference.recursion_apply(gradients, 1e-3, x, block_size)
    np.testing.assert_allclose(
        fisher.diagonal(), reference.recursion_diagonal(gradients, 1e-3, block_size), rtol=TOLERANCE[dtype]
    )
    np.testing.assert_allclose(fisher.apply(x), expected, rtol=0, atol=TOLERANCE[dtype] * np.max(np.abs(expected)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_dense_oracle_and_the_recursion_agree_with_the_exact_inverse(shape):
    m, d, block_size = SHAPES[shape]
    gradients, inverse = gaussian(m, d, 1.0, np.float64), exact(shape, 1.0, 1e-2, np.float64)
    np.testing.assert_allclose(reference.dense_inverse(gradients, 1e-2, block_size), inverse, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(reference.recursion_diagonal(gradients, 1e-2, block_size), np.diag(inverse), rtol=1e-9)


@DTYPES
@pytest.mark.parametrize(
    "m, d, block_size",
    [(150, 450, 200), (150, 450, None), (64, 200, 70), (65, 200, 70), (200, 300, 150), (130, 150, 64), (130, 150, 65)],
)
def test_matches_the_dense_inverse_in_factors_of_several_panels(m, d, block_size, dtype):
    gradients = gaussian(m, d, 1.0, dtype)
    assert_matches(gradients, block_size, 1e-2, reference.dense_inverse(gradients, 1e-2, block_size))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e37])
def test_the_exact_inverse_has_digits_to_spare(scale):
    gradients = gaussian(5, 6, scale, np.float64)
    # One of six directions has no gradient, so its eigenvalue of F^-1 is 1 / damping; the others follow from the SVD.
    trace = np.trace(reference.exact_inverse(gradients, 1e-5)) * 1e-5
    eigenvalues = np.linalg.svd(gradients / scale, compute_uv=False) ** 2 * scale * scale / 5
    assert trace == pytest.approx(1 + np.sum(1e-5 / (1e-5 + eigenvalues)), rel=1e-12)


@DTYPES
@pytest.mark.parametrize("m, block_size", [(4, 3), (4, 4), (4, 9), (4, None)])
def test_zero_gradients_give_exactly_one_over_damping(m, block_size, dtype):
    fisher = mfac_core.inverse_fisher(np.zeros((m, 10), dtype), block_size=block_size, damping=0.25)
    x = np.arange(10).astype(dtype)
    np.testing.assert_array_equal(fisher.diagonal(), np.full(10, 4, dtype))
    np.testing.assert_array_equal(fisher.apply(x), 4 * x)


@DTYPES
def test_a_weight_without_gradients_has_exactly_one_over_damping(dtype):
    gradients = gaussian(5, 12, 1.0, dtype).copy()
    gradients[:, 3] = 0
    diagonal = mfac_core.inverse_fisher(gradients, block_size=6, damping=0.25).diagonal()
    assert diagonal[3] == 4
    assert np.all(np.delete(diagonal, 3) < 4)


@DTYPES
@pytest.mark.parametrize("damping", [1e-8, 1e-5, 1e-2])
@pytest.mark.parametrize("block_size", [4, 8, None])
def test_duplicated_rows(block_size, damping, dtype):
    gradients = np.repeat(gaussian(3, 16, 1.0, dtype), 4, axis=0)
    # Where there are more rows than weights the Fisher itself is factored, and its condition is about 20 / damping.
    rounding = 20 / damping * np.finfo(np.float64).eps
    inverse = reference.exact_inverse(gradients, damping, block_size)
    assert_matches(gradients, block_size, damping, inverse, tolerance=rounding)


@pytest.mark.parametrize("scale, damping", [(30, 1e-6), (1000, 1e-5)])
def test_a_repeated_sample_beside_weights_without_gradients_is_not_refused(scale, damping, monkeypatch):
    monkeypatch.setattr(chunks, "CACHE_BYTES", 1)
    gradients = scale * np.random.default_rng(0).standard_normal((6, 40))
    gradients[:, 10:20] = gradients[:, 30:] = 0
    gradients[:, 20:] /= 100
    gradients[4:] = gradients[0]
    assert_matches(gradients, 20, damping, reference.exact_inverse(gradients, damping, 20))


def test_a_sum_that_rounds_to_one_or_above_does_not_refuse_its_block():
    gradients = np.random.default_rng(0).standard_normal((1, 600)).astype(np.float32)
    gradients[:, ::3] *= 1e5
    assert_matches(gradients, 3, 1e-5, reference.exact_inverse(gradients, 1e-5, 3))


@DTYPES
@pytest.mark.parametrize("factor", [1e2, 1e3])
@pytest.mark.parametrize("m, block_size", [(5, 8), (12, 8), (5, None)])
def test_a_hugely_dominating_column(m, block_size, factor, dtype):
    gradients = gaussian(m, 16, 1.0, dtype).copy()
    gradients[:, 2] *= factor
    assert_matches(gradients, block_size, 1e-5, reference.exact_inverse(gradients, 1e-5, block_size))


@DTYPES
@pytest.mark.parametrize("factor", [1e5, 1e6])
def test_the_diagonal_of_a_dominating_column_does_not_cancel(factor, dtype):
    gradients = gaussian(5, 16, 1.0, dtype).copy()
    gradients[:, 2] *= factor
    diagonal = mfac_core.inverse_fisher(gradients, block_size=None, damping=1e-5).diagonal()
    expected = np.diag(reference.exact_inverse(gradients, 1e-5))
    assert expected[2] < 1e-8 * np.median(expected)
    np.testing.assert_allclose(diagonal[2], expected[2], rtol=1e-6 if dtype is np.float32 else 1e-9)
    np.testing.assert_allclose(diagonal, expected, rtol=1e-4)


def _nearly_duplicated_rows(m: int, dtype: type) -> np.ndarray:
    gradients = np.repeat(gaussian(1, 16, 1.0, np.float64), m, axis=0)
    return (gradients + 1e-4 * gaussian(m, 16, 1.0, np.float64)).astype(dtype)


def _nearly_duplicated_columns(m: int, dtype: type) -> np.ndarray:
    gradients = np.repeat(gaussian(m, 1, 1.0, np.float64), 16, axis=1)
    return (gradients + 1e-5 * gaussian(m, 16, 1.0, np.float64)).astype(dtype)


def _graded_columns(m: int, dtype: type) -> np.ndarray:
    return (gaussian(m, 16, 1.0, np.float64) * np.logspace(-6, 6, 16)).astype(dtype)


def _graded_rows(m: int, dtype: type) -> np.ndarray:
    return (gaussian(m, 16, 1.0, np.float64) * np.logspace(-6, 6, m)[:, None]).astype(dtype)


def _one_column_at_1e7(m: int, dtype: type) -> np.ndarray:
    gradients = gaussian(m, 16, 1.0, dtype).copy()
    gradients[:, 2] *= 1e7
    return gradients


@DTYPES
@pytest.mark.parametrize("damping", [1e-8, 1e-4])
@pytest.mark.parametrize("m, block_size", [(5, 8), (7, 8), (8, 8), (12, 8), (9, None)])
@pytest.mark.parametrize(
    "hard",
    [_nearly_duplicated_rows, _nearly_duplicated_columns, _graded_columns, _graded_rows, _one_column_at_1e7],
    ids=lambda make: make.__name__.strip("_"),
)
def test_a_hard_block_is_either_accurate_or_refused(hard, m, block_size, damping, dtype):
    gradients = hard(m, dtype)
    inverse = reference.exact_inverse(gradients, damping, block_size)
    try:
        diagonal = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=damping).diagonal()
    except mfac_core.IllConditionedError as error:
        assert "damping" in str(error)
        return
    assert np.max(np.abs(diagonal.astype(np.float64) / np.diag(inverse) - 1)) <= TOLERANCE[np.float32]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("m, block_size", [(5, 6), (9, 6)])
@pytest.mark.parametrize("scale, dtype", [(1e19, np.float32), (1e37, np.float32), (1e200, np.float64)])
def test_gradients_whose_squares_overflow_are_computed_accurately_or_refused(scale, dtype, m, block_size):
    gradients = (scale * gaussian(m, 12, 1.0, np.float64)).astype(dtype)
    try:
        diagonal = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=1e-5).diagonal()
    except mfac_core.IllConditionedError:
        return
    inverse = reference.exact_inverse(gradients, 1e-5, block_size)
    np.testing.assert_allclose(diagonal, np.diag(inverse), rtol=TOLERANCE[np.float32], atol=np.finfo(dtype).tiny)


@DTYPES
def test_inputs_are_unchanged(dtype):
    gradients, x = gaussian(6, 23, 1.0, dtype).copy(), np.arange(23).astype(dtype)
    before = gradients.tobytes(), x.tobytes()
    fisher = mfac_core.inverse_fisher(gradients, block_size=8, damping=1e-3)
    fisher.diagonal()
    fisher.apply(x)
    assert (gradients.tobytes(), x.tobytes()) == before


def test_the_results_are_the_callers_to_change():
    gradients = gaussian(6, 23, 1.0, np.float64)
    fisher = mfac_core.inverse_fisher(gradients, block_size=8, damping=1e-3)
    expected = fisher.diagonal().copy()
    fisher.diagonal()[:] = -1
    np.testing.assert_allclose(fisher.diagonal(), expected, rtol=1e-12)


def test_readonly_and_strided_gradients_are_read_as_they_are():
    base = gaussian(6, 46, 1.0, np.float64)
    strided = base[::2, ::2]
    strided.flags.writeable = False
    expected = mfac_core.inverse_fisher(strided.copy(), block_size=8, damping=1e-3).diagonal()
    for layout in (strided, np.asfortranarray(strided)):
        found = mfac_core.inverse_fisher(layout, block_size=8, damping=1e-3).diagonal()
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_defaults_are_blocks_of_2000_and_damping_1e_5():
    gradients = gaussian(2, 2005, 1.0, np.float64)
    expected = mfac_core.inverse_fisher(gradients, block_size=2000, damping=1e-5, devices=("cpu",)).diagonal()
    np.testing.assert_allclose(mfac_core.inverse_fisher(gradients).diagonal(), expected, rtol=1e-12)
    other = mfac_core.inverse_fisher(gradients, block_size=2001).diagonal()
    assert not np.allclose(other, expected, rtol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [5, 40])
def test_rows_that_are_not_finite_are_refused_by_number(value, m):
    gradients = gaussian(m, 24, 1.0, np.float32).copy()
    gradients[1, 0] = value
    gradients[4, 23] = value
    with pytest.raises(ValueError, match=r"(?i)rows?\b") as refusal:
        mfac_core.inverse_fisher(gradients, block_size=8, damping=1e-3).diagonal()
    assert {"1", "4"} <= set(re.findall(r"\d+", str(refusal.value)))


@pytest.mark.parametrize("shape", [(), (6,), (2, 3, 4)])
def test_gradients_that_are_no_matrix_are_refused(shape):
    with pytest.raises(ValueError, match="gradients"):
        mfac_core.inverse_fisher(np.ones(shape), block_size=2, damping=1e-3)


@pytest.mark.parametrize("shape", [(0, 6), (6, 0), (0, 0)])
def test_empty_gradients_are_refused(shape):
    with pytest.raises(ValueError, match="gradients"):
        mfac_core.inverse_fisher(np.ones(shape), block_size=2, damping=1e-3)


@pytest.mark.parametrize("dtype", [np.int64, np.complex128, np.bool_])
def test_gradients_that_are_no_real_floats_are_refused(dtype):
    with pytest.raises((ValueError, TypeError), match="gradients"):
        mfac_core.inverse_fisher(np.ones((3, 4), dtype), block_size=2, damping=1e-3)


@pytest.mark.parametrize("damping", [0.0, -1e-5, float("nan"), float("inf")])
def test_damping_must_be_positive(damping):
    with pytest.raises(ValueError, match="damping"):
        mfac_core.inverse_fisher(np.ones((3, 4)), block_size=2, damping=damping)


@pytest.mark.parametrize("block_size", [0, -1, 2.5])
def test_block_size_must_be_a_positive_integer(block_size):
    with pytest.raises((ValueError, TypeError), match="block_size"):
        mfac_core.inverse_fisher(np.ones((3, 4)), block_size=block_size, damping=1e-3)


@pytest.mark.parametrize("shape", [(3,), (5,), (0,), (), (1, 4), (3, 4), (4, 1, 1)])
def test_apply_refuses_a_vector_of_another_size(shape):
    fisher = mfac_core.inverse_fisher(np.ones((3, 4)), block_size=2, damping=1e-3)
    with pytest.raises(ValueError, match=r"x must have shape \(4,\) or \(4, k\), got "):
        fisher.apply(np.ones(shape))
    with pytest.raises(ValueError, match=r"its vectors are columns, so pass x\.T"):
        fisher @ np.ones((2, 4))


@pytest.mark.parametrize("value", [{"a": np.ones((3, 4))}, [[1.0, 2.0]], None, "x", 3, 1.5])
def test_what_is_no_array_is_refused_with_what_is_expected(value):
    got = f"got {type(value).__name__}; "
    with pytest.raises(TypeError, match=rf"gradients must be an array of shape \(m, d\), one gradient sample .*{got}"):
        mfac_core.inverse_fisher(value)
    fisher = mfac_core.inverse_fisher(np.ones((3, 4)))
    with pytest.raises(TypeError, match=rf"x must be an array of shape \(4,\) or \(4, k\), {got}"):
        fisher @ value
    with pytest.raises(TypeError, match="flatten its arrays and concatenate them"):
        fisher.apply({"a": np.ones(4)})
    with pytest.raises(ValueError, match="x must be float32 or float64, got int64"):
        fisher.apply(np.ones(4, np.int64))


@DTYPES
@pytest.mark.parametrize("damping", [1e-5, 1e-2])
@pytest.mark.parametrize("k", [1, 2, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_many_vectors_at_once_match_the_exact_inverse_in_each_column(shape, k, damping, dtype):
    m, d, block_size = SHAPES[shape]
    gradients, inverse = gaussian(m, d, 1.0, dtype), exact(shape, 1.0, damping, dtype)
    x = np.random.default_rng(3).standard_normal((d, k)).astype(dtype)
    x[:, : min(k, m)] = gradients[: min(k, m)].T  # of which F^-1 leaves little
    x *= np.logspace(-6, 6, k, dtype=dtype)  # each column has digits of its own
    before = x.copy()
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=damping)
    product = fisher @ x
    assert product.shape == (d, k) and product.dtype == dtype
    np.testing.assert_array_equal(x, before)
    expected = inverse @ x.astype(np.float64)
    error = np.abs(product - expected).max(axis=0) / np.abs(expected).max(axis=0)
    assert error.max() <= max(TOLERANCE[dtype], 1e-8)
    for column in range(min(k, 3)):
        alone = fisher.apply(x[:, column])
        np.testing.assert_allclose(product[:, column], alone, rtol=0, atol=1e-6 * np.abs(alone).max())


@few
@given(
    st.integers(1, 9), st.integers(1, 14), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 16)), st.booleans()
)
def test_products_of_any_shape_match_the_dense_inverse(m, d, k, block_size, is_turned):
    rng = np.random.default_rng(m + 20 * d + 300 * k)
    gradients, x = rng.standard_normal((m, d)), rng.standard_normal((k, d)).T if is_turned else rng.random((d, k))
    product = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=0.1) @ x
    np.testing.assert_allclose(product, reference.dense_inverse(gradients, 0.1, block_size) @ x, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("block_size", [7, 40, None])
def test_many_vectors_over_several_devices(block_size, devices):
    gradients, x = gaussian(12, 40, 1.0, np.float32), gaussian(50, 40, 1.0, np.float32).T
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, devices=strict_devices(devices))
    expected = reference.exact_inverse(gradients, 1e-5, block_size) @ x.astype(np.float64)
    np.testing.assert_allclose(fisher @ x, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_blocks_are_read_once_for_many_vectors(monkeypatch):
    read = []
    chunks = GradientMatrix.chunks
    monkeypatch.setattr(GradientMatrix, "chunks", lambda self, group: read.append(group) or chunks(self, group))
    fisher = mfac_core.inverse_fisher(gaussian(5, 24, 1.0, np.float32), block_size=8)
    fisher.apply(np.ones((24, 200), np.float32))
    assert len(read) == len(set(read)) > 0


def test_no_vectors_at_all():
    assert (mfac_core.inverse_fisher(np.ones((3, 4))) @ np.ones((4, 0))).shape == (4, 0)


def test_cuda_without_cupy_names_the_extras(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(mfac_core.DeviceError) as refusal:
        mfac_core.inverse_fisher(np.ones((3, 4)), devices=("cuda:0",)).diagonal()
    assert "cuda:0" in str(refusal.value)
    assert "mfac-core[cuda12]" in str(refusal.value)
    assert "cuda13" in str(refusal.value)


@pytest.mark.parametrize("device", ["cpu:3", "gpu", "tpu:0", "", "cuda:x", "cuda:-1"])
def test_a_device_that_does_not_exist_is_refused_with_those_that_do(device):
    with pytest.raises(mfac_core.DeviceError, match=r"\bcpu\b") as refusal:
        mfac_core.inverse_fisher(np.ones((3, 4)), devices=(device,)).diagonal()
    assert repr(device) in str(refusal.value) or f'"{device}"' in str(refusal.value)


def test_no_devices_at_all_are_refused():
    with pytest.raises(ValueError, match="device"):
        mfac_core.inverse_fisher(np.ones((3, 4)), devices=()).diagonal()


@pytest.mark.parametrize("m, d, block_size", [(24, 200, 100), (24, 90, None), (200, 40, 20)])
def test_products_with_gradients_themselves_lose_no_digits(m, d, block_size):
    # F^-1 leaves about damping / |g|^2 of a gradient: what is left is the small difference of large numbers
    gradients = gaussian(m, d, 1.0, np.float32)
    fisher = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=1e-5)
    expected = reference.exact_inverse(gradients, 1e-5, block_size) @ gradients[0].astype(np.float64)
    np.testing.assert_allclose(fisher.apply(gradients[0]), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_products_with_gradients_that_are_alike_lose_no_digits():
    rows = gaussian(64, 2000, 1.0, np.float64)
    gradients = (rows[:1] + 0.1 * rows).astype(np.float32)
    expected = mfac_core.inverse_fisher(gradients.astype(np.float64)).apply(gradients[0].astype(np.float64))
    product = mfac_core.inverse_fisher(gradients).apply(gradients[0])
    np.testing.assert_allclose(product, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(40))
def test_float32_is_left_before_it_loses_digits(seed):
    rng = np.random.default_rng(seed)
    m, d = [(12, 40), (40, 60), (200, 40), (20, 200)][seed % 4]
    rows, damping = rng.standard_normal((m, d)), 10 ** rng.uniform(-5, 0)
    alike, graded = rows[:1] + 10 ** rng.uniform(-3, 0) * rows, rows * np.logspace(0, rng.uniform(0, 3), d)
    gradients = (alike if seed % 3 else graded).astype(np.float32)
    diagonal = mfac_core.inverse_fisher(gradients, block_size=None, damping=damping).diagonal()
    np.testing.assert_allclose(diagonal, np.diag(reference.dense_inverse(gradients, damping)), rtol=1e-5)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", ["graded columns", "alike rows"])
def test_what_float64_cannot_hold_is_refused_rather_than_wrong(kind, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((5, 8))
    graded, alike = rows * np.logspace(0, rng.uniform(5.5, 7), 8), rows[:1] + 10 ** rng.uniform(-7, -5) * rows
    gradients, damping = graded if kind == "graded columns" else alike, 10 ** rng.uniform(-12, -11)
    try:
        diagonal = mfac_core.inverse_fisher(gradients, block_size=None, damping=damping).diagonal()
    except mfac_core.IllConditionedError:
        return
    np.testing.assert_allclose(diagonal, np.diag(reference.exact_inverse(gradients, damping)), rtol=1e-4)


def test_rows_are_multiplied_from_the_left():
    rng = np.random.default_rng(0)
    fisher = mfac_core.inverse_fisher(rng.standard_normal((4, 6)), damping=0.1)
    rows = rng.standard_normal((3, 6))
    np.testing.assert_array_equal(rows @ fisher, (fisher @ rows.T).T)
    np.testing.assert_array_equal(rows[0] @ fisher, fisher @ rows[0])
    with pytest.raises(TypeError, match=r"x must be an array of shape \(6,\) or \(k, 6\), got list"):
        [1.0] * 6 @ fisher


@pytest.mark.parametrize("rtol", [0, 0.0, 1, 1.0, -1e-5, 2, float("nan"), float("inf"), True, "1e-5", None])
def test_rtol_must_be_between_0_and_1(rtol):
    with pytest.raises(ValueError, match=rf"rtol must be a number between 0 and 1, such as 1e-5, got {rtol!r}"):
        mfac_core.inverse_fisher(np.ones((3, 4)), rtol=rtol)


def test_an_error_that_float64_cannot_keep_is_refused_with_what_was_asked():
    gradients = gaussian(5, 8, 1e4, np.float64)
    mfac_core.inverse_fisher(gradients, rtol=1e-5).diagonal()
    with pytest.raises(mfac_core.IllConditionedError, match="a relative error of 1e-15 with damping 1e-05.* rtol"):
        mfac_core.inverse_fisher(gradients, rtol=1e-15).diagonal()
