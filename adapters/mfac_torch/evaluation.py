"""Evaluation that leaves a model as it was: training flags, buffers, ``.grad`` and ``requires_grad``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from torch import nn

from mfac_torch.sharded import is_sharded

__all__ = [
    "check_not_reentrant",
    "has_distributed_hooks",
    "in_mode",
    "requiring_gradients",
    "training_flags_restored",
    "without_gradients",
]


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


def has_distributed_hooks(parameters: Iterable[torch.Tensor]) -> bool:
    """Return whether ``DistributedDataParallel`` may have hooks on the accumulation of gradients.

    They count backward passes (``static_graph``) and the parameters that these reach (``find_unused_parameters``), and
    cannot be removed for a while. So nothing may be accumulated outside training.
    """
    in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return in_group and not any(map(is_sharded, parameters))


def check_not_reentrant(loss: torch.Tensor) -> None:
    """Refuse a loss with a reentrant checkpoint, whose gradients exist only where they are accumulated."""
    found, reached = [loss.grad_fn], {loss.grad_fn}
    while found:
        node = found.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise NotImplementedError(
                "the model has a reentrant checkpoint, with which a GradSampler cannot take gradients without the "
                "hooks of DistributedDataParallel, if torch.distributed is initialized; pass use_reentrant=False to "
                "torch.utils.checkpoint.checkpoint (in transformers: gradient_checkpointing_enable("
                '{"use_reentrant": False}))'
            )
        following = [each for each, _ in node.next_functions if each not in reached]
        reached.update(following)
        found += following
