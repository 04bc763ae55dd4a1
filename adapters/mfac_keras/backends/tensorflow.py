"""Pruning inside the compiled training step of the TensorFlow backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mfac_core.backends import Array
from mfac_core.ranks import Alone, Ranks
from mfac_keras.backends.hooks import TrainingHooks
from mfac_keras.conversion import gpu_array

__all__ = [
    "Hooks",
    "local_values",
    "loss_function",
    "loss_gradients",
    "no_gradients",
    "of_all_ranks",
    "ranks",
    "refuse_unsupported",
    "to_array",
    "to_tensor",
]

_STRATEGIES = (tf.distribute.MirroredStrategy, tf.distribute.OneDeviceStrategy)


def ranks(model: Any) -> Ranks:
    """Return this process; refuse several, which Keras 3 cannot train in."""
    if isinstance(model.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise NotImplementedError(
            "the model is under MultiWorkerMirroredStrategy, but Keras 3 cannot train under it: fit fails in several "
            "processes, with or without pruning. Use keras.distribution.DataParallel on the JAX backend, or "
            "tf.distribute.MirroredStrategy in a single process"
        )
    return Alone()


def refuse_unsupported(model: Any) -> None:
    """Refuse strategies other than ``MirroredStrategy``."""
    ranks(model)
    strategy = model.distribute_strategy
    is_default = strategy is tf.distribute.get_strategy() and not tf.distribute.has_strategy()
    if not is_default and not isinstance(strategy, _STRATEGIES):
        raise NotImplementedError(
            f"training under {type(strategy).__name__} is not supported; use tf.distribute.MirroredStrategy, or none"
        )


def to_array(tensor: Any) -> Array:
    """Return an array that shares memory with a snapshot of the values; on a GPU it is a copy."""
    value = tensor.value if isinstance(tensor, keras.Variable) else tensor
    if isinstance(value, tf.Variable):
        value = value.read_value()
    if value.dtype not in {tf.float32, tf.float64}:
        value = tf.cast(value, tf.float32)
    device = tf.DeviceSpec.from_string(value.device)
    if device.device_type == "GPU":
        return gpu_array(value, device.device_index or 0, on_default_stream=False)
    return np.from_dlpack(value)


def to_tensor(array: Array) -> Any:
    """Return a NumPy array."""
    # DLPack gives TensorFlow no transposed arrays, and most kernels are transposed here.
    return array if isinstance(array, np.ndarray) else array.get()


def of_all_ranks(value: Any, variable: Any) -> Any:
    """Return the value as it is: there is one process."""
    return value


def local_values(model: Any) -> AbstractContextManager[None]:
    """Return a context that changes nothing: there is one process."""
    return nullcontext()


def loss_gradients(
    model: Any, variables: Sequence[Any], loss_of: Callable[..., Any], batches: Iterator[Any], scale: float
) -> Iterator[list[Array]]:
    """Yield the gradients of a loss in inference mode, one per batch."""
    values = [variable.value for variable in variables]

    def scaled_gradients(batch: Any) -> list[Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = loss_of(*batch) * scale
        return [None if each is None else tf.convert_to_tensor(each) for each in tape.gradient(loss, values)]

    compiled = scaled_gradients if model.run_eagerly else tf.function(scaled_gradients, reduce_retracing=True)
    for batch in batches:
        yield [None if each is None else to_array(each / scale) for each in compiled(batch)]


def loss_function(model: Any, loss_of: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that evaluates a loss in inference mode."""

    def loss(batch: Any) -> Any:
        return loss_of(*batch)

    return loss if model.run_eagerly else tf.function(loss, reduce_retracing=True)


def no_gradients() -> AbstractContextManager[None]:
    """Return a context in which nothing is recorded for gradients."""
    return nullcontext()


class Hooks(TrainingHooks):
    """See :class:`TrainingHooks`. The compiled step reads masks from variables and writes gradients into one."""

    _end_of_data = (StopIteration, tf.errors.OutOfRangeError)

    def _prepare(self) -> None:
        self._steps = int(self._model.steps_per_execution)
        self._tap_variable: Any = None
        self._count: Any = None
        with self._model.distribute_strategy.scope():
            self._masks = [
                tf.Variable(tf.ones(each.shape, each.dtype), trainable=False, dtype=each.dtype)
                for each in self._variables
            ]

    def _make_train_function(self) -> Callable[..., Any]:
        if self._tapping and self._tap_variable is None:
            self._make_tap()
        return super()._make_train_function()

    def _make_tap(self) -> None:
        size = sum(self._sizes)
        with self._model.distribute_strategy.scope():
            # Each replica writes its own share, and reading sums them up: the gradient of the whole batch.
            self._tap_variable = tf.Variable(
                tf.zeros([size] if self._steps == 1 else [self._steps, size]),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
            self._count = tf.Variable(0, trainable=False, dtype=tf.int64)

    def _store(self, gradients: list[Any]) -> None:
        flat = [
            tf.zeros([size])
            if gradient is None
            else tf.reshape(tf.transpose(tf.cast(tf.convert_to_tensor(gradient), tf.float32), axes), [-1])
            for gradient, size, axes in zip(gradients, self._sizes, self._axes, strict=True)
        ]
        row = self._unscaled(tf.concat(flat, 0))
        if self._steps == 1:
            self._tap_variable.assign(row)
        else:
            self._tap_variable.scatter_nd_update([[self._count % self._steps]], [row])
            self._count.assign_add(1)

    def _stored_rows(self) -> list[Any]:
        rows = to_array(self._tap_variable)
        if self._steps == 1:
            return [rows]
        count = int(self._count.numpy())
        self._count.assign(0)
        return list(rows[: min(count, self._steps)])

    def _set_mask(self, index: int, mask: npt.NDArray[np.bool_] | None) -> None:
        held = self._masks[index]
        held.assign(tf.ones_like(held) if mask is None else tf.cast(mask, held.dtype))

    def _mask_of(self, index: int) -> Any:
        return self._masks[index]

    # multiply_no_nan: some optimizers (Ftrl) divide zero by zero where all of their state is zero

    def _masked(self, gradient: Any, mask: Any) -> Any:
        if isinstance(gradient, tf.IndexedSlices):
            values = tf.math.multiply_no_nan(
                gradient.values, tf.cast(tf.gather(mask, gradient.indices), gradient.values.dtype)
            )
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return tf.math.multiply_no_nan(gradient, tf.cast(mask, gradient.dtype))

    def _mask_variable(self, variable: Any, mask: Any) -> None:
        variable.assign(tf.math.multiply_no_nan(variable.value, mask))
