"""Measure a whole pruning step on the CPU against its floor and against the textbook recursion.

Run it from the root of the project: ``python tests/benchmarks/bench_pruning_step.py [--write]``. With ``--write`` the
tables go to ``docs/benchmarks.md``. Each row runs in its own process, so that its peak memory is measured alone. A row
that fails is reported, on the page too, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock, local
from unittest.mock import patch

import numpy as np
import textbook
import torch
from bench_document import NUMPY, PARTS, PUBLIC, SMALL_BLOCK, USABLE, Row, document
from bench_tolerance import SEEDS, measure_tolerances
from gradients import DRAWN, NETWORKS, of_network

from mfac_core.fisher import dual, factors, primal
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.dual import DualFactor
from mfac_core.fisher.primal import PrimalFactor
from mfac_core.fisher.window import GradientWindow
from mfac_core.masks.selection import least_salient
from mfac_core.pruners import step as pruning_step

SPARSITY = 0.5
DAMPING = 1e-5
OUTPUT = Path("docs/benchmarks.md")
ROW_SECONDS = 8.0  # no further round of a row begins after this time
ROUNDS = (3, 9)  # at least and at most so many
MOST_SECONDS = 120  # a row that takes longer has failed
VARIANT_SECONDS = 0.4  # a textbook variant gets as many blocks as this allows, and is scaled up
DENSE = 3000  # largest block whose Fisher the oracle inverts itself
ORACLE_WORK = 4e9  # m^2 B of all blocks that are compared with the oracle


@dataclass(frozen=True)
class Shape:
    """One row to measure: block size ``width``, the first ``d`` weights; ``None`` for one block, or all weights."""

    kind: str
    m: int
    width: int | None
    d: int | None


SHAPES = [
    Shape("realistic", 64, 50, 500_000),
    Shape("realistic", 64, 1000, 1_000_000),
    Shape("realistic", 64, 1500, 900_000),
    Shape("realistic", 64, 2000, 1_000_000),
    Shape("realistic", 64, 10000, 1_000_000),
    Shape("realistic", 192, 2500, 500_000),
    Shape("realistic", 256, 50, 200_000),
    Shape("realistic", 256, 128, 192_000),
    Shape("realistic", 256, 1000, 500_000),
    Shape("realistic", 256, 2000, 500_000),
    Shape("realistic", 256, 9000, 495_000),
    Shape("realistic", 256, None, 30_000),
    Shape("realistic", 512, 2000, 200_000),
    Shape("realistic", 768, 3000, 90_000),
    Shape("realistic", 1024, 50, 100_000),
    Shape("realistic", 1024, 1000, 60_000),
    Shape("realistic", 1024, 2000, 60_000),
    Shape("realistic", 1024, 10000, 60_000),
    Shape("realistic", 1400, 2000, 60_000),
    Shape("normal", 64, 2000, 1_000_000),
    Shape("normal", 256, 2000, 500_000),
    Shape("normal", 1024, 2000, 60_000),
    Shape("CNN", 64, 2000, None),
    Shape("CNN", 256, 9000, None),
    Shape("CNN", 1024, 50, 100_000),
    Shape("CNN", 1024, 1000, 60_000),
    Shape("MLP", 64, 1500, None),
    Shape("MLP", 256, 2000, None),
    Shape("MLP", 768, 3000, 90_000),
]
LINEAR_IN_D = [Shape("realistic", 64, 2000, d) for d in (125_000, 250_000, 500_000, 1_000_000, 2_000_000)]


def main() -> None:
    """Measure every shape and print, or write, the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT}")
    parser.add_argument("--row", help="measure one shape in this process, given as JSON")
    parser.add_argument("--networks", type=Path, help="with --row: folder with the gradients of the networks")
    parser.add_argument("--no-textbook", action="store_true", help="with --row: skip the textbook variants")
    arguments = parser.parse_args()
    if arguments.row:
        shape = Shape(**json.loads(arguments.row))
        print(json.dumps(asdict(measure(shape, arguments.networks, textbook=not arguments.no_textbook))))
        return
    text = page()
    if arguments.write:
        OUTPUT.write_text(text, encoding="utf-8")
        print(f"written: {OUTPUT}")
    else:
        print(text)


def page() -> str:
    """Measure every shape, each in its own process, and return the page."""
    started = time.perf_counter()
    failed: list[str] = []

    def rows(shapes: Iterable[Shape], folder: str, *options: str) -> list[Row]:
        out = []
        for shape in shapes:
            try:
                out.append(_in_a_process(shape, folder, *options))
                result = f"{out[-1].name}, d = {out[-1].d:,}: {out[-1].seconds['step']:.2f} s"
            except subprocess.SubprocessError as error:
                failed.append(f"m = {shape.m}, B = {shape.width or 'all'}, {shape.kind}")
                result = f"{failed[-1]} failed: {error}\n{error.stderr}"
            print(f"{(time.perf_counter() - started) / 60:5.1f} min  {result}", flush=True)
        return out

    with tempfile.TemporaryDirectory() as folder:
        save_networks(Path(folder), max((shape.m for shape in SHAPES if shape.kind in NETWORKS), default=0))
        measured, scaling = rows(SHAPES, folder), rows(LINEAR_IN_D, folder, "--no-textbook")
    tolerances = measure_tolerances(range(SEEDS))
    return document(measured, scaling, tolerances, failed, minutes=(time.perf_counter() - started) / 60)


def save_networks(folder: Path, m: int) -> None:
    """Train each network once, and store its weights and gradients."""
    for name in NETWORKS:
        weights, gradients = of_network(name, m, seed=0)
        weights.tofile(folder / f"{name}.weights")
        gradients.tofile(folder / f"{name}.gradients")


def measure(shape: Shape, networks: Path | None = None, *, textbook: bool = True) -> Row:
    """Return times, memory and errors of one shape."""
    started = time.perf_counter()
    weights, gradients = _problem(shape, networks)
    window = GradientWindow(len(weights), shape.m, block_size=shape.width)
    for sample in gradients:
        window.push(sample)
    base = _reset_peak()
    timed_step(window, weights)
    memory = _peak() - base
    width = shape.width or len(weights)
    blocks, places = some_blocks(window, width, shape.m)
    exact = oracle(blocks, shape.m)
    screened = {name: _screened(name, blocks, exact) for name in _variants(shape.m, width)} if textbook else {}
    candidates = _candidates(screened)
    steps, rates, variants = [], [], {name: [] for name in candidates}
    while len(steps) < ROUNDS[0] or (len(steps) < ROUNDS[1] and time.perf_counter() < started + ROW_SECONDS):
        rate = _product_rate()
        step = timed_step(window, weights)
        rates.append((rate + _product_rate()) / 2)
        steps.append(step)
        for name in candidates:
            variants[name].append(_seconds_per_weight(name, screened[name], window, width) * len(weights))
    floors = [2 * shape.m**2 * len(weights) / rate for rate in rates]
    # the shortest times: a variant in PyTorch takes many times as long whenever another process has one of the cores
    fastest = min(step.seconds["diagonal"] for step in steps)
    diagonal = np.concatenate([step.diagonal[place] for place in places]).reshape(len(places), -1)
    return Row(
        kind=shape.kind, m=shape.m, width=shape.width, d=len(weights),
        seconds={part: statistics.median(step.seconds[part] for step in steps) for part in step.seconds},
        rate=statistics.median(rates),
        floor_ratios=sorted(step.seconds["step"] / floor for step, floor in zip(steps, floors, strict=True)),
        diagonal_floor_ratio=statistics.median(
            step.seconds["diagonal"] / floor for step, floor in zip(steps, floors, strict=True)
        ),
        parts={part: statistics.median(step.parts[part] for step in steps) for part in PARTS},
        ratios={name: min(seconds) / fastest for name, seconds in variants.items()},
        errors={name: screened[name].error for name in candidates},
        memory=memory, window=window.num_bytes, in_float64=step.in_float64,
        error=relative_error(diagonal, exact), oracle_blocks=len(places),
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One pruning step.

    Args:
        seconds: Of the whole and of each part.
        parts: Share of each part of the diagonal in the time of all threads that compute it.
        diagonal: The inverse diagonal.
        in_float64: Share of the groups that were computed in float64.
    """

    seconds: Mapping[str, float]
    parts: Mapping[str, float]
    diagonal: np.ndarray
    in_float64: float


def timed_step(window: GradientWindow, weights: np.ndarray) -> Step:
    """Run one pruning step and measure its parts."""
    seconds: dict[str, float] = {}
    seen = {}
    plain_diagonal = BlockwiseFisher.diagonal

    def diagonal(fisher: BlockwiseFisher) -> np.ndarray:
        with timed_parts() as shares:
            out = plain_diagonal(fisher)
        seen["shares"] = shares
        return out

    def part(name: str, function: Callable) -> Callable:
        def timed(*arguments):
            started = time.perf_counter()
            seen[name] = arguments, function(*arguments)
            seconds[name] = time.perf_counter() - started
            return seen[name][1]

        return timed

    with (
        patch.object(BlockwiseFisher, "diagonal", part("diagonal", diagonal)),
        patch.object(pruning_step, "independent_update", part("update", pruning_step.independent_update)),
    ):
        started = time.perf_counter()
        pruning_step.mfac_step(
            weights,
            window,
            part("mask", lambda saliencies: least_salient(saliencies, round(len(weights) * SPARSITY))),
            damping=DAMPING,
            update="independent",
            devices="cpu",
        )
        seconds["step"] = time.perf_counter() - started
    (fisher,), values = seen["diagonal"]
    return Step(seconds, seen["shares"], values, fisher.float64_share)


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Measure the parts of the diagonals computed within the context; yield their shares, filled in at its end.

    Each thread evaluates some groups from beginning to end. The seconds of all threads are added.
    """
    seconds: dict[str, float] = defaultdict(float)
    lock = Lock()
    thread = local()

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments):
            if getattr(thread, "is_in_float64", False):  # counted as a whole
                return function(*arguments)
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                with lock:
                    seconds[name] += time.perf_counter() - started

        return run

    def in_float64(*arguments):
        thread.is_in_float64 = True
        try:
            return evaluate_in(*arguments)
        finally:
            thread.is_in_float64 = False

    evaluate_in = factors._evaluate_in
    redone = timed("float64", in_float64)
    replaced = [
        (BlockwiseFisher, "_evaluate", timed("all", BlockwiseFisher._evaluate)),
        (factors, "_evaluate_in", lambda dtype, *rest: (redone if dtype == np.float64 else evaluate_in)(dtype, *rest)),
        (dual, "_gram", timed("gram", dual._gram)),
        (dual, "cholesky", timed("factor", dual.cholesky)),
        (DualFactor, "diagonal", timed("solve", DualFactor.diagonal)),
        (DualFactor, "_check", timed("check", DualFactor._check)),
        (primal, "_primal_product", timed("gram", primal._primal_product)),
        (primal, "cholesky", timed("factor", primal.cholesky)),
        (PrimalFactor, "diagonal", timed("solve", PrimalFactor.diagonal)),
        (PrimalFactor, "_measured_error", timed("check", PrimalFactor._measured_error)),
    ]
    shares: dict[str, float] = {}
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(patch.object(owner, name, replacement))
        yield shares
    seconds["solve"] -= seconds["check"]  # the check is part of the method that solves
    seconds["rest"] = 2 * seconds["all"] - sum(seconds.values())
    shares.update({part: seconds[part] / seconds["all"] for part in PARTS})


def some_blocks(window: GradientWindow, width: int, m: int, most: int = 4) -> tuple[np.ndarray, list[slice]]:
    """Return a few blocks of full width from all over a window, shape ``(n, m, width)``, and their places."""
    total = window.num_weights // width
    count = max(1, min(most, total, int(ORACLE_WORK / (m * m * width))))
    indices = np.linspace(0, total - 1, count).astype(int)
    return _blocks(window, width, indices), [slice(i * width, (i + 1) * width) for i in indices]


def oracle(blocks: np.ndarray, m: int) -> np.ndarray:
    """Return the inverse diagonals of blocks, from dense inverses in float64."""
    diagonals = []
    for block in blocks.astype(np.float64):
        if block.shape[1] <= DENSE:
            fisher = DAMPING * np.eye(block.shape[1]) + block.T @ block / m
            diagonals.append(np.diag(np.linalg.inv(fisher)))
        else:
            # Woodbury
            solved = np.linalg.inv(m * DAMPING * np.eye(m) + block @ block.T) @ block
            diagonals.append((1 - np.einsum("ij,ij->j", block, solved)) / DAMPING)
    return np.stack(diagonals)


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest relative error; infinite if a value is not a number."""
    error = float(np.max(np.abs(values / exact - 1)))
    return math.inf if math.isnan(error) else error


@dataclass(frozen=True)
class Screened:
    """A textbook variant after its first run: seconds per block, and its relative error."""

    seconds: float
    error: float


def _screened(name: str, blocks: np.ndarray, exact: np.ndarray) -> Screened:
    seconds, diagonals = _run(name, blocks)
    return Screened(seconds / len(blocks), relative_error(diagonals, exact))


def _candidates(screened: dict[str, Screened]) -> list[str]:
    """Return the variants that may be the fastest, or the fastest accurate one, of each kind; and the dynamic one."""
    chosen = {name for name in screened if name not in PUBLIC + NUMPY}
    for names in (PUBLIC, NUMPY):
        some = {name: screened[name] for name in names if name in screened}
        for least in (some, {name: each for name, each in some.items() if each.error <= USABLE}):
            fastest = min((each.seconds for each in least.values()), default=0.0)
            chosen |= {name for name, each in least.items() if each.seconds < 1.5 * fastest}
    return [name for name in screened if name in chosen]


def _variants(m: int, width: int) -> list[str]:
    """Return the variants to run: dense inverses or the dynamic algorithm, where they are not hopelessly slow."""
    names = [*PUBLIC, *NUMPY]
    if width > SMALL_BLOCK:
        names.remove("dense_blocks_torch")
    return [*names, "dynamic_torch"] if width > min(m, SMALL_BLOCK) else names


def _seconds_per_weight(name: str, screened: Screened, window: GradientWindow, width: int) -> float:
    """Return the seconds per weight of a textbook variant on blocks from all over the window."""
    total = window.num_weights // width
    count = max(1, min(total, int(VARIANT_SECONDS / screened.seconds), 64))
    blocks = _blocks(window, width, np.linspace(0, total - 1, count).astype(int))
    return _run(name, blocks)[0] / (count * width)


def _run(name: str, blocks: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the seconds of a textbook variant, and its diagonals."""
    data = blocks if name.endswith("numpy") else torch.from_numpy(blocks)
    started = time.perf_counter()
    with np.errstate(all="ignore"):
        diagonals = getattr(textbook, name)(data, DAMPING)
    return time.perf_counter() - started, np.asarray(diagonals)


def _blocks(window: GradientWindow, width: int, indices: Iterable[int]) -> np.ndarray:
    out = []
    for index in indices:
        group = next(group for group in window.stored_groups if group.start <= index * width < group.stop)
        one = group.subgroup((index * width - group.start) // width, 1)
        out.append(np.concatenate(window.chunks(one), axis=-1))
    return np.concatenate(out)


def _problem(shape: Shape, networks: Path | None) -> tuple[np.ndarray, Iterable[np.ndarray]]:
    """Return the weights and gradient samples of a shape."""
    if shape.kind in DRAWN:
        weights = np.random.default_rng(1).standard_normal(shape.d, dtype=np.float32)
        return weights, DRAWN[shape.kind](shape.m, shape.d, seed=0)
    if networks is None:
        weights, rows = of_network(shape.kind, shape.m, seed=0)
        return weights[: shape.d], rows[:, : shape.d]
    weights = np.fromfile(networks / f"{shape.kind}.weights", np.float32)
    rows = np.memmap(networks / f"{shape.kind}.gradients", np.float32, "r").reshape(-1, len(weights))
    return weights[: shape.d], (np.array(row[: shape.d]) for row in rows[: shape.m])


def _product_rate(size: int = 2048) -> float:
    """Return the machine's float32 matrix-product rate on all cores, in operations per second."""
    a, b = np.ones((2, size, size), np.float32)
    out = np.empty_like(a)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        np.matmul(a, b, out=out)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _reset_peak() -> int:
    """Make the current resident memory of this process the peak so far, and return it in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _in_a_process(shape: Shape, networks: str, *options: str) -> Row:
    # all cores, whatever the environment says
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    command = [sys.executable, __file__, "--row", json.dumps(asdict(shape)), "--networks", networks, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=MOST_SECONDS)
    line = done.stdout.splitlines()[-1]
    return Row(**json.loads(line))


if __name__ == "__main__":
    main()
