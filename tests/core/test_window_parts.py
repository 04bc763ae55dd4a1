"""Gradient samples that are written into the window in parts, without being concatenated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core import MFACPruner, MFACSettings
from mfac_core.fisher.partition import BlockGroup
from mfac_core.fisher.window import GradientWindow
from tests.core.strict_backend import StrictBackend, strict_devices

SHAPES = {"a": (3, 4), "b": (5,)}


def make_pruner(**changes) -> MFACPruner:
    options = {"final_sparsity": 0.5, "end_epoch": 2.0, "num_gradients": 3, "block_size": 4, **changes}
    weights = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    return MFACPruner(MFACSettings(**options), weights, steps_per_epoch=3)


def gradient_at(step: int, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


@given(
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(1, 12)),
    st.lists(st.integers(0, 30), max_size=5),
    st.booleans(),
)
def test_a_sample_in_parts_is_stored_as_the_whole(size, block_size, cuts, elsewhere):
    options = {"block_size": block_size, "device": "cpu"}
    if elsewhere:
        options["device"] = strict_devices(2, StrictBackend())[1]
    whole, parts = (GradientWindow(size, 3, **options) for _ in range(2))
    cuts = sorted(min(partition, size) for partition in cuts)
    for step in range(5):
        row = np.random.default_rng(step).standard_normal(size).astype(np.float32)
        whole.push(row)
        parts.push(*np.split(row, cuts))
        np.testing.assert_array_equal(parts.to_rows(), whole.to_rows())
    np.testing.assert_array_equal(whole.to_rows()[1], row)


def test_parts_reach_over_groups_and_chunks(monkeypatch):
    stored_groups = (BlockGroup(0, 2, (2, 1)), BlockGroup(6, 1, (5,)), BlockGroup(11, 2, (1,)))
    monkeypatch.setattr(GradientWindow, "_partition", lambda *_: stored_groups)
    for cuts in ([], [1], [5, 6], [3, 7, 12], [2, 2, 11]):
        window = GradientWindow(13, 2, block_size=3)
        row = np.arange(13, dtype=np.float32)
        window.push(*np.split(row, cuts))
        np.testing.assert_array_equal(window.to_rows(), [row])


@pytest.mark.parametrize("lengths", [(3,), (5,), (2, 3), (2, 1), ()])
def test_parts_of_another_length_in_all_are_refused_and_change_nothing(lengths):
    window = GradientWindow(4, 2, block_size=2)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        window.push(*(np.ones(length, np.float32) for length in lengths))
    assert window.count == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_a_refused_sample_leaves_a_full_window_as_it_is(name, value):
    pruner = make_pruner()
    for step in range(4):
        pruner.observe(gradient_at(step))
    before = pruner.state_dict()["window"]
    bad = gradient_at(9)
    bad[name].reshape(-1)[-1] = value
    assert not pruner.observe(bad)
    np.testing.assert_equal(pruner.state_dict()["window"], before)
    assert pruner.refused_rows == 1


def test_a_sample_whose_squares_overflow_is_taken():
    pruner, large = make_pruner(), gradient_at(0)
    large["a"][1, 2] = 1e30
    assert pruner.observe(large) and pruner.num_rows == 1


def test_a_sample_that_float32_cannot_hold_is_refused():
    pruner, large = make_pruner(), gradient_at(0, np.float64)
    large["a"][1, 2] = 1e300
    assert not pruner.observe(large) and pruner.num_rows == 0
    assert pruner.observe(gradient_at(0, np.float64)) and pruner.num_rows == 1


def test_strided_gradients_are_read_in_their_logical_order():
    one, other = make_pruner(), make_pruner()
    gradients = gradient_at(0)
    one.observe(gradients)
    wide = np.repeat(gradients["b"], 2)
    other.observe({"a": np.asfortranarray(gradients["a"]), "b": wide[::2]})
    np.testing.assert_equal(other.state_dict()["window"], one.state_dict()["window"])
