"""Running statistics of batch normalization, recalibrated for the current weights of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from mfac_core.ranks import Ranks
from mfac_core.session.batch_statistics import BatchStatistics, LayerStatistics
from mfac_torch.evaluation import training_flags_restored
from mfac_torch.refusals import model_and_ranks
from mfac_torch.sampling import GradSampler
from mfac_torch.sharded import is_sharded

__all__ = ["RunningStatistics", "recalibrate_batchnorm"]

_logger = logging.getLogger("mfac_torch")

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate_batchnorm(model: nn.Module, loader: Any, *, num_batches: int | None = None) -> int:
    """Recalibrate the running statistics of batch normalization: replace them by averages over batches.

    One-shot pruning changes the inputs of these layers, but not their statistics. For the batches measured here, only
    these layers are in training mode: dropout is not active. Training flags and momenta are restored afterwards;
    ``num_batches_tracked`` is the number of batches. An exception leaves the statistics unchanged.

    Layers without running statistics do not change, nor do layers that no batch reaches, nor frozen ones: layers
    in evaluation mode in a model that is in training mode.

    Over several processes, each makes this call and reads its own batches, as many as the others. The averages are
    those over the batches of all, and the same on each.

    Args:
        model: The model; wrappers (``DistributedDataParallel``, ``torch.compile``, Fabric's) are unwrapped.
        loader: Batches as :class:`GradSampler` takes them, such as a ``DataLoader``, or a :class:`GradSampler`. Batches
            as large as in training are best.
        num_batches: The maximum number of batches; ``None`` for all of one pass over the data, or the first 1,000 of
            data without a length.

    Returns:
        The number of layers whose statistics were recalibrated.

    Raises:
        TypeError: If the model is not a module, or the loader is not a source of batches.
        ValueError: If there is no batch, one has an unsupported form, an input of these layers is not finite, a lazy
            layer has not seen any input yet, or the batches of a process end before those of others.
        RankError: If another process fails.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(5)]
        >>> recalibrate_batchnorm(model, batches), int(model[1].num_batches_tracked)
        (1, 5)
    """
    inside, ranks = model_and_ranks(model)
    sampler = loader if isinstance(loader, GradSampler) else _WithoutLoss(loader)
    return RunningStatistics(inside, ranks).recalibrate(sampler, num_batches)


class RunningStatistics(LayerStatistics):
    """The running statistics of the batch normalization layers of an unwrapped model.

    Layers in evaluation mode are frozen if the model is in training mode.

    Args:
        model: The model.
        ranks: The processes that have it, each of which reads batches of its own.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model = model
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, _BatchNorm) and all(getattr(layer, each) is not None for each in _BUFFERS)
        }
        frozen = [name for name, layer in layers.items() if model.training and not layer.training]
        super().__init__(layers, frozen, _logger, ranks=ranks, sharded=any(map(is_sharded, model.parameters())))

    def _copies(self) -> dict[str, list[torch.Tensor]]:
        lazy = [name for name, layer in self.layers.items() if is_lazy(getattr(layer, _BUFFERS[0]))]
        if lazy:
            raise ValueError(
                f"{', '.join(lazy)} has no statistics, because no input has reached it yet; call the model on a "
                "batch first"
            )
        return {name: [getattr(layer, each).clone() for each in _BUFFERS] for name, layer in self.layers.items()}

    def _restore(self, copies: Mapping[str, Sequence[Any]]) -> None:
        for name, values in copies.items():
            for buffer, value in zip(_BUFFERS, values, strict=True):
                getattr(self.layers[name], buffer).copy_(torch.as_tensor(value))

    def _write(self, statistics: BatchStatistics) -> None:
        self._restore(
            {name: (mean, variance, statistics.calls(name)) for name, mean, variance in statistics.averages()}
        )

    def _measure(self, sampler: GradSampler, batch: Any, statistics: BatchStatistics) -> None:
        for layer in self.layers.values():
            layer.reset_running_stats()  # each batch by itself: half precision cannot hold a sum of many
        sampler.forward(self._model, batch)

    def _collect(self, statistics: BatchStatistics) -> None:
        for name, layer in self.layers.items():
            mean, variance, calls = (getattr(layer, each).double().cpu().numpy() for each in _BUFFERS)
            statistics.add(name, mean, variance, int(calls))

    @contextmanager
    def _measuring(self, statistics: BatchStatistics) -> Iterator[None]:
        momenta = [(layer, layer.momentum) for layer in self.layers.values()]
        with training_flags_restored(self._model):
            self._model.eval()
            try:
                for layer in self.layers.values():
                    layer.train()
                    layer.momentum = None  # the average of all calls within a batch
                yield
            finally:
                for layer, momentum in momenta:
                    layer.momentum = momentum


class _WithoutLoss(GradSampler):
    """Batches whose inputs go to the model; the target too, but only if the model cannot be called without it."""

    def _call_of(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        is_input = isinstance(batch, torch.Tensor) or (isinstance(batch, tuple | list) and len(batch) == 1)
        if is_input:
            return super()._call_of(model, ([batch] if isinstance(batch, torch.Tensor) else batch, {}, None))
        self._loss_fn = _no_loss
        try:
            return super()._call_of(model, batch)
        except (TypeError, ValueError):
            self._loss_fn = None
            return super()._call_of(model, batch)


def _no_loss(output: Any, target: Any) -> Any:
    return output
