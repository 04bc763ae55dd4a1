"""Evaluation that leaves a model as it was: training flags, buffers, ``.grad`` and ``requires_grad``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["in_mode", "requiring_gradients", "training_flags_restored", "without_gradients"]


@contextmanager
def training_flags_restored(model: nn.Module) -> Iterator[None]:
    """Restore the training flag of each module after a block."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model in a mode for a block; afterwards restore flags and buffers (normalization statistics)."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in (model.modules() if training else ())
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with training_flags_restored(model):
        if not training or not model.training:
            model.train(training)
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer.copy_(value)


@contextmanager
def without_gradients(leaves: Iterable[torch.Tensor], keep: Iterable[torch.Tensor]) -> Iterator[None]:
    """Remove ``.grad`` for a block, and hooks on its accumulation: optimizers that step inside the backward pass.

    Inside, only the leaves to keep get a gradient; those of others are dropped as soon as they are computed.
    """
    before, dropping = [], []
    kept = {id(leaf) for leaf in keep}
    for leaf in leaves:
        hooks = leaf._post_accumulate_grad_hooks or {}
        before.append((leaf, leaf.grad, hooks, dict(hooks)))
        leaf.grad = None
        hooks.clear()
        if leaf.requires_grad and id(leaf) not in kept:
            dropping.append(leaf.register_post_accumulate_grad_hook(_drop_gradient))
    try:
        yield
    finally:
        for handle in dropping:
            handle.remove()
        for leaf, gradient, hooks, removed in before:
            leaf.grad = gradient
            hooks.update(removed)


def _drop_gradient(leaf: torch.Tensor) -> None:
    leaf.grad = None


@contextmanager
def requiring_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen parameters require gradients for a block."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
