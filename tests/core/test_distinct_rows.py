from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core import MFACPruner, MFACSettings, prune
from mfac_core.distinct_rows import num_distinct_rows
from mfac_core.gradient_matrix import GradientMatrix
from mfac_core.gradient_window import GradientWindow


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    block_size=st.sampled_from([None, 1, 3, 7]),
    values=st.sampled_from([2, 1000]),
)
def test_the_count_is_that_of_a_plain_comparison(
    seed: int, rows: int, columns: int, block_size: int | None, values: int
) -> None:
    gradients = np.random.default_rng(seed).integers(values, size=(rows, columns)).astype(np.float32)
    expected = len({row.tobytes() for row in gradients})
    assert num_distinct_rows(GradientMatrix([gradients], block_size=block_size)) == expected
    window = GradientWindow(columns, rows, block_size=block_size)
    for row in gradients:
        window.push(row)
    assert num_distinct_rows(window) == expected


def test_rows_that_differ_in_their_last_column_alone_are_distinct() -> None:
    gradients = np.zeros((2, 10_000), np.float32)
    assert num_distinct_rows(GradientMatrix([gradients], block_size=100)) == 1
    gradients[1, -1] = 1
    assert num_distinct_rows(GradientMatrix([gradients], block_size=100)) == 2


def test_no_more_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = GradientMatrix([np.random.default_rng(0).standard_normal((4, 100_000))], block_size=1000)
    read: list[int] = []
    chunks = matrix.chunks
    monkeypatch.setattr(matrix, "chunks", lambda group: (read.append(group.stop - group.start), chunks(group))[1])
    assert num_distinct_rows(matrix) == 4
    assert sum(read) <= 5000


def test_arrays_are_told_of_rows_that_repeat(caplog: pytest.LogCaptureFixture) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 10))
    with caplog.at_level(logging.WARNING, logger="mfac_core"):
        prune(np.arange(1.0, 11.0), rows, sparsity=0.5, num_recomputations=1)
        assert caplog.text == ""
        prune(np.arange(1.0, 11.0), rows[[0, 1, 0, 1]], sparsity=0.5, num_recomputations=2)
    assert caplog.text.count("of 4 gradient samples only 2 are distinct") == 1


def test_a_run_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    weights = {"w": np.arange(1.0, 9.0)}
    settings = MFACSettings(final_sparsity=0.5, initial_sparsity=0.2, end_epoch=2, num_gradients=3)
    pruner = MFACPruner(settings, weights, steps_per_epoch=4, live_gradients=False)
    with caplog.at_level(logging.WARNING, logger="mfac_core"):
        for step in (0, 4, 8):
            pruner.forget_gradients()
            for _ in range(3):
                pruner.observe({"w": np.ones(8)})
            weights = dict(pruner.prune(weights, step).weights)
    assert caplog.text.count("of 3 gradient samples only 1 is distinct") == 1
