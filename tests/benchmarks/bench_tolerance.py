"""Measure what the tolerance of the inverse diagonal costs and what it changes: time, error and mask.

Run it from the root of the project: ``python tests/benchmarks/bench_tolerance.py``. Its table is part of
``docs/benchmarks.md``, which ``bench_pruning_step.py`` writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from bench_document import tolerance_table
from gradients import DRAWN, NETWORKS, of_network
from textbook import single_block_numpy

from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.masks.selection import least_salient

SEEDS = 5
ROWS = (64, 256)
WIDTH = 2000
DRAWN_WEIGHTS = 100_000
DAMPING = 1e-5
SPARSITY = 0.5
RTOLS = ("1e-5", "1e-3")
EXACT = "float64"
TEXTBOOK = "textbook"
MAGNITUDE = "magnitude"


@dataclass
class Tolerance:
    """A tolerance, the textbook recursion or magnitude pruning over all seeds, beside a computation in float64."""

    time_ratios: list[float] = field(default_factory=list)
    in_float64: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    differences: list[int] = field(default_factory=list)


def main() -> None:
    """Print the table."""
    print("\n".join(tolerance_table(measure_tolerances(range(SEEDS)))))


def measure_tolerances(seeds: Iterable[int]) -> dict[tuple[str, int, int], dict[str, Tolerance]]:
    """Return for each kind, m and d the results by name: each tolerance, ``textbook`` and ``magnitude``."""
    out: dict[tuple[str, int, int], dict[str, Tolerance]] = {}
    for seed in seeds:
        print(f"tolerances, seed {seed}", flush=True)
        for kind in (*DRAWN, *NETWORKS):
            weights, gradients = _problem(kind, seed)
            for m in ROWS:
                results = out.setdefault((kind, m, len(weights)), {})
                _measure(weights, np.ascontiguousarray(gradients[:m]), results)
    return out


def _measure(weights: np.ndarray, gradients: np.ndarray, results: dict[str, Tolerance]) -> None:
    wide = gradients.astype(np.float64)
    runs = {name: _diagonal(wide if name == EXACT else gradients, name) for name in (EXACT, *RTOLS)}
    exact = runs.pop(EXACT)
    mask = _mask(weights.astype(np.float64), exact.diagonal)
    for name, run in {**runs, TEXTBOOK: _textbook(gradients)}.items():
        result = results.setdefault(name, Tolerance())
        result.time_ratios.append(run.seconds / exact.seconds)
        result.in_float64.append(run.in_float64)
        result.errors.append(float(np.max(np.abs(run.diagonal / exact.diagonal - 1))))
        result.differences.append(int(np.count_nonzero(_mask(weights, run.diagonal) != mask)))
    # for comparison, a diagonal that knows nothing of the gradients
    magnitude = results.setdefault(MAGNITUDE, Tolerance())
    magnitude.differences.append(int(np.count_nonzero(_mask(weights, np.ones_like(weights)) != mask)))


class _Run(NamedTuple):
    """An inverse diagonal, the seconds it took, and the share of groups that were computed in float64."""

    diagonal: np.ndarray
    seconds: float
    in_float64: float


def _diagonal(gradients: np.ndarray, rtol: str) -> _Run:
    # gradients in float64 are always computed in it, whatever the tolerance
    tolerance = 1e-5 if rtol == EXACT else float(rtol)
    source = GradientMatrix([gradients], block_size=WIDTH)
    fisher = BlockwiseFisher(source, damping=DAMPING, devices="cpu", rtol=tolerance)
    started = time.perf_counter()
    diagonal = fisher.diagonal()
    return _Run(diagonal, time.perf_counter() - started, fisher.float64_share)


def _textbook(gradients: np.ndarray) -> _Run:
    started = time.perf_counter()
    starts = range(0, gradients.shape[1], WIDTH)
    diagonals = [single_block_numpy(gradients[None, :, start : start + WIDTH], DAMPING)[0] for start in starts]
    return _Run(np.concatenate(diagonals), time.perf_counter() - started, 0.0)


def _mask(weights: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
    # not `obs.saliency`, which refuses the negative numbers that the recursion can give in float32
    return least_salient(weights**2 / (2 * diagonal), round(len(weights) * SPARSITY))


def _problem(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if kind in NETWORKS:
        return of_network(kind, max(ROWS), seed)
    weights = np.random.default_rng(seed + 1000).standard_normal(DRAWN_WEIGHTS, dtype=np.float32)
    return weights, np.stack(list(DRAWN[kind](max(ROWS), DRAWN_WEIGHTS, seed)))


if __name__ == "__main__":
    main()
