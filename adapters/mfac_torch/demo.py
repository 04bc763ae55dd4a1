"""The main job, end to end: train a network on real data, prune it by M-FAC and by magnitude, compare."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from mfac_core.demo import runs as demo_runs
from mfac_core.demo.runs import (
    DENSE_EPOCHS,
    DENSE_LEARNING_RATE,
    MOMENTUM,
    PRUNING_LEARNING_RATE,
    SAMPLE_BATCH_SIZE,
    SEEDS,
    Demo,
    Pruned,
    by_method,
    pruned,
    recipe_path,
)
from mfac_core.files import write_file
from mfac_core.recipe import Recipe
from mfac_torch.digits import Digits, accuracy, make_network, train
from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.modifier import Settings, modifier_for
from mfac_torch.sampling import GradSampler
from mfac_torch.selection import select_parameters

__all__ = ["demo", "manager_for", "prune_gradually", "prune_in_one_shot", "recipe_path", "run", "train_dense"]


def run(*, recipe: Path | None, output: Path, seed: int, seeds: int = SEEDS) -> None:
    """Run the comparison, as :func:`mfac_core.demo.runs.run` says.

    Args:
        recipe: A recipe of gradual pruning; ``None`` compares one-shot pruning over several seeds.
        output: Folder for the results; made if missing.
        seed: The first seed of the split, the weights, the order of the batches and the gradient samples.
        seeds: Number of seeds of the one-shot comparison.
    """
    torch.set_num_threads(1)  # fastest for so small a network, and the same numbers on any number of cores
    demo_runs.run(demo, recipe=recipe, output=output, seed=seed, seeds=seeds)


def demo(seed: int) -> Demo:
    """Return what PyTorch adds to the demo.

    Args:
        seed: Seed of the split, the weights, and the order of the batches.

    Returns:
        The network for digits, its training and its pruning.
    """
    digits = Digits.load(seed)

    def gradually(recipe: Recipe, method: str, dense: nn.Module, advance: Callable[[int], None]) -> Pruned:
        manager, epochs = _manager(recipe.modifiers), round(recipe.max_epochs)
        return prune_gradually(manager, method, dense, digits, epochs=epochs, seed=seed, advance=advance)

    def in_one_shot(recipe: Recipe, method: str, dense: nn.Module) -> Pruned:
        return prune_in_one_shot(_manager(recipe.modifiers), method, dense, digits, seed=seed)

    return Demo(
        framework="torch",
        versions={"torch": torch.__version__},
        check_params=partial(select_parameters, make_network(seed)),
        train_dense=partial(train_dense, digits, seed),
        train_by_recipe=gradually,
        prune_in_one_shot=in_one_shot,
        num_test_images=len(digits.test_labels),
        files=("pruned.safetensors", "masks.safetensors"),
        save=_save,
    )


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
    optimizer = torch.optim.SGD(model.parameters(), lr=DENSE_LEARNING_RATE, momentum=MOMENTUM)
    train(model, optimizer, digits, epochs=DENSE_EPOCHS, seed=seed, after_epoch=advance)
    return model


def manager_for(modifiers: Iterable[Settings], method: str) -> ScheduledModifierManager:
    """Return a manager of a recipe's modifiers, for M-FAC or for magnitude with the same schedule, masks and scope.

    Args:
        modifiers: The settings of the recipe's modifiers.
        method: ``"M-FAC"`` or ``"magnitude"``.

    Returns:
        The manager.
    """
    return _manager(by_method(modifiers, method))


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
    """Train a copy of a network further while it is pruned, or its zeros held.

    Args:
        manager: What prunes, or holds the zeros.
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
    optimizer = torch.optim.SGD(model.parameters(), lr=PRUNING_LEARNING_RATE, momentum=MOMENTUM)
    optimizer = manager.modify(model, optimizer, digits.steps_per_epoch)
    history = [(0.0, accuracy(model, digits), 0.0)]

    def after_epoch(epoch: int) -> None:
        history.append((float(epoch), accuracy(model, digits), manager.sparsity))
        advance(epoch)

    train(model, optimizer, digits, epochs=epochs, seed=seed + 1, after_epoch=after_epoch)
    manager.finalize(model)
    return pruned(
        f"{method} gradual",
        model,
        manager.masks,
        sparsity=manager.sparsity,
        accuracies=(accuracy(dense, digits), accuracy(model, digits)),
        started=started,
        history=history,
    )


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
    return pruned(
        f"{method} one-shot",
        model,
        manager.masks,
        sparsity=manager.sparsity,
        accuracies=(accuracy(dense, digits), accuracy(model, digits)),
        started=started,
    )


def _manager(modifiers: Iterable[Settings]) -> ScheduledModifierManager:
    return ScheduledModifierManager([modifier_for(each) for each in modifiers])


def _save(result: Pruned, network: Path, masks: Path) -> None:
    for path, tensors in ((network, result.model.state_dict()), (masks, result.masks)):
        write_file(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
