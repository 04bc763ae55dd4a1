import inspect

import pytest

from mfac_core import prune
from mfac_core.recipe import settings_from_keys
from mfac_core.recipe.recommended import RECOMMENDED, differs_line, recommended_keys, recommended_line
from mfac_core.settings.pruning import MagnitudeSettings

OTHERS = {"global_sparsity": False, "update": "independent", "num_recomputations": 3, "damp": 0.5, "num_grads": 7}


def recommended():
    return settings_from_keys("MFACPruningModifier", recommended_keys({}, 0.9))


def test_what_is_recommended():
    settings = recommended()
    assert settings.final_sparsity == 0.9
    assert (settings.scope, settings.update) == ("global", "joint")
    assert (settings.num_recomputations, settings.damping) == ("auto", "auto")
    assert settings.num_gradients == {0.0: 256}
    assert (settings.start_epoch, settings.end_epoch) == (0.0, 0.0)


def test_arrays_are_pruned_by_the_same_settings():
    parameters = inspect.signature(prune).parameters
    for field in ("scope", "update", "num_recomputations", "damping"):
        assert getattr(recommended(), field) == parameters[field].default


@pytest.mark.parametrize(
    ("key", "nested"), [*((key, False) for key in RECOMMENDED), ("num_grads", True), ("damp", True)]
)
def test_a_key_that_is_given_takes_the_place_of_the_recommended_one(key, nested):
    own = {key: OTHERS[key]}
    keys = recommended_keys({"mfac_options": own} if nested else own, 0.9)
    settings = settings_from_keys("MFACPruningModifier", keys)
    assert settings != recommended()
    assert settings == settings_from_keys(
        "MFACPruningModifier", {**RECOMMENDED, **own, "final_sparsity": 0.9, "end_epoch": 0.0}
    )
    assert f"{key} " not in recommended_line({"mfac_options": own} if nested else own)
    assert f"{key} " in recommended_line({})


def test_the_sparsity_has_two_names_of_which_one_is_given():
    assert recommended_keys({"final_sparsity": 0.9}) == recommended_keys({}, 0.9)
    assert recommended_keys({}, {0.8: ["a"]})["final_sparsity"] == {0.8: ["a"]}
    with pytest.raises(TypeError, match="the sparsity is missing; pass sparsity=0.9"):
        recommended_keys({"num_grads": 4})
    with pytest.raises(TypeError, match=r"sparsity=0.9 and final_sparsity=0.8 name one setting twice; pass one"):
        recommended_keys({"final_sparsity": 0.8}, 0.9)


def test_each_of_the_weights_that_a_sparsity_names_gets_it():
    keys = recommended_keys({}, {0.8: ["a", "b"]})
    assert keys["global_sparsity"] is False
    assert "global_sparsity false" in recommended_line({"final_sparsity": {0.8: ["a", "b"]}})
    assert recommended_keys({"global_sparsity": True}, {0.8: ["a", "b"]})["global_sparsity"] is True


def test_epochs_of_a_gradual_run_are_taken_as_they_are():
    keys = recommended_keys({"start_epoch": 2.0, "end_epoch": 5.0, "init_sparsity": 0.1}, 0.9)
    assert settings_from_keys("MFACPruningModifier", keys).end_epoch == 5.0


def test_a_line_says_where_settings_differ_from_those_recommended():
    assert differs_line(recommended()) == ""
    assert differs_line(MagnitudeSettings(final_sparsity=0.9, end_epoch=0.0)) == ""
    own = settings_from_keys("OBSPruningModifier", {**OTHERS, "final_sparsity": 0.9, "end_epoch": 0.0})
    line = differs_line(own)
    assert line.startswith(
        "one-shot pruning with other settings than recommended: global_sparsity false (recommended: true), "
    )
    assert all(f"{key} " in line for key in RECOMMENDED)
    assert line.endswith("num_grads 7 (256)")  # a number, as it was given
    assert recommended_line(OTHERS) == ""
