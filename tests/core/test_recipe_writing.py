from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.errors import SettingError
from mfac_core.recipe import display_name, load_recipe, modifier_name, recipe_text, settings_from_keys
from mfac_core.settings.pruning import (
    FROM_PARAM,
    ACDCSettings,
    ConstantSettings,
    GradualSettings,
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
from tests.core.recipe_lines import only

EPOCHS = st.floats(0, 1000, allow_nan=False).map(lambda epoch: round(epoch, 3))
NAMES = st.lists(
    st.text(min_size=1, max_size=12).filter(lambda name: not name.strip().startswith("eval(")), min_size=1, max_size=3
).map(tuple)
SPARSITIES = st.floats(0.01, 0.99)


@st.composite
def spans(draw: st.DrawFn, *, may_never_end: bool = False) -> dict[str, float]:
    start = draw(EPOCHS)
    end = start + 1 + draw(EPOCHS)
    return {"start_epoch": start, "end_epoch": math.inf if may_never_end and draw(st.booleans()) else end}


@st.composite
def gradual(draw: st.DrawFn) -> dict[str, object]:
    grouped = draw(st.booleans())
    final = draw(st.dictionaries(SPARSITIES, NAMES, min_size=1, max_size=3)) if grouped else draw(SPARSITIES)
    lowest = min(final) if isinstance(final, dict) else final
    return {
        **draw(spans()),
        **({} if grouped else {"params": draw(NAMES)}),
        "exclude": draw(st.just(()) | NAMES),
        "final_sparsity": final,
        "initial_sparsity": draw(st.just(FROM_PARAM) | st.floats(0, lowest)),
        "update_frequency": draw(st.floats(0.01, 10)),
        "interpolation": draw(st.sampled_from(["linear", "cubic", "inverse_cubic"])),
        "scope": draw(st.sampled_from(["layer", "global"])),
        "mask_type": draw(st.sampled_from(["unstructured", "channel", "filter", "block4", "1:200", (2, 2), (-1, 1)])),
        "leave_enabled": draw(st.booleans()),
    }


@st.composite
def mfac_settings(draw: st.DrawFn) -> MFACSettings:
    thresholds = st.dictionaries(st.floats(0.01, 0.99), st.integers(1, 5000), max_size=3)
    return MFACSettings(
        **draw(gradual()),
        num_gradients={0.0: draw(st.integers(1, 5000)), **draw(thresholds)},
        **draw(
            st.fixed_dictionaries({"block_size": st.none() | st.integers(1, 10**6)})
            | st.fixed_dictionaries({"block_size": st.integers(1, 10**6), "gradients_dtype": st.just("bfloat16")})
        ),
        damping=draw(st.just("auto") | st.floats(1e-300, 1e3)),
        devices=draw(st.sampled_from([("auto",), ("cpu",), ("cuda:0", "cuda:1")])),
        gradients_device=draw(st.sampled_from(["auto", "cpu", "cuda:1"])),
        update=draw(st.sampled_from(["independent", "joint"])),
        **draw(
            st.one_of(
                st.just({"num_recomputations": "auto"}),
                st.fixed_dictionaries(
                    {
                        "num_recomputations": st.integers(1, 99),
                        "recomputation_spacing": st.sampled_from(["geometric", "linear"]),
                    }
                ),
            )
        ),
        gradient_origin=draw(st.sampled_from(["auto", "training"])),
        sampler_options=draw(
            st.dictionaries(st.text(max_size=5), st.integers() | st.booleans() | st.none(), max_size=2)
        ),
    )


RATES = st.floats(1e-9, 1)
GROUPS = st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
SCHEDULES = (
    ("StepLR", st.fixed_dictionaries({"step_size": st.floats(0.01, 99), "gamma": st.floats(0.01, 2)})),
    ("MultiStepLR", st.fixed_dictionaries({"milestones": st.just((3000.5, 4000.0)), "gamma": st.floats(0.01, 2)})),
    ("ExponentialLR", st.fixed_dictionaries({"gamma": st.floats(0.01, 2)})),
    ("CosineAnnealingWarmRestarts", st.fixed_dictionaries({"T_0": st.integers(1, 99), "eta_min": RATES})),
)
ANY_SETTINGS = st.one_of(
    mfac_settings(),
    st.builds(lambda keys: MagnitudeSettings(**keys), gradual()),
    st.builds(
        lambda span, **keys: ConstantSettings(**span, **keys),
        spans(may_never_end=True),
        params=NAMES,
        leave_enabled=st.booleans(),
    ),
    st.builds(
        lambda span, **keys: ACDCSettings(**span, **keys),
        spans(),
        compression_sparsity=SPARSITIES,
        params=NAMES,
        update_frequency=st.floats(0.01, 10),
        scope=st.sampled_from(["layer", "global"]),
        mask_type=st.sampled_from(["unstructured", "block4", "1:200", (1, 4)]),
        reset_momentum=st.booleans(),
        leave_enabled=st.booleans(),
    ),
    st.builds(lambda span: EpochRange(**span), spans(may_never_end=True)),
    st.builds(SetLearningRate, learning_rate=RATES, start_epoch=EPOCHS, param_groups=GROUPS),
    st.builds(
        lambda span, **keys: LearningRateFunction(**span, **keys),
        spans(),
        function=st.sampled_from(["linear", "cosine", "cyclic_linear"]),
        initial=RATES,
        final=RATES,
        cycle_epochs=st.floats(0.01, 99),
        param_groups=GROUPS,
    ),
    st.sampled_from(SCHEDULES).flatmap(
        lambda kind: st.builds(
            LearningRateSchedule, kind=st.just(kind[0]), options=kind[1], initial=RATES, start_epoch=EPOCHS
        )
    ),
    st.builds(SetWeightDecay, weight_decay=st.floats(0, 9), start_epoch=EPOCHS, param_groups=GROUPS),
    st.builds(
        lambda span, **keys: TrainableParams(**span, **keys),
        spans(may_never_end=True),
        params=NAMES,
        trainable=st.booleans(),
        strict=st.booleans(),
    ),
)


class TestWriting:
    @given(st.lists(ANY_SETTINGS, min_size=1, max_size=3))
    def test_what_is_written_loads_as_it_was(self, modifiers):
        loaded = load_recipe(recipe_text(modifiers)).modifiers
        assert loaded == tuple(modifiers)
        assert [type(each) for each in loaded] == [type(each) for each in modifiers]

    @pytest.mark.parametrize(
        ("modifier", "keys", "written"),
        [
            ("MFACGlobalPruningModifier", {"final_sparsity": 0.5, "end_epoch": 1}, "MFACPruningModifier"),
            ("OBSPruningModifier", {"final_sparsity": 0.5, "end_epoch": 1}, "MFACPruningModifier"),
            ("GMPruningModifier", {"final_sparsity": 0.5, "end_epoch": 1}, "MagnitudePruningModifier"),
            ("GlobalMagnitudePruningModifier", {"final_sparsity": 0.5, "end_epoch": 1}, None),
            ("MFACPruningModifier", {"final_sparsity": 0.5, "end_epoch": 1}, None),
            ("ACDCPruningModifier", {"compression_sparsity": 0.5, "end_epoch": 1}, None),
            ("ConstantPruningModifier", {}, None),
            ("EpochRangeModifier", {"end_epoch": 1}, None),
            ("SetLearningRateModifier", {"learning_rate": 0.5}, None),
            ("SetWeightDecayModifier", {"weight_decay": 0.5}, None),
            ("LearningRateModifier", {"lr_class": "ExponentialLR", "lr_kwargs": {"gamma": 1}, "init_lr": 1}, None),
            ("TrainableParamsModifier", {"params": "a", "trainable": True}, None),
        ],
    )
    def test_the_name_that_writes_what_another_reads(self, modifier, keys, written):
        assert modifier_name(settings_from_keys(modifier, keys)) == (written or modifier)

    @pytest.mark.parametrize("modifier", ["GMPruningModifier", "OBSPruningModifier", "MFACGlobalPruningModifier"])
    def test_messages_use_the_name_that_the_recipe_used(self, modifier):
        settings = settings_from_keys(modifier, {"final_sparsity": {0.5: ["a"], 0.6: ["b"]}, "end_epoch": 1})
        (again,) = load_recipe(recipe_text([settings])).modifiers
        assert again == settings
        assert {display_name(part) for part in settings.by_final_sparsity()} == {modifier}
        assert display_name(again) == modifier_name(settings)
        other = ConstantSettings(written_as=modifier)  # what was turned into settings of another kind
        assert display_name(other) == "ConstantPruningModifier"

    def test_numbers_of_numpy_are_written_as_numbers(self):
        settings = MagnitudeSettings(final_sparsity=np.float64(0.5), end_epoch=np.int64(3))
        assert only(recipe_text([settings])) == MagnitudeSettings(final_sparsity=0.5, end_epoch=3)

    def test_it_writes_no_text_that_would_be_read_as_an_expression(self):
        with pytest.raises(SettingError, match="^params: 'eval.x.' is text that a recipe reads as an expression"):
            recipe_text([MagnitudeSettings(final_sparsity=0.5, end_epoch=1, params=("eval(x)",))])

    def test_it_writes_no_objects(self):
        options = {"transform": object()}
        with pytest.raises(SettingError, match="^sampler_options: .* is of type object, which a recipe cannot contain"):
            recipe_text([MFACSettings(final_sparsity=0.5, end_epoch=1, sampler_options=options)])

    def test_other_settings_have_no_modifier(self):
        with pytest.raises(TypeError, match="GradualSettings is not the settings class of any modifier"):
            modifier_name(GradualSettings(final_sparsity=0.5, end_epoch=1))

    def test_nothing_is_a_recipe_without_modifiers(self):
        assert recipe_text([]) == "version: 1.1.0\n\nmodifiers: []\n"
