"""The figures of ``docs/results.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from results_numbers import Results, mean_and_spread
from results_runs import ABLATION_SPARSITY, DEFAULTS_SCOPE, GRADUAL_LIVE, MAGNITUDE, OURS, PAPER, PAPER_ONE_PASS
from results_tasks import TASKS

from mfac_core.files import write_file

__all__ = ["one_shot", "settings", "training"]

# Okabe and Ito's colors, which color-blind readers can tell apart; markers repeat the distinction.
_LOOKS: Mapping[str, dict[str, Any]] = {
    MAGNITUDE: {"color": "#000000", "marker": "s", "linestyle": "--"},
    PAPER_ONE_PASS: {"color": "#E69F00", "marker": "v", "linestyle": ":"},
    PAPER: {"color": "#0072B2", "marker": "D", "linestyle": "-."},
    GRADUAL_LIVE: {"color": "#E69F00", "marker": "v", "linestyle": ":"},
    OURS: {"color": "#D55E00", "marker": "o", "linestyle": "-"},
}
_SECOND = {"color": "#0072B2", "marker": "D", "linestyle": "-."}
_DENSE = "#777777"


def one_shot(results: Results, tasks: Sequence[str], path: Path) -> None:
    """Draw the metric against the remaining weights, one panel per task."""
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.5 * rows + 0.6), layout="constrained", dpi=130)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(panels, tasks, strict=False):
        axes.set_title(TASKS[task].title, fontsize=10)
        _dense_line(axes, results, task)
        for method in (MAGNITUDE, PAPER_ONE_PASS, PAPER, OURS):
            _curve(axes, results, task, method, part="one-shot")
        _kept_axis(axes, results.choices(task, "sparsity", part="one-shot"))
        axes.set_ylabel(TASKS[task].metric.name, fontsize=8)
        if TASKS[task].metric.name.startswith("test accuracy"):
            axes.set_ylim(0, 102)
    _finish(figure, panels[0], path)


def training(results: Results, task: str, path: Path) -> None:
    """Draw accuracy against epochs of fine-tuning, and against remaining weights for gradual runs."""
    sparsities = results.choices(task, "sparsity", part="fine-tuning")
    figure = Figure(figsize=(4.4 * (len(sparsities) + 1), 4.1), layout="constrained", dpi=130)
    panels = figure.subplots(1, len(sparsities) + 1, squeeze=False)[0]
    for axes, sparsity in zip(panels, sparsities, strict=False):
        axes.set_title(f"One-shot at {sparsity:.0%}, then fine-tuning", fontsize=10)
        _dense_line(axes, results, task)
        for method in (MAGNITUDE, PAPER, OURS):
            points = {0: results.of(task, part="one-shot", method=method, sparsity=sparsity)}
            for epochs in results.choices(task, "epochs", part="fine-tuning", method=method, sparsity=sparsity):
                where = {"part": "fine-tuning", "method": method, "sparsity": sparsity, "epochs": epochs}
                points[epochs] = results.of(task, **where)
            _errorbar(axes, list(points), list(points.values()), label=method, **_LOOKS[method])
        ticks = sorted({0, *results.choices(task, "epochs", part="fine-tuning")})
        axes.set_xscale("symlog", linthresh=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{tick}" for tick in ticks])
        axes.set_xlabel("epochs of training after pruning")
        axes.set_ylim(0, 102)
    axes = panels[-1]
    axes.set_title("Gradual, 8 epochs in all (axis cut off)", fontsize=10)
    _dense_line(axes, results, task)
    epochs = min(results.choices(task, "epochs", part="gradual"))
    for method in (MAGNITUDE, GRADUAL_LIVE, OURS):
        _curve(axes, results, task, method, part="gradual", epochs=epochs)
    _kept_axis(axes, results.choices(task, "sparsity", part="gradual"))
    panels[0].set_ylabel(TASKS[task].metric.name, fontsize=9)
    figure.legend(handles=_handles([*panels]), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    _save(figure, path)


def settings(results: Results, task: str, path: Path) -> None:
    """Draw accuracy against each setting, with the others as recommended."""
    figure = Figure(figsize=(13, 7.4), layout="constrained", dpi=130)
    panels = figure.subplots(2, 3).flatten()
    curves = [
        ("gradient samples m", {"gradient samples m": ""}),
        ("passes k", {"passes k, geometric": "geometric", "passes k, linear": "linear"}),
        ("block size B", {"block size B": ""}),
        ("damping", {"damping": "loss as it is", "damping, loss times 1e-4": "loss times 1e-4"}),
    ]
    for axes, (label, parts) in zip(panels, curves, strict=False):
        _dense_line(axes, results, task)
        _over_values(axes, results, task, parts)
        axes.set_xlabel(label)
    gradients = {"gradients": "16 passes: ", "update": "update: "}
    scopes = {"scope, M-FAC": "M-FAC: ", DEFAULTS_SCOPE: "modifier's defaults: ", "scope, magnitude": "magnitude: "}
    for axes, parts in zip(panels[4:], (gradients, scopes), strict=True):
        _dense_line(axes, results, task)
        _points(axes, results, task, parts)
    for axes in panels:
        axes.set_ylim(0, 102)
    for axes in panels[::3]:
        axes.set_ylabel(TASKS[task].metric.name, fontsize=9)
    figure.suptitle(f"{TASKS[task].title}, one-shot at {ABLATION_SPARSITY:.0%}", fontsize=11)
    _save(figure, path)


def _over_values(axes: Axes, results: Results, task: str, parts: Mapping[str, str]) -> None:
    """Draw a curve over the numeric values, and a point for each value that is a word."""
    values = list(dict.fromkeys(value for part in parts for value in results.choices(task, "method", part=part)))
    for index, ((part, name), look) in enumerate(zip(parts.items(), (_LOOKS[OURS], _SECOND), strict=False)):
        measured = {value: results.of(task, part=part, method=value) for value in values}
        for of_words in (False, True):
            places = [place for place, value in enumerate(values) if value.isalpha() is of_words and measured[value]]
            look_here = {**look, "linestyle": "none"} if of_words else {**look, "label": name}
            shifted = [place + 0.06 * index for place in places]
            _errorbar(axes, shifted, [measured[values[place]] for place in places], **look_here)
    axes.set_xticks(range(len(values)), values)
    if any(parts.values()):
        axes.legend(fontsize=8, frameon=False)


def _points(axes: Axes, results: Results, task: str, parts: Mapping[str, str]) -> None:
    points = {
        prefix + method: results.of(task, part=part, method=method)
        for part, prefix in parts.items()
        for method in results.choices(task, "method", part=part)
    }
    places = list(range(len(points)))
    _errorbar(axes, places, list(points.values()), **{**_LOOKS[OURS], "linestyle": "none"})
    axes.set_xticks(places, [_broken(label) for label in points], fontsize=7)
    axes.set_xlim(-0.5, len(points) - 0.5)


def _broken(label: str, width: int = 11) -> str:
    lines = [""]
    for word in label.split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _curve(axes: Axes, results: Results, task: str, method: str, **where: Any) -> None:
    sparsities = results.choices(task, "sparsity", method=method, **where)
    values = [results.of(task, method=method, sparsity=sparsity, **where) for sparsity in sparsities]
    shift = 0.985 ** list(_LOOKS).index(method)  # so that error bars do not overlap
    _errorbar(axes, [100 * (1 - sparsity) * shift for sparsity in sparsities], values, label=method, **_LOOKS[method])


def _errorbar(axes: Axes, places: Sequence[float], values: Sequence[Mapping[int, float]], **look: Any) -> None:
    shown = [(place, *mean_and_spread(each)) for place, each in zip(places, values, strict=True) if each]
    if shown:
        x, means, spreads = zip(*shown, strict=True)
        axes.errorbar(x, means, yerr=spreads, capsize=2.5, markersize=4.5, linewidth=1.3, **look)
    axes.grid(alpha=0.3)


def _dense_line(axes: Axes, results: Results, task: str) -> None:
    mean, _ = mean_and_spread(results.dense(task))
    axes.axhline(mean, color=_DENSE, linewidth=1, linestyle=(0, (1, 2)), label="dense")


def _kept_axis(axes: Axes, sparsities: Sequence[float]) -> None:
    kept = [100 * (1 - sparsity) for sparsity in sparsities]
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(FixedLocator(kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{each:.3g}" for each in kept])
    axes.set_xlabel("kept weights in percent (log)")


def _handles(panels: Sequence[Axes]) -> list[Any]:
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values())


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    figure.legend(handles=_handles([axes]), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    write_file(path, lambda file: figure.savefig(file, format="png"))
