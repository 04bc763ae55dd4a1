from __future__ import annotations

import logging
import re

import numpy as np
import pytest
from array_api_strict import Device as VirtualDevice
from array_api_strict import asarray as strict_array
from hypothesis import given
from hypothesis import strategies as st

from mfac_core import MFACPruner, MFACSettings, prune
from mfac_core.backends import Device
from mfac_core.fisher import window_checks
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.fisher.window import GradientWindow
from mfac_core.fisher.window_checks import window_warnings
from mfac_core.settings.checks import Damping
from tests.core.strict_backend import StrictBackend

DAMPING = 1e-5
ZERO = "gradient samples are zero, so M-FAC reduces to magnitude pruning"
NOISE = "are as small as rounding errors"
LOST = "the damping of .* hides the empirical Fisher"
EQUAL = "only 1 is distinct, so the Fisher has rank 1"
ALIKE = "are nearly equal"
REPEATED = r"only \d+ are distinct"
ALL = (ZERO, NOISE, LOST, EQUAL, ALIKE, REPEATED)


def normal(rows: int, columns: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(dtype)


def logged(rows: np.ndarray, *, damping: Damping = DAMPING, block_size: int | None = 100) -> list[str]:
    """Which of the sentences are told of rows; the same of plain arrays and of a window."""
    matrix = window_warnings(GradientMatrix([rows], block_size=block_size), damping=damping)
    window = GradientWindow(rows.shape[1], len(rows), block_size=block_size, dtype=rows.dtype)
    for row in rows:
        window.push(row)
    assert window_warnings(window, damping=damping) == matrix
    found = [sentence for sentence in ALL for warning in matrix if re.search(sentence, warning)]
    assert len(found) == len(matrix)
    return found


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 12),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([None, 1, 3, 7]),
    values=st.sampled_from([2, 1000]),
    at_once=st.sampled_from([1, 5, 100]),
)
def test_the_number_of_distinct_rows_is_that_of_a_plain_comparison(
    seed: int, rows: int, columns: int, block_size: int | None, values: int, at_once: int
) -> None:
    gradients = np.random.default_rng(seed).integers(1, values + 1, size=(rows, columns)).astype(np.float32)
    distinct = len({row.tobytes() for row in gradients})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_checks, "_NUMBERS_AT_ONCE", at_once * rows)
        source = GradientMatrix([gradients], block_size=block_size)
        warnings = window_warnings(source, damping=DAMPING)
    if distinct == rows:
        assert warnings == []
    else:
        (warning,) = warnings
        assert f"of {rows} gradient samples only {distinct} {'is' if distinct == 1 else 'are'} distinct" in warning


@pytest.mark.parametrize("block_size", [None, 100, 3000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_healthy_rows_are_not_spoken_of(dtype: type, block_size: int | None) -> None:
    rows = normal(8, 10_000, dtype)
    assert logged(rows, block_size=block_size) == []
    assert logged(rows[:1], block_size=block_size) == []
    # a gradient of few weights, as of embeddings, in rows that share most of what they hold
    sparse = np.zeros_like(rows)
    sparse[:, -3:] = 1 + 0.01 * rows[:, :3]
    assert logged(sparse, block_size=block_size) == []


@pytest.mark.parametrize("count", [1, 4])
def test_rows_of_zeros_are_named_alone(count: int) -> None:
    assert logged(np.zeros((count, 10_000), np.float32)) == [ZERO]
    assert logged(-np.zeros((count, 300))) == [ZERO]
    one = np.zeros((count, 10_000), np.float32)
    one[0, -1] = 1
    assert ZERO not in logged(one)


def test_rounding_errors_are_named_by_the_norm_of_rows_in_their_precision() -> None:
    rows = normal(4, 10_000) / 100  # of norm 1
    assert logged(1e-6 * rows) == [NOISE]
    assert logged(1e-6 * rows, damping=1e-30) == [NOISE]
    assert logged(1e-5 * rows, damping=1e-30) == []
    in_double = (normal(4, 10_000, np.float64)) / 100
    assert logged(1e-6 * in_double, damping=1e-30) == []
    assert logged(1e-15 * in_double, damping=1e-300) == [NOISE]
    assert logged(1e-6 * rows, damping="auto") == [NOISE]
    mixed = 1e-6 * rows
    mixed[2] = rows[2]  # one sample is enough
    assert logged(mixed, damping=1e-12) == []


@pytest.mark.parametrize("block_size", [50, 5000, None])
def test_a_damping_hides_the_fisher_where_no_block_has_a_trace_beside_it(block_size: int | None) -> None:
    rows = 1e-3 * normal(4, 10_000)
    width = block_size or 10_000
    traces = [np.sum(rows[:, start : start + width].astype(float) ** 2) / 4 for start in range(0, 10_000, width)]
    assert logged(rows, block_size=block_size, damping=101 * max(traces)) == [LOST]
    assert logged(rows, block_size=block_size, damping=99 * max(traces)) == []
    assert logged(rows, block_size=block_size, damping="auto") == []


def test_where_the_damping_hides_the_fisher_the_mask_is_that_of_magnitude(caplog: pytest.LogCaptureFixture) -> None:
    weights, rows = normal(1, 200, np.float64)[0], 1e-4 * normal(16, 200, np.float64)
    magnitude = np.abs(weights) > np.median(np.abs(weights))
    hidden = prune(weights, rows, sparsity=0.5, damping=1.0, num_recomputations=1)
    assert np.array_equal(hidden.masks, magnitude)
    assert re.search(LOST, caplog.text)
    caplog.clear()
    assert not np.array_equal(prune(weights, rows, sparsity=0.5, damping=1e-10, num_recomputations=1).masks, magnitude)
    assert caplog.text == ""


def test_equal_and_nearly_equal_rows_are_named_and_similar_ones_are_not() -> None:
    row = normal(1, 10_000)
    assert logged(np.repeat(row, 4, axis=0)) == [EQUAL]
    differences = np.random.default_rng(1).standard_normal((4, 10_000)).astype(np.float32)
    assert logged(row + 1e-4 * differences) == [ALIKE]
    assert logged(row + 1e-2 * differences) == []
    assert logged(1e-4 * (row + 1e-4 * differences), damping=1e3) == [LOST, ALIKE]
    # differences that come last count as well
    late = np.repeat(row, 4, axis=0)
    late[:, -100:] += differences[:, -100:]
    assert logged(late) == []
    assert logged(late[[0, 1, 2, 2]]) == [REPEATED]


def test_rows_that_differ_in_their_last_column_alone_are_nearly_equal() -> None:
    gradients = np.ones((2, 10_000), np.float32)
    assert logged(gradients) == [EQUAL]
    gradients[1, -1] = 1.5
    assert logged(gradients) == []
    gradients[1, -1] = 1.1
    assert logged(gradients) == [ALIKE]


def test_no_numbers_are_too_large_or_undefined_to_be_looked_at() -> None:
    assert logged(normal(4, 300) * np.float32(2e37)) == []
    assert logged(normal(4, 300, np.float64) * 1e200) == []
    rows = normal(4, 300)
    rows[1, 5] = np.nan
    assert logged(rows) == []
    assert window_warnings(GradientMatrix([np.zeros((0, 3))], block_size=None), damping=DAMPING) == []


def test_no_more_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = GradientMatrix([normal(256, 30_000)], block_size=1000)
    read: list[int] = []
    chunks = matrix.chunks
    monkeypatch.setattr(matrix, "chunks", lambda group: (read.append(group.stop - group.start), chunks(group))[1])
    assert window_warnings(matrix, damping=DAMPING) == []
    assert sum(read) <= 5000


def test_rows_on_another_device_are_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = StrictBackend()
    device = Device(backend, "device1")
    monkeypatch.setattr(window_checks, "device_of", lambda x: device)
    for rows in (np.zeros((3, 40), np.float32), normal(3, 40), np.repeat(normal(1, 40), 3, axis=0)):
        window = GradientWindow(40, 3, block_size=7, device=device)
        for row in rows:
            window.push(strict_array(row, device=VirtualDevice("device1")))
        here = window_warnings(GradientMatrix([rows], block_size=7), damping=DAMPING)
        assert window_warnings(window, damping=DAMPING) == here


def test_arrays_are_told_of_rows_that_repeat(caplog: pytest.LogCaptureFixture) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 10))
    with caplog.at_level(logging.WARNING, logger="mfac_core"):
        prune(np.arange(1.0, 11.0), rows, sparsity=0.5, num_recomputations=1)
        assert caplog.text == ""
        prune(np.arange(1.0, 11.0), rows[[0, 1, 0, 1]], sparsity=0.5, num_recomputations=2)
    assert caplog.text.count("of 4 gradient samples only 2 are distinct") == 1


def test_arrays_are_told_of_rows_of_zeros_among_the_unpruned(caplog: pytest.LogCaptureFixture) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 10))
    rows[:, 2:] = 0
    kept = np.arange(10) >= 2
    prune(np.arange(1.0, 11.0), rows, sparsity=0.5, num_recomputations=1)
    assert caplog.text == ""
    prune(np.arange(1.0, 11.0), rows, sparsity=0.5, masks=kept, num_recomputations=1)
    assert re.search(ZERO, caplog.text)


@pytest.mark.parametrize(("value", "sentence"), [(1.0, EQUAL), (0.0, ZERO)])
def test_a_run_says_it_once(caplog: pytest.LogCaptureFixture, value: float, sentence: str) -> None:
    weights = {"w": np.arange(1.0, 9.0)}
    settings = MFACSettings(final_sparsity=0.5, initial_sparsity=0.2, end_epoch=2, num_gradients=3)
    pruner = MFACPruner(settings, weights, steps_per_epoch=4, live_gradients=False)
    with caplog.at_level(logging.WARNING, logger="mfac_core"):
        for step in (0, 4, 8):
            pruner.forget_gradients()
            for _ in range(3):
                pruner.observe({"w": np.full(8, value)})
            weights = dict(pruner.prune(weights, step).weights)
    assert len(caplog.records) == 1
    assert re.search(sentence, caplog.text)
