import logging
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from mfac_core.errors import DeviceError, RecipeError, SettingError
from mfac_core.one_shot import prune
from mfac_core.pruners import make_pruner
from mfac_core.recipe import load_recipe
from mfac_torch import (
    EpochRangeModifier,
    GradSampler,
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
    SetLearningRateModifier,
    sensitivity,
)

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU


class NoisySGD(torch.optim.SGD):
    """An optimizer that moves every weight, whatever its gradient, and whose step calls another with hooks."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(torch.randn_like(parameter), alpha=-0.01)
        return loss


PRUNABLE = ("0.weight", "2.weight")
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1),
    "noisy": lambda parameters: NoisySGD(parameters, lr=0.05),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
}


def prunable(model):
    return {name: parameter for name, parameter in model.named_parameters() if name in PRUNABLE}


def zeros(model):
    return sum(int((parameter == 0).sum()) for parameter in prunable(model).values())


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def is_plus_zero(values):
    return bool(torch.all(values == 0)) and not bool(torch.any(torch.signbit(values)))


def assert_weights_equal(parameter, expected):
    """Zeros are in the same places; the last digits of the others are those of the processor."""
    found = parameter.detach().numpy()
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def final_weights(task, recipe, *, stop=20, **modify):
    """Train from the same start; the weights in scope and the manager."""
    model = task.model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    manager = ScheduledModifierManager.from_yaml(recipe)
    manager.modify(model, optimizer, task.steps_per_epoch, **modify)
    task.train(model, optimizer, stop=stop)
    return torch.cat([parameter.detach().flatten() for parameter in prunable(model).values()]), manager


# --- a training loop that knows nothing of pruning


@pytest.mark.parametrize("modifier", ["MFACPruningModifier", "MagnitudePruningModifier", "GMPruningModifier"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step_and_never_come_back(task, modifier, optimizer_name):
    model = task.model()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    manager = ScheduledModifierManager.from_yaml(task.recipe(modifier))
    assert manager.modify(model, optimizer, task.steps_per_epoch) is optimizer
    pruned_so_far = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in prunable(model).items()}
    sparsities = []

    def look(step):
        for name, parameter in prunable(model).items():
            if name in manager.masks:
                pruned = ~manager.masks[name]
                assert not torch.any(pruned_so_far[name] & ~pruned)
                pruned_so_far[name] = pruned
            assert is_plus_zero(parameter[pruned_so_far[name]])
            assert not torch.any(parameter[~pruned_so_far[name]] == 0)
        sparsities.append(manager.sparsity)

    task.train(model, optimizer, stop=25, after_step=look)
    assert [index + 1 for index in range(1, 25) if sparsities[index] > sparsities[index - 1]] == [5, 10, 15, 20]
    assert sparsities[3] == 0
    assert zeros(model) == round(48 * 0.75) + round(24 * 0.75)
    assert sparsities[-1] == pytest.approx(0.75)


def test_momentum_does_not_pull_at_pruned_weights(task):
    model = task.model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch)

    def look(step):
        for name, mask in manager.masks.items():
            state = optimizer.state[prunable(model)[name]]
            assert is_plus_zero(state["exp_avg"][~mask])
            assert is_plus_zero(state["exp_avg_sq"][~mask])
            assert state["exp_avg_sq"][mask].min() > 0

    task.train(model, optimizer, after_step=look)
    assert manager.masks


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_weights_equal_those_of_the_core_on_the_same_gradients(task, optimizer_name):
    model = task.model()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    settings = load_recipe(task.recipe()).pruning[0]
    pruner = make_pruner(settings, {n: p.detach().numpy() for n, p in prunable(model).items()}, steps_per_epoch=5)
    gradients, compared = {}, []
    for name, parameter in prunable(model).items():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.update({name: p.grad.clone().numpy()})
        )

    def follow(*_):
        step = len(compared)
        if pruner.needs_gradients(step):
            pruner.observe(gradients)
        weights = {name: parameter.detach().clone().numpy() for name, parameter in prunable(model).items()}
        compared.append(pruner.prune(weights, step + 1).weights if pruner.is_due(step + 1) else None)

    optimizer.register_step_post_hook(follow)  # before the manager's own hooks, so before its pruning step
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch)

    def compare(step):
        if compared[-1] is not None:
            for name, parameter in prunable(model).items():
                assert_weights_equal(parameter, compared[-1][name])
                np.testing.assert_array_equal(manager.masks[name].numpy(), pruner.masks[name])

    task.train(model, optimizer, after_step=compare)
    assert [index + 1 for index, weights in enumerate(compared) if weights is not None] == [5, 10, 15, 20]


def test_all_that_is_out_of_scope_trains_as_if_nothing_were_there(task):
    model, alone = task.model(), task.model()
    optimizer, optimizer_alone = (OPTIMIZERS["adamw"](each.parameters()) for each in (model, alone))
    ScheduledModifierManager.from_yaml(task.recipe()).modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=4)
    task.train(alone, optimizer_alone, stop=4)
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_gradient_accumulation_counts_optimizer_steps(task):
    model = task.model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    manager = ScheduledModifierManager.from_yaml(task.recipe(start_epoch=0.5, end_epoch=1.0, num_grads=2))
    manager.modify(model, optimizer, steps_per_epoch=4)
    for step in range(4):
        for batch in task.batches[:2]:
            (task.loss(model, batch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (manager.sparsity > 0) == (step >= 1)
    assert manager.sparsity == pytest.approx(0.75)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_gradients_made_inside_the_step_by_a_closure_are_used(task, by_keyword):
    model = task.model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch)
    for step in range(20):

        def closure(batch=task.batches[step % 5]):
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert math.isfinite(loss.item())
    assert zeros(model) == 54


def test_one_closure_call_per_step_enters_the_window(task):
    model = task.model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    manager = ScheduledModifierManager.from_yaml(task.recipe(num_grads=5))
    manager.modify(model, optimizer, task.steps_per_epoch)
    calls = []
    for step in range(3):

        def closure(batch=task.batches[step]):
            calls.append(batch)
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert len(calls) > 3
    assert manager.state_dict()["prunings"][0]["window"]["rows"].shape[0] == 3


def test_a_step_that_raises_does_not_derail_the_steps_after_it(task):
    model = task.model()
    optimizer = NoisySGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch)

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    assert manager.state_dict()["step"] == 0
    task.train(model, optimizer)
    assert manager.state_dict()["step"] == 20
    assert zeros(model) == 54


def test_a_learning_rate_scheduler_goes_on_working(task):
    model = task.model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.1)
    ScheduledModifierManager.from_yaml(task.recipe()).modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, after_step=lambda step: scheduler.step())
    assert zeros(model) == 54
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**4)


# --- mixed precision


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_enter_the_window_unscaled(task, fused):
    def train(scaler):
        model = task.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        manager = ScheduledModifierManager.from_yaml(task.recipe())
        stepper = manager.modify(model, optimizer, task.steps_per_epoch, wrap_optim=scaler)
        assert stepper is (scaler or optimizer)
        for step in range(20):
            optimizer.zero_grad()
            loss = task.loss(model, task.batches[step % 5])
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                stepper.step(optimizer)
                scaler.update()
            if step == 3:
                rows = manager.state_dict()["prunings"][0]["window"]["rows"]
        return rows, torch.cat([parameter.detach().flatten() for parameter in prunable(model).values()])

    plain_rows, plain = train(None)
    scaled_rows, scaled = train(torch.amp.GradScaler("cpu", init_scale=2.0**12))
    torch.testing.assert_close(scaled_rows, plain_rows, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_mixed_precision_skips_does_not_count(task, fused):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    manager = ScheduledModifierManager.from_yaml(task.recipe(start_epoch=0.6, num_grads=3))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    manager.modify(model, optimizer, task.steps_per_epoch, wrap_optim=scaler)
    steps = []
    for poison in (1.0, math.inf, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(task.loss(model, task.batches[0]) * poison).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(manager.state_dict()["step"])
    assert steps == [1, 1, 2, 3]
    state = manager.state_dict()
    assert state["prunings"][0]["refused_rows"] == 0
    assert manager.sparsity > 0


def test_half_precision_weights_stay_half_and_are_pruned(task):
    model = task.model().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.batches = [(inputs.bfloat16(), targets.bfloat16()) for inputs, targets in task.batches]
    task.train(model, optimizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert zeros(model) >= 54
    assert sum(int((~mask).sum()) for mask in manager.masks.values()) == 54


# --- models


def test_convolutions_transposed_too_are_pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3), nn.Conv2d(2, 2, 1))
    model = model.to(memory_format=torch.channels_last)
    strides = [parameter.stride() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager(
        [MFACPruningModifier(final_sparsity=0.5, start_epoch=1, end_epoch=2, num_grads=3)]
    )
    manager.modify(model, optimizer, steps_per_epoch=3)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 8, 8)).square().mean().backward()
        optimizer.step()
    for index in (0, 2, 3):
        weight = model[index].weight
        assert int((weight == 0).sum()) == round(weight.numel() * 0.5)
    assert [parameter.stride() for parameter in model.parameters()] == strides


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def test_tied_weights_are_pruned_once_and_stay_tied():
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager(
        [MFACPruningModifier(final_sparsity=0.5, start_epoch=1, end_epoch=2, num_grads=3)]
    )
    manager.modify(model, optimizer, steps_per_epoch=3)
    for _ in range(6):
        optimizer.zero_grad()
        tokens = torch.randint(12, (10,))
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
    assert list(manager.masks) == ["embed.weight", "body.weight"]
    assert model.head.weight is model.embed.weight
    assert int((model.head.weight == 0).sum()) == 24
    assert manager.sparsity == 0.5


def test_wrapped_models_are_looked_through(task):
    model = task.model()
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    manager = ScheduledModifierManager.from_yaml(task.recipe(params="[0.weight]"))
    manager.modify(wrapped, optimizer, task.steps_per_epoch)
    task.train(model, optimizer)
    manager.finalize(wrapped)
    assert int((model[0].weight == 0).sum()) == 36


def test_a_parameter_without_gradient_counts_as_zero_gradient(task):
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model["used"], optimizer, stop=4)
    rows = manager.state_dict()["prunings"][0]["window"]["rows"]
    assert rows.shape == (3, 18 + 16)
    assert rows[:, :18].abs().min() > 0
    assert not rows[:, 18:].any()
    task.train(model["used"], optimizer, start=4)
    assert int((model["idle"].weight == 0).sum()) == 12


def test_no_gradient_at_all_is_an_error_once_a_pruning_step_is_due(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ScheduledModifierManager.from_yaml(task.recipe()).modify(model, optimizer, task.steps_per_epoch)
    for _ in range(4):
        optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"epoch 1 is due.*\.grad is None for all 2 parameters.*0\.weight.*grad_sampler"
    ):
        optimizer.step()


def test_a_sparse_gradient_is_refused_by_name():
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager(
        [MagnitudePruningModifier(params=["weight"], init_sparsity=0.2, final_sparsity=0.5, end_epoch=1.0)]
    )
    manager.modify(model, optimizer, 5)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="gradient of weight is sparse"):
        optimizer.step()


# --- gradients from a sampler


def test_with_a_sampler_each_pruning_step_draws_fresh_samples(task):
    model = task.model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    drawn = []

    def batches():
        for batch in task.batches:
            drawn.append(manager.state_dict()["step"])
            yield batch

    manager = ScheduledModifierManager.from_yaml(task.recipe(start_epoch=0.0, num_grads=4, inter_func="linear"))
    manager.modify(model, optimizer, 5, grad_sampler=GradSampler(batches, nn.functional.mse_loss))
    task.train(model, optimizer)
    assert drawn == [step for step in (0, 5, 10, 15, 20) for _ in range(4 + 4)]  # and to measure the loss on
    assert zeros(model) == 54


def test_rows_of_an_earlier_pruning_step_are_not_used_again(task, caplog):
    model = task.model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    sampler = GradSampler(iter([*task.batches, task.batches[0]]), nn.functional.mse_loss)
    manager.modify(model, optimizer, 5, grad_sampler=sampler)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        task.train(model, optimizer, stop=10)
    rows = [re.findall(r", (\d) gradient samples", record.getMessage()) for record in caplog.records]
    assert [found[0] for found in rows if found] == ["4", "2"]


def test_a_pruning_step_with_a_sampler_equals_the_core_on_its_samples(task):
    model = task.model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sampler = GradSampler(task.batches, nn.functional.mse_loss)
    recipe = task.recipe(start_epoch=1.0, end_epoch=1.0, init_sparsity=0.75)
    manager = ScheduledModifierManager.from_yaml(recipe)
    before = {}
    optimizer.register_step_post_hook(
        lambda *_: before.update({name: p.detach().clone() for name, p in prunable(model).items()})
    )
    manager.modify(model, optimizer, 5, grad_sampler=sampler)
    task.train(model, optimizer, stop=5)

    twin = task.model()
    with torch.no_grad():
        for name, parameter in prunable(twin).items():
            parameter.copy_(before[name])
        for index in (0, 2):
            twin[index].bias.copy_(model[index].bias)
    arrays = {name: value.numpy() for name, value in before.items()}
    pruner = make_pruner(load_recipe(recipe).pruning[0], arrays, steps_per_epoch=5)
    for batch in task.batches[:4]:
        twin.zero_grad()
        task.loss(twin, batch).backward()
        pruner.observe({name: parameter.grad.numpy() for name, parameter in prunable(twin).items()})
    expected = pruner.prune(arrays, 5)
    for name, parameter in prunable(model).items():
        assert_weights_equal(parameter, expected.weights[name])


# --- one shot


def test_one_shot_reaches_the_final_sparsity_and_leaves_a_plain_module(task):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe(final_sparsity=0.5))
    manager.apply(model, grad_sampler=GradSampler(task.batches, nn.functional.mse_loss))
    assert zeros(model) == 36
    assert manager.sparsity == 0.5
    assert all(is_plus_zero(prunable(model)[name][~mask]) for name, mask in manager.masks.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    older = {"data_loader_builder": lambda: iter(task.batches), "loss_fn": nn.functional.mse_loss}
    manager.apply(task.model(1), grad_sampler=older)


def test_one_shot_equals_the_core_and_its_update_lowers_the_loss(task):
    model = task.model()
    before = {name: parameter.detach().clone().numpy() for name, parameter in prunable(model).items()}
    twin = task.model()
    rows = []
    for batch in task.batches[:4]:
        twin.zero_grad()
        task.loss(twin, batch).backward()
        rows.append({name: parameter.grad.clone().numpy() for name, parameter in prunable(twin).items()})
    gradients = {name: np.stack([row[name] for row in rows]) for name in PRUNABLE}
    one_pass = {"scope": "layer", "update": "independent", "num_recomputations": 1}
    expected = prune(before, gradients, sparsity=0.75, block_size=16, damping=0.01, **one_pass)
    sampler = GradSampler(task.batches, nn.functional.mse_loss)
    ScheduledModifierManager.from_yaml(task.recipe()).apply(model, grad_sampler=sampler)
    for name, parameter in prunable(model).items():
        assert_weights_equal(parameter, expected.weights[name])


def test_one_shot_by_magnitude_needs_no_sampler_and_by_mfac_it_does(task):
    model = task.model()
    expected = {name: p.detach().abs().flatten().sort().values for name, p in prunable(model).items()}
    ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier")).apply(model)
    assert zeros(model) == 54
    for name, parameter in prunable(model).items():
        kept = parameter[parameter != 0].abs().min()
        assert kept == expected[name][round(parameter.numel() * 0.75)]
    with pytest.raises(TypeError, match=r"pass grad_sampler=GradSampler\(data_loader, loss_fn\)"):
        ScheduledModifierManager.from_yaml(task.recipe()).apply(model)


def test_one_shot_that_is_not_finalized_zeroes_again_at_the_end(task):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    manager.apply(model, finalize=False)
    task.train(model, torch.optim.SGD(model.parameters(), lr=0.1), stop=2)
    assert zeros(model) < 54
    with pytest.raises(RuntimeError, match="finalize"):
        manager.apply(model)
    manager.finalize(model)
    assert zeros(model) == 54


# --- recipe keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_grads", 2),
        ("num_grads", "{0.0: 4, 0.3: 2}"),
        ("damp", 10.0),
        ("grads_dtype", "bfloat16"),
        ("fisher_block_size", 4),
        ("fisher_block_size", "null"),
        ("inter_func", "linear"),
        ("global_sparsity", "true"),
        ("update_frequency", 3.0),
        ("update", "joint"),
        ("init_sparsity", 0.5),
        ("final_sparsity", 0.6),
        ("start_epoch", 2.0),
        ("end_epoch", 3.0),
        ("params", "[2.weight]"),
    ],
)
def test_each_recipe_key_changes_the_outcome(task, key, value):
    plain, _ = final_weights(task, task.recipe())
    again, _ = final_weights(task, task.recipe())
    changed, manager = final_weights(task, task.recipe(**{key: value}))
    assert torch.equal(plain, again)
    assert not torch.equal(plain, changed)
    in_scope = 24 if key == "params" else 72
    target = 0.6 if key == "final_sparsity" else 0.75
    assert sum(int((~mask).sum()) for mask in manager.masks.values()) == pytest.approx(in_scope * target, abs=1)


def test_global_sparsity_spreads_over_layers_and_layer_sparsity_does_not(task):
    _, by_layer = final_weights(task, task.recipe())
    _, over_all = final_weights(task, task.recipe(global_sparsity="true"))
    assert {float((~mask).float().mean()) for mask in by_layer.masks.values()} == {0.75}
    assert len({float((~mask).float().mean()) for mask in over_all.masks.values()}) == 2
    assert over_all.sparsity == 0.75


def test_leave_enabled_false_lets_weights_grow_back_after_the_end(task):
    weights, manager = final_weights(task, task.recipe(leave_enabled="false", end_epoch=3.0), stop=15)
    assert int((weights == 0).sum()) == 54
    assert manager.masks == {}
    weights, manager = final_weights(task, task.recipe(leave_enabled="false", end_epoch=3.0), stop=20)
    assert int((weights == 0).sum()) == 0
    assert manager.sparsity == 0


@pytest.mark.parametrize("key", ["available_gpus", "available_devices", "grads_device"])
def test_devices_of_the_recipe_are_used(task, key):
    value = "cuda:99" if key == "grads_device" else "[cuda:99]"
    with pytest.raises(DeviceError, match="cuda:99"):
        final_weights(task, task.recipe(**{key: value}))


def test_modifiers_from_python_and_from_a_recipe_are_the_same(task):
    recipe = load_recipe(task.recipe(num_grads="{0.0: 4, 0.5: 6}", available_gpus="[]", damp=1e-5)).pruning[0]
    modifier = MFACPruningModifier(
        params="__ALL_PRUNABLE__",
        init_sparsity=0.2,
        final_sparsity=0.75,
        start_epoch=1.0,
        end_epoch=4.0,
        update_frequency=1,
        num_grads={0.0: 4, 0.5: 6},
        fisher_block_size=16,
        damp=1e-5,
        available_gpus=(),
    )
    assert modifier.settings == recipe
    assert MFACPruningModifier(final_sparsity=0.5, end_epoch=1, fisher_block_size=None).settings.block_size is None


def test_wrong_keys_from_python_are_refused_as_in_a_recipe():
    with pytest.raises(RecipeError, match=r"^MFACPruningModifier\.num_grad: unknown key.*num_grads"):
        MFACPruningModifier(final_sparsity=0.5, end_epoch=1.0, num_grad=3)
    with pytest.raises(RecipeError, match=r"^MFACPruningModifier: final_sparsity and end_epoch are missing"):
        MFACPruningModifier()
    with pytest.raises(RecipeError, match=r"MFACPruningModifier\.damp: <object"):
        MFACPruningModifier(final_sparsity=0.5, end_epoch=1.0, damp=object())


def test_a_manager_reads_files_variables_and_further_modifiers(task, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("final: 0.5\n" + task.recipe(final_sparsity="eval(final)"))
    rate = SetLearningRateModifier(learning_rate=0.5)
    manager = ScheduledModifierManager.from_yaml(path, [rate, EpochRangeModifier(end_epoch=9.0)], {"final": 0.6})
    assert [type(each).__name__ for each in manager.iter_modifiers()] == [
        "MFACPruningModifier",
        "SetLearningRateModifier",
        "EpochRangeModifier",
    ]
    assert next(manager.iter_modifiers()).settings.final_sparsity == 0.6
    assert manager.max_epochs == 9.0
    assert ScheduledModifierManager.from_yaml(path).max_epochs == 4.0
    assert ScheduledModifierManager([rate]).max_epochs == 0.0


def test_learning_rates_are_set_when_their_epoch_arrives(task):
    model = task.model()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}], lr=0.2
    )
    manager = ScheduledModifierManager(
        [
            SetLearningRateModifier(learning_rate=0.01, start_epoch=2.0),
            SetLearningRateModifier(learning_rate=0.1, start_epoch=1.0),
        ]
    )
    manager.modify(model, optimizer, task.steps_per_epoch)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    task.train(model, optimizer, stop=11)
    assert seen == [[0.2, 0.3]] * 5 + [[0.1, 0.1]] * 5 + [[0.01, 0.01]]


def test_a_learning_rate_is_set_once_so_that_a_scheduler_may_change_it(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    ScheduledModifierManager([SetLearningRateModifier(learning_rate=0.1)]).modify(model, optimizer, 5)
    task.train(model, optimizer, stop=1)
    optimizer.param_groups[0]["lr"] = 0.05
    task.train(model, optimizer, stop=2)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_training_may_begin_at_a_later_epoch(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch, epoch=3.4)
    task.train(model, optimizer, stop=3)
    assert zeros(model) == 54


# --- logging


def test_each_pruning_step_is_logged(task, caplog):
    class Board:
        def __init__(self):
            self.scalars = []

        def log_scalar(self, tag, value, step):
            self.scalars.append((tag, value, step))

    board, other = Board(), Board()
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        final_weights(task, task.recipe(), loggers=[board, other])
        final_weights(task, task.recipe("MagnitudePruningModifier"), loggers=board)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("pruning step")]
    assert len(lines) == 8
    assert re.fullmatch(
        r"pruning step at epoch 1\.00 \(step 5\): sparsity 0\.2083, 4 gradient samples, "
        r"predicted loss increase \d\S* \(in-sample\), \d+\.\d\d s \(0\.weight, 2\.weight\)",
        lines[0],
    )
    assert re.fullmatch(r"pruning step at epoch 4\.00 \(step 20\): sparsity 0\.7500, \d+\.\d\d s \(.*\)", lines[7])
    assert other.scalars == board.scalars[:8]
    assert board.scalars[0] == ("ParamPruning/0.weight", pytest.approx(10 / 48), 5)
    assert board.scalars[-1] == ("ParamPruning/2.weight", 0.75, 20)


def test_damping_auto_is_measured_at_each_pruning_step_and_named_in_its_line(task, caplog):
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        final_weights(task, task.recipe(damp="auto"))
        final_weights(task, task.recipe())
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("pruning step")]
    named = [re.search(r"damping (\S+ to \S+), predicted loss increase \S+ \(in-sample\), \d", line) for line in lines]
    assert all(named[:4]) and not any(named[4:])
    assert len({found[1] for found in named[:4]}) == 4


def test_a_run_that_ends_before_its_last_pruning_step_says_so(task, caplog):
    _, manager = final_weights(task, task.recipe(), stop=12)
    with caplog.at_level(logging.WARNING, logger="mfac_torch"):
        manager.finalize()
    assert "finalized at epoch 2.40 without the pruning step of epoch 4" in caplog.text


# --- attaching and detaching


def test_finalize_leaves_a_plain_module_and_a_plain_optimizer(task):
    model = task.model()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    keys = list(model.state_dict())
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer)
    masks = manager.masks
    with torch.no_grad():
        model[0].weight.add_(1.0)  # whatever happened outside the optimizer's steps
    manager.finalize(model, hold=True)
    assert hooks(optimizer) == 0
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert all(is_plus_zero(prunable(model)[name][~mask]) for name, mask in masks.items())
    assert manager.sparsity == 0.75
    task.train(model, optimizer, stop=2)
    assert zeros(model) < 54


def test_a_manager_is_attached_once_at_a_time_and_can_be_used_again(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    manager.modify(model, optimizer, task.steps_per_epoch)
    for call in (lambda: manager.modify(model, optimizer, 5), lambda: manager.apply(model)):
        with pytest.raises(RuntimeError, match=r"attached to a model already; call finalize\(\)"):
            call()
    assert hooks(optimizer) == 2
    task.train(model, optimizer)
    manager.finalize(model)
    manager.modify(model, optimizer, task.steps_per_epoch)
    assert manager.sparsity == 0
    task.train(model, optimizer)
    manager.finalize()
    second = ScheduledModifierManager.from_yaml(task.recipe(init_sparsity=0.75, final_sparsity=0.9))
    second.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer)
    second.finalize(model)
    assert zeros(model) == round(48 * 0.9) + round(24 * 0.9)


def test_a_second_manager_on_an_optimizer_is_refused_until_the_first_is_finalized(task):
    model = task.model()
    optimizer, spare = (torch.optim.SGD(model.parameters(), lr=0.05) for _ in range(2))
    first, second = (ScheduledModifierManager.from_yaml(task.recipe()) for _ in range(2))
    first.modify(model, optimizer, task.steps_per_epoch)
    for optimizers in (optimizer, [spare, optimizer]):
        with pytest.raises(RuntimeError, match=r"one recipe, or call finalize\(\) of the first manager"):
            second.modify(model, optimizers, task.steps_per_epoch)
    assert (hooks(optimizer), hooks(spare), second.initialized) == (2, 0, False)
    first.finalize(model)
    second.modify(model, optimizer, task.steps_per_epoch)
    assert hooks(optimizer) == 2


def test_a_second_finalize_and_one_after_apply_do_nothing(task):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    manager.apply(model)
    pruned = zeros(model)
    manager.finalize(model)
    manager.finalize()
    assert zeros(model) == pruned == round(48 * 0.75) + round(24 * 0.75)


def test_a_layer_that_was_replaced_after_modify_is_named(task, caplog):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    manager.modify(model, optimizer, task.steps_per_epoch)
    model[2] = torch.nn.Linear(8, 3)
    optimizer.add_param_group({"params": model[2].parameters()})
    task.train(model, optimizer)
    manager.finalize(model)
    (warning,) = [record.getMessage() for record in caplog.records if "other parameters" in record.getMessage()]
    assert warning.startswith("2.weight: the model has other parameters under these names")


def test_finalize_refuses_what_it_was_not_given(task):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    with pytest.raises(RuntimeError, match="nothing to finalize"):
        manager.finalize(model)
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 5)
    with pytest.raises(ValueError, match="different model"):
        manager.finalize(task.model())
    with pytest.raises(RuntimeError, match="modify"):
        ScheduledModifierManager.from_yaml(task.recipe()).state_dict()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (SettingError, "'0.wieght' matches no parameter", {"recipe": {"params": "[0.weight, 0.wieght]"}}),
        (SettingError, "steps_per_epoch", {"steps_per_epoch": 0}),
        (SettingError, "epoch: nan is not a finite number", {"epoch": float("nan")}),
        (SettingError, "epoch: 'last' is not a finite number", {"epoch": "last"}),
        (SettingError, "epoch: -1 is out of range", {"epoch": -1}),
        (TypeError, "optimizer is an empty list", {"optimizer": []}),
        (TypeError, "optimizer is a int", {"optimizer": 3}),
        (TypeError, "does not support 'distillation_teacher'", {"distillation_teacher": "self"}),
        (TypeError, "wrap_optim is the number 2.0; pass a GradScaler or nothing", {"wrap_optim": 2.0}),
        (TypeError, "wrap_optim is 'scaler', which has no step", {"wrap_optim": "scaler"}),
        (TypeError, "no method log_scalar", {"loggers": [print]}),
        (TypeError, "grad_sampler is a list", {"grad_sampler": []}),
        (ValueError, r"does not train 0\.weight", {"trained": slice(2, None)}),
        (SettingError, "'nothing' matches no parameter", {"second": {"params": ["nothing"]}}),
    ],
)
def test_a_modify_that_fails_leaves_model_and_optimizer_untouched(task, error, message, change):
    change = dict(change)
    model = task.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = list(model.parameters())[change.pop("trained", slice(None))]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    recipe = task.recipe("MagnitudePruningModifier", start_epoch=0.0, **change.pop("recipe", {}))
    second = change.pop("second", None)
    more = [] if second is None else [MFACPruningModifier(final_sparsity=0.5, end_epoch=1.0, **second)]
    manager = ScheduledModifierManager.from_yaml(recipe, more)
    arguments = {"optimizer": optimizer, "steps_per_epoch": 5} | change
    with pytest.raises(error, match=message):
        manager.modify(model, **arguments)
    assert hooks(optimizer) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert manager.masks == {}
    if second is None and not isinstance(change.get("optimizer"), list) and "0.wieght" not in recipe:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        assert manager.modify(model, optimizer, 5) is optimizer


def test_one_optimizer_given_twice_is_refused(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    with pytest.raises(ValueError, match="the same one twice"):
        manager.modify(model, [optimizer, optimizer], task.steps_per_epoch)
    assert hooks(optimizer) == 0


def test_what_is_not_a_modifier_is_refused():
    with pytest.raises(TypeError, match="is not a modifier"):
        ScheduledModifierManager(["MFACPruningModifier"])
    with pytest.raises(TypeError, match=r"is a single EpochRangeModifier; .* such as \[EpochRangeModifier\(...\)\]"):
        ScheduledModifierManager(EpochRangeModifier(end_epoch=1.0))
    with pytest.raises(TypeError, match="modifiers is a int; pass a list of modifiers"):
        ScheduledModifierManager(3)
    for recipe in ({"final_sparsity": 0.5}, [EpochRangeModifier(end_epoch=1.0)]):
        with pytest.raises(TypeError, match=r"file_path is a (dict|list); pass the path of a recipe or its text"):
            ScheduledModifierManager.from_yaml(recipe)
    with pytest.raises(ValueError, match="no modifiers"):
        ScheduledModifierManager([])
    with pytest.raises(TypeError, match="does not support 'teacher', 'metadata'"):
        ScheduledModifierManager([EpochRangeModifier(end_epoch=1.0)]).apply(nn.Linear(1, 1), teacher=1, metadata={})


def test_sensitivity_is_refused_over_several_processes(task):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(NotImplementedError, match=r"2 processes, over which sensitivity\(\) is not .* Call .*"):
            sensitivity(task.model(), task.batches, nn.functional.mse_loss)
    finally:
        torch.distributed.destroy_process_group()


def test_arguments_of_the_wrong_kind_are_refused_by_name(task):
    with pytest.raises(TypeError, match="ScheduledModifierManager.from_yaml"):
        ScheduledModifierManager("recipe.yaml")
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="the model is a SGD"):
        manager.apply(optimizer, grad_sampler=GradSampler(task.batches, nn.functional.mse_loss))
    manager.modify(model, optimizer, task.steps_per_epoch)
    with pytest.raises(ValueError, match="not the state of a manager: it has no changes_done, .*step, steps_per_epoch"):
        manager.load_state_dict({"x": 1})
    manager.finalize()


# --- what scripts call beside modify, apply and finalize


def test_arguments_may_be_given_to_initialize(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    drawn = []

    def batches():
        drawn.append(manager.state_dict()["step"])
        return iter(task.batches)

    sampler = GradSampler(batches, nn.functional.mse_loss)
    assert not manager.initialized
    manager.initialize(model, 1.0, grad_sampler=sampler, distillation_teacher=None)
    assert hooks(optimizer) == 0
    manager.modify(model, optimizer, task.steps_per_epoch)
    assert manager.initialized
    assert manager.state_dict()["step"] == 5
    task.train(model, optimizer, stop=6)
    assert drawn == [5, 5, 10, 10]  # begun anew for the batches to measure the loss on
    with pytest.raises(TypeError, match="initialize.. does not support 'teacher'"):
        manager.initialize(model, teacher=model)


def test_the_structure_of_a_model_needs_no_change_before_its_weights_are_loaded(task):
    pruned = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    manager.apply(pruned)
    model = task.model(1)
    ScheduledModifierManager.from_yaml(task.recipe()).apply_structure(model, epoch=math.inf)
    model.load_state_dict(pruned.state_dict())
    assert zeros(model) == 54
    with pytest.raises(TypeError, match="the model is a str"):
        manager.apply_structure("model")


def test_one_shot_may_stop_where_the_recipe_is_at_an_epoch(task):
    recipe = task.recipe("MagnitudePruningModifier", inter_func="linear")
    for epoch, pruned in ((0.5, 0), (1.0, 15), (2.5, 27), (9.0, 54)):
        model = task.model()
        ScheduledModifierManager.from_yaml(recipe).apply(model, epoch)
        assert zeros(model) == pruned


def a_modifier(final_sparsity, start_epoch, end_epoch, kind=MagnitudePruningModifier, **keys):
    schedule = {"start_epoch": start_epoch, "end_epoch": end_epoch, "params": "__ALL_PRUNABLE__"}
    return kind(final_sparsity=final_sparsity, **schedule, **keys)


def test_one_shot_follows_modifiers_that_follow_each_other_and_warns_of_those_that_overlap(task, caplog):
    model = task.model()
    ScheduledModifierManager([a_modifier(0.75, 2.0, 3.0), a_modifier(0.5, 1.0, 2.0)]).apply(model)
    assert zeros(model) == 54
    assert not caplog.records
    for other in (a_modifier(0.5, 1.0, 2.5), a_modifier(0.5, 2.0, 3.0)):
        caplog.clear()
        model = task.model()
        ScheduledModifierManager([a_modifier(0.75, 2.0, 3.0), other]).apply(model)
        assert zeros(model) == 54
        (warning,) = [record.getMessage() for record in caplog.records]
        assert "1 and MagnitudePruningModifier 2 prune the same parameters (0.weight, 2.weight)" in warning


@pytest.mark.parametrize("begins", [2.0, 1.0])
def test_what_one_modifier_has_pruned_stays_zero_while_another_updates_the_weights(task, begins, caplog):
    of_mfac = {"num_grads": 4, "fisher_block_size": 16, "damp": 0.01, "mask_type": "1:2"}  # not zeros alone go first
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    recipe = [a_modifier(0.25, 1.0, 2.0), a_modifier(0.5, begins, 4.0, MFACPruningModifier, **of_mfac)]
    manager = ScheduledModifierManager(recipe)
    manager.modify(model, optimizer, task.steps_per_epoch)

    def holds(step):
        for name, mask in manager.masks.items():
            assert not model.get_parameter(name)[~mask].any(), (step, name)

    task.train(model, optimizer, after_step=holds)
    assert ("prune the same parameters" in caplog.text) == (begins == 1.0)
    manager.finalize(model)
    assert zeros(model) >= 36


def test_one_shot_samples_even_where_a_gradual_run_would_take_the_gradients_of_training(task):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe(use_gradient_buffering="true"))
    manager.apply(model, grad_sampler=GradSampler(task.batches, nn.functional.mse_loss))
    assert zeros(model) == 54


def test_a_fraction_of_steps_per_epoch_is_rounded_up(task, caplog):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.05), steps_per_epoch=70 / 16)
    assert manager.state_dict()["steps_per_epoch"] == 5
    assert "steps_per_epoch 4.375 is rounded up to 5" in caplog.text
    manager.finalize(model)
    for wrong in (math.nan, math.inf, 0, -2.5, True, "5", None):
        with pytest.raises(SettingError, match="the rule is steps_per_epoch > 0, .*; a fraction is rounded up"):
            manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.05), steps_per_epoch=wrong)
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.05), steps_per_epoch=np.float32(2.5))
    assert manager.state_dict()["steps_per_epoch"] == 3
    manager.finalize(model)
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.05), steps_per_epoch=3.0)
    assert manager.state_dict()["steps_per_epoch"] == 3


def test_modifiers_for_training_alone_need_no_pruning(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager([EpochRangeModifier(end_epoch=3.0), SetLearningRateModifier(learning_rate=0.5)])
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=2)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert (manager.sparsity, manager.masks) == (0.0, {})
    manager.finalize(model)
    assert hooks(optimizer) == 0
