"""Modifiers as Python objects and as text."""

import logging
import math

import pytest

import mfac_torch
from mfac_core.errors import RecipeError
from mfac_core.recipe import load_recipe
from mfac_core.schedules.one_shot import one_shot
from mfac_torch import (
    ACDCPruningModifier,
    ConstantPruningModifier,
    EpochRangeModifier,
    GlobalMagnitudePruningModifier,
    GMPruningModifier,
    LearningRateFunctionModifier,
    LearningRateModifier,
    MagnitudePruningModifier,
    MFACGlobalPruningModifier,
    MFACPruningModifier,
    OBSPruningModifier,
    ScheduledModifierManager,
    SetLearningRateModifier,
    SetWeightDecayModifier,
    TrainableParamsModifier,
)

GRADUAL = {"final_sparsity": 0.8, "init_sparsity": 0.1, "start_epoch": 1.0, "end_epoch": 5.5, "params": ["re:.*weight"]}
EVERY = {
    "MFACPruningModifier": MFACPruningModifier(**GRADUAL, num_grads={0.0: 8, 0.5: 16}, num_recomputations=2),
    "MFACGlobalPruningModifier": MFACGlobalPruningModifier(**GRADUAL),
    "OBSPruningModifier": OBSPruningModifier(**GRADUAL, grad_sampler_kwargs={"batch_size": 4}),
    "MagnitudePruningModifier": MagnitudePruningModifier(**GRADUAL, mask_type=[1, 4]),
    "GMPruningModifier": GMPruningModifier(**GRADUAL, global_sparsity=True),
    "GlobalMagnitudePruningModifier": GlobalMagnitudePruningModifier(**GRADUAL),
    "ConstantPruningModifier": ConstantPruningModifier(params="__ALL_PRUNABLE__"),
    "ACDCPruningModifier": ACDCPruningModifier(
        compression_sparsity=0.9, start_epoch=0, end_epoch=8, update_frequency=2, params="__ALL_PRUNABLE__"
    ),
    "EpochRangeModifier": EpochRangeModifier(start_epoch=0.0, end_epoch=9.0),
    "SetLearningRateModifier": SetLearningRateModifier(learning_rate=0.1, start_epoch=2.5, param_groups=[0]),
    "LearningRateFunctionModifier": LearningRateFunctionModifier(
        lr_func="cosine", init_lr=0.1, final_lr=0.0, start_epoch=0.0, end_epoch=4.0
    ),
    "LearningRateModifier": LearningRateModifier(
        lr_class="MultiStepLR", lr_kwargs={"milestones": [2, 4], "gamma": 0.1}, init_lr=0.1, start_epoch=0.0
    ),
    "SetWeightDecayModifier": SetWeightDecayModifier(weight_decay=0.0, start_epoch=3.0),
    "TrainableParamsModifier": TrainableParamsModifier(params=["fc.bias"], trainable=False, end_epoch=2.0),
}


def test_every_modifier_has_a_class_of_its_name_and_there_is_no_other():
    offered = {name for name in mfac_torch.__all__ if name.endswith("Modifier")}
    assert offered == set(EVERY) == {type(modifier).__name__ for modifier in EVERY.values()}


@pytest.mark.parametrize("name", EVERY)
def test_a_modifier_survives_the_way_through_text(name, tmp_path):
    manager = ScheduledModifierManager([EVERY[name]], metadata={"author": "me"})
    path = tmp_path / "new folder" / "recipe.yaml"
    manager.save(path)
    again = ScheduledModifierManager.from_yaml(path)
    assert [modifier.settings for modifier in again.modifiers] == [EVERY[name].settings]
    assert "author: me" in path.read_text()
    assert "author" not in "\n".join(manager.to_string_lines(include_metadata=False))
    assert load_recipe(str(manager) + "\n").modifiers == (EVERY[name].settings,)


def test_epochs_are_those_that_any_modifier_names_rounded_up():
    manager = ScheduledModifierManager(EVERY.values())
    assert (manager.min_epochs, manager.max_epochs) == (0, 9)
    assert ScheduledModifierManager([MFACPruningModifier(**GRADUAL)]).max_epochs == 6
    assert ScheduledModifierManager([MFACPruningModifier(**GRADUAL)]).min_epochs == 1
    assert list(range(ScheduledModifierManager([EVERY["SetLearningRateModifier"]]).max_epochs)) == [0, 1, 2]


def test_modifiers_tell_their_epochs_and_their_kind():
    manager = ScheduledModifierManager(EVERY.values())
    assert [modifier.end_epoch for modifier in manager.epoch_modifiers] == [9.0]
    assert [type(modifier).__name__ for modifier in manager.learning_rate_modifiers] == [
        "SetLearningRateModifier",
        "LearningRateFunctionModifier",
        "LearningRateModifier",
    ]
    assert len(manager.pruning_modifiers) == 8
    assert (EVERY["ConstantPruningModifier"].start_epoch, EVERY["ConstantPruningModifier"].end_epoch) == (0.0, -1.0)
    assert list(manager.iter_modifiers()) == list(EVERY.values())


def test_modifiers_that_are_not_supported_are_left_out_when_asked_for(caplog):
    recipe = "modifiers:\n  - !QuantizationModifier {start_epoch: 0.0}\n  - !EpochRangeModifier {end_epoch: 2.0}\n"
    with pytest.raises(RecipeError, match="QuantizationModifier"):
        ScheduledModifierManager.from_yaml(recipe)
    with caplog.at_level(logging.WARNING):
        manager = ScheduledModifierManager.from_yaml(recipe, unsupported="skip")
    assert [type(modifier) for modifier in manager.modifiers] == [EpochRangeModifier]
    assert "QuantizationModifier" in caplog.text


def test_variables_may_be_written_as_text():
    recipe = "epochs: 3\nmodifiers:\n  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: eval(epochs)}\n"
    for variables in ("epochs=7", '{"epochs": 7}', {"epochs": 7}):
        assert ScheduledModifierManager.from_yaml(recipe, recipe_variables=variables).max_epochs == 7


# --- one recipe after another


def test_composed_recipes_follow_one_another(tmp_path):
    first = ScheduledModifierManager(
        [MFACPruningModifier(**GRADUAL), TrainableParamsModifier(params="fc", trainable=True)]
    )
    second = (
        "modifiers:\n  - !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n  - !EpochRangeModifier {end_epoch: 4}\n"
    )
    path = tmp_path / "staged.yaml"
    staged = ScheduledModifierManager.compose_staged(first, second, save_path=path)
    assert isinstance(staged, ScheduledModifierManager)
    epochs = [(modifier.start_epoch, modifier.end_epoch) for modifier in staged.modifiers]
    assert epochs == [(1.0, 5.5), (0.0, 6.0), (6.0, -1.0), (6.0, 10.0)]
    assert [each.settings for each in ScheduledModifierManager.from_yaml(path).modifiers] == [
        each.settings for each in staged.modifiers
    ]
    kept = ScheduledModifierManager.compose_staged(first, second, keep_original_epochs=True)
    assert [modifier.end_epoch for modifier in kept.modifiers] == [5.5, -1.0, -1.0, 4.0]


# --- in one step


def test_one_step_goes_as_far_as_the_recipe_is_at_an_epoch():
    acdc, constant = EVERY["ACDCPruningModifier"].settings, EVERY["ConstantPruningModifier"].settings
    assert one_shot(acdc, 1.0) == []
    assert one_shot(acdc, 2.0)[0].final_sparsity == 0.9
    assert one_shot(acdc)[0].scope == "global"
    assert one_shot(constant)[0].end_epoch == math.inf
    mfac = MFACPruningModifier(**GRADUAL | {"final_sparsity": {0.5: ["a"], 0.7: ["b"]}, "params": []}).settings
    assert [(each.final_sparsity, each.params) for each in one_shot(mfac)] == [(0.5, ("a",)), (0.7, ("b",))]
    assert one_shot(mfac, 0.5) == []
    assert one_shot(mfac, 1.0)[0].final_sparsity == 0.1
    from_param = MagnitudePruningModifier(**GRADUAL | {"init_sparsity": "__FROM_PARAM__"}).settings
    assert one_shot(from_param)[0].final_sparsity == 0.8
    with pytest.raises(ValueError, match="leaves the sparsity at epoch 2 undefined"):
        one_shot(from_param, 2.0)


RECIPE_WITH_METADATA = """
__metadata__:
  author: me
  runs: [{seed: 1, note: "eval(seed)"}, 1.5]
seed: 3
modifiers:
  - !GMPruningModifier {final_sparsity: 0.5, end_epoch: 1}
"""


def test_the_metadata_of_a_recipe_are_saved_with_it(tmp_path):
    manager = ScheduledModifierManager.from_yaml(RECIPE_WITH_METADATA, metadata={"author": "you", "host": "here"})
    expected = {"author": "you", "runs": [{"seed": 1, "note": "eval(seed)"}, 1.5], "host": "here"}
    assert manager.metadata == expected
    manager.save(tmp_path / "recipe.yaml")
    assert ScheduledModifierManager.from_yaml(tmp_path / "recipe.yaml").metadata == expected


def test_a_modifier_of_a_recipe_has_the_class_that_the_recipe_names():
    (modifier,) = ScheduledModifierManager.from_yaml(RECIPE_WITH_METADATA).modifiers
    assert type(modifier) is GMPruningModifier
