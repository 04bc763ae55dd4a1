from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mfac_core.masks.patterns import mask_patterns
from mfac_core.masks.selection import MaskRule, least_salient, newly_pruned
from mfac_core.masks.sparsity import out_of_reach, sparsity_of_zeros
from tests import reference
from tests.core.strict_backend import strict_devices

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
    chosen = newly_pruned(saliencies[kept], kept, sparsity, MaskRule(segments, scope))
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
    layer = newly_pruned(saliencies, kept, 0.5, MaskRule(segments, "layer"))
    overall = newly_pruned(saliencies, kept, 0.5, MaskRule(segments, "global"))
    np.testing.assert_array_equal(layer, [True, True, False, False, True, False])
    np.testing.assert_array_equal(overall, [True, True, True, False, False, False])


def test_what_is_pruned_already_counts():
    kept = np.array([True, False, True, False, True, True])
    chosen = newly_pruned(np.array([4.0, 3.0, 2.0, 1.0]), kept, 0.5, MaskRule({"a": (0, 6)}, "layer"))
    np.testing.assert_array_equal(chosen, [False, False, False, True])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_saliency_that_is_nan_is_refused(count):
    with pytest.raises(ValueError, match="NaN"):
        least_salient(np.array([1.0, np.nan, 2.0]), count)


def test_each_layer_reaches_its_own_sparsity():
    saliencies, kept = np.arange(12.0), np.ones(12, bool)
    segments = {"a": (0, 4), "b": (4, 12)}
    chosen = newly_pruned(saliencies, kept, {"b": 0.25, "a": 0.75}, MaskRule(segments, "layer"))
    np.testing.assert_array_equal(np.flatnonzero(chosen), [0, 1, 2, 4, 5])


SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 4), st.integers(1, 7)),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=3,
)
MASK_TYPES = st.sampled_from(["channel", "filter", "block4", "1:2", "2:4", "1:3", "3:4", (1, 1), (1, -1), (-1, 1)])


@st.composite
def grouped(draw):
    """Layers, a mask type that fits them, and saliencies whose sums are exact."""
    mask_type = draw(MASK_TYPES)
    shapes = {str(k): shape for k, shape in enumerate(draw(SHAPES))}
    axes = {}
    for name, shape in shapes.items():
        if draw(st.booleans()):
            axes[name] = tuple(draw(st.permutations(range(len(shape)))))
    groups = {name: reference.groups_of(shape, mask_type, axes.get(name)) for name, shape in shapes.items()}
    for name, shape in list(shapes.items()):
        if ":" not in mask_type and len(groups[name]) == 1 and int(np.prod(shape)) > 1:
            del shapes[name], groups[name]
            axes.pop(name, None)
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    values = draw(hnp.arrays(np.float64, size, elements=st.integers(0, 30).map(lambda k: 12.0 * k)))
    kept = draw(hnp.arrays(bool, size))
    return mask_type, shapes, axes, groups, values, kept


@given(grouped(), SPARSITIES, st.sampled_from(["layer", "global"]))
def test_grouped_selection_equals_the_oracle(case, sparsity, scope):
    mask_type, shapes, axes, groups, values, kept = case
    if not shapes:
        return
    patterns = mask_patterns(mask_type, shapes, axes)
    segments, start = {}, 0
    for name, shape in shapes.items():
        segments[name] = (start, start + int(np.prod(shape)))
        start = segments[name][1]
    chosen = newly_pruned(values[kept], kept, sparsity, MaskRule(segments, scope, patterns))
    assert chosen.dtype == np.bool_ and chosen.shape == (np.sum(kept),)
    after = kept.copy()
    after[kept] = ~chosen

    fields = {name: (slice(*segments[name]), groups[name]) for name in shapes}
    if scope == "global":
        everywhere = [[q + segments[name][0] for q in group] for name in shapes for group in groups[name]]
        fields = {"all": (slice(None), everywhere)}
    for field, of_field in fields.values():
        if ":" in mask_type:
            n = int(mask_type.split(":")[0])
            expected = reference.select_n_of_m(values[field], kept[field], sparsity, of_field, n)
        else:
            expected = reference.select_groups(
                values[field], kept[field], sparsity, of_field, count_weights=scope == "global"
            )
        np.testing.assert_array_equal(after[field], expected)


def select(values, sparsity, mask_type, shape, kept=None, scope="layer"):
    """The mask of a single layer after pruning."""
    values = np.asarray(values, float).ravel()
    kept = np.ones(len(values), bool) if kept is None else np.asarray(kept, bool).ravel()
    patterns = mask_patterns(mask_type, {"a": shape})
    after = kept.copy()
    after[kept] = ~newly_pruned(values[kept], kept, sparsity, MaskRule({"a": (0, len(values))}, scope, patterns))
    return after.reshape(shape)


def test_a_group_is_ranked_by_all_its_weights():
    # the smallest weight stands beside the largest
    np.testing.assert_array_equal(select([[0, 9], [3, 3]], 0.5, "filter", (2, 2)), [[True, True], [False, False]])
    np.testing.assert_array_equal(select([[0, 3], [9, 3]], 0.5, "channel", (2, 2)), [[True, False], [True, False]])


@pytest.mark.parametrize(("groups", "sparsity", "pruned"), [(3, 0.6, 2), (4, 0.6, 2), (5, 0.99, 5), (3, 0.1, 0)])
def test_the_number_of_groups_is_rounded(groups, sparsity, pruned):
    after = select(np.arange(2 * groups), sparsity, "filter", (groups, 2))
    assert after.all(axis=1).tolist() == [False] * pruned + [True] * (groups - pruned)


def test_a_short_group_is_ranked_by_its_mean_as_the_others_are():
    assert select([[2, 2, 2, 2, 3]], 0.5, "block4", (1, 5)).tolist() == [[False] * 4 + [True]]
    assert select([[2, 2, 2, 2, 1]], 0.5, "block4", (1, 5)).tolist() == [[True] * 4 + [False]]


def test_a_weight_that_is_pruned_already_makes_its_group_cheaper():
    kept = [[False, True], [True, True]]
    np.testing.assert_array_equal(select([[0, 3], [2, 2]], 0.5, "filter", (2, 2), kept), [[False, False], [True, True]])


def test_a_group_that_is_pruned_already_counts_before_one_of_zeros():
    kept = [[True, True], [False, False], [True, True], [True, True]]
    after = select(np.zeros((4, 2)), 0.25, "filter", (4, 2), kept)
    np.testing.assert_array_equal(after, kept)


def test_over_all_weights_groups_of_different_sizes_come_closest_to_the_sparsity():
    patterns = mask_patterns("filter", {"a": (2, 6), "b": (4, 1)})
    values = np.array([*[5.0] * 6, *[2.0] * 6, 1.0, 3.0, 4.0, 6.0])
    kept, segments = np.ones(16, bool), {"a": (0, 12), "b": (12, 16)}
    # in rising order of means: 1, 6, 1, 1, 6, 1 weights
    for wanted, pruned in [(0, 0), (1, 1), (3, 1), (4, 1), (5, 7), (7, 7), (8, 8), (9, 9), (12, 9), (13, 15), (16, 16)]:
        chosen = newly_pruned(values, kept, wanted / 16, MaskRule(segments, "global", patterns))
        assert np.sum(chosen) == pruned, wanted


@given(st.integers(0, 48), st.sampled_from(["layer", "global"]), st.randoms(use_true_random=False))
def test_n_of_m_is_gradual_and_ends_with_exactly_n_of_each_m(pruned, scope, random):
    values = np.array([random.random() for _ in range(96)])
    first = select(values, pruned / 96, "2:4", (4, 8, 3), scope=scope)
    assert np.sum(~first) == pruned
    per_group = first.transpose(0, 2, 1).reshape(-1, 4)
    assert per_group.sum(axis=1).min() >= 2
    last = select(values, 0.5, "2:4", (4, 8, 3), kept=first, scope=scope)
    assert not np.any(last & ~first)
    assert set(last.transpose(0, 2, 1).reshape(-1, 4).sum(axis=1)) == {2}
    at_once = select(values, 0.5, "2:4", (4, 8, 3), scope=scope)
    np.testing.assert_array_equal(last, at_once)


def test_n_of_m_leaves_the_most_salient_of_each_group_however_small():
    values = [[1, 2, 3, 4, 10, 20, 30, 40]]
    assert select(values, 0.25, "2:4", (1, 8)).tolist() == [[False, False, True, True, True, True, True, True]]
    assert select(values, 0.5, "2:4", (1, 8)).tolist() == [[False, False, True, True] * 2]


def test_n_of_m_counts_what_is_pruned_already_before_zeros():
    kept = [[True, False, True, True, True, True, True, True]]
    after = select([[0, 0, 5, 6, 1, 2, 3, 4]], 0.25, "3:4", (1, 8), kept)
    assert after.tolist() == [[True, False, True, True, False, True, True, True]]


def test_n_of_m_counts_what_is_pruned_already():
    after = select(np.arange(8), 0.25, "2:4", (1, 8), [False, *[True] * 7])
    assert np.flatnonzero(~after.ravel()).tolist() == [0, 1]


def test_of_equal_candidates_of_n_of_m_those_that_come_first_go_first():
    after = select(np.ones(8), 0.25, "2:4", (1, 4, 2))
    assert np.flatnonzero(~after.ravel()).tolist() == [0, 1]


def test_candidates_of_n_of_m_compete_over_all_weights():
    patterns = mask_patterns("2:4", {"a": (1, 4), "b": (2, 4)})
    values = np.array([10.0, 20, 30, 40, 1, 2, 3, 4, 50, 60, 70, 80])
    segments = {"a": (0, 4), "b": (4, 12)}
    for wanted, pruned in [(2, [4, 5]), (4, [0, 1, 4, 5]), (6, [0, 1, 4, 5, 8, 9])]:
        chosen = newly_pruned(values, np.ones(12, bool), wanted / 12, MaskRule(segments, "global", patterns))
        assert np.flatnonzero(chosen).tolist() == pruned


def test_n_of_m_counts_absent_inputs_as_pruned():
    assert select([[1, 2, 3, 4, 5, 6]], 0.5, "2:4", (1, 6)).tolist() == [[False, False, True, True, True, True]]
    assert select([[1, 2, 3]], 0.5, "2:4", (1, 3)).tolist() == [[False, True, True]]


def test_a_saliency_of_a_group_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        select([[1, np.nan], [1, 2]], 0.5, "filter", (2, 2))


def test_groups_of_saliencies_on_another_device(monkeypatch):
    device, other = strict_devices(2)
    monkeypatch.setattr("mfac_core.masks.selection.device_of", lambda x: other)
    patterns = mask_patterns("filter", {"a": (2, 2)})
    values = np.array([0.0, 9.0, 3.0, 3.0])
    chosen = newly_pruned(other.asarray(values), np.ones(4, bool), 0.5, MaskRule({"a": (0, 4)}, "layer", patterns))
    assert chosen.device == other.asarray(values).device
    np.testing.assert_array_equal(device.to_numpy(chosen), [False, False, True, True])


def zeros_of(weights, scope, mask_type="unstructured"):
    segments, start = {}, 0
    for name, array in weights.items():
        segments[name] = (start, start + np.size(array))
        start += np.size(array)
    flat = np.concatenate([np.ravel(array) == 0 for array in weights.values()])
    shapes = {name: np.shape(array) for name, array in weights.items()}
    return sparsity_of_zeros(flat, MaskRule(segments, scope, mask_patterns(mask_type, shapes)))


def test_the_sparsity_of_zeros_per_layer_and_over_all():
    weights = {"a": np.array([[0, 1], [0, 0]]), "b": np.array([1, 0]), "c": np.zeros((0, 2))}
    assert zeros_of(weights, "layer") == {"a": 0.75, "b": 0.5, "c": 0.0}
    assert zeros_of(weights, "global") == 4 / 6


def test_only_zeros_that_fit_the_mask_type_count():
    rows = np.array([[0, 0, 0, 0, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert zeros_of({"a": rows}, "layer", "filter") == {"a": 0.0}
    assert zeros_of({"a": rows}, "layer", "block4") == {"a": 1 / 6}
    assert zeros_of({"a": rows}, "global", "block4") == 4 / 15
    assert zeros_of({"a": rows}, "global", "2:4") == 3 / 15
    assert zeros_of({"a": np.array([[0, 0], [1, 0]]), "b": np.zeros((0, 3))}, "layer", "filter") == {"a": 0.5, "b": 0}


def test_what_keeps_a_sparsity_from_being_reached():
    patterns = mask_patterns("2:4", {"a": (2, 3), "b": (2, 8, 3), "c": (4, 1), "d": (2, 7)})
    assert out_of_reach(0.5, MaskRule({}, "layer", patterns)) == {"a": 1 / 3, "c": 0.0, "d": 3 / 7}
    assert out_of_reach(0.3, MaskRule({}, "layer", patterns)) == {"c": 0.0}
    assert out_of_reach(0.5, MaskRule({}, "layer", mask_patterns("2:4", {"a": (1, 5)}))) == {}  # round(2.5) is 2
    assert out_of_reach(0.5, MaskRule({}, "global", patterns)) == {"a": 1 / 3, "c": 0.0, "d": 3 / 7}
    assert out_of_reach(0.3, MaskRule({}, "global", patterns)) == {}
    assert out_of_reach(0.9, MaskRule({}, "layer", mask_patterns("block4", {"a": (2, 3)}))) == {}
    assert out_of_reach(0.9, MaskRule({}, "global", None)) == {}


@given(
    st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 2)), st.sampled_from(["1:2", "2:4", "1:3", "3:4"])
)
def test_no_more_than_can_be_pruned_is_pruned(shape, mask_type):
    pattern = mask_patterns(mask_type, {"a": shape})["a"]
    most = 1 - int(mask_type[0]) / int(mask_type[2])
    assert np.sum(~select(np.zeros(shape), most, mask_type, shape)) == pattern.max_pruned
