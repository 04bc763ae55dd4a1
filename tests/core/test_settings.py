from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from mfac_core.errors import SettingError
from mfac_core.recipe import keys
from mfac_core.settings import training as training_settings
from mfac_core.settings.checks import checked_mask_type
from mfac_core.settings.pruning import (
    FROM_PARAM,
    ACDCSettings,
    ConstantSettings,
    GradualSettings,
    MagnitudeSettings,
    MFACSettings,
)
from mfac_core.settings.spellings import RECIPE_SPELLINGS
from mfac_core.settings.training import EpochRange, SetWeightDecay, TrainableParams


def gradual(**changes: object) -> GradualSettings:
    return GradualSettings(**{"final_sparsity": 0.8, "end_epoch": 10.0, **changes})


def mfac(**changes: object) -> MFACSettings:
    return MFACSettings(**{"final_sparsity": 0.8, "end_epoch": 10.0, **changes})


def acdc(**changes: object) -> ACDCSettings:
    return ACDCSettings(**{"compression_sparsity": 0.8, "end_epoch": 10.0, **changes})


@pytest.mark.parametrize(
    ("make", "changes", "field", "message"),
    [
        (gradual, {"start_epoch": -1}, "start_epoch", "the rule is start_epoch >= 0"),
        (gradual, {"end_epoch": -1}, "end_epoch", "the rule is end_epoch >= 0"),
        (gradual, {"end_epoch": math.inf}, "end_epoch", "inf is not a finite number"),
        (gradual, {"end_epoch": math.nan}, "end_epoch", "nan is not a finite number"),
        (gradual, {"end_epoch": True}, "end_epoch", "True is not a finite number"),
        (gradual, {"end_epoch": "3"}, "end_epoch", "'3' is not a finite number"),
        (gradual, {"end_epoch": 10**400}, "end_epoch", "is not a finite number"),
        (gradual, {"start_epoch": 11}, "end_epoch", "10.0 is before start_epoch 11; write an end_epoch of at least 11"),
        (gradual, {"leave_enabled": 1}, "leave_enabled", "1 is not a boolean; write true or false"),
        (gradual, {"params": ()}, "params", "() must be a name or a non-empty list of names"),
        (gradual, {"params": ("",)}, "params", "('',) must be a name"),
        (gradual, {"params": {"a"}}, "params", "{'a'} must be a name"),
        (gradual, {"params": [3]}, "params", "[3] must be a name"),
        (gradual, {"params": ("a", "re:(b")}, "params", "'re:(b' is not a regular expression: missing )"),
        (gradual, {"final_sparsity": {0.5: "re:["}}, "final_sparsity", "'re:[' is not a regular expression"),
        (gradual, {"final_sparsity": 0.0}, "final_sparsity", "the rule is 0 < final_sparsity < 1"),
        (gradual, {"final_sparsity": 1.0}, "final_sparsity", "1.0 is out of range"),
        (gradual, {"final_sparsity": {}}, "final_sparsity", "{} is empty"),
        (gradual, {"final_sparsity": {0.5: ()}}, "final_sparsity", "() must be a name or a non-empty list"),
        (gradual, {"final_sparsity": {1.5: ("a",)}}, "final_sparsity", "1.5 is out of range"),
        (
            gradual,
            {"final_sparsity": {0.5: "a"}, "params": "b"},
            "params",
            "['b'] conflicts with final_sparsity",
        ),
        (gradual, {"initial_sparsity": -0.1}, "initial_sparsity", "-0.1 is out of range"),
        (gradual, {"initial_sparsity": "__FROM__"}, "initial_sparsity", "or __FROM_PARAM__"),
        (
            gradual,
            {"initial_sparsity": 0.9},
            "initial_sparsity",
            "0.9 is above final_sparsity 0.8; pruned weights never",
        ),
        (
            gradual,
            {"initial_sparsity": 0.6, "final_sparsity": {0.9: "a", 0.5: "b"}},
            "initial_sparsity",
            "0.6 is above final_sparsity 0.5",
        ),
        (gradual, {"update_frequency": 0}, "update_frequency", "the rule is update_frequency > 0 (epochs)"),
        (gradual, {"interpolation": "cosine"}, "interpolation", "'cosine' is not one of linear, cubic, inverse_cubic"),
        (gradual, {"scope": "all"}, "scope", "'all' is not one of layer, global"),
        (gradual, {"mask_type": "block8"}, "mask_type", "'block8' is not a mask type; write unstructured, channel"),
        (
            gradual,
            {"mask_type": "2:4"},
            "mask_type",
            "2:4 allows a sparsity of at most 0.5, but the final sparsity is 0.8; low",
        ),
        (gradual, {"mask_type": (1, 2, 3)}, "mask_type", "(1, 2, 3) is not a mask type"),
        (gradual, {"mask_type": (0, 2)}, "mask_type", "(0, 2) is not a mask type"),
        (gradual, {"mask_type": (True, 2)}, "mask_type", "(True, 2) is not a mask type"),
        (mfac, {"num_gradients": 0}, "num_gradients", "0 must be a positive integer"),
        (mfac, {"num_gradients": {}}, "num_gradients", "{} must be a positive integer, or a mapping"),
        (mfac, {"num_gradients": {0.5: 3}}, "num_gradients", "{0.5: 3} has no key 0.0"),
        (mfac, {"num_gradients": {0.0: 3, 1.0: 4}}, "num_gradients", "the key 1.0 is not a sparsity"),
        (mfac, {"num_gradients": {False: 4}}, "num_gradients", "the key False is not a sparsity"),
        (mfac, {"num_gradients": {0.0: 2.5}}, "num_gradients", "2.5 at sparsity 0.0 is not a number of rows"),
        (mfac, {"block_size": 0}, "block_size", "0 must be a positive integer, or null (None)"),
        (mfac, {"block_size": True}, "block_size", "True must be a positive integer"),
        (mfac, {"damping": 0.0}, "damping", 'the rule is damping > 0, or "auto"'),
        (mfac, {"damping": "AUTO"}, "damping", "'AUTO' is not a finite number; the rule is damping > 0, or \"auto\""),
        (mfac, {"update": "both"}, "update", "'both' is not one of independent, joint"),
        (mfac, {"num_recomputations": 0}, "num_recomputations", "0 must be a positive integer"),
        (mfac, {"num_recomputations": 2.0}, "num_recomputations", "2.0 must be a positive integer"),
        (mfac, {"gradient_origin": "sampler"}, "gradient_origin", "'sampler' is not one of auto, training"),
        (mfac, {"sampler_options": [1]}, "sampler_options", "[1] must be a mapping from argument to value"),
        (mfac, {"sampler_options": {1: 2}}, "sampler_options", "{1: 2} must be a mapping"),
        (mfac, {"devices": ()}, "devices", "() must be a non-empty list of device names"),
        (mfac, {"devices": None}, "devices", "None must be a non-empty list of device names"),
        (mfac, {"devices": ("",)}, "devices", "('',) must be a non-empty list"),
        (mfac, {"devices": ("auto", "cpu")}, "devices", "mixes auto with names"),
        (mfac, {"devices": ("cpu", "cpu")}, "devices", "names a device twice"),
        (mfac, {"gradients_device": ""}, "gradients_device", "'' must be a device name"),
        (mfac, {"gradients_device": None}, "gradients_device", "None must be a device name"),
        (mfac, {"gradients_dtype": "float16"}, "gradients_dtype", "'float16' is not one of float32, bfloat16"),
        (
            mfac,
            {"gradients_dtype": "bfloat16", "block_size": None},
            "gradients_dtype",
            "bfloat16 saves no memory with a single block",
        ),
        (acdc, {"compression_sparsity": 1.0}, "compression_sparsity", "the rule is 0 < compression_sparsity < 1"),
        (acdc, {"update_frequency": 0.0}, "update_frequency", "the rule is update_frequency > 0"),
        (acdc, {"scope": "both"}, "scope", "'both' is not one of layer, global"),
        (acdc, {"mask_type": "1:2"}, "mask_type", "1:2 allows a sparsity of at most 0.5"),
        (acdc, {"reset_momentum": None}, "reset_momentum", "None is not a boolean"),
        (acdc, {"end_epoch": math.inf}, "end_epoch", "inf is not a finite number"),
        (ConstantSettings, {"end_epoch": -1}, "end_epoch", "-1 is out of range"),
        (ConstantSettings, {"start_epoch": 4, "end_epoch": 3}, "end_epoch", "3 is before start_epoch 4"),
        (EpochRange, {"end_epoch": 0}, "end_epoch", "the rule is end_epoch > start_epoch (0.0)"),
        (EpochRange, {"end_epoch": 3, "start_epoch": -1}, "start_epoch", "the rule is start_epoch >= 0"),
        (SetWeightDecay, {"weight_decay": -0.1}, "weight_decay", "the rule is weight_decay >= 0"),
        (
            SetWeightDecay,
            {"weight_decay": 0.1, "start_epoch": -1},
            "start_epoch",
            "start_epoch >= 0 (0 is from the beg",
        ),
        (SetWeightDecay, {"weight_decay": 0.1, "param_groups": 0}, "param_groups", "0 must be a list of indices"),
        (TrainableParams, {"params": ()}, "params", "() must be a name"),
        (TrainableParams, {"params": "re:+"}, "params", "'re:+' is not a regular expression"),
        (TrainableParams, {"params": "a", "trainable": "no"}, "trainable", "'no' is not a boolean"),
        (TrainableParams, {"params": "a", "strict": 0}, "strict", "0 is not a boolean"),
        (
            TrainableParams,
            {"params": "a", "start_epoch": 3, "end_epoch": 3},
            "end_epoch",
            "end_epoch > start_epoch (3)",
        ),
    ],
)
def test_each_rule_names_setting_value_and_rule(make, changes, field, message):
    with pytest.raises(SettingError) as caught:
        make(**changes)
    assert caught.value.field == field
    assert message in str(caught.value)


def test_values_take_their_one_form():
    settings = mfac(params="a", devices="cpu", num_gradients={0.5: np.int64(9), 0: 8}, mask_type=[np.int64(1), 4])
    assert (settings.params, settings.devices) == (("a",), ("cpu",))
    assert settings.num_gradients == {0.0: 8, 0.5: 9}
    assert settings.mask_type == (1, 4)
    assert TrainableParams(params="a").params == ("a",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("unstructured", "unstructured"),
        ("channel", "channel"),
        ("filter", "filter"),
        ("block", "block4"),
        ("block4", "block4"),
        ("tensorrt", "2:4"),
        ("4:16", "4:16"),
        ([1, -1], (1, -1)),
    ],
)
def test_spellings_of_mask_types(given, expected):
    assert checked_mask_type(given, [0.5]) == expected


@pytest.mark.parametrize(("final", "allowed"), [(0.5, True), (0.51, True), (0.52, False)])
def test_patterns_allow_what_they_can_reach(final, allowed):
    if allowed:
        assert gradual(final_sparsity=final, mask_type="2:4").mask_type == "2:4"
    else:
        with pytest.raises(SettingError, match="^mask_type: 2:4 allows a sparsity of at most"):
            gradual(final_sparsity=final, mask_type="2:4")


@pytest.mark.parametrize("mask_type", ["2:2", "4:2", "0:4", "2:4:8", "2:", ":4", "02:4", " 2:4"])
def test_what_is_no_pattern(mask_type):
    with pytest.raises(SettingError, match="is not a mask type"):
        checked_mask_type(mask_type)


def test_an_initial_sparsity_may_be_that_of_the_weights():
    assert gradual(initial_sparsity=FROM_PARAM).initial_sparsity == "__FROM_PARAM__"


def test_constant_masks_are_held_to_the_end_and_released_where_there_is_one():
    assert (ConstantSettings().end_epoch, ConstantSettings().leave_enabled) == (math.inf, False)


def test_each_final_sparsity_on_its_own():
    grouped = MagnitudeSettings(final_sparsity={0.8: ("a",), 0.9: "b"}, end_epoch=3.0, initial_sparsity=0.2)
    assert grouped.by_final_sparsity() == (
        MagnitudeSettings(final_sparsity=0.8, params=("a",), end_epoch=3.0, initial_sparsity=0.2),
        MagnitudeSettings(final_sparsity=0.9, params=("b",), end_epoch=3.0, initial_sparsity=0.2),
    )
    for settings in (mfac(), acdc(), ConstantSettings()):
        assert settings.by_final_sparsity() == (settings,)


RECIPE_KEYS = {
    MFACSettings: {**keys.GRADUAL_KEYS, **keys.MFAC_KEYS, "global_sparsity": keys.SCOPE},
    MagnitudeSettings: {**keys.GRADUAL_KEYS, "global_sparsity": keys.SCOPE},
    ACDCSettings: keys.ACDC_KEYS,
    ConstantSettings: keys.CONSTANT_KEYS,
    training_settings.EpochRange: keys.EPOCH_RANGE_KEYS,
    training_settings.SetLearningRate: keys.LEARNING_RATE_KEYS,
    training_settings.LearningRateFunction: keys.LEARNING_RATE_FUNCTION_KEYS,
    training_settings.LearningRateSchedule: keys.LEARNING_RATE_SCHEDULE_KEYS,
    training_settings.SetWeightDecay: keys.WEIGHT_DECAY_KEYS,
    training_settings.TrainableParams: keys.TRAINABLE_KEYS,
}
DIFFERENT = [
    (kind, name, key.field)
    for kind, table in RECIPE_KEYS.items()
    for name, key in table.items()
    if key.field is not None and key.field != name
]


@pytest.mark.parametrize(("kind", "key", "field"), DIFFERENT)
def test_the_spelling_of_a_recipe_is_refused_with_the_field(kind, key, field):
    with pytest.raises(TypeError, match=f"^{kind.__name__} has no field '{key}'; did you mean {field}\\?$"):
        kind(**{key: 1})


def test_every_spelling_is_one_of_a_recipe():
    assert {(key, field) for _, key, field in DIFFERENT} == set(RECIPE_SPELLINGS.items())


@pytest.mark.parametrize("kind", RECIPE_KEYS)
def test_other_keywords_are_refused_with_what_there_is(kind):
    with pytest.raises(TypeError, match=rf"^{kind.__name__} has no field 'qqq'; the fields are .*epoch"):
        kind(qqq=1)
    with pytest.raises(TypeError, match="did you mean start_epoch"):
        kind(start_epocs=1.0)


def test_settings_are_still_copied_and_pickled():
    settings = MFACSettings(final_sparsity=0.5, end_epoch=1.0, num_gradients=3)
    assert pickle.loads(pickle.dumps(settings)) == copy.copy(settings) == replace(settings) == settings
