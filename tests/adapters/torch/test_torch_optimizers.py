"""Every way in which a training loop may step its optimizers."""

import copy
import logging
import math

import pytest
import torch
from torch import nn

from mfac_torch import (
    ACDCPruningModifier,
    GlobalMagnitudePruningModifier,
    GradSampler,
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
    declare_elementwise_state,
)


class TwoLevels(torch.optim.SGD):
    """Its step calls that of its base class, so that hooks run at both levels, and moves every weight."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.001)
        return loss


declare_elementwise_state(TwoLevels, ["momentum_buffer"])


def halves(task, model):
    """One optimizer for each of the two layers of the tiny model."""
    return [
        torch.optim.Adam(model[0].parameters(), lr=0.02, weight_decay=0.1),
        TwoLevels(model[2].parameters(), lr=0.05, momentum=0.9),
    ]


def zeros(model):
    return sum(int((model[index].weight == 0).sum()) for index in (0, 2))


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def rows(manager):
    return manager.state_dict()["prunings"][0]["window"]["rows"]


def train_with(task, model, optimizers, *, start=0, stop=20, after_step=None):
    for step in range(start, stop):
        for optimizer in optimizers:
            optimizer.zero_grad()
        task.loss(model, task.batches[step % 5]).backward()
        for optimizer in optimizers:
            optimizer.step()
            if after_step is not None:
                after_step(step + 1, optimizer)


# --- several optimizers


@pytest.mark.parametrize("modifier", ["MFACPruningModifier", "MagnitudePruningModifier", "ACDCPruningModifier"])
def test_pruned_weights_are_zero_after_each_step_of_each_optimizer(task, modifier):
    keys = {"compression_sparsity": 0.75} if "ACDC" in modifier else {"init_sparsity": 0.2, "final_sparsity": 0.75}
    of_mfac = {"num_grads": 4, "fisher_block_size": 16, "damp": 0.01} if "MFAC" in modifier else {}
    schedule = {"start_epoch": 1.0, "end_epoch": 4.0, "update_frequency": 1.0, "params": "__ALL_PRUNABLE__"}
    lines = "".join(f"    {key}: {value}\n" for key, value in {**keys, **of_mfac, **schedule}.items())
    model = task.model()
    optimizers = halves(task, model)
    manager = ScheduledModifierManager.from_yaml(f"modifiers:\n  - !{modifier}\n{lines}")
    assert manager.modify(model, optimizers, task.steps_per_epoch) is optimizers

    def look(step, optimizer):
        for name, mask in manager.masks.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            for value in optimizer.state.get(weight, {}).values():
                if value.shape == mask.shape:
                    assert not value[~mask].any()

    train_with(task, model, optimizers, after_step=look)
    assert zeros(model) == 54
    assert manager.state_dict()["step"] == 20
    manager.finalize(model)
    assert [hooks(optimizer) for optimizer in optimizers] == [0, 0]


@pytest.mark.usefixtures("placement")
def test_a_sample_holds_the_gradients_of_all_optimizers(task):
    def window(model, optimizers):
        manager = ScheduledModifierManager.from_yaml(task.recipe())
        manager.modify(model, optimizers if len(optimizers) > 1 else optimizers[0], task.steps_per_epoch)
        train_with(task, model, optimizers, stop=4)
        return rows(manager)

    one, two = task.model(), task.model()
    whole = window(one, [torch.optim.SGD(one.parameters(), lr=0.05)])
    parts = window(two, [torch.optim.SGD(two[index].parameters(), lr=0.05) for index in (0, 2)])
    assert torch.equal(whole[:3], parts[:3])


@pytest.mark.usefixtures("placement")
def test_optimizers_that_take_turns_give_one_sample_per_round(task):
    model = task.model()
    optimizers = halves(task, model)
    manager = ScheduledModifierManager.from_yaml(task.recipe(start_epoch=2.0, num_grads=10))
    manager.modify(model, tuple(optimizers), task.steps_per_epoch)
    expected = []
    for step in range(3):
        for index, optimizer in zip((0, 2), optimizers, strict=True):
            model.zero_grad(set_to_none=False)
            task.loss(model, task.batches[step]).backward()
            expected.append(model[index].weight.grad.flatten().clone())
            other = model[2 - index].weight
            other.grad.fill_(math.nan)  # of no use to this optimizer
            optimizer.step()
    assert torch.equal(rows(manager), torch.cat(expected).reshape(3, -1))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_pruning_step_waits_for_the_last_part_of_its_last_sample(task, order, caplog):
    model = task.model()
    optimizers = halves(task, model)
    manager = ScheduledModifierManager.from_yaml(task.recipe(num_grads=5))
    manager.modify(model, optimizers, task.steps_per_epoch)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        train_with(task, model, [optimizers[number] for number in order])
    assert caplog.text.count("5 gradient samples") == 4


@pytest.mark.parametrize("stopped_at", [1, 4, 9, 12])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_resumed_run_of_several_optimizers_prunes_after_its_first_round_too(task, order, stopped_at):
    def run():
        model = task.model()
        optimizers = halves(task, model)
        manager = ScheduledModifierManager.from_yaml(task.recipe(num_grads=5, update_frequency=0.2, start_epoch=0.4))
        manager.modify(model, optimizers, task.steps_per_epoch)
        return model, optimizers, manager

    whole, resumed = run(), run()
    train_with(task, whole[0], [whole[1][number] for number in order], stop=stopped_at)
    state = copy.deepcopy([part.state_dict() for part in (whole[0], *whole[1], whole[2])])
    train_with(task, whole[0], [whole[1][number] for number in order], start=stopped_at)
    for part, saved in zip((resumed[0], *resumed[1], resumed[2]), state, strict=True):
        part.load_state_dict(saved)
    train_with(task, resumed[0], [resumed[1][number] for number in order], start=stopped_at)
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_last_round_without_its_last_optimizer_is_pruned_when_training_is_over(task):
    model = task.model()
    optimizers = halves(task, model)
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    manager.modify(model, optimizers, task.steps_per_epoch)
    train_with(task, model, optimizers, stop=19)
    train_with(task, model, optimizers[:1], start=19)
    manager.finalize(model)
    assert zeros(model) == 54


def test_steps_are_those_of_the_first_optimizer(task):
    model = task.model()
    optimizers = halves(task, model)
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    manager.modify(model, optimizers, task.steps_per_epoch)
    for step in range(10):
        model.zero_grad()
        task.loss(model, task.batches[step % 5]).backward()
        optimizers[1].step()
        if step % 2:
            optimizers[0].step()
    assert manager.state_dict()["step"] == 5
    assert manager.sparsity == pytest.approx(0.2, abs=0.01)


@pytest.mark.usefixtures("placement")
def test_a_scaler_unscales_the_gradients_of_each_optimizer_before_they_are_seen(task):
    def window(scaler):
        model = task.model()
        optimizers = [torch.optim.SGD(model[index].parameters(), lr=0.05) for index in (0, 2)]
        manager = ScheduledModifierManager.from_yaml(task.recipe())
        manager.modify(model, optimizers, task.steps_per_epoch, wrap_optim=scaler)
        for step in range(4):
            model.zero_grad()
            scaler.scale(task.loss(model, task.batches[step])).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        return rows(manager)

    plain = window(torch.amp.GradScaler("cpu", enabled=False))
    torch.testing.assert_close(window(torch.amp.GradScaler("cpu", init_scale=2.0**12)), plain, rtol=1e-6, atol=1e-9)


# --- steps within steps


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_step_of_its_base_class_counts_once(task, with_closure):
    model = task.model()
    optimizer = TwoLevels(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe(num_grads=5))
    manager.modify(model, optimizer, task.steps_per_epoch)
    for step in range(3):
        optimizer.zero_grad()

        def closure(batch=task.batches[step]):
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert manager.state_dict()["step"] == 3
    assert rows(manager).shape[0] == 3
    task.train(model, optimizer, start=3)
    assert zeros(model) == 54


# --- compiled


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what torch imports to compile
@pytest.mark.parametrize("optimizer_name", ["Adam", "SGD"])
def test_compiled_models_and_compiled_steps_prune_as_plain_ones(task, optimizer_name):
    def train(compiled):
        torch.compiler.reset()
        model = task.model()
        optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=torch.tensor(0.02))
        manager = ScheduledModifierManager.from_yaml(
            task.recipe() + "  - !SetLearningRateModifier {learning_rate: 0.01, start_epoch: 1.0}\n"
        )
        called, step_of = model, optimizer.step
        if compiled:
            called = torch.compile(model, backend="eager")
            step_of = torch.compile(optimizer.step, backend="eager")
        manager.modify(called, optimizer, task.steps_per_epoch)
        for step in range(20):
            optimizer.zero_grad()
            task.loss(called, task.batches[step % 5]).backward()
            step_of()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
        assert manager.state_dict()["step"] == 20
        manager.finalize(called)
        return model

    plain, compiled = train(False), train(True)
    assert zeros(compiled) == 54
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_data_parallel_model_prunes_as_a_plain_one(task, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # where there are GPUs, it wants the model there

    def train(wrap):
        model = task.model()
        wrapped = wrap(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
        manager = ScheduledModifierManager.from_yaml(task.recipe())
        manager.modify(wrapped, optimizer, task.steps_per_epoch, allow_parallel_module=False)
        task.train(wrapped, optimizer)
        manager.finalize(wrapped)
        return model

    for one, other in zip(train(nn.DataParallel).parameters(), train(lambda model: model).parameters(), strict=True):
        assert torch.equal(one, other)


# --- parameter groups


def test_parameters_of_several_groups_are_pruned_together(task):
    model = task.model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model[0].weight, model[2].weight], "weight_decay": 0.1},
            {"params": [model[0].bias, model[2].bias], "weight_decay": 0.0},
        ],
        lr=0.02,
    )
    manager = ScheduledModifierManager.from_yaml(task.recipe(global_sparsity="true"))
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer)
    assert zeros(model) == 54


def test_what_no_optimizer_trains_is_refused(task):
    model = task.model()
    manager = ScheduledModifierManager.from_yaml(task.recipe())
    with pytest.raises(ValueError, match=r"does not train 2\.weight"):
        manager.modify(model, [torch.optim.SGD(model[0].parameters(), lr=0.1)], task.steps_per_epoch)
    with pytest.raises(TypeError, match="optimizer is a str"):
        manager.modify(model, [torch.optim.SGD(model.parameters(), lr=0.1), "adam"], task.steps_per_epoch)


# --- two modifiers on one parameter, one after the other


def of_magnitude(**keys):
    return MagnitudePruningModifier(
        **{"init_sparsity": 0.5, "final_sparsity": 0.8, "start_epoch": 2.0, "end_epoch": 3.0} | keys
    )


def test_a_modifier_takes_over_where_another_has_ended(task):
    def train(*modifiers, stop=20):
        model = task.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        manager = ScheduledModifierManager(modifiers)
        manager.modify(model, optimizer, task.steps_per_epoch)
        seen = []
        task.train(model, optimizer, stop=stop, after_step=lambda step: seen.append((manager.sparsity, zeros(model))))
        return seen, manager.masks

    first = MFACPruningModifier(
        init_sparsity=0.2, final_sparsity=0.5, start_epoch=1.0, end_epoch=2.0, num_grads=4, damp=0.01
    )
    seen, _ = train(of_magnitude(), first)
    assert seen[9] == (0.5, 36)
    assert seen[-1] == (pytest.approx(0.8, abs=0.01), round(48 * 0.8) + round(24 * 0.8))
    assert all(pruned == round(72 * sparsity) for sparsity, pruned in seen)
    over_all_layers = GlobalMagnitudePruningModifier(
        init_sparsity=0.2, final_sparsity=0.5, start_epoch=1.0, end_epoch=2.0, params="__ALL_PRUNABLE__"
    )
    _, both = train(of_magnitude(), over_all_layers, stop=10)
    _, alone = train(over_all_layers, stop=10)
    assert not any(torch.any(mask & ~alone[name]) for name, mask in both.items())  # its zeros came first


def test_masks_that_are_left_are_held_while_a_later_modifier_lets_all_weights_go(task):
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    manager = ScheduledModifierManager(
        [
            of_magnitude(init_sparsity=0.0, final_sparsity=0.3, start_epoch=0.0, end_epoch=1.0),
            ACDCPruningModifier(
                params="__ALL_PRUNABLE__",
                compression_sparsity=0.5,
                start_epoch=1.0,
                end_epoch=4.0,
                update_frequency=1.0,
            ),
        ]
    )
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=8)
    assert zeros(model) == round(48 * 0.3) + round(24 * 0.3) == round(72 * manager.sparsity)


def test_the_sampler_is_not_asked_where_the_recipe_wants_the_gradients_of_training(task):
    def never():
        raise AssertionError("asked for samples")

    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(task.recipe(use_gradient_buffering="true"))
    sampler = GradSampler(never, nn.functional.mse_loss)
    manager.modify(model, optimizer, task.steps_per_epoch, grad_sampler=sampler)
    task.train(model, optimizer)
    assert zeros(model) == 54
