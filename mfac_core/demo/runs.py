"""The runs of the demo, the same for all frameworks: the methods to compare, from recipe to report."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mfac_core import terminal
from mfac_core.backends import resolve_devices
from mfac_core.errors import RecipeError, SettingError
from mfac_core.recipe import Recipe, load_recipe
from mfac_core.report import comparison
from mfac_core.report import run as report
from mfac_core.settings.pruning import GradualSettings, MagnitudeSettings, MFACSettings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = [
    "BATCH_SIZE",
    "DENSE_EPOCHS",
    "DENSE_LEARNING_RATE",
    "EPOCHS_AFTER",
    "FINE_TUNING",
    "METHODS",
    "MOMENTUM",
    "ONE_SHOT",
    "PRUNING_LEARNING_RATE",
    "SAMPLE_BATCH_SIZE",
    "SEEDS",
    "SPARSITIES",
    "Demo",
    "Pruned",
    "pruned",
    "recipe_path",
    "run",
]

METHODS = ("M-FAC", "magnitude")
ONE_SHOT = "digits_one_shot.yaml"
FINE_TUNING = "digits_fine_tuning.yaml"
SEEDS = 5
SPARSITIES = (0.95, 0.97)
EPOCHS_AFTER = (2, 20)
BATCH_SIZE = 32
SAMPLE_BATCH_SIZE = 8
DENSE_EPOCHS = 12
DENSE_LEARNING_RATE = 0.05
PRUNING_LEARNING_RATE = 0.02
MOMENTUM = 0.9

_COLUMNS_OF_A_TASK = 34
_PICTURE = "report.png"
_WHY_MORE_EPOCHS = (
    f"Read the rows with {EPOCHS_AFTER[-1]} epochs too: training repairs what pruning breaks, so magnitude pruning "
    f"with {EPOCHS_AFTER[-1]} epochs can match M-FAC with {EPOCHS_AFTER[0]}. M-FAC saves that training; its time "
    "includes the cost of the gradient samples."
)
_OTHER_PROCESSOR = "On another processor the numbers differ slightly, and the means agree within their intervals."


@dataclass(frozen=True)
class Pruned:
    """One pruned network of a framework, its record, and name and mask of each pruned weight (True keeps)."""

    record: report.RunRecord
    model: Any
    masks: Mapping[str, Any]


@dataclass(frozen=True)
class Demo:
    """What a framework adds to the demo: a network for digits, its training and its pruning, for one seed.

    Args:
        framework: Name of the framework.
        versions: Name and version of the packages that the network runs on.
        check_params: Refuses ``params`` and ``exclude`` of a recipe that match nothing in the network.
        train_dense: Returns the network that all methods prune, trained without pruning. Its argument is called after
            each epoch with the number of completed epochs.
        train_by_recipe: Trains a copy of a network for the epochs of a recipe that prunes it or keeps its zeros. Takes
            the recipe, the name of the method, the network, and a function to call after each epoch.
        prune_in_one_shot: Prunes a copy of the dense network in one step, without training. Takes the recipe, the name
            of the method, and the dense network.
        num_test_images: How many images the test accuracy is measured on.
        files: Names of the files for a pruned network and for its masks.
        save: Writes a pruned network and its masks to two files, given with their folder.
    """

    framework: str
    versions: Mapping[str, str]
    check_params: Callable[[Sequence[str], Sequence[str]], object]
    train_dense: Callable[[Callable[[int], None]], Any]
    train_by_recipe: Callable[[Recipe, str, Any, Callable[[int], None]], Pruned]
    prune_in_one_shot: Callable[[Recipe, str, Any], Pruned]
    num_test_images: int
    files: tuple[str, str]
    save: Callable[[Pruned, Path, Path], None]


def run(demo: Callable[[int], Demo], *, recipe: Path | None, output: Path, seed: int, seeds: int = SEEDS) -> None:
    """Run the comparison, print its table, and write network, masks, numbers and figure.

    Args:
        demo: Returns the framework's part of the demo for a seed.
        recipe: A recipe of gradual pruning to compare with magnitude pruning on the same schedule; ``None`` compares
            one-shot pruning over several seeds.
        output: Folder for the results; created if missing.
        seed: The first seed of the split, the weights, the order of the batches and the gradient samples.
        seeds: Number of seeds of the one-shot comparison; a recipe runs with one.

    Raises:
        RecipeError: If the recipe is wrong, or prunes nothing.
        SettingError: If a name in ``params`` matches nothing in the network, or ``output`` cannot be written to.
        DeviceError: If a listed device does not exist.
        ModuleNotFoundError: If a package for the figures is missing.
    """
    first = demo(seed)
    gradual = None if recipe is None else _checked(recipe, first)  # refuses a wrong recipe before any training
    import_module("matplotlib")  # fails now if it is missing, not at the end
    _check_output(output, (*first.files, report.RUN_FILE, _PICTURE))
    started = time.perf_counter()
    if gradual is None:
        pruned_by = _run_over_seeds(demo, range(seed, seed + seeds), output)
    else:
        pruned_by = _run_recipe(first, gradual, seed, output)
    network, masks = first.files
    terminal.say(
        f"In {time.perf_counter() - started:.0f} s. Written to {output}: {network} (the network pruned by "
        f"{pruned_by}), {masks}, {report.RUN_FILE}, {_PICTURE}."
    )


def _compare_over_seeds(demo: Callable[[int], Demo], seeds: Sequence[int], console: Console) -> list[Pruned]:
    """For each seed, prune in one shot by both methods, then train the networks with their masks enforced.

    Returns for each seed, sparsity and method the network without training and after each number of epochs.
    """
    one_shot = load_recipe(recipe_path(ONE_SHOT))
    training = {epochs: load_recipe(recipe_path(FINE_TUNING), {"epochs": epochs}) for epochs in EPOCHS_AFTER}
    runs = [(sparsity, method) for sparsity in SPARSITIES for method in METHODS]
    results = []
    with _progress(console) as progress:
        of_dense = _bar(progress, "training the dense networks", len(seeds) * DENSE_EPOCHS)
        of_pruning = _bar(progress, "pruning in one shot", len(seeds) * len(runs))
        of_training = _bar(progress, "training after pruning", len(seeds) * len(runs) * sum(EPOCHS_AFTER))
        for seed in seeds:
            of_seed = demo(seed)
            dense = of_seed.train_dense(of_dense)
            for sparsity, method in runs:
                recipe = _recipe_by(method, _at_sparsity(sparsity, one_shot))
                one = _with(of_seed.prune_in_one_shot(recipe, method, dense), method=method, seed=seed)
                of_pruning(1)
                results.append(one)
                for epochs, recipe in training.items():
                    further = of_seed.train_by_recipe(recipe, method, one.model, of_training)
                    seconds = one.record.seconds + further.record.seconds
                    before = one.record.accuracy_before
                    changes = {"epochs_after": epochs, "seconds": seconds, "accuracy_before": before}
                    results.append(_with(further, method=method, seed=seed, **changes))
    return results


def _compare_gradual(demo: Demo, recipe: Recipe, console: Console) -> list[Pruned]:
    """Train a network, then prune copies of it during further training: by M-FAC, and by magnitude."""
    results = []
    with _progress(console) as progress:
        dense = demo.train_dense(_bar(progress, "training the dense network", DENSE_EPOCHS))
        for method in METHODS:
            advance = _bar(progress, f"{method}: pruning while training", round(recipe.max_epochs))
            results.append(demo.train_by_recipe(_recipe_by(method, recipe), method, dense, advance))
    return results


def pruned(
    method: str,
    model: Any,
    masks: Mapping[str, Any],
    *,
    sparsity: float,
    accuracies: tuple[float, float],
    started: float,
    history: Sequence[tuple[float, float, float]] = (),
) -> Pruned:
    """Return a pruned network with its record.

    Args:
        method: Name of the method and kind of run, such as ``"M-FAC gradual"``.
        model: The network.
        masks: Name and mask of each pruned weight, arrays or tensors on the CPU; True keeps.
        sparsity: Pruned fraction of the weights in scope.
        accuracies: Test accuracy of the dense network, and of the pruned one.
        started: When the run began, by :func:`time.perf_counter`.
        history: ``(epoch, accuracy, sparsity)`` after each epoch.
    """
    record = report.RunRecord(
        method=method,
        sparsity=sparsity,
        accuracy_before=accuracies[0],
        accuracy_after=accuracies[1],
        seconds=time.perf_counter() - started,
        history=history,
        layer_sparsity={name: 1.0 - float(np.asarray(mask).mean()) for name, mask in masks.items()},
        layer_sizes={name: np.asarray(mask).size for name, mask in masks.items()},
    )
    return Pruned(record, model, masks)


def recipe_path(name: str) -> Path:
    """Return the path of one of the project's recipes, in the installed package or in the source tree."""
    installed = Path(__file__).parents[1] / "demo_recipes" / name
    return installed if installed.exists() else Path(__file__).parents[2] / "recipes" / name


def _check_output(output: Path, names: Sequence[str]) -> None:
    """Refuse an output folder that cannot be written to before the results cost any time."""
    cure = "give --output a folder that can be written to, or the path of a new one"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        file = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), output)
        raise SettingError("output", f"{file} is a file, and results need a folder; {cure}") from error
    except OSError as error:
        raise SettingError("output", f"{output} cannot be written to ({error.strerror}); {cure}") from error
    for name in names:
        if (output / name).is_dir():
            raise SettingError("output", f"{output / name} is a folder, but a file must be written there; {cure}")


def _checked(recipe: Path, demo: Demo) -> Recipe:
    gradual = load_recipe(recipe)
    if not any(isinstance(settings, GradualSettings) for settings in gradual.pruning):
        raise RecipeError(
            f"{recipe}: this recipe prunes nothing gradually; add an item such as `- !MFACPruningModifier`"
        )
    for settings in gradual.pruning:
        for of_one_sparsity in settings.by_final_sparsity():
            demo.check_params(of_one_sparsity.params, of_one_sparsity.exclude)
        if isinstance(settings, MFACSettings) and settings.devices != ("auto",):
            resolve_devices(settings.devices)
    return gradual


def _run_recipe(demo: Demo, recipe: Recipe, seed: int, output: Path) -> str:
    console = terminal.console()
    terminal.say(f"Pruning a network for handwritten digits with {recipe.source}, compared with magnitude pruning.")
    results = _compare_gradual(demo, recipe, console)
    records = [result.record for result in results]
    console.print(report.table(records))
    terminal.say(f"This is an example with one seed ({seed}): another seed or another processor gives other numbers.")
    facts = {"framework": demo.framework, "seed": seed, "recipe": recipe.source, **demo.versions}
    _write(demo, results[0], records, output, facts)
    report.picture(records, output / _PICTURE)
    return results[0].record.method


def _run_over_seeds(demo: Callable[[int], Demo], seeds: range, output: Path) -> str:
    console = terminal.console()
    first, recipe = demo(seeds[0]), recipe_path(ONE_SHOT)
    terminal.say(f"Pruning networks for handwritten digits in one shot with {recipe}, compared with magnitude pruning.")
    results = _compare_over_seeds(demo, seeds, console)
    records = [result.record for result in results]
    console.print(comparison.table(records))
    for line in (comparison.caption(records), _WHY_MORE_EPOCHS, _OTHER_PROCESSOR):
        terminal.say(line)
    data = f"scikit-learn's handwritten digits, {first.num_test_images} test images"
    facts = {"framework": first.framework, "data": data, "seeds": list(seeds), "recipe": str(recipe), **first.versions}
    by_mfac = [each for each in results if each.record.method == METHODS[0]]
    saved = next(each for each in by_mfac if each.record.epochs_after == EPOCHS_AFTER[0])
    _write(first, saved, records, output, facts)
    comparison.picture(records, output / _PICTURE, data=f"Test accuracy on {data}")
    return f"M-FAC to {saved.record.sparsity:.0%}, with {EPOCHS_AFTER[0]} epochs of training after, seed {seeds[0]}"


def _write(demo: Demo, saved: Pruned, records: Sequence[report.RunRecord], output: Path, facts: dict[str, Any]) -> None:
    network, masks = demo.files
    demo.save(saved, output / network, output / masks)
    report.write_json(records, output / report.RUN_FILE, **facts)


def _with(result: Pruned, **changes: Any) -> Pruned:
    return dataclasses.replace(result, record=dataclasses.replace(result.record, **changes))


def _at_sparsity(sparsity: float, recipe: Recipe) -> Recipe:
    return dataclasses.replace(
        recipe,
        modifiers=tuple(
            dataclasses.replace(each, final_sparsity=sparsity) if isinstance(each, GradualSettings) else each
            for each in recipe.modifiers
        ),
    )


def _recipe_by(method: str, recipe: Recipe) -> Recipe:
    """Return a recipe for M-FAC as it is, or for magnitude with the same schedule, masks and scope."""
    if method == "M-FAC":
        return recipe
    names = [field.name for field in dataclasses.fields(GradualSettings)]
    return dataclasses.replace(
        recipe,
        modifiers=tuple(
            MagnitudeSettings(**{name: getattr(each, name) for name in names})
            if isinstance(each, MFACSettings)
            else each
            for each in recipe.modifiers
        ),
    )


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(f"{{task.description:<{_COLUMNS_OF_A_TASK}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def _bar(progress: Progress, description: str, total: int) -> Callable[[int], None]:
    task = progress.add_task(description, total=total)
    return lambda epoch: progress.advance(task)
