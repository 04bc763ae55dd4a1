"""Measure accuracy on the digits over several seeds, and write ``docs/results.md``.

Run it from the root of the project: ``make results``. It takes a few minutes on one core.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import commit, processor
from rich.progress import track

import mfac_core
from mfac_core.recipe import EpochRange, load_recipe
from mfac_core.report import RunRecord
from mfac_core.settings import MFACSettings
from mfac_torch.demo import manager_for, prune_gradually, prune_in_one_shot, recipe_path, train_dense
from mfac_torch.digits import Digits

SEEDS = range(10)
GRADUAL_SPARSITIES = (0.9, 0.96, 0.98)
LONG = {"start_epoch": 2.0, "end_epoch": 10.0}
LONG_EPOCHS = 16
ONE_SHOT_SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
OUTPUT = Path("docs/results.md")

_OF_M_FAC = ("M-FAC, independent update", "M-FAC, joint update")


def main() -> None:
    """Run all methods over all seeds and write the tables."""
    gradual = load_recipe(recipe_path("digits_gradual.yaml"))
    one_shot = load_recipe(recipe_path("digits_one_shot.yaml"))
    epochs = round(gradual.max_epochs)
    torch.set_num_threads(1)
    rows: dict[tuple[str, float], list[RunRecord]] = {}
    for seed in track(SEEDS, "seeds"):
        digits = Digits.load(seed)
        dense = train_dense(digits, seed)
        for sparsity in GRADUAL_SPARSITIES:
            for method, update in (("M-FAC", "independent"), ("M-FAC", "joint"), ("magnitude", "")):
                manager = manager_for(_at(gradual.modifiers, sparsity, update), method)
                pruned = prune_gradually(manager, method, dense, digits, epochs=epochs, seed=seed)
                rows.setdefault((_label("gradual", method, update), sparsity), []).append(pruned.record)
            for method in ("M-FAC", "magnitude"):
                update = "independent" if method == "M-FAC" else ""
                manager = manager_for(_at(gradual.modifiers, sparsity, update, **LONG), method)
                pruned = prune_gradually(manager, method, dense, digits, epochs=LONG_EPOCHS, seed=seed)
                rows.setdefault((_label("long", method, update), sparsity), []).append(pruned.record)
        for sparsity in ONE_SHOT_SPARSITIES:
            for method, update in (("M-FAC", "independent"), ("M-FAC", "joint"), ("magnitude", "")):
                manager = manager_for(_at(one_shot.modifiers, sparsity, update), method)
                pruned = prune_in_one_shot(manager, method, dense, digits, seed=seed)
                rows.setdefault((_label("one-shot", method, update), sparsity), []).append(pruned.record)
    OUTPUT.write_text(_document(rows, _final(gradual.modifiers)), encoding="utf-8")
    print(f"written: {OUTPUT}")


def _at(modifiers: Sequence[object], sparsity: float, update: str, **changes: object) -> list[object]:
    changes |= {"final_sparsity": sparsity} | ({"update": update} if update else {})
    return [
        dataclasses.replace(each, **changes, initial_sparsity=min(each.initial_sparsity, sparsity))
        if isinstance(each, MFACSettings)
        else each
        for each in modifiers
        if not isinstance(each, EpochRange)  # how long to train is said to prune_gradually
    ]


def _final(modifiers: Sequence[object]) -> float:
    return next(each.final_sparsity for each in modifiers if isinstance(each, MFACSettings))


def _label(kind: str, method: str, update: str) -> str:
    return f"{kind}: {method}" + (f", {update} update" if update else "")


def _document(rows: dict[tuple[str, float], list[RunRecord]], final: float) -> str:
    dense = [record.accuracy_before for record in next(iter(rows.values()))]
    return "\n".join(
        [
            "# Results",
            "",
            "Test accuracy on scikit-learn's handwritten digits (539 test images), a convolutional network with 9,168",
            "prunable weights, in percent: mean ± standard deviation over "
            f"{len(SEEDS)} seeds (split, weights and order of batches).",
            f"The dense network reaches {_spread(dense)}.",
            "Your digits will differ: another processor or another version of PyTorch rounds otherwise, and training",
            "carries that on. What should come back is the means, within their spread.",
            "",
            f"Made by `tests/benchmarks/digits_results.py` (`make results`) with mfac-core {mfac_core.__version__}, "
            f"torch {torch.__version__.partition('+')[0]}, NumPy {np.__version__}, {platform.system()} "
            f"{platform.machine()}, Python {platform.python_version()}, on one thread of {processor()}. "
            f"Measured at commit {commit()}.",
            "",
            "Differences well below the spread say nothing. Where most weights are still superfluous, both methods",
            "remove only those, and M-FAC costs time and memory for nothing.",
            "",
            "## Gradual, while training",
            "",
            f"The recipe is `recipes/digits_gradual.yaml`, whose final sparsity is {final:g}; the other columns change",
            "only that number. Magnitude pruning has the same schedule, scope and training.",
            "",
            *_table(rows, "gradual", GRADUAL_SPARSITIES),
            "",
            _verdict(rows, "gradual", GRADUAL_SPARSITIES),
            "",
            "### With twice the epochs",
            "",
            f"The same with pruning from epoch {LONG['start_epoch']:g} to {LONG['end_epoch']:g} of {LONG_EPOCHS}.",
            "",
            *_table(rows, "long", GRADUAL_SPARSITIES),
            "",
            _verdict(rows, "long", GRADUAL_SPARSITIES),
            "",
            "## One-shot, without training afterwards",
            "",
            "The recipe is `recipes/digits_one_shot.yaml`.",
            "",
            *_table(rows, "one-shot", ONE_SHOT_SPARSITIES),
            "",
            _verdict(rows, "one-shot", ONE_SHOT_SPARSITIES),
            "",
            "## Seconds",
            "",
            "What one gradual run at the recipe's final sparsity takes, training included, as a ratio to magnitude",
            "pruning with the same seed, mean ± standard deviation over seeds: "
            + "; ".join(f"{method} {_mean_and_spread(_ratios(rows, method, final))} times" for method in _OF_M_FAC)
            + ".",
            "",
        ]
    )


def _table(rows: dict[tuple[str, float], list[RunRecord]], kind: str, sparsities: Sequence[float]) -> list[str]:
    labels = dict.fromkeys(label for label, _ in rows if label.startswith(kind))
    lines = [
        "| method | " + " | ".join(f"{sparsity:.0%} sparse" for sparsity in sparsities) + " |",
        "| --- |" + " --- |" * len(sparsities),
    ]
    for label in labels:
        cells = (_spread([r.accuracy_after for r in rows[label, sparsity]]) for sparsity in sparsities)
        lines.append(f"| {label.partition(': ')[2]} | " + " | ".join(cells) + " |")
    return lines


def _verdict(rows: dict[tuple[str, float], list[RunRecord]], kind: str, sparsities: Sequence[float]) -> str:
    """Return the sentence that says where M-FAC helps."""

    def gains(sparsity: float) -> list[float]:
        pairs = zip(rows[f"{kind}: {_OF_M_FAC[0]}", sparsity], rows[f"{kind}: magnitude", sparsity], strict=True)
        return [100 * (ours.accuracy_after - theirs.accuracy_after) for ours, theirs in pairs]

    return (
        "M-FAC (independent update) minus magnitude on the same seed, in points: "
        + ", ".join(f"{_mean_and_spread(gains(sparsity), '+.1f')} at {sparsity:.0%}" for sparsity in sparsities)
        + "."
    )


def _ratios(rows: dict[tuple[str, float], list[RunRecord]], method: str, sparsity: float) -> list[float]:
    pairs = zip(rows[f"gradual: {method}", sparsity], rows["gradual: magnitude", sparsity], strict=True)
    return [ours.seconds / theirs.seconds for ours, theirs in pairs]


def _spread(values: Sequence[float]) -> str:
    return _mean_and_spread([100 * value for value in values])


def _mean_and_spread(values: Sequence[float], form: str = ".1f") -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
