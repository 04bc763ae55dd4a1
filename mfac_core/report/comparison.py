"""The table and the figure of methods compared over several seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mfac_core.files import write_file
from mfac_core.report.confidence import mean_and_half_width
from mfac_core.report.run import RunRecord
from mfac_core.terminal import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["REFERENCE", "caption", "is_over_seeds", "picture", "table"]

REFERENCE = "magnitude"
"""The method that the others are compared with."""

# Colors of Okabe and Ito, which people with any kind of color vision can tell apart, and a marker for each.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
_Styles = dict[str, tuple[str, str]]
_GRAY = "#6E6E6E"
_CHANCE = 0.1  # the accuracy of guessing one digit of ten


def is_over_seeds(records: Sequence[RunRecord]) -> bool:
    """Return whether there are records and all have a seed, so that methods can be compared over seeds."""
    return bool(records) and all(record.seed is not None for record in records)


def table(records: Sequence[RunRecord]) -> Table:
    """Return means over seeds as a table, one row per sparsity, training after pruning, and method."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    longest = max(record.epochs_after for record in records)
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("Sparsity", "Method"):
        result.add_column(heading)
    for heading in (
        "Epochs\nafter",
        "Accuracy\n(%)",
        f"Minus\n{REFERENCE},\nsame epochs",
        f"Minus\n{REFERENCE},\n{longest} epochs",
        "Time",
    ):
        result.add_column(heading, justify="right")
    result.add_row("dense", "", "", _percent(_dense(records)), "", "", "")
    for sparsity in _sparsities(records):
        rows = [(epochs, method) for epochs in _epochs(records) for method in _methods(records)]
        groups = {row: group for row in rows if (group := _group(records, sparsity, *row))}
        for number, ((epochs, method), group) in enumerate(groups.items()):
            references = [groups.get((each, REFERENCE), []) for each in (epochs, longest)]
            result.add_row(
                "" if number else sparsity,
                Text(plain_text(method)),
                str(epochs or "none"),
                _percent([record.accuracy_after for record in group]),
                *("" if method == REFERENCE else _percent(_differences(group, each), "+.1f") for each in references),
                f"{mean_and_half_width([record.seconds for record in group])[0]:.1f} s",
                end_section=number == len(groups) - 1,
            )
    return result


def caption(records: Sequence[RunRecord]) -> str:
    """Return a sentence about the numbers behind ±, and over which seeds they are taken."""
    seeds = sorted({record.seed for record in records if record.seed is not None})
    if len(seeds) == 1:
        return f"One seed ({seeds[0]}), without an estimate of the spread."
    in_a_row = seeds == list(range(seeds[0], seeds[-1] + 1))
    named = f"{seeds[0]} to {seeds[-1]}" if in_a_row else ", ".join(map(str, seeds))
    return f"Means over {len(seeds)} seeds ({named}) and 95% confidence intervals of the mean (Student's t)."


def picture(records: Sequence[RunRecord], path: str | Path, *, data: str) -> None:
    """Draw the comparison: accuracy at each sparsity, and the unpruned weights of each layer at the highest.

    Args:
        records: The records of all seeds.
        path: The file to write; its suffix selects the format. Its folder is created if missing.
        data: The data that the accuracy is measured on, for the caption.
    """
    # Figure instead of pyplot: no window system, no state shared with the caller's own plots.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    sparsities = _sparsities(records)
    styles = dict(zip(_methods(records), itertools.cycle(_STYLES), strict=False))
    figure = Figure(figsize=(2.8 * len(sparsities) + 3.4, 4.6), dpi=200, layout="constrained")
    *accuracies, unpruned = figure.subplots(1, len(sparsities) + 1, width_ratios=[*[1.0] * len(sparsities), 0.95])
    for axes, sparsity in zip(accuracies, sparsities, strict=True):
        _draw_accuracy(records, sparsity, axes, styles)
        axes.tick_params(labelleft=axes is accuracies[0])
    accuracies[0].set_ylabel("test accuracy", fontsize=9)
    _draw_unpruned(records, sparsities[-1], unpruned, styles)
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=method)
        for method, (color, marker) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=10)
    text = f"{data}. {caption(records)}\nSmall dots: single seeds. Gray: the dense network; on the right, whole layers."
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8, color="#404040", linespacing=1.4)
    write_file(path, lambda file: figure.savefig(file, format=Path(path).suffix.removeprefix(".") or "png"))


def _draw_accuracy(records: Sequence[RunRecord], sparsity: str, axes: Axes, styles: _Styles) -> None:
    dense, half_width = mean_and_half_width(_dense(records))
    axes.axhspan(dense - (half_width or 0), dense + (half_width or 0), color=_GRAY, alpha=0.35, linewidth=0)
    axes.axhline(dense, color=_GRAY, linewidth=1)
    axes.text(-0.5, dense + 0.03, f"dense {100 * dense:.1f}", color=_GRAY, va="bottom", fontsize=8.5)
    epochs = _epochs(records)
    for index, (method, style) in enumerate(styles.items()):
        aside = 0.42 * (index - (len(styles) - 1) / 2)
        for place, each in enumerate(epochs):
            values = [record.accuracy_after for record in _group(records, sparsity, each, method)]
            if values:
                _draw_seeds(place + aside, values, axes, style)
    axes.set_title(f"{sparsity} of the weights pruned", fontsize=10)
    axes.set_xticks(range(len(epochs)), [f"{each} epochs" if each else "none" for each in epochs])
    axes.set_xlabel("training after pruning", fontsize=9)
    axes.set_xlim(-0.55, len(epochs) - 0.45)
    axes.set_ylim(_CHANCE, 1.07)
    axes.set_yticks([_CHANCE, 0.2, 0.4, 0.6, 0.8, 1.0], ["10%\n(chance)", "20%", "40%", "60%", "80%", "100%"])
    _lighten(axes, "y")


def _draw_seeds(place: float, values: Sequence[float], axes: Axes, style: tuple[str, str]) -> None:
    color, marker = style
    mean, half_width = mean_and_half_width(values)
    axes.plot([place + 0.1] * len(values), values, ".", color=color, markersize=5, alpha=0.5, markeredgewidth=0)
    axes.errorbar(place, mean, half_width, color=color, marker=marker, markersize=5.5, capsize=3, linewidth=1.4)
    ends = [*values, mean - (half_width or 0), mean + (half_width or 0)]
    is_low = min(ends) < _CHANCE + 0.1
    at, side = (max(ends) + 0.02, "bottom") if is_low else (min(ends) - 0.02, "top")
    axes.text(place, at, f"{100 * mean:.1f}", color=color, ha="center", va=side, fontsize=8.5)


def _draw_unpruned(records: Sequence[RunRecord], sparsity: str, axes: Axes, styles: _Styles) -> None:
    from matplotlib.ticker import NullFormatter

    sizes = {name: size for record in records for name, size in record.layer_sizes.items()}
    axes.set_title(f"Weights kept at {sparsity}, by layer", fontsize=10)
    axes.barh(range(len(sizes)), list(sizes.values()), height=0.84, color="#ECECEC", zorder=0)
    for row, (name, size) in enumerate(sizes.items()):
        axes.text(size, row - 0.3, f"{size:,} ", ha="right", va="center", fontsize=8, color=_GRAY)
        for index, (method, (color, marker)) in enumerate(styles.items()):
            group = _group(records, sparsity, 0, method)
            counts = [size * (1 - record.layer_sparsity[name]) for record in group if name in record.layer_sparsity]
            if counts:
                at = row + 0.25 * (index - (len(styles) - 1) / 2) + 0.1
                mean, _ = mean_and_half_width(counts)
                axes.plot(counts, [at] * len(counts), ".", color=color, markersize=5, alpha=0.5, markeredgewidth=0)
                axes.plot(mean, at, color=color, marker=marker, markersize=5.5)
                axes.text(max(counts) * 1.25, at, f"{mean:.0f}", color=color, va="center", fontsize=8.5)
    axes.set_yticks(range(len(sizes)), list(sizes))
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.invert_yaxis()
    axes.set_xlabel("number of weights, log scale", fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _lighten(axes, "x")


def _lighten(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="#E4E4E4", linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _sparsities(records: Sequence[RunRecord]) -> list[str]:
    return sorted({_shown(record) for record in records})


def _epochs(records: Sequence[RunRecord]) -> list[int]:
    return sorted({record.epochs_after for record in records})


def _methods(records: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(record.method for record in records))


def _group(records: Sequence[RunRecord], sparsity: str, epochs: int, method: str) -> list[RunRecord]:
    wanted = (sparsity, epochs, method)
    return [record for record in records if (_shown(record), record.epochs_after, record.method) == wanted]


def _shown(record: RunRecord) -> str:
    return f"{record.sparsity:.1%}".replace(".0%", "%")


def _dense(records: Sequence[RunRecord]) -> list[float]:
    return list({record.seed: record.accuracy_before for record in records}.values())


def _differences(group: Sequence[RunRecord], others: Sequence[RunRecord]) -> list[float]:
    theirs = {record.seed: record.accuracy_after for record in others}
    return [record.accuracy_after - theirs[record.seed] for record in group if record.seed in theirs]


def _percent(values: Sequence[float], form: str = ".1f") -> str:
    if not values:
        return ""
    mean, half_width = mean_and_half_width([100 * value for value in values])
    return f"{mean:{form}}" if half_width is None else f"{mean:{form}} ± {half_width:.1f}"
