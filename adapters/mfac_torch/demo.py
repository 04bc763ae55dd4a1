"""The demo in PyTorch: train a network on real data, prune it by M-FAC and by magnitude, compare."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
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
    pruned,
)
from mfac_core.files import write_file
from mfac_core.recipe import Recipe
from mfac_torch.digits import Digits, accuracy, make_network, train
from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.modifier import modifier_for
from mfac_torch.sampling import GradSampler
from mfac_torch.selection import select_parameters

__all__ = ["demo", "prune_gradually", "prune_in_one_shot", "run", "train_dense"]


def run(*, recipe: Path | None, output: Path, seed: int, seeds: int = SEEDS) -> None:
    """Run the comparison, see :func:`mfac_core.demo.runs.run`."""
    torch.set_num_threads(1)  # fastest for such a small network, and the same numbers on any number of cores
    demo_runs.run(demo, recipe=recipe, output=output, seed=seed, seeds=seeds)


def demo(seed: int) -> Demo:
    """Return PyTorch's part of the demo for one seed."""
    digits = Digits.load(seed)
    return Demo(
        framework="torch",
        versions={"torch": torch.__version__},
        check_params=partial(select_parameters, make_network(seed)),
        train_dense=partial(train_dense, digits, seed),
        train_by_recipe=partial(prune_gradually, digits, seed),
        prune_in_one_shot=partial(prune_in_one_shot, digits, seed),
        num_test_images=len(digits.test_labels),
        files=("pruned.safetensors", "masks.safetensors"),
        save=_save,
    )


def train_dense(digits: Digits, seed: int, advance: Callable[[int], None] = lambda epoch: None) -> nn.Module:
    """Return the network that all methods prune, trained without pruning."""
    model = make_network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=DENSE_LEARNING_RATE, momentum=MOMENTUM)
    train(model, optimizer, digits, epochs=DENSE_EPOCHS, seed=seed, after_epoch=advance)
    return model


def prune_gradually(
    digits: Digits,
    seed: int,
    recipe: Recipe,
    method: str,
    dense: nn.Module,
    advance: Callable[[int], None] = lambda epoch: None,
) -> Pruned:
    """Train a copy of a network for the epochs of a recipe, which prunes it or holds its zeros."""
    started = time.perf_counter()
    model, manager = copy.deepcopy(dense), _manager(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=PRUNING_LEARNING_RATE, momentum=MOMENTUM)
    optimizer = manager.modify(model, optimizer, digits.steps_per_epoch)
    history = [(0.0, accuracy(model, digits), 0.0)]

    def after_epoch(epoch: int) -> None:
        history.append((float(epoch), accuracy(model, digits), manager.sparsity))
        advance(epoch)

    train(model, optimizer, digits, epochs=round(recipe.max_epochs), seed=seed + 1, after_epoch=after_epoch)
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


def prune_in_one_shot(digits: Digits, seed: int, recipe: Recipe, method: str, dense: nn.Module) -> Pruned:
    """Prune a copy of the dense network in one step, without training."""
    started = time.perf_counter()
    model, manager = copy.deepcopy(dense), _manager(recipe)
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


def _manager(recipe: Recipe) -> ScheduledModifierManager:
    return ScheduledModifierManager([modifier_for(each) for each in recipe.modifiers])


def _save(result: Pruned, network: Path, masks: Path) -> None:
    for path, tensors in ((network, result.model.state_dict()), (masks, result.masks)):
        write_file(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
