from __future__ import annotations

import numpy as np
import pytest

from mfac_core.pruners.fingerprint import fingerprint


def test_equal_bits_have_equal_fingerprints_however_they_lie_in_memory() -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)

    assert fingerprint(values) == fingerprint(values.copy(order="F"))
    assert fingerprint(values) == fingerprint(np.flip(values)[::-1, ::-1, ::-1])
    assert fingerprint(values) == fingerprint(values.astype(">f4"))


def test_what_is_written_once_is_known_on_every_machine() -> None:
    assert fingerprint(np.array([1.0, -2.0], np.float32)) == "b54aa653a2181d0b8d30fb3de8ee6300"


@pytest.mark.parametrize(
    "other",
    [
        np.array([0.0, 1.0, np.nan], np.float64),
        np.array([[0.0, 1.0, np.nan]], np.float32),
        np.array([-0.0, 1.0, np.nan], np.float32),
        np.array([0.0, 1.0 + 2**-23, np.nan], np.float32),
        np.array([0.0, 1.0], np.float32),
    ],
)
def test_another_bit_shape_or_dtype_has_another_fingerprint(other: np.ndarray) -> None:
    values = np.array([0.0, 1.0, np.nan], np.float32)

    assert fingerprint(values) == fingerprint(values.copy())
    assert fingerprint(values) != fingerprint(other)


def test_arrays_without_axes_or_entries_have_fingerprints() -> None:
    assert len({fingerprint(np.zeros(shape)) for shape in [(), (0,), (0, 3), (1,)]}) == 4
