"""Learning rates, weight decay and frozen parameters, by the epoch."""

import pytest
import torch

from mfac_core.errors import SettingError
from mfac_torch import (
    GMPruningModifier,
    LearningRateFunctionModifier,
    LearningRateModifier,
    ScheduledModifierManager,
    SetLearningRateModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
)


def option_at_each_step(task, modifiers, *, stop=15, option="lr", after_step=None, make=None):
    """The option of each parameter group that each of the optimizer's steps was made with."""
    model = task.model()
    optimizer = (
        make(model)
        if make
        else torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.2)
    )
    ScheduledModifierManager(modifiers).modify(model, optimizer, task.steps_per_epoch)
    seen = []

    def look(step):
        seen.append([float(group[option]) for group in optimizer.param_groups])
        if after_step is not None:
            after_step(step, optimizer)

    task.train(model, optimizer, stop=stop, after_step=look)
    return seen


def test_a_linear_function_moves_the_rate_at_each_step_and_ends_exactly(task):
    modifier = LearningRateFunctionModifier(lr_func="linear", init_lr=0.1, final_lr=0.0, start_epoch=1.0, end_epoch=2.0)
    seen = option_at_each_step(task, [modifier], stop=12)
    expected = [0.2] * 5 + [0.1, 0.08, 0.06, 0.04, 0.02] + [0.0] * 2
    assert seen == [[pytest.approx(rate)] * 2 for rate in expected]
    assert seen[10] == [0.0, 0.0]


def test_an_end_between_two_steps_is_reached_exactly(task):
    modifier = LearningRateFunctionModifier(
        lr_func="linear", init_lr=0.1, final_lr=0.01, start_epoch=0.0, end_epoch=1.27
    )
    assert option_at_each_step(task, [modifier], stop=8)[6:] == [[0.01, 0.01]] * 2


def test_cyclic_and_cosine_functions_are_followed(task):
    def of(function):
        return LearningRateFunctionModifier(
            lr_func=function, init_lr=0.1, final_lr=0.0, start_epoch=0.0, end_epoch=2.0, cycle_epochs=1.0
        )

    cyclic = [rates[0] for rates in option_at_each_step(task, [of("cyclic_linear")], stop=10)]
    assert cyclic == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02] * 2)
    cosine = [rates[0] for rates in option_at_each_step(task, [of("cosine")], stop=11)]
    assert cosine[5] == pytest.approx(0.05)
    assert cosine[10] == 0.0
    assert cosine == sorted(cosine, reverse=True)


def test_a_schedule_of_pytorch_is_followed_epoch_by_epoch(task):
    modifier = LearningRateModifier(
        lr_class="StepLR", lr_kwargs={"step_size": 1, "gamma": 0.5}, init_lr=0.1, start_epoch=1.0, end_epoch=3.0
    )
    rates = [rates[0] for rates in option_at_each_step(task, [modifier], stop=20)]
    assert rates == pytest.approx([0.2] * 5 + [0.1] * 5 + [0.05] * 10)


def test_outside_its_time_a_function_leaves_the_rate_to_your_scheduler(task):
    def my_own(step, optimizer):
        if step in {2, 12}:
            for group in optimizer.param_groups:
                group["lr"] = 0.7

    modifier = LearningRateFunctionModifier(
        lr_func="linear", init_lr=0.1, final_lr=0.05, start_epoch=1.0, end_epoch=2.0
    )
    rates = [rates[0] for rates in option_at_each_step(task, [modifier], after_step=my_own)]
    assert rates[:5] == [0.2, 0.2, 0.7, 0.7, 0.7]
    assert rates[5] == 0.1
    assert rates[10:] == [0.05, 0.05, 0.7, 0.7, 0.7]


def test_param_groups_are_meant_by_their_index(task):
    modifiers = [
        SetLearningRateModifier(learning_rate=0.01, start_epoch=1.0, param_groups=[1]),
        SetWeightDecayModifier(weight_decay=0.3, start_epoch=1.0, param_groups=[0]),
    ]
    assert option_at_each_step(task, modifiers, stop=7) == [[0.2, 0.2]] * 5 + [[0.2, 0.01]] * 2
    decays = option_at_each_step(task, modifiers, stop=7, option="weight_decay")
    assert decays == [[0.0, 0.0]] * 5 + [[0.3, 0.0]] * 2


def test_groups_of_several_optimizers_are_counted_through(task):
    model = task.model()
    optimizers = [torch.optim.SGD(model[index].parameters(), lr=0.2) for index in (0, 2)]
    manager = ScheduledModifierManager([SetLearningRateModifier(learning_rate=0.01, param_groups=[1])])
    manager.modify(model, optimizers, task.steps_per_epoch)
    task.loss(model, task.batches[0]).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.2, 0.01]


def test_a_rate_that_is_a_tensor_is_changed_in_place(task):
    rates = []

    def make(model):
        rates.append(torch.tensor(0.2))
        return torch.optim.Adam(model.parameters(), lr=rates[0])

    option_at_each_step(task, [SetLearningRateModifier(learning_rate=0.125)], stop=1, make=make)
    assert rates[0] == 0.125


@pytest.mark.parametrize(
    ("modifier", "make", "message"),
    [
        (
            SetLearningRateModifier(learning_rate=0.1, param_groups=[2]),
            None,
            "SetLearningRateModifier.param_groups: 2 is not the index of a parameter group; the optimizer has 2,",
        ),
        (
            SetWeightDecayModifier(weight_decay=0.1),
            lambda model: torch.optim.LBFGS(model.parameters()),
            "weight_decay: parameter group 0 of the optimizer has no such option",
        ),
        (
            TrainableParamsModifier(params=["nothing"], trainable=False),
            None,
            "TrainableParamsModifier.params: 'nothing' matches no parameter",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(task, modifier, make, message):
    with pytest.raises(SettingError, match=message):
        option_at_each_step(task, [modifier], make=make)


# --- frozen parameters


def freezing(**keys):
    return TrainableParamsModifier(**{"params": ["0.weight"], "trainable": False} | keys)


def test_parameters_are_frozen_for_their_epochs_and_trained_again_after_them(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = ScheduledModifierManager([freezing(start_epoch=1.0, end_epoch=2.0)])
    manager.modify(model, optimizer, task.steps_per_epoch)
    moved, trained, before = [], [], [model[0].weight.detach().clone()]

    def look(step):
        moved.append(not torch.equal(model[0].weight, before[-1]))
        trained.append(model[0].weight.requires_grad)
        before.append(model[0].weight.detach().clone())

    task.train(model, optimizer, stop=12, after_step=look)
    assert moved == [True] * 5 + [False] * 5 + [True] * 2
    assert trained == [True] * 4 + [False] * 5 + [True] * 3


def test_momentum_does_not_move_what_is_frozen(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    manager = ScheduledModifierManager([freezing(start_epoch=1.0)])
    manager.modify(model, optimizer, task.steps_per_epoch)
    weights = []
    for step in range(8):
        optimizer.zero_grad(set_to_none=False)
        task.loss(model, task.batches[step % 5]).backward()
        optimizer.step()
        weights.append(model[0].weight.detach().clone())
    assert not torch.equal(weights[3], weights[4])
    assert torch.equal(weights[4], weights[7])


def test_a_start_at_epoch_0_holds_for_the_first_step(task):
    model = task.model()
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([freezing()])
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=3)
    assert torch.equal(model[0].weight, before)
    manager.finalize(model)
    assert model[0].weight.requires_grad


def test_finalize_freezes_again_what_was_frozen_before(task):
    model = task.model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([freezing(params=["re:0[.]"], trainable=True)])
    manager.modify(model, optimizer, task.steps_per_epoch)
    assert model[0].weight.requires_grad
    task.train(model, optimizer, stop=2)
    manager.finalize(model)
    assert [parameter.requires_grad for parameter in model[0].parameters()] == [False, True]


def test_the_modifier_that_begins_later_decides(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager(
        [freezing(params=["0.bias"], trainable=True, start_epoch=1.0), freezing(params=["__ALL__"])]
    )
    manager.modify(model, optimizer, task.steps_per_epoch)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    for _ in range(5):
        optimizer.step()
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["0.bias"]


def test_names_that_match_nothing_may_be_allowed(task, caplog):
    model = task.model()
    manager = ScheduledModifierManager([freezing(params=["nothing", "2.bias"], params_strict=False)])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), task.steps_per_epoch)
    assert not model[2].bias.requires_grad
    (warning,) = [record for record in caplog.records if "is left out" in record.getMessage()]
    assert (warning.levelname, warning.name) == ("WARNING", "mfac_torch")


# --- resumed


@pytest.mark.parametrize("stopped_at", [0, 3, 5, 7, 10, 12])
def test_a_resumed_run_has_the_same_rates_and_frozen_parameters(task, stopped_at):
    modifiers = [
        SetLearningRateModifier(learning_rate=0.05),
        LearningRateFunctionModifier(lr_func="cosine", init_lr=0.1, final_lr=0.01, start_epoch=1.0, end_epoch=2.0),
        SetWeightDecayModifier(weight_decay=0.01, start_epoch=2.0),
        freezing(start_epoch=1.0, end_epoch=2.0),
    ]

    def begin(seed):
        model = task.model(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        manager = ScheduledModifierManager(modifiers)
        manager.modify(model, optimizer, task.steps_per_epoch)
        return model, optimizer, manager

    whole, killed, resumed = begin(0), begin(0), begin(1)
    task.train(*whole[:2], stop=14)
    task.train(*killed[:2], stop=stopped_at)
    for part, saved in zip(resumed, killed, strict=True):
        part.load_state_dict(saved.state_dict())
    assert resumed[0][0].weight.requires_grad == (not 5 <= stopped_at < 10)
    task.train(*resumed[:2], start=stopped_at, stop=14)
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
    for option in ("lr", "weight_decay"):
        assert whole[1].param_groups[0][option] == resumed[1].param_groups[0][option]


def test_a_rate_that_you_changed_since_is_not_set_again_on_resuming(task):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    manager = ScheduledModifierManager([SetLearningRateModifier(learning_rate=0.05)])
    manager.modify(model, optimizer, task.steps_per_epoch)
    task.train(model, optimizer, stop=2)
    optimizer.param_groups[0]["lr"] = 0.001
    again = ScheduledModifierManager([SetLearningRateModifier(learning_rate=0.05)])
    state = manager.state_dict()
    manager.finalize(model)
    again.modify(model, optimizer, task.steps_per_epoch)
    again.load_state_dict(state)
    task.train(model, optimizer, stop=1)
    assert optimizer.param_groups[0]["lr"] == 0.001


def test_what_is_pruned_while_it_is_frozen_is_warned_of(task, caplog):
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruning = GMPruningModifier(final_sparsity=0.5, start_epoch=1.0, end_epoch=2.0, params=["0.weight", "2.weight"])
    freezing = TrainableParamsModifier(params=["0.weight"], trainable=False, start_epoch=1.5)
    ScheduledModifierManager([pruning, freezing]).modify(model, optimizer, task.steps_per_epoch)
    assert "GMPruningModifier prunes 0.weight while TrainableParamsModifier freezes them" in caplog.text


def test_a_pruning_modifier_that_does_not_fit_is_named(task):
    model = task.model()
    manager = ScheduledModifierManager([GMPruningModifier(final_sparsity=0.5, end_epoch=2.0, params=["nothing"])])
    with pytest.raises(SettingError, match=r"^GMPruningModifier\.params: 'nothing' matches no parameter"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), task.steps_per_epoch)


def test_a_recipe_that_does_not_prune_sets_what_it_sets_and_says_so(task, caplog):
    seen = option_at_each_step(task, [SetLearningRateModifier(learning_rate=0.01, start_epoch=0.0)], stop=2)
    assert seen == [[0.01, 0.01]] * 2
    assert caplog.text.count("the recipe has no pruning modifier: nothing is pruned") == 1
