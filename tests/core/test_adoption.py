from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mfac_core import ACDCSettings, ConstantSettings, MagnitudeSettings, MFACSettings, make_pruner
from mfac_core.pruners import Pruner
from mfac_core.pruners.adoption import adopt
from mfac_core.settings.pruning import PruningSettings


def weights(*names: str) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(len(name)).standard_normal((4, 5)) for name in names}


def pruner(settings: PruningSettings, arrays: dict[str, np.ndarray], steps: int = 10) -> Pruner:
    return make_pruner(settings, arrays, steps_per_epoch=steps)


def gone_on(settings: PruningSettings, state: dict[str, Any], arrays: dict[str, np.ndarray], steps: int = 10) -> Pruner:
    now = pruner(settings, arrays, steps)
    adoption = adopt(state, now.state_dict(), arrays)
    now.load_state_dict(adoption.state)
    return now


GRADUAL = {"initial_sparsity": 0.2, "final_sparsity": 0.8, "end_epoch": 2.0, "update_frequency": 1.0}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_that_join_are_pruned_with_the_next_step_to_its_sparsity(scope: str) -> None:
    settings = MagnitudeSettings(**GRADUAL, scope=scope)
    before = pruner(settings, weights("head"))
    before.prune(weights("head"), 10)
    arrays = weights("base", "head")

    now = gone_on(settings, before.state_dict(), arrays)
    np.testing.assert_array_equal(now.masks["head"], before.masks["head"])
    assert now.masks["base"].all()
    assert not now.is_due(10)

    result = now.prune(arrays, 20)
    assert result.sparsity == 0.8
    if scope == "layer":
        assert [float((array == 0).mean()) for array in result.weights.values()] == [0.8, 0.8]


def test_weights_that_leave_take_their_masks_with_them() -> None:
    settings = MagnitudeSettings(**GRADUAL)
    before = pruner(settings, weights("base", "head"))
    before.prune(weights("base", "head"), 10)

    now = gone_on(settings, before.state_dict(), weights("head"))
    assert list(now.masks) == ["head"]
    np.testing.assert_array_equal(now.masks["head"], before.masks["head"])


@pytest.mark.parametrize("done", [0, 1, 2])
def test_the_gradient_window_of_another_scope_is_let_go_and_it_is_said(done: int) -> None:
    settings = MFACSettings(**GRADUAL, num_gradients=3)
    before = pruner(settings, weights("head"))
    for step in [10, 20][:done]:
        before.observe(weights("head"))
        before.prune(weights("head"), step)
    if done < 2:
        before.observe(weights("head"))
    arrays = weights("base", "head")
    adoption = adopt(before.state_dict(), pruner(settings, arrays).state_dict(), arrays)

    assert adoption.state["window"] is None
    later = "no pruning step is left for them" if done == 2 else "the next pruning step prunes them too"
    assert adoption.difference() == (
        f"since the state was saved, base came into scope ({later}); the gradient window starts empty"
    )
    assert gone_on(settings, before.state_dict(), arrays).num_rows == 0


def test_where_zeros_are_held_those_of_weights_that_join_are_held_too() -> None:
    arrays = weights("base", "head")
    for array in arrays.values():
        array[:2] = 0
    before = pruner(ConstantSettings(), {"head": arrays["head"]})
    before.prune({"head": arrays["head"]}, 0)

    assert gone_on(ConstantSettings(), before.state_dict(), arrays).sparsity == 0.5
    fresh = pruner(ConstantSettings(), {"head": arrays["head"]})
    assert gone_on(ConstantSettings(), fresh.state_dict(), arrays).sparsity == 0


@pytest.mark.parametrize("steps", [10, 20])
def test_initial_sparsities_per_layer_are_measured_anew(steps: int) -> None:
    settings = MagnitudeSettings(**{**GRADUAL, "initial_sparsity": "__FROM_PARAM__"})
    before = pruner(settings, weights("head"))
    before.prune(weights("head"), 10)
    arrays = weights("base", "head")

    now = gone_on(settings, before.state_dict(), arrays, steps)
    np.testing.assert_array_equal(now.masks["head"], before.masks["head"])
    assert now.prune(arrays, 2 * steps).sparsity == 0.8


def test_the_same_scope_or_another_model_is_left_to_the_pruner() -> None:
    settings = ACDCSettings(compression_sparsity=0.5, end_epoch=2.0)
    state = pruner(settings, weights("head")).state_dict()

    for names in (("head",), ("base", "neck")):
        arrays = weights(*names)
        adoption = adopt(state, pruner(settings, arrays).state_dict(), arrays)
        assert adoption.state is state
        assert adoption.difference() == ""
    with pytest.raises(ValueError, match="belongs to another recipe or model"):
        gone_on(settings, state, weights("base"))
    with pytest.raises(ValueError, match="belongs to another recipe or model"):
        gone_on(ACDCSettings(compression_sparsity=0.5, end_epoch=4.0), state, weights("base", "head"))


@pytest.mark.parametrize(
    "broken", [{"masks": None}, {"masks": [1]}, {"schedule": "x"}, {"schedule": None}, {"steps_per_epoch": 0}]
)
def test_a_broken_state_is_refused_by_the_pruner(broken: dict[str, Any]) -> None:
    settings = MagnitudeSettings(**{**GRADUAL, "initial_sparsity": "__FROM_PARAM__"})
    state = {**pruner(settings, weights("head")).state_dict(), **broken}

    with pytest.raises(ValueError, match="the state is broken|the state belongs to another"):
        gone_on(settings, state, weights("base", "head"))
