"""Pruning inside the training step of the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
import torch.utils.dlpack

from mfac_core.backends import Array
from mfac_keras.backends.base import TrainingHooks
from mfac_keras.conversion import gpu_array

__all__ = ["Hooks", "loss_function", "loss_gradients", "no_gradients", "refuse_unsupported", "to_array", "to_tensor"]


def refuse_unsupported(model: Any) -> None:
    """Refuse ways of training in which masks or gradients would not be right.

    Args:
        model: The model.

    Raises:
        NotImplementedError: If training is distributed over several processes.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            raise NotImplementedError(
                f"training is distributed over {world_size} processes, which is not supported: each would choose "
                "its own masks. Prune in a single process"
            )


def to_array(tensor: Any) -> Array:
    """Return a variable or tensor as an array that the core computes with.

    Args:
        tensor: A Keras variable or torch tensor, of any float type.

    Returns:
        A NumPy array that shares memory with the tensor, or a CuPy array that does, on the tensor's GPU, where CuPy is
        installed; float32, or float64 as it was. Treat it as read-only.
    """
    value = (tensor.value if isinstance(tensor, keras.Variable) else tensor).detach()
    if value.dtype not in {torch.float32, torch.float64}:
        value = value.to(torch.float32)
    if value.device.type == "cuda" and _is_on_default_stream(value.device):
        return gpu_array(value, value.get_device(), on_default_stream=True)
    return value.cpu().numpy()


def to_tensor(array: Array) -> Any:
    """Return an array as something that a variable can be assigned.

    Args:
        array: A NumPy or CuPy array.

    Returns:
        The NumPy array itself, or a tensor that shares the memory of the CuPy array.
    """
    return array if isinstance(array, np.ndarray) else torch.utils.dlpack.from_dlpack(array)


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
        One array per variable, of its shape; ``None`` where the loss does not depend on it.
    """
    values = [variable.value for variable in variables]
    for batch in batches:
        with _evaluating(model), _without_gradients(model), torch.enable_grad():
            # Not torch.autograd.grad, which sees nothing of a layer that is evaluated again in its own backward pass.
            loss = loss_of(*batch) * scale
            if loss.requires_grad:
                loss.backward()
            gradients = [each.grad for each in values]
        yield [None if each is None else to_array(each.float() / scale) for each in gradients]


def loss_function(model: Any, loss_of: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that evaluates a loss in inference mode: compiled where the model is, and without gradients.

    Args:
        model: The model.
        loss_of: ``loss_of(x, y, sample_weight)``, a scalar tensor.

    Returns:
        A function from ``(x, y, sample_weight)`` to the loss; the model has its current values in it.
    """

    def loss(batch: Any) -> Any:
        # gradients are on, because a loss may itself differentiate, by an input for example
        with _evaluating(model), torch.enable_grad():
            return loss_of(*batch)

    return loss


def no_gradients() -> AbstractContextManager[None]:
    """Return a context in which nothing is kept for gradients."""
    return torch.no_grad()


def _is_on_default_stream(device: torch.device) -> bool:
    return bool(torch.cuda.current_stream(device) == torch.cuda.default_stream(device))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _without_gradients(model: Any) -> Iterator[None]:
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


class Hooks(TrainingHooks):
    """See :class:`TrainingHooks`. Masks and gradients are tensors that the step, eager or compiled, reads and makes."""

    def _prepare(self) -> None:
        self._masks: list[Any] = [None] * len(self._variables)  # True where pruned
        self._rows: list[Any] = []
        self._drop_compiled()

    def _drop_compiled(self) -> None:
        type(self._model).make_train_function(self._model, force=True)
        self._plain = self._model.train_function

    def _train_function(self) -> Callable[..., Any]:
        return self._guarded

    def _guarded(self, data: Any) -> Any:
        try:
            return self._plain(data)
        except BaseException:
            self.detach()
            raise

    def _store(self, gradients: list[Any]) -> None:
        scale = self._optimizer.scale_loss(1.0)
        flat = [
            torch.zeros(size, device=variable.value.device)
            if gradient is None
            else gradient.detach().float().permute(axes).reshape(-1)
            for gradient, size, variable, axes in zip(gradients, self._sizes, self._variables, self._axes, strict=True)
        ]
        # a copy, because torch writes the next gradients into the same memory
        row = torch.cat(flat)
        self._rows.append(row if isinstance(scale, float) and scale == 1.0 else row / scale)

    def _taken(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return [to_array(row) for row in rows]

    def _set_mask(self, place: int, mask: npt.NDArray[np.bool_] | None) -> None:
        value = self._variables[place].value
        if mask is not None:
            self._masks[place] = torch.from_numpy(np.logical_not(mask, order="C")).to(value.device)
        elif self._model.jit_compile:  # torch.compile would compile the step once more for a mask that comes later
            self._masks[place] = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
        else:
            self._masks[place] = None

    def _mask_of(self, place: int) -> Any:
        return self._masks[place]

    def _masked(self, gradient: Any, mask: Any) -> Any:
        return gradient.masked_fill(mask, 0.0)

    def _mask_variable(self, variable: Any, mask: Any) -> None:
        with torch.no_grad():
            variable.value.masked_fill_(mask, 0.0)
