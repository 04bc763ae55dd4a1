"""The script behind docs/results.md: what it measures, what it keeps, and the words that it finds for the numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import results_document
from results_numbers import Results
from results_runs import MAGNITUDE, OURS, PAPER, Run, Scale, runs_of
from results_tasks import TASKS

OF_ACCURACY = tuple(task for task in TASKS if not TASKS[task].metric.lower_is_better)
ROOT = Path(__file__).parents[3]
FACTS = {
    "dense": 98.0,
    "seconds_per_epoch": 0.1,
    "weights": 1000,
    "train": 100,
    "test": 50,
    "commit": "0123abc",
    "machine": "Linux x86_64, one thread of An EPYC",
    "versions": {"torch": "2.0"},
}


def script(*arguments: str | Path) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    subprocess.run(
        [sys.executable, ROOT / "tests" / "benchmarks" / "results.py", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        capture_output=True,
    )


def all_runs(task: str) -> list[Run]:
    return [run for group in runs_of(task, Scale()).values() for run in group]


def kept(values: dict[str, float] | None = None, *, seeds: int = 3, tasks: tuple[str, ...] = tuple(TASKS)) -> list[Any]:
    """What the script would have kept of runs whose metric depends on the method, and in the same way on the seed."""
    values = {MAGNITUDE: 60.0, PAPER: 80.0, OURS: 90.0} if values is None else values
    return [
        {
            "task": task,
            "seed": seed,
            "facts": FACTS,
            "runs": {
                run.key: {
                    **run.names,
                    "value": values.get(run.method, 70.0) + seed / 2,
                    "reached": run.sparsity,
                    "seconds": 1.0,
                    "epochs_of_samples": 2.0,
                }
                for run in all_runs(task)
            },
        }
        for task in tasks
        for seed in range(seeds)
    ]


def page(entries: list[Any]) -> str:
    return results_document.text(Results(entries))


def short(text: str) -> tuple[str, str]:
    """What the page says helps, and what it says does not."""
    helps, does_not = text.split("Where it does not")
    return helps.split("## In short")[1], does_not.split("\n## ")[0]


def test_a_small_run_reaches_its_sparsities_and_can_be_taken_up_again(tmp_path: Path) -> None:
    small = ["--quick", "--seeds", "1", "--processes", "1", "--tasks", "wine"]
    folders = ["--kept", tmp_path / "kept", "--output", tmp_path / "page"]

    script(*small, *folders)

    (file,) = (tmp_path / "kept").glob("*.json")
    first = json.loads(file.read_text())
    runs = list(first["runs"].values())
    assert len(runs) == 20
    assert [run["reached"] for run in runs] == pytest.approx([run["sparsity"] for run in runs], abs=1e-3)
    assert all(run["epochs_of_samples"] > 0 for run in runs if run["method"] != MAGNITUDE)
    gone, *stay = first["runs"]
    file.write_text(json.dumps({**first, "runs": {key: {**first["runs"][key], "value": 12.5} for key in stay}}))

    script(*small, *folders)

    second = json.loads(file.read_text())["runs"]
    assert set(second) == set(first["runs"])
    assert all(second[key]["value"] == 12.5 for key in stay)
    assert second[gone]["value"] == first["runs"][gone]["value"]
    assert "| one-shot, 95% | 12.5 ± 0.0 |" in (tmp_path / "page" / "results.md").read_text(encoding="utf-8")
    assert (tmp_path / "page" / "results-one-shot.png").stat().st_size > 10_000


def test_runs_of_one_task_have_names_of_their_own() -> None:
    for task in TASKS:
        keys = [run.key for run in all_runs(task)]
        assert len(keys) == len(set(keys))


def test_the_page_has_every_part_and_its_pictures(tmp_path: Path) -> None:
    entries = kept()

    files = results_document.write(entries, tmp_path)

    text = files[0].read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "In short",
        "One-shot, without fine-tuning",
        "One-shot, then fine-tuning",
        "Gradual, while training",
        "Settings, one at a time",
        "What it costs",
        "Which settings do I start with",
    ]
    assert "| one-shot, 97% |" in text
    assert "at commit 0123abc" in text
    pictures = re.findall(r"!\[.+\]\((.*)\)", text)
    assert len(pictures) == 3
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures)
    for line in text.splitlines():
        assert "nan" not in line
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables)


def test_what_is_ahead_is_said_to_help() -> None:
    helps, does_not = short(page(kept(tasks=OF_ACCURACY)))

    assert "Digits, convolutional network, one-shot at 95%, without fine-tuning: 7.5 ± 0.5 points" in helps
    assert "One-shot at 97% and two epochs of fine-tuning: ahead of magnitude with two epochs" in helps
    assert "choose it there" not in does_not


def test_what_is_equal_or_behind_is_said_as_plainly() -> None:
    helps, does_not = short(page(kept({MAGNITUDE: 80.0, OURS: 80.0, PAPER: 85.0}, tasks=OF_ACCURACY)))

    assert "Digits" not in helps
    assert "Digits, convolutional network, one-shot: equal to magnitude at 50%" in does_not
    assert "the recommended settings are behind *M-FAC as in the paper, 16 passes* at 50%" in does_not
    assert "One-shot at 97% and two epochs of fine-tuning: equal to magnitude with two epochs" in does_not
    assert "Gradual, *M-FAC, recommended* vs. magnitude with 16 epochs: equal at 90%" in does_not


def test_of_a_loss_less_is_better() -> None:
    results = Results(kept({MAGNITUDE: 2.0, OURS: 1.0}, tasks=("transformer",)))
    ours, magnitude = (
        results.of("transformer", part="one-shot", method=method, sparsity=0.7) for method in (OURS, MAGNITUDE)
    )

    compared = results.compared("transformer", ours, magnitude)

    assert compared.verdict == "ahead"
    assert compared.mean == 1.0


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.0], "ahead"),
        ([-1.0, -1.1, -0.9, -1.0, -1.0], "behind"),
        ([2.0, -1.0, 1.5, -0.5, 0.3], "equal"),
        ([0.0, 0.0, 0.0, 0.0, 0.0], "equal"),
        ([3.0], "equal"),
    ],
)
def test_a_difference_within_the_spread_is_called_equal(differences: list[float], verdict: str) -> None:
    first = {seed: 50 + difference for seed, difference in enumerate(differences)}

    assert Results([]).compared("digits-cnn", first, dict.fromkeys(first, 50.0)).verdict == verdict


def test_a_page_of_some_tasks_and_one_seed_can_be_written() -> None:
    text = page(kept(seeds=1, tasks=("wine", "digits-mlp")))

    assert "### Wine" in text
    assert "## Gradual" not in text


@pytest.mark.parametrize("task", ["digits-cnn", "digits-mlp"])
def test_what_a_task_leaves_out_of_patterns_is_in_its_network(task):
    task = TASKS[task]
    every = dict(task.network(0).named_parameters())
    assert set(task.narrow) <= set(every)
    narrow = {name for name, weight in every.items() if weight.ndim > 1 and weight.shape[1] % 4}
    assert set(task.narrow) == narrow
