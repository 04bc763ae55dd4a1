"""The text of ``docs/benchmarks.md``, all of it computed from the measurements."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import YOURS_WILL_DIFFER, commit, processor

import mfac_core

__all__ = ["NUMPY", "PARTS", "PUBLIC", "USABLE", "Row", "document", "targets", "tolerance_table"]

GPU_PAGE = Path("docs/benchmarks-gpu.md")
PUBLIC = ("single_block_torch", "batched_torch", "dense_blocks_torch")
"""The textbook variants as the authors and SparseML run them."""

NUMPY = ("single_block_numpy", "batched_numpy")
"""The same recursion in NumPy."""

PARTS = ("gram", "factor", "solve", "check", "float64", "rest")
"""Parts of the diagonal."""

USABLE = 0.1  # a textbook variant with a larger relative error is not accurate
EVERYWHERE, MEAN = 5, 8  # how many times the public implementations: at least, and in the geometric mean
FLOORS = {64: 3.5, 256: 2.0}  # at most so many times the floor, from this number of gradients on
DYNAMIC = "dynamic_torch"
SMALL_BLOCK = 256  # largest block for which the variant with dense inverses runs
SHAPE = ("gradients", "m", "B", "d")
NOTHING = "–"
SMALL, SMALL_RATIO = (1024, 50), 100  # how many times the public implementations at this m and B
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
        parts: Share of each of :data:`PARTS` in the time of the diagonal.
        ratios: Time of each textbook variant over that of our diagonal, by name.
        errors: Largest relative error of each on some blocks.
        memory: Peak bytes beyond the window.
        window: Bytes of the window.
        in_float64: Share of the groups that were computed in float64.
        error: Largest relative error of our diagonal on the same blocks.
        oracle_blocks: How many blocks the errors come from.
    """

    kind: str
    m: int
    width: int | None
    d: int
    seconds: Mapping[str, float]
    rate: float
    floor_ratios: Sequence[float]
    diagonal_floor_ratio: float
    parts: Mapping[str, float]
    ratios: Mapping[str, float]
    errors: Mapping[str, float]
    memory: int
    window: int
    in_float64: float
    error: float
    oracle_blocks: int

    @property
    def name(self) -> str:
        """Short name of the shape."""
        return f"m = {self.m}, B = {self.width or 'all'}, {self.kind}"

    @property
    def is_wide(self) -> bool:
        """Whether blocks are so wide that the targets for wide blocks apply."""
        return self.width is None or self.width >= WIDE

    def fastest(self, names: Sequence[str]) -> str:
        """Return the fastest of some textbook variants."""
        return min((name for name in names if name in self.ratios), key=self.ratios.__getitem__)

    def fastest_accurate(self, names: Sequence[str]) -> str | None:
        """Return the fastest of some textbook variants that are accurate, or ``None`` if none of them is."""
        accurate = [name for name in names if self.errors.get(name, math.inf) <= USABLE]
        return self.fastest(accurate) if accurate else None

    def ratio(self, names: Sequence[str]) -> float:
        """Return the ratio of the fastest accurate variant of some; of the fastest if none is accurate."""
        return self.ratios[self.fastest_accurate(names) or self.fastest(names)]

    def times_floor(self, part: str) -> float:
        """Return the time of a part of the diagonal over the floor."""
        return self.parts[part] * self.diagonal_floor_ratio


def document(
    rows: Sequence[Row],
    scaling: Sequence[Row],
    tolerances: Mapping[tuple[str, int, int], Any],
    failed: Sequence[str] = (),
    *,
    minutes: float,
) -> str:
    """Return the whole page."""
    rate = statistics.median(row.rate for row in rows) / 1e9
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "One pruning step on the CPU: inverse diagonal, saliency, mask, independent update, new weights. float32,",
            "damping 1e-5, half of the weights pruned.",
            "",
            f"Made by `tests/benchmarks/bench_pruning_step.py --write` in {minutes:.0f} minutes with mfac-core "
            f"{mfac_core.__version__}, NumPy {np.__version__}, PyTorch {torch.__version__}, Python "
            f"{platform.python_version()}, {platform.system()} on {processor()}, "
            f"{len(os.sched_getaffinity(0))} cores; its matrix product runs at {rate:.0f} GFLOP/s (median over rows).",
            f"Measured at commit {commit()}.",
            YOURS_WILL_DIFFER,
            "",
            *_failures(failed),
            "Gradients:",
            "",
            "* *realistic*: random, with scales that spread over decades (three between layers of 10,000 weights, "
            "another two within",
            "  each), lognormal sizes of the samples, and a shared mean of half the standard deviation",
            "* *normal*: independent standard normal numbers",
            *_networks(rows),
            "",
            "## Targets",
            "",
            *targets(rows),
            "",
            "## A pruning step",
            "",
            "* *step*: seconds, median of three to nine runs; *diagonal*, *mask*, *update*: these parts of it",
            "* *memory*: peak resident memory of the step beyond the window, in MiB; *window*: the window itself",
            "",
            *_table([*SHAPE, "step", "diagonal", "mask", "update", "memory", "window"], map(_step_cells, rows)),
            "",
            "The second pass (update) needs the factor of each block again. Factors of size `m x m` are kept from",
            "the first pass. They take at most `m / B` of the window, and never more than half of it or a quarter of",
            "the free memory. Factors of size `B x B` (`B <= m`) are computed again: together they would be as large",
            "as all dense inverses.",
            "",
            "## Beside the floor",
            "",
            "The floor is the time of `2 m^2 d` operations at the rate of 2048 x 2048 matrix products, measured",
            "immediately before and after each run. For `B <= m` fewer operations are needed.",
            "",
            "* *product*: that rate, in GFLOP/s",
            "* *step*: time of the step over the floor, median (min to max)",
            "* *diagonal*: the same for the diagonal alone, followed by its parts: *Gram*, the products of the",
            "  gradients with each other; *factor*, the Cholesky factorization; *solve*, the triangular solve",
            "  and the sums (for `B <= m` the triangular inverse); *check*, where rounding is measured and inaccurate",
            "  entries are computed again; *float64*, all that is computed in it; *rest*",
            "* *groups in float64*: share of the groups of blocks for which float32 is not accurate enough",
            "",
            *_table(
                [*SHAPE, "product", "step", "diagonal", *map(_part_name, PARTS), "groups in float64"],
                map(_floor_cells, rows),
            ),
            "",
            "## Beside the paper's recursion",
            "",
            "Shortest time of each algorithm over our shortest time of the diagonal. All of them run in float32 on all",
            "cores, in turn with our steps, on blocks from all over the same window, and are scaled to `d`",
            "(`tests/benchmarks/textbook.py`).",
            "",
            "* *public*: the recursion in PyTorch, as the authors and SparseML compute it: one block after another",
            f"  (single block), several at once (batched), for B <= {SMALL_BLOCK} also by updates of dense inverses",
            "* *NumPy*: the same recursion translated to NumPy, which is faster on some CPUs",
            "* *dynamic*: the paper's dynamic algorithm, which its authors use to precondition gradients, and with",
            "  which no public implementation prunes",
            "* *error*: largest relative error of our diagonal beside dense inverses in float64, on up to four blocks;",
            "  *public error*, *NumPy error*, *dynamic error*: the same for those algorithms",
            "",
            "Of each, the fastest variant whose error is at most 10 %. If one with a larger error is faster, or if no",
            "variant is accurate, the fastest follows in parentheses, with its error.",
            "",
            *_table(
                [*SHAPE, "public", "NumPy", "dynamic", "error", "public error", "NumPy error", "dynamic error"],
                map(_textbook_cells, rows),
            ),
            "",
            *_errors(rows),
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
    wide = [row for row in rows if row.is_wide and row.ratios]
    small = [row for row in rows if (row.m, row.width) == SMALL and row.ratios]
    return [
        *([_wide_target(wide)] if wide else []),
        *_floor_targets([row for row in rows if row.is_wide]),
        *([_small_target(small)] if small else []),
    ]


def _wide_target(wide: Sequence[Row]) -> str:
    public = [row.ratio(PUBLIC) for row in wide]
    mean = _mean(public)
    line = (
        f"* At B >= {WIDE} the diagonal is {_range(public)} times faster than the public implementations, {mean:.1f} "
        f"in the geometric mean. Target: {MEAN} in the mean, which is {'' if mean >= MEAN else 'not '}met, and at "
        f"least {EVERYWHERE} everywhere: "
        + _verdict(wide, lambda row: row.ratio(PUBLIC) >= EVERYWHERE, lambda row: f"{row.ratio(PUBLIC):.1f}")
        + "."
    )
    missed = [row for row in wide if row.ratio(PUBLIC) < EVERYWHERE]
    if missed:
        # the product of both ratios is the time of the variant over the floor
        bounds = [row.ratio(PUBLIC) * row.diagonal_floor_ratio for row in missed]
        line += (
            f" The recursion needs as many operations as the floor: in the rows that miss the target it takes "
            f"{_range(bounds)} times the floor, and a diagonal at the floor would be so many times faster."
        )
    everything = [row.ratio(PUBLIC + NUMPY) for row in wide]
    line += (
        f" Beside the fastest of all textbook variants, those in NumPy included, the diagonal is {_range(everything)} "
        f"times faster, {_mean(everything):.1f} in the geometric mean"
    )
    dynamic = [row.ratios[DYNAMIC] for row in wide if DYNAMIC in row.ratios]
    if dynamic:
        line += (
            f"; beside the dynamic algorithm, which needs matrix products as ours does, {_range(dynamic)} times, "
            f"{_mean(dynamic):.1f} in the mean"
        )
    return line + "."


def _floor_targets(wide: Sequence[Row]) -> list[str]:
    lines = []
    bounds = sorted(FLOORS)
    for least, after in zip(bounds, [*bounds[1:], None], strict=True):
        some = [row for row in wide if least <= row.m and (after is None or row.m < after)]
        if not some:
            continue
        which = f"m >= {least}" if after is None else f"{least} <= m < {after}"
        lines.append(
            f"* At B >= {WIDE} and {which} the diagonal takes {_range([row.diagonal_floor_ratio for row in some])} "
            f"times its floor, the whole step {_range([statistics.median(row.floor_ratios) for row in some])}. Target "
            f"for the diagonal: at most {FLOORS[least]:g}: "
            + _verdict(some, lambda row, most=FLOORS[least]: row.diagonal_floor_ratio <= most, _floor_parts)
            + "."
            + _out_of_reach(some, FLOORS[least])
        )
    return lines


def _out_of_reach(rows: Sequence[Row], most: float) -> str:
    """Return how many rows miss a target by what no estimate of rounding could save."""
    needed = [sum(row.times_floor(part) for part in ("gram", "factor", "solve")) for row in rows]
    missed = [value for value in needed if value > most]
    if not missed:
        return ""
    return (
        f" In {len(missed)} of {len(rows)} rows Gram, factor and solve alone exceed it, with {_range(missed)}: small "
        "products run below the rate of the large ones that define the floor."
    )


def _floor_parts(row: Row) -> str:
    """Return what the diagonal takes, and what the parts take that are not negligible."""
    parts = ", ".join(
        f"{_part_name(part)} {row.times_floor(part):.1f}" for part in PARTS if row.times_floor(part) >= 0.05
    )
    return f"{row.diagonal_floor_ratio:.1f}: {parts}"


def _small_target(small: Sequence[Row]) -> str:
    m, width = SMALL
    line = (
        f"* At m = {m} and B = {width} the diagonal is {_range([row.ratio(PUBLIC) for row in small])} times faster "
        f"than the public implementations. Target: {SMALL_RATIO}: "
        + _verdict(small, lambda row: row.ratio(PUBLIC) >= SMALL_RATIO, lambda row: f"{row.ratio(PUBLIC):.1f}")
        + ". "
    )
    missed = [row for row in small if row.ratio(PUBLIC) < SMALL_RATIO]
    if missed:
        left = [100 * row.ratio(PUBLIC) / SMALL_RATIO for row in missed]
        products = [100 * row.parts["gram"] for row in missed]
        line += (
            f"It leaves {_range(left)} % of our time, and the products that form F alone take {_range(products)} % of "
            "it. "
        )
    return line + "Beside the fastest of all textbook variants: " + "; ".join(map(_beside_all, small)) + "."


def _beside_all(row: Row) -> str:
    """Return the ratio of the fastest of all textbook variants, and that of the fastest accurate one if it differs."""
    names = PUBLIC + NUMPY
    fastest, accurate = row.fastest(names), row.fastest_accurate(names)
    text = f"{row.ratios[fastest]:.1f} times ({row.kind}, {_long_name(fastest)}, error {_error(row.errors[fastest])}"
    if accurate != fastest:
        text += f"; {row.ratios[accurate]:.1f} times {_long_name(accurate)}" if accurate else "; none is accurate"
        text += f", error {_error(row.errors[accurate])}" if accurate else ""
    return text + ")"


def tolerance_section(tolerances: Mapping[tuple[str, int, int], Any]) -> list[str]:
    """Return the explanation and the table of tolerances."""
    return [
        "The diagonal at the tolerances of `inverse_fisher` (1e-5) and of a pruning step (1e-3), by the recursion",
        "in float32 (*textbook*), and a constant one (*magnitude*), beside a computation in float64. B = 2000, five",
        "seeds; half of the weights are pruned: normal ones, or those of the networks.",
        "",
        "* *time*: over that in float64 (median over the seeds); *float64*: share of the groups computed in it (mean)",
        "* *error*: largest relative error of the diagonal over all weights and seeds",
        "* *mask*: entries that differ from the mask of float64: mean over the seeds (most), and the mean as a share",
        "  of `d`. A weight that is pruned in place of another counts twice",
        "",
        *tolerance_table(tolerances),
        "",
        *_mask_sentences(tolerances),
    ]


def tolerance_table(tolerances: Mapping[tuple[str, int, int], Any]) -> list[str]:
    """Return the table of tolerances, one line for each kind of gradients, number of rows and diagonal."""
    return _table(
        ["gradients", "m", "d", "diagonal", "time", "float64", "error", "mask"],
        (
            [kind, f"{m}", f"{d:,}", name, *_tolerance_cells(each, d)]
            for (kind, m, d), results in tolerances.items()
            for name, each in results.items()
        ),
    )


def _tolerance_cells(result: Any, d: int) -> list[str]:
    mean = statistics.mean(result.differences)
    mask = f"{mean:,.1f} ({max(result.differences):,}), {100 * mean / d:.2g} %"
    if not result.errors:
        return [NOTHING, NOTHING, NOTHING, mask]
    time = f"{statistics.median(result.time_ratios):.2f}"
    return [time, _share(statistics.mean(result.in_float64)), _error(max(result.errors)), mask]


def _mask_sentences(tolerances: Mapping[tuple[str, int, int], Any]) -> list[str]:
    def differ(name: str) -> int:
        return sum(sum(each[name].differences) for each in tolerances.values())

    def worst(name: str) -> float:
        return max(max(each[name].differences) / d for (_, _, d), each in tolerances.items())

    entries = sum(d * len(each["1e-3"].differences) for (_, _, d), each in tolerances.items())
    gains = [
        statistics.median(each["1e-5"].time_ratios) / statistics.median(each["1e-3"].time_ratios)
        for each in tolerances.values()
    ]
    return [
        f"Of {entries:,} mask entries in all, {differ('1e-3'):,} differ from float64 at 1e-3, {differ('1e-5'):,} at "
        f"1e-5, {differ('textbook'):,} with the textbook recursion and {differ('magnitude'):,} with magnitude pruning. "
        "The largest change in one run: "
        + ", ".join(f"{100 * worst(name):.2g} % of the mask ({name})" for name in ("1e-3", "textbook", "magnitude"))
        + f". A tolerance of 1e-5 takes {_range(gains)} times as long as 1e-3."
    ]


def _errors(rows: Sequence[Row]) -> list[str]:
    accurate = [row.errors[name] for row in rows if (name := row.fastest_accurate(PUBLIC))]
    theirs = f"; that of the accurate public variants is {_error(max(accurate))}" if accurate else ""
    lines = [
        f"A pruning step asks for a relative error of the diagonal of at most 1e-3. The largest that was measured is "
        f"{_error(max(row.error for row in rows))}{theirs}."
    ]
    slower = [
        f"{row.name} ({row.ratio(names):.1f}, {_long_name(row.fastest_accurate(names) or row.fastest(names))})"
        for row in rows
        for names in (PUBLIC, NUMPY, (DYNAMIC,))
        if set(names) & set(row.ratios) and row.ratio(names) < 1
    ]
    if slower:
        lines.append(f"Faster than our diagonal: {'; '.join(slower)}.")
    return lines


def _failures(failed: Sequence[str]) -> list[str]:
    return [f"Not measured, because they failed: {'; '.join(failed)}.", ""] if failed else []


def _networks(rows: Sequence[Row]) -> list[str]:
    described = {"CNN": "a convolutional network", "MLP": "a fully connected network"}
    kinds = dict.fromkeys(row.kind for row in rows if row.kind in described)
    sizes = {kind: max(row.d for row in rows if row.kind == kind) for kind in kinds}
    return [
        f"* *{kind}*: {described[kind]} of {d:,} weights, trained for three epochs on scikit-learn's digits; one "
        "gradient for each batch of 16 images; where `d` is smaller, the first `d` weights"
        for kind, d in sizes.items()
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
    if len(scaling) < 2:
        return ["Not measured."]
    d = np.array([row.d for row in scaling], float)
    seconds = np.array([row.seconds["step"] for row in scaling])
    slope, offset = np.polyfit(d, seconds, 1)
    fit = 1 - ((seconds - slope * d - offset) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    first = scaling[0]
    return [
        f"{first.name} gradients: a straight line through the seconds has slope {slope * 1e6:.2f} s per million "
        f"weights, offset {offset:.2f} s, R² = {fit:.4f}.",
        "",
        *_table(["d", "step"], ([f"{row.d:,}", f"{row.seconds['step']:.2f}"] for row in scaling)),
    ]


def _shape_cells(row: Row) -> list[str]:
    return [row.kind, f"{row.m}", f"{row.width or 'all'}", f"{row.d:,}"]


def _step_cells(row: Row) -> list[str]:
    seconds = [_seconds(row.seconds[name]) for name in ("step", "diagonal", "mask", "update")]
    return [*_shape_cells(row), *seconds, f"{row.memory / 2**20:.0f}", f"{row.window / 2**20:.0f}"]


def _floor_cells(row: Row) -> list[str]:
    floors = row.floor_ratios
    return [
        *_shape_cells(row),
        f"{row.rate / 1e9:.0f}",
        f"{statistics.median(floors):.1f} ({floors[0]:.1f} to {floors[-1]:.1f})",
        f"{row.diagonal_floor_ratio:.1f}",
        *(f"{row.times_floor(part):.2f}" for part in PARTS),
        _share(row.in_float64),
    ]


def _textbook_cells(row: Row) -> list[str]:
    dynamic = DYNAMIC in row.ratios
    return [
        *_shape_cells(row),
        _ratio_cell(row, PUBLIC),
        _ratio_cell(row, NUMPY),
        f"{row.ratios[DYNAMIC]:.1f}" if dynamic else NOTHING,
        _error(row.error),
        _error_cell(row, PUBLIC),
        _error_cell(row, NUMPY),
        _error(row.errors[DYNAMIC]) if dynamic else NOTHING,
    ]


def _ratio_cell(row: Row, names: Sequence[str]) -> str:
    accurate, fastest = row.fastest_accurate(names), row.fastest(names)
    first = f"{row.ratios[accurate]:.1f} {_variant(accurate)}" if accurate else NOTHING
    if accurate == fastest:
        return first
    return f"{first} ({row.ratios[fastest]:.1f} {_variant(fastest)}, error {_error(row.errors[fastest])})"


def _error_cell(row: Row, names: Sequence[str]) -> str:
    accurate = row.fastest_accurate(names)
    return _error(row.errors[accurate]) if accurate else NOTHING


def _variant(name: str) -> str:
    return name.rpartition("_")[0].replace("_", " ")


def _long_name(name: str) -> str:
    return f"{_variant(name)} in {'PyTorch' if name.endswith('torch') else 'NumPy'}"


def _part_name(part: str) -> str:
    return {"gram": "Gram"}.get(part, part)


def _error(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.0e}" if value <= USABLE else f"{100 * value:.0f} %"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.3f}"


def _mean(values: Sequence[float]) -> float:
    return round(statistics.geometric_mean(values), 1)  # as printed


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are aligned."""
    cells = [list(heads), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in cells]


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
