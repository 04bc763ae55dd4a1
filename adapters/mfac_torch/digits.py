"""A small convolutional network on handwritten digits: the data, the model and its training."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mfac_core.demo.digits import DigitImages
from mfac_core.demo.runs import BATCH_SIZE

__all__ = ["Digits", "accuracy", "make_network", "train"]


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images of shape ``(n, 1, 8, 8)``, float32 in ``[0, 1]``, and labels of shape ``(n,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int) -> Self:
        """Return the digits, split by a seed with equal shares of each digit."""
        return cls(*map(torch.from_numpy, DigitImages.load(seed, channel_axis=1)))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training images."""
        return -(-len(self.train_images) // BATCH_SIZE)

    def batches(self, generator: torch.Generator, size: int = BATCH_SIZE) -> list[tuple[Tensor, Tensor]]:
        """Return images and labels of each batch of one pass over the training images in random order."""
        order = torch.randperm(len(self.train_images), generator=generator)
        return [(self.train_images[indices], self.train_labels[indices]) for indices in order.split(size)]


def make_network(seed: int) -> nn.Sequential:
    """Return the untrained network: two convolutions and two linear layers, 9,168 prunable weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv_1=nn.Conv2d(1, 16, 3, padding=1),
            relu_1=nn.ReLU(),
            pool_1=nn.MaxPool2d(2),
            conv_2=nn.Conv2d(16, 32, 3, padding=1),
            relu_2=nn.ReLU(),
            pool_2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear_1=nn.Linear(128, 32),
            relu_3=nn.ReLU(),
            linear_2=nn.Linear(32, 10),
        )
    )


def train(
    model: nn.Module,
    optimizer: Any,
    digits: Digits,
    *,
    epochs: int,
    seed: int,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train a network in place with cross-entropy, as a plain training loop does; the seed orders the batches."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for images, labels in digits.batches(generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        after_epoch(epoch + 1)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of test images that the network classifies correctly."""
    was_training = model.training
    model.eval()
    correct = (model(digits.test_images).argmax(dim=1) == digits.test_labels).float().mean().item()
    model.train(was_training)
    return float(correct)
