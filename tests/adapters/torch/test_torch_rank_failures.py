"""What goes wrong on several ranks: each failure is named on all of them, and leaves them as they were."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mfac_core.errors import RankError
from mfac_torch import ScheduledModifierManager
from mfac_torch.ranks import TorchRanks
from mfac_torch.sharded import local
from tests.adapters.torch.conftest import TinyTask
from tests.adapters.torch.rank_processes import RankProcesses
from tests.adapters.torch.rank_training import Run, assert_equal_runs, full_weights, train

HOW = pytest.mark.parametrize("how", ["ddp", "fsdp2"])
RECIPE = TinyTask.recipe()


def _without_ddp(group):
    run = Run(group, RECIPE, how="none")
    with pytest.raises(RankError, match=r"gradients differ between ranks.*DistributedDataParallel"):
        run.train()
    return run.manager.state_dict()["prunings"][0]["pruning_steps_done"]


def test_gradients_that_are_not_reduced_are_named(rank_processes):
    assert rank_processes.run(_without_ddp) == [0] * 4


def _one_step_behind(group):
    run = Run(group, RECIPE)
    states = {}
    run.train(stop=8, after_step=lambda step: states.update({step: run.manager.state_dict()}))
    run.manager.load_state_dict(states[7 if run.rank == 1 else 8])
    before = full_weights(run.model)
    with pytest.raises(RankError, match=r"step: 7 on rank 1, 8 on the others; .*steps_per_epoch") as caught:
        run.train(8)
    after = full_weights(run.model)
    return all(np.array_equal(before[name], after[name]) for name in before), str(caught.value)


def test_a_rank_that_is_one_step_behind_is_named(rank_processes):
    outcomes = rank_processes.run(_one_step_behind, size=3)
    assert [unchanged for unchanged, _ in outcomes] == [True] * 3
    assert len({message for _, message in outcomes}) == 1


class WithNaN(Run):
    """In step 7 gradients are NaN: all of them as a reduction leaves them, or only the shards of the last rank.

    The user clears them before the optimizer uses them, so that training goes on.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.is_bad = False
        self.optimizers[0].register_step_pre_hook(self.clear)  # after the hook that observes gradients

    def gradients(self):
        return [local(parameter.grad) for parameter in self.model.parameters()]

    def step(self, step):
        self.loss(step).backward()
        self.is_bad = step == 7
        if self.is_bad and (self.how != "fsdp2" or self.rank == self.size - 1):
            for gradient in self.gradients():
                gradient.fill_(float("nan"))
        self.optimizers[0].step()

    def clear(self, *_):
        if self.is_bad:
            for gradient in self.gradients():
                gradient.zero_()


@HOW
def test_nan_on_one_rank_is_refused_by_all(rank_processes, how):
    outcomes = rank_processes.run(train, RECIPE, {"how": how}, WithNaN, size=4)
    alone = train(None, RECIPE, {}, WithNaN)
    assert_equal_runs(outcomes, alone)
    refused = "WARNING: a gradient sample contains NaN or Inf: it is refused and counted"
    assert alone.lines.count(refused) == outcomes[0].lines.count(refused) == 1


def _uneven(group, throws):
    run = Run(group, RECIPE)
    error, text = (RuntimeError, "exhausted") if throws else (NotImplementedError, "inside Join.*same number")
    with pytest.raises(error, match=text), Join([run.module], throw_on_early_termination=throws):
        run.train(stop=9 if run.rank == 1 else 12)
    return run.manager.state_dict()["step"]


@pytest.mark.parametrize(("throws", "steps"), [(True, 9), (False, 0)], ids=["throwing", "joining"])
def test_ranks_that_run_out_of_data_one_after_the_other_are_refused(rank_processes, throws, steps):
    assert rank_processes.run(_uneven, throws, size=2) == [steps] * 2


def _other_recipe(group, how):
    run = Run(group, TinyTask.recipe(update="joint" if dist.get_rank(group) else "independent"), how=how)
    with pytest.raises(RankError, match="ranks differ in the settings; use the same recipe on all ranks"):
        run.train()
    return run.manager.state_dict()["prunings"][0]["pruning_steps_done"]


@HOW
def test_ranks_with_other_recipes_are_named(rank_processes, how):
    assert rank_processes.run(_other_recipe, how, size=2) == [0] * 2


def _die_before_pruning(group, path):
    run = Run(group, RECIPE)
    run.train(stop=5)
    run.manager.save_checkpoint(path)
    saved = run.manager.state_dict(gradient_window=False)["prunings"]
    run.train(5, 9)
    if run.rank == 1:
        TorchRanks.sum = lambda ranks, array: os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankError, match="another rank has raised an error, has ended or does not make the same calls"):
        run.train(9, 10)
    seconds = time.monotonic() - start
    now = run.manager.state_dict(gradient_window=False)["prunings"]
    return seconds, all(bool((saved[0]["masks"][name] == now[0]["masks"][name]).all()) for name in saved[0]["masks"])


def test_when_a_rank_dies_the_others_raise_and_have_not_pruned(tmp_path):
    processes = RankProcesses(2)
    try:
        (seconds, is_unchanged), dead = processes.outcomes(_die_before_pruning, str(tmp_path / "run.pt"))
    finally:
        processes.close()
    assert dead == "has ended with exit code -9"
    assert seconds < 30
    assert is_unchanged
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.pt", "run.pt.rank-1-of-2"]


def _attached_too_early(group, new_optimizer):
    model = TinyTask.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    manager.modify(model, optimizer, 5)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    if new_optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TinyTask.loss(model, TinyTask().batches[0]).backward()
    with pytest.raises(
        RuntimeError, match=r"fully_shard has replaced 0\.weight, 2\.weight after modify.*fully_shard\(model\) first"
    ):
        optimizer.step()


@pytest.mark.parametrize("new_optimizer", [False, True], ids=["dead parameters", "new optimizer"])
def test_a_recipe_that_is_attached_before_fully_shard_is_named(rank_processes, new_optimizer):
    rank_processes.run(_attached_too_early, new_optimizer, size=2)
