"""What a manager reports, resumes and finalizes on several ranks, replicated or sharded."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mfac_torch import GradSampler, ScheduledModifierManager, apply_masks
from mfac_torch.sharded import is_sharded, local
from tests.adapters.torch.conftest import TinyTask
from tests.adapters.torch.rank_training import Run, assert_equal_runs, full_weights, logged, train

HOW = pytest.mark.parametrize("how", ["ddp", "fsdp2"])
RECIPE = TinyTask.recipe()


def _resumed(group, how):
    """Stop between two pruning steps, and go on with a new model, optimizer and manager."""
    run = Run(group, RECIPE, how=how, optimizer="adamw").train(stop=12)
    states = run.model.state_dict(), run.optimizers[0].state_dict(), run.manager.state_dict()
    states = copy.deepcopy(states)
    resumed = Run(group, RECIPE, how=how, optimizer="adamw")
    for part, state in zip((resumed.model, resumed.optimizers[0], resumed.manager), states, strict=True):
        part.load_state_dict(state)
    return resumed.train(12).outcome()


@HOW
def test_a_run_resumes_on_each_rank_from_its_own_state(rank_processes, how):
    outcomes = rank_processes.run(_resumed, how, size=2)
    assert_equal_runs(outcomes, train(None, RECIPE, {"optimizer": "adamw"}))


def _regrown(group, how):
    """Write to pruned weights between two steps, after an evaluation, and finalize with and without a hold."""
    run = Run(group, RECIPE, how=how).train(stop=10)
    reports = []
    with logged() as lines:
        _write_to_all(run)
        reports.append((run.manager.sparsity < 0.4, sum(run.manager.regrown().values()) > 0))
        run.train(10, 11)
        reports.append((run.manager.sparsity > 0.4, run.manager.regrown() == {}))
        _write_to_all(run)
        run.manager.finalize(hold=True)
        reports.append((run.manager.sparsity > 0.4, run.manager.regrown() == {}))
    return reports, lines


def _write_to_all(run):
    with torch.no_grad():
        run.module(run.batch(0)[0])  # leaves full parameters in the place of some DTensors
    for parameter in run.optimizers[0].param_groups[0]["params"]:
        with torch.no_grad():
            parameter.add_(1.0)


@pytest.mark.parametrize(("how", "ranks_that_warn"), [("ddp", 1), ("fsdp2", 2)])
def test_weights_that_other_code_writes_are_seen_and_set_to_zero(rank_processes, how, ranks_that_warn):
    outcomes = rank_processes.run(_regrown, how, size=2)
    for reports, _ in outcomes:
        assert reports == [(True, True)] * 3
    warnings = [[line for line in lines if "pruned weights are not zero" in line] for _, lines in outcomes]
    assert [len(each) for each in warnings] == [2] * ranks_that_warn + [0] * (2 - ranks_that_warn)


def _average(group):
    run = Run(group, RECIPE, how="fsdp2").train(stop=10)
    for parameter in run.model.parameters():
        with torch.no_grad():
            parameter.add_(1.0)
    changed = apply_masks(run.model, run.manager)
    full = full_weights(run.model)
    masks = run.manager.masks
    assert all(mask.shape == full[name].shape for name, mask in masks.items())
    left = {name: int((full[name][~mask.numpy()] != 0).sum()) for name, mask in masks.items()}
    return changed, sum(int((~mask).sum()) for mask in masks.values()), left


def test_masks_are_applied_to_the_shards_of_each_rank(rank_processes):
    outcomes = rank_processes.run(_average, size=4)
    for _, num_pruned, left in outcomes:
        assert left == {"0.weight": 0, "2.weight": 0}
        assert sum(changed for changed, _, _ in outcomes) == num_pruned > 0


class _Logger:
    def __init__(self):
        self.values = []

    def log_scalar(self, tag, value, step):
        self.values.append((tag, value, step))


def _to_loggers(group):
    logger = _Logger()
    Run(group, RECIPE, loggers=logger).train(stop=10)
    return logger.values


def test_scalars_are_logged_once(rank_processes):
    first, second = rank_processes.run(_to_loggers, size=2)
    assert [step for _, _, step in first] == [5, 5, 10, 10]
    assert second == []


@pytest.mark.parametrize("method", ["modify", "apply"])
def test_a_single_process_may_be_sharded(one_process, method):
    text = TinyTask.recipe()
    whole, sharded = TinyTask.model(), TinyTask.model()
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    inputs, logger = TinyTask().batches[0][0], _Logger()
    for model in (whole, sharded):
        manager = ScheduledModifierManager.from_yaml(text)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with torch.no_grad():
            model(inputs)  # leaves full parameters in the place of those of the last layer
        if method == "apply":
            manager.apply(model, loggers=logger, grad_sampler=GradSampler(TinyTask().batches, nn.functional.mse_loss))
            continue
        manager.modify(model, optimizer, 5)
        TinyTask().train(model, optimizer)
        manager.finalize()
    assert all(is_sharded(parameter) for parameter in sharded.parameters())
    for name, parameter in sharded.named_parameters():
        np.testing.assert_allclose(local(parameter).numpy(), whole.get_parameter(name).detach().numpy(), atol=1e-6)
    assert int((local(sharded[0].weight) == 0).sum()) == 36
    with torch.no_grad():
        np.testing.assert_allclose(sharded(inputs), whole(inputs), atol=1e-6)
    losses = [value for tag, value, _ in logger.values if "loss" in tag]
    assert losses[: len(losses) // 2] == pytest.approx(losses[len(losses) // 2 :], rel=1e-4)
