"""The main job, end to end: train a network on real data, prune it by M-FAC and by magnitude, compare."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from mfac_core import report
from mfac_core.backends import resolve_devices
from mfac_core.recipe import load_recipe
from mfac_core.settings import GradualSettings, MagnitudeSettings, MFACSettings
from mfac_torch.digits import Digits, accuracy, make_network, train
from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.modifier import Settings, modifier_for
from mfac_torch.sampling import GradSampler
from mfac_torch.selection import select_parameters

__all__ = [
    "Pruned",
    "compare",
    "manager_for",
    "prune_gradually",
    "prune_in_one_shot",
    "recipe_path",
    "run",
    "train_dense",
]

GRADUAL = "digits_gradual.yaml"
ONE_SHOT = "digits_one_shot.yaml"
DENSE_EPOCHS = 12
DENSE_LEARNING_RATE = 0.05
PRUNING_LEARNING_RATE = 0.02
SAMPLE_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Pruned:
    """One pruned network.

    Args:
        record: What was measured.
        model: The network, plain.
        masks: Name and mask of each pruned weight; True keeps.
    """

    record: report.RunRecord
    model: nn.Module
    masks: dict[str, Tensor]


def run(*, recipe: Path | None, output: Path, seed: int) -> None:
    """Run the comparison, print its table, and write network, masks, numbers and picture.

    Args:
        recipe: Recipe of the gradual runs; ``None`` takes ``recipes/digits_gradual.yaml``.
        output: Folder for the results; made if missing.
        seed: Seed of the split, the weights, and the order of the batches.

    Raises:
        RecipeError: If the recipe is wrong.
        SettingError: If a name in ``params`` matches nothing in the network.
        DeviceError: If a listed device does not exist.
    """
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    gradual = recipe or recipe_path(GRADUAL)
    for settings in load_recipe(gradual).pruning:  # refuse what cannot work before any training
        select_parameters(make_network(seed), settings.params)
        if isinstance(settings, MFACSettings):
            resolve_devices(settings.devices)
    console.print(f"Pruning a network for handwritten digits by [bold]{gradual}[/bold], beside magnitude pruning.")
    started = time.perf_counter()
    results = compare(gradual, recipe_path(ONE_SHOT), seed=seed, console=console)
    best = results[0]
    save_file(
        {name: tensor.contiguous() for name, tensor in best.model.state_dict().items()}, output / "pruned.safetensors"
    )
    save_file({name: mask.contiguous() for name, mask in best.masks.items()}, output / "masks.safetensors")
    records = [result.record for result in results]
    report.write_json(
        records, output / report.RUN_FILE, framework="torch", seed=seed, recipe=str(gradual), torch=torch.__version__
    )
    report.picture(records, output / "report.png")
    console.print(report.table(records))
    console.print(
        f"In {time.perf_counter() - started:.0f} s. Written to [bold]{output}[/bold]: pruned.safetensors (the network "
        f"pruned gradually by M-FAC), masks.safetensors, {report.RUN_FILE}, report.png."
    )


def compare(gradual: Path, one_shot: Path, *, seed: int, console: Console | None = None) -> list[Pruned]:
    """Train a network once, then prune copies of it: gradually and in one shot, by M-FAC and by magnitude.

    Args:
        gradual: Recipe of the gradual runs.
        one_shot: Recipe of the one-shot runs; its schedule is not used.
        seed: Seed of the split, the weights, and the order of the batches.
        console: Where progress bars are shown; ``None`` shows none.

    Returns:
        M-FAC gradual, magnitude gradual, M-FAC one-shot, magnitude one-shot.
    """
    torch.set_num_threads(1)  # fastest for so small a network, and the same numbers on any number of cores
    digits = Digits.load(seed)
    settings = {path: load_recipe(path) for path in (gradual, one_shot)}
    epochs = round(settings[gradual].max_epochs)
    with _progress(console) as progress:
        task = progress.add_task("training the dense network", total=DENSE_EPOCHS)
        dense = train_dense(digits, seed, partial(_advance, progress, task))
        results = []
        for method in ("M-FAC", "magnitude"):
            task = progress.add_task(f"{method} gradual: pruning while training", total=epochs)
            manager = manager_for(settings[gradual].modifiers, method)
            advance = partial(_advance, progress, task)
            results.append(prune_gradually(manager, method, dense, digits, epochs=epochs, seed=seed, advance=advance))
        for method in ("M-FAC", "magnitude"):
            task = progress.add_task(f"{method} one-shot: pruning without training", total=1)
            manager = manager_for(settings[one_shot].modifiers, method)
            results.append(prune_in_one_shot(manager, method, dense, digits, seed=seed))
            progress.advance(task)
    return results


def train_dense(digits: Digits, seed: int, advance: Callable[[int], None] = lambda epoch: None) -> nn.Module:
    """Return the network that all methods prune, trained without pruning.

    Args:
        digits: The data.
        seed: Seed of the weights and of the order of the batches.
        advance: Called with the number of completed epochs.

    Returns:
        The network.
    """
    model = make_network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=DENSE_LEARNING_RATE, momentum=0.9)
    train(model, optimizer, digits, epochs=DENSE_EPOCHS, seed=seed, after_epoch=advance)
    return model


def manager_for(modifiers: Sequence[Settings], method: str) -> ScheduledModifierManager:
    """Return a manager of a recipe's modifiers, for M-FAC or for magnitude with the same schedule, masks and scope.

    Args:
        modifiers: The settings of the recipe's modifiers.
        method: ``"M-FAC"`` or ``"magnitude"``.

    Returns:
        The manager.
    """
    names = [field.name for field in dataclasses.fields(GradualSettings)]
    settings = [
        MagnitudeSettings(**{name: getattr(each, name) for name in names})
        if method == "magnitude" and isinstance(each, MFACSettings)
        else each
        for each in modifiers
    ]
    return ScheduledModifierManager([modifier_for(each) for each in settings])


def prune_gradually(
    manager: ScheduledModifierManager,
    method: str,
    dense: nn.Module,
    digits: Digits,
    *,
    epochs: int,
    seed: int,
    advance: Callable[[int], None] = lambda epoch: None,
) -> Pruned:
    """Prune a copy of the dense network while it is trained further.

    Args:
        manager: What prunes.
        method: Name of the method, for the record.
        dense: The trained network; stays as it is.
        digits: The data.
        epochs: Epochs of training.
        seed: Seed of the order of the batches.
        advance: Called with the number of completed epochs.

    Returns:
        The pruned network and its record.
    """
    started = time.perf_counter()
    model = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=PRUNING_LEARNING_RATE, momentum=0.9)
    optimizer = manager.modify(model, optimizer, digits.steps_per_epoch)
    history = [(0.0, accuracy(model, digits), 0.0)]

    def after_epoch(epoch: int) -> None:
        history.append((float(epoch), accuracy(model, digits), manager.sparsity))
        advance(epoch)

    train(model, optimizer, digits, epochs=epochs, seed=seed + 1, after_epoch=after_epoch)
    manager.finalize(model)
    return _pruned(f"{method} gradual", manager, model, dense, digits, history, started)


def prune_in_one_shot(
    manager: ScheduledModifierManager, method: str, dense: nn.Module, digits: Digits, *, seed: int
) -> Pruned:
    """Prune a copy of the dense network in one step, without training.

    Args:
        manager: What prunes.
        method: Name of the method, for the record.
        dense: The trained network; stays as it is.
        digits: The data.
        seed: Seed of the gradient samples.

    Returns:
        The pruned network and its record.
    """
    started = time.perf_counter()
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(seed)
    sampler = GradSampler(lambda: iter(digits.batches(generator, SAMPLE_BATCH_SIZE)), nn.functional.cross_entropy)
    manager.apply(model, grad_sampler=sampler)
    return _pruned(f"{method} one-shot", manager, model, dense, digits, [], started)


def recipe_path(name: str) -> Path:
    """Return the path of one of the project's recipes.

    Args:
        name: File name of the recipe.

    Returns:
        Its path in the installed package, or in the source tree.
    """
    installed = Path(__file__).parent / "recipes" / name
    return installed if installed.exists() else Path(__file__).parents[2] / "recipes" / name


def _pruned(
    method: str,
    manager: ScheduledModifierManager,
    model: nn.Module,
    dense: nn.Module,
    digits: Digits,
    history: list[tuple[float, float, float]],
    started: float,
) -> Pruned:
    masks = manager.masks
    record = report.RunRecord(
        method=method,
        sparsity=manager.sparsity,
        accuracy_before=accuracy(dense, digits),
        accuracy_after=accuracy(model, digits),
        seconds=time.perf_counter() - started,
        history=history,
        layer_sparsity={name: float((~mask).float().mean()) for name, mask in masks.items()},
    )
    return Pruned(record, model, masks)


def _advance(progress: Progress, task: TaskID, epoch: int) -> None:
    progress.advance(task)


@contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        yield progress
