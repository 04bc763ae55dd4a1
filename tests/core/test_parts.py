"""How a pruning step is divided into parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.schedules.substeps import MAX_REMOVED, num_substeps, substep_due, substep_sparsity

BELOW_1 = st.one_of(st.sampled_from([0.0, 0.5, 0.25, 0.98]), st.floats(0, 0.999))


def way(reached: float, wanted: float, parts: int, spacing: str) -> list[float]:
    sparsities = [reached]
    for left in range(parts, 0, -1):
        sparsities.append(substep_sparsity(sparsities[-1], wanted, left, spacing))
    return sparsities


@given(BELOW_1, BELOW_1, st.integers(1, 20))
def test_equal_parts_lead_exactly_to_the_wanted_sparsity(one, other, parts):
    reached, wanted = sorted([one, other])
    linear = way(reached, wanted, parts, "linear")
    np.testing.assert_allclose(linear, np.linspace(reached, wanted, parts + 1), atol=1e-12)
    geometric = way(reached, wanted, parts, "geometric")
    np.testing.assert_allclose(np.subtract(1, geometric), np.geomspace(1 - reached, 1 - wanted, parts + 1), atol=1e-12)
    assert linear[-1] == geometric[-1] == wanted


@given(BELOW_1, BELOW_1)
def test_auto_is_the_least_number_that_never_removes_too_much(one, other):
    reached, wanted = sorted([one, other])
    parts = num_substeps(reached, wanted, "auto")
    kept = np.subtract(1, way(reached, wanted, parts, "geometric"))
    assert np.all(kept[1:] >= kept[:-1] * (1 - MAX_REMOVED) * (1 - 1e-6))
    if parts > 1:
        assert math.pow((1 - wanted) / (1 - reached), 1 / (parts - 1)) < 1 - MAX_REMOVED


@pytest.mark.parametrize(("number", "parts"), [(4, 4), ("auto", 3)])
def test_what_is_reached_has_one_part(number, parts):
    assert num_substeps(0.5, 0.5, number) == num_substeps(0.6, 0.5, number) == 1
    assert num_substeps({"a": 0.5, "b": 0.9}, 0.5, number) == 1
    assert num_substeps({"a": 0.0, "b": 0.9}, 0.5, number) == parts


def test_the_layer_with_the_longest_way_decides():
    assert num_substeps({"a": 0.0, "b": 0.5}, {"a": 0.2, "b": 0.9}, "auto") == num_substeps(0.5, 0.9, "auto") == 7


def test_parts_per_layer():
    assert substep_sparsity({"a": 0.0, "b": 0.5}, {"a": 0.5, "b": 0.5}, 2, "linear") == {"a": 0.25, "b": 0.5}
    assert substep_sparsity({"a": 0.0, "b": 0.5}, 0.5, 2, "linear") == {"a": 0.25, "b": 0.5}
    assert substep_sparsity({"a": 0.0, "b": 0.9}, 0.75, 2, "geometric") == {"a": 0.5, "b": 0.75}


@given(st.integers(0, 200), st.integers(1, 500), st.integers(1, 30), st.integers(1, 100))
def test_parts_come_in_order_after_the_pruning_step_before(before, interval, parts, rows):
    scheduled = before + interval
    steps = [substep_due(scheduled, before, part, parts, rows) for part in range(parts)]
    assert steps[-1] == scheduled and steps == sorted(steps) and steps[0] > before - (parts > interval)
    apart = set(np.diff(steps))
    assert apart <= {min(rows, interval // parts)}
    assert {substep_due(scheduled, None, part, parts, rows) for part in range(parts)} == {scheduled}
