"""Methods compared over seeds: what stands in the table and in the picture."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from mfac_core.report.comparison import caption, is_over_seeds, picture, table
from mfac_core.report.run import RunRecord

SIZES = {"conv.weight": 40, "fc.weight": 160}


def record(method: str, seed: int, after: float, *, epochs: int = 0, sparsity: float = 0.95) -> RunRecord:
    return RunRecord(
        *(method, sparsity, 0.9 + 0.01 * seed, after, 2.0 + epochs),
        layer_sparsity=dict.fromkeys(SIZES, sparsity),
        layer_sizes=SIZES,
        seed=seed,
        epochs_after=epochs,
    )


RECORDS = [
    record("M-FAC", 0, 0.80),
    record("magnitude", 0, 0.60),
    record("magnitude", 0, 0.84, epochs=20),
    record("magnitude", 1, 0.40),
    record("magnitude", 1, 0.88, epochs=20),
    record("M-FAC", 1, 0.70),  # the order of records does not matter
]


def printed(records: Sequence[RunRecord]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(records))
    return console.export_text()


def test_the_table_has_means_intervals_and_differences_on_the_same_seed() -> None:
    rows = [line.split() for line in printed(RECORDS).splitlines() if " s " in line or "dense" in line]

    # Half the width of two values that are d apart: 12.706 d / 2.
    assert rows == [
        ["dense", "90.5", "±", "6.4"],
        ["95%", "M-FAC", "none", "75.0", "±", "63.5", "+25.0", "±", "63.5", "-11.0", "±", "88.9", "2.0", "s"],
        ["magnitude", "none", "50.0", "±", "127.1", "2.0", "s"],
        ["magnitude", "20", "86.0", "±", "25.4", "22.0", "s"],
    ]
    assert "same epochs     20 epochs" in printed(RECORDS)


def test_one_seed_has_no_intervals_and_says_so() -> None:
    one = [each for each in RECORDS if each.seed == 0]

    assert "±" not in printed(one)
    assert caption(one) == "One seed (0), without an estimate of the spread."


def test_each_sparsity_has_rows_of_its_own_from_low_to_high() -> None:
    both = [record("M-FAC", seed, 0.7, sparsity=sparsity) for seed in (0, 1) for sparsity in (0.975, 0.95)]

    assert re.findall(r"[\d.]+%", printed(both)) == ["95%", "97.5%"]


@pytest.mark.parametrize(("seeds", "expected"), [((0, 1, 2), "3 seeds (0 to 2)"), ((4, 9), "2 seeds (4, 9)")])
def test_the_caption_names_seeds_and_intervals(seeds: Sequence[int], expected: str) -> None:
    said = caption([record("M-FAC", seed, 0.7) for seed in seeds])

    assert said == f"Means over {expected} and 95% confidence intervals of the mean (Student's t)."


def test_records_without_a_seed_are_not_over_seeds() -> None:
    assert is_over_seeds(RECORDS)
    assert not is_over_seeds([*RECORDS, RunRecord("M-FAC gradual", 0.5, 0.9, 0.8, 1.0)])
    assert not is_over_seeds([])


def words_of_a_picture(records: Sequence[RunRecord], path: Path) -> str:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        picture(records, path, data="Test accuracy on fifty cats")
    return path.read_text()


def test_the_picture_says_what_it_shows(tmp_path: Path) -> None:
    words = words_of_a_picture(RECORDS, tmp_path / "run.svg")

    for word in (
        *("M-FAC", "magnitude", "test accuracy", "training after pruning", "20 epochs", "(chance)", "dense 90.5"),
        *("95% of the weights pruned", "Weights kept at 95%, by layer", "conv.weight", "160", "log scale"),
        *("Test accuracy on fifty cats. Means over 2 seeds (0 to 1) and 95% confidence", "Small dots: single seeds"),
    ):
        assert word in words
    assert ">75.0<" in words  # the mean of M-FAC
    assert words.count(">2<") == words.count(">8<") == 2  # what both methods keep of either layer


def test_a_picture_of_one_seed_and_of_other_methods_is_drawn(tmp_path: Path) -> None:
    one = [record(f"method {number}", 7, 0.5) for number in range(5)]

    assert "One seed (7)" in words_of_a_picture(one, tmp_path / "one.svg")


def test_the_picture_is_as_wide_as_a_page_and_leaves_no_state_in_pyplot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    picture(RECORDS, tmp_path / "run.png", data="Test accuracy")

    image = (tmp_path / "run.png").read_bytes()
    assert int.from_bytes(image[16:20], "big") >= 1200
    assert pyplot.get_fignums() == []
