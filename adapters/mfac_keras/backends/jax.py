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
from mfac_keras.backends.base import Apply, TrainingHooks
from mfac_keras.conversion import gpu_array

__all__ = ["Hooks", "loss_function", "loss_gradients", "no_gradients", "refuse_unsupported", "to_array", "to_tensor"]

_STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


def refuse_unsupported(model: Any) -> None:
    """Refuse ways of training in which masks or gradients would not be right.

    Args:
        model: The model.

    Raises:
        NotImplementedError: If there are several processes, or the model makes its train function itself.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"training is distributed over {jax.process_count()} processes, which is not supported: each would choose "
            "its own masks. Prune in a single process"
        )
    if type(model).make_train_function is not keras.Model.make_train_function:
        raise NotImplementedError(
            f"{type(model).__name__} overrides make_train_function, which is not supported on the jax backend; "
            "override train_step instead"
        )


def to_array(tensor: Any) -> Array:
    """Return a variable or tensor as an array that the core computes with.

    Args:
        tensor: A Keras variable or JAX array, of any float type.

    Returns:
        A NumPy array that shares memory with the tensor where it can, or a copy on the tensor's GPU where CuPy is
        installed; float32, or float64 as it was. Treat it as read-only.
    """
    value = tensor.value if isinstance(tensor, keras.Variable) else tensor
    if value.dtype not in {np.dtype(np.float32), np.dtype(np.float64)}:
        value = value.astype(jnp.float32)
    devices = value.devices()
    device = next(iter(devices))
    if device.platform == "gpu" and len(devices) == 1:
        return gpu_array(value, device.local_hardware_id or 0, on_default_stream=False)
    return np.asarray(value)


def to_tensor(array: Array) -> Any:
    """Return an array as something that a variable can be assigned.

    Args:
        array: A NumPy or CuPy array.

    Returns:
        The NumPy array itself, or a NumPy copy of the CuPy array.
    """
    # DLPack would bind the variable to a device and to memory that JAX must not donate to the next step.
    return array if isinstance(array, np.ndarray) else array.get()


def loss_gradients(
    model: Any, variables: Sequence[Any], loss_of: Callable[..., Any], batches: Iterator[Any], scale: float
) -> Iterator[list[Array]]:
    """Yield the gradients of a loss in inference mode, one per batch.

    Args:
        model: The model.
        variables: The variables to differentiate by.
        loss_of: ``loss_of(x, y, sample_weight)``, a scalar tensor.
        batches: ``(x, y, sample_weight)`` each.
        scale: What to multiply the loss by, and divide the gradients by.

    Yields:
        One array per variable, of its shape.
    """
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
    """Return a function that evaluates a loss in inference mode: compiled where the model is, and without gradients.

    Args:
        model: The model.
        loss_of: ``loss_of(x, y, sample_weight)``, a scalar tensor.

    Returns:
        A function from ``(x, y, sample_weight)`` to the loss; the model has its current values in it.
    """

    def loss(values: list[Any], batch: Any) -> Any:
        state = list(zip(model.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=state, collect_losses=True):
            return loss_of(*batch)

    compiled = loss if model.run_eagerly else jax.jit(loss)
    return lambda batch: compiled([each.value for each in model.variables], batch)


def no_gradients() -> AbstractContextManager[None]:
    """Return a context in which nothing is kept for gradients."""
    return nullcontext()


class Hooks(TrainingHooks):
    """See :class:`TrainingHooks`. Masks are an argument of the compiled step, and the tapped gradient is a result.

    What a compiled step finds elsewhere becomes a constant in it, so the train function of Keras is replaced by one
    around the same ``train_step``.
    """

    _tapped_method = "stateless_apply"

    def _prepare(self) -> None:
        # later the variables have no values to ask
        distributed = keras.distribution.distribution() is not None
        self._shardings = (None, self._model._get_state_sharding_spec(), None) if distributed else None
        self._mask_shardings = [each.value.sharding if distributed else None for each in self._variables]
        self._masks = [self._placed(place, jnp.ones(each.shape, bool)) for place, each in enumerate(self._variables)]
        self._traced_masks: Sequence[Any] = self._masks
        self._traced_row: Any = None
        self._rows: list[Any] = []
        self._flavours: dict[bool, Callable[..., Any]] = {}

    def detach(self) -> None:
        """Take the hooks away, and the compiled steps with them."""
        super().detach()
        self._drop_compiled()

    def sync(self) -> None:
        """Give the variables their current values, which are kept elsewhere during an epoch."""
        self._model.jax_state_sync()

    def _drop_compiled(self) -> None:
        self._flavours = {}

    def _train_function(self) -> Callable[..., Any]:
        if self._tapping not in self._flavours:
            self._flavours[self._tapping] = self._executing(self._compiled_step())
        return self._flavours[self._tapping]

    def _compiled_step(self) -> Callable[..., Any]:
        # A new function for each flavour: of one and the same method, JAX would compile only the first.
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

    def _executing(self, step: Callable[..., Any]) -> Callable[..., Any]:
        steps = int(self._model.steps_per_execution)

        def train_function(state: Any, iterator: Any) -> Any:
            logs = None
            try:
                for done in range(steps):
                    try:
                        data = next(iterator)
                    except StopIteration:
                        if not done:
                            # Keras would go back to the state before what callbacks have done since
                            self._model._jax_state = dict(zip(_STATE, state, strict=True))
                            raise
                        break
                    logs, state, row = step(state, self._masks, data)
                    if row is not None:
                        self._rows.append(row)
            except StopIteration:
                raise
            except BaseException:
                self.detach()
                raise
            return logs, state

        return train_function

    def _tapped(self, apply: Apply) -> Apply:
        def tapped_apply(optimizer_variables: Any, grads: Any, trainable_variables: Any) -> Any:
            if self._tapping:
                state = zip(self._optimizer.variables, optimizer_variables, strict=True)
                with keras.StatelessScope(state_mapping=list(state)):
                    self._tap_gradients(list(grads), self._optimizer_variables())
            return apply(optimizer_variables, grads, trainable_variables)

        return tapped_apply

    def _store(self, gradients: list[Any]) -> None:
        flat = [
            jnp.zeros(size) if gradient is None else gradient.astype(jnp.float32).transpose(axes).reshape(-1)
            for gradient, size, axes in zip(gradients, self._sizes, self._axes, strict=True)
        ]
        scale = self._optimizer.scale_loss(1.0)
        row = jnp.concatenate(flat)
        self._traced_row = row if isinstance(scale, float) and scale == 1.0 else row / scale

    def _taken(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return [to_array(row) for row in rows]

    def _set_mask(self, place: int, mask: npt.NDArray[np.bool_] | None) -> None:
        variable = self._variables[place]
        values = jnp.ones(variable.shape, bool) if mask is None else jnp.asarray(mask)
        self._masks[place] = self._placed(place, values)

    def _placed(self, place: int, mask: Any) -> Any:
        # An array that is bound to a device without need would have the step compiled once more.
        sharding = self._mask_shardings[place]
        return mask if sharding is None else jax.device_put(mask, sharding)

    def _mask_of(self, place: int) -> Any:
        return self._traced_masks[place]

    def _masked(self, gradient: Any, mask: Any) -> Any:
        return jnp.where(mask, gradient, 0)

    def _mask_variable(self, variable: Any, mask: Any) -> None:
        variable.assign(jnp.where(mask, variable.value, 0))
