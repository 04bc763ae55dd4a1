"""What the front page says holds anywhere: on another machine, in another folder, without a clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mfac_core.backends import lookup
from mfac_core.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "results.md", *sorted((ROOT / "docs").glob("benchmarks*.md")))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_block_on_plain_arrays_runs_in_any_folder_and_shows_something(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("python") if "import mfac_core" in block]

    installed = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=installed, capture_output=True, text=True, check=True
    )

    errors = {line.partition(":")[0]: float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()}
    assert errors["dense"] < errors["M-FAC"] < errors["magnitude"]
    assert "M-FAC: 20 weights" in done.stdout
    assert done.stderr == ""


def test_no_block_needs_a_file(tmp_path: Path) -> None:
    for block in blocks("python"):
        assert not re.search(r"[\"'][^\"'\n]*\.(yaml|yml|md|npz|pt)[\"']", block)


def test_check_finds_nothing_to_warn_of_in_the_recipe_on_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lookup, "_has_cupy", lambda: False)
    (recipe,) = blocks("yaml")

    result = CliRunner().invoke(app, ["check", "-", "--strict", "--steps-per-epoch", "1000"], input=recipe)

    assert result.exit_code == 0
    assert "0 warnings" in result.stdout


def test_every_measured_number_of_the_front_page_stands_in_the_results() -> None:
    cells = re.findall(r"\d+\.\d ± \d+\.\d", README)

    assert len(cells) >= 6
    assert [cell for cell in cells if cell not in RESULTS] == []


@pytest.mark.parametrize("page", MEASURED, ids=lambda page: page.name)
def test_pages_with_measured_numbers_say_where_and_that_yours_will_differ(page: Path) -> None:
    text = " ".join(page.read_text(encoding="utf-8").split())

    assert "Your numbers will differ" in text
    assert re.search(r"at commit [0-9a-f]{7}", text)
    assert re.search(r"\bon (one thread of )?[A-Z]\S* ?\S*.*(Processor|CPU|EPYC|Xeon|Core|NVIDIA)", text)


def test_the_front_page_says_that_yours_will_differ() -> None:
    assert "Your numbers will differ" in README
