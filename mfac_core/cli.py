"""The ``mfac`` command: run the demo, check a recipe, show a finished run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from mfac_core.recipe import Recipe
    from mfac_core.recipe.linting import ScheduleRow

__all__ = ["app", "main"]

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
    recipe: Annotated[
        Path, typer.Argument(help="The recipe: YAML, or Markdown with a YAML front matter.", show_default=False)
    ],
    steps_per_epoch: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps per epoch; gives the exact steps.", show_default=False)
    ] = None,
) -> None:
    """Read a recipe, and show its pruning steps and what looks wrong with it."""
    from rich.console import Console

    from mfac_core import RecipeError, load_recipe
    from mfac_core.recipe.linting import describe, lint

    try:
        loaded = load_recipe(recipe)
        rows = describe(loaded, steps_per_epoch)
        warnings = [*lint(loaded, steps_per_epoch), *_missing_devices(loaded)]
    except RecipeError as error:
        _fail(str(error))
    if rows:
        Console().print(_schedule_table(rows))
    for warning in warnings:
        typer.secho(f"warning: {warning}", fg=typer.colors.YELLOW)
    typer.echo(f"{recipe}: {_count(len(rows), 'pruning step')}, {_count(len(warnings), 'warning')}")


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


def _missing_devices(recipe: Recipe) -> list[str]:
    from mfac_core.backends import resolve_device
    from mfac_core.errors import DeviceError
    from mfac_core.settings import MFACSettings

    by_mfac = [each for each in recipe.pruning if isinstance(each, MFACSettings)]
    listed = [name for each in by_mfac for name in (*each.devices, each.gradients_device)]
    warnings = []
    for name in dict.fromkeys(name for name in listed if name != "auto"):
        try:
            resolve_device(name)
        except DeviceError as error:
            warnings.append(f"on this machine: {error}")
    return warnings


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
            f"{row.sparsity:.2%}",
            "-" if row.num_gradients is None else str(row.num_gradients),
        )
    return result


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fail(message: str) -> NoReturn:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)
