"""The kinds of gradients that the benchmark prunes by: two drawn at random, and those of trained networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from mfac_core.demo.digits import DigitImages

__all__ = ["DRAWN", "NETWORKS", "normal", "of_network", "realistic"]

BATCH = 16  # images in each gradient of a network
EPOCHS = 3
LAYER = 10_000  # consecutive weights that share a scale in the realistic ensemble


def normal(m: int, d: int, seed: int) -> Iterator[np.ndarray]:
    """Yield ``m`` gradient samples of independent standard normal numbers, float32."""
    rng = np.random.default_rng(seed)
    for _ in range(m):
        yield rng.standard_normal(d, dtype=np.float32)


def realistic(m: int, d: int, seed: int) -> Iterator[np.ndarray]:
    """Yield ``m`` gradient samples like those of networks, float32.

    Scales spread over decades: those of layers over three, those of the columns of a layer over another two. The
    samples differ in size by a lognormal factor and share a mean of half the standard deviation.
    """
    rng = np.random.default_rng(seed)
    layers = 10 ** rng.uniform(-3, 0, -(-d // LAYER))
    scales = (np.repeat(layers, LAYER)[:d] * 10 ** rng.normal(0, 0.5, d)).astype(np.float32)
    mean = 0.5 * rng.standard_normal(d, dtype=np.float32)
    for size in rng.lognormal(0, 1, m).astype(np.float32):
        yield size * scales * (mean + rng.standard_normal(d, dtype=np.float32))


def of_network(name: str, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of a network that is trained briefly on digits, and ``m`` of their gradients, float32.

    Each row of the gradients, shape ``(m, d)``, is that of the loss of one batch of training images, drawn with
    replacement.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same numbers with any number of cores, and as fast: the batches are small
    try:
        return _trained(NETWORKS[name], m, seed)
    finally:
        torch.set_num_threads(threads)


def _trained(make: Callable[[], nn.Module], m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(seed)
    network = make()
    digits = DigitImages.load(seed, channel_axis=1)
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    weights = [weight for weight in network.parameters() if weight.ndim > 1]
    out = np.empty((m, sum(weight.numel() for weight in weights)), np.float32)
    for row in out:
        batch = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)], out=torch.from_numpy(row))
    return torch.cat([weight.detach().flatten() for weight in weights]).numpy(), out


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


DRAWN = {"normal": normal, "realistic": realistic}
NETWORKS = {"CNN": _convolutional, "MLP": _mlp}
