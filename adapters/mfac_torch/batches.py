"""Batches of a data loader: the arguments that a model takes from them, and the loss in its output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = [
    "check_loss",
    "check_model_takes",
    "check_scalar",
    "described",
    "loss_in_output",
    "model_arguments",
    "to_device_of",
]


def model_arguments(batch: Any, *, with_target: bool) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the arguments of the model and the target of the loss; without a target, the model gets all of a batch."""
    if isinstance(batch, Mapping):
        if with_target and "labels" not in batch:
            raise ValueError(
                f"the data loader of the GradSampler yields a {type(batch).__name__} of {', '.join(map(str, batch))}, "
                "which has no labels for loss_fn; add them under that name, or pass no loss_fn if the model returns "
                "its loss"
            )
        kwargs = {str(key): value for key, value in batch.items() if not (with_target and key == "labels")}
        return (), kwargs, batch["labels"] if with_target else None
    if isinstance(batch, tuple | list):
        if len(batch) == 3 and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping):
            return tuple(batch[0]), dict(batch[1]), batch[2]
        if len(batch) == 2:
            return ((batch[0],), {}, batch[1]) if with_target else (tuple(batch), {}, None)
    raise ValueError(
        f"the data loader of the GradSampler yields {described(batch)}; each batch must be (inputs, targets), "
        "([args...], {kwargs...}, target), or a mapping of the model's keyword arguments"
    )


def check_model_takes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, has_loss: bool) -> None:
    """Refuse a batch that the model cannot be called with."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        why, cure = "has no loss_fn, so it calls", "pass loss_fn, or batches that the model takes"
        with_what = "all of a batch to get its own loss"
        if has_loss:
            why, with_what = "calls", "the inputs of a batch of the data loader"
            cure = "pass batches that the model takes; the keys of a mapping are its keyword arguments"
        raise TypeError(
            f"the GradSampler {why} {type(model).__name__} with {with_what}, which its forward() does not accept "
            f"({error}); {cure}"
        ) from error


def loss_in_output(output: Any) -> Any:
    """Return the loss that is part of the output of a model."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple | list) and output and _is_scalar(output[0]):
        return output[0]
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss
    if isinstance(output, Mapping) and output and all(map(_is_scalar, output.values())):
        return sum(output.values())
    raise ValueError(
        f"the output of the model ({described(output)}) contains no loss for the GradSampler; add labels to the "
        "batches, pass loss_fn, or pass training=True if the model returns losses only in training mode"
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def described(value: Any) -> str:
    """Return a value's type, and the types of its items, for messages."""
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"a {type(value).__name__}"


def check_scalar(loss: Any) -> None:
    """Refuse a loss that is not a scalar tensor."""
    if not isinstance(loss, torch.Tensor):
        raise ValueError(f"loss_fn of the GradSampler returned a {type(loss).__name__}; it must return a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn of the GradSampler returned a tensor of shape {tuple(loss.shape)}; it must return a scalar, "
            "such as the mean over the batch"
        )


def check_loss(loss: Any) -> None:
    """Refuse a loss that has no gradients."""
    check_scalar(loss)
    if not loss.requires_grad:
        raise ValueError(
            "the loss of the GradSampler does not depend on the model's parameters; check model and loss_fn"
        )


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """Return a batch with its tensors on the device of a model, except for those that the user has put on another."""
    return _to_device(batch, next(parameter.device for parameter in model.parameters()))


def _to_device(value: Any, device: torch.device) -> Any:
    # Tensors on a GPU stay there. A detached copy keeps gradients out of the user's own tensors.
    if isinstance(value, torch.Tensor):
        moved = value.detach().to(device) if value.device.type == "cpu" else value.detach()
        return moved.requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(_to_device(item, device) for item in value)
    return value
