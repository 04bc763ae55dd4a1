"""Measure the overhead of pruning in a training step in PyTorch on the CPU, relative to the plain step in the same run.

Run it from the root of the project: ``python tests/benchmarks/bench_torch_overhead.py [--write]``. With ``--write`` the
table goes to ``docs/benchmarks-torch.md``. Needs scikit-learn, which includes the digits.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import YOURS_WILL_DIFFER, commit, processor
from torch import nn

from mfac_torch import MagnitudePruningModifier, MFACPruningModifier, ScheduledModifierManager
from mfac_torch.digits import Digits, make_network

OUTPUT = Path("docs/benchmarks-torch.md")
BATCH_SIZE = 128
ROUNDS, STEPS_PER_ROUND, WARM_UP = 60, 10, 2
STEPS = (ROUNDS + WARM_UP) * STEPS_PER_ROUND
FAR_AWAY = 10 * STEPS
# With one step per epoch, epochs are steps. A window with as many rows as there are steps is open from the start.
RECIPES = {
    "closed": MFACPruningModifier(final_sparsity=0.5, start_epoch=FAR_AWAY, end_epoch=FAR_AWAY + 1, num_grads=64),
    "open": MFACPruningModifier(final_sparsity=0.5, start_epoch=STEPS, end_epoch=STEPS + 1, num_grads=STEPS),
    "masks": MagnitudePruningModifier(final_sparsity=0.8, start_epoch=0, end_epoch=0),
}
MEANING = {
    "closed": "attached, no window open, nothing pruned yet",
    "open": "each step adds a row to the gradient window",
    "masks": "80% pruned: masks enforced, no window open",
}


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    document = "\n".join(_lines(measure())) + "\n"
    if arguments.write:
        OUTPUT.write_text(document, encoding="utf-8")
        print(f"written: {OUTPUT}")
    else:
        print(document)


def measure() -> dict[str, list[float]]:
    """Return the processor seconds per step in each round, for the plain step and for each variant.

    The variants take turns within each round, in rotating order, so that other load on the machine affects all alike.
    """
    digits = Digits.load(0)
    steps = {"plain": _training(digits, None)} | {name: _training(digits, recipe) for name, recipe in RECIPES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for number in range(ROUNDS + WARM_UP):
        order = order[1:] + order[:1]
        for name in order:
            begun = time.process_time()
            for _ in range(STEPS_PER_ROUND):
                steps[name]()
            if number >= WARM_UP:
                seconds[name].append((time.process_time() - begun) / STEPS_PER_ROUND)
    return seconds


def _training(digits: Digits, modifier: MFACPruningModifier | MagnitudePruningModifier | None) -> Callable[[], None]:
    model = make_network(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    if modifier is not None:
        ScheduledModifierManager([modifier]).modify(model, optimizer, steps_per_epoch=1)
    batches = digits.batches(torch.Generator().manual_seed(0), BATCH_SIZE)[:-1]
    drawn = 0

    def step() -> None:
        nonlocal drawn
        images, labels = batches[drawn % len(batches)]
        drawn += 1
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _lines(seconds: dict[str, list[float]]) -> list[str]:
    plain = seconds["plain"]
    lines = [
        "# Overhead in PyTorch",
        "",
        "Cost of a training step with a recipe attached, relative to the same step without: forward, backward and",
        f"SGD with momentum on the digits network ({sum(p.numel() for p in make_network(0).parameters()):,} weights), "
        f"batch {BATCH_SIZE}, float32, on the CPU.",
        f"All variants take turns in one run: {ROUNDS} rounds of {STEPS_PER_ROUND} steps each; the ratio of processor",
        "times is taken round by round. Made by `tests/benchmarks/bench_torch_overhead.py`.",
        "",
        f"PyTorch {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} on {processor()}, {len(os.sched_getaffinity(0))} cores, one thread. Measured on "
        f"{datetime.datetime.now(tz=datetime.UTC).date()} at commit {commit()}.",
        YOURS_WILL_DIFFER,
        "",
        f"The plain step takes {1e3 * statistics.median(plain):.2f} ms (median).",
        "",
        "| step | ratio: median | lower quartile | upper quartile |",
        "| --- | --- | --- | --- |",
    ]
    for name, meaning in MEANING.items():
        ratios = [with_recipe / without for with_recipe, without in zip(seconds[name], plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {meaning} | {middle:.3f} | {low:.3f} | {high:.3f} |")
    return lines


if __name__ == "__main__":
    main()
