import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mfac_core
import mfac_torch
from mfac_torch import GradSampler, ScheduledModifierManager, SetLearningRateModifier


class Trainer:
    """What a training framework does: fit from a checkpoint to an epoch, save everything."""

    def __init__(self, task, recipe, sampler=None, seed=0, make_optimizer=torch.optim.AdamW):
        self.task = task
        self.model = task.model(seed)
        self.optimizer = make_optimizer(self.model.parameters(), lr=0.02)
        self.manager = ScheduledModifierManager.from_yaml(
            recipe, [SetLearningRateModifier(learning_rate=0.01, start_epoch=2)]
        )
        self.manager.modify(self.model, self.optimizer, task.steps_per_epoch, grad_sampler=sampler)
        self.step = 0

    def fit(self, stop):
        self.task.train(self.model, self.optimizer, start=self.step, stop=stop)
        self.step = stop

    def save(self, path):
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "manager")}
        torch.save(parts | {"step": self.step}, path)

    def resume(self, path, order=("model", "optimizer", "manager")):
        checkpoint = torch.load(path, weights_only=True)
        for name in order:
            getattr(self, name).load_state_dict(checkpoint[name])
        self.step = checkpoint["step"]


def assert_equal_runs(one, other):
    for (name, value), expected in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert one.manager.masks.keys() == other.manager.masks.keys() != set()
    for name, mask in one.manager.masks.items():
        assert torch.equal(mask, other.manager.masks[name]), name


@pytest.mark.parametrize("stopped_at", [0, 3, 5, 6, 9, 10, 13, 19, 20])
@pytest.mark.parametrize("modifier", ["MFACPruningModifier", "MagnitudePruningModifier"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(task, tmp_path, modifier, stopped_at):
    recipe = task.recipe(modifier)
    whole = Trainer(task, recipe)
    whole.fit(22)
    killed = Trainer(task, recipe)
    killed.fit(stopped_at)
    killed.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(task, recipe, seed=1)
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.fit(22)
    assert_equal_runs(resumed, whole)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("order", [("manager", "model", "optimizer"), ("optimizer", "manager", "model")])
def test_the_parts_of_a_checkpoint_may_be_loaded_in_any_order(task, tmp_path, order):
    recipe = task.recipe(num_grads="{0.0: 3, 0.5: 5}")
    whole = Trainer(task, recipe)
    whole.fit(13)
    whole.save(tmp_path / "checkpoint.pt")
    whole.fit(22)
    resumed = Trainer(task, recipe, seed=1)
    resumed.resume(tmp_path / "checkpoint.pt", order)
    resumed.fit(22)
    assert_equal_runs(resumed, whole)


def test_a_run_with_a_sampler_resumes(task, tmp_path):
    def trainer(seed=0):
        return Trainer(
            task, task.recipe(start_epoch=0.0), GradSampler(task.batches, torch.nn.functional.mse_loss), seed
        )

    whole = trainer()
    whole.fit(7)
    whole.save(tmp_path / "checkpoint.pt")
    whole.fit(22)
    resumed = trainer(1)
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.fit(22)
    assert_equal_runs(resumed, whole)


def test_a_resumed_run_does_not_set_its_learning_rate_a_second_time(task, tmp_path):
    killed = Trainer(task, task.recipe())
    killed.fit(11)
    killed.optimizer.param_groups[0]["lr"] = 0.005
    killed.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(task, task.recipe())
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.fit(12)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.005


def test_released_masks_stay_released(task, tmp_path):
    recipe = task.recipe(leave_enabled="false", end_epoch=2.0)
    killed = Trainer(task, recipe)
    killed.fit(12)
    killed.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(task, recipe, seed=1)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.manager.masks == {}
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), killed.model.parameters(), strict=True))


def test_loading_masks_zeroes_weights_that_came_from_elsewhere(task):
    killed = Trainer(task, task.recipe())
    killed.fit(12)
    resumed = Trainer(task, task.recipe(), seed=1)
    resumed.manager.load_state_dict(killed.manager.state_dict())
    assert all(not resumed.model.get_parameter(name)[~mask].any() for name, mask in resumed.manager.masks.items())


def test_a_state_is_not_changed_by_the_run_that_goes_on(task):
    run = Trainer(task, task.recipe())
    run.fit(9)
    state = run.manager.state_dict()
    before = state["prunings"][0]["window"]["rows"].clone()
    run.fit(20)
    assert torch.equal(state["prunings"][0]["window"]["rows"], before)
    assert state["step"] == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps_per_epoch": 6}, "pass steps_per_epoch=6"),
        ({"prunings": []}, "holds 0 pruning modifiers, this recipe has 1"),
    ],
)
def test_a_state_of_another_run_is_refused(task, change, message):
    run = Trainer(task, task.recipe())
    with pytest.raises(ValueError, match=message):
        run.manager.load_state_dict(run.manager.state_dict() | change)


def test_a_state_of_another_model_is_refused(task):
    run, other = Trainer(task, task.recipe()), Trainer(task, task.recipe(params="[0.weight]"))
    with pytest.raises(ValueError, match=r"unknown: \['2\.weight'\]"):
        other.manager.load_state_dict(run.manager.state_dict())


RESUME = """
import importlib.util, sys
import torch

conftest = importlib.util.spec_from_file_location("conftest", sys.argv[1])
module = importlib.util.module_from_spec(conftest)
conftest.loader.exec_module(module)
resume = importlib.util.spec_from_file_location("resume", sys.argv[2])
tests = importlib.util.module_from_spec(resume)
resume.loader.exec_module(tests)
task = module.TinyTask()
run = tests.Trainer(task, task.recipe(), seed=3)
run.resume(sys.argv[3])
run.fit(22)
run.save(sys.argv[4])
"""


def test_a_fresh_process_ends_with_the_same_weights(task, tmp_path):
    whole = Trainer(task, task.recipe())
    whole.fit(8)
    whole.save(tmp_path / "killed.pt")
    whole.fit(22)
    here = Path(__file__).parent
    paths = [Path(package.__file__).parents[1] for package in (mfac_core, mfac_torch)]
    subprocess.run(
        [sys.executable, "-c", RESUME, here / "conftest.py", __file__, tmp_path / "killed.pt", tmp_path / "resumed.pt"],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed["model"][name], value), name
