import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mfac_core
import mfac_torch
from mfac_torch import (
    GradSampler,
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
    SetLearningRateModifier,
)

METHODS = {
    "M-FAC": ("MFACPruningModifier", {}),
    "M-FAC in parts": ("MFACPruningModifier", {"num_recomputations": 3}),
    "M-FAC sampled": ("MFACPruningModifier", {"start_epoch": 0.0}),
    "M-FAC sampled in parts": ("MFACPruningModifier", {"num_recomputations": 2}),
    "magnitude": ("MagnitudePruningModifier", {}),
    "from what is zero": ("MagnitudePruningModifier", {"init_sparsity": "__FROM_PARAM__"}),
    "AC/DC": ("ACDCPruningModifier", {}),
    "constant": ("ConstantPruningModifier", {}),
}
"""What prunes: the modifier, and the keys in which it differs from the shared recipe."""


def recipe_of(task, method):
    modifier, keys = METHODS[method]
    if modifier == "ConstantPruningModifier":
        return "modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__, start_epoch: 0.0, end_epoch: 4.0}\n"
    if modifier == "ACDCPruningModifier":
        return (
            "modifiers:\n  - !ACDCPruningModifier {params: __ALL_PRUNABLE__, compression_sparsity: 0.75, "
            "start_epoch: 0.0, end_epoch: 4.0, update_frequency: 1.0}\n"
        )
    return task.recipe(modifier, **keys)


def sampler_of(task, method):
    if "sampled" not in method:
        return None
    inputs, targets = (torch.cat(tensors) for tensors in zip(*task.batches, strict=True))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=8, shuffle=True)
    return GradSampler(loader, nn.functional.mse_loss)


class Trainer:
    """What a training framework does: fit from a checkpoint to an epoch, save everything."""

    def __init__(self, task, recipe, sampler=None, seed=0, make_optimizer=torch.optim.AdamW):
        self.task = task
        self.model = task.model(seed)
        with torch.no_grad():
            self.model[0].weight[:2] = 0  # for the modifiers that hold what is zero
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
            getattr(self, name).load_state_dict(checkpoint[name], **({"rng": True} if name == "manager" else {}))
        self.step = checkpoint["step"]


def assert_equal_runs(one, other):
    for (name, value), expected in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    assert one.manager.masks.keys() == other.manager.masks.keys() != set()
    for name, mask in one.manager.masks.items():
        assert torch.equal(mask, other.manager.masks[name]), name


@pytest.mark.parametrize("stopped_at", [0, 3, 5, 6, 10, 13, 19])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_one_that_was_not_interrupted(task, tmp_path, method, stopped_at):
    def trainer(seed=0):
        return Trainer(task, recipe_of(task, method), sampler_of(task, method), seed)

    whole = trainer()
    whole.fit(stopped_at)
    whole.save(tmp_path / "checkpoint.pt")
    whole.fit(19)
    resumed = trainer(seed=1)
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.fit(19)
    assert_equal_runs(resumed, whole)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.usefixtures("placement")
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


def test_a_resumed_run_does_not_set_its_learning_rate_a_second_time(task, tmp_path):
    killed = Trainer(task, task.recipe())
    killed.fit(11)
    killed.optimizer.param_groups[0]["lr"] = 0.005
    killed.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(task, task.recipe())
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.fit(12)
    assert resumed.optimizer.param_groups[0]["lr"] == 0.005


@pytest.mark.usefixtures("placement")
def test_released_masks_stay_released(task, tmp_path):
    recipe = task.recipe(leave_enabled="false", end_epoch=2.0)
    killed = Trainer(task, recipe)
    killed.fit(12)
    killed.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(task, recipe, seed=1)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.manager.masks == {}
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), killed.model.parameters(), strict=True))


@pytest.mark.usefixtures("placement")
def test_loading_masks_zeroes_weights_that_came_from_elsewhere(task):
    killed = Trainer(task, task.recipe())
    killed.fit(12)
    resumed = Trainer(task, task.recipe(), seed=1)
    resumed.manager.load_state_dict(killed.manager.state_dict())
    assert all(not resumed.model.get_parameter(name)[~mask].any() for name, mask in resumed.manager.masks.items())


@pytest.mark.usefixtures("placement")
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
        ({"steps_per_epoch": 6}, "steps_per_epoch of a pruning modifier is 5"),
        ({"prunings": []}, "contains 0 pruning modifiers, this recipe has 1"),
        ({"changes_done": []}, "contains 0 modifiers of learning rate and weight decay, this recipe has 1"),
    ],
)
def test_a_state_of_another_run_is_refused(task, change, message):
    run = Trainer(task, task.recipe())
    with pytest.raises(ValueError, match=message):
        run.manager.load_state_dict(run.manager.state_dict() | change)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(2).to_sparse(), torch.tensor(5), "5"])
def test_a_state_whose_steps_per_epoch_is_no_integer_is_refused(task, value):
    run = Trainer(task, task.recipe())
    state = run.manager.state_dict()
    state["prunings"][0]["steps_per_epoch"] = value
    with pytest.raises(ValueError, match="the state is broken: steps_per_epoch of a pruning modifier is"):
        run.manager.load_state_dict(state)


def test_a_state_of_another_model_is_refused(task):
    run, other = Trainer(task, task.recipe()), Trainer(task, task.recipe(params="[0.weight]"))
    with pytest.raises(ValueError, match=r"another recipe or model: .*masks for 2\.weight"):
        other.manager.load_state_dict(run.manager.state_dict())


def test_the_random_numbers_go_on_where_they_were(task):
    def numbers():
        from_numpy = np.random.rand(), np.random.randn()  # noqa: NPY002
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), from_numpy

    run = Trainer(task, task.recipe())
    random.gauss(0, 1), np.random.randn()  # noqa: NPY002 - each keeps a second number in hand
    state = run.manager.state_dict()
    expected = numbers()
    numbers()
    run.manager.load_state_dict(state, rng=True)
    assert numbers() == expected


def test_the_random_numbers_of_the_process_are_left_alone_unless_asked(task, tmp_path):
    run = Trainer(task, task.recipe())
    run.manager.save_checkpoint(tmp_path / "c.pt")
    state = run.manager.state_dict()
    torch.manual_seed(5)
    expected = torch.rand(1)
    for load in (
        lambda: run.manager.load_state_dict(state),
        lambda: run.manager.load_checkpoint(tmp_path / "c.pt"),
    ):
        torch.manual_seed(5)
        load()
        assert torch.rand(1) == expected
    run.manager.load_checkpoint(tmp_path / "c.pt", rng=True)
    resumed = torch.rand(1)
    run.manager.load_state_dict(state, rng=True)
    assert torch.rand(1) == resumed


@pytest.mark.usefixtures("placement")
def test_a_state_without_its_window_is_small_and_resumes_with_fresh_rows(task, tmp_path, caplog):
    recipe = task.recipe(num_grads=5)
    killed = Trainer(task, recipe)
    killed.fit(8)
    small, whole = (killed.manager.state_dict(gradient_window=window) for window in (False, True))
    assert "window" in whole["prunings"][0]
    assert "window" not in small["prunings"][0]
    resumed = Trainer(task, recipe)
    resumed.model.load_state_dict(killed.model.state_dict())
    resumed.manager.load_state_dict(small)
    resumed.step = 8
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        resumed.fit(10)
    assert "2 gradient samples" in caplog.text
    resumed.fit(20)
    assert resumed.manager.sparsity == pytest.approx(0.75)


def test_a_file_is_read_without_running_code_and_on_a_named_device(task, tmp_path):
    killed = Trainer(task, task.recipe())
    killed.fit(8)
    killed.save(tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True, map_location="cpu")

    def plain(value):
        if isinstance(value, dict):
            return all(plain(key) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(map(plain, value))
        return type(value) in {torch.Tensor, int, float, bool, str, type(None)}

    assert plain(loaded["manager"])
    resumed = Trainer(task, task.recipe(), seed=1)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert_equal_runs(resumed, killed)


@pytest.mark.parametrize("method", ["M-FAC in parts", "M-FAC sampled in parts"])
def test_what_a_logger_saves_is_a_whole_pruning_step(task, tmp_path, method):
    whole = Trainer(task, recipe_of(task, method), sampler_of(task, method))

    class Saves:
        def log_scalar(self, tag, value, step):
            if step == 10:
                whole.step = step
                whole.save(tmp_path / "checkpoint.pt")

    whole.manager.finalize()
    whole.manager.modify(
        whole.model,
        whole.optimizer,
        task.steps_per_epoch,
        loggers=Saves(),
        grad_sampler=sampler_of(task, method),
    )
    whole.fit(20)
    resumed = Trainer(task, recipe_of(task, method), sampler_of(task, method), seed=1)
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.fit(20)
    assert_equal_runs(resumed, whole)


def two_modifiers(task, first="0.weight", second="2.weight", seed=0):
    model = task.model(seed)
    manager = ScheduledModifierManager(
        [
            MagnitudePruningModifier(params=[first], final_sparsity=0.5, start_epoch=1.0, end_epoch=2.0),
            MFACPruningModifier(params=[second], final_sparsity=0.5, start_epoch=1.0, end_epoch=2.0, num_grads=3),
        ]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager.modify(model, optimizer, task.steps_per_epoch)
    return model, optimizer, manager


def test_a_state_that_fits_in_part_changes_nothing(task):
    model, optimizer, manager = two_modifiers(task)
    task.train(model, optimizer, stop=10)
    state = manager.state_dict()
    other, _, resumed = two_modifiers(task, second="2.bias", seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"another recipe or model: .*masks for 2\.weight"):
        resumed.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert resumed.masks == {}
    assert resumed.state_dict()["step"] == 0
    assert resumed.state_dict()["prunings"][0]["pruning_steps_done"] == 0


@pytest.mark.usefixtures("placement")
def test_a_state_that_fits_in_part_is_taken_in_part_when_asked_for(task, caplog):
    model, optimizer, manager = two_modifiers(task)
    task.train(model, optimizer, stop=10)
    _, _, resumed = two_modifiers(task, second="2.bias", seed=1)
    with caplog.at_level(logging.WARNING, logger="mfac_torch"):
        resumed.load_state_dict(manager.state_dict(), strict=False)
    assert list(resumed.masks) == ["0.weight"]
    assert "starts over, because its state does not fit" in caplog.text


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
for method in tests.METHODS:
    name = method.replace("/", "")
    run = tests.Trainer(task, tests.recipe_of(task, method), tests.sampler_of(task, method), seed=3)
    run.resume(f"{sys.argv[3]}/{name}.pt")
    run.fit(22)
    run.save(f"{sys.argv[3]}/{name} resumed.pt")
"""


def test_a_fresh_process_ends_with_the_same_weights(task, tmp_path):
    runs = {}
    for method in METHODS:
        runs[method.replace("/", "")] = run = Trainer(task, recipe_of(task, method), sampler_of(task, method))
        run.fit(8)
        run.save(tmp_path / f"{method.replace('/', '')}.pt")
        run.fit(22)
    here = Path(__file__).parent
    paths = [Path(package.__file__).parents[1] for package in (mfac_core, mfac_torch)]
    subprocess.run(
        [sys.executable, "-c", RESUME, here / "conftest.py", __file__, tmp_path],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    for method, run in runs.items():
        resumed = torch.load(tmp_path / f"{method} resumed.pt", weights_only=True)
        for name, value in run.model.state_dict().items():
            assert torch.equal(resumed["model"][name], value), (method, name)
