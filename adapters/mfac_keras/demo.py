"""The demo in Keras: train a network on real data, prune it by M-FAC and by magnitude, compare."""

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
from mfac_core.demo.digits import DigitImages
from mfac_core.demo.runs import (
    DENSE_EPOCHS,
    DENSE_LEARNING_RATE,
    PRUNING_LEARNING_RATE,
    SAMPLE_BATCH_SIZE,
    Demo,
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

_SEEDS = 3  # fewer than in PyTorch, because each takes longer


def run(*, recipe: Path | None, output: Path, seed: int, seeds: int = _SEEDS) -> None:
    """Run the comparison on the backend that Keras runs on, see :func:`mfac_core.demo.runs.run`."""
    demo_runs.run(demo, recipe=recipe, output=output, seed=seed, seeds=seeds)


def demo(seed: int) -> Demo:
    """Return Keras' part of the demo for one seed."""
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
    """Return the network that all methods prune, trained without pruning."""
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
    """Train a copy of a network for the epochs of a recipe, which prunes it or holds its zeros."""
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
    """Prune a copy of the dense network in one step, without training; the recipe's schedule is not used."""
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
