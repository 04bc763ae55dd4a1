from __future__ import annotations

import logging
import math
import pickle
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from mfac_core.errors import RecipeError, SettingError
from mfac_core.recipe import load_recipe, settings_from_keys
from mfac_core.recipe.formats import MODIFIERS
from mfac_core.settings.pruning import (
    FROM_PARAM,
    ACDCSettings,
    ConstantSettings,
    MagnitudeSettings,
    MFACSettings,
)
from mfac_core.settings.training import (
    EpochRange,
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
)
from tests.core.recipe_lines import item, mfac, only, refusal


class TestMFACPruningModifier:
    # Key lines -> what they change in the settings.
    CHANGES = (
        (["exclude: fc"], {"exclude": ("fc",)}),
        (["exclude: [stem, 're:.*bias']"], {"exclude": ("stem", "re:.*bias")}),
        (["exclude: []"], {}),
        (["ignore: [fc]"], {"exclude": ("fc",)}),
        (["params: __ALL__"], {"params": ("__ALL__",)}),
        (["params: [conv.weight, 're:fc.*']"], {"params": ("conv.weight", "re:fc.*")}),
        (["init_sparsity: 0.1"], {"initial_sparsity": 0.1}),
        (["init_sparsity: __FROM_PARAM__"], {"initial_sparsity": FROM_PARAM}),
        (["final_sparsity: 0.5"], {"final_sparsity": 0.5}),
        (["final_sparsity: {0.5: [a, 're:b'], 0.9: c}"], {"final_sparsity": {0.5: ("a", "re:b"), 0.9: ("c",)}}),
        (["final_sparsity: {0.5: a}", "params: []"], {"final_sparsity": {0.5: ("a",)}}),
        (["start_epoch: 2"], {"start_epoch": 2.0}),
        (["start_epoch: -1"], {"start_epoch": 0.0}),
        (["start_epoch: -1.0"], {"start_epoch": 0.0}),
        (["end_epoch: 12"], {"end_epoch": 12.0}),
        (["update_frequency: 0.5"], {"update_frequency": 0.5}),
        (["inter_func: linear"], {"interpolation": "linear"}),
        (["leave_enabled: false"], {"leave_enabled": False}),
        (["mask_type: unstructured"], {}),
        (["mask_type: channel"], {"mask_type": "channel"}),
        (["mask_type: filter"], {"mask_type": "filter"}),
        (["mask_type: block"], {"mask_type": "block4"}),
        (["mask_type: block4"], {"mask_type": "block4"}),
        (["final_sparsity: 0.5", "mask_type: tensorrt"], {"final_sparsity": 0.5, "mask_type": "2:4"}),
        (["final_sparsity: 0.5", "mask_type: 2:4"], {"final_sparsity": 0.5, "mask_type": "2:4"}),
        (["final_sparsity: 0.5", "mask_type: '2:4'"], {"final_sparsity": 0.5, "mask_type": "2:4"}),
        (["mask_type: 2:16"], {"mask_type": "2:16"}),
        (["mask_type: [1, 4]"], {"mask_type": (1, 4)}),
        (["mask_type: [-1, 1]"], {"mask_type": (-1, 1)}),
        (["phased: false"], {}),
        (["score_type: MFAC"], {}),
        (["num_recomputations: 8"], {"num_recomputations": 8}),
        (["num_recomputations: auto"], {"num_recomputations": "auto"}),
        (["recomputation_spacing: linear"], {"recomputation_spacing": "linear"}),
        (["use_gradient_buffering: true"], {"gradient_origin": "training"}),
        (["use_gradient_buffering: null"], {}),
        (["grad_sampler_kwargs: {batch_size: 8}"], {"sampler_options": {"batch_size": 8}}),
        (["grad_sampler_kwargs: null"], {}),
        (["log_types: __ALL__"], {}),
        (["global_sparsity: true"], {"scope": "global"}),
        (["global_sparsity: false"], {}),
        (["num_grads: 128"], {"num_gradients": {0.0: 128}}),
        (["num_grads: {0: 64, 0.5: 128}"], {"num_gradients": {0.0: 64, 0.5: 128}}),
        (["num_grads:", "  0.0: 64", "  5e-1: 128"], {"num_gradients": {0.0: 64, 0.5: 128}}),
        (["fisher_block_size: 50"], {"block_size": 50}),
        (["fisher_block_size: null"], {"block_size": None}),
        (["fisher_block_size: None"], {"block_size": None}),
        (["fisher_block_size:"], {"block_size": None}),
        (["damp: 1.0e-3"], {"damping": 1e-3}),
        (["damp: 1e-3"], {"damping": 1e-3}),
        (["damp: 2E+1"], {"damping": 20.0}),
        (["damp: auto"], {"damping": "auto"}),
        (["mfac_options: {damp: auto}"], {"damping": "auto"}),
        (["available_gpus: ['cuda:0', 'cuda:1']"], {"devices": ("cuda:0", "cuda:1")}),
        (["available_gpus: []"], {"devices": ("cpu",)}),
        (["available_devices: ['cuda:0']"], {"devices": ("cuda:0",)}),
        (["available_devices: []"], {"devices": ("cpu",)}),
        (["available_devices: null"], {"devices": ("auto",)}),
        (["available_devices: [auto]"], {"devices": ("auto",)}),
        (["grads_device: cuda:0"], {"gradients_device": "cuda:0"}),
        (["grads_dtype: bfloat16"], {"gradients_dtype": "bfloat16"}),
        (["update: joint"], {"update": "joint"}),
        (["mfac_options:"], {}),
        (["mfac_options: {num_grads: 32, damp: 1e-2}"], {"num_gradients": {0.0: 32}, "damping": 1e-2}),
        (
            ["mfac_options:", "  fisher_block_size: 9", "  available_gpus: ['cuda:1']", "  grads_device: cuda:1"],
            {"block_size": 9, "devices": ("cuda:1",), "gradients_device": "cuda:1"},
        ),
    )

    @pytest.mark.parametrize(("keys", "changes"), CHANGES, ids=lambda case: "" if isinstance(case, dict) else case[0])
    def test_every_key_changes_its_setting(self, keys, changes):
        base = {"final_sparsity: 0.8": "final_sparsity", "end_epoch: 10.0": "end_epoch"}
        others = [line for line, key in base.items() if not keys[0].startswith(key)]
        loaded = only(item(*others, *keys))
        assert loaded == MFACSettings(**{"final_sparsity": 0.8, "end_epoch": 10.0, **changes})

    def test_every_key_is_among_these_tests(self):
        tested = {line.partition(":")[0].strip() for keys, _ in self.CHANGES for line in keys}
        assert set(MODIFIERS["MFACPruningModifier"].keys) - {"num_pages"} <= tested

    def test_what_is_excluded_is_written_once(self):
        message = refusal(mfac("ignore: [a]", "exclude: [b]"))
        assert message.startswith("<text>:6: MFACPruningModifier.exclude: ignore on line 5 already gives this setting")

    def test_absent_devices_are_decided_where_the_model_is(self):
        assert (only(mfac()).devices, only(mfac()).gradients_device) == (("auto",), "auto")

    def test_a_mask_type_keeps_its_colon_through_variables_and_anchors(self):
        text = "mask: &mask 2:16\n" + mfac("mask_type: {}")
        for use in ("eval(mask)", "*mask"):
            assert only(text.replace("{}", use)).mask_type == "2:16"

    def test_no_gradient_buffering_is_taken_as_absent_with_a_warning(self, caplog):
        assert only(mfac("use_gradient_buffering: false")) == only(mfac())
        (record,) = caplog.records
        assert record.getMessage().startswith(
            "<text>:5: MFACPruningModifier.use_gradient_buffering: false means the same as no key"
        )

    def test_integers_become_floats(self):
        loaded = only(item("final_sparsity: 0.8", "end_epoch: 10", "init_sparsity: 0"))
        assert isinstance(loaded.end_epoch, float)
        assert isinstance(loaded.initial_sparsity, float)

    @pytest.mark.parametrize(
        ("lines", "name"),
        [(["num_pages: 2"], "num_pages"), (["mfac_options: {num_pages: 2}"], "mfac_options.num_pages")],
    )
    def test_num_pages_is_ignored_with_a_warning(self, lines, name, caplog):
        assert only(mfac(*lines)) == only(mfac())
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith(f"<text>:5: MFACPruningModifier.{name}: has no effect")

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("params: 3", "params: 3 must be a name or a list of names"),
            ("params: [a, 3]", "params: ['a', 3] must be a name or a list of names"),
            ("params: {a: b}", "params: {'a': 'b'} must be a name or a list of names"),
            ("exclude: 3", "exclude: 3 must be a name or a list of names, such as [stem, fc.weight]"),
            ("ignore: [re:(]", "ignore: 're:(' is not a regular expression"),
            ("params: []", "params: () must be a name or a non-empty list of names"),
            ("init_sparsity: 1.0", "init_sparsity: 1.0 is out of range; the rule is 0 <= init_sparsity < 1"),
            ("init_sparsity: 0.9", "init_sparsity: 0.9 is above final_sparsity 0.8"),
            ("init_sparsity: half", "init_sparsity: 'half' is text, not a number"),
            (
                "init_sparsity: __FROM_PARAMS__",
                "'__FROM_PARAMS__' is neither a number nor __FROM_PARAM__ (did you mean __FROM_PARAM__?)",
            ),
            (
                "params: ['re:.*w', 're:*.b']",
                "<text>:5: MFACPruningModifier.params: 're:*.b' is not a regular expression",
            ),
            ("params: 're:a{9999999999999}'", "params: 're:a{9999999999999}' is not a regular expression"),
            ("start_epoch: -2", "start_epoch: -2.0 is out of range; the rule is start_epoch >= 0"),
            ("start_epoch: .nan", "start_epoch: nan is not a finite number"),
            ("start_epoch: yes", "start_epoch: True is not a finite number"),
            ("update_frequency: 0", "update_frequency: 0.0 is out of range; the rule is update_frequency > 0"),
            ("update_frequency: 1e-9", "update_frequency: 1e-09 epochs makes more than 1000000 pruning steps"),
            ("update_frequency: '1e-1'", "update_frequency: '1e-1' is text, not a number"),
            ("update_frequency: [1]", "update_frequency: [1] is not a finite number"),
            (f"update_frequency: {10**400}", "is too large a number"),
            ("inter_func: cosine", "inter_func: 'cosine' is not one of linear, cubic, inverse_cubic"),
            ("leave_enabled: 1", "leave_enabled: 1 is not a boolean"),
            ("mask_type: 2:4", "mask_type: 2:4 allows a sparsity of at most 0.5, but the final sparsity is 0.8"),
            ("mask_type: tensorrt", "mask_type: 2:4 allows a sparsity of at most 0.5"),
            ("mask_type: 4:2", "mask_type: '4:2' is not a mask type; write unstructured, channel, filter, block4"),
            ("mask_type: blocks", "mask_type: 'blocks' is not a mask type"),
            ("mask_type: [1, 0]", "mask_type: [1, 0] is not a mask type"),
            ("mask_type: null", "mask_type: None is not a mask type"),
            ("global_sparsity: 1", "global_sparsity: 1 must be true (all weights compete) or false"),
            ("num_grads: 0", "num_grads: 0 must be a positive integer"),
            ("num_grads: true", "num_grads: True must be a positive integer, or a mapping"),
            ("num_grads: '64'", "num_grads: '64' must be a positive integer, or a mapping"),
            ("num_grads: [64]", "num_grads: [64] must be a positive integer, or a mapping"),
            ("num_grads: 1e2", "num_grads: 100.0 must be a positive integer, or a mapping"),
            ("num_grads: {0.5: 64}", "num_grads: {0.5: 64} has no key 0.0"),
            ("num_grads: {a: 64}", "num_grads: the key 'a' is not a sparsity"),
            ("num_grads: {0.0: 64.0}", "num_grads: 64.0 at sparsity 0.0 is not a number of rows"),
            ("fisher_block_size: 0", "fisher_block_size: 0 must be a positive integer, or null"),
            ("fisher_block_size: true", "fisher_block_size: True must be a positive integer, or null"),
            ("fisher_block_size: 2.5", "fisher_block_size: 2.5 must be a positive integer, or null"),
            ("damp: high", "damp: 'high' is text, not a number"),
            ("available_gpus: cuda:0", "available_gpus: 'cuda:0' must be a list of device names"),
            ("available_gpus: [0]", "available_gpus: [0] must be a list of device names"),
            ("available_devices: [auto, cpu]", "available_devices: ['auto', 'cpu'] mixes auto with names"),
            ("available_devices: [a, a]", "available_devices: ['a', 'a'] names a device twice"),
            ("grads_device: 0", "grads_device: 0 must be a device name"),
            ("grads_dtype: float16", "grads_dtype: 'float16' is not one of float32, bfloat16"),
            ("update: both", "update: 'both' is not one of independent, joint"),
            ("mfac_options: 3", "mfac_options: 3 must be a mapping, or `key: value` lines indented below it"),
            ("mfac_options: [3]", "mfac_options: this must be followed by `key: value` lines"),
            ("mfac_options: {params: a}", "mfac_options.params: unknown key; the keys are num_grads, "),
            ("mfac_options: {dmap: 1.0}", "mfac_options.dmap: unknown key (did you mean damp?)"),
            ("mfac_options: {damp: -1}", "mfac_options.damp: -1.0 is out of range; the rule is damp > 0"),
            ("damp: 0", 'damp: 0.0 is out of range; the rule is damp > 0, or "auto"'),
            ("damp: '0.1'", "damp: '0.1' is text, not a number; write the number without quotes"),
            ("damp: AUTO", "damp: 'AUTO' is neither a number nor auto (did you mean auto?)"),
            ("mfac_options: {damp: atuo}", "mfac_options.damp: 'atuo' is neither a number nor auto (did you mean auto"),
            ("damp: true", 'damp: True is not a finite number; the rule is damp > 0, or "auto"'),
            ("finl_sparsity: 3", "finl_sparsity: unknown key (did you mean final_sparsity?); the keys are params, "),
            ("qqq: 3", "qqq: unknown key; the keys are params, ignore, exclude, init_sparsity, "),
            ("grad_sampler_kwargs: 8", "grad_sampler_kwargs: 8 must be a mapping of arguments"),
            ("grad_sampler_kwargs: {1: 2}", "grad_sampler_kwargs: {1: 2} must be a mapping from argument to value"),
            ("num_recomputations: 0", "num_recomputations: 0 must be a positive integer, or auto"),
            (
                "num_recomputations: automatic",
                "num_recomputations: 'automatic' must be a positive integer, or auto (did you mean auto?)",
            ),
            ("num_recomputations: AUTO", "'AUTO' must be a positive integer, or auto (did you mean auto?)"),
            ("num_recomputations: '4'", "'4' must be a positive integer, or auto; write numbers without quotes"),
            (
                "mfac_options: {num_recomputations: 4}",
                "mfac_options.num_recomputations: unknown key; the keys are num_grads, fisher_block_size, damp, "
                "available_gpus, grads_device, num_pages; write num_recomputations next to mfac_options, not inside it",
            ),
            ("num_recomputations: true", "num_recomputations: True must be a positive integer, or auto"),
            ("recomputation_spacing: cubic", "recomputation_spacing: 'cubic' is not one of geometric, linear"),
            ("use_gradient_buffering: 1", "use_gradient_buffering: 1 must be true (always take gradients of training)"),
            ("phased: true", "phased: True is not supported here; alternating phases are what !ACDCPruningModifier is"),
            ("phased: 0", "phased: 0 is not supported here"),
            ("score_type: magnitude", "score_type: 'magnitude' does not fit: this modifier always prunes by M-FAC"),
            ("available_gpus: [[[[[a]]]]]", "available_gpus: lists and mappings are nested too deeply"),
        ],
    )
    def test_wrong_values(self, line, expected):
        message = refusal(mfac(line))
        assert message.startswith("<text>:5: MFACPruningModifier.")
        assert expected in message

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            (
                ["final_sparsity: 1", "end_epoch: 1"],
                "<text>:3: MFACPruningModifier.final_sparsity: 1.0 is out of range",
            ),
            (
                ["end_epoch: 1", "final_sparsity: {0.9: []}"],
                "<text>:4: MFACPruningModifier.final_sparsity: () must be a name or a non-empty list of names",
            ),
            (
                ["end_epoch: 1", "final_sparsity: {}"],
                "<text>:4: MFACPruningModifier.final_sparsity: {} is empty; write a sparsity",
            ),
            (
                ["end_epoch: 1", "final_sparsity: {1.9: a}"],
                "<text>:4: MFACPruningModifier.final_sparsity: 1.9 is out of range",
            ),
            (
                ["end_epoch: 1", "final_sparsity: {0.9: a}", "params: [b]"],
                "<text>:5: MFACPruningModifier.params: ['b'] cannot be given with a final_sparsity that names weights;",
            ),
            (
                ["end_epoch: 1", "final_sparsity: {0.9: a, 0.5: b}", "init_sparsity: 0.6"],
                "<text>:5: MFACPruningModifier.init_sparsity: 0.6 is above final_sparsity 0.5",
            ),
            (["end_epoch: -1", "final_sparsity: 0.5"], "<text>:3: MFACPruningModifier.end_epoch: -1.0 is out of"),
            (
                ["final_sparsity: 0.5", "start_epoch: 3", "end_epoch: 1"],
                "<text>:5: MFACPruningModifier.end_epoch: 1.0 is before start_epoch 3.0",
            ),
            (["final_sparsity: 0.5"], "<text>:2: MFACPruningModifier: end_epoch is missing; add it"),
            (["damp: 1"], "<text>:2: MFACPruningModifier: final_sparsity and end_epoch are missing; add them"),
            ([], "<text>:2: MFACPruningModifier: final_sparsity and end_epoch are missing; add them"),
        ],
    )
    def test_compulsory_keys(self, keys, expected):
        assert refusal(item(*keys)).startswith(expected)

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            (
                ["available_gpus: []", "available_devices: []"],
                "<text>:6: MFACPruningModifier.available_devices: available_gpus on line 5 already gives this setting",
            ),
            (
                ["damp: 1.0", "mfac_options:", "  damp: 1.0"],
                "<text>:7: MFACPruningModifier.mfac_options.damp: damp on line 5 already gives this setting",
            ),
            (
                ["mfac_options: {available_gpus: []}", "available_devices: []"],
                "<text>:6: MFACPruningModifier.available_devices: mfac_options.available_gpus on line 5 already",
            ),
            (
                ["num_pages: 1", "mfac_options: {num_pages: 1}"],
                "<text>:6: MFACPruningModifier.mfac_options.num_pages: num_pages on line 5 already gives this setting",
            ),
        ],
    )
    def test_one_setting_given_by_two_keys(self, keys, expected):
        assert refusal(mfac(*keys)).startswith(expected)

    def test_the_cause_is_kept(self):
        with pytest.raises(RecipeError) as caught:
            load_recipe(mfac("damp: 0"))
        assert isinstance(caught.value.__cause__, SettingError)
        assert caught.value.__cause__.field == "damping"


class TestModifiers:
    @pytest.mark.parametrize("prefix", ["", "pytorch.", "keras.", "tensorflow."])
    def test_tags_with_and_without_the_name_of_a_framework(self, prefix):
        assert only(item("end_epoch: 3", modifier=f"{prefix}EpochRangeModifier")) == EpochRange(end_epoch=3.0)

    BASE = {
        "MFACPruningModifier": ["final_sparsity: 0.8", "end_epoch: 3"],
        "MFACGlobalPruningModifier": ["final_sparsity: 0.8", "end_epoch: 3"],
        "OBSPruningModifier": ["final_sparsity: 0.8", "end_epoch: 3", "fisher_block_size: 50"],
        "MagnitudePruningModifier": ["final_sparsity: 0.8", "end_epoch: 3"],
        "GMPruningModifier": ["final_sparsity: 0.8", "end_epoch: 3"],
        "GlobalMagnitudePruningModifier": ["final_sparsity: 0.8", "end_epoch: 3"],
        "ConstantPruningModifier": [],
        "ACDCPruningModifier": ["compression_sparsity: 0.8", "end_epoch: 8"],
        "EpochRangeModifier": ["end_epoch: 3"],
        "SetLearningRateModifier": ["learning_rate: 0.1"],
        "LearningRateFunctionModifier": ["lr_func: linear", "init_lr: 0.1", "final_lr: 0.01", "end_epoch: 3"],
        "LearningRateModifier": ["lr_class: StepLR", "lr_kwargs: {step_size: 2, gamma: 0.5}", "init_lr: 0.1"],
        "SetWeightDecayModifier": ["weight_decay: 0.1"],
        "TrainableParamsModifier": ["params: a"],
    }
    DEFAULTS = {
        "MFACPruningModifier": MFACSettings(final_sparsity=0.8, end_epoch=3.0),
        "MFACGlobalPruningModifier": MFACSettings(final_sparsity=0.8, end_epoch=3.0, scope="global"),
        "OBSPruningModifier": MFACSettings(
            final_sparsity=0.8,
            end_epoch=3.0,
            scope="global",
            num_gradients=1024,
            damping=1e-7,
            block_size=50,
            recomputation_spacing="linear",
        ),
        "MagnitudePruningModifier": MagnitudeSettings(final_sparsity=0.8, end_epoch=3.0),
        "GMPruningModifier": MagnitudeSettings(final_sparsity=0.8, end_epoch=3.0),
        "GlobalMagnitudePruningModifier": MagnitudeSettings(final_sparsity=0.8, end_epoch=3.0, scope="global"),
        "ConstantPruningModifier": ConstantSettings(end_epoch=math.inf, leave_enabled=False),
        "ACDCPruningModifier": ACDCSettings(
            compression_sparsity=0.8, end_epoch=8.0, update_frequency=1.0, scope="global", reset_momentum=True
        ),
        "EpochRangeModifier": EpochRange(end_epoch=3.0),
        "SetLearningRateModifier": SetLearningRate(learning_rate=0.1),
        "LearningRateFunctionModifier": LearningRateFunction(
            function="linear", initial=0.1, final=0.01, end_epoch=3.0, cycle_epochs=1.0
        ),
        "LearningRateModifier": LearningRateSchedule(
            kind="StepLR", options={"step_size": 2, "gamma": 0.5}, initial=0.1, end_epoch=math.inf
        ),
        "SetWeightDecayModifier": SetWeightDecay(weight_decay=0.1),
        "TrainableParamsModifier": TrainableParams(params=("a",), trainable=True, strict=True, end_epoch=math.inf),
    }
    # Modifier, key line -> what it changes in the settings.
    CHANGES = (
        ("MagnitudePruningModifier", "params: a", {"params": ("a",)}),
        ("MagnitudePruningModifier", "exclude: a", {"exclude": ("a",)}),
        ("GMPruningModifier", "ignore: [a, b]", {"exclude": ("a", "b")}),
        ("ConstantPruningModifier", "exclude: a", {"exclude": ("a",)}),
        ("ConstantPruningModifier", "ignore: a", {"exclude": ("a",)}),
        ("ACDCPruningModifier", "exclude: a", {"exclude": ("a",)}),
        ("ACDCPruningModifier", "ignore: a", {"exclude": ("a",)}),
        ("MagnitudePruningModifier", "init_sparsity: 0.2", {"initial_sparsity": 0.2}),
        ("MagnitudePruningModifier", "inter_func: linear", {"interpolation": "linear"}),
        ("MagnitudePruningModifier", "global_sparsity: false", {}),
        ("MagnitudePruningModifier", "score_type: magnitude", {}),
        ("MagnitudePruningModifier", "phased: false", {}),
        ("MagnitudePruningModifier", "log_types: __ALL__", {}),
        ("GMPruningModifier", "global_sparsity: true", {"scope": "global"}),
        ("GMPruningModifier", "score_type: magnitude", {}),
        ("GMPruningModifier", "final_sparsity: {0.5: a}", {"final_sparsity": {0.5: ("a",)}}),
        ("GlobalMagnitudePruningModifier", "global_sparsity: true", {}),
        ("GlobalMagnitudePruningModifier", "mask_type: 1:8", {"mask_type": "1:8"}),
        ("MFACGlobalPruningModifier", "global_sparsity: true", {}),
        ("MFACGlobalPruningModifier", "mfac_options: {num_grads: 8}", {"num_gradients": 8}),
        ("OBSPruningModifier", "num_grads: 32", {"num_gradients": 32}),
        ("OBSPruningModifier", "damp: 1e-6", {"damping": 1e-6}),
        ("OBSPruningModifier", "damp: auto", {"damping": "auto"}),
        ("OBSPruningModifier", "fisher_block_size: 4", {"block_size": 4}),
        ("OBSPruningModifier", "global_sparsity: false", {"scope": "layer"}),
        ("OBSPruningModifier", "mask_type: block4", {"mask_type": "block4"}),
        ("OBSPruningModifier", "num_recomputations: 4", {"num_recomputations": 4}),
        ("OBSPruningModifier", "recomputation_spacing: geometric", {"recomputation_spacing": "geometric"}),
        ("OBSPruningModifier", "grad_sampler_kwargs: {batch_size: 8}", {"sampler_options": {"batch_size": 8}}),
        ("ConstantPruningModifier", "params: [a, b]", {"params": ("a", "b")}),
        ("ConstantPruningModifier", "start_epoch: 2", {"start_epoch": 2.0}),
        ("ConstantPruningModifier", "start_epoch: -1", {}),
        ("ConstantPruningModifier", "end_epoch: 9", {"end_epoch": 9.0}),
        ("ConstantPruningModifier", "end_epoch: -1.0", {}),
        ("ConstantPruningModifier", "leave_enabled: true", {"leave_enabled": True}),
        ("ConstantPruningModifier", "update_frequency: -1", {}),
        ("ConstantPruningModifier", "log_types: __ALL__", {}),
        ("ACDCPruningModifier", "compression_sparsity: 0.9", {"compression_sparsity": 0.9}),
        ("ACDCPruningModifier", "params: a", {"params": ("a",)}),
        ("ACDCPruningModifier", "start_epoch: 1", {"start_epoch": 1.0}),
        ("ACDCPruningModifier", "end_epoch: 75", {"end_epoch": 75.0}),
        ("ACDCPruningModifier", "update_frequency: 5", {"update_frequency": 5.0}),
        ("ACDCPruningModifier", "global_sparsity: false", {"scope": "layer"}),
        ("ACDCPruningModifier", "leave_enabled: false", {"leave_enabled": False}),
        ("ACDCPruningModifier", "momentum_buffer_reset: false", {"reset_momentum": False}),
        ("ACDCPruningModifier", "mask_type: block", {"mask_type": "block4"}),
        ("ACDCPruningModifier", "log_types: __ALL__", {}),
        ("EpochRangeModifier", "start_epoch: 1", {"start_epoch": 1.0}),
        ("EpochRangeModifier", "start_epoch: -1", {}),
        ("EpochRangeModifier", "end_epoch: 30", {"end_epoch": 30.0}),
        ("EpochRangeModifier", "end_epoch: -1", {"end_epoch": math.inf}),
        ("EpochRangeModifier", "log_types: null", {}),
        ("SetLearningRateModifier", "learning_rate: 1e-3", {"learning_rate": 1e-3}),
        ("SetLearningRateModifier", "start_epoch: 2", {"start_epoch": 2.0}),
        ("SetLearningRateModifier", "start_epoch: -1.0", {}),
        ("SetLearningRateModifier", "end_epoch: -1.0", {}),
        ("SetLearningRateModifier", "param_groups: [0, 2]", {"param_groups": (0, 2)}),
        ("SetLearningRateModifier", "param_groups: null", {}),
        ("SetLearningRateModifier", "param_groups: []", {}),
        ("SetLearningRateModifier", "constant_logging: true", {}),
        ("SetLearningRateModifier", "log_types: __ALL__", {}),
        ("LearningRateFunctionModifier", "lr_func: cosine", {"function": "cosine"}),
        ("LearningRateFunctionModifier", "lr_func: cyclic_linear", {"function": "cyclic_linear"}),
        ("LearningRateFunctionModifier", "init_lr: 0", {"initial": 0.0}),
        ("LearningRateFunctionModifier", "final_lr: 0.0", {"final": 0.0}),
        ("LearningRateFunctionModifier", "start_epoch: 1", {"start_epoch": 1.0}),
        ("LearningRateFunctionModifier", "end_epoch: 30", {"end_epoch": 30.0}),
        ("LearningRateFunctionModifier", "cycle_epochs: 4", {"cycle_epochs": 4.0}),
        ("LearningRateFunctionModifier", "param_groups: [1]", {"param_groups": (1,)}),
        ("LearningRateFunctionModifier", "update_frequency: -1.0", {}),
        ("LearningRateFunctionModifier", "constant_logging: false", {}),
        ("LearningRateFunctionModifier", "log_types: __ALL__", {}),
        ("LearningRateModifier", "lr_kwargs: {step_size: 4}", {"options": {"step_size": 4}}),
        ("LearningRateModifier", "init_lr: 0.5", {"initial": 0.5}),
        ("LearningRateModifier", "start_epoch: 40", {"start_epoch": 40.0}),
        ("LearningRateModifier", "end_epoch: 60", {"end_epoch": 60.0}),
        ("LearningRateModifier", "end_epoch: -1.0", {}),
        ("LearningRateModifier", "update_frequency: -1", {}),
        ("LearningRateModifier", "constant_logging: false", {}),
        ("LearningRateModifier", "log_types: __ALL__", {}),
        ("SetWeightDecayModifier", "weight_decay: 0", {"weight_decay": 0.0}),
        ("SetWeightDecayModifier", "start_epoch: 3", {"start_epoch": 3.0}),
        ("SetWeightDecayModifier", "param_groups: [0]", {"param_groups": (0,)}),
        ("SetWeightDecayModifier", "end_epoch: -1", {}),
        ("SetWeightDecayModifier", "constant_logging: false", {}),
        ("SetWeightDecayModifier", "log_types: __ALL__", {}),
        ("TrainableParamsModifier", "params: __ALL__", {"params": ("__ALL__",)}),
        ("TrainableParamsModifier", "trainable: false", {"trainable": False}),
        ("TrainableParamsModifier", "params_strict: false", {"strict": False}),
        ("TrainableParamsModifier", "start_epoch: 1", {"start_epoch": 1.0}),
        ("TrainableParamsModifier", "end_epoch: 5", {"end_epoch": 5.0}),
        ("TrainableParamsModifier", "end_epoch: -1", {}),
        ("TrainableParamsModifier", "log_types: __ALL__", {}),
    )

    @pytest.mark.parametrize("modifier", BASE)
    def test_modifier_becomes_settings_with_its_defaults(self, modifier):
        loaded = only(item(*self.BASE[modifier], modifier=modifier))
        assert type(loaded) is type(self.DEFAULTS[modifier])
        assert loaded == self.DEFAULTS[modifier]

    @pytest.mark.parametrize(("modifier", "line", "changes"), CHANGES)
    def test_every_key_changes_its_setting(self, modifier, line, changes):
        key = line.partition(":")[0]
        others = [each for each in self.BASE[modifier] if each.partition(":")[0] != key]
        assert only(item(*others, line, modifier=modifier)) == replace(self.DEFAULTS[modifier], **changes)

    def test_every_modifier_and_key_is_among_these_tests(self):
        assert set(self.BASE) == set(MODIFIERS)
        same = {
            "MFACGlobalPruningModifier",
            "OBSPruningModifier",
            "GMPruningModifier",
            "GlobalMagnitudePruningModifier",
        }
        shared = set(MODIFIERS["MFACPruningModifier"].keys)  # tested there
        for name, modifier in MODIFIERS.items():
            tested = {line.partition(":")[0] for other, line, _ in self.CHANGES if other == name}
            tested |= {line.partition(":")[0] for line in self.BASE[name]}
            if name in {*same, "MFACPruningModifier", "MagnitudePruningModifier"}:
                tested |= shared
            assert set(modifier.keys) <= tested, name

    @pytest.mark.parametrize(
        ("lr_class", "lr_kwargs", "options"),
        [
            ("StepLR", "{step_size: 1.0, gamma: 0.25}", {"step_size": 1.0, "gamma": 0.25}),
            ("MultiStepLR", "{milestones: [9, 5], gamma: 0.1}", {"milestones": (5.0, 9.0), "gamma": 0.1}),
            ("ExponentialLR", "{gamma: 0.95}", {"gamma": 0.95}),
            ("CosineAnnealingWarmRestarts", "{lr_min: 1e-5, cycle_epochs: 60}", {"eta_min": 1e-5, "T_0": 60}),
            ("CosineAnnealingWarmRestarts", "{T_0: 6.0, T_mult: 2, eta_min: 0}", {"T_0": 6, "T_mult": 2, "eta_min": 0}),
        ],
    )
    def test_schedules_of_the_learning_rate(self, lr_class, lr_kwargs, options):
        loaded = only(
            item(f"lr_class: {lr_class}", f"lr_kwargs: {lr_kwargs}", "init_lr: 0.1", modifier="LearningRateModifier")
        )
        assert loaded == LearningRateSchedule(kind=lr_class, options=options, initial=0.1)

    def test_obs_says_that_its_parts_are_linear(self, caplog):
        lines = ["final_sparsity: 0.8", "end_epoch: 3", "fisher_block_size: 50"]
        item_of = partial(item, *lines, modifier="OBSPruningModifier")
        assert only(item_of("num_recomputations: 4")).recomputation_spacing == "linear"
        (record,) = caplog.records
        assert record.getMessage() == (
            "<text>:2: OBSPruningModifier.recomputation_spacing: defaults to linear for this modifier; geometric, "
            "which shrinks what is left by equal factors, is more accurate at high sparsity"
        )
        caplog.clear()
        only(item_of())
        only(item_of("num_recomputations: 4", "recomputation_spacing: linear"))
        assert (
            only(item_of("num_recomputations: auto", "recomputation_spacing: geometric")).num_recomputations == "auto"
        )
        assert not caplog.records

    def test_obs_with_auto_parts_is_geometric(self, caplog):
        lines = ["final_sparsity: 0.8", "end_epoch: 3", "fisher_block_size: 50", "num_recomputations: auto"]
        assert only(item(*lines, modifier="OBSPruningModifier")).recomputation_spacing == "geometric"
        assert not caplog.records
        assert "linear cannot be combined with num_recomputations auto" in refusal(
            item(*lines, "recomputation_spacing: linear", modifier="OBSPruningModifier")
        )

    def test_auto_is_geometric(self):
        assert "linear cannot be combined with num_recomputations auto, which is geometric" in refusal(
            mfac("num_recomputations: auto", "recomputation_spacing: linear")
        )

    def test_obs_says_that_its_default_is_a_diagonal_fisher(self, caplog):
        text = item("final_sparsity: 0.8", "end_epoch: 3", modifier="OBSPruningModifier")
        assert only(text).block_size == 1
        (record,) = caplog.records
        assert record.getMessage() == (
            "<text>:2: OBSPruningModifier.fisher_block_size: defaults to 1 for this modifier, which makes the Fisher "
            "matrix diagonal; the recipes of oBERT use 50"
        )

    @pytest.mark.parametrize(
        ("modifier", "line", "expected"),
        [
            ("EpochRangeModifier", "end_epoch: 0", "end_epoch: 0.0 is out of range; the rule is end_epoch > start_"),
            ("EpochRangeModifier", "start_epoch: -2", "start_epoch: -2.0 is out of range"),
            ("EpochRangeModifier", "end_epoch: true", "end_epoch: True is not a finite number"),
            ("SetLearningRateModifier", "learning_rate: 0", "learning_rate: 0.0 is out of range"),
            ("SetLearningRateModifier", "learning_rate: 1.5", "the rule is 0 < learning_rate <= 1"),
            ("SetLearningRateModifier", "learning_rate: .inf", "learning_rate: inf is not a finite number"),
            ("SetLearningRateModifier", "start_epoch: -2", "start_epoch: -2.0 is out of range"),
            ("SetLearningRateModifier", "param_groups: 0", "param_groups: 0 must be a list of indices"),
            ("SetLearningRateModifier", "param_groups: [a]", "param_groups: ('a',) must be a list of indices"),
            ("LearningRateFunctionModifier", "lr_func: step", "lr_func: 'step' is not one of linear, cosine, cyclic_l"),
            (
                "LearningRateFunctionModifier",
                "init_lr: 2",
                "init_lr: 2.0 is out of range; the rule is 0 <= init_lr <= 1",
            ),
            ("LearningRateFunctionModifier", "final_lr: -1", "the rule is 0 <= final_lr <= 1"),
            ("LearningRateFunctionModifier", "cycle_epochs: 0", "cycle_epochs: 0.0 is out of range"),
            (
                "LearningRateFunctionModifier",
                "end_epoch: -1",
                "end_epoch: -1.0 is out of range; the rule is end_epoch >",
            ),
            ("LearningRateModifier", "lr_class: LambdaLR", "lr_class: 'LambdaLR' is not one of StepLR, MultiStepLR, "),
            ("LearningRateModifier", "lr_kwargs: 3", "lr_kwargs: 3 must be a mapping of the scheduler's arguments"),
            ("LearningRateModifier", "lr_kwargs: {gamma: 1}", "lr_kwargs: step_size is missing; StepLR needs it"),
            (
                "LearningRateModifier",
                "lr_kwargs: {lr_min: 1, eta_min: 1}",
                "gives eta_min twice, the second time as eta_min",
            ),
            (
                "LearningRateModifier",
                "lr_kwargs: {step_size: 1, x: 1}",
                "lr_kwargs: StepLR has no option 'x'",
            ),
            ("LearningRateModifier", "init_lr: 0", "the rule is 0 < init_lr <= 1"),
            ("SetWeightDecayModifier", "weight_decay: -1", "weight_decay: -1.0 is out of range"),
            ("TrainableParamsModifier", "params: []", "params: () must be a name or a non-empty list of names"),
            ("TrainableParamsModifier", "trainable: 1", "trainable: 1 is not a boolean"),
            ("TrainableParamsModifier", "params_strict: maybe", "params_strict: 'maybe' is not a boolean"),
            ("ConstantPruningModifier", "end_epoch: -2", "end_epoch: -2.0 is out of range"),
            ("ConstantPruningModifier", "final_sparsity: 0.8", "final_sparsity: unknown key; the keys are params"),
            ("ACDCPruningModifier", "compression_sparsity: 1", "compression_sparsity: 1.0 is out of range"),
            ("ACDCPruningModifier", "update_frequency: 0", "update_frequency: 0.0 is out of range"),
            ("ACDCPruningModifier", "update_frequency: 1e-9", "makes more than 1000000 pruning steps"),
            ("ACDCPruningModifier", "momentum_buffer_reset: 1", "momentum_buffer_reset: 1 is not a boolean"),
            ("ACDCPruningModifier", "mask_type: 2:4", "mask_type: 2:4 allows a sparsity of at most 0.5"),
            (
                "MagnitudePruningModifier",
                "global_sparsity: true",
                "True does not fit; write !GlobalMagnitudePruningMod",
            ),
            ("MagnitudePruningModifier", "num_grads: 3", "num_grads: unknown key"),
            ("MagnitudePruningModifier", "mfac_options: {}", "mfac_options: unknown key"),
            ("GMPruningModifier", "score_type: movement", "score_type: 'movement' is not supported here; write !MFAC"),
            ("GlobalMagnitudePruningModifier", "global_sparsity: false", "False does not fit: this modifier always"),
            ("MFACGlobalPruningModifier", "global_sparsity: false", "False does not fit: this modifier always prunes"),
        ],
    )
    def test_wrong_values(self, modifier, line, expected):
        key = line.partition(":")[0]
        others = [each for each in self.BASE[modifier] if each.partition(":")[0] != key]
        message = refusal(item(*others, line, modifier=modifier))
        assert message.startswith(f"<text>:{3 + len(others)}: {modifier}.{key}: ")
        assert expected in message

    @pytest.mark.parametrize(
        ("modifier", "expected"),
        [
            ("MFACGlobalPruningModifier", "final_sparsity and end_epoch are missing; add them"),
            ("OBSPruningModifier", "final_sparsity and end_epoch are missing; add them"),
            ("ACDCPruningModifier", "compression_sparsity and end_epoch are missing; add them"),
            ("EpochRangeModifier", "end_epoch is missing; add it"),
            ("SetLearningRateModifier", "learning_rate is missing; add it"),
            ("LearningRateFunctionModifier", "lr_func and init_lr and final_lr and end_epoch are missing; add them"),
            ("LearningRateModifier", "lr_class and lr_kwargs and init_lr are missing; add them"),
            ("SetWeightDecayModifier", "weight_decay is missing; add it"),
            ("TrainableParamsModifier", "params is missing; add it"),
        ],
    )
    def test_compulsory_keys(self, modifier, expected):
        assert refusal(item(modifier=modifier)) == f"<text>:2: {modifier}: {expected}"

    @pytest.mark.parametrize("below", ["{a: 1}", "[a]", "text"])
    def test_what_stands_below_a_modifier(self, below):
        message = refusal(item(modifier=f"GMPruningModifier {below}"))
        expected = ".a: unknown key" if below == "{a: 1}" else ": this must be followed by `key: value` lines"
        assert message.startswith(f"<text>:2: GMPruningModifier{expected}")

    def test_unknown_modifier(self):
        message = refusal(item("end_epoch: 3", modifier="MFACPrunningModifier"))
        assert message == (
            "<text>:2: !MFACPrunningModifier is not a modifier (did you mean MFACPruningModifier?); "
            f"supported are {', '.join(MODIFIERS)}"
        )

    @pytest.mark.parametrize("tag", ["", "!other.EpochRangeModifier", "!!EpochRangeModifier"])
    def test_items_that_are_no_modifiers(self, tag):
        message = refusal(f"a_modifiers:\n  - {tag} {{end_epoch: 3}}\n")
        assert message.startswith("<text>:2: an item of a modifiers list must begin with a modifier")

    @pytest.mark.parametrize(
        "name",
        [
            "DistillationModifier",
            "GPTQModifier",
            "LayerPruningModifier",
            "MovementPruningModifier",
            "QuantizationModifier",
            "SetParamModifier",
            "SparseGPTModifier",
            "StructuredPruningModifier",
            "TopKASTPruningModifier",
        ],
    )
    @pytest.mark.parametrize("prefix", ["", "pytorch."])
    def test_modifiers_that_are_out_of_scope_are_refused_by_name(self, name, prefix):
        message = refusal(item("x: 1", modifier=prefix + name))
        assert message.startswith(
            f'<text>:2: {name} is not supported; remove it from the recipe, or load it with unsupported="skip"; '
            "supported are MFACPruningModifier, "
        )

    @pytest.mark.parametrize(
        "text",
        [
            "q_modifiers:\n\n  - !pytorch.QuantizationModifier {submodules: [a], x: eval(y)}\n",
            "q_modifiers:\n\n  QuantizationModifier:\n    start: 2.0\n",
            "s:\n  q_modifiers:\n    - !QuantizationModifier\n      start_epoch: 2.0\n",
        ],
    )
    def test_they_can_be_left_out_with_a_warning(self, text, caplog):
        text += mfac() + "training_modifiers:\n  - !EpochRangeModifier {end_epoch: 5}\n"
        assert "QuantizationModifier is not supported" in refusal(text)
        recipe = load_recipe(text, unsupported="skip")
        assert [type(each) for each in recipe.modifiers] == [MFACSettings, EpochRange]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == "<text>:3: QuantizationModifier is not supported and is left out"

    def test_a_misspelled_modifier_is_not_left_out(self):
        with pytest.raises(RecipeError, match="!MFACPrunningModifier is not a modifier"):
            load_recipe(item("end_epoch: 3", modifier="MFACPrunningModifier"), unsupported="skip")

    def test_a_recipe_may_be_empty_without_them(self):
        text = item(modifier="QuantizationModifier")
        assert load_recipe(text, unsupported="skip").modifiers == ()

    def test_what_to_do_with_them_is_one_of_two_words(self):
        with pytest.raises(ValueError, match="unsupported='ignore' is neither 'error' nor 'skip'"):
            load_recipe(mfac(), unsupported="ignore")

    def test_document_order_and_properties(self):
        text = (
            "late_modifiers:\n  - !SetLearningRateModifier {learning_rate: 0.1, start_epoch: 90}\n"
            + mfac()
            + "training_modifiers:\n  - !EpochRangeModifier {end_epoch: 14}\n"
            + "  - !GMPruningModifier {final_sparsity: 0.5, end_epoch: 3}\n"
        )
        recipe = load_recipe(text)
        kinds = (SetLearningRate, MFACSettings, EpochRange, MagnitudeSettings)
        assert tuple(type(modifier) for modifier in recipe.modifiers) == kinds
        assert recipe.pruning == (recipe.modifiers[1], recipe.modifiers[3])
        assert recipe.max_epochs == 14.0
        assert recipe.source == "<text>"

    def test_max_epochs_counts_what_ends(self):
        text = mfac() + (
            "t_modifiers:\n  - !ConstantPruningModifier {start_epoch: 70}\n"
            "  - !LearningRateFunctionModifier {lr_func: cosine, init_lr: 0.1, final_lr: 0, end_epoch: 33}\n"
        )
        assert load_recipe(text).max_epochs == 33.0

    def test_max_epochs_counts_pruning_and_is_zero_without_an_end(self):
        assert load_recipe(mfac()).max_epochs == 10.0
        assert load_recipe(item("learning_rate: 0.1", modifier="SetLearningRateModifier")).max_epochs == 0.0

    def test_recipes_cannot_be_changed(self):
        with pytest.raises(AttributeError):
            load_recipe(mfac()).source = "other"
        with pytest.raises(AttributeError):
            EpochRange(end_epoch=3.0).end_epoch = 4.0

    def test_version_and_metadata_are_ignored(self):
        assert only("version: 1.1.0\n__metadata__: {a: [1]}\n" + mfac()) == only(mfac())


class TestSettingsFromKeys:
    def test_they_are_those_of_a_recipe(self):
        keys = {
            "final_sparsity": {0.8: ["a"]},
            "params": [],
            "start_epoch": -1,
            "end_epoch": 10,
            "mfac_options": {"num_grads": {0: 64}, "damp": 1e-3},
            "mask_type": [1, 4],
            "available_devices": [],
        }
        lines = [f"{key}: {value}".replace("'", "") for key, value in keys.items()]
        assert settings_from_keys("MFACPruningModifier", keys) == only(item(*lines))

    def test_values_of_numpy_and_tuples(self):
        settings = settings_from_keys(
            "MFACPruningModifier",
            {
                "final_sparsity": np.float32(0.5),
                "end_epoch": np.int64(3),
                "params": ("a", "b"),
                "num_grads": {np.float64(0.0): np.int32(8)},
                "fisher_block_size": np.int64(16),
                "mask_type": (np.int64(1), 4),
                "global_sparsity": np.bool_(True),
                "available_devices": ("cuda:0",),
                "grad_sampler_kwargs": {"size": (1, np.int64(2))},
            },
        )
        assert settings == MFACSettings(
            final_sparsity=0.5,
            end_epoch=3.0,
            params=("a", "b"),
            num_gradients=8,
            block_size=16,
            mask_type=(1, 4),
            scope="global",
            devices=("cuda:0",),
            sampler_options={"size": [1, 2]},
        )
        assert type(settings.end_epoch) is float

    def test_options_of_a_sampler_may_be_any_object(self):
        transform = object()
        keys = {"final_sparsity": 0.5, "end_epoch": 3, "grad_sampler_kwargs": {"transform": transform}}
        assert settings_from_keys("MFACPruningModifier", keys).sampler_options == {"transform": transform}

    @pytest.mark.parametrize(
        ("name", "keys", "expected"),
        [
            ("GMPruningModifier", {"end_epoch": 1}, "GMPruningModifier: final_sparsity is missing; add it"),
            ("EpochRangeModifier", {"end_epoch": "1"}, "EpochRangeModifier.end_epoch: '1' is text, not a number"),
            (
                "EpochRangeModifier",
                {"end_epoc": 1},
                "EpochRangeModifier.end_epoc: unknown key (did you mean end_epoch?)",
            ),
            (
                "MFACPruningModifier",
                {"final_sparsity": 0.5, "end_epoch": 1, "damp": 1, "mfac_options": {"damp": 1}},
                "MFACPruningModifier.mfac_options.damp: damp already gives this setting; keep one of the two",
            ),
            (
                "MFACPruningModifier",
                {"final_sparsity": 0.5, "end_epoch": 1, "num_grads": {0.5: 3}},
                "MFACPruningModifier.num_grads: {0.5: 3} has no key 0.0",
            ),
            (
                "MFACPruningModifier",
                {"final_sparsity": 0.5, "end_epoch": 1, "available_gpus": [object]},
                "MFACPruningModifier.available_gpus: [<class 'object'>] must be a list of device names",
            ),
            ("MFACPrunningModifier", {}, "!MFACPrunningModifier is not a modifier (did you mean MFACPruningModifier?)"),
            ("QuantizationModifier", {}, "QuantizationModifier is not supported; remove it"),
        ],
    )
    def test_errors_have_no_file_and_line(self, name, keys, expected):
        with pytest.raises(RecipeError) as caught:
            settings_from_keys(name, keys)
        assert str(caught.value).startswith(expected)

    def test_text_is_not_an_expression(self):
        keys = {"final_sparsity": 0.5, "end_epoch": 1, "params": "eval(x)"}
        assert settings_from_keys("GMPruningModifier", keys).params == ("eval(x)",)


class TestSeveralErrors:
    TEXT = """
training_modifiers:
  - !EpochRangeModifer {end_epoch: 8.0}
  - !SetLearningRateModifier {learning_rate: 3}
pruning_modifiers:
  - !MFACPruningModifier
    finl_sparsity: 0.8
    init_sparsity: -1
    end_epoch: 4.0
    num_grads: 0
    damp: many
    mask_type: 3x
  - !MagnitudePruningModifier
    final_sparsity: 1.5
    init_sparsity: 0.3
    start_epoch: -3
    end_epoch: true
    end_epok: 5
"""

    def test_all_are_told_in_the_order_of_lines(self):
        assert [line.partition(" ")[0] + line.split(" ")[1] for line in refusal(self.TEXT).splitlines()] == [
            "<text>:3:!EpochRangeModifer",
            "<text>:4:SetLearningRateModifier.learning_rate:",
            "<text>:7:MFACPruningModifier.finl_sparsity:",
            "<text>:8:MFACPruningModifier.init_sparsity:",
            "<text>:10:MFACPruningModifier.num_grads:",
            "<text>:11:MFACPruningModifier.damp:",
            "<text>:12:MFACPruningModifier.mask_type:",
            "<text>:14:MagnitudePruningModifier.final_sparsity:",
            "<text>:16:MagnitudePruningModifier.start_epoch:",
            "<text>:17:MagnitudePruningModifier.end_epoch:",
            "<text>:18:MagnitudePruningModifier.end_epok:",
        ]

    def test_each_is_a_message_of_the_error(self):
        with pytest.raises(RecipeError) as caught:
            load_recipe(self.TEXT)
        assert "\n".join(caught.value.messages) == str(caught.value)
        assert len(caught.value.messages) == 11
        copied = pickle.loads(pickle.dumps(caught.value))
        assert copied.messages == caught.value.messages

    @pytest.mark.parametrize(
        ("keys", "wrong"),
        [
            # What fits together does not become wrong beside a wrong value.
            (["final_sparsity: 2", "init_sparsity: 0.7", "end_epoch: 1"], ["final_sparsity"]),
            (["final_sparsity: 2", "mask_type: '3:4'", "end_epoch: 1"], ["final_sparsity"]),
            (["final_sparsity: 0.5", "start_epoch: 30", "end_epoch: -2"], ["end_epoch"]),
            (["final_sparsity: 0.5", "start_epoch: 30", "end_epoch: 2"], ["end_epoch"]),
            (["final_sparsity: 0.5", "start_epoch: -1.5", "end_epoch: 2"], ["start_epoch"]),
            (["init_sparsity: 0.9", "end_epok: 2", "final_sparsity: 0.95"], ["end_epok"]),
            (["final_sparsity: 2", "end_epoch: -2", "damp: 0"], ["final_sparsity", "end_epoch", "damp"]),
            (["final_sparsity: 2", "init_sparsity: -1", "end_epoch: 2"], ["final_sparsity", "init_sparsity"]),
            (["damp: 0", "damping: 1"], ["", "damp", "damping"]),
        ],
    )
    def test_one_wrong_value_makes_no_other_wrong(self, keys, wrong):
        names = [re.match(r"<text>:\d+: \w+[.]?(\w*):", line)[1] for line in refusal(item(*keys)).splitlines()]
        assert names == wrong

    @pytest.mark.parametrize("modifier", sorted(MODIFIERS))
    def test_of_every_modifier(self, modifier):
        wrong = refusal(item("no_key: 1", "no_other: 2", "start_epoch: -7", modifier=modifier)).splitlines()
        said = [line for line in wrong if "missing" not in line]
        assert [re.match(r"<text>:(\d+)", line)[1] for line in said][:2] == ["3", "4"]

    def test_of_the_form_of_the_text_too(self):
        text = "a: !!python/name:os.system\nb: 1\nb: 2\n" + item(
            "params: !x [y]", "final_sparsity: 0.5", "end_epoch: 1"
        )
        assert [line.partition(": ")[0] for line in refusal(text).splitlines()] == ["<text>:1", "<text>:3", "<text>:6"]
