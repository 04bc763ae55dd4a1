"""Pruning inside the compiled training step of the JAX backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from mfac_core.backends import Array
from mfac_core.ranks import Alone, Ranks
from mfac_core.weight_names import join_names
from mfac_keras.backends.hooks import Apply, TrainingHooks
from mfac_keras.backends.jax_ranks import jax_ranks
from mfac_keras.conversion import gpu_array
from mfac_keras.optimizers import trained_by

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

_STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


def ranks(model: Any) -> Ranks:
    """Return all processes of JAX; refuse those that do not train the same model, or have only parts of it."""
    count = jax.process_count()
    if count == 1:
        return Alone()
    distribution = keras.distribution.distribution()
    devices = [] if distribution is None else distribution.device_mesh.backend_mesh.devices.flat
    if len({device.process_index for device in devices}) != count:
        found = "no distribution is set" if distribution is None else f"{distribution} leaves some of them out"
        raise NotImplementedError(
            f"JAX runs in {count} processes, but {found}: each of them would train and prune a model of its own. Call "
            "keras.distribution.set_distribution(keras.distribution.DataParallel()) before the model is made"
        )
    sharded = [each.path for each in model.variables if not each.value.is_fully_replicated]
    if sharded:
        raise NotImplementedError(
            f"{type(distribution).__name__} shards {join_names(sharded)}, and JAX runs in {count} processes: pruning "
            "over several processes needs all weights in each of them. Use keras.distribution.DataParallel, or prune "
            "in a single process, where ModelParallel is supported"
        )
    return jax_ranks()


def refuse_unsupported(model: Any) -> None:
    """Refuse models that make their own train function."""
    if type(model).make_train_function is not keras.Model.make_train_function:
        raise NotImplementedError(
            f"{type(model).__name__} overrides make_train_function, which is not supported on the jax backend; "
            "override train_step instead"
        )


def to_array(tensor: Any) -> Array:
    """Return an array that shares the tensor's memory if NumPy can; on a GPU it is a copy."""
    value = _local(tensor.value if isinstance(tensor, keras.Variable) else tensor)
    if value.dtype not in {np.dtype(np.float32), np.dtype(np.float64)}:
        value = value.astype(jnp.float32)
    devices = value.devices()
    device = next(iter(devices))
    if device.platform == "gpu" and len(devices) == 1:
        return gpu_array(value, device.local_hardware_id or 0, on_default_stream=False)
    return np.asarray(value)


def to_tensor(array: Array) -> Any:
    """Return a NumPy array."""
    # DLPack would bind the variable to a device and to memory that JAX must not donate to the next step.
    return array if isinstance(array, np.ndarray) else array.get()


def of_all_ranks(value: Any, variable: Any) -> Any:
    """Return a value as an array over the devices of all processes."""
    # Keras would compare the values of all processes in a collective, which hangs if one of them has failed.
    sharding = variable.value.sharding
    return value if sharding.is_fully_addressable else _placed(np.asarray(value, variable.value.dtype), sharding)


@contextmanager
def local_values(model: Any) -> Iterator[None]:
    """Give the variables values on a device of this process, if they are spread over those of all processes."""
    values = [each.value for each in model.variables]
    if all(value.is_fully_addressable for value in values):
        yield
        return
    with keras.StatelessScope(state_mapping=list(zip(model.variables, map(_local, values), strict=True))):
        yield


def loss_gradients(
    model: Any, variables: Sequence[Any], loss_of: Callable[..., Any], batches: Iterator[Any], scale: float
) -> Iterator[list[Array]]:
    """Yield the gradients of a loss in inference mode, one per batch."""
    chosen = {id(variable) for variable in variables}
    others = [variable for variable in model.variables if id(variable) not in chosen]

    def loss(values: list[Any], of_others: list[Any], batch: Any) -> Any:
        state = [*zip(variables, values, strict=True), *zip(others, of_others, strict=True)]
        with keras.StatelessScope(state_mapping=state, collect_losses=True):
            return loss_of(*batch) * scale

    gradient = jax.jit(jax.grad(loss))
    for batch in batches:
        gradients = gradient(_local_values(variables), _local_values(others), batch)
        yield [to_array(each.astype(jnp.float32) / scale) for each in gradients]


def loss_function(model: Any, loss_of: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that evaluates a loss in inference mode."""

    def loss(values: list[Any], batch: Any) -> Any:
        state = list(zip(model.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=state, collect_losses=True):
            return loss_of(*batch)

    compiled = loss if model.run_eagerly else jax.jit(loss)
    return lambda batch: compiled(_local_values(model.variables), batch)


def no_gradients() -> AbstractContextManager[None]:
    """Return a context in which nothing is recorded for gradients."""
    return nullcontext()


def _local(value: Any) -> Any:
    """Return an array that is replicated over the devices of all processes as one on a device of this process."""
    return value if value.is_fully_addressable else value.addressable_data(0)


def _local_values(variables: Iterable[Any]) -> list[Any]:
    return [_local(each.value) for each in variables]


def _placed(array: Any, sharding: Any) -> Any:
    """Return an array, which is the same in each process, on the devices of all of them; nothing is sent."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


class Hooks(TrainingHooks):
    """See :class:`TrainingHooks`. Masks are an argument of the compiled step, and the tapped gradient is a result.

    JAX compiles everything else that a step reads into a constant, so a train function around the same ``train_step``
    replaces that of Keras.
    """

    _tapped_method = "stateless_apply"

    def _prepare(self) -> None:
        # read now, because variables have no values during an epoch
        distribution = keras.distribution.distribution()
        if distribution is None:
            self._shardings = None
        else:
            # each process needs the whole row
            everywhere = NamedSharding(distribution.device_mesh.backend_mesh, PartitionSpec())
            of_row = everywhere if jax.process_count() > 1 else None
            self._shardings = (None, self._model._get_state_sharding_spec(), of_row)
        self._mask_shardings = [None if distribution is None else each.value.sharding for each in self._variables]
        self._masks = [
            self._placed_mask(index, np.ones(each.shape, bool)) for index, each in enumerate(self._variables)
        ]
        self._traced_masks: Sequence[Any] = self._masks
        self._traced_row: Any = None
        self._rows: list[Any] = []

    def sync(self) -> None:
        """Give the variables their current values, which the training state holds during an epoch."""
        self._model.jax_state_sync()

    def _compiled_step(self) -> Callable[..., Any]:
        # A new function each time: JAX would compile the same function only once, with or without a tap.
        def step(state: Any, masks: Any, data: Any) -> tuple[Any, Any, Any]:
            self._traced_masks, self._traced_row = masks, None
            try:
                logs, state = self._model.train_step(state, data)
                return logs, state, self._traced_row
            finally:
                self._traced_masks, self._traced_row = self._masks, None

        if self._model.run_eagerly or not self._model.jit_compile:
            return step
        compiled: Callable[..., Any] = jax.jit(step, donate_argnums=0, out_shardings=self._shardings)
        return compiled

    def _make_train_function(self) -> Callable[..., Any]:
        step = self._compiled_step()
        steps = int(self._model.steps_per_execution)

        def train_function(state: Any, iterator: Any) -> Any:
            logs = None
            for done in range(steps):
                try:
                    data = next(iterator)
                except StopIteration:
                    if not done:
                        # Keras would return to a state from before the last changes by callbacks
                        self._model._jax_state = dict(zip(_STATE, state, strict=True))
                        raise
                    break
                logs, state, row = step(state, self._masks, data)
                if row is not None:
                    self._rows.append(row)
            return logs, state

        return train_function

    def _tapped(self, apply: Apply) -> Apply:
        def tapped_apply(optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
            if self._tapping:
                state = zip(self._optimizer.variables, optimizer_variables, strict=True)
                with keras.StatelessScope(state_mapping=list(state)):
                    self._tap_gradients(list(grads), trained_by(self._optimizer))
            return apply(optimizer_variables, grads, trainable_variables)

        return tapped_apply

    def _store(self, gradients: list[Any]) -> None:
        flat = [
            jnp.zeros(size) if gradient is None else gradient.astype(jnp.float32).transpose(axes).reshape(-1)
            for gradient, size, axes in zip(gradients, self._sizes, self._axes, strict=True)
        ]
        self._traced_row = self._unscaled(jnp.concatenate(flat))

    def _stored_rows(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return [to_array(row) for row in rows]

    def _set_mask(self, index: int, mask: npt.NDArray[np.bool_] | None) -> None:
        variable = self._variables[index]
        self._masks[index] = self._placed_mask(index, np.ones(variable.shape, bool) if mask is None else mask)

    def _placed_mask(self, index: int, mask: npt.NDArray[np.bool_]) -> Any:
        # JAX would compile the step once more for an array that is bound to a device.
        sharding = self._mask_shardings[index]
        return jnp.asarray(mask) if sharding is None else _placed(mask, sharding)

    def _mask_of(self, index: int) -> Any:
        return self._traced_masks[index]

    def _masked(self, gradient: Any, mask: Any) -> Any:
        return jnp.where(mask, gradient, 0)

    def _mask_variable(self, variable: Any, mask: Any) -> None:
        variable.assign(jnp.where(mask, variable.value, 0))
