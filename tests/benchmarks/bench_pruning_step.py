"""Measure a whole pruning step on the CPU against its floor and against the textbook recursion.

Run it from the root of the project: ``python tests/benchmarks/bench_pruning_step.py [--write]``. With ``--write`` the
table goes to ``docs/benchmarks.md``. Each row runs in its own process, so that its peak memory is measured alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machine import YOURS_WILL_DIFFER, commit, processor

SHAPES = [  # m, B, d; None is one block
    (64, 50, 500_000),
    (64, 1000, 1_000_000),
    (64, 2000, 2_000_000),
    (64, 10000, 1_000_000),
    (256, 50, 200_000),
    (256, 128, 200_000),
    (256, 1000, 500_000),
    (256, 2000, 500_000),
    (256, 10000, 500_000),
    (256, None, 200_000),
    (512, 2000, 200_000),
    (1024, 50, 100_000),
    (1024, 1000, 100_000),
    (1024, 2000, 100_000),
    (1024, 10000, 100_000),
    (1400, 2000, 100_000),
]
LINEAR_IN_D = (64, 2000, (125_000, 250_000, 500_000, 1_000_000, 2_000_000))
TEXTBOOK_SECONDS = 5  # the textbook variants run on as many blocks as this allows, and are scaled up
SPARSITY = 0.5
DAMPING = 1e-5
OUTPUT = Path("docs/benchmarks.md")


def main() -> None:
    """Measure every shape and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT}")
    parser.add_argument("--shape", nargs=3, help="measure one shape in this process: m B d")
    parser.add_argument("--no-textbook", action="store_true", help="skip the textbook variants")
    parser.add_argument("--made-again", action="store_true", help="with --shape: keep no factors between the passes")
    arguments = parser.parse_args()
    if arguments.shape:
        m, width, d = (None if value == "None" else int(value) for value in arguments.shape)
        if arguments.made_again:
            print(json.dumps(measure_without_kept_factors(m, width, d)))
        else:
            print(json.dumps(measure(m, width, d, textbook=not arguments.no_textbook)))
        return
    rows = []
    for shape in SHAPES:
        row = _in_a_process(shape, *(["--no-textbook"] if arguments.no_textbook else []))
        row["made_again"] = _in_a_process(shape, "--made-again")
        rows.append(row)
        print(_line(rows[-1]), flush=True)
    m, width, sizes = LINEAR_IN_D
    scaling = [_in_a_process((m, width, d), "--no-textbook") for d in sizes]
    document = _document(rows, scaling)
    if arguments.write:
        OUTPUT.write_text(document, encoding="utf-8")
        print(f"written: {OUTPUT}")
    else:
        print(document)


def measure(m: int, width: int | None, d: int, *, textbook: bool) -> dict:
    """Return the times of one shape, in seconds, and the memory beyond the window, in bytes."""
    window, weights = _problem(m, width, d)
    before = _resident()
    whole = [_timed_beside_products(lambda: _step(window, weights))]
    memory = _peak() - before
    whole += [_timed_beside_products(lambda: _step(window, weights)) for _ in range(6 if whole[0][0] < 10 else 2)]
    seconds, rates = zip(*whole, strict=True)
    ratios = sorted(second * rate / (2 * m * m * d) for second, rate in whole)
    result = {
        "m": m, "B": width, "d": d, "seconds": statistics.median(seconds), "rate": statistics.median(rates),
        "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1], "memory": memory,
        "window": window.num_bytes, "parts": _parts(window, weights), "textbook": {},
    }  # fmt: skip
    if textbook:
        result["textbook"] = _textbook(_some_blocks(window), d)
    return result


def measure_without_kept_factors(m: int, width: int | None, d: int) -> dict:
    """Return seconds and memory of one shape if the second pass factors every block again."""
    from mfac_core.fisher import blockwise

    blockwise.RETAINED_FRACTION = 0.0
    window, weights = _problem(m, width, d)
    before = _resident()
    seconds = [_timed(lambda: _step(window, weights))]
    memory = _peak() - before
    seconds += [_timed(lambda: _step(window, weights)) for _ in range(2 if seconds[0] < 10 else 0)]
    return {"seconds": statistics.median(seconds), "memory": memory}


def _problem(m: int, width: int | None, d: int):
    from mfac_core.fisher.window import GradientWindow

    rng = np.random.default_rng(0)
    window = GradientWindow(d, m, block_size=width)
    for _ in range(m):
        window.push(rng.standard_normal(d, dtype=np.float32))
    return window, rng.standard_normal(d, dtype=np.float32)


def _step(window, weights) -> None:
    from mfac_core.masks.selection import least_salient
    from mfac_core.pruners.step import mfac_step

    def select(saliencies):
        return least_salient(saliencies, round(len(weights) * SPARSITY))

    mfac_step(weights, window, select, damping=DAMPING, update="independent", devices="cpu")


def _parts(window, weights) -> dict[str, float]:
    """Return the seconds of each part of a step, by name."""
    from mfac_core.fisher.blockwise import BlockwiseFisher
    from mfac_core.fisher.obs import independent_update, saliency
    from mfac_core.masks.selection import least_salient

    seconds = {}

    def part(name, function):
        started = time.perf_counter()
        value = function()
        seconds[name] = time.perf_counter() - started
        return value

    fisher = BlockwiseFisher(window, damping=DAMPING, devices="cpu")
    diagonal = part("diagonal", fisher.diagonal)
    saliencies = part("saliency", lambda: saliency(weights, diagonal))
    chosen = part("mask", lambda: least_salient(saliencies, round(len(weights) * SPARSITY)))
    change, _ = part("update", lambda: independent_update(fisher, weights, chosen, diagonal))
    part("writing", lambda: np.where(chosen, 0, weights + change))
    return seconds


def _some_blocks(window) -> np.ndarray:
    """Return up to 32 of the first blocks of a window, shape ``(n, m, B)``."""
    group = window.stored_groups[0]
    chunks = window.chunks(group.subgroup(0, min(group.count, 32)))
    return np.concatenate(chunks, axis=-1)


def _textbook(blocks: np.ndarray, d: int) -> dict[str, float]:
    """Return seconds of the diagonal over all ``d`` weights for each variant, measured on some blocks."""
    import textbook as variants
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    blocks = np.ascontiguousarray(blocks)
    n, m, width = blocks.shape
    seconds = {}
    for name in ("single_block_numpy", "batched_numpy", "single_block_torch", "batched_torch", "dense_blocks_torch"):
        if name == "dense_blocks_torch" and width > 256:
            continue
        function = getattr(variants, name)
        data = blocks if name.endswith("numpy") else torch.from_numpy(blocks)
        one = _timed(lambda f=function, x=data[:1]: f(x, 1e-5))
        count = max(1, min(n, int(TEXTBOOK_SECONDS / 5 / one)))
        taken = min(_timed(lambda f=function, x=data[:count]: f(x, 1e-5)) for _ in range(2))
        seconds[name] = taken * d / (count * width)
    return seconds


def _timed_beside_products(function) -> tuple[float, float]:
    """Return the seconds of a call, and the mean float32 rate of matrix products right before and after it."""
    before = _product_rate()
    seconds = _timed(function)
    return seconds, (before + _product_rate()) / 2


def _product_rate(size: int = 2048) -> float:
    """Return the machine's float32 matrix-product rate on all cores, in operations per second."""
    a, b = np.ones((2, size, size), np.float32)
    out = np.empty_like(a)
    return 2 * size**3 / min(_timed(lambda: np.matmul(a, b, out=out)) for _ in range(3))


def _timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_a_process(shape: tuple, *options: str) -> dict:
    command = [sys.executable, __file__, "--shape", *map(str, shape), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict) -> str:
    best = min(row["textbook"].values(), default=None)
    name = min(row["textbook"], key=row["textbook"].get, default="")
    parts = row["parts"]
    cells = [
        row["m"], row["B"] or "all", f"{row['d']:,}", f"{row['seconds']:.2f}",
        *(f"{parts[name]:.2f}" for name in ("diagonal", "mask", "update")),
        f"{row['rate'] / 1e9:.0f}", f"{row['ratio']:.1f} ({row['lowest']:.1f} to {row['highest']:.1f})",
        f"{best / parts['diagonal']:.0f} ({name.replace('_', ' ')})" if best else "",
        f"{row['memory'] / 2**20:.0f}", f"{row['window'] / 2**20:.0f}",
        f"{row['made_again']['seconds']:.2f}", f"{row['made_again']['memory'] / 2**20:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _document(rows: list[dict], scaling: list[dict]) -> str:
    import mfac_core

    d = np.array([row["d"] for row in scaling], float)
    seconds = np.array([row["seconds"] for row in scaling])
    slope, offset = np.polyfit(d, seconds, 1)
    fit = 1 - ((seconds - slope * d - offset) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    rate = statistics.median(row["rate"] for row in rows) / 1e9
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "One pruning step on the CPU: inverse diagonal, saliency, mask, independent update, new weights. float32,",
            "standard normal gradients and weights, half of the weights pruned.",
            "",
            f"Made by `tests/benchmarks/bench_pruning_step.py --write` with mfac-core {mfac_core.__version__}, NumPy "
            f"{np.__version__}, Python {platform.python_version()}, {platform.system()} on {processor()}, "
            f"{len(os.sched_getaffinity(0))} cores; its matrix product runs at {rate:.0f} GFLOP/s (median over rows).",
            f"Measured at commit {commit()}.",
            YOURS_WILL_DIFFER,
            "",
            "* *step*: seconds, median of seven runs (three if a step takes over ten seconds); *diagonal*, *mask*,",
            "  *update*: the time of these parts of a step (saliency and writing back take the rest)",
            "* *product*: rate of 2048 x 2048 matrix products immediately before and after each run, in GFLOP/s",
            "* *floor ratio*: time of the step over that of `2 m^2 d` operations at that rate: median (min to max)",
            "* *textbook ratio*: diagonal by the fastest textbook variant of the paper's recursion, over ours",
            "  (`tests/benchmarks/textbook.py`; measured on up to 32 blocks and scaled to `d`)",
            "* *memory*: peak resident memory of the step beyond the window, in MiB; *window*: the window itself",
            "* *again*, *memory again*: seconds and memory if the second pass computes all factors again",
            "",
            "| m | B | d | step | diagonal | mask | update | product | floor ratio | textbook ratio | memory | window "
            "| again | memory again |",
            "| --- " * 14 + "|",
            *map(_line, rows),
            "",
            "The second pass (update) needs the factor of each block again. Factors of size `m x m` are kept from",
            "the first pass, because computing them again costs as much as that pass without its triangular solve.",
            "They take at most `m / B` of the window, and never more than half of it or a quarter of the free memory.",
            "Factors of size `B x B` (`B <= m`) are computed again: together they would be as large as all dense",
            "inverses.",
            "",
            "A step does not reach its floor because BLAS is slower for thin products (64 rows) than for square ones,",
            "needs more than half the time of a full product for the product of a matrix with its own transpose, and",
            "computes small factorizations in many small calls. This matters most if `m` is small.",
            "",
            "## On a GPU",
            "",
            "`make bench-gpu` measures the same step on an NVIDIA GPU, by CuPy and by PyTorch side by side, with the",
            "window on the device and in pinned host memory, and writes docs/benchmarks-gpu.md. It has not been run",
            "yet, so there is no table and no claim.",
            "",
            "## Linear in d",
            "",
            f"m = {LINEAR_IN_D[0]}, B = {LINEAR_IN_D[1]}: a straight line through the seconds has slope "
            f"{slope * 1e6:.2f} s per million weights, offset {offset:.2f} s, R² = {fit:.4f}.",
            "",
            "| d | step |",
            "| --- | --- |",
            *(f"| {row['d']:,} | {row['seconds']:.2f} |" for row in scaling),
            "",
        ]
    )


if __name__ == "__main__":
    main()
