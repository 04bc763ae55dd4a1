"""The text of ``docs/benchmarks.md``, all of it computed from the measurements."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import YOURS_WILL_DIFFER, commit, processor

import mfac_core

__all__ = ["Row", "document", "targets", "tolerance_table"]

GPU_PAGE = Path("docs/benchmarks-gpu.md")
EVERYWHERE, MEAN = 5, 8  # how many times the best textbook variant: at least, and in the geometric mean
FLOORS = {64: 3.5, 256: 2.0}  # at most so many times the floor, from this number of gradients on
SMALL, SMALL_RATIO = (1024, 50), 100  # how many times the best textbook variant at this m and B
WIDE = 1000  # the targets for wide blocks begin here


@dataclass(frozen=True)
class Row:
    """The measurements of one shape.

    Args:
        kind: Kind of gradients.
        m: Number of gradients.
        width: Block size; ``None`` means one block.
        d: Number of weights.
        seconds: Of the whole step and of its parts, by name.
        rate: Operations per second of the matrix product.
        floor_ratios: Time of the step over its floor in each round, sorted.
        diagonal_floor_ratio: That of the diagonal alone.
        textbook: The fastest variant of the recursion.
        textbook_ratio: Its time over that of our diagonal.
        dynamic_ratio: The same for the dynamic algorithm.
        memory: Peak bytes beyond the window.
        window: Bytes of the window.
        in_float64: Share of the groups that were computed in float64.
        error: Largest relative error of our diagonal on some blocks.
        textbook_error: That of the fastest textbook variant on the same blocks.
        oracle_blocks: How many blocks these are.
    """

    kind: str
    m: int
    width: int | None
    d: int
    seconds: Mapping[str, float]
    rate: float
    floor_ratios: Sequence[float]
    diagonal_floor_ratio: float
    textbook: str | None
    textbook_ratio: float | None
    dynamic_ratio: float | None
    memory: int
    window: int
    in_float64: float
    error: float
    textbook_error: float | None
    oracle_blocks: int

    @property
    def name(self) -> str:
        """Short name of the shape."""
        return f"m = {self.m}, B = {self.width or 'all'}, {self.kind}"

    @property
    def is_wide(self) -> bool:
        """Whether blocks are so wide that the targets for wide blocks apply."""
        return self.width is None or self.width >= WIDE


def document(
    rows: Sequence[Row], scaling: Sequence[Row], tolerances: Mapping[tuple[str, int, int], Any], *, minutes: float
) -> str:
    """Return the whole page."""
    rate = statistics.median(row.rate for row in rows) / 1e9
    networks = {row.kind: row.d for row in rows if row.kind in ("CNN", "MLP")}
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "One pruning step on the CPU: inverse diagonal, saliency, mask, independent update, new weights. float32,",
            "damping 1e-5, half of the weights pruned.",
            "",
            f"Made by `tests/benchmarks/bench_pruning_step.py --write` in {minutes:.0f} minutes with mfac-core "
            f"{mfac_core.__version__}, NumPy {np.__version__}, Python {platform.python_version()}, "
            f"{platform.system()} on {processor()}, {len(os.sched_getaffinity(0))} cores; its matrix product runs at "
            f"{rate:.0f} GFLOP/s (median over rows).",
            f"Measured at commit {commit()}.",
            YOURS_WILL_DIFFER,
            "",
            "Gradients:",
            "",
            "* *realistic*: random, with scales that spread over decades (three between layers of 10,000 weights, "
            "another two within",
            "  each), lognormal sizes of the samples, and a shared mean of half the standard deviation",
            "* *normal*: independent standard normal numbers",
            f"* *CNN*, *MLP*: a convolutional network of {networks['CNN']:,} weights and a fully connected one of "
            f"{networks['MLP']:,},",
            "  trained for three epochs on scikit-learn's digits; one gradient for each batch of 16 images",
            "",
            "## Targets",
            "",
            *targets(rows),
            "",
            "## A pruning step",
            "",
            "* *step*: seconds, median of three to nine runs; *diagonal*, *mask*, *update*: these parts of it",
            "* *product*: rate of 2048 x 2048 matrix products immediately before and after each run, in GFLOP/s",
            "* *floor*: time of the step over that of `2 m^2 d` operations at that rate: median (min to max);",
            "  *of diagonal*: the same for the diagonal alone. For `B <= m` fewer operations are needed",
            "* *textbook*: shortest time of the diagonal by the fastest textbook variant of the paper's recursion,",
            "  over our shortest. The variants compute what the public implementations compute, in float32 on all",
            "  cores, one block after another or several at once, in NumPy and in PyTorch; for small blocks also from",
            "  dense inverses (`tests/benchmarks/textbook.py`). They run in turn with our steps, on blocks from all",
            "  over the same window, and are scaled to `d`. Variants with a relative error above 10 % are left out",
            "* *dynamic*: the same for the paper's dynamic algorithm, which its authors use to precondition gradients,",
            "  and with which no public implementation prunes",
            "* *memory*: peak resident memory of the step beyond the window, in MiB; *window*: the window itself",
            "* *float64*: share of the groups of blocks for which float32 was not accurate enough",
            "* *error*: largest relative error of the diagonal beside dense inverses in float64, on up to four blocks;",
            "  *textbook error*: the same for that textbook variant",
            "",
            "| gradients | m | B | d | step | diagonal | mask | update | product | floor | of diagonal | textbook "
            "| dynamic | memory | window | float64 | error | textbook error |",
            "| --- " * 18 + "|",
            *map(_line, rows),
            "",
            *_errors(rows),
            "",
            "The second pass (update) needs the factor of each block again. Factors of size `m x m` are kept from",
            "the first pass. They take at most `m / B` of the window, and never more than half of it or a quarter of",
            "the free memory. Factors of size `B x B` (`B <= m`) are computed again: together they would be as large",
            "as all dense inverses.",
            "",
            "## What float64 buys",
            "",
            *tolerance_section(tolerances),
            "",
            "## On a GPU",
            "",
            *_gpu(),
            "",
            "## Linear in d",
            "",
            *_linear(scaling),
            "",
        ]
    )


def targets(rows: Sequence[Row]) -> list[str]:
    """Return each target, what was measured, and whether it is met."""
    wide = [row for row in rows if row.is_wide and row.textbook_ratio]
    ratios = [row.textbook_ratio for row in wide]
    mean = round(statistics.geometric_mean(ratios), 1)  # as printed
    lines = [
        f"* At B >= {WIDE} the diagonal is {_range(ratios)} times faster than the best textbook variant, {mean:.1f} "
        f"in the geometric mean. Target: {MEAN} in the mean, which is {'' if mean >= MEAN else 'not '}met, and at "
        f"least {EVERYWHERE} everywhere: "
        + _verdict(wide, lambda row: row.textbook_ratio >= EVERYWHERE, lambda row: f"{row.textbook_ratio:.1f}")
        + "."
    ]
    missed = [row for row in wide if row.textbook_ratio < EVERYWHERE]
    if missed:
        # the product of both ratios is the time of the variant over the floor
        bounds = [row.textbook_ratio * row.diagonal_floor_ratio for row in missed]
        lines[0] += (
            f" The recursion needs as many operations as the floor: in the rows that miss the target it takes "
            f"{_range(bounds)} times the floor, and a diagonal at the floor would be so many times faster."
        )
    bounds = sorted(FLOORS)
    for least, after in zip(bounds, [*bounds[1:], None], strict=True):
        some = [row for row in wide if least <= row.m and (after is None or row.m < after)]
        which = f"m >= {least}" if after is None else f"{least} <= m < {after}"
        lines.append(
            f"* At B >= {WIDE} and {which} the diagonal takes {_range([row.diagonal_floor_ratio for row in some])} "
            f"times its floor, the whole step {_range([statistics.median(row.floor_ratios) for row in some])}. Target "
            f"for the diagonal: at most {FLOORS[least]:g}: "
            + _verdict(
                some,
                lambda row, most=FLOORS[least]: row.diagonal_floor_ratio <= most,
                lambda row: f"{row.diagonal_floor_ratio:.1f}",
            )
            + "."
        )
    small = [row for row in rows if (row.m, row.width) == SMALL and row.textbook_ratio]
    lines.append(
        f"* At m = {SMALL[0]} and B = {SMALL[1]} the diagonal is {_range([row.textbook_ratio for row in small])} times "
        f"faster than the best textbook variant. Target: {SMALL_RATIO}: "
        + _verdict(small, lambda row: row.textbook_ratio >= SMALL_RATIO, lambda row: f"{row.textbook_ratio:.0f}")
        + "."
    )
    dynamic = [row.dynamic_ratio for row in wide if row.dynamic_ratio]
    lines.append(
        f"* Beside the dynamic algorithm, which needs matrix products as ours does, the diagonal is {_range(dynamic)} "
        "times faster at these shapes. There is no target for it."
    )
    return lines


def tolerance_section(tolerances: Mapping[tuple[str, int, int], Any]) -> list[str]:
    """Return the explanation and the table of tolerances."""
    return [
        "The diagonal at the tolerances of `inverse_fisher` (1e-5) and of a pruning step (1e-3), and by the textbook",
        "recursion in float32, beside a computation in float64. B = 2000, five seeds; half of the weights are pruned:",
        "normal ones, or those of the networks.",
        "",
        "* *time*: over that in float64 (median over the seeds); *float64*: share of the groups computed in it (mean)",
        "* *error*: largest relative error of the diagonal over all weights and seeds",
        "* *mask*: entries that differ from the mask of float64, of `d` (most and mean over the seeds)",
        "",
        *tolerance_table(tolerances),
        "",
        *_mask_sentences(tolerances),
    ]


def tolerance_table(tolerances: Mapping[tuple[str, int, int], Any]) -> list[str]:
    """Return the table of tolerances, one line for each kind of gradients, number of rows and tolerance."""
    return [
        "| gradients | m | d | diagonal | time | float64 | error | mask |",
        "| --- " * 8 + "|",
        *(
            f"| {kind} | {m} | {d:,} | {name} | {statistics.median(each.time_ratios):.2f} | "
            f"{_share(statistics.mean(each.in_float64))} | {max(each.errors):.0e} | "
            f"{max(each.differences)} ({statistics.mean(each.differences):.1f}) |"
            for (kind, m, d), results in tolerances.items()
            for name, each in results.items()
            if each.errors
        ),
    ]


def _mask_sentences(tolerances: Mapping[tuple[str, int, int], Any]) -> list[str]:
    def differ(name: str) -> int:
        return sum(sum(each[name].differences) for each in tolerances.values())

    entries = sum(d * len(each["1e-3"].differences) for (_, _, d), each in tolerances.items())
    return [
        f"Of {entries:,} mask entries in all, {differ('1e-3'):,} differ at 1e-3, {differ('1e-5'):,} at 1e-5 and "
        f"{differ('textbook'):,} with the textbook recursion; with magnitude pruning, {differ('magnitude'):,}. "
        + _slowest(tolerances)
    ]


def _slowest(tolerances: Mapping[tuple[str, int, int], Any]) -> str:
    gains = [
        statistics.median(each["1e-5"].time_ratios) / statistics.median(each["1e-3"].time_ratios)
        for each in tolerances.values()
    ]
    return f"A tolerance of 1e-5 takes {_range(gains)} times as long as one of 1e-3."


def _errors(rows: Sequence[Row]) -> list[str]:
    ours = max(row.error for row in rows)
    theirs = max((row.textbook_error for row in rows if row.textbook_error is not None), default=math.nan)
    return [
        f"A pruning step asks for a relative error of the diagonal of at most 1e-3. The largest that was measured is "
        f"{ours:.0e}; that of the fastest textbook variants is {theirs:.0e}."
    ]


def _gpu() -> list[str]:
    if GPU_PAGE.exists():
        return [f"[A page of its own]({GPU_PAGE.name}), made by `make bench-gpu`."]
    return [
        "`make bench-gpu` measures the same step on an NVIDIA GPU, by CuPy and by PyTorch side by side, with the",
        f"window on the device and in pinned host memory, and writes {GPU_PAGE}. It has not been run yet, so",
        "there is no table and no claim.",
    ]


def _linear(scaling: Sequence[Row]) -> list[str]:
    d = np.array([row.d for row in scaling], float)
    seconds = np.array([row.seconds["step"] for row in scaling])
    slope, offset = np.polyfit(d, seconds, 1)
    fit = 1 - ((seconds - slope * d - offset) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    first = scaling[0]
    return [
        f"{first.name} gradients: a straight line through the seconds has slope {slope * 1e6:.2f} s per million "
        f"weights, offset {offset:.2f} s, R² = {fit:.4f}.",
        "",
        "| d | step |",
        "| --- | --- |",
        *(f"| {row.d:,} | {row.seconds['step']:.2f} |" for row in scaling),
    ]


def _line(row: Row) -> str:
    seconds, floors = row.seconds, row.floor_ratios
    cells = [
        row.kind, row.m, row.width or "all", f"{row.d:,}",
        *(f"{seconds[name]:.2f}" for name in ("step", "diagonal", "mask", "update")),
        f"{row.rate / 1e9:.0f}",
        f"{statistics.median(floors):.1f} ({floors[0]:.1f} to {floors[-1]:.1f})", f"{row.diagonal_floor_ratio:.1f}",
        f"{row.textbook_ratio:.1f} ({row.textbook.replace('_', ' ')})" if row.textbook_ratio else "",
        f"{row.dynamic_ratio:.1f}" if row.dynamic_ratio else "",
        f"{row.memory / 2**20:.0f}", f"{row.window / 2**20:.0f}", _share(row.in_float64), f"{row.error:.0e}",
        f"{row.textbook_error:.0e}" if row.textbook_error is not None else "",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _verdict(rows: Sequence[Row], is_met: Callable[[Row], bool], number: Callable[[Row], str]) -> str:
    missed = [f"{row.name} ({number(row)})" for row in rows if not is_met(row)]
    if not missed:
        return f"met in all rows ({len(rows)})"
    return f"not met in {len(missed)} of {len(rows)} rows: {'; '.join(missed)}"
