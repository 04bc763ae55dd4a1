"""The ``mfac`` command: run the demo, check a recipe, plan a run, show a finished one."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from mfac_core.terminal import console, say

if TYPE_CHECKING:
    from mfac_core.pruners.rank_costs import RankCosts
    from mfac_core.recipe import Recipe
    from mfac_core.session.plan import ModifierPlan
    from mfac_core.settings.pruning import PruningSettings

__all__ = ["app", "main"]

_STDIN = "-"
_JSON_VERSION = 1
"""Version of the objects that ``--json`` prints: incremented if a key is removed or changes its meaning."""

_MAX_SEED = 2**31 - 1
_HAS_WARNINGS = 1
_HAS_ERRORS = 2
_EXIT_CODES = "Exit codes: 0 success; 1 warnings, with --strict; 2 errors, or wrong arguments."

_Recipe = Annotated[
    Path,
    typer.Argument(
        help="The recipe: YAML, or Markdown with a YAML front matter; - reads it from standard input.",
        allow_dash=True,
        show_default=False,
    ),
]
_Variables = Annotated[
    str, typer.Option(help='Values for its variables: "name=value,other=value", or JSON.', show_default=False)
]
_Skip = Annotated[bool, typer.Option("--skip-unsupported", help="Skip modifiers that are not supported.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_Strict = Annotated[bool, typer.Option("--strict", help="Exit with code 1 if there are warnings.")]

app = typer.Typer(
    help="Second-order (M-FAC) pruning of neural networks.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it writes bold text even where NO_COLOR is set
)


def main() -> None:
    """Run the ``mfac`` command with the arguments of this process."""
    app(prog_name="mfac")


def _show_version(wanted: bool) -> None:
    if wanted:
        from mfac_core import __version__

        say(f"mfac {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Second-order (M-FAC) pruning of neural networks."""


def _frameworks() -> list[str]:
    from importlib.metadata import entry_points

    return sorted(entry_points(group="mfac_core.demos").names)


@app.command(epilog=_EXIT_CODES)
def demo(
    framework: Annotated[str, typer.Option(help="The framework to train with.", autocompletion=_frameworks)] = "torch",
    recipe: Annotated[
        Path | None,
        typer.Option(help="A recipe of gradual pruning to run instead, with one seed.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results; created if missing.")] = Path("mfac-demo"),
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=_MAX_SEED, help="First seed; it sets data order, initial weights and gradient samples."
        ),
    ] = 0,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Number of seeds; a recipe runs with one.", show_default="5; in Keras 3"),
    ] = None,
) -> None:
    """Prune a small network by M-FAC and by magnitude, and compare."""
    from mfac_core import DeviceError, MemoryBudgetError, RecipeError, SettingError

    if recipe is not None and seeds is not None:
        _fail("give either --recipe or --seeds: a recipe runs with one seed, which --seed sets")
    asked = {} if seeds is None else {"seeds": seeds}
    try:
        _demo_runner(framework)(recipe=recipe, output=output, seed=seed, **asked)
    except RecipeError as error:
        _fail(*error.messages)
    except (SettingError, DeviceError, MemoryBudgetError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or output}: {error.strerror or error}; the results cannot be written there")
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is not installed, and the demo needs it: pip install "mfac-core[demo,{framework}]"')


@app.command(epilog=_EXIT_CODES)
def check(
    recipe: _Recipe,
    steps_per_epoch: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps per epoch; gives the exact steps.", show_default=False)
    ] = None,
    variables: _Variables = "",
    skip_unsupported: _Skip = False,
    as_json: _Json = False,
    strict: _Strict = False,
) -> None:
    """Check a recipe: show its pruning steps and warn about its settings."""
    from mfac_core import RecipeError
    from mfac_core.cli_tables import counts_text, schedule_table
    from mfac_core.recipe.linting import lint, notes
    from mfac_core.session.plan import describe

    found: dict[str, Any] = {"recipe": _shown(recipe), "pruning_steps": [], "notes": [], "warnings": []}
    try:
        with _logged(found):
            loaded = _load(recipe, variables, skip_unsupported)
        rows = describe(loaded, steps_per_epoch)
        found["warnings"] += [*lint(loaded, steps_per_epoch), *_missing_devices(loaded.pruning)]
    except RecipeError as error:
        _fail(*error.messages, found=found if as_json else None)
    found["pruning_steps"] = [row._asdict() for row in rows]
    found["notes"] += notes(loaded)
    if as_json:
        _print_json(found)
    else:
        if rows:
            console().print(schedule_table(rows))
        _show(found)
        say(f"{_shown(recipe)}: {counts_text(rows, found['warnings'])}")
    _exit(found, strict)


@app.command(epilog=_EXIT_CODES)
def plan(
    recipe: _Recipe,
    steps_per_epoch: Annotated[int, typer.Option(min=1, help="Optimizer steps per epoch.", show_default=False)],
    weights: Annotated[
        int | None, typer.Option(min=1, help="Number of weights that each modifier prunes.", show_default=False)
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --weights: names and shapes of a model, as JSON or a .safetensors file; - reads JSON from "
            "standard input.",
            allow_dash=True,
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(min=0.0, help="Epochs of training, instead of the end of the recipe's EpochRangeModifier."),
    ] = None,
    sampled: Annotated[bool, typer.Option("--sampled", help="Assume a gradient sampler.")] = False,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes: shows what each keeps and sends.", show_default=False),
    ] = None,
    variables: _Variables = "",
    skip_unsupported: _Skip = False,
    as_json: _Json = False,
    strict: _Strict = False,
) -> None:
    """Show what a recipe will do to a model, and the memory it needs."""
    from mfac_core import RecipeError
    from mfac_core.cli_tables import bytes_text, counts_text, ranks_table, schedule_table, weights_table
    from mfac_core.recipe.naming import named_groups
    from mfac_core.session.plan import plan_model

    found: dict[str, Any] = {
        "recipe": _shown(recipe),
        "modifiers": [],
        "window_bytes": 0,
        "needed_bytes": 0,
        "notes": [],
        "warnings": [],
    }
    reported = found if as_json else None
    if (weights is None) == (shapes is None):
        _fail(
            "give either --weights or --shapes: the number of weights to prune, or a file with the shapes of a model",
            found=reported,
        )
    if str(recipe) == str(shapes) == _STDIN:
        _fail("standard input can be read only once: give a file for the recipe or for --shapes", found=reported)
    try:
        with _logged(found):
            loaded = _load(recipe, variables, skip_unsupported)
        groups = named_groups(loaded.pruning)
        matched = _weights(groups, weights) if shapes is None else _matched(groups, shapes, found)
        model_plan = plan_model(
            loaded.modifiers, matched, steps_per_epoch, epochs=epochs, sampled=sampled, num_ranks=ranks
        )
    except RecipeError as error:
        _fail(*error.messages, found=reported)
    except OSError as error:
        message = f"{shapes}: {error.strerror}; give a JSON file of names and shapes, or a .safetensors file"
        _fail(message, found=reported)
    except ValueError as error:
        _fail(str(error), found=reported)
    found["modifiers"] = [_as_fields(modifier) for modifier in model_plan.modifiers]
    found["window_bytes"] = model_plan.window_bytes
    found["needed_bytes"] = model_plan.needed_bytes
    if ranks is not None:
        found |= {"ranks": ranks, "needed_bytes_of_rank": model_plan.needed_bytes_of_rank}
    found["warnings"] += model_plan.warnings
    if as_json:
        _print_json(found)
    else:
        console().print(weights_table(model_plan))
        if ranks is not None:
            console().print(ranks_table(model_plan, ranks))
        rows = [row for modifier in model_plan.modifiers for row in modifier.steps]
        if rows:
            console().print(schedule_table(rows))
        _show(found)
        memory = f"{bytes_text(model_plan.needed_bytes)} of memory"
        if ranks is not None:
            memory = f"{bytes_text(model_plan.needed_bytes_of_rank)} of memory on each of {ranks} ranks"
        say(f"{_shown(recipe)}: {counts_text(rows, found['warnings'])}, {memory}")
    _exit(found, strict)


@app.command(epilog=_EXIT_CODES)
def report(
    run: Annotated[Path, typer.Argument(help="The folder that the demo wrote, or its JSON file.", show_default=False)],
    as_json: _Json = False,
) -> None:
    """Show the table of a finished run."""
    from dataclasses import asdict

    from mfac_core.report import comparison
    from mfac_core.report.run import RUN_FILE, read_json, table

    path = run / RUN_FILE if run.is_dir() else run
    found: dict[str, Any] = {"run": str(path), "facts": {}, "records": []}
    reported = found if as_json else None
    try:
        records, facts = read_json(path)
    except OSError as error:
        message = f"{path}: {error.strerror}; give the folder that `mfac demo` wrote, or the JSON file in it"
        _fail(message, found=reported)
    except ValueError as error:
        _fail(str(error), found=reported)
    if as_json:
        _print_json(found | {"facts": facts, "records": [asdict(record) for record in records]})
        return
    if comparison.is_over_seeds(records):
        console().print(comparison.table(records))
        say(comparison.caption(records))
    else:
        console().print(table(records))
    for name, value in facts.items():
        say(f"  {name.replace('_', ' ')}: {value}")


def _demo_runner(framework: str) -> Callable[..., Any]:
    from importlib.metadata import entry_points

    demos = entry_points(group="mfac_core.demos")
    if framework not in demos.names:
        found = f"the demos found are: {', '.join(sorted(demos.names))}" if demos else "no demo is installed"
        _fail(f'no demo for {framework!r} ({found}); the one for torch comes with: pip install "mfac-core[demo,torch]"')
    try:
        runner: Callable[..., Any] = demos[framework].load()
    except ValueError as error:  # Keras with an unknown backend
        _fail(f"the demo for {framework} cannot be loaded: {error}")
    return runner


def _load(recipe: Path, variables: str, skip_unsupported: bool) -> Recipe:
    from mfac_core import RecipeError, load_recipe

    unsupported: Literal["error", "skip"] = "skip" if skip_unsupported else "error"
    if str(recipe) != _STDIN:
        return load_recipe(recipe, variables, unsupported)
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"{_shown(recipe)}: this is not UTF-8 text ({error.reason} at byte {error.start}); write it in UTF-8"
        raise RecipeError(message) from error
    return load_recipe(f"{text}\n", variables, unsupported, source=_shown(recipe))


def _shown(recipe: Path) -> str:
    return "<stdin>" if str(recipe) == _STDIN else str(recipe)


@contextmanager
def _logged(found: Mapping[str, list[str]]) -> Iterator[None]:
    """Add log messages to the warnings; to the notes if the user asked for what they report."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found[  # type: ignore[method-assign]
        "notes" if getattr(record, "asked_for", False) else "warnings"
    ].append(record.getMessage())
    logger = logging.getLogger("mfac_core")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _weights(groups: Sequence[tuple[str, PruningSettings]], weights: int | None) -> list[Mapping[str, int]]:
    return [{f"weights of modifier {number}": weights or 0} for number in range(len(groups))]


def _matched(
    groups: Sequence[tuple[str, PruningSettings]], shapes: Path, found: Mapping[str, list[str]]
) -> list[Mapping[str, int]]:
    """Return what each group of weights matches in a file of shapes, with warnings added to those that are found."""
    from mfac_core import RecipeError, SettingError
    from mfac_core.recipe.shapes import match_shapes, parse_shapes, read_shapes

    known = parse_shapes(sys.stdin.buffer.read(), "<stdin>") if str(shapes) == _STDIN else read_shapes(shapes)
    matched: list[Mapping[str, int]] = []
    wrong: list[str] = []
    for name, group in groups:
        try:
            selected, warnings = match_shapes(group.params, group.exclude, known)
        except SettingError as error:
            wrong += [f"{name}: {message}" for message in str(error).splitlines()]
        else:
            matched.append(selected)
            found["warnings"].extend(f"{name}: {warning}" for warning in warnings)
    if wrong:
        raise RecipeError(*wrong)
    return matched


def _missing_devices(pruning: Sequence[PruningSettings]) -> list[str]:
    from mfac_core.backends import load_backends, resolve_device
    from mfac_core.errors import DeviceError
    from mfac_core.settings.pruning import MFACSettings

    by_mfac = [each for each in pruning if isinstance(each, MFACSettings)]
    names = [name for each in by_mfac for name in (*each.devices, each.gradients_device) if name != "auto"]
    checks: list[Callable[[], object]] = [partial(resolve_device, name) for name in dict.fromkeys(names)]
    if set(names) - {"cpu"}:
        # which framework will run the recipe is not known: a device of any library will do
        checks.insert(0, load_backends)
    warnings = []
    for check in checks:
        try:
            check()
        except DeviceError as error:
            warnings.append(f"on this machine: {error}")
    return list(dict.fromkeys(warnings))


def _as_fields(modifier: ModifierPlan) -> dict[str, Any]:
    rows, columns = modifier.window
    return {
        "modifier": modifier.modifier,
        "weights": modifier.num_weights,
        "parameters": dict(modifier.weights),
        "window": {"rows": rows, "columns": columns, "bytes": modifier.window_bytes},
        "needed_bytes": modifier.needed_bytes,
        "of_rank": _of_rank(modifier.of_rank),
        "pruning_steps": [row._asdict() for row in modifier.steps],
    }


def _of_rank(costs: RankCosts | None) -> dict[str, Any] | None:
    if costs is None:
        return None
    return {**costs._asdict(), "replicated": costs.replicated._asdict(), "sharded": costs.sharded._asdict()}


def _print_json(found: Mapping[str, Any], errors: Sequence[str] = ()) -> None:
    print(json.dumps({"version": _JSON_VERSION, **found, "errors": list(errors)}, indent=2, allow_nan=False))


def _show(found: Mapping[str, Sequence[str]]) -> None:
    for note in found["notes"]:
        say(note, kind="note")
    for warning in found["warnings"]:
        say(warning, kind="warning", style="yellow")


def _exit(found: Mapping[str, Sequence[str]], strict: bool) -> None:
    if strict and found["warnings"]:
        raise typer.Exit(_HAS_WARNINGS)


def _fail(*messages: str, found: Mapping[str, Any] | None = None) -> NoReturn:
    # With `found`, it is printed as JSON together with the errors.
    for message in messages:
        say(message, kind="error", style="red", stderr=True)
    if found is not None:
        _print_json(found, messages)
    raise typer.Exit(_HAS_ERRORS)
