"""Models on a GPU, simulated by two virtual ones; the fixture ``placement`` runs other tests there, too."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import mfac_core
from mfac_core import prune
from mfac_core.backends import Device, device_of, lookup, resolve_device
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.errors import DeviceError
from mfac_torch import GradSampler, MFACPruningModifier, ScheduledModifierManager, conversion, prune_one_shot
from tests.adapters.torch.virtual_gpus import OnFirstGpu, OnSecondGpu

RECIPES = {
    "layers": {},
    "globally": {"global_sparsity": True, "damp": "auto", "update": "joint"},
    "parts": {"num_recomputations": 2, "num_grads": 2},
    "N:M": {"mask_type": '"2:4"', "params": "[2.weight]", "final_sparsity": 0.5},
    "few rows": {"fisher_block_size": 3, "num_grads": 5},
    "one block": {"fisher_block_size": "null"},
}


def trained(task, *, until=20, state=None, **keys):
    """Return a model and its manager after training, begun anew or resumed from (step, model, optimizer, manager)."""
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager.from_yaml(task.recipe(**keys))
    optimizer = manager.modify(model, optimizer, task.steps_per_epoch)
    start = 0
    if state:
        start, *parts = state
        for part, saved in zip((model, optimizer, manager), parts, strict=True):
            part.load_state_dict(saved)
    task.train(model, optimizer, start=start, stop=until)
    return model, optimizer, manager


def assert_same(found, expected):
    model, manager = found[0], found[2]
    assert manager.masks.keys() == expected[2].masks.keys() != set()
    for name, mask in manager.masks.items():
        assert torch.equal(mask, expected[2].masks[name]), name
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[0].state_dict()[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("keys", RECIPES.values(), ids=RECIPES)
def test_masks_are_those_of_the_cpu(task, request, keys):
    expected = trained(task, **keys)
    gpus = request.getfixturevalue("gpus")
    assert_same(trained(task, **keys), expected)
    assert gpus.worked == {"cuda:0"}


def test_weights_and_gradients_stay_on_their_gpu(task, gpus):
    trained(task, damp="auto", fisher_block_size=8)
    blocks = 72 // 8
    # the dampings, one number for each block
    assert max(size for dtype, size in gpus.to_gpus if dtype.kind == "f") <= blocks
    # the first rows of each of the four pruning steps, which are compared with each other
    assert sum(size > blocks for dtype, size in gpus.to_host if dtype.kind == "f") == 4


def test_a_gradient_may_be_overwritten_once_it_is_observed(gpus):
    model = nn.Linear(4, 1, bias=False)  # a single parameter, whose gradient needs no gathering
    manager = ScheduledModifierManager(
        [MFACPruningModifier(init_sparsity=0.5, final_sparsity=0.75, start_epoch=3.0, end_epoch=4.0, num_grads=3)]
    )
    optimizer = manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    model.weight.grad = torch.full((1, 4), 3.0)
    optimizer.step()
    model.weight.grad.fill_(-1.0)
    assert manager.state_dict()["prunings"][0]["window"]["rows"].tolist() == [[3, 3, 3, 3]]


def test_a_model_that_moves_to_a_gpu_after_modify_is_pruned_as_before(task, gpus, monkeypatch):
    monkeypatch.setattr(conversion, "_is_on_cpu", lambda tensor: True)
    expected = trained(task)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    optimizer = manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=7)
    monkeypatch.setattr(conversion, "_is_on_cpu", lambda tensor: False)
    task.train(model, optimizer, start=7)
    assert_same((model, optimizer, manager), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_precision_are_pruned_on_their_gpu(task, request, dtype):
    def pruned():
        model = task.model().to(dtype)
        batches = [(x.to(dtype), y.to(dtype)) for x, y in task.batches]
        prune_one_shot(model, batches, nn.functional.mse_loss, sparsity=0.5, num_grads=5)
        return model.state_dict()

    expected = pruned()
    request.getfixturevalue("gpus")
    for name, value in pruned().items():
        assert value.dtype == dtype
        assert torch.equal(value == 0, expected[name] == 0)
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2)


# --- devices by name


@pytest.mark.parametrize("window", ["auto", "cpu", "torch:cpu"])
def test_torch_computes_on_the_cpu_where_a_recipe_asks_for_it(task, window):
    expected = trained(task)
    found = trained(task, available_gpus='["torch:cpu"]', grads_device=f'"{window}"')
    assert_same(found, expected)


def test_plain_names_mean_the_devices_of_torch(task, gpus):
    assert resolve_device("cuda:0", "torch") == resolve_device("torch:cuda") == Device(gpus, "cuda:0")
    assert resolve_device("cpu", "torch").is_host
    with pytest.raises(DeviceError, match=r"cuda:7.*torch:cuda:0"):
        trained(task, available_gpus='["cuda:7"]')


def test_a_model_on_the_cpu_may_be_pruned_on_the_gpus_of_torch(task, gpus, monkeypatch):
    class Other(NumpyBackend):  # of a library that names its GPUs as torch does, and comes first
        name = "other"

        def devices(self):
            return ("cuda:0", "cuda:1")

    monkeypatch.setattr(lookup, "_registered", {"other": Other(), "torch": gpus})
    monkeypatch.setattr(conversion, "_is_on_cpu", lambda tensor: True)
    expected = trained(task)
    assert gpus.worked == set()
    assert_same(trained(task, available_gpus='["cuda:1"]'), expected)
    assert gpus.worked == {"cuda:1"}


@pytest.mark.parametrize("window", ["auto", "cpu", "cuda:1"])
def test_two_gpus_share_the_blocks(task, request, window):
    expected = trained(task, fisher_block_size=8)
    gpus = request.getfixturevalue("gpus")
    gpus.group_bytes = lambda device, total: 1  # each block is a group
    keys = {"available_gpus": '["cuda:0", "cuda:1"]', "grads_device": f'"{window}"', "fisher_block_size": 8}
    assert_same(trained(task, **keys), expected)
    assert gpus.worked == {"cuda:0", "cuda:1"}


def test_what_the_workers_have_written_on_the_first_gpu_is_waited_for_in_the_end(gpus):
    """The main thread may work on a stream of its own, which is not ordered with those of the workers."""
    gpus.group_bytes = lambda device, total: 1
    rows = np.random.default_rng(0).standard_normal((4, 60)).astype(np.float32)
    mfac_core.inverse_fisher(rows, block_size=5, devices=["torch:cuda:0", "torch:cuda:1"]).diagonal()
    workers = {thread for thread, _ in gpus.waited} - {threading.main_thread()}
    assert len(workers) == 2
    after = gpus.waited[max(i for i, (thread, _) in enumerate(gpus.waited) if thread in workers) + 1 :]
    assert after[0] == (threading.main_thread(), "cuda:0")


def test_arrays_on_several_gpus_are_pruned_together(gpus):
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(40).astype(np.float32) for name in "ab"}
    gradients = {name: rng.standard_normal((6, 40)).astype(np.float32) for name in "ab"}
    place = {"a": "cuda:0", "b": "cuda:1"}
    there = [{name: gpus.asarray(x, place[name]) for name, x in each.items()} for each in (weights, gradients)]
    options = {"sparsity": 0.5, "block_size": 8, "num_recomputations": 1}
    found, expected = prune(*there, **options), prune(weights, gradients, **options)
    for name in "ab":
        assert device_of(found.weights[name]).name == place[name]
        np.testing.assert_array_equal(gpus.to_numpy(found.masks[name]), expected.masks[name])
        np.testing.assert_allclose(gpus.to_numpy(found.weights[name]), expected.weights[name], rtol=1e-3, atol=1e-5)


def test_tensors_of_the_two_virtual_gpus_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2).as_subclass(OnFirstGpu) + torch.ones(2).as_subclass(OnSecondGpu)


# --- the window on one device and on another


@pytest.mark.parametrize(("first", "then"), [("cpu", "gpu"), ("gpu", "cpu")])
@pytest.mark.parametrize("window", ["auto", "cpu"])
def test_a_run_is_resumed_on_another_device(task, gpus, monkeypatch, first, then, window):
    def run(where, **options):
        monkeypatch.setattr(conversion, "_is_on_cpu", lambda tensor: where == "cpu")
        return trained(task, grads_device=window, **options)

    model, optimizer, manager = run(first, until=13)
    state = (13, model.state_dict(), optimizer.state_dict(), manager.state_dict())
    assert len(state[-1]["prunings"][0]["window"]["rows"]) == 4
    assert_same(run(then, state=state), run("cpu"))
    assert gpus.worked == {"cuda:0"}


# --- devices without float64


@pytest.mark.parametrize("keys", RECIPES.values(), ids=RECIPES)
def test_a_device_without_float64_prunes_as_the_cpu_does(task, request, keys):
    expected = trained(task, **keys)
    request.getfixturevalue("no_float64")
    assert_same(trained(task, **keys), expected)


def test_one_shot_on_a_device_without_float64(task, request):
    def pruned():
        model = task.model()
        prune_one_shot(model, GradSampler(task.batches, nn.functional.mse_loss), sparsity=0.6, num_grads=5)
        return model.state_dict()

    expected = pruned()
    gpus = request.getfixturevalue("no_float64")
    for name, value in pruned().items():
        assert torch.equal(value == 0, expected[name] == 0)
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    assert gpus.worked == {"cuda:0"}


def test_blocks_that_need_float64_are_computed_on_the_host_and_each_pruning_step_logs_it_once(task, request, caplog):
    task.batches = task.batches[:1] * 5  # nearly equal gradients
    keys = {"damp": 1.0e-9}
    expected = trained(task, **keys)
    request.getfixturevalue("no_float64")
    with caplog.at_level("INFO", "mfac_core"):
        assert_same(trained(task, **keys), expected)
    assert sum("has no float64" in record.message for record in caplog.records) == 4
