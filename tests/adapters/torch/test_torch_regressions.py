"""What hurt users of the tools before this one; each test is named after it."""

import logging
import math
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from mfac_core.errors import DeviceError
from mfac_torch import (
    GradSampler,
    LearningRateFunctionModifier,
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
)
from tests.adapters.torch.conftest import TinyTask
from tests.adapters.torch.rank_training import Run


def zeros(*layers):
    return sum(int((layer.weight == 0).sum()) for layer in layers)


def train(task, recipe, *, stop=20, steps_per_epoch=5, make_loss=None, **modify):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager.from_yaml(recipe)
    manager.modify(model, optimizer, steps_per_epoch, **modify)
    sparsities = []
    task.train(model, optimizer, stop=stop, after_step=lambda step: sparsities.append(manager.sparsity))
    return model, manager, sparsities


def counting(task, drawn):
    def batches():
        for batch in task.batches:
            drawn.append(batch)
            yield batch

    return GradSampler(batches, nn.functional.mse_loss)


def test_num_grads_between_two_thresholds_was_that_of_the_one_above(task):
    drawn, at_each_step = [], []
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(
        task.recipe(num_grads="{0.0: 2, 0.5: 3, 0.75: 9}", init_sparsity=0.51, final_sparsity=0.6, inter_func="linear")
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager.modify(model, optimizer, 5, grad_sampler=counting(task, drawn))
    task.train(model, optimizer, after_step=lambda step: at_each_step.append(len(drawn)))
    # as many again to measure the loss on
    assert [at_each_step[step - 1] for step in (5, 10, 15, 20)] == [2 * rows for rows in (2, 5, 8, 11)]


def rows_of_window(group):
    run = Run(group, TinyTask.recipe()).train(stop=4)
    return run.manager.state_dict()["prunings"][0]["window"]["rows"].numpy()


def test_distributed_ranks_gathered_the_same_rows_again_and_again(rank_processes):
    windows = rank_processes.run(rows_of_window)
    rows = np.concatenate(windows, axis=1)  # each rank has columns of its own
    assert rows.shape == (3, 72)
    assert len(np.unique(rows, axis=0)) == 3


def test_a_block_size_of_2000_took_memory_for_2000_numbers_per_weight():
    model = nn.Linear(1000, 100, bias=False)
    manager = ScheduledModifierManager(
        [MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, num_grads=8, fisher_block_size=2000, damp=0.01)]
    )
    batches = [(torch.randn(4, 1000), torch.randn(4, 100)) for _ in range(8)]
    tracemalloc.start()
    try:
        manager.apply(model, grad_sampler=GradSampler(batches, nn.functional.mse_loss))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert zeros(model) == 50_000
    assert peak < 100e6  # dense inverses of all blocks would be 800 MB


def test_grads_device_was_accepted_and_never_used(task):
    with pytest.raises(DeviceError, match="cuda:99"):
        train(task, task.recipe(grads_device="cuda:99"))


@pytest.mark.parametrize("modifier", ["MFACPruningModifier", "OBSPruningModifier"])
def test_one_shot_pruned_before_any_gradient_was_collected(task, modifier):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe(modifier, num_grads=4, damp=0.01))
    manager.apply(model, grad_sampler=GradSampler(task.batches, nn.functional.mse_loss))
    assert zeros(model[0], model[2]) == 54


def test_a_sampler_object_and_available_gpus_raised_a_type_error(task):
    drawn = []
    recipe = task.recipe(available_gpus="[]", num_grads=4, start_epoch=0.0, inter_func="linear")
    model, manager, _ = train(task, recipe, grad_sampler=counting(task, drawn))
    assert zeros(model[0], model[2]) == 54
    assert len(drawn) == 5 * (4 + 4)


def test_the_gradient_buffer_was_filled_from_the_beginning(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe(start_epoch=2.0, num_grads=3))
    manager.modify(model, optimizer, task.steps_per_epoch)
    windows = []
    task.train(
        model,
        optimizer,
        stop=9,
        after_step=lambda step: windows.append(manager.state_dict()["prunings"][0]["window"]),
    )
    assert windows[:7] == [None] * 7
    assert [window["rows"].shape[0] for window in windows[7:]] == [1, 2]


def test_fewer_steps_than_num_grads_ended_training_with_an_error(task, caplog):
    with caplog.at_level(logging.WARNING):
        model, _, _ = train(task, task.recipe(num_grads=64))
    assert zeros(model[0], model[2]) == 54
    assert "5 of 64 gradient samples" in caplog.text


def test_a_start_at_epoch_0_could_not_work_without_a_sampler(task, caplog):
    with caplog.at_level(logging.WARNING):
        model, _, sparsities = train(task, task.recipe(start_epoch=0.0))
    assert zeros(model[0], model[2]) == 54
    assert sparsities[2] == 0 < sparsities[3]  # once the window of 4 rows is full
    assert "falls due before there is any gradient" in caplog.text


def test_one_step_per_epoch_never_pruned(task):
    model, _, sparsities = train(task, task.recipe(num_grads=1), steps_per_epoch=1, stop=4)
    assert sparsities == pytest.approx([0.2, 0.58, 0.73, 0.75], abs=0.02)


def test_update_frequency_drifted(task):
    recipe = task.recipe(start_epoch=0.5, end_epoch=2.0, update_frequency=0.37, inter_func="linear")
    _, _, sparsities = train(task, recipe, steps_per_epoch=10)
    changes = [step + 1 for step in range(1, 20) if sparsities[step] != sparsities[step - 1]]
    assert changes == [5, *(round((0.5 + 0.37 * number) * 10) for number in (1, 2, 3)), 20]


def test_an_end_at_the_last_epoch_left_the_final_sparsity_unreached(task):
    model, manager, _ = train(task, task.recipe(), stop=4 * 5)
    assert manager.max_epochs == 4
    assert zeros(model[0], model[2]) == 54


def test_a_finite_data_loader_was_exhausted_at_the_second_pruning_step(task):
    built = []

    def builder(kwargs=None):
        built.append(kwargs)
        return (([inputs], {}, targets) for inputs, targets in task.batches)

    sampler = {"data_loader_builder": builder, "loss_function": nn.functional.mse_loss}
    model, _, _ = train(task, task.recipe(num_grads=7), grad_sampler=sampler)
    assert zeros(model[0], model[2]) == 54
    assert len(built) == 4 * 3


def test_gradients_under_mixed_precision_were_loss_scaled(task):
    def rows(scale):
        model = task.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        manager = ScheduledModifierManager.from_yaml(task.recipe())
        manager.modify(model, optimizer, 5, wrap_optim=scaler)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(task.loss(model, task.batches[step])).backward()
            scaler.step(optimizer)
            scaler.update()
        return manager.state_dict()["prunings"][0]["window"]["rows"]

    torch.testing.assert_close(rows(2.0**10), rows(1.0), rtol=1e-5, atol=1e-8)


def test_a_row_with_nan_went_into_the_fisher(task, caplog):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, 5)
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            optimizer.zero_grad()
            task.loss(model, task.batches[step % 5]).backward()
            if step == 3:
                model[0].weight.grad[0, 0] = math.nan
            optimizer.param_groups[0]["lr"] = 0.0
            with torch.no_grad():
                kept = [parameter.clone() for parameter in model.parameters()]
            optimizer.step()
            with torch.no_grad():  # the step itself made the weight NaN; go back
                for parameter, before in zip(model.parameters(), kept, strict=True):
                    parameter.copy_(torch.where(torch.isnan(parameter), before, parameter))
    assert manager.state_dict()["prunings"][0]["refused_rows"] == 1
    assert zeros(model[0], model[2]) == 54
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert "NaN or Inf" in caplog.text


def test_a_state_could_not_be_loaded_before_there_was_a_gradient(task):
    _, manager, _ = train(task, task.recipe(), stop=12)
    model = task.model(1)
    resumed = ScheduledModifierManager.from_yaml(task.recipe())
    resumed.modify(model, torch.optim.SGD(model.parameters(), lr=0.05), 5)
    resumed.load_state_dict(manager.state_dict())
    assert resumed.sparsity == manager.sparsity > 0


def test_a_state_did_not_fit_on_a_machine_with_other_devices(task):
    _, manager, _ = train(task, task.recipe(), stop=12)
    model = task.model(1)
    elsewhere = ScheduledModifierManager.from_yaml(task.recipe(available_devices="[cpu]", grads_device="cpu"))
    elsewhere.modify(model, torch.optim.SGD(model.parameters(), lr=0.05), 5)
    elsewhere.load_state_dict(manager.state_dict(), strict=True)
    assert elsewhere.sparsity == manager.sparsity


def test_the_state_of_a_recipe_with_stages_raised(task):
    recipe = """
first:
  pruning_modifiers:
    - !MagnitudePruningModifier {params: __ALL_PRUNABLE__, init_sparsity: 0.2, final_sparsity: 0.5, start_epoch: 0.0,
        end_epoch: 1.0, update_frequency: 0.5}
second:
  pruning_modifiers:
    - !ConstantPruningModifier {params: __ALL_PRUNABLE__, start_epoch: 1.0}
"""
    model, manager, _ = train(task, recipe, stop=8)
    assert len(manager.state_dict()["prunings"]) == 2
    resumed_model = task.model(1)
    resumed = ScheduledModifierManager.from_yaml(recipe)
    resumed.modify(resumed_model, torch.optim.SGD(resumed_model.parameters(), lr=0.05), 5)
    resumed.load_state_dict(manager.state_dict())
    assert resumed.sparsity == manager.sparsity == 0.5
    assert zeros(resumed_model[0], resumed_model[2]) == zeros(model[0], model[2]) == 36


def test_n_of_m_masks_of_convolutions_had_the_wrong_shape():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 4, 3)
    ScheduledModifierManager(
        [MagnitudePruningModifier(mask_type="2:4", init_sparsity=0.0, final_sparsity=0.5, end_epoch=0.0)]
    ).apply(layer)
    by_fours = (layer.weight == 0).permute(0, 2, 3, 1).reshape(-1, 4)
    assert (by_fours.sum(dim=1) == 2).all()


def test_a_block_of_4_by_4_was_16_weights_in_a_row():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    for _ in range(2):  # the shape with -1 was changed by the first use
        ScheduledModifierManager(
            [MagnitudePruningModifier(mask_type=[4, 4], final_sparsity=0.5, end_epoch=0.0, params=["weight"])]
        ).apply(layer)
    tiles = (layer.weight == 0).reshape(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, 16)
    assert sorted(tiles.sum(dim=1).tolist()) == [0, 0, 16, 16]
    rows = MagnitudePruningModifier(mask_type=[1, -1], final_sparsity=0.5, end_epoch=0.0)
    for size in (6, 10):
        layer = nn.Linear(size, 4)
        ScheduledModifierManager([rows]).apply(layer)
        assert sorted((layer.weight == 0).sum(dim=1).tolist()) == [0, 0, size, size]


def test_gpus_were_asked_for_by_a_command_and_parsed_as_integers(task, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-6f5c1b0e-7f0c-5b8e-9d7e-0c7d2a1b3c4d")
    monkeypatch.setenv("PATH", "")
    model, _, _ = train(task, task.recipe())
    assert zeros(model[0], model[2]) == 54


def test_cyclic_linear_was_never_followed(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    function = LearningRateFunctionModifier(
        lr_func="cyclic_linear", init_lr=0.1, final_lr=0.0, start_epoch=0.0, end_epoch=4.0, cycle_epochs=1.0
    )
    ScheduledModifierManager([function]).modify(model, optimizer, 5)
    rates = []
    task.train(model, optimizer, stop=10, after_step=lambda step: rates.append(optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02] * 2)


def test_tied_weights_counted_twice():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False), "body": nn.Linear(4, 2)})
    model["head"].weight = model["embed"].weight
    manager = ScheduledModifierManager([MagnitudePruningModifier(final_sparsity=0.5, end_epoch=0.0)])
    manager.apply(model, finalize=False)
    assert {name: mask.numel() for name, mask in manager.masks.items()} == {"embed.weight": 16, "body.weight": 8}
    assert manager.sparsity == 0.5


def test_the_last_row_of_gradients_stayed_zero(task):
    drawn = []
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe(num_grads=4))
    manager.modify(model, optimizer, 5)
    task.train(model, optimizer, stop=4, after_step=lambda step: drawn.append(manager.state_dict()))
    rows = drawn[-1]["prunings"][0]["window"]["rows"]
    assert (rows[:3].abs().sum(dim=1) > 0).all()
    assert rows.shape[0] == 3  # what is not there is not there, instead of rows of zeros


def test_an_infinite_inverse_cubic_left_one_shot_at_its_initial_sparsity(task):
    model = task.model()
    recipe = task.recipe("MagnitudePruningModifier", inter_func="inverse_cubic")
    ScheduledModifierManager.from_yaml(recipe).apply(model)
    assert zeros(model[0], model[2]) == 54


def test_equal_start_and_end_epochs_divided_by_zero(task):
    model, _, _ = train(task, task.recipe(start_epoch=2.0, end_epoch=2.0))
    assert zeros(model[0], model[2]) == 54


def test_an_initial_sparsity_written_as_an_integer_raised_a_type_error(task):
    model, _, _ = train(task, task.recipe("GMPruningModifier", init_sparsity=0))
    assert zeros(model[0], model[2]) == 54
