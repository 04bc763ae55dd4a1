"""Moving statistics of batch normalization, recalibrated for the current weights of a model."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mfac_core.ranks import Ranks
from mfac_core.session.batch_statistics import BatchStatistics, LayerStatistics
from mfac_keras.assigning import assign_all
from mfac_keras.backends import current_backend
from mfac_keras.conditions import check_built, check_model
from mfac_keras.sampling import GradientSampler

__all__ = ["MovingStatistics", "recalibrate_batchnorm"]

_logger = logging.getLogger("mfac_keras")

Vector = npt.NDArray[np.float64]


def recalibrate_batchnorm(model: Any, dataset: Any, *, num_batches: int | None = None) -> int:
    """Recalibrate the moving statistics of batch normalization: replace them by averages over batches.

    One-shot pruning changes the inputs of these layers, but not their statistics. For the batches measured here, only
    these layers run as in training: dropout is not active. Momenta are restored afterwards. An exception leaves the
    statistics unchanged.

    Layers that no batch reaches do not change, nor do frozen ones (``trainable=False``), which Keras runs in
    inference mode in training too.

    Args:
        model: A built Keras model; layers of nested models are included.
        dataset: Batches, as :func:`mfac_keras.prune_one_shot` takes them, or of inputs alone: ``x``, an array or a
            structure of arrays, or ``(x,)``. Batches as large as in training are best.
        num_batches: The maximum number of batches; ``None`` for all of one pass over the data, or the first 1,000 of
            data without a length.

    Returns:
        The number of layers whose statistics were recalibrated.

    Raises:
        TypeError: If the model is not a model of Keras 3, or the dataset is not a source of batches.
        ValueError: If the model is not built, there is no batch, one has an unsupported form, or an input of these
            layers is not finite.
        NotImplementedError: As :func:`mfac_keras.prune_one_shot`.
        RankError: As :func:`mfac_keras.prune_one_shot`.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3), keras.layers.BatchNormalization()])
        >>> recalibrate_batchnorm(model, [(np.ones([8, 4]), np.ones([8, 3]))])
        1
    """
    check_model(model)
    check_built(model)
    ranks = current_backend().ranks(model)
    sampler = dataset if isinstance(dataset, GradientSampler) else GradientSampler(dataset)
    return MovingStatistics(model, ranks).recalibrate(sampler, num_batches)


class MovingStatistics(LayerStatistics):
    """The moving statistics of the batch normalization layers of a built model, by path.

    Args:
        model: The model.
        ranks: The processes that have it, each of which reads batches of its own.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self._model = model
        layers: dict[str, Any] = {}
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization) and layer.built:
                layers[layer.path if layer.path not in layers else f"{layer.path} ({len(layers) + 1})"] = layer
        super().__init__(layers, [name for name, layer in layers.items() if not layer.trainable], _logger, ranks=ranks)

    def _copies(self) -> list[tuple[Any, Any]]:
        return [
            (variable, np.array(variable.numpy(), copy=True))
            for layer in self.layers.values()
            for variable, _ in _statistics_of(layer, np.zeros(1), np.zeros(1))
        ]

    def _restore(self, copies: list[tuple[Any, Any]]) -> None:
        assign_all(copies)

    def _write(self, statistics: BatchStatistics) -> None:
        assign_all(
            (variable, value)
            for name, mean, variance in statistics.averages()
            for variable, value in _statistics_of(self.layers[name], mean, variance)
        )

    def _measure(self, sampler: GradientSampler, batch: Any, statistics: BatchStatistics) -> None:
        sampler.forward(self._model, batch)  # in which each layer adds what it has measured

    @contextmanager
    def _measuring(self, statistics: BatchStatistics) -> Iterator[None]:
        # NaN would survive a momentum of 0, which multiplies the old statistics
        assign_all((variable, np.zeros(value.shape)) for variable, value in self._copies())
        momenta = [(layer, layer.momentum, getattr(layer, "renorm", None)) for layer in self.layers.values()]
        try:
            for name, layer in self.layers.items():
                layer.call = _measured(layer.call, name, layer, statistics)
                layer.momentum = 0.0
                layer.renorm = False
            yield
        finally:
            for layer, momentum, renorm in momenta:
                layer.__dict__.pop("call", None)
                layer.momentum = momentum
                if renorm is None:
                    layer.__dict__.pop("renorm", None)
                else:
                    layer.renorm = renorm


def _measured(call: Callable[..., Any], name: str, layer: Any, statistics: BatchStatistics) -> Callable[..., Any]:
    """Return the call of a layer in training mode, which then adds its statistics to those of the other batches."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def measured(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        arguments.arguments["training"] = True
        output = call(*arguments.args, **arguments.kwargs)
        statistics.add(name, layer.moving_mean.numpy(), layer.moving_variance.numpy())
        return output

    return measured


def _statistics_of(layer: Any, mean: Vector, variance: Vector) -> list[tuple[Any, Vector]]:
    """Return the variables of a layer that hold statistics, each with its value for a mean and a variance."""
    values = [(layer.moving_mean, mean), (layer.moving_variance, variance)]
    if getattr(layer, "moving_stddev", None) is not None:  # of batch renormalization
        deviation = np.sqrt(variance + layer.epsilon)
        values += [(layer.moving_stddev, deviation), (layer.renorm_mean, mean), (layer.renorm_stddev, deviation)]
    return values
