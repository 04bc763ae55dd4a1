"""A small convolutional network in Keras on handwritten digits: the data, the model and its training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mfac_core.demo.digits import DigitImages
from mfac_core.demo.runs import BATCH_SIZE, MOMENTUM

__all__ = ["accuracy", "batches", "copy_of", "load_digits", "make_network", "train"]

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


def load_digits(seed: int) -> DigitImages:
    """Return the digits, split by a seed with equal shares of each digit; images have the shape ``(n, 8, 8, 1)``."""
    return DigitImages.load(seed, channel_axis=3)


def batches(digits: DigitImages, random: np.random.Generator, size: int) -> Iterator[Batch]:
    """Yield images and labels of each batch of one pass over the training images in random order."""
    order = random.permutation(len(digits.train_labels))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        yield digits.train_images[indices], digits.train_labels[indices]


def make_network(seed: int) -> Any:
    """Return the untrained network: two convolutions and two dense layers, 9,168 prunable weights.

    The weights are drawn as PyTorch draws them: the initial scale affects the accuracy at high sparsity.
    """
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    images = keras.Input([8, 8, 1])
    scores = images
    for layer in (
        layers.Conv2D(16, 3, padding="same", activation="relu", name="conv_1", **_pytorch_initializers(fan_in=9)),
        layers.MaxPooling2D(2),
        layers.Conv2D(32, 3, padding="same", activation="relu", name="conv_2", **_pytorch_initializers(fan_in=144)),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(32, activation="relu", name="dense_1", **_pytorch_initializers(fan_in=128)),
        layers.Dense(10, name="dense_2", **_pytorch_initializers(fan_in=32)),
    ):
        scores = layer(scores)
    return keras.Model(images, scores, name="digits")


def copy_of(model: Any) -> Any:
    """Return a copy of a network with weights of its own, not compiled."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def train(
    model: Any, digits: DigitImages, *, learning_rate: float, epochs: int, seed: int, callbacks: Sequence[Any] = ()
) -> dict[str, list[float]]:
    """Train a network in place with cross-entropy by plain ``fit``; the seed orders the batches.

    Returns the metrics by epoch; ``val_accuracy`` is the test accuracy.
    """
    keras.utils.set_random_seed(seed)
    model.compile(keras.optimizers.SGD(learning_rate, momentum=MOMENTUM), _cross_entropy(), metrics=["accuracy"])
    run = model.fit(
        digits.train_images,
        digits.train_labels,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=(digits.test_images, digits.test_labels),
        validation_batch_size=len(digits.test_labels),
        callbacks=list(callbacks),
        verbose=0,
    )
    history: dict[str, list[float]] = run.history
    return history


def accuracy(model: Any, digits: DigitImages) -> float:
    """Return the share of test images that the network classifies correctly."""
    scores = keras.ops.convert_to_numpy(model(digits.test_images, training=False))
    return float((scores.argmax(axis=1) == digits.test_labels).mean())


def _pytorch_initializers(fan_in: int) -> dict[str, Any]:
    bound = 1 / math.sqrt(fan_in)
    return {
        "kernel_initializer": keras.initializers.RandomUniform(-bound, bound),
        "bias_initializer": keras.initializers.RandomUniform(-bound, bound),
    }


def _cross_entropy() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
