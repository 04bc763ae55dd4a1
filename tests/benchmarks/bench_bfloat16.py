"""Measure how many entries of a mask a gradient window in bfloat16 changes, and write docs/benchmarks-bfloat16.md.

Run it from the root of the project: ``python tests/benchmarks/bench_bfloat16.py`` (a few minutes). The numbers do not
depend on the speed of the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import fill

import numpy as np
from gradients import DRAWN, NETWORKS, of_network
from machine import commit, processor

from mfac_core import MFACPruner, MFACSettings
from mfac_core.pruners.step import PruneResult

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks-bfloat16.md"
SEEDS = 5
ROWS = (64, 256)
DRAWN_WEIGHTS = 50_000
SPARSITIES = (0.5, 0.9)
KINDS = {
    "normal": "independent standard normal numbers",
    "realistic": "drawn at random, with scales spread over five decades",
    "CNN": "a convolutional network, briefly trained on digits",
    "MLP": "a network of linear layers, briefly trained on digits",
}
Shares = dict[str, list[float]]


def main() -> None:
    """Measure, and write the page."""
    PAGE.write_text(document(measured(range(SEEDS))))
    print(f"wrote {PAGE}")


def measured(seeds: Iterable[int]) -> dict[tuple[str, int, float], Shares]:
    """Return for each kind, m and sparsity the shares of the mask that differ, by what differs, one for each seed."""
    found: dict[tuple[str, int, float], Shares] = {}
    for seed in seeds:
        for kind in KINDS:
            print(f"{kind}, seed {seed}", flush=True)
            weights, gradients = _problem(kind, seed)
            for m in ROWS:
                for sparsity in SPARSITIES:
                    shares = found.setdefault((kind, m, sparsity), {})
                    for name, share in _differences(weights, gradients, m, sparsity).items():
                        shares.setdefault(name, []).append(share)
    return found


def document(found: Mapping[tuple[str, int, float], Shares]) -> str:
    """Return the page."""
    lines = [
        "# Gradient windows in bfloat16",
        "",
        fill(
            "How many entries of a mask change if the gradient window is stored with `grads_dtype: bfloat16`: one "
            f"pruning step from dense weights, `damp: auto`, joint update. Percent of all weights, mean over {SEEDS} "
            "seeds and in parentheses the largest. For comparison, the same with a window of other samples in float32, "
            "and with magnitude pruning.",
            120,
        ),
        "",
        fill(
            f"`python tests/benchmarks/bench_bfloat16.py` wrote this page at commit {commit()} on {processor()}. Your "
            "numbers will differ a little.",
            120,
        ),
        "",
        "| gradients | m | sparsity | bfloat16 | other samples | magnitude |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (kind, m, sparsity), shares in found.items():
        cells = [f"{100 * np.mean(each):.3f} ({100 * max(each):.3f})" for each in shares.values()]
        lines.append(f"| {kind} | {m} | {sparsity:g} | {' | '.join(cells)} |")
    ratios = [np.mean(each["bfloat16"]) / np.mean(each["other samples"]) for each in found.values()]
    lines += [
        "",
        f"Rounding moves at most {100 * max(ratios):.1g}% as many entries as other samples do. The gradients:",
        "",
        *(f"* {kind}: {words}" for kind, words in KINDS.items()),
    ]
    return "\n".join(lines) + "\n"


def _differences(weights: np.ndarray, gradients: np.ndarray, m: int, sparsity: float) -> dict[str, float]:
    usual = _pruned(weights, gradients[:m], sparsity, "float32").masks["w"]
    magnitudes = np.abs(weights)
    others = {
        "bfloat16": _pruned(weights, gradients[:m], sparsity, "bfloat16").masks["w"],
        "other samples": _pruned(weights, gradients[-m:], sparsity, "float32").masks["w"],
        "magnitude": magnitudes > np.sort(magnitudes)[round(len(weights) * sparsity) - 1],
    }
    return {name: float(np.mean(mask != usual)) for name, mask in others.items()}


def _pruned(weights: np.ndarray, gradients: np.ndarray, sparsity: float, dtype: str) -> PruneResult:
    settings = MFACSettings(
        final_sparsity=sparsity,
        end_epoch=0.0,
        num_gradients=len(gradients),
        damping="auto",
        update="joint",
        gradients_dtype=dtype,
    )
    pruner = MFACPruner(settings, {"w": weights}, steps_per_epoch=1, live_gradients=False)
    for row in gradients:
        pruner.observe({"w": row})
    return pruner.prune({"w": weights}, 0)


def _problem(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if kind in NETWORKS:
        return of_network(kind, 2 * max(ROWS), seed)
    weights = np.random.default_rng(seed + 1000).standard_normal(DRAWN_WEIGHTS, dtype=np.float32)
    return weights, np.stack(list(DRAWN[kind](2 * max(ROWS), DRAWN_WEIGHTS, seed)))


if __name__ == "__main__":
    main()
