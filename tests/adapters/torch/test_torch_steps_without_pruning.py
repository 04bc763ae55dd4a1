"""Pruning steps that ask for no more zeros than there are, in PyTorch."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from mfac_torch import GradSampler, ScheduledModifierManager


def test_the_sampler_is_not_asked_at_sparsity_0(task):
    drawn = []

    def batches():
        for batch in task.batches:
            drawn.append(manager.state_dict()["step"])
            yield batch

    manager = ScheduledModifierManager.from_yaml(task.recipe(init_sparsity=0.0, inter_func="linear"))
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager.modify(model, optimizer, 5, grad_sampler=GradSampler(batches, nn.functional.mse_loss))
    task.train(model, optimizer)
    assert drawn == [step for step in (10, 15, 20) for _ in range(4 + 4)]  # and to measure the loss on


@pytest.mark.parametrize("start_epoch", [0.0, 1.0])
def test_with_gradients_of_training_nothing_is_warned_of(task, start_epoch, caplog):
    caplog.set_level(logging.INFO)
    manager = ScheduledModifierManager.from_yaml(
        task.recipe(init_sparsity=0.0, start_epoch=start_epoch, num_grads=5 if start_epoch == 0 else 10)
    )
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager.modify(model, optimizer, 5)
    task.train(model, optimizer)
    manager.finalize(model)
    warnings = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    assert not [each for each in warnings if "gradient" in each]
    steps = [each.getMessage() for each in caplog.records if each.getMessage().startswith("pruning step at")]
    assert "sparsity 0.0000, 0 gradient samples, predicted loss increase 0 (in-sample)," in steps[0]


def test_missing_gradients_are_not_blamed_on_a_step_that_needs_none(task):
    manager = ScheduledModifierManager.from_yaml(task.recipe(init_sparsity=0.0, num_grads=9))
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    manager.modify(model, optimizer, 5)
    for _ in range(9):
        optimizer.step()
    with pytest.raises(RuntimeError, match="pruning step of epoch 2 is due and there is no gradient"):
        optimizer.step()
