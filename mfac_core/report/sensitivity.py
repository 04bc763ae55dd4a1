"""The table and figure of the loss increase of each layer at each sparsity."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mfac_core.files import write_file
from mfac_core.terminal import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from rich.table import Table

__all__ = ["draw_increases", "increases_table", "printed"]

Increases = Mapping[str, Sequence[float]]
"""Name of each layer and the increase of the loss at each sparsity."""

_TITLE = "Increase of the loss when one layer alone is pruned; dense: {dense_loss:.4g}"
_IN_SAMPLE = "Predicted is in-sample: by the gradient samples that chose the update."

_COLORS = "cividis"
"""Readable with red-green color blindness."""

_DECADES = 4
"""Powers of ten below the largest increase that the color scale covers."""

_CELL = (0.62, 0.3)
"""Width and height of a number in the figure, in inches."""

_MAX_PIXELS = 60_000
"""The maximum height of a figure in pixels: Matplotlib draws up to 65,535."""

_MAX_NAME_LENGTH = 48
"""The maximum number of characters of a layer's name in the figure."""


def increases_table(
    dense_loss: float,
    sparsities: Sequence[float],
    measured: Increases,
    predicted: Increases,
    num_weights: Mapping[str, int],
) -> Table:
    """Return increases as a table, one row per layer, with the predicted ones below the measured ones."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
        title=_TITLE.format(dense_loss=dense_loss),
        title_justify="left",
        title_style="",
        caption=_IN_SAMPLE,
        caption_justify="left",
        caption_style="dim",
    )
    table.add_column("Layer", overflow="fold")
    for heading in ("Weights", *(f"{sparsity:.4g}%" for sparsity in np.multiply(sparsities, 100))):
        table.add_column(heading, justify="right", overflow="fold")  # folded instead of truncated in a narrow terminal
    for name, increases in measured.items():
        table.add_row(Text(plain_text(name)), _size(num_weights[name]), *map(_short, increases))
        table.add_row("  predicted", "", *map(_short, predicted[name]), style="dim")
    return table


def printed(table: Table) -> str:
    """Return a table as plain text, its lines as wide as necessary and without trailing spaces."""
    from rich.console import Console

    title, caption = table.title, table.caption
    table.title = table.caption = None  # rich would wrap both at the width of the table
    file = io.StringIO()
    Console(file=file, width=1_000_000, color_system=None, force_terminal=False, force_jupyter=False).print(table)
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return "\n".join([str(title), "", *lines, "", str(caption)])


def draw_increases(
    path: str | Path,
    dense_loss: float,
    sparsities: Sequence[float],
    measured: Increases,
    predicted: Increases,
    num_weights: Mapping[str, int],
) -> None:
    """Draw increases as numbers on colors: one row per layer, one column per sparsity, measured next to predicted.

    The suffix of ``path`` selects the format; its folder is created if missing.
    """
    # Figure instead of pyplot: no window system, no state shared with the caller's own plots.
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rows, columns = len(measured), len(sparsities)
    size = (2 * _CELL[0] * columns + 5.0, max(_CELL[1] * rows + 2.0, 3.3))
    figure = Figure(figsize=size, layout="constrained", dpi=min(150, _MAX_PIXELS / size[1]))
    left, right = figure.subplots(1, 2, sharey=True)
    values = [_matrix(increases) for increases in (measured, predicted)]
    norm = _norm(np.concatenate(values))
    _draw(left, values[0], sparsities, norm, "measured")
    _draw(right, values[1], sparsities, norm, "predicted (in-sample)")
    left.set_yticks(range(rows), [f"{_shortened(name)}  ({num_weights[name]:,})" for name in measured])
    left.set_ylabel("layer (number of weights)")
    figure.suptitle(_TITLE.format(dense_loss=dense_loss))
    scale = figure.colorbar(
        ScalarMappable(norm, _COLORS), ax=[left, right], extend="both", aspect=max(8, rows), fraction=0.05, pad=0.02
    )
    scale.set_label("increase of the loss (log scale)")
    write_file(path, lambda file: figure.savefig(file, format=Path(path).suffix.removeprefix(".") or "png"))


def _matrix(increases: Increases) -> npt.NDArray[np.float64]:
    return np.array([list(row) for row in increases.values()], dtype=np.float64)


def _norm(values: npt.NDArray[np.float64]) -> LogNorm:
    from matplotlib.colors import LogNorm

    seen = values[np.isfinite(values) & (values > 0)]
    highest = float(seen.max()) if seen.size else 1.0
    lowest = max(float(seen.min()) if seen.size else 0.0, highest * 10.0**-_DECADES)
    return LogNorm(min(lowest, highest / 10), highest)


def _draw(axes: Axes, values: npt.NDArray[np.float64], sparsities: Sequence[float], norm: LogNorm, title: str) -> None:
    lowest, highest = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    shown = np.clip(values, lowest, highest)  # decreases have no logarithm
    axes.imshow(shown, cmap=_COLORS, norm=norm, aspect="auto")
    axes.set_title(title)
    axes.set_xlabel("sparsity of the layer")
    axes.set_xticks(range(len(sparsities)), [f"{sparsity:.4g}%" for sparsity in np.multiply(sparsities, 100)])
    axes.tick_params(length=0)
    for (row, column), value in np.ndenumerate(values):
        color = "white" if norm(shown[row, column]) < 0.5 else "black"
        axes.text(column, row, _short(value), ha="center", va="center", fontsize=8, color=color)


def _short(increase: float) -> str:
    """Return a number with two digits in as few characters as possible, so that many fit side by side."""
    if abs(increase) >= 0.001 or not increase:
        return f"{increase:.2g}"
    digits, exponent = f"{increase:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _size(number: int) -> str:
    power = max(0, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.3g}{('', 'k', 'M', 'G', 'T')[power]}"


def _shortened(name: str) -> str:
    text = plain_text(name).replace("$", r"\$")
    return text if len(text) <= _MAX_NAME_LENGTH else f"…{text[1 - _MAX_NAME_LENGTH :]}"
