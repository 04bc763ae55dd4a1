"""One-shot pruning by groups of layers, in the session that all adapters share."""

import numpy as np
import pytest

from mfac_core import MagnitudeSettings, MFACSettings, SettingError
from mfac_core.schedules.one_shot import one_shot_in_order
from mfac_core.session.one_shot import attached_at_once, prune_in_one_shot
from mfac_core.session.session import Session
from tests.core.numpy_framework import LOGGER, SHAPES, STEPS_PER_EPOCH, ArrayPruning, Model

MFAC = MFACSettings(
    final_sparsity=0.6, end_epoch=1.0, num_gradients=4, damping=1e-3, block_size=30, params=tuple(SHAPES)
)


class NoStatistics:
    layers = ()


def pruned(settings, layers_at_once, model=None):
    """Prune in one shot, and return the model and the parts of each modifier."""
    model = model or Model()
    groups = one_shot_in_order(settings)
    parts = attached_at_once(
        [at_once for _, at_once in groups],
        lambda each, name: ArrayPruning(each, model, sampled=True, name=name),
        layers_at_once=layers_at_once,
        names_of=lambda each: [name for name in SHAPES if name in each.params],
    )
    session = Session([each for part in parts for each in part], steps_per_epoch=STEPS_PER_EPOCH, logger=LOGGER)
    prune_in_one_shot(
        session,
        groups,
        NoStatistics(),
        modifiers=[],
        sampler=None,
        recalibrate_batchnorm=False,
        cure="",
        parts=parts,
    )
    return model, parts


def test_groups_follow_the_order_of_the_model_and_later_gradients_see_earlier_zeros(caplog):
    caplog.set_level("INFO")
    model, ((body, head),) = pruned([MFAC], 1)
    assert [list(each.sizes) for each in (body, head)] == [["body"], ["head"]]
    in_log = [record.getMessage() for record in caplog.records if record.getMessage().startswith("pruning step")]
    assert [line.rpartition("(")[2] for line in in_log] == ["group 1 of 2: body)", "group 2 of 2: head)"]

    by_hand = Model()
    for name in SHAPES:
        pruned([MFACSettings(**{**vars(MFAC), "params": (name,)})], None, by_hand)
    together, _ = pruned([MFAC], None)
    for name in SHAPES:
        assert np.array_equal(model.weights[name], by_hand.weights[name])
    assert np.array_equal(model.weights["body"] == 0, together.weights["body"] == 0)
    assert not np.array_equal(model.weights["head"], together.weights["head"])  # sampled before body was pruned


def test_more_layers_than_there_are_make_one_group():
    model, ((part,),) = pruned([MFAC], 5)
    together, _ = pruned([MFAC], None)
    assert part.name == "group 1 of 1"
    assert all(np.array_equal(model.weights[name], together.weights[name]) for name in SHAPES)


def test_other_modifiers_are_not_divided_and_their_zeros_stay():
    by_magnitude = MagnitudeSettings(final_sparsity=0.3, end_epoch=0.5, params=tuple(SHAPES), scope="global")
    later = MFACSettings(**{**vars(MFAC), "start_epoch": 0.5})
    only, _ = pruned([by_magnitude], 1)
    model, parts = pruned([by_magnitude, later], 1)
    assert [[each.name for each in part] for part in parts] == [
        ["GlobalMagnitudePruningModifier 1"],
        ["MFACPruningModifier 2, group 1 of 2", "MFACPruningModifier 2, group 2 of 2"],
    ]
    assert all((model.weights[name][only.weights[name] == 0] == 0).all() for name in SHAPES)
    assert [round(each.sparsity, 2) for each in parts[1]] == [0.6, 0.61]


def test_warnings_are_those_of_the_recipe_not_one_for_each_group(caplog):
    pruned([MFAC], 1)
    assert caplog.text.count("in one pass within each layer") == 1
    caplog.clear()
    pruned([MFAC, MFAC], 1)
    assert caplog.text.count("prune the same parameters (body, head)") == 1


def test_a_failure_in_the_last_group_restores_the_first(monkeypatch):
    model = Model()
    before = {name: array.copy() for name, array in model.weights.items()}
    monkeypatch.setattr(ArrayPruning, "after_pruning_step", lambda self, *_: 1 / (self.names == ["body"]))
    with pytest.raises(ZeroDivisionError):
        pruned([MFAC], 1, model)
    assert all(np.array_equal(model.weights[name], before[name]) for name in SHAPES)


@pytest.mark.parametrize("layers_at_once", [0, -1, 1.5, True, "2"])
def test_a_number_of_layers_that_is_none_is_refused(layers_at_once):
    with pytest.raises(SettingError, match=r"^layers_at_once: .* must be a positive integer"):
        pruned([MFAC], layers_at_once)


def test_a_global_threshold_is_refused_with_the_modifier_and_the_cure():
    competing = MFACSettings(**{**vars(MFAC), "scope": "global"})
    with pytest.raises(SettingError, match=r"global_sparsity of MFACPruningModifier.*write global_sparsity: false, or"):
        pruned([competing], 1)
