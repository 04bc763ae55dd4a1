"""The main job in Keras, end to end: train a network on real data, prune it by M-FAC and by magnitude, compare."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from mfac_core.demo import runs as demo_runs
from mfac_core.demo.runs import (
    DENSE_EPOCHS,
    DENSE_LEARNING_RATE,
    PRUNING_LEARNING_RATE,
    SAMPLE_BATCH_SIZE,
    Demo,
    DigitImages,
    Pruned,
    pruned,
)
from mfac_core.files import write_file
from mfac_core.masks.zero_count import count_zeros
from mfac_core.recipe import Recipe
from mfac_keras.callback import MFACPruningCallback
from mfac_keras.digits import accuracy, batches, copy_of, load_digits, make_network, train
from mfac_keras.one_shot import prune_one_shot
from mfac_keras.selection import select_variables

__all__ = ["demo", "prune_gradually", "prune_in_one_shot", "run", "train_dense"]

_SEEDS = 3  # one takes longer than in PyTorch


def run(*, recipe: Path | None, output: Path, seed: int, seeds: int = _SEEDS) -> None:
    """Run the comparison on the backend that Keras runs on, as :func:`mfac_core.demo.runs.run` says.

    Args:
        recipe: A recipe of gradual pruning; ``None`` compares one-shot pruning over several seeds.
        output: Folder for the results; made if missing.
        seed: The first seed of the split, the weights, the order of the batches and the gradient samples.
        seeds: Number of seeds of the one-shot comparison.
    """
    demo_runs.run(demo, recipe=recipe, output=output, seed=seed, seeds=seeds)


def demo(seed: int) -> Demo:
    """Return what Keras adds to the demo.

    Args:
        seed: Seed of the split, the weights, and the order of the batches.

    Returns:
        The network for digits, its training and its pruning.
    """
    digits = load_digits(seed)
    return Demo(
        framework="keras",
        versions={"keras": keras.__version__, "backend": keras.backend.backend()},
        check_params=partial(select_variables, make_network(seed)),
        train_dense=partial(train_dense, digits, seed),
        train_by_recipe=partial(prune_gradually, digits, seed),
        prune_in_one_shot=partial(prune_in_one_shot, digits, seed),
        num_test_images=len(digits.test_labels),
        files=("pruned.keras", "masks.npz"),
        save=_save,
    )


def train_dense(digits: DigitImages, seed: int, advance: Callable[[int], None] = lambda epoch: None) -> Any:
    """Return the network that all methods prune, trained without pruning.

    Args:
        digits: The data.
        seed: Seed of the weights and of the order of the batches.
        advance: Called with the number of completed epochs.

    Returns:
        The network.
    """
    model = make_network(seed)
    callbacks = [_advancing(advance)]
    train(model, digits, learning_rate=DENSE_LEARNING_RATE, epochs=DENSE_EPOCHS, seed=seed, callbacks=callbacks)
    return model


def prune_gradually(
    digits: DigitImages,
    seed: int,
    recipe: Recipe,
    method: str,
    dense: Any,
    advance: Callable[[int], None] = lambda epoch: None,
) -> Pruned:
    """Train a copy of a network further, for as many epochs as the recipe has, while it is pruned or its zeros held.

    Args:
        digits: The data.
        seed: Seed of the order of the batches.
        recipe: What prunes, or holds the zeros.
        method: Name of the method, for the record.
        dense: The trained network; stays as it is.
        advance: Called with the number of completed epochs.

    Returns:
        The pruned network and its record.
    """
    started = time.perf_counter()
    model = copy_of(dense)
    pruning = MFACPruningCallback(recipe, verbose=0)
    metrics = train(
        model,
        digits,
        learning_rate=PRUNING_LEARNING_RATE,
        epochs=round(recipe.max_epochs),
        seed=seed + 1,
        callbacks=[pruning, _advancing(advance)],
    )
    before = accuracy(dense, digits)
    after_each = zip(metrics["val_accuracy"], metrics["sparsity"], strict=True)
    return pruned(
        f"{method} gradual",
        model,
        pruning.masks,
        sparsity=pruning.sparsity,
        accuracies=(before, accuracy(model, digits)),
        started=started,
        history=[(0.0, before, 0.0), *((float(epoch), *both) for epoch, both in enumerate(after_each, start=1))],
    )


def prune_in_one_shot(digits: DigitImages, seed: int, recipe: Recipe, method: str, dense: Any) -> Pruned:
    """Prune a copy of the dense network in one step, without training.

    Args:
        digits: The data.
        seed: Seed of the gradient samples.
        recipe: What prunes; its schedule is not used.
        method: Name of the method, for the record.
        dense: The trained network; stays as it is.

    Returns:
        The pruned network and its record.
    """
    started = time.perf_counter()
    model = copy_of(dense)
    random = np.random.default_rng(seed)
    masks = prune_one_shot(model, lambda: batches(digits, random, SAMPLE_BATCH_SIZE), dense.loss, recipe=recipe)
    weights = {each.path: keras.ops.convert_to_numpy(each) for each in model.trainable_variables if each.path in masks}
    return pruned(
        f"{method} one-shot",
        model,
        masks,
        sparsity=count_zeros(weights, masks).sparsity,
        accuracies=(accuracy(dense, digits), accuracy(model, digits)),
        started=started,
    )


def _save(result: Pruned, network: Path, masks: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # Keras writes to a path only
        saved = Path(folder) / network.name
        result.model.save(saved)
        write_file(network, saved.read_bytes())
    write_file(masks, lambda file: np.savez_compressed(file, **result.masks))


def _advancing(advance: Callable[[int], None]) -> Any:
    return keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: advance(epoch + 1))
