"""Cholesky factors of CuPy arrays on a GPU, over memory layouts, sizes and values that are not finite."""

import numpy as np
import pytest

from mfac_core.backends import resolve_device

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")
cupy_kernels = pytest.importorskip("mfac_core.fisher.cupy_kernels")

from tests.gpu.work import numbers, spin  # noqa: E402

LAYOUTS = {
    "contiguous": lambda x: x,
    "part": lambda x: cupy.pad(x, ((1, 1), (2, 1), (3, 2)))[1:-1, 2:-1, 3:-2],
    "rows first": lambda x: cupy.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2),
    "columns first": lambda x: cupy.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0),
    "every other": lambda x: cupy.repeat(x, 2, axis=0)[::2],
}


def positive_definite(count, size, seed=0):
    x = numbers((count, size, 2 * size), np.float64, seed)
    return x @ x.transpose(0, 2, 1) / size


def lower_triangles(matrices):
    """Return the matrices on the GPU, NaN above the diagonal."""
    upper = np.triu(np.ones(matrices.shape[1:], bool), 1)
    return cupy.asarray(np.where(upper, matrices.dtype.type(np.nan), matrices))


def small_factors(matrices, shift):
    return cupy_kernels.SmallFactors()(matrices, shift)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 127, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-12)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inverse_factors(size, dtype, tolerance, layout):
    assert size <= cupy_kernels.SmallFactors.largest
    matrices = positive_definite(6, size).astype(dtype)
    x = LAYOUTS[layout](lower_triangles(matrices))
    before = cupy.asnumpy(x)
    inverse, diagonal = small_factors(x, 0.25)
    factor = np.linalg.cholesky(matrices.astype(np.float64) + 0.25 * np.eye(size))
    expected = np.linalg.inv(factor)
    assert inverse.dtype == diagonal.dtype == dtype
    assert inverse.flags.c_contiguous
    assert diagonal.shape == (6, size)
    np.testing.assert_allclose(cupy.asnumpy(inverse), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    np.testing.assert_allclose(cupy.asnumpy(diagonal), np.diagonal(factor, axis1=1, axis2=2), rtol=tolerance)
    assert not np.triu(cupy.asnumpy(inverse), 1).any()
    np.testing.assert_array_equal(cupy.asnumpy(x), before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_each_matrix_may_have_a_shift_of_its_own(dtype, tolerance):
    matrices, shifts = positive_definite(6, 20).astype(dtype), np.linspace(0.25, 3, 6).astype(dtype)
    inverse, diagonal = small_factors(lower_triangles(matrices), cupy.asarray(shifts).reshape(6, 1, 1))
    for i in range(6):
        alone, pivots = small_factors(lower_triangles(matrices[i : i + 1]), float(shifts[i]))
        np.testing.assert_allclose(cupy.asnumpy(inverse[i]), cupy.asnumpy(alone[0]), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(cupy.asnumpy(diagonal[i]), cupy.asnumpy(pivots[0]), rtol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 7, 128])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fault", [-1.0, 0.0, np.nan, np.inf, -np.inf])
def test_a_matrix_without_a_factor_never_gets_a_finite_one(size, dtype, fault):
    good = positive_definite(1, size) + 0.25 * np.eye(size)
    for row in {0, size // 2, size - 1}:
        matrices = np.concatenate([good, good, good]).astype(dtype)
        matrices[1, row, row] = fault
        try:
            _, diagonal = small_factors(lower_triangles(matrices), 0.0)
        except np.linalg.LinAlgError:
            continue
        assert not bool(cupy.isfinite(diagonal[1]).all())


def test_very_many_matrices():
    matrices = positive_definite(500, 20).astype(np.float32)
    few, few_diagonals = small_factors(cupy.asarray(matrices), 0.5)
    many, many_diagonals = small_factors(cupy.asarray(np.tile(matrices, (200, 1, 1))), 0.5)
    assert bool((many.reshape(200, *few.shape) == few).all())
    assert bool((many_diagonals.reshape(200, *few_diagonals.shape) == few_diagonals).all())


def test_it_waits_for_the_work_of_the_current_stream():
    matrices = positive_definite(3, 32).astype(np.float32)
    x = cupy.asarray(matrices)
    x *= 1  # compiles or loads all that is used below: none of it may wait for that
    spin(0)
    small_factors(x, 1.0)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as work:
        spin(50)
        x *= 2
        inverse, _ = small_factors(x, 1.0)
        work.synchronize()
    expected = np.linalg.inv(np.linalg.cholesky(2 * matrices.astype(np.float64) + np.eye(32)))
    np.testing.assert_allclose(cupy.asnumpy(inverse), expected, rtol=0, atol=1e-4)


def test_factors_are_where_their_matrices_are():
    backend = resolve_device("cuda").backend
    if "cuda:1" not in backend.devices():
        pytest.skip("needs two CUDA devices")
    with backend.on("cuda:1"):
        inverse, diagonal = small_factors(cupy.full((2, 1, 1), 10, np.float32), 6.0)
    assert inverse.device.id == diagonal.device.id == 1
    np.testing.assert_array_equal(backend.to_numpy(diagonal), np.full((2, 1), 4))
