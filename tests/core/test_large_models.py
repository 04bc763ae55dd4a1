"""The tables of large models on paper: what the page has, and that small windows take what the same functions say."""

from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mfac_core.fisher.window import GradientWindow
from mfac_core.ranks.distribution import deal

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "large_models.py"


@pytest.fixture(scope="module")
def large_models():
    spec = importlib.util.spec_from_file_location("large_models", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_what_the_script_writes(large_models):
    page = large_models.PAGE.read_text(encoding="utf-8")
    assert large_models.in_page(page) == page
    assert "| all 7 billion | 64 | float32 | 224.0 GB, - |" in page


def test_numbers_worked_out_by_hand(large_models):
    whole, layer = (large_models.costs_of(d, m, "float32", 8) for d, m in ((7 * 10**9, 256), (202 * 10**6, 1024)))
    assert whole.window_bytes == 256 * 4 * 7 * 10**9 // 8
    assert large_models.seconds(whole, "GPU") == pytest.approx(2 * 256**2 * 7e9 / 8 / 30e12)
    # a window in host memory is read twice
    assert large_models.seconds(whole, "host") == pytest.approx(2 * whole.window_bytes / 50e9)
    assert layer.window_bytes == pytest.approx(103.4e9, rel=1e-3)
    in_bfloat16 = large_models.costs_of(202 * 10**6, 1024, "bfloat16", 8)
    assert (in_bfloat16.window_bytes, in_bfloat16.operations) == (layer.window_bytes / 2, layer.operations)


def test_a_window_goes_where_it_fits(large_models):
    costs = large_models.costs_of(10**9, 256, "float32", 32)  # 32 GB
    assert large_models.place(costs, 0, 0) == "GPU"
    assert large_models.place(costs, 40e9, 0) == "host"
    assert large_models.place(costs, 40e9, 180e9) == ""  # masks fill the host
    assert large_models.place(costs, 64e9, 0) == ""  # no room to compute a block


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_small_windows_take_what_is_said(large_models, num_ranks, dtype):
    d, m = 48_000, 32
    costs = large_models.costs_of(d, m, dtype, num_ranks)
    start, stop = deal(d, 2000, num_ranks)[0]
    rows = np.random.default_rng(0).standard_normal((m, stop - start)).astype(np.float32)
    tracemalloc.start()
    try:
        window = GradientWindow(stop - start, m, block_size=2000, dtype=dtype)
        for row in rows:
            window.push(row)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken == pytest.approx(costs.window_bytes, rel=0.02)
    assert costs.blocks == (stop - start) // 2000
