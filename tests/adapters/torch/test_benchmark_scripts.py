"""The benchmark of a pruning step: its gradients, its textbook variants, and a text that follows from the numbers."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import bench_bfloat16
import bench_pruning_step
import bench_tolerance
import numpy as np
import pytest
import textbook
import torch
from bench_document import NUMPY, PARTS, PUBLIC, Row, document, targets
from bench_pruning_step import (
    Screened,
    Shape,
    _candidates,
    measure,
    oracle,
    relative_error,
    some_blocks,
    timed_parts,
)
from bench_tolerance import Tolerance
from gradients import DRAWN, NETWORKS, of_network

from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.matrix import GradientMatrix
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
    assert sorted(bench_pruning_step._variants(1024, 1000)) == sorted(wide)
    assert sorted(bench_pruning_step._variants(64, 50)) == sorted(set(VARIANTS) - {"dynamic_torch"})


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

    stored, first, computed = (
        bench_pruning_step._problem(shape, folder)
        for shape, folder in (
            (Shape("MLP", 3, 100, None), tmp_path),
            (Shape("MLP", 3, 100, 50_000), tmp_path),
            (Shape("MLP", 3, 100, None), None),
        )
    )

    for from_file, few, other in zip(stored, first, computed, strict=True):
        whole = np.asarray(list(from_file))
        np.testing.assert_array_equal(whole, other)
        np.testing.assert_array_equal(list(few), whole[..., :50_000])


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
    assert {"dynamic_torch", row.fastest(PUBLIC), row.fastest(NUMPY)} <= set(row.ratios) <= set(VARIANTS)
    assert all(ratio > 0 for ratio in row.ratios.values())
    assert set(row.errors) == set(row.ratios)
    assert all(error < 1e-3 for error in row.errors.values())
    assert set(row.parts) == set(PARTS)
    assert sum(row.parts.values()) == pytest.approx(1, abs=0.1)  # the median of each over two rounds
    assert row.parts["gram"] > 0
    assert row.parts["factor"] > 0
    assert row.parts["solve"] > 0
    assert row.parts["float64"] == 0
    assert row.in_float64 == 0
    assert len(row.floor_ratios) == 2
    assert row.floor_ratios == sorted(row.floor_ratios)
    assert row.floor_ratios[0] > row.diagonal_floor_ratio / 3


@pytest.mark.parametrize("width", [300, 6])
def test_the_parts_of_a_diagonal_add_up_in_each_precision(width: int) -> None:
    gradients = np.random.default_rng(0).standard_normal((8, 600)).astype(np.float32)

    shares = {}
    for dtype in (np.float32, np.float64):
        source = GradientMatrix([gradients.astype(dtype)], block_size=width)
        with timed_parts() as shares[dtype]:
            # a tolerance that no bound of float32 meets
            BlockwiseFisher(source, damping=1e-3, devices="cpu", rtol=1e-6).diagonal()

    for parts in shares.values():
        assert sum(parts.values()) == pytest.approx(1)
        assert all(part >= 0 for part in parts.values())
    assert shares[np.float32]["check"] > 0
    assert shares[np.float32]["factor"] > 0
    assert shares[np.float64]["float64"] > 0.5
    assert shares[np.float64]["gram"] == shares[np.float64]["factor"] == shares[np.float64]["solve"] == 0


def test_the_fastest_variants_are_timed_and_so_are_the_fastest_accurate_ones() -> None:
    fast, slow = Screened(1e-3, 0.5), Screened(3e-3, 1e-4)

    assert _candidates({"batched_torch": fast, "dense_blocks_torch": slow}) == ["batched_torch", "dense_blocks_torch"]
    assert _candidates({"batched_numpy": fast, "single_block_numpy": fast}) == ["batched_numpy", "single_block_numpy"]
    # NumPy does not push out the public variants, nor does the dynamic algorithm
    assert _candidates({"batched_numpy": fast, "single_block_torch": slow, "dynamic_torch": Screened(1.0, 0.5)}) == [
        "batched_numpy",
        "single_block_torch",
        "dynamic_torch",
    ]
    assert _candidates({"batched_torch": slow, "single_block_torch": Screened(1.0, 1e-4)}) == ["batched_torch"]


def test_a_diagonal_that_is_not_finite_has_an_infinite_error() -> None:
    exact = np.ones(2)

    assert relative_error(np.array([1.0, np.nan]), exact) == np.inf
    assert relative_error(np.array([1.0, -np.inf]), exact) == np.inf
    assert relative_error(np.array([1.0, 1.5]), exact) == 0.5


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
        parts={"gram": 0.4, "factor": 0.1, "solve": 0.5, "check": 0.0, "float64": 0.0, "rest": 0.0},
        ratios={"batched_torch": 8.0, "batched_numpy": 6.0, "dynamic_torch": 2.0},
        errors={"batched_torch": 2e-4, "batched_numpy": 3e-4, "dynamic_torch": 4e-4},
        memory=2**20,
        window=2**29,
        in_float64=0.25,
        error=3e-5,
        oracle_blocks=4,
    )
    return replace(row, **changes)


def with_public(ratio: float, **changes) -> Row:
    return made_up(ratios={**made_up().ratios, "batched_torch": ratio}, **changes)


def test_targets_are_met_if_all_rows_meet_them() -> None:
    rows = [made_up(), made_up(m=64, diagonal_floor_ratio=3.4), with_public(120.0, m=1024, width=50)]

    speed, small_m, large_m, small_blocks = targets(rows)

    assert "8.0 times faster than the public implementations, 8.0 in the geometric mean" in speed
    assert "8 in the mean, which is met" in speed
    assert "at least 5 everywhere: met in all rows (2)." in speed
    assert "fastest of all textbook variants, those in NumPy included, the diagonal is 6.0 times faster" in speed
    assert speed.endswith("2.0 times, 2.0 in the mean.")
    assert "takes 3.4 times its floor, the whole step 1.6." in small_m
    assert small_m.endswith("at most 3.5: met in all rows (1).")
    assert large_m.endswith("at most 2: met in all rows (1).")
    assert "120.0 times" in small_blocks
    assert "100: met in all rows (1)." in small_blocks
    assert small_blocks.endswith("textbook variants: 6.0 times (realistic, batched in NumPy, error 3e-04).")


def test_targets_that_are_missed_name_the_rows_their_numbers_and_their_parts() -> None:
    rows = [
        with_public(16.0),
        with_public(1.5, m=64, diagonal_floor_ratio=4.0),
        made_up(m=1024, width=None, diagonal_floor_ratio=2.1, kind="normal"),
        with_public(99.4, m=1024, width=50),
    ]

    speed, small_m, large_m, small_blocks = targets(rows)

    assert "1.5 to 16.0 times faster than the public implementations, 5.8 in the geometric mean" in speed
    assert "8 in the mean, which is not met" in speed
    assert "not met in 1 of 3 rows: m = 64, B = 2000, realistic (1.5)." in speed
    assert "takes 6.0 times the floor" in speed
    assert small_m.endswith(
        "not met in 1 of 1 rows: m = 64, B = 2000, realistic (4.0: Gram 1.6, factor 0.4, solve 2.0). In 1 of 1 rows "
        "Gram, factor and solve alone exceed it, with 4.0: small products run below the rate of the large ones that "
        "define the floor."
    )
    assert "not met in 1 of 2 rows: m = 1024, B = all, normal (2.1: Gram 0.8, factor 0.2, solve 1.1)." in large_m
    assert "In 1 of 2 rows Gram, factor and solve alone exceed it, with 2.1" in large_m
    assert "not met in 1 of 1 rows: m = 1024, B = 50, realistic (99.4)." in small_blocks
    assert "It leaves 99.4 % of our time, and the products that form F alone take 40.0 % of it." in small_blocks


def test_variants_that_are_fast_but_wrong_are_shown_beside_the_accurate_ones() -> None:
    errors = {"batched_torch": 2e-4, "batched_numpy": 5.5, "dynamic_torch": 4e-4}
    row = made_up(m=1024, width=50, errors=errors)

    assert row.ratio(PUBLIC + NUMPY) == 8.0
    (target,) = targets([row])
    assert target.endswith(
        "6.0 times (realistic, batched in NumPy, error 550 %; 8.0 times batched in PyTorch, error 2e-04)."
    )
    cells = textbook_cells(row)
    assert cells[4:] == ["8.0 batched", "– (6.0 batched, error 550 %)", "2.0", "3e-05", "2e-04", "–", "4e-04"]


def textbook_cells(row: Row) -> list[str]:
    page = document([row], made_up_scaling(100_000, 200_000), made_up_tolerances(), minutes=1)
    section = page.partition("## Beside the paper's recursion")[2]
    line = next(line for line in section.splitlines() if line.startswith("| realistic"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def made_up_scaling(*sizes: int) -> list[Row]:
    return [made_up(d=d, ratios={}, errors={}, seconds={"step": d / 1e6 + 0.5}) for d in sizes]


def made_up_tolerances() -> dict:
    result = Tolerance([0.5, 0.25], [0.0, 0.5], [1e-6, 4e-5], [1, 4])
    return {
        ("normal", 64, 100_000): {
            "1e-5": result,
            "1e-3": result,
            "textbook": result,
            "magnitude": Tolerance(differences=[3, 4]),
        }
    }


def test_the_page_follows_from_the_measurements() -> None:
    slower = made_up(ratios={"batched_torch": 8.0, "batched_numpy": 0.5}, m=64, width=50)
    rows = [made_up(), slower, made_up(m=1024, width=50)]
    networks = [made_up(kind="CNN", d=123_456), made_up(kind="MLP", d=300_000, in_float64=0.0)]
    scaling = made_up_scaling(100_000, 200_000, 300_000)

    page = document(rows + networks, scaling, made_up_tolerances(), ["a shape"], minutes=12.3)

    lines = [" ".join(line.split()) for line in page.splitlines()]
    assert "in 12 minutes" in page
    assert "Not measured, because they failed: a shape." in lines
    assert "convolutional network of 123,456 weights" in page
    assert "| realistic | 256 | 2000 | 500,000 | 1.25 | 1.00 | 0.010 | 0.20 | 1 | 512 |" in lines
    assert (
        "| realistic | 256 | 2000 | 500,000 | 250 | 1.6 (1.5 to 1.9) | 1.3 | 0.52 | 0.13 | 0.65 | 0.00 | 0.00 | 0.00 "
        "| 25 % |"
    ) in lines
    assert (
        "| realistic | 256 | 2000 | 500,000 | 8.0 batched | 6.0 batched | 2.0 | 3e-05 | 2e-04 | 3e-04 | 4e-04 |"
    ) in lines
    assert "| realistic | 64 | 50 | 500,000 | 8.0 batched | 0.5 batched | – | 3e-05 | 2e-04 | 3e-04 | – |" in lines
    assert "Faster than our diagonal: m = 64, B = 50, realistic (0.5, batched in NumPy)." in lines
    assert "slope 1.00 s per million weights, offset 0.50 s" in page
    assert "| normal | 64 | 100,000 | 1e-3 | 0.38 | 25 % | 4e-05 | 2.5 (4), 0.0025 % |" in lines
    assert "| normal | 64 | 100,000 | magnitude | – | – | – | 3.5 (4), 0.0035 % |" in lines
    assert (
        "Of 200,000 mask entries in all, 5 differ from float64 at 1e-3, 5 at 1e-5, 5 with the textbook recursion and "
        "7 with magnitude pruning."
    ) in page
    assert "0.004 % of the mask (1e-3), 0.004 % of the mask (textbook), 0.004 % of the mask (magnitude)." in page
    assert "takes 1.0 times as long" in page
    assert "nan" not in page


def test_the_columns_of_each_table_are_aligned() -> None:
    rows = [made_up(), made_up(m=1024, width=None)]
    page = document(rows, made_up_scaling(100_000, 2_000_000), made_up_tolerances(), minutes=1)

    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for lines in tables:
        bars = {tuple(at for at, letter in enumerate(line) if letter == "|") for line in lines}
        assert len(bars) == 1


def test_a_row_that_fails_is_reported_and_the_others_go_on(quick: None, monkeypatch, capsys) -> None:
    def measured(shape: Shape, *_: str) -> Row:
        if shape.m == 8:
            raise subprocess.CalledProcessError(1, "row", stderr="MemoryError")
        if shape.m == 16:
            raise subprocess.TimeoutExpired("row", 90)
        return made_up(m=shape.m, d=shape.d)

    monkeypatch.setattr(bench_pruning_step, "_in_a_process", measured)
    monkeypatch.setattr(bench_pruning_step, "SHAPES", [Shape("normal", 8, 50, 100), Shape("normal", 64, 50, 100)])
    monkeypatch.setattr(bench_pruning_step, "LINEAR_IN_D", [Shape("normal", m, 50, 100) for m in (16, 64)])
    monkeypatch.setattr(bench_pruning_step, "NETWORKS", {})
    monkeypatch.setattr(bench_pruning_step, "measure_tolerances", lambda seeds: made_up_tolerances())

    page = bench_pruning_step.page()

    assert "Not measured, because they failed: m = 8, B = 50, normal; m = 16, B = 50, normal." in page
    assert "| realistic | 64 " in page
    assert page.endswith("Not measured.\n")  # there is no line through one point
    printed = capsys.readouterr().out
    assert "MemoryError" in printed
    assert "timed out after 90 seconds" in printed


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


def test_the_benchmark_of_bfloat16_compares_masks_and_says_the_means() -> None:
    weights = np.random.default_rng(0).standard_normal(5000, dtype=np.float32)
    shares = bench_bfloat16._differences(weights, np.stack(list(DRAWN["realistic"](32, 5000, 1))), 16, 0.5)

    assert shares["bfloat16"] < shares["other samples"] < shares["magnitude"]
    page = bench_bfloat16.document({("normal", 16, 0.5): {"bfloat16": [0.0, 0.001], "other samples": [0.1, 0.1]}})
    assert "| normal | 16 | 0.5 | 0.050 (0.100) | 10.000 (10.000) |" in page
    assert "Rounding moves at most 0.5% as many entries as other samples do" in page
