"""The benchmark of a pruning step: its gradients, its textbook variants, and a text that follows from the numbers."""

from __future__ import annotations

from dataclasses import replace

import bench_pruning_step
import bench_tolerance
import numpy as np
import pytest
import textbook
import torch
from bench_document import Row, document, targets, tolerance_table
from bench_pruning_step import Shape, measure, oracle, some_blocks
from bench_tolerance import Tolerance
from gradients import DRAWN, NETWORKS, of_network

from mfac_core.fisher.window import GradientWindow
from tests.reference import dense_fisher

ALL_TOLERANCES = {"1e-5", "1e-3", "textbook", "magnitude"}
VARIANTS = [name for name in vars(textbook) if name.endswith(("_numpy", "_torch")) and not name.startswith("_")]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_textbook_variant_gives_the_diagonal(name: str) -> None:
    blocks = np.random.default_rng(0).standard_normal((3, 7, 11))
    given = blocks.copy() if name.endswith("numpy") else torch.from_numpy(blocks.copy())

    diagonals = np.asarray(getattr(textbook, name)(given, 1e-2))

    exact = [np.diag(np.linalg.inv(dense_fisher(block, 1e-2))) for block in blocks]
    np.testing.assert_allclose(diagonals, exact, rtol=1e-10)
    np.testing.assert_array_equal(np.asarray(given), blocks)


def test_the_benchmark_runs_every_textbook_variant_where_it_applies() -> None:
    wide, narrow = bench_pruning_step._variants(64, 2000), bench_pruning_step._variants(64, 128)

    assert sorted(narrow) == sorted(VARIANTS)
    assert sorted(wide) == sorted(set(VARIANTS) - {"dense_blocks_torch"})


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_gradients_depend_on_the_seed_alone(kind: str) -> None:
    first, again, other = (np.stack(list(DRAWN[kind](4, 30_000, seed))) for seed in (0, 0, 1))

    assert first.shape == (4, 30_000)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_realistic_scales_spread_over_decades_and_samples_share_a_mean() -> None:
    rows = np.stack(list(DRAWN["realistic"](400, 50_000, 0)))

    scales = np.sqrt(np.mean(rows**2, axis=0))
    assert np.quantile(scales, 0.99) / np.quantile(scales, 0.01) > 1e3
    sizes = np.linalg.norm(rows, axis=1)
    assert np.quantile(sizes, 0.9) / np.quantile(sizes, 0.1) > 5
    directions = rows / sizes[:, None] / scales
    assert np.linalg.norm(directions.mean(axis=0)) / np.linalg.norm(directions.std(axis=0)) > 0.3


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_a_network_are_those_of_its_weights(name: str) -> None:
    weights, gradients = of_network(name, 3, seed=0)

    assert 100_000 <= len(weights) <= 500_000
    assert gradients.shape == (3, len(weights))
    assert np.isfinite(gradients).all()
    assert (np.abs(gradients).max(axis=1) > 0).all()
    np.testing.assert_array_equal(of_network(name, 3, seed=0)[1], gradients)


def test_stored_networks_give_the_same_problem(tmp_path) -> None:
    bench_pruning_step.save_networks(tmp_path, 3)

    stored, computed = (bench_pruning_step._problem(Shape("MLP", 3, 100, 0), folder) for folder in (tmp_path, None))

    for one, other in zip(stored, computed, strict=True):
        np.testing.assert_array_equal(list(one), list(other))


@pytest.mark.parametrize("width", [40, None])
def test_the_oracle_compares_blocks_from_all_over_the_window(width: int | None, monkeypatch) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 410)).astype(np.float32)
    window = GradientWindow(410, 5, block_size=width)
    for row in rows:
        window.push(row)

    blocks, places = some_blocks(window, width or 410, 5)

    assert len(blocks) == len(places) == (4 if width else 1)
    for block, place, diagonal in zip(blocks, places, oracle(blocks, 5), strict=True):
        np.testing.assert_array_equal(block, rows[:, place])
        np.testing.assert_allclose(diagonal, np.diag(np.linalg.inv(dense_fisher(block, 1e-5))), rtol=1e-9)
    dense = oracle(blocks, 5)
    monkeypatch.setattr(bench_pruning_step, "DENSE", 0)
    np.testing.assert_allclose(oracle(blocks, 5), dense, rtol=1e-6)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pruning_step, "ROUNDS", (2, 2))
    monkeypatch.setattr(bench_pruning_step, "VARIANT_SECONDS", 0.01)
    monkeypatch.setattr(bench_pruning_step, "_product_rate", lambda: 1e9)


def test_a_row_has_times_memory_and_errors_of_one_pruning_step(quick: None) -> None:
    row = measure(Shape("normal", 8, 300, 3_100))

    assert set(row.seconds) == {"step", "diagonal", "mask", "update"}
    parts = row.seconds["diagonal"] + row.seconds["mask"] + row.seconds["update"]
    assert 0 < parts < 3 * row.seconds["step"]
    assert row.window == 8 * 3_100 * 4
    assert 0 < row.memory < 2**30
    assert row.error < 1e-4
    assert row.textbook_error < 1e-3
    assert row.textbook in VARIANTS
    assert row.textbook_ratio > 0
    assert row.dynamic_ratio > 0
    assert row.in_float64 == 0
    assert len(row.floor_ratios) == 2
    assert row.floor_ratios == sorted(row.floor_ratios)
    assert row.floor_ratios[0] > row.diagonal_floor_ratio / 3


def test_textbook_variants_without_a_usable_diagonal_do_not_count(quick: None, monkeypatch) -> None:
    monkeypatch.setattr(textbook, "batched_numpy", lambda blocks, damping: np.zeros_like(blocks[:, 0]))

    assert measure(Shape("normal", 8, 300, 3_100)).textbook != "batched_numpy"


def made_up(**changes) -> Row:
    row = Row(
        kind="realistic",
        m=256,
        width=2000,
        d=500_000,
        seconds={"step": 1.25, "diagonal": 1.0, "mask": 0.01, "update": 0.2},
        rate=250e9,
        floor_ratios=[1.5, 1.6, 1.9],
        diagonal_floor_ratio=1.3,
        textbook="batched_numpy",
        textbook_ratio=8.0,
        dynamic_ratio=2.0,
        memory=2**20,
        window=2**29,
        in_float64=0.25,
        error=3e-5,
        textbook_error=2e-4,
        oracle_blocks=4,
    )
    return replace(row, **changes)


def test_targets_are_met_if_all_rows_meet_them() -> None:
    rows = [made_up(), made_up(m=64, diagonal_floor_ratio=3.4), made_up(m=1024, width=50, textbook_ratio=120.0)]

    speed, small_m, large_m, small_blocks, dynamic = targets(rows)

    assert "8.0 times faster than the best textbook variant, 8.0 in the geometric mean" in speed
    assert "8 in the mean, which is met" in speed
    assert speed.endswith("met in all rows (2).")
    assert "takes 3.4 times its floor, the whole step 1.6." in small_m
    assert small_m.endswith("at most 3.5: met in all rows (1).")
    assert large_m.endswith("at most 2: met in all rows (1).")
    assert "120.0 times" in small_blocks
    assert small_blocks.endswith("met in all rows (1).")
    assert "2.0 times faster" in dynamic


def test_targets_that_are_missed_name_the_rows_and_their_numbers() -> None:
    rows = [
        made_up(textbook_ratio=16.0),
        made_up(m=64, textbook_ratio=1.5, diagonal_floor_ratio=4.0),
        made_up(m=1024, width=None, diagonal_floor_ratio=2.1, kind="normal"),
        made_up(m=1024, width=50, textbook_ratio=99.4),
    ]

    speed, small_m, large_m, small_blocks, _ = targets(rows)

    assert "1.5 to 16.0 times faster than the best textbook variant, 5.8 in the geometric mean" in speed
    assert "8 in the mean, which is not met" in speed
    assert "not met in 1 of 3 rows: m = 64, B = 2000, realistic (1.5)." in speed
    assert "takes 6.0 times the floor" in speed
    assert small_m.endswith("not met in 1 of 1 rows: m = 64, B = 2000, realistic (4.0).")
    assert large_m.endswith("not met in 1 of 2 rows: m = 1024, B = all, normal (2.1).")
    assert small_blocks.endswith("not met in 1 of 1 rows: m = 1024, B = 50, realistic (99).")


def test_the_page_follows_from_the_measurements() -> None:
    rows = [made_up(), made_up(m=64), made_up(m=1024, width=50, dynamic_ratio=None)]
    networks = [made_up(kind="CNN", d=123_456), made_up(kind="MLP", d=300_000, in_float64=0.0)]
    scaling = [made_up(d=d, seconds={"step": d / 1e6 + 0.5}) for d in (100_000, 200_000, 300_000)]
    result = Tolerance([0.5, 0.25], [0.0, 0.5], [1e-6, 4e-5], [1, 4])
    tolerances = {
        ("normal", 64, 100_000): {
            "1e-5": result,
            "1e-3": result,
            "textbook": result,
            "magnitude": Tolerance(differences=[3, 4]),
        }
    }

    page = document(rows + networks, scaling, tolerances, minutes=12.3)

    assert "in 12 minutes" in page
    assert "convolutional network of 123,456 weights" in page
    assert (
        "| realistic | 256 | 2000 | 500,000 | 1.25 | 1.00 | 0.01 | 0.20 | 250 | 1.6 (1.5 to 1.9) | 1.3 "
        "| 8.0 (batched numpy) | 2.0 | 1 | 512 | 25 % | 3e-05 | 2e-04 |"
    ) in page
    assert "slope 1.00 s per million weights, offset 0.50 s" in page
    assert "| normal | 64 | 100,000 | 1e-3 | 0.38 | 25 % | 4e-05 | 4 (2.5) |" in page
    assert "Of 200,000 mask entries in all, 5 differ at 1e-3, 5 at 1e-5 and 5 with the textbook recursion; " in page
    assert "with magnitude pruning, 7." in page
    assert "takes 1.0 times as long" in page
    columns = {line.count("|") for line in page.splitlines() if line.startswith("|") and "gradients | m | B" in line}
    assert columns == {19}
    assert all(line.count("|") == 19 for line in page.splitlines() if line.startswith(("| realistic", "| CNN")))
    assert all(line.count("|") == 9 for line in tolerance_table(tolerances))


def test_tolerances_are_measured_beside_float64(monkeypatch) -> None:
    monkeypatch.setattr(bench_tolerance, "DRAWN_WEIGHTS", 5_000)
    monkeypatch.setattr(bench_tolerance, "NETWORKS", {})

    measured = bench_tolerance.measure_tolerances(range(2))

    assert set(measured) == {(kind, m, 5_000) for kind in DRAWN for m in bench_tolerance.ROWS}
    for results in measured.values():
        assert set(results) == ALL_TOLERANCES
        for name in ("1e-5", "1e-3"):
            assert len(results[name].errors) == 2
            # rounding to float32 comes on top
            assert 0 < max(results[name].errors) <= float(name) + 1e-7
        assert max(results["textbook"].errors) < 0.1


def test_masks_that_differ_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(bench_tolerance, "DRAWN_WEIGHTS", 2_000)
    monkeypatch.setattr(bench_tolerance, "NETWORKS", {})
    monkeypatch.setattr(bench_tolerance, "single_block_numpy", lambda blocks, damping: np.ones_like(blocks[:, 0]))

    results = bench_tolerance.measure_tolerances(range(1))["realistic", 64, 2_000]

    assert results["textbook"].differences == results["magnitude"].differences
    assert results["magnitude"].differences[0] > 10
    assert results["1e-3"].differences[0] <= 2
