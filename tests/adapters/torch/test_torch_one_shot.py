import copy
import itertools
import logging

import pytest
import torch
from torch import nn

from mfac_core import RecipeError, SettingError, load_recipe
from mfac_core.recipe.recommended import RECOMMENDED
from mfac_core.recipe.values import flow_text
from mfac_torch import (
    EpochRangeModifier,
    GradSampler,
    MFACPruningModifier,
    ScheduledModifierManager,
    prune_one_shot,
    recalibrate_batchnorm,
)

pytestmark = pytest.mark.usefixtures("placement")  # on the CPU, and on a GPU

LOSS = nn.functional.mse_loss
FEW = {"num_grads": 4, "fisher_block_size": 16}


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def normalized(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()


def test_one_call_is_the_manager_with_the_recommended_settings(task):
    model, twin = task.model(), task.model()
    masks = prune_one_shot(model, task.batches, LOSS, sparsity=0.75, **FEW)
    modifier = MFACPruningModifier(final_sparsity=0.75, end_epoch=0.0, **{**RECOMMENDED, **FEW})
    ScheduledModifierManager([modifier]).apply(twin, grad_sampler=GradSampler(task.batches, LOSS))
    assert same(weights_of(model), weights_of(twin))
    assert masks.keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert sum(int((~mask).sum()) for mask in masks.values()) == 54  # of 72
    assert same(masks, prune_one_shot(task.model(), task.batches, LOSS, final_sparsity=0.75, **FEW))


OTHERS = {"global_sparsity": False, "update": "independent", "num_recomputations": 2, "damp": 10.0, "num_grads": 3}


@pytest.mark.parametrize("key", RECOMMENDED)
def test_a_key_takes_the_place_of_a_recommended_setting(task, key):
    model, other = task.model(), task.model()
    prune_one_shot(model, task.batches, LOSS, sparsity=0.75, **FEW)
    prune_one_shot(other, task.batches, LOSS, sparsity=0.75, **{**FEW, key: OTHERS[key]})
    assert not same(weights_of(model), weights_of(other))


def test_the_log_says_which_settings_are_taken(task, caplog):
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        prune_one_shot(task.model(), task.batches, LOSS, sparsity=0.5, **FEW)
    lines = [record.getMessage() for record in caplog.records if record.name == "mfac_torch"]
    taken = next(
        line for line in lines if line.startswith("one-shot pruning with recommended settings where none are given: ")
    )
    assert all(f"{key} {flow_text(value)}" in taken for key, value in RECOMMENDED.items() if key not in FEW)
    assert "num_grads" not in taken
    assert "one-shot pruning with other settings than recommended: num_grads 4 (recommended: 256)" in lines


def test_a_recipe_that_prunes_nothing_is_refused(task):
    with pytest.raises(RecipeError, match="no pruning modifier, so there is nothing to do"):
        ScheduledModifierManager([EpochRangeModifier(end_epoch=3.0)]).apply(task.model())


def test_a_recipe_that_is_applied_means_what_it_says_and_the_log_says_where_that_differs(task, caplog):
    model, twin = task.model(), task.model()
    sampler = GradSampler(task.batches, LOSS)
    with caplog.at_level(logging.INFO, logger="mfac_torch"):
        ScheduledModifierManager.from_yaml(task.recipe()).apply(model, grad_sampler=sampler)
    assert "than recommended: global_sparsity false (recommended: true), update independent (joint), " in caplog.text
    prune_one_shot(
        twin,
        task.batches,
        LOSS,
        sparsity=0.75,
        global_sparsity=False,
        update="independent",
        num_recomputations=1,
        damp=0.01,
        **FEW,
    )
    assert same(weights_of(model), weights_of(twin))


def test_further_keys_are_those_of_the_modifier(task):
    model = task.model()
    masks = prune_one_shot(model, task.batches, LOSS, sparsity=0.5, mask_type="1:2", exclude=["2"], **FEW)
    assert masks.keys() == {"0.weight"}
    assert ((model[0].weight.reshape(-1, 2) == 0).sum(1) == 1).all()
    model = task.model()
    masks = prune_one_shot(model, task.batches, LOSS, sparsity={0.5: ["0.weight"], 0.75: ["2.weight"]}, **FEW)
    assert [int((~mask).sum()) for mask in masks.values()] == [24, 18]


def test_wrappers_are_looked_through_and_a_sampler_may_be_given(task):
    model, twin = task.model(), task.model()
    prune_one_shot(nn.DataParallel(model), GradSampler(task.batches, LOSS), sparsity=0.5, **FEW)
    prune_one_shot(twin, task.batches, LOSS, sparsity=0.5, **FEW)
    assert same(weights_of(model), weights_of(twin))
    with pytest.raises(TypeError, match="the GradSampler has its own loss; leave loss_fn out"):
        prune_one_shot(model, GradSampler(task.batches, LOSS), LOSS, sparsity=0.9)


def test_a_model_that_returns_its_loss_needs_none(task):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = task.model()

        def forward(self, inputs, labels):
            return LOSS(self.layer(inputs), labels)

    model, twin = WithLoss(), task.model()
    prune_one_shot(model, task.batches, sparsity=0.5, **FEW)
    prune_one_shot(twin, task.batches, LOSS, sparsity=0.5, **FEW)
    assert same(weights_of(model.layer), weights_of(twin))


def test_a_recipe_is_refused_wherever_it_stands(task, tmp_path):
    model, recipe = task.model(), task.recipe()
    before = weights_of(model)
    for given in (recipe, tmp_path / "recipe.yaml", load_recipe(recipe), ScheduledModifierManager.from_yaml(recipe)):
        for arguments, keys, name in (
            ([given], {"sparsity": 0.5}, "loader"),
            ([task.batches, given], {"sparsity": 0.5}, "loss_fn"),
            ([task.batches, LOSS], {"sparsity": given}, "sparsity"),
            ([task.batches, LOSS], {"recipe": given}, "recipe"),
        ):
            with pytest.raises(TypeError, match=rf"^{name} is a .*takes no recipe.*from_yaml\(recipe\).apply\(model"):
                prune_one_shot(model, *arguments, **keys)
    assert same(weights_of(model), before)


def test_what_is_wrong_is_named_and_changes_nothing(task):
    model = task.model()
    before = weights_of(model)
    for error, keys, message in (
        (TypeError, {}, "the sparsity is missing; pass sparsity=0.9"),
        (TypeError, {"sparsity": 0.5, "final_sparsity": 0.5}, "name one setting twice"),
        (RecipeError, {"sparsity": 1.5}, "final_sparsity: 1.5 is out of range"),
        (RecipeError, {"sparsity": 0.5, "num_grad": 4}, r"num_grad: unknown key \(did you mean num_grads"),
        (SettingError, {"sparsity": 0.5, "params": ["nowhere"]}, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            prune_one_shot(model, task.batches, LOSS, **keys)
    with pytest.raises(TypeError, match="pass an iterable of batches"):
        prune_one_shot(model, None, LOSS, sparsity=0.5)
    assert same(weights_of(model), before)


def test_a_failure_late_on_the_way_leaves_the_model_as_it_was(task):
    model = normalized()
    before = copy.deepcopy(model.state_dict())
    drawn = itertools.count()

    def batches():
        for batch in task.batches:
            if next(drawn) == 9:  # in the third of the recomputations
                raise RuntimeError("the disk is gone")
            yield batch

    with pytest.raises(RuntimeError, match="the disk is gone"):
        prune_one_shot(model, batches, LOSS, sparsity=0.9, num_recomputations=4, recalibrate_batchnorm=True, **FEW)
    assert same(model.state_dict(), before)


# --- batch normalization


def stale(caplog):
    return [each.getMessage() for each in caplog.records if "statistics of the weights before pruning" in each.message]


def test_statistics_may_be_estimated_anew_after_pruning(task, caplog):
    model, twin = normalized(), normalized()
    masks = prune_one_shot(model, task.batches, LOSS, sparsity=0.5, recalibrate_batchnorm=True, **FEW)
    assert not stale(caplog)
    prune_one_shot(twin, task.batches, LOSS, sparsity=0.5, **FEW)
    assert not torch.equal(model[1].running_mean, twin[1].running_mean)
    assert recalibrate_batchnorm(twin, task.batches) == 1
    assert same(model.state_dict(), twin.state_dict())
    assert masks.keys() == {"0.weight", "3.weight"}
    assert not model.training


def test_statistics_that_stay_are_a_warning_that_names_the_cure(task, caplog):
    prune_one_shot(normalized(), task.batches, LOSS, sparsity=0.5, **FEW)
    (line,) = stale(caplog)
    assert line.startswith("1 batch normalization layer (1) still has the statistics")
    assert "mfac_torch.recalibrate_batchnorm(model, loader) recalibrates them" in line
    caplog.clear()
    prune_one_shot(task.model(), task.batches, LOSS, sparsity=0.5, **FEW)  # without such a layer
    held = ScheduledModifierManager.from_yaml("modifiers:\n- !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n")
    held.apply(normalized())  # and where no weight moves
    assert not stale(caplog)


def test_a_recipe_of_any_kind_recalibrates_where_there_are_batches(task, caplog):
    model = normalized()
    manager = ScheduledModifierManager.from_yaml(task.recipe("MagnitudePruningModifier"))
    with pytest.raises(TypeError, match="recalibrate_batchnorm needs batches; pass grad_sampler="):
        manager.apply(model, recalibrate_batchnorm=True)
    assert not (model[0].weight == 0).any()
    manager.apply(model, grad_sampler=GradSampler(task.batches, LOSS), recalibrate_batchnorm=True)
    assert model[1].num_batches_tracked == len(task.batches)
    assert not stale(caplog)
    manager.apply(normalized())
    assert len(stale(caplog)) == 1


def test_batches_to_recalibrate_with_get_the_options_of_the_recipe(task):
    asked = []

    def batches(size):
        asked.append(size)
        return iter(task.batches)

    modifier = MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, grad_sampler_kwargs={"size": 16}, **FEW)
    ScheduledModifierManager([modifier]).apply(
        normalized(), grad_sampler=GradSampler(batches, LOSS), recalibrate_batchnorm=True
    )
    assert asked == [16, 16, 16]  # for the samples, to measure the loss on, and to recalibrate with


def test_a_recipe_that_prunes_nothing_yet_has_its_options_and_its_log_all_the_same(caplog):
    caplog.set_level(logging.INFO, "mfac_torch")
    sizes = []

    def batches(size):
        sizes.append(size)
        return [(torch.randn(size, 6), torch.randn(size, 3))]

    model = normalized()
    before = {name: value.clone() for name, value in model.named_parameters()}
    modifier = MFACPruningModifier(
        final_sparsity=0.5, start_epoch=4.0, end_epoch=8.0, grad_sampler_kwargs={"size": 16}, **FEW
    )
    ScheduledModifierManager([modifier]).apply(
        model, epoch=2.0, grad_sampler=GradSampler(batches, LOSS), recalibrate_batchnorm=True
    )
    assert sizes == [16]
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert "with other settings than recommended: " in caplog.text


@pytest.mark.parametrize("epoch", [-1, float("nan"), "4", None, object()])
def test_an_epoch_of_apply_that_is_no_epoch_is_refused(epoch):
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    manager = ScheduledModifierManager.from_yaml(
        "modifiers:\n- !GMPruningModifier {final_sparsity: 0.5, end_epoch: 2}\n"
    )

    with pytest.raises(SettingError, match="epoch"):
        manager.apply(model, epoch)
    assert torch.equal(model.weight, before)
