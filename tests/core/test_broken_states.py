"""States that are damaged: refused with a ValueError before anything has changed, or taken by a rule that is stated."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core import ACDCSettings, ConstantSettings, MagnitudeSettings, MFACPruner, MFACSettings, make_pruner
from mfac_core.fisher.window import GradientWindow
from mfac_core.pruners import Pruner
from mfac_core.schedules.training import OptionsSchedule
from mfac_core.settings.training import SetLearningRate, SetWeightDecay

SHAPES = {"a": (3, 4), "b": (7,), "one": ()}
GRADUAL = dict(final_sparsity=0.8, start_epoch=1.0, end_epoch=4.0)
MFAC = dict(**GRADUAL, num_gradients=3, block_size=5, damping=1e-2)
METHODS = {
    "mfac": MFACSettings(**MFAC),
    "mfac from the weights": MFACSettings(**MFAC, initial_sparsity="__FROM_PARAM__"),
    "parts": MFACSettings(**MFAC, initial_sparsity=0.2, num_recomputations=3),
    "magnitude": MagnitudeSettings(**GRADUAL),
    "magnitude from the weights": MagnitudeSettings(**GRADUAL, initial_sparsity="__FROM_PARAM__"),
    "acdc": ACDCSettings(compression_sparsity=0.5, end_epoch=4.0),
    "constant": ConstantSettings(start_epoch=1.0, end_epoch=2.0),
}
every_method = pytest.mark.parametrize("method", METHODS)

NO_NUMBERS: list[Any] = [None, "x", b"", 1.5, float("nan"), [], {}, np.array("x"), np.array([1, 2]), np.array(1.0)]
OUT_OF_RANGE: list[Any] = [-1, 10**6, 10**5000]
JUNK: list[Any] = [*NO_NUMBERS, *OUT_OF_RANGE, True, np.array([None]), object()]


def make(method: str) -> Pruner:
    weights = {name: np.full(shape, 0.5) for name, shape in SHAPES.items()}
    weights["a"][0] = 0
    return make_pruner(METHODS[method], weights, steps_per_epoch=4)


def in_mid_run(method: str, rows: int = 5) -> Pruner:
    pruner = make(method)
    rng = np.random.default_rng(0)
    weights = {name: np.asarray(rng.standard_normal(shape)) for name, shape in SHAPES.items()}
    for part in range(2):
        for _ in range(rows if isinstance(pruner, MFACPruner) else 0):
            pruner.observe({name: np.asarray(rng.standard_normal(shape)) for name, shape in SHAPES.items()})
        if part < 1:
            weights = pruner.prune(weights).weights
    return pruner


def leaves(state: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield (*path, key), value
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def replaced(state: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    key, *rest = path
    return {**state, key: replaced(state[key], tuple(rest), value) if rest else value}


def without(state: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    key, *rest = path
    if rest:
        return {**state, key: without(state[key], tuple(rest))}
    return {name: value for name, value in state.items() if name != key}


def damaged(value: Any) -> list[Any]:
    """Return what no state may hold in place of a value of a real state."""
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        nan = np.full(value.shape, np.nan)
        longer = np.concatenate([value.reshape(-1), [True]])
        return [*JUNK, value.astype(float), value.astype(np.uint8), value.astype(object), nan, longer, value.tolist()]
    if isinstance(value, np.ndarray):
        changed = [value.astype(object), value.astype(int), value.astype(np.float16), value.tolist(), value[..., :-1]]
        for number in (np.nan, np.inf, -np.inf):
            changed.append(value.copy())
            changed[-1][..., -1] = number
        twice = np.concatenate([value, value])
        return [*JUNK, *changed, twice, value[None], value.reshape(-1, 1), value.astype("c16")]
    if isinstance(value, Mapping):
        return [each for each in JUNK if each is not None]
    if isinstance(value, bool):
        return [each for each in JUNK if each is not True] + [0, 1]
    if isinstance(value, int):
        return [*NO_NUMBERS, -1, True, np.array(True)]
    return [each for each in JUNK if each is not value]


def assert_refused(pruner: Pruner, state: Any, before: Any) -> None:
    for take in (pruner.check_state, pruner.load_state_dict):
        with pytest.raises(ValueError, match=r"the state|the stored"):
            take(state)
        np.testing.assert_equal(pruner.state_dict(), before)


@every_method
def test_each_damaged_value_is_refused_and_changes_nothing(method):
    pruner, state = make(method), in_mid_run(method).state_dict()
    before = copy.deepcopy(pruner.state_dict())
    count = 0
    for path, value in leaves(state):
        for wrong in damaged(value):
            assert_refused(pruner, replaced(state, path, wrong), before)
            count += 1
    assert count > 50
    pruner.load_state_dict(state)
    np.testing.assert_equal(pruner.state_dict(), state)


@every_method
def test_a_state_that_lacks_something_is_refused_unless_it_is_the_window_or_of_an_older_release(method):
    pruner, state = make(method), in_mid_run(method).state_dict()
    before = copy.deepcopy(pruner.state_dict())
    for path, _ in leaves(state):
        if path not in {("window",), ("steps_per_epoch",), ("parts",)}:
            assert_refused(pruner, without(state, path), before)
    for wrong in (None, 3, "x", [], {}, list(state.items()), np.zeros(3)):
        assert_refused(pruner, wrong, before)


@every_method
def test_numbers_may_be_those_of_numpy_or_arrays_without_dimensions(method):
    state = in_mid_run(method).state_dict()
    for turn in (np.array, lambda value: np.array(value)[()]):
        other = {key: turn(value) if isinstance(value, bool | int) else value for key, value in state.items()}
        if isinstance(state.get("window"), Mapping):
            other["window"] = {**state["window"], "position": turn(state["window"]["position"])}
        pruner = make(method)
        pruner.check_state(other)
        pruner.load_state_dict(other)
        np.testing.assert_equal(pruner.state_dict(), state)
        assert type(pruner.state_dict()["pruning_steps_done"]) is int


@every_method
def test_a_check_changes_nothing(method):
    pruner, state = make(method), in_mid_run(method).state_dict()
    before = copy.deepcopy(pruner.state_dict())
    pruner.check_state(state)
    np.testing.assert_equal(pruner.state_dict(), before)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"pruning_steps_done": "x"},
            r"^the state is broken: pruning_steps_done is 'x' and must be an integer from 0 to 4",
        ),
        ({"pruning_steps_done": 5}, "pruning_steps_done is 5 and must be an integer from 0 to 4; load another checkp"),
        ({"waits": 1}, "waits is 1 and must be true or false"),
        ({"refused_rows": -1}, "refused_rows is -1 and must be an integer of at least 0"),
        ({"masks": 3}, r"the state of a pruner \(its masks\): a mapping is expected, and this is 3"),
        ({"schedule": np.zeros((2, 2), object)}, r"schedule is an array of object and shape \(2, 2\) and must be a"),
        ({"initial_sparsities": np.array([0.1])}, "it contains 1 initial sparsities, but this run has 0"),
        (
            {"pruning_steps_done": 4, "parts_done": 1, "parts": 3},
            "1 of 3 sub-steps into a pruning step, .* with 0 pruning steps to do",
        ),
        (
            {"window": {"rows": np.zeros((4, 20), np.float32), "position": 0}},
            "has shape .4, 20., this one holds 3 gradient samples",
        ),
        ({"window": {"rows": np.zeros((2, 20))}}, "not the state of a gradient window: it has no position; pass what"),
    ],
)
def test_what_is_wrong_is_named(changes, what):
    pruner = make("parts")
    with pytest.raises(ValueError, match=what):
        pruner.check_state({**pruner.state_dict(), **changes})


def test_sparsities_that_are_none_are_refused():
    pruner = make("magnitude from the weights")
    state = pruner.state_dict()
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match="initial_sparsities is .* and must be sparsities from 0 to 1"):
            pruner.check_state({**state, "initial_sparsities": state["initial_sparsities"] + [0, 0, value]})
    with pytest.raises(ValueError, match="it contains 0 initial sparsities, but this run has 3"):
        pruner.check_state({**state, "initial_sparsities": None})


def test_masks_of_any_sparsity_are_taken():
    pruner = make("magnitude")
    masks = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    pruner.load_state_dict({**pruner.state_dict(), "masks": masks})
    assert pruner.sparsity == 1


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([*JUNK, np.zeros((1, 2))]),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(METHODS)), st.data())
def test_whatever_a_state_holds_it_is_refused_whole_or_taken_whole(method, data):
    state = in_mid_run(method).state_dict()
    pruner = make(method)
    before = copy.deepcopy(pruner.state_dict())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([path for path, _ in leaves(state)]))
        state = replaced(state, path, data.draw(junk))
    try:
        pruner.load_state_dict(state)
    except ValueError:
        np.testing.assert_equal(pruner.state_dict(), before)
    else:
        np.testing.assert_equal(pruner.state_dict(), state)


@pytest.mark.parametrize(
    ("rows", "position"),
    [(0, 1), (1, 0), (2, 3), (2, 0), (2, 10**6), (3, 3), (3, -1), (3, 10**6), (3, "x"), (3, 1.0), (3, True), (3, None)],
)
def test_a_position_that_does_not_belong_to_the_rows_is_refused(rows, position):
    window = GradientWindow(4, 3, block_size=2)
    window.push(np.ones(4))
    state = {"rows": np.zeros((rows, 4), np.float32), "position": position}
    for take in (window.check_state, window.load_state_dict):
        with pytest.raises(ValueError, match="position in the gradient window is|full with [12] gradient samples"):
            take(state)
    np.testing.assert_array_equal(window.to_rows(), [np.ones(4)])


@pytest.mark.parametrize("state", [None, 3, [True], [True, False, True], [True, 1], [True, None], ["x", "y"], "ab", {}])
def test_a_broken_state_of_learning_rates_is_refused(state):
    schedule = OptionsSchedule(
        [SetLearningRate(learning_rate=0.1, start_epoch=1.0), SetWeightDecay(weight_decay=0.1, start_epoch=2.0)], 10
    )
    list(schedule.due(10))
    for take in (schedule.check_state, schedule.load_state_dict):
        with pytest.raises(ValueError, match="state"):
            take(state)
        assert schedule.state_dict() == [True, False]
    schedule.load_state_dict((np.True_, True))
    assert schedule.state_dict() == [True, True]
