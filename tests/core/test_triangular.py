from __future__ import annotations

import numpy as np
import pytest

from mfac_core.fisher.kernels import column_sums_of_squares, lower_gram, small_factors
from mfac_core.fisher.portable_kernels import GRAM_PANEL, MAX_FACTOR
from mfac_core.fisher.triangular import CPU_PANEL, PANEL, TriangularFactor, cholesky, diagonals
from tests.core.strict_backend import strict_devices

TOLERANCE = {np.float32: 2e-4, np.float64: 1e-11}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SIZES = [
    1,
    2,
    15,
    16,
    17,
    33,
    CPU_PANEL,
    CPU_PANEL + 7,
    PANEL - 1,
    PANEL,
    PANEL + 1,
    2 * PANEL,
    2 * PANEL + 37,
    3 * PANEL + 1,
]


def spd(count: int, size: int, dtype: type) -> np.ndarray:
    rows = np.random.default_rng(size).standard_normal((count, size, 2 * size + 3))
    return (rows @ rows.transpose(0, 2, 1) / size).astype(dtype)


def factored(size: int, dtype: type, shift: float = 0.5) -> tuple[TriangularFactor, np.ndarray]:
    """Return our factor of two matrices, and NumPy's float64 factor as the oracle."""
    matrices = spd(2, size, dtype)
    exact = np.linalg.cholesky(matrices.astype(np.float64) + shift * np.eye(size))
    return cholesky(matrices.copy(), shift), exact


def close(found, wanted, dtype) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_solves_and_sums_equal_those_of_the_dense_factor(size, dtype):
    factor, lower = factored(size, dtype)
    b = np.random.default_rng(1).standard_normal((2, size, 5)).astype(dtype)
    solved = np.linalg.solve(lower, b.astype(np.float64))
    close(factor.pivots, diagonals(lower) ** 2, dtype)
    close(factor.solve(b), solved, dtype)
    close(factor.column_sums(b), (solved**2).sum(axis=1), dtype)
    close(factor.solve_transposed(b), np.linalg.solve(lower.transpose(0, 2, 1), b.astype(np.float64)), dtype)
    close(factor.inverse(), np.linalg.inv(lower), dtype)


@pytest.mark.parametrize("size", [3, PANEL + 9])
def test_the_factors_of_some_of_the_matrices(size):
    factor, lower = factored(size, np.float64)
    b = np.ones((1, size, 2))
    close(factor.select_blocks(slice(1, 2)).solve(b), np.linalg.solve(lower[1:], b), np.float64)


def test_bytes_are_those_of_the_panels():
    factor, _ = factored(CPU_PANEL + 3, np.float32)
    assert factor.num_bytes == 2 * 4 * (CPU_PANEL * CPU_PANEL + 3 * CPU_PANEL + 3 * 3)
    device = strict_devices(1)[0]
    factor = cholesky(device.asarray(spd(2, PANEL + 3, np.float32)), 0.5)
    assert factor.num_bytes == 2 * 4 * (PANEL * PANEL + 3 * PANEL + 3 * 3)


@pytest.mark.parametrize("size", [1, 16, 40, PANEL + 5])
def test_a_matrix_that_is_not_positive_definite_is_refused(size):
    matrices = spd(2, size, np.float64)
    matrices[1] -= 100 * np.eye(size)
    with pytest.raises(np.linalg.LinAlgError):
        cholesky(matrices, 0.0)


@DTYPES
@pytest.mark.parametrize("size", [1, 2, 7, MAX_FACTOR])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_small_factors_are_inverses_with_exact_zeros_above(size, scale, dtype):
    matrices = (spd(3, size, np.float64) * scale).astype(dtype)
    inverse, diagonal = small_factors(matrices)(matrices, scale)
    lower = np.linalg.cholesky(matrices.astype(np.float64) + scale * np.eye(size))
    close(diagonal, diagonals(lower), dtype)
    close(inverse, np.linalg.inv(lower), dtype)
    assert not np.triu(inverse, 1).any()


def test_small_factors_can_be_used_again_for_smaller_matrices():
    matrices = spd(1, MAX_FACTOR, np.float64)
    small = small_factors(matrices)
    for size in (MAX_FACTOR, 3, MAX_FACTOR, 5):
        inverse, _ = small(matrices[:, :size, :size], 0.0)
        close(inverse, np.linalg.inv(np.linalg.cholesky(matrices[:, :size, :size])), np.float64)


@pytest.mark.parametrize("size", [5, 40, PANEL + 9])
def test_a_virtual_device_gives_the_same(size):
    device = strict_devices(2)[1]
    matrices, b = spd(2, size, np.float64), np.ones((2, size, 3))
    here, there = cholesky(matrices.copy(), 0.5), cholesky(device.asarray(matrices.copy()), 0.5)
    for name in ("solve", "solve_transposed", "column_sums"):
        found = device.to_numpy(getattr(there, name)(device.asarray(b)))
        np.testing.assert_allclose(found, getattr(here, name)(b), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(device.to_numpy(there.inverse()), here.inverse(), rtol=1e-10, atol=1e-12)


def test_kernels_on_a_virtual_device_equal_those_of_numpy():
    device = strict_devices(1)[0]
    a, b = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    product = device.asarray(a) @ device.asarray(b)
    np.testing.assert_allclose(device.to_numpy(product), a @ b, rtol=1e-12)
    np.testing.assert_allclose(device.to_numpy(column_sums_of_squares(product)), ((a @ b) ** 2).sum(axis=1))


@pytest.mark.parametrize("rows", [1, GRAM_PANEL, GRAM_PANEL + 1, 2 * GRAM_PANEL + 3])
def test_the_lower_triangle_of_a_symmetric_product(rows):
    x = np.random.default_rng(0).standard_normal((2, rows, 5))
    device = strict_devices(2)[1]
    wanted = np.tril(x @ x.transpose(0, 2, 1))
    np.testing.assert_allclose(np.tril(lower_gram(x)), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.tril(device.to_numpy(lower_gram(device.asarray(x)))), wanted, rtol=1e-12, atol=1e-12)
