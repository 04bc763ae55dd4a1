"""Pruning inside the compiled training step of the JAX backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array
from mfac_keras.backends.hooks import Apply, TrainingHooks
from mfac_keras.conditions import refuse_several_processes
from mfac_keras.conversion import gpu_array
from mfac_keras.optimizers import trained_by

__all__ = ["Hooks", "loss_function", "loss_gradients", "no_gradients", "refuse_unsupported", "to_array", "to_tensor"]

_STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


def refuse_unsupported(model: Any) -> None:
    """Refuse several processes, and models that make their own train function."""
    refuse_several_processes(jax.process_count())
    if type(model).make_train_function is not keras.Model.make_train_function:
        raise NotImplementedError(
            f"{type(model).__name__} overrides make_train_function, which is not supported on the jax backend; "
            "override train_step instead"
        )


def to_array(tensor: Any) -> Array:
    """Return an array that shares the tensor's memory if NumPy can; on a GPU it is a copy."""
    value = tensor.value if isinstance(tensor, keras.Variable) else tensor
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
        gradients = gradient([each.value for each in variables], [each.value for each in others], batch)
        yield [to_array(each.astype(jnp.float32) / scale) for each in gradients]


def loss_function(model: Any, loss_of: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that evaluates a loss in inference mode."""

    def loss(values: list[Any], batch: Any) -> Any:
        state = list(zip(model.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=state, collect_losses=True):
            return loss_of(*batch)

    compiled = loss if model.run_eagerly else jax.jit(loss)
    return lambda batch: compiled([each.value for each in model.variables], batch)


def no_gradients() -> AbstractContextManager[None]:
    """Return a context in which nothing is recorded for gradients."""
    return nullcontext()


class Hooks(TrainingHooks):
    """See :class:`TrainingHooks`. Masks are an argument of the compiled step, and the tapped gradient is a result.

    JAX compiles everything else that a step reads into a constant, so a train function around the same ``train_step``
    replaces that of Keras.
    """

    _tapped_method = "stateless_apply"

    def _prepare(self) -> None:
        # read now, because variables have no values during an epoch
        distributed = keras.distribution.distribution() is not None
        self._shardings = (None, self._model._get_state_sharding_spec(), None) if distributed else None
        self._mask_shardings = [each.value.sharding if distributed else None for each in self._variables]
        self._masks = [self._placed(index, jnp.ones(each.shape, bool)) for index, each in enumerate(self._variables)]
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
        values = jnp.ones(variable.shape, bool) if mask is None else jnp.asarray(mask)
        self._masks[index] = self._placed(index, values)

    def _placed(self, index: int, mask: Any) -> Any:
        # JAX would compile the step once more for an array that is bound to a device.
        sharding = self._mask_shardings[index]
        return mask if sharding is None else jax.device_put(mask, sharding)

    def _mask_of(self, index: int) -> Any:
        return self._traced_masks[index]

    def _masked(self, gradient: Any, mask: Any) -> Any:
        return jnp.where(mask, gradient, 0)

    def _mask_variable(self, variable: Any, mask: Any) -> None:
        variable.assign(jnp.where(mask, variable.value, 0))
