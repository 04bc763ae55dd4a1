"""Measure the accuracy of magnitude pruning and M-FAC over several seeds, and write ``docs/results.md``.

Run it from the root of the project: ``make results``. Two processes on two cores take about 35 minutes. Results are
stored in ``mfac-results/``, in one folder per state of the code: an interrupted run resumes where it stopped, and a
complete one only writes the page again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import threadpoolctl
import torch
from machine import commit, processor
from results_document import write
from results_runs import Scale, do, runs_of
from results_tasks import TASKS, Bench
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import mfac_core
from mfac_core.files import write_file

__all__ = ["QUICK", "main", "measured"]

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "mfac-results"
QUICK = Scale(
    sparsities=(0.5, 0.7, 0.9, 0.95, 0.97),
    gradual=(0.96,),
    fine_tuned=(0.95, 0.97),
    share_of_rows=1 / 16,
    longest_training=2,
    dense_epochs=1,
)
"""Every run, so small that its numbers are meaningless."""

_SOURCES = ("mfac_core", "adapters/mfac_torch", "recipes")
_OWN = ("results_runs.py", "results_tasks.py")
_COST = ("transformer", "transformer-long", "digits-cnn", "digits-mlp")  # the longest first


class Unit(NamedTuple):
    """The work of one process: a group of runs of one task with one seed."""

    task: str
    group: str
    seed: int
    scale: Scale
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.task}.{self.group}.{self.seed}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the missing measurements, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="number of seeds, starting at 0 (5, or 2 with --quick)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="number of processes, each on one core"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only these tasks")
    parser.add_argument("--quick", action="store_true", help="every run, so small that its numbers are meaningless")
    parser.add_argument("--output", type=Path, help="folder of the page (docs; with --quick that of the results)")
    parser.add_argument("--kept", type=Path, help="folder of the results (one in mfac-results/ per state of the code)")
    parser.add_argument("--write", action="store_true", help="measure nothing: write the page from stored results")
    options = parser.parse_args(arguments)
    folder = options.kept or KEPT / ("quick" if options.quick else "full") / _state_of_the_code()
    seeds = range(options.seeds or (2 if options.quick else 5))
    if not options.write:
        scale = QUICK if options.quick else Scale()
        try:
            failed = measured(options.tasks, seeds, scale, folder, processes=options.processes)
        except KeyboardInterrupt:
            sys.exit(f"interrupted; the same command resumes from {folder}")
        if failed:
            sys.exit("\n".join([*failed, f"all other runs are stored in {folder}; the same command retries these"]))
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not kept:
        sys.exit(f"{folder} has no results; omit --write to measure them first")
    output = options.output or (folder if options.quick else ROOT / "docs")
    for path in write(kept, output):
        print(f"written: {path}")


def measured(tasks: Sequence[str], seeds: Sequence[int], scale: Scale, folder: Path, *, processes: int) -> list[str]:
    """Execute all runs that the folder does not have yet, and return a message for each that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    in_order = sorted(tasks, key=lambda task: _COST.index(task) if task in _COST else len(_COST))
    units = [
        Unit(task, group, seed, scale, folder) for seed in seeds for task in in_order for group in runs_of(task, scale)
    ]
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed: list[str] = []
    with Progress(*columns) as progress:
        bar = progress.add_task(f"measuring, {processes} at once", total=len(units))
        for done, failures in _all(units, processes):
            failed += failures
            progress.update(bar, advance=1, description=f"done: {done.task}, {done.group}, seed {done.seed}")
    return failed


def _all(units: Sequence[Unit], processes: int) -> Iterator[tuple[Unit, list[str]]]:
    if processes == 1:
        with threadpoolctl.threadpool_limits(1):
            yield from map(_measure, units)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with multiprocessing.get_context("spawn").Pool(processes, _one_thread) as pool:
        yield from pool.imap_unordered(_measure, units)


def _one_thread() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process reports it
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)


def _measure(unit: Unit) -> tuple[Unit, list[str]]:
    """Execute the missing runs of a unit, store each result, and return which runs failed and why."""
    torch.set_num_threads(1)
    logging.getLogger("mfac_core").setLevel(
        logging.ERROR
    )  # its warnings (repeated rows, a layer scope) describe what is measured
    logging.getLogger("mfac_torch").setLevel(logging.ERROR)
    kept = json.loads(unit.file.read_text(encoding="utf-8")) if unit.file.exists() else {"runs": {}}
    runs = runs_of(unit.task, unit.scale)[unit.group]
    missing = [run for run in runs if run.key not in kept["runs"]]
    if not missing:
        return unit, []
    bench = Bench(TASKS[unit.task], unit.seed, unit.scale.dense_epochs)
    kept |= {"task": unit.task, "seed": unit.seed, "facts": _facts(bench)}
    done = {run.work: kept["runs"][run.key] for run in runs if run.key in kept["runs"]}
    failed = []
    for run in missing:
        try:
            if run.work not in done:
                done[run.work] = do(run, bench, unit.scale)
        except Exception as error:  # one failure must not end the other runs
            failed.append(f"{unit.task}, seed {unit.seed}, {run.key}: {type(error).__name__}: {error}")
            continue
        kept["runs"][run.key] = done[run.work] | run.names
        write_file(unit.file, json.dumps(kept, indent=1).encode())
    return unit, failed


def _facts(bench: Bench) -> dict[str, Any]:
    return {
        "dense": bench.dense_value,
        "seconds_per_epoch": bench.seconds_per_epoch,
        "weights": bench.weights,
        "train": len(bench.data.train_inputs),
        "test": len(bench.data.test_inputs),
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, one thread of {processor()}",
        "versions": {
            "mfac-core": mfac_core.__version__,
            "torch": torch.__version__.partition("+")[0],
            "NumPy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "Python": platform.python_version(),
        },
    }


def _state_of_the_code() -> str:
    """Return a digest of the code that produces the numbers."""
    files = [path for name in _SOURCES for path in (ROOT / name).rglob("*") if path.suffix in {".py", ".yaml"}]
    digest = hashlib.sha256()
    for path in sorted([*files, *(Path(__file__).parent / name for name in _OWN)]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    main()
