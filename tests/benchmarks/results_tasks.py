"""The tasks of ``results.py``: data, networks and training, all from packages that are installed anyway."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfac_core.demo.runs import DENSE_EPOCHS, DENSE_LEARNING_RATE, MOMENTUM, PRUNING_LEARNING_RATE
from mfac_torch.digits import Digits, make_network
from mfac_torch.sampling import GradSampler
from mfac_torch.selection import select_parameters

__all__ = ["TASKS", "Batches", "Bench", "Data", "Metric", "Task"]

_TEST_SHARE = 0.3
_CONTEXT = 32
_PIECE = 64 * _CONTEXT


@dataclass(frozen=True)
class Metric:
    """The metric on the test examples.

    Args:
        name: Name in text and figures, with its unit.
        of: Maps outputs and targets to a number.
        lower_is_better: Whether it is a loss.
        points: Name of the unit of a difference.
    """

    name: str
    of: Callable[[Tensor, Tensor], float]
    lower_is_better: bool
    points: str


@dataclass(frozen=True)
class Data:
    """Training and test examples."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


@dataclass(frozen=True)
class Task:
    """A data set, a network for it and its training.

    Args:
        name: Short name, for the command line and for files.
        title: Name in text and figures.
        layers: Description of the layers.
        load: Maps a seed to the data.
        network: Maps a seed to the untrained network.
        loss: Maps outputs and targets to a scalar.
        metric: The metric on the test examples.
        optimizer: Maps parameters and learning rate to an optimizer.
        epochs: Passes over the training examples for the dense network.
        learning_rate: Of the dense training.
        fine_tuning_rate: Learning rate of the training after pruning and during gradual pruning.
        batch_size: Examples per batch of training.
        sample_batch_size: Examples per gradient sample.
        unit: Name of the test examples.
        narrow: Weights whose number of inputs is not divisible by four, left out of N:M.
        is_table: Whether the data set is a small table.
    """

    name: str
    title: str
    layers: str
    load: Callable[[int], Data]
    network: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric
    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    epochs: int
    learning_rate: float
    fine_tuning_rate: float
    batch_size: int = 32
    sample_batch_size: int = 16
    unit: str = "examples"
    narrow: tuple[str, ...] = ()
    is_table: bool = False


class Batches:
    """Batches for gradient samples, in a new random order in each pass; counts the examples drawn.

    Args:
        data: The data.
        size: Examples per batch.
        seed: Seed of the order.
        repeated: Whether each call yields the same batches.
    """

    def __init__(self, data: Data, size: int, seed: int, *, repeated: bool = False) -> None:
        self.drawn = 0  # examples
        self._data = data
        self._size = size
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._repeated = repeated

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._repeated:
            self._generator.manual_seed(self._seed)
        while True:
            for batch in _batches(self._data, self._size, self._generator):
                self.drawn += len(batch[0])
                yield batch


@dataclass
class Bench:
    """The data and the dense network of a task for one seed of data split, weights and batch order."""

    task: Task
    seed: int
    epochs: int | None = None
    data: Data = field(init=False)
    dense: nn.Module = field(init=False)
    dense_value: float = field(init=False)
    weights: int = field(init=False)
    seconds_per_epoch: float = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.task.load(self.seed)
        self.dense = self.task.network(self.seed)
        started = time.process_time()
        optimizer = self.task.optimizer(self.dense.parameters(), self.task.learning_rate)
        epochs = self.epochs or self.task.epochs
        self._train(self.dense, optimizer, epochs, self.seed)
        self.seconds_per_epoch = (time.process_time() - started) / epochs
        self.dense_value = self.measure(self.dense)
        self.weights = sum(weight.numel() for weight in select_parameters(self.dense, "__ALL_PRUNABLE__").values())

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data.train_inputs) // self.task.batch_size)

    def copy(self) -> nn.Module:
        """Return a copy of the dense network."""
        return copy.deepcopy(self.dense)

    def sampler(self, batches: Batches, *, loss_scale: float = 1.0) -> GradSampler:
        """Return a sampler that draws gradient samples from these batches."""
        return GradSampler(batches, lambda outputs, targets: loss_scale * self.task.loss(outputs, targets))

    def train(self, model: nn.Module, epochs: int, attach: Callable[[nn.Module, Any], object]) -> None:
        """Fine-tune a network, after ``attach`` has been called with it and its optimizer."""
        optimizer = self.task.optimizer(model.parameters(), self.task.fine_tuning_rate)
        attach(model, optimizer)
        self._train(model, optimizer, epochs, self.seed + 1)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Return the metric on the test examples."""
        model.eval()
        outputs = torch.cat([model(part) for part in self.data.test_inputs.split(512)])
        model.train()
        return self.task.metric.of(outputs, self.data.test_targets)

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for inputs, targets in _batches(self.data, self.task.batch_size, generator):
                optimizer.zero_grad()
                self.task.loss(model(inputs), targets).backward()
                optimizer.step()


class CharacterTransformer(nn.Module):
    """A small decoder: two pre-norm blocks of causal attention and a feed-forward layer.

    Args:
        characters: Size of the alphabet.
        width: Numbers per position.
        heads: Heads of the attention.
    """

    def __init__(self, characters: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(_CONTEXT, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(self.attention_norm(x)).chunk(3, dim=-1)
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


def _batches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data.train_inputs), generator=generator)
    for part in order.split(size):
        yield data.train_inputs[part], data.train_targets[part]


def _digits(seed: int) -> Data:
    digits = Digits.load(seed)
    return Data(digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)


def _table(name: str, seed: int) -> Data:
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    is_class = name != "diabetes"
    parts = train_test_split(
        inputs, targets, test_size=_TEST_SHARE, random_state=seed, stratify=targets if is_class else None
    )
    train_inputs, test_inputs, train_targets, test_targets = parts
    mean, deviation = train_inputs.mean(axis=0), train_inputs.std(axis=0)
    train_inputs, test_inputs = (((part - mean) / deviation).astype(np.float32) for part in (train_inputs, test_inputs))
    if not is_class:
        mean, deviation = train_targets.mean(), train_targets.std()
        train_targets, test_targets = (
            ((part - mean) / deviation).astype(np.float32)[:, None] for part in (train_targets, test_targets)
        )
    return Data(*map(torch.from_numpy, (train_inputs, train_targets, test_inputs, test_targets)))


@cache
def _text() -> tuple[Tensor, int]:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def _windows(seed: int) -> Data:
    text, _ = _text()
    pieces = text[: len(text) // _PIECE * _PIECE].view(-1, _PIECE)  # whole pieces, so that no window is in both parts
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    held_out = len(pieces) // 10
    parts = []
    for chosen in (order[held_out:], order[:held_out]):
        characters = pieces[chosen]
        parts += [characters[:, :-1].unfold(1, _CONTEXT, _CONTEXT), characters[:, 1:].unfold(1, _CONTEXT, _CONTEXT)]
    return Data(*(part.reshape(-1, _CONTEXT).contiguous() for part in parts))


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def _perceptron(*widths: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *layers[:-1])

    return make


def _momentum(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM)


def _momentum_and_decay(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, weight_decay=1e-3)


def _adam(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate)


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return 100 * (outputs.argmax(dim=1) == targets).float().mean().item()


def _explained(outputs: Tensor, targets: Tensor) -> float:
    return 100 * (1 - ((outputs - targets) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()).item()


def _nats(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


_ACCURACY = Metric("test accuracy in percent", _accuracy, lower_is_better=False, points="points")
_EXPLAINED = Metric(
    "explained variance (R²) on test examples in percent", _explained, lower_is_better=False, points="points"
)
_LOSS = Metric(
    "validation loss in nats per character",
    lambda outputs, targets: _nats(outputs, targets).item(),
    lower_is_better=True,
    points="nats",
)


def _table_task(name: str, title: str, *widths: int) -> Task:
    is_class = name != "diabetes"
    return Task(
        name=name,
        title=title,
        layers=", ".join(map(str, widths)),
        load=lambda seed: _table(name, seed),
        network=lambda seed: _seeded(seed, _perceptron(*widths)),
        loss=nn.functional.cross_entropy if is_class else nn.functional.mse_loss,
        metric=_ACCURACY if is_class else _EXPLAINED,
        optimizer=_momentum_and_decay,
        epochs=60 if is_class else 10,
        learning_rate=0.02 if is_class else 0.005,
        fine_tuning_rate=0.005,
        batch_size=16,
        is_table=True,
    )


def _transformer(name: str, title: str, epochs: int) -> Task:
    return Task(
        name=name,
        title=title,
        layers=f"two blocks of width 64, trained for {epochs} epoch{'s' if epochs > 1 else ''}",
        load=_windows,
        network=lambda seed: _seeded(seed, lambda: CharacterTransformer(_text()[1])),
        loss=_nats,
        metric=_LOSS,
        optimizer=_adam,
        epochs=epochs,
        learning_rate=3e-3,
        fine_tuning_rate=1e-3,
        sample_batch_size=4,
        unit=f"windows of {_CONTEXT} characters",
    )


_DIGITS: dict[str, Any] = {
    "load": _digits,
    "loss": nn.functional.cross_entropy,
    "metric": _ACCURACY,
    "optimizer": _momentum,
    "epochs": DENSE_EPOCHS,
    "learning_rate": DENSE_LEARNING_RATE,
    "fine_tuning_rate": PRUNING_LEARNING_RATE,
    "unit": "test images",
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="digits-cnn",
            title="Digits, convolutional network",
            layers="two convolutions, two linear layers",
            network=make_network,
            narrow=("conv_1.weight",),
            **_DIGITS,
        ),
        Task(
            name="digits-mlp",
            title="Digits, fully connected network",
            layers="64, 128, 64, 10",
            network=lambda seed: _seeded(seed, _perceptron(64, 128, 64, 10)),
            **_DIGITS,
        ),
        _transformer("transformer", "Text, character-level transformer", 1),
        _transformer("transformer-long", "Text, character-level transformer, trained three times as long", 3),
        _table_task("wine", "Wine", 13, 64, 64, 3),
        _table_task("breast_cancer", "Breast cancer", 30, 64, 64, 2),
        _table_task("diabetes", "Diabetes", 10, 64, 64, 1),
    )
}
