"""Measure a whole pruning step on the CPU against its floor and against the textbook recursion.

Run it from the root of the project: ``python tests/benchmarks/bench_pruning_step.py [--write]``. With ``--write`` the
table goes to ``docs/benchmarks.md``. Each row runs in a process of its own, so that its peak memory is its own.
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
OUTPUT = Path("docs/benchmarks.md")


def main() -> None:
    """Measure every shape and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT}")
    parser.add_argument("--shape", nargs=3, help="measure one shape in this process: m B d")
    parser.add_argument("--no-textbook", action="store_true", help="leave the textbook variants out")
    arguments = parser.parse_args()
    if arguments.shape:
        m, width, d = (None if value == "None" else int(value) for value in arguments.shape)
        print(json.dumps(measure(m, width, d, textbook=not arguments.no_textbook)))
        return
    rows = []
    for shape in SHAPES:
        rows.append(_in_a_process(shape, textbook=not arguments.no_textbook))
        print(_line(rows[-1]), flush=True)
    m, width, sizes = LINEAR_IN_D
    scaling = [_in_a_process((m, width, d), textbook=False) for d in sizes]
    document = _document(rows, scaling)
    if arguments.write:
        OUTPUT.write_text(document, encoding="utf-8")
        print(f"written: {OUTPUT}")
    else:
        print(document)


def measure(m: int, width: int | None, d: int, *, textbook: bool) -> dict:
    """Return the times of one shape, in seconds, and the memory beyond the window, in bytes.

    Args:
        m: Rows of the window.
        width: Weights per block, or ``None``.
        d: Number of weights.
        textbook: Whether to measure the textbook variants too.

    Returns:
        The measurements by name.
    """
    from mfac_core.blockwise import BlockwiseFisher
    from mfac_core.gradient_window import GradientWindow
    from mfac_core.masks import least_salient
    from mfac_core.pruning_step import mfac_step

    rng = np.random.default_rng(0)
    window = GradientWindow(d, m, block_size=width)
    for _ in range(m):
        window.push(rng.standard_normal(d, dtype=np.float32))
    weights = rng.standard_normal(d, dtype=np.float32)

    def step() -> None:
        mfac_step(
            weights,
            window,
            lambda saliencies: least_salient(saliencies, round(d * SPARSITY)),
            damping=1e-5,
            update="independent",
            devices="cpu",
        )

    before = _resident()
    whole = [_timed(step)]
    memory = _peak() - before
    whole += [_timed(step) for _ in range(2 if whole[0] < 30 else 0)]
    fisher = BlockwiseFisher(window, damping=1e-5, devices="cpu")
    diagonal = min(_timed(fisher.diagonal) for _ in range(2))
    rate = _product_rate()
    result = {
        "m": m, "B": width, "d": d, "seconds": min(whole), "spread": max(whole) - min(whole), "diagonal": diagonal,
        "rate": rate, "floor": 2 * m * m * d / rate, "memory": memory, "window": window.num_bytes,
        "textbook": {},
    }  # fmt: skip
    if textbook and width is not None:
        whole_groups = [i for i, group in enumerate(window.groups[:4]) if group.width == window.groups[0].width]
        result["textbook"] = _textbook(np.concatenate([window.chunks(i)[0] for i in whole_groups]), d)
    return result


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


def _product_rate(size: int = 2048) -> float:
    """Return the machine's float32 matrix-product rate on all cores, in operations per second."""
    a = np.ones((size, size), np.float32)
    b = np.ones((size, size), np.float32)
    out = np.empty_like(a)
    np.matmul(a, b, out=out)
    return 2 * size**3 / min(_timed(lambda: np.matmul(a, b, out=out)) for _ in range(7))


def _timed(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_a_process(shape: tuple, *, textbook: bool) -> dict:
    command = [sys.executable, __file__, "--shape", *map(str, shape)] + ([] if textbook else ["--no-textbook"])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict) -> str:
    best = min(row["textbook"].values(), default=None)
    name = min(row["textbook"], key=row["textbook"].get, default="")
    cells = [
        row["m"], row["B"] or "all", f"{row['d']:,}", f"{row['seconds']:.2f}", f"{row['diagonal']:.2f}",
        f"{row['rate'] / 1e9:.0f}", f"{row['seconds'] / row['floor']:.2f}",
        f"{best / row['diagonal']:.0f} ({name.replace('_', ' ')})" if best else "",
        f"{row['memory'] / 2**20:.0f}", f"{row['window'] / 2**20:.0f}",
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
            f"{np.__version__}, Python {platform.python_version()}, {platform.system()} on {_processor()}, "
            f"{len(os.sched_getaffinity(0))} cores; its matrix product runs at {rate:.0f} GFLOP/s (median over rows).",
            "",
            "* *step*: seconds, the best of three; *diagonal*: of that, the inverse diagonal alone",
            "* *product*: the rate of a 2048 x 2048 matrix product in the same process, in GFLOP/s",
            "* *floor ratio*: seconds over `2 m^2 d` operations at that rate",
            "* *textbook ratio*: the diagonal by the fastest textbook variant of the paper's recursion over ours",
            "  (`tests/benchmarks/textbook.py`; measured on up to four groups of blocks and scaled to `d`)",
            "* *memory*: peak resident memory of the step beyond the window, in MiB; *window*: the window itself",
            "",
            "| m | B | d | step | diagonal | product | floor ratio | textbook ratio | memory | window |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *map(_line, rows),
            "",
            "The second pass (update) factors each block again: keeping the factors would take up to as much memory as",
            "the window. Small blocks are far from their floor, which counts operations and not the calls of LAPACK.",
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


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
