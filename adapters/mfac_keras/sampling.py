"""Gradient samples from a dataset, outside the training loop."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from mfac_core.backends import Array
from mfac_core.ranks import Ranks
from mfac_core.sample_batches import HeldOut, Sampler, batches_to_sample, mean_loss
from mfac_keras.assigning import assign
from mfac_keras.backends import current_backend

__all__ = ["GradientSampler"]

_SAFE_IN_FLOAT16 = 1024.0  # loss scale of a model without an optimizer, so that small gradients do not underflow
_BATCH_SIZE = 32


class GradientSampler(Sampler):
    """Draws gradient samples: the gradients of a loss in inference mode, one per batch of a dataset.

    Sampling leaves weights, optimizer, metrics and normalization statistics unchanged.

    Args:
        dataset: Batches, each ``(x, y)`` or ``(x, y, sample_weight)``: a ``tf.data.Dataset``, a ``PyDataset``, a torch
            ``DataLoader``, any other iterable, or a callable that returns one and gets ``grad_sampler_kwargs`` of a
            recipe. A tuple of arrays holds all the data, and is split into batches of 32.
        loss: A Keras loss, its name, or a function ``loss(y_true, y_pred)``; ``None`` is the loss that the model was
            compiled with, regularization included.

    Raises:
        TypeError: If the dataset is neither iterable nor callable, or the loss is not a loss.
    """

    _logger = logging.getLogger("mfac_keras")

    def __init__(self, dataset: Any, loss: Any = None) -> None:
        if not (loss is None or callable(loss) or isinstance(loss, str | Mapping)):
            raise TypeError(
                f"loss is a {type(loss).__name__}; pass a Keras loss, its name, or a function loss(y_true, y_pred), "
                "after the batches"
            )
        if isinstance(loss, type):
            raise TypeError(f"loss is the class {loss.__name__}; pass an instance: {loss.__name__}()")
        is_not_data = isinstance(dataset, str | keras.losses.Loss | keras.layers.Layer | Mapping)
        if is_not_data or not (callable(dataset) or isinstance(dataset, Iterable | keras.utils.PyDataset)):
            raise TypeError(
                f"the dataset to sample gradients from is a {type(dataset).__name__}; pass batches (x, y), such as a "
                "tf.data.Dataset or a PyDataset, and the loss after them"
            )
        super().__init__(_batches_of(dataset))
        self._loss = None if loss is None else keras.losses.get(loss)
        # the compiled evaluation of the loss, behind the model and the settings that it was compiled for
        self._evaluation: tuple[tuple[Any, ...], Callable[[Any], Any]] | None = None

    def gradients(
        self,
        model: Any,
        variables: Sequence[Any],
        count: int,
        options: Mapping[str, object] | None = None,
        *,
        held_out: HeldOut | None = None,
        ranks: Ranks | None = None,
    ) -> Iterator[list[Array]]:
        """Yield gradient samples, drawn from batches as :meth:`batches` draws them.

        Args:
            model: The model to evaluate.
            variables: The variables to differentiate with respect to.
            count: How many samples to draw; of several processes, the share of this one.
            options: Passed to the callable that makes the batches.
            held_out: Filled with the batches that follow, once all samples are drawn.
            ranks: The processes that draw samples, each from its own share of the batches; ``None`` for a single one.

        Yields:
            The gradient of one batch's loss with respect to each variable, in its shape; zeros for a variable that the
            loss does not depend on.

        Raises:
            TypeError: If there are options and the batches do not come from a callable that takes them.
            ValueError: If there is no loss, no batch at all, a batch has an unsupported form, or the loss depends on
                none of the variables.
        """
        self._check_has_loss(model)
        metrics = _values(model.metrics_variables)
        batches = map(_batch, batches_to_sample(self._source, count, options, held_out, ranks=ranks))
        samples = current_backend().loss_gradients(model, variables, self._loss_of(model), batches, _scale(model))
        paths = [variable.path for variable in variables]
        try:
            yield from self._without_gaps(
                samples, paths, count, lambda index: np.zeros(tuple(variables[index].shape), np.float32), ranks=ranks
            )
        finally:
            _restore(metrics)

    def loss(self, model: Any, batches: Iterable[Any]) -> float:
        """Return the mean loss of batches in inference mode; metrics do not change.

        Args:
            model: The model to evaluate.
            batches: Batches in a form that the dataset may yield; all have the same weight.

        Returns:
            The mean of the losses.

        Raises:
            ValueError: If the model has no loss, there is no batch, or one has an unsupported form.
        """
        self._check_has_loss(model)
        compiled_with = (model, model._compile_loss, model.run_eagerly)
        if self._evaluation is None or not all(map(operator.is_, self._evaluation[0], compiled_with)):
            self._evaluation = (compiled_with, current_backend().loss_function(model, self._loss_of(model)))
        evaluate = self._evaluation[1]
        metrics = _values(model.metrics_variables)
        try:
            losses = [float(keras.ops.convert_to_numpy(evaluate(_batch(each)))) for each in batches]
        finally:
            _restore(metrics)
        return mean_loss(losses)

    def forward(self, model: Any, batch: Any, *, training: bool = False) -> Any:
        """Run the model on one batch, without gradients.

        Args:
            model: The model to run.
            batch: A batch in a form that the dataset may yield, or inputs alone.
            training: Whether it runs as in training, which updates normalization statistics.

        Returns:
            The output of the model.

        Raises:
            ValueError: If the batch has an unsupported form.
        """
        x = _inputs(batch)
        with current_backend().no_gradients(), current_backend().local_values(model):
            return _called(model, x, training=training)

    def _check_has_loss(self, model: Any) -> None:
        if self._loss is None and not model.compiled:
            raise ValueError(f"{model.name} is not compiled, so it has no loss; compile it, or pass loss=...")

    def _loss_of(self, model: Any) -> Callable[..., Any]:
        def loss_of(x: Any, y: Any, sample_weight: Any) -> Any:
            predicted = _called(model, x, training=False)
            if self._loss is None:
                return model._compute_loss(x=x, y=y, y_pred=predicted, sample_weight=sample_weight, training=False)
            if isinstance(self._loss, keras.losses.Loss):
                return self._loss(y, predicted, sample_weight=sample_weight)
            values = self._loss(y, predicted)
            return keras.ops.mean(values if sample_weight is None else values * sample_weight)

        return loss_of


def _called(model: Any, x: Any, *, training: bool) -> Any:
    return model(x, training=training) if model._call_has_training_arg else model(x)


def _values(variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    return [(variable, variable.numpy()) for variable in variables]


def _restore(values: Iterable[tuple[Any, Any]]) -> None:
    for variable, value in values:  # some losses have metrics of their own
        assign(variable, value)


def _batches_of(dataset: Any) -> Any:
    """Return the dataset as an iterable of batches that can be restarted, or as the callable that it is."""
    if isinstance(dataset, keras.utils.PyDataset):
        return _IndexedBatches(dataset.__getitem__, lambda: range(dataset.num_batches))
    if isinstance(dataset, tuple | np.ndarray) or keras.ops.is_tensor(dataset):
        return _IndexedBatches(
            lambda start: keras.tree.map_structure(lambda array: array[start : start + _BATCH_SIZE], dataset),
            lambda: range(0, len(keras.tree.flatten(dataset)[0]), _BATCH_SIZE),
        )
    return dataset


class _IndexedBatches:
    """Batches that are made one by one from their indices."""

    def __init__(self, batch_at: Callable[[int], Any], indices: Callable[[], range]) -> None:
        self._batch_at = batch_at
        self._indices = indices

    def __iter__(self) -> Iterator[Any]:
        return map(self._batch_at, self._indices())

    def __len__(self) -> int:
        return len(self._indices())


def _batch(batch: Any) -> tuple[Any, Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) not in {2, 3}:
        described = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, tuple | list) else "")
        raise ValueError(
            f"the dataset to sample gradients from yields a {described}; each batch must be (x, y) or "
            "(x, y, sample_weight)"
        )
    x, y, sample_weight = (*batch, None)[:3]
    x, y, sample_weight = (
        None if each is None else keras.tree.map_structure(_tensor, each) for each in (x, y, sample_weight)
    )
    return x, y, sample_weight


def _inputs(batch: Any) -> Any:
    """Return the inputs of a batch without its targets; anything but a tuple or list is inputs, as in Keras."""
    if isinstance(batch, tuple | list):
        return _batch(batch if len(batch) != 1 else (batch[0], None))[0]
    return keras.tree.map_structure(_tensor, batch)


def _tensor(value: Any) -> Any:
    if keras.ops.is_tensor(value):
        return value
    array = np.asarray(value)
    dtype = keras.config.floatx() if np.issubdtype(array.dtype, np.floating) else None
    return keras.ops.convert_to_tensor(array, dtype=dtype)


def _scale(model: Any) -> float:
    if model.compiled and model.optimizer is not None:
        return float(model.optimizer.scale_loss(1.0))
    return _SAFE_IN_FLOAT16 if model.compute_dtype == "float16" else 1.0
