"""Pruning inside the training step of the torch backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
import torch.utils.dlpack

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


def ranks(model: Any) -> Ranks:
    """Return this process; refuse several."""
    refuse_unsupported(model)
    return Alone()


def refuse_unsupported(model: Any) -> None:
    """Refuse several processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    count = torch.distributed.get_world_size()
    if count > 1:
        raise NotImplementedError(
            f"{count} processes train together (torch.distributed), which Keras on the torch backend does not "
            "distribute a model over: each process would choose its own masks. Use keras.distribution.DataParallel on "
            "the JAX backend, or a torch module with mfac_torch, or prune in a single process"
        )


def to_array(tensor: Any) -> Array:
    """Return an array that shares the tensor's memory; on a GPU only if torch computes on CUDA's default stream."""
    value = (tensor.value if isinstance(tensor, keras.Variable) else tensor).detach()
    if value.dtype not in {torch.float32, torch.float64}:
        value = value.to(torch.float32)
    if value.device.type == "cuda" and _is_on_default_stream(value.device):
        return gpu_array(value, value.get_device(), on_default_stream=True)
    return value.cpu().numpy()


def to_tensor(array: Array) -> Any:
    """Return a NumPy array, or a tensor that shares the memory of a CuPy array."""
    return array if isinstance(array, np.ndarray) else torch.utils.dlpack.from_dlpack(array)


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
    for batch in batches:
        with _evaluating(model), _without_gradients(model), torch.enable_grad():
            # Not torch.autograd.grad: it misses what a reentrant checkpoint evaluates again in its own backward pass.
            loss = loss_of(*batch) * scale
            if loss.requires_grad:
                loss.backward()
            gradients = [each.grad for each in values]
        yield [None if each is None else to_array(each.float() / scale) for each in gradients]


def loss_function(model: Any, loss_of: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that evaluates a loss in inference mode."""

    def loss(batch: Any) -> Any:
        # gradients are on, because a loss may differentiate too, such as with respect to an input
        with _evaluating(model), torch.enable_grad():
            return loss_of(*batch)

    return loss


def no_gradients() -> AbstractContextManager[None]:
    """Return a context in which nothing is recorded for gradients."""
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
    """See :class:`TrainingHooks`. The step, eager or compiled, reads masks and appends gradients to a list."""

    _end_of_data = ()  # Keras calls the train function with a batch

    def _prepare(self) -> None:
        self._masks: list[Any] = [None] * len(self._variables)  # True where pruned
        self._rows: list[Any] = []

    def _store(self, gradients: list[Any]) -> None:
        flat = [
            torch.zeros(size, device=variable.value.device)
            if gradient is None
            else gradient.detach().float().permute(axes).reshape(-1)
            for gradient, size, variable, axes in zip(gradients, self._sizes, self._variables, self._axes, strict=True)
        ]
        # torch.cat copies, which is needed: torch writes the next gradients into the same memory
        self._rows.append(self._unscaled(torch.cat(flat)))

    def _stored_rows(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return [to_array(row) for row in rows]

    def _set_mask(self, index: int, mask: npt.NDArray[np.bool_] | None) -> None:
        value = self._variables[index].value
        if mask is not None:
            self._masks[index] = torch.from_numpy(np.logical_not(mask, order="C")).to(value.device)
        elif self._model.jit_compile:  # torch.compile would compile the step once more for a mask that comes later
            self._masks[index] = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
        else:
            self._masks[index] = None

    def _mask_of(self, index: int) -> Any:
        return self._masks[index]

    def _masked(self, gradient: Any, mask: Any) -> Any:
        return gradient.masked_fill(mask, 0.0)

    def _mask_variable(self, variable: Any, mask: Any) -> None:
        with torch.no_grad():
            variable.value.masked_fill_(mask, 0.0)
