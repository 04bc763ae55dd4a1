from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mfac_core.masks import least_salient, newly_pruned
from tests import reference

# Few different values: ties are the rule.
SALIENCIES = hnp.arrays(np.float64, st.integers(0, 40), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e300, np.inf]))
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.25, 1.0]), st.floats(0, 1))


@given(SALIENCIES, st.integers(-3, 45))
def test_the_least_salient_are_the_first_of_a_stable_sort(saliencies, count):
    count = min(count, len(saliencies))
    chosen = least_salient(saliencies, count)
    expected = np.argsort(saliencies, kind="stable")[: max(count, 0)]
    assert chosen.dtype == np.bool_ and chosen.shape == saliencies.shape
    np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(expected))


@given(SALIENCIES)
def test_choosing_leaves_the_saliencies_alone(saliencies):
    before = saliencies.copy()
    least_salient(saliencies, len(saliencies) // 2)
    np.testing.assert_array_equal(saliencies, before)


@given(SALIENCIES, SPARSITIES, st.data(), st.sampled_from(["layer", "global"]))
def test_selection_equals_the_oracle_within_its_scope(saliencies, sparsity, data, scope):
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(saliencies), max_size=len(saliencies))), dtype=bool)
    first = data.draw(st.integers(0, len(saliencies)))
    segments = {"a": (0, first), "b": (first, len(saliencies))}
    chosen = newly_pruned(saliencies[kept], kept, sparsity, segments, scope)
    after = kept.copy()
    after[kept] = ~chosen
    groups = [slice(None)] if scope == "global" else [slice(*bounds) for bounds in segments.values()]
    for group in groups:
        np.testing.assert_array_equal(after[group], reference.select(saliencies[group], kept[group], sparsity))
        pruned = int(np.sum(~after[group]))
        assert pruned == max(round(kept[group].size * sparsity), int(np.sum(~kept[group])))


def test_layers_do_not_compete_and_all_weights_do():
    saliencies, kept = np.array([1.0, 2.0, 3.0, 4.0, 50.0, 60.0]), np.ones(6, bool)
    segments = {"a": (0, 4), "b": (4, 6)}
    layer = newly_pruned(saliencies, kept, 0.5, segments, "layer")
    overall = newly_pruned(saliencies, kept, 0.5, segments, "global")
    np.testing.assert_array_equal(layer, [True, True, False, False, True, False])
    np.testing.assert_array_equal(overall, [True, True, True, False, False, False])


def test_what_is_pruned_already_counts():
    kept = np.array([True, False, True, False, True, True])
    chosen = newly_pruned(np.array([4.0, 3.0, 2.0, 1.0]), kept, 0.5, {"a": (0, 6)}, "layer")
    np.testing.assert_array_equal(chosen, [False, False, False, True])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_saliency_that_is_nan_is_refused(count):
    with pytest.raises(ValueError, match="NaN"):
        least_salient(np.array([1.0, np.nan, 2.0]), count)
