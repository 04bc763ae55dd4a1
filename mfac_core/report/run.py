"""The numbers of a finished run: the JSON file, the table and the figure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mfac_core.files import write_file
from mfac_core.terminal import plain_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["RUN_FILE", "RunRecord", "picture", "read_json", "table", "write_json"]

RUN_FILE = "run.json"
"""Name of the JSON file in the folder of a run."""

_VERSION = 2
"""Of the JSON file. Version 1 had no key ``version``, and its records had one seed for all."""


@dataclass(frozen=True)
class RunRecord:
    """The results of one method on one network.

    Args:
        method: Name of the method, such as ``"M-FAC"`` or ``"magnitude gradual"``.
        sparsity: Pruned fraction of the weights in scope, in ``[0, 1]``.
        accuracy_before: Test accuracy of the dense network, in ``[0, 1]``.
        accuracy_after: Test accuracy of the pruned network, in ``[0, 1]``.
        seconds: Wall-clock time of pruning and of the training in this run.
        history: ``(epoch, accuracy, sparsity)`` after each epoch of training; empty without training.
        layer_sparsity: Pruned fraction of each layer, by name.
        layer_sizes: Number of weights of each layer, by name.
        seed: Seed of this run, if methods are compared over several seeds.
        epochs_after: Epochs of training after one-shot pruning, with the masks enforced.
    """

    method: str
    sparsity: float
    accuracy_before: float
    accuracy_after: float
    seconds: float
    history: Sequence[tuple[float, float, float]] = ()
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    layer_sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int | None = None
    epochs_after: int = 0


def write_json(records: Sequence[RunRecord], path: str | Path, **facts: Any) -> None:
    """Write a run to a JSON file that :func:`read_json` and ``mfac report`` read.

    Args:
        records: One record per method, and per seed if there are several, in the order to show them.
        path: The file to write; its folder is created if missing.
        **facts: Facts about the whole run, such as ``seed=0``: JSON values.
    """
    run = {"version": _VERSION, "facts": facts, "records": [dataclasses.asdict(record) for record in records]}
    write_file(path, (json.dumps(run, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> tuple[list[RunRecord], dict[str, Any]]:
    """Read the records and the facts of a run that :func:`write_json` wrote, in this version or an earlier one.

    Raises:
        ValueError: If the file does not contain a run.
    """
    cure = "give the JSON file that `mfac demo` or mfac_core.report.run.write_json wrote"
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deeply
        raise ValueError(f"{path} is not JSON ({error}); {cure}") from error
    version = run.get("version") if isinstance(run, dict) else None
    if isinstance(version, int) and version > _VERSION:
        raise ValueError(f"{path} has version {version}, and this mfac-core reads up to {_VERSION}; update mfac-core")
    try:
        return [_record(entry) for entry in run["records"]], dict(run["facts"])
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is JSON but does not contain a run ({error!r}); {cure}") from error


def table(records: Sequence[RunRecord]) -> Table:
    """Return the records as a table, one row per method."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("Method")
    for heading in ("Sparsity", "Accuracy\nbefore", "Accuracy\nafter", "Change\n(points)", "Time"):
        result.add_column(heading, justify="right")
    for record in records:
        result.add_row(
            Text(plain_text(record.method)),
            f"{record.sparsity:.2%}",
            f"{record.accuracy_before:.2%}",
            f"{record.accuracy_after:.2%}",
            f"{100 * (record.accuracy_after - record.accuracy_before):+.2f}",
            f"{record.seconds:.1f} s",
        )
    return result


def picture(records: Sequence[RunRecord], path: str | Path) -> None:
    """Draw the run: accuracy and sparsity over epochs on the left, sparsity per layer on the right.

    Args:
        records: The records; those with a ``history`` appear on the left, those with a ``layer_sparsity`` on the right.
        path: The file to write; its suffix selects the format. Its folder is created if missing.
    """
    # Figure instead of pyplot: no window system, no state shared with the caller's own plots.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 5), layout="constrained", dpi=150)
    over_epochs, per_layer = figure.subplots(1, 2, width_ratios=[1, 1.15])
    colors = {record.method: f"C{index}" for index, record in enumerate(records)}
    _draw_history([record for record in records if record.history], over_epochs, colors)
    _draw_layers([record for record in records if record.layer_sparsity], per_layer, colors)
    handles: list[Artist] = [Patch(color=color, label=method) for method, color in colors.items()]
    if any(record.history for record in records):
        handles.append(Line2D([], [], color="gray", linestyle="--", linewidth=1, label="sparsity"))
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False)
    write_file(path, lambda file: figure.savefig(file, format=Path(path).suffix.removeprefix(".") or "png"))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it contains {name}, which is not a number")


def _record(entry: Mapping[str, Any]) -> RunRecord:
    numbers = {name: float(entry[name]) for name in ("sparsity", "accuracy_before", "accuracy_after", "seconds")}
    history = tuple((float(epoch), float(accuracy), float(sparsity)) for epoch, accuracy, sparsity in entry["history"])
    layer_sparsity = {str(name): float(sparsity) for name, sparsity in entry["layer_sparsity"].items()}
    added = {
        "layer_sizes": {str(name): int(size) for name, size in entry.get("layer_sizes", {}).items()},
        "seed": None if entry.get("seed") is None else int(entry["seed"]),
        "epochs_after": int(entry.get("epochs_after", 0)),
    }
    return RunRecord(**{**entry, **numbers, "history": history, "layer_sparsity": layer_sparsity, **added})


def _draw_history(records: Sequence[RunRecord], axes: Axes, colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title("Gradual pruning")
    axes.set_xlabel("epoch")
    axes.set_ylabel("test accuracy (dotted: dense)")
    axes.grid(alpha=0.3)
    if not records:
        _write_note(axes, "no gradual run")
        return
    curves: dict[tuple[tuple[float, ...], ...], str] = {}
    for record in records:
        epochs, accuracies, sparsities = zip(*record.history, strict=True)
        axes.plot(epochs, accuracies, color=colors[record.method], marker="o", markersize=3)
        axes.axhline(record.accuracy_before, color="gray", linestyle=":", linewidth=1)
        # Methods on the same schedule share a curve, drawn in gray.
        curves[epochs, sparsities] = "gray" if (epochs, sparsities) in curves else colors[record.method]
    for (epochs, sparsities), color in curves.items():
        axes.plot(epochs, sparsities, color=color, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:.0%}")


def _draw_layers(records: Sequence[RunRecord], axes: Axes, colors: Mapping[str, str]) -> None:
    axes.set_title("Sparsity per layer")
    axes.set_ylabel("sparsity")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if not records:
        _write_note(axes, "no sparsity per layer was recorded")
        return
    layers = list(dict.fromkeys(name for record in records for name in record.layer_sparsity))
    width = 0.8 / len(records)
    for index, record in enumerate(records):
        left = (index - (len(records) - 1) / 2) * width
        places = [layers.index(name) + left for name in record.layer_sparsity]
        axes.bar(places, list(record.layer_sparsity.values()), width, color=colors[record.method])
    axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")


def _write_note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="gray")
