"""Training runs for the tests of several ranks: a user's loop, in one process or on the ranks of a group."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mfac_torch import ScheduledModifierManager
from mfac_torch.sharded import is_sharded
from tests.adapters.torch.conftest import TinyTask

__all__ = ["ACDC", "Outcome", "Run", "assert_equal_runs", "logged", "train"]

ACDC = """
pruning_modifiers:
  - !ACDCPruningModifier
    compression_sparsity: 0.75
    start_epoch: 1.0
    end_epoch: 4.0
    update_frequency: 1.0
    params: __ALL_PRUNABLE__
"""

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


class Outcome(NamedTuple):
    """The end of a run on one rank, with all weights and masks in full."""

    masks: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    sparsity: float
    regrown: dict[str, int]
    lines: list[str]


class Run:
    """A model, its optimizer and a manager, distributed over the ranks of a group, or alone without a group.

    Args:
        group: The process group, or None.
        recipe: The text of the recipe.
        how: ``ddp``, ``fsdp2``, ``hsdp`` (over two groups of replicas), or ``none``.
        optimizer: A name in ``OPTIMIZERS``, or a function of the parameters that returns an optimizer or several.
        model: A function that makes the model, the same on each rank. FSDP2 shards it as a whole, and the first layer
            of a sequence apart.
        ddp: Further arguments of ``DistributedDataParallel``.
        compiled: A backend of ``torch.compile`` for the wrapped model.
        modify: Further arguments of ``modify``.
    """

    def __init__(
        self, group, recipe, *, how="ddp", optimizer="sgd", model=TinyTask.model, ddp=None, compiled=None, **modify
    ):
        self.task = TinyTask()
        self.how = how
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), group.size())
        self.model = self.module = model()
        if group is not None and how == "ddp":
            self.module = DistributedDataParallel(self.model, process_group=group, **(ddp or {}))
        elif group is not None and how != "none":
            mesh = DeviceMesh.from_group(group, "cpu")
            if how == "hsdp":
                mesh = init_device_mesh("cpu", (2, self.size // 2), mesh_dim_names=("replicas", "shards"))
            if isinstance(self.model, nn.Sequential):
                fully_shard(self.model[0], mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        if compiled is not None:
            self.module = torch.compile(self.module, backend=compiled)
        make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        made = make(self.model.parameters())
        self.optimizers = made if isinstance(made, list) else [made]
        self.manager = ScheduledModifierManager.from_yaml(recipe)
        self.manager.modify(self.module, made, self.task.steps_per_epoch, **modify)

    def batch(self, step):
        """Return this rank's part of the batch of a step."""
        inputs, targets = self.task.batches[step % len(self.task.batches)]
        return inputs[self.rank :: self.size], targets[self.rank :: self.size]

    def loss(self, step):
        """Return the loss of this rank's part of a batch: the mean over ranks is that of the whole batch."""
        return self.task.loss(self.module, self.batch(step))

    def train(self, start=0, stop=20, *, after_step=None):
        """Make optimizer steps."""
        for step in range(start, stop):
            self.model.zero_grad()
            self.step(step)
            if after_step is not None:
                after_step(step + 1)
        return self

    def step(self, step):
        """Make a backward pass and an optimizer step."""
        self.loss(step).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def outcome(self, lines=()):
        """Return what the run has come to."""
        masks = {name: mask.numpy() for name, mask in self.manager.masks.items()}
        sparsity, regrown = self.manager.sparsity, self.manager.regrown()
        self.manager.finalize()
        return Outcome(masks, full_weights(self.model), sparsity, regrown, list(lines))


def full_weights(model):
    """Return all weights of a model as NumPy arrays; collective if they are sharded."""
    return {
        name: (each.full_tensor() if is_sharded(each) else each).detach().numpy().copy()
        for name, each in model.named_parameters()
    }


def train(group, recipe, options=None, kind=Run):
    """Train on each rank of a group, or alone; return the outcome."""
    with logged() as lines:
        return kind(group, recipe, **(options or {})).train().outcome(lines)


@contextmanager
def logged():
    """Collect the lines that both packages log."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(f"{record.levelname}: {record.getMessage()}")
    loggers = [logging.getLogger(name) for name in ("mfac_core", "mfac_torch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def assert_equal_runs(outcomes, alone, *, rtol=1e-5):
    """Assert that all ranks have ended alike, and like a single process with the whole batches."""
    for outcome in outcomes:
        assert outcome.masks.keys() == alone.masks.keys()
        for name, mask in alone.masks.items():
            np.testing.assert_array_equal(outcome.masks[name], mask, err_msg=name)
        for name, weights in alone.weights.items():
            np.testing.assert_allclose(outcome.weights[name], weights, rtol=rtol, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(outcome.weights[name], outcomes[0].weights[name], err_msg=name)
        assert outcome.sparsity == alone.sparsity
        assert outcome.regrown == {}
