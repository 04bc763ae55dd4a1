"""The ``mfac`` command: run the demo, check a recipe, plan a run, show a finished one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from mfac_core.recipe.linting import Plan, ScheduleRow
    from mfac_core.settings import PruningSettings

__all__ = ["app", "main"]

_Recipe = Annotated[
    Path, typer.Argument(help="The recipe: YAML, or Markdown with a YAML front matter.", show_default=False)
]
_Variables = Annotated[
    str, typer.Option(help='Values for its variables: "name=value,other=value", or JSON.', show_default=False)
]
_Skip = Annotated[bool, typer.Option("--skip-unsupported", help="Leave out modifiers that are out of scope.")]

app = typer.Typer(
    help="Second-order (M-FAC) pruning of neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the ``mfac`` command with the arguments of this process."""
    app(prog_name="mfac")


def _show_version(wanted: bool) -> None:
    if wanted:
        from mfac_core import __version__

        typer.echo(f"mfac {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and stop.")
    ] = False,
) -> None:
    """Second-order (M-FAC) pruning of neural networks."""


@app.command()
def demo(
    framework: Annotated[str, typer.Option(help="The framework to train with.")] = "torch",
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of the gradual run; without it, the demo's own.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results; made if missing.")] = Path("mfac-demo"),
    seed: Annotated[int, typer.Option(help="Seed of data order, weights and gradient samples.")] = 0,
) -> None:
    """Prune a small network by M-FAC and by magnitude, and compare."""
    from mfac_core import DeviceError, MemoryBudgetError, RecipeError, SettingError

    try:
        _demo_runner(framework)(recipe=recipe, output=output, seed=seed)
    except (RecipeError, SettingError, DeviceError, MemoryBudgetError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is not installed, and the demo needs it: pip install "mfac-core[demo,{framework}]"')


@app.command()
def check(
    recipe: _Recipe,
    steps_per_epoch: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps per epoch; gives the exact steps.", show_default=False)
    ] = None,
    variables: _Variables = "",
    skip_unsupported: _Skip = False,
) -> None:
    """Read a recipe, and show its pruning steps and what looks wrong with it."""
    from rich.console import Console

    from mfac_core import RecipeError, load_recipe
    from mfac_core.recipe.linting import describe, lint, notes

    try:
        loaded = load_recipe(recipe, variables, "skip" if skip_unsupported else "error")
        rows = describe(loaded, steps_per_epoch)
        warnings = [*lint(loaded, steps_per_epoch), *_missing_devices(loaded.pruning)]
    except RecipeError as error:
        _fail(str(error))
    if rows:
        Console().print(_schedule_table(rows))
    for note in notes(loaded):
        typer.echo(f"note: {note}")
    _show_warnings(warnings)
    typer.echo(f"{recipe}: {_count(len(rows), 'pruning step')}, {_count(len(warnings), 'warning')}")


@app.command()
def plan(
    recipe: _Recipe,
    steps_per_epoch: Annotated[int, typer.Option(min=1, help="Optimizer steps per epoch.", show_default=False)],
    weights: Annotated[
        int | None, typer.Option(min=1, help="Weights that each modifier prunes.", show_default=False)
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(help="The model instead: JSON of names and shapes, or a .safetensors file.", show_default=False),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(min=0.0, help="Epochs of training, instead of the end of the recipe's EpochRangeModifier."),
    ] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="There is a gradient sampler.")] = False,
    variables: _Variables = "",
    skip_unsupported: _Skip = False,
) -> None:
    """Show what a recipe will do to a model: which weights, when, and how much memory that takes."""
    from rich.console import Console

    from mfac_core import RecipeError, load_recipe
    from mfac_core.recipe.linting import lint_model

    if (weights is None) == (shapes is None):
        _fail("give either --weights or --shapes: how many weights are pruned, or a file that says what the model has")
    try:
        loaded = load_recipe(recipe, variables, "skip" if skip_unsupported else "error")
        parts = [part for settings in loaded.pruning for part in settings.by_final_sparsity()]
        matched = _matched(parts, weights, shapes)
        planned = lint_model(loaded.modifiers, matched, steps_per_epoch, epochs=epochs, sampled=sampled)
    except RecipeError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{shapes}: {error.strerror}; give a JSON file of names and shapes, or a .safetensors file")
    except ValueError as error:
        _fail(str(error))
    console = Console()
    console.print(_weights_table(planned))
    rows = [row for modifier in planned.modifiers for row in modifier.steps]
    if rows:
        console.print(_schedule_table(rows))
    _show_warnings(planned.warnings)
    typer.echo(
        f"{recipe}: {_count(len(rows), 'pruning step')}, {_count(len(planned.warnings), 'warning')}, "
        f"{_bytes(planned.window_bytes)} for gradient windows"
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder that the demo wrote, or its JSON file.", show_default=False)],
) -> None:
    """Show the table of a finished run."""
    from rich.console import Console

    from mfac_core.report import RUN_FILE, read_json, table

    path = run / RUN_FILE if run.is_dir() else run
    try:
        records, facts = read_json(path)
    except OSError as error:
        _fail(f"{path}: {error.strerror}; give the folder that `mfac demo` wrote, or the JSON file in it")
    except ValueError as error:
        _fail(str(error))
    Console().print(table(records))
    for name, value in facts.items():
        typer.echo(f"  {name.replace('_', ' ')}: {value}")


def _demo_runner(framework: str) -> Callable[..., Any]:
    from importlib.metadata import entry_points

    demos = entry_points(group="mfac_core.demos")
    if framework not in demos.names:
        found = f"the demos found are: {', '.join(sorted(demos.names))}" if demos else "no demo is installed"
        _fail(f'no demo for {framework!r} ({found}); the one for torch comes with: pip install "mfac-core[demo,torch]"')
    runner: Callable[..., Any] = demos[framework].load()
    return runner


def _matched(parts: Sequence[PruningSettings], weights: int | None, shapes: Path | None) -> list[Mapping[str, int]]:
    """Return the parameters that each group of weights of a recipe matches."""
    from mfac_core.recipe.shapes import matching, read_shapes

    if shapes is None:
        return [{f"weights of modifier {number}": weights or 0} for number in range(len(parts))]
    found = read_shapes(shapes)
    return [matching(part.params, found) for part in parts]


def _missing_devices(pruning: Sequence[PruningSettings]) -> list[str]:
    from mfac_core.backends import resolve_device
    from mfac_core.errors import DeviceError
    from mfac_core.settings import MFACSettings

    by_mfac = [each for each in pruning if isinstance(each, MFACSettings)]
    listed = [name for each in by_mfac for name in (*each.devices, each.gradients_device)]
    warnings = []
    for name in dict.fromkeys(name for name in listed if name != "auto"):
        try:
            resolve_device(name)
        except DeviceError as error:
            warnings.append(f"on this machine: {error}")
    return warnings


def _weights_table(planned: Plan) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("Modifier")
    for heading in ("Parameters", "Weights", "Largest window", "Memory"):
        result.add_column(heading, justify="right")
    for modifier in planned.modifiers:
        rows, columns = modifier.window
        result.add_row(
            Text(modifier.modifier),
            f"{len(modifier.weights):,}",
            f"{modifier.num_weights:,}",
            f"{rows:,} x {columns:,}" if rows else "-",
            _bytes(modifier.window_bytes) if rows else "-",
        )
    return result


def _schedule_table(rows: Sequence[ScheduleRow]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("Modifier")
    for heading in ("Epoch", "Step", "Sparsity", "Gradients"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            Text(str(row.modifier)),
            f"{row.epoch:g}",
            "-" if row.step is None else str(row.step),
            "-" if row.sparsity is None else f"{row.sparsity:.2%}",
            "-" if row.num_gradients is None else str(row.num_gradients),
        )
    return result


def _show_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        typer.secho(f"warning: {warning}", fg=typer.colors.YELLOW)


def _bytes(number: int) -> str:
    size, units = float(number), iter(("kB", "MB", "GB", "TB", "PB"))
    unit = "B"
    while size >= 1000 and (larger := next(units, None)):
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)
