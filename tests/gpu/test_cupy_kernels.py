"""Each kernel for CuPy arrays on a GPU, over memory layouts, sizes and values that are not finite."""

import itertools

import numpy as np
import pytest

from mfac_core.backends import resolve_device

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")
cupy_kernels = pytest.importorskip("mfac_core.fisher.cupy_kernels")

from tests.gpu.work import numbers, spin  # noqa: E402

# views of a given shape, of new arrays of random numbers; ``make`` takes a shape
READ_IN_PLACE = {
    "contiguous": lambda make, n, p, q: make((n, p, q)),
    "part": lambda make, n, p, q: make((n + 2, p + 3, q + 5))[1:-1, 2:-1, 3:-2],
    "transposed": lambda make, n, p, q: make((n, q, p)).transpose(0, 2, 1),
    "transposed part": lambda make, n, p, q: make((n + 2, q + 5, p + 3))[1:-1, 3:-2, 2:-1].transpose(0, 2, 1),
    "rows first": lambda make, n, p, q: make((p, n, q)).transpose(1, 0, 2),
    "columns first": lambda make, n, p, q: make((q, n, p)).transpose(1, 2, 0),
    "every other matrix": lambda make, n, p, q: make((2 * n, p, q))[::2],
    "one for all": lambda make, n, p, q: cupy.broadcast_to(make((1, p, q)), (n, p, q)),
}
COPIED = {
    "every other number": lambda make, n, p, q: make((n, 2 * p, 2 * q))[:, ::2, ::2],
    "rows backwards": lambda make, n, p, q: make((n, p, q))[:, ::-1],
    "matrices backwards": lambda make, n, p, q: make((n, p, q))[::-1],
}


def laid_out(layout, shape, dtype, seed=0):
    return (READ_IN_PLACE | COPIED)[layout](lambda s: cupy.asarray(numbers(s, dtype, seed)), *shape)


def assert_is_product(product, a, b, tolerance):
    a, b = cupy.asnumpy(a).astype(np.longdouble), cupy.asnumpy(b).astype(np.longdouble)
    assert isinstance(product, cupy.ndarray)
    assert product.flags.c_contiguous
    assert product.shape == (a @ b).shape
    assert np.all(np.abs(cupy.asnumpy(product) - a @ b) <= tolerance * (np.abs(a) @ np.abs(b)))


def positive_definite(count, size, seed=0):
    x = numbers((count, size, 2 * size), np.float64, seed)
    return x @ x.transpose(0, 2, 1) / size


def lower_triangles(matrices, layout="contiguous"):
    """Return the matrices on the GPU, NaN above the diagonal."""
    upper = np.triu(np.ones(matrices.shape[1:], bool), 1)
    x = laid_out(layout, matrices.shape, matrices.dtype)
    x[...] = cupy.asarray(np.where(upper, matrices.dtype.type(np.nan), matrices))
    return x


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (4, 0, 3), (0, 5, 3), (3, 5, 0), (2, 3, 31), (3, 1024, 33), (1, 777, 2000), (70_000, 3, 2), (2, 64, 7)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-7), (np.float64, 1e-14)])
@pytest.mark.parametrize("layout", ["contiguous", "rows first", "columns first", "every other", "backwards"])
def test_column_sums_of_squares(shape, dtype, tolerance, layout):
    count, rows, columns = shape
    x = cupy.asarray(numbers(shape, dtype))
    if layout == "rows first":
        x = cupy.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2)
    elif layout == "columns first":
        x = cupy.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)
    elif layout == "every other":
        x = cupy.repeat(x, 2, axis=2)[:, :, ::2]
    elif layout == "backwards":
        x = x[:, ::-1]
    sums = cupy_kernels.column_sums_of_squares(x)
    assert isinstance(sums, cupy.ndarray)
    assert sums.shape == (count, columns)
    assert sums.dtype == dtype
    expected = np.square(cupy.asnumpy(x).astype(np.longdouble)).sum(axis=1)
    np.testing.assert_allclose(cupy.asnumpy(sums), expected.astype(np.float64), rtol=tolerance)


def test_column_sums_of_squares_keep_what_is_not_finite():
    x = cupy.ones((2, 40, 3), np.float32)
    x[0, 7, 1] = np.nan
    x[1, 39, 2] = np.inf
    sums = cupy.asnumpy(cupy_kernels.column_sums_of_squares(x))
    assert np.isnan(sums[0, 1])
    assert np.isinf(sums[1, 2])
    np.testing.assert_array_equal(sums[0, [0, 2]], 40)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saliency(dtype):
    weights, diagonal = numbers(1000, dtype), np.abs(numbers(1000, dtype, seed=1)) + dtype(0.1)
    result = cupy_kernels.saliency(cupy.asarray(weights), cupy.asarray(diagonal))
    assert result.dtype == dtype
    np.testing.assert_allclose(cupy.asnumpy(result), weights * weights / (2 * diagonal), rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "rows", "inner", "columns"),
    [
        (1, 1, 1, 1),
        (3, 5, 7, 4),
        (2, 1, 6, 3),
        (3, 4, 1, 5),
        (2, 6, 5, 1),
        (1, 9, 8, 7),
        (4, 1, 3, 1),
        (2, 40, 300, 64),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-14)])
def test_matmul(count, rows, inner, columns, dtype, tolerance):
    for left, right in itertools.product(READ_IN_PLACE | COPIED, repeat=2):
        a = laid_out(left, (count, rows, inner), dtype, seed=1)
        b = laid_out(right, (count, inner, columns), dtype, seed=2)
        before = cupy.asnumpy(a), cupy.asnumpy(b)
        product = cupy_kernels.matmul(a, b)
        assert product.dtype == dtype
        assert_is_product(product, a, b, tolerance)
        np.testing.assert_array_equal(cupy.asnumpy(a), before[0])
        np.testing.assert_array_equal(cupy.asnumpy(b), before[1])


def test_matmul_copies_no_operand_that_cublas_can_read(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an operand may have been copied")

    monkeypatch.setattr(cupy, "ascontiguousarray", refuse)
    monkeypatch.setattr(cupy, "matmul", refuse)
    for shape in [(3, 5, 5), (1, 5, 5), (3, 1, 1), (1, 1, 1)]:
        for left, right in itertools.product(READ_IN_PLACE, repeat=2):
            a, b = laid_out(left, shape, np.float32, seed=1), laid_out(right, shape, np.float32, seed=2)
            assert_is_product(cupy_kernels.matmul(a, b), a, b, 2e-6)


@pytest.mark.parametrize("columns", [1, 3])
def test_matmul_of_very_many_matrices(columns):
    a = laid_out("transposed", (70_000, 4, 5), np.float32, seed=1)
    b = laid_out("part", (70_000, 5, columns), np.float32, seed=2)
    assert_is_product(cupy_kernels.matmul(a, b), a, b, 2e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (numbers((3, 4)), numbers((4, 2))),
        (numbers((3, 4, 5)), numbers((5, 2))),
        (numbers((1, 4, 5)), numbers((3, 5, 2))),
        (numbers((3, 4, 5)), numbers((3, 5, 2), np.float64)),
        (np.arange(8).reshape(2, 2, 2), np.arange(8).reshape(2, 2, 2)),
        (numbers((3, 4, 0)), numbers((3, 0, 2))),
        (numbers((0, 4, 5)), numbers((0, 5, 2))),
        (numbers((3, 0, 5)), numbers((3, 5, 2))),
        (numbers((3, 4, 5)), numbers((3, 5, 0))),
    ],
)
def test_matmul_leaves_other_operands_to_cupy(a, b):
    product = cupy_kernels.matmul(cupy.asarray(a), cupy.asarray(b))
    assert product.dtype == (a @ b).dtype
    assert product.shape == (a @ b).shape
    np.testing.assert_allclose(cupy.asnumpy(product), a @ b, rtol=1e-4, atol=1e-5)


def test_matmul_refuses_what_does_not_fit():
    with pytest.raises(ValueError):
        cupy_kernels.matmul(cupy.ones((2, 3, 4), np.float32), cupy.ones((2, 3, 4), np.float32))


@pytest.mark.parametrize("size", range(1, 33))
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_inverse_factor(size, dtype, tolerance):
    matrices = positive_definite(6, size).astype(dtype)
    for layout in [layout for layout in READ_IN_PLACE | COPIED if layout != "one for all"]:
        x = lower_triangles(matrices, layout)
        before = cupy.asnumpy(x)
        inverse, diagonal = cupy_kernels.inverse_factor(x, 0.25)
        factor = np.linalg.cholesky(matrices.astype(np.float64) + 0.25 * np.eye(size))
        expected = np.linalg.inv(factor)
        assert inverse.dtype == diagonal.dtype == dtype
        assert inverse.flags.c_contiguous
        assert diagonal.shape == (6, size)
        np.testing.assert_allclose(cupy.asnumpy(inverse), expected, rtol=0, atol=tolerance * np.abs(expected).max())
        np.testing.assert_allclose(
            cupy.asnumpy(diagonal), np.diagonal(factor, axis1=1, axis2=2), rtol=tolerance * np.linalg.cond(factor).max()
        )
        assert not np.triu(cupy.asnumpy(inverse), 1).any()
        np.testing.assert_array_equal(cupy.asnumpy(x), before)


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_inverse_factor_with_a_shift_for_each_matrix(shape, dtype, tolerance):
    matrices, shifts = positive_definite(6, 20).astype(dtype), np.linspace(0.25, 3, 6).astype(dtype)
    inverse, diagonal = cupy_kernels.inverse_factor(lower_triangles(matrices), cupy.asarray(shifts).reshape(shape))
    for i in range(6):
        alone, pivots = cupy_kernels.inverse_factor(lower_triangles(matrices[i : i + 1]), float(shifts[i]))
        np.testing.assert_allclose(cupy.asnumpy(inverse[i]), cupy.asnumpy(alone[0]), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(cupy.asnumpy(diagonal[i]), cupy.asnumpy(pivots[0]), rtol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fault", [-1.0, 0.0, np.nan, np.inf, -np.inf])
def test_a_matrix_without_a_factor_gives_nan_and_spoils_no_other(size, dtype, fault):
    good = positive_definite(size, size) + 0.25 * np.eye(size)
    bad = good.copy()
    bad[np.arange(size), np.arange(size), np.arange(size)] = fault  # in row i of matrix i
    both = np.stack([good, bad], axis=1).reshape(-1, size, size).astype(dtype)
    inverse, diagonal = (cupy.asnumpy(x) for x in cupy_kernels.inverse_factor(lower_triangles(both), 0.0))
    below = np.tril(np.ones((size, size), bool))
    assert np.isfinite(inverse[::2]).all()
    assert np.isfinite(diagonal[::2]).all()
    for i in range(size):
        np.testing.assert_array_equal(inverse[2 * i + 1, :i], inverse[2 * i, :i])
        np.testing.assert_array_equal(diagonal[2 * i + 1, :i], diagonal[2 * i, :i])
        assert np.isnan(diagonal[2 * i + 1, i:]).all()
        assert np.isnan(inverse[2 * i + 1, i:][below[i:]]).all()
        assert not inverse[2 * i + 1, i:][~below[i:]].any()


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, 1e30])
def test_a_fault_beside_the_diagonal_is_seen_in_its_row(fault):
    matrices = positive_definite(3, 20).astype(np.float32)
    matrices[1, 12, 5] = fault
    inverse, diagonal = (cupy.asnumpy(x) for x in cupy_kernels.inverse_factor(lower_triangles(matrices), 0.5))
    assert np.isfinite(inverse[[0, 2]]).all()
    assert np.isfinite(inverse[1, :12]).all()
    assert np.isnan(diagonal[1, 12:]).all()
    assert np.isnan(inverse[1, 12:, :13]).all()


def test_inverse_factor_of_very_many_matrices():
    matrices = positive_definite(500, 20).astype(np.float32)
    few, few_diagonals = cupy_kernels.inverse_factor(cupy.asarray(matrices), 0.5)
    many, many_diagonals = cupy_kernels.inverse_factor(cupy.asarray(np.tile(matrices, (200, 1, 1))), 0.5)
    assert bool((many.reshape(200, *few.shape) == few).all())
    assert bool((many_diagonals.reshape(200, *few_diagonals.shape) == few_diagonals).all())


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0)])
def test_inverse_factor_of_nothing(shape):
    inverse, diagonal = cupy_kernels.inverse_factor(cupy.zeros(shape, np.float32), 1.0)
    assert inverse.shape == shape
    assert diagonal.shape == shape[:2]


def test_inverse_factor_refuses_large_matrices():
    with pytest.raises(ValueError, match="33 rows"):
        cupy_kernels.inverse_factor(cupy.zeros((1, 33, 33), np.float32), 1.0)


def test_matmul_and_inverse_factor_wait_for_the_work_of_the_current_stream():
    a, b = numbers((3, 64, 48)), numbers((3, 48, 40))
    matrices = positive_definite(3, 32).astype(np.float32)
    x, y, z = cupy.asarray(a), cupy.asarray(b), cupy.asarray(matrices)
    x += 0  # compiles or loads all that is used below: none of it may wait for that
    z *= 1
    spin(0)
    cupy_kernels.matmul(x, y)
    cupy_kernels.inverse_factor(z, 1.0)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as work:
        spin(50)
        x += 1
        z *= 2
        product = cupy_kernels.matmul(x, y)
        inverse, _ = cupy_kernels.inverse_factor(z, 1.0)
        work.synchronize()
    np.testing.assert_allclose(cupy.asnumpy(product), (a + 1) @ b, rtol=0, atol=1e-3)
    expected = np.linalg.inv(np.linalg.cholesky(2 * matrices.astype(np.float64) + np.eye(32)))
    np.testing.assert_allclose(cupy.asnumpy(inverse), expected, rtol=0, atol=1e-4)


def test_kernels_run_where_their_arrays_are():
    backend = resolve_device("cuda").backend
    if "cuda:1" not in backend.devices():
        pytest.skip("needs two CUDA devices")
    with cupy.cuda.Device(1):
        x = cupy.ones((2, 10, 3), np.float32)
    sums = cupy_kernels.column_sums_of_squares(x)
    assert sums.device.id == 1
    np.testing.assert_array_equal(backend.to_numpy(sums), np.full((2, 3), 10))
    assert cupy_kernels.saliency(x, x).device.id == 1
    product = cupy_kernels.matmul(x.transpose(0, 2, 1), x)
    assert product.device.id == 1
    np.testing.assert_array_equal(backend.to_numpy(product), np.full((2, 3, 3), 10))
    inverse, diagonal = cupy_kernels.inverse_factor(product, 6.0)
    assert inverse.device.id == diagonal.device.id == 1
    np.testing.assert_array_equal(backend.to_numpy(diagonal)[:, 0], 4)
