from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.errors import SettingError
from mfac_core.masks.patterns import mask_patterns, snap_to_n_of_m
from tests import reference


def groups(mask_type, shape, axes=None):
    pattern = mask_patterns(mask_type, {"a": shape}, None if axes is None else {"a": axes})["a"]
    return pattern.groups().reshape(shape), pattern.num_groups


@pytest.mark.parametrize(
    ("mask_type", "expected"),
    [
        ("channel", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ("filter", [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
        ("block4", [[0, 0, 0, 0, 1], [2, 2, 2, 2, 3]]),
        ("2:4", [[0, 0, 0, 0, 1], [2, 2, 2, 2, 3]]),
        ("1:2", [[0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]),
        ((1, 5), [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
        ((2, 1), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ((-1, 1), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ((1, -1), [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
    ],
)
def test_groups_of_a_linear_layer(mask_type, expected):
    found, count = groups(mask_type, (2, 5))
    np.testing.assert_array_equal(found, expected)
    assert count == np.max(expected) + 1


def test_blocks_are_tiles_and_no_runs_of_consecutive_weights():
    np.testing.assert_array_equal(groups((2, 2), (4, 4))[0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])


def test_groups_of_a_convolution_hold_inputs_at_one_kernel_position():
    found, count = groups("2:4", (2, 4, 1, 3))
    assert count == 6
    for output, position in np.ndindex(2, 3):
        assert len(set(found[output, :, 0, position])) == 1
    found, count = groups((2, 2), (2, 4, 1, 3))
    assert count == 6
    assert len(set(found[:, :2, 0, 1].ravel())) == 1 and found[0, 0, 0, 1] != found[0, 0, 0, 2]


def test_channels_and_filters_of_a_convolution_hold_the_whole_kernel():
    found, count = groups("channel", (2, 3, 2, 2))
    assert count == 3 and np.array_equal(found, np.broadcast_to(np.arange(3)[:, None, None], (2, 3, 2, 2)))
    found, count = groups("filter", (2, 3, 2, 2))
    assert count == 2 and np.array_equal(found, np.broadcast_to(np.arange(2)[:, None, None, None], (2, 3, 2, 2)))


def test_an_array_with_one_axis_is_one_row_of_inputs():
    np.testing.assert_array_equal(groups("2:4", (6,))[0], [0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(groups("channel", (3,))[0], [0, 1, 2])
    assert groups("channel", ())[1] == 1


@given(
    st.sampled_from(["channel", "filter", "block4", "1:3", (1, -1), (1, 1)]),
    st.permutations([0, 1, 2, 3]),
    st.tuples(*[st.integers(2, 4)] * 4),
)
def test_axes_bring_another_layout_to_the_same_groups(mask_type, axes, extents):
    """``extents`` are those of (output, kernel, kernel, input)."""
    shape = [0] * 4
    for axis, extent in zip(axes, extents, strict=True):
        shape[axis] = extent
    usual, _ = groups(mask_type, (extents[0], extents[3], extents[1], extents[2]))
    found, count = groups(mask_type, tuple(shape), axes)
    np.testing.assert_array_equal(found.transpose(axes), usual.transpose(0, 2, 3, 1))
    assert set(found.ravel()) == set(range(count))
    expected = reference.groups_of(tuple(shape), mask_type, tuple(axes))
    assert {tuple(np.flatnonzero(found.ravel() == k)) for k in range(count)} == {tuple(group) for group in expected}


def test_an_array_without_weights_has_no_groups():
    for mask_type in ("channel", "filter", "block4", "2:4", (1, -1), (2, 2)):
        assert groups(mask_type, (0, 4))[1] == 0


def test_no_patterns_where_every_weight_stands_alone():
    assert mask_patterns("unstructured", {"a": (2, 3)}) is None


@pytest.mark.parametrize(("mask_type", "shape"), [((4, 1), (6, 8)), ((1, 3), (6, 8)), ((4, 4), (8, 6, 3, 3))])
def test_blocks_that_do_not_divide_are_refused_by_name(mask_type, shape):
    with pytest.raises(SettingError, match=r"mask_type: .*'layer\.weight' of shape .*choose sizes") as refusal:
        mask_patterns(mask_type, {"fits": (8, 12), "layer.weight": shape})
    assert str(shape) in str(refusal.value)


@pytest.mark.parametrize(
    ("mask_type", "shape"),
    [("channel", (8, 1, 3, 3)), ("filter", (1, 8)), ("filter", (8,)), ((-1, -1), (4, 4)), ("block4", (3,))],
)
def test_an_array_that_would_be_pruned_as_a_whole_is_refused_by_name(mask_type, shape):
    with pytest.raises(SettingError, match=r"mask_type: .*'layer\.weight' of shape .* single group .*params"):
        mask_patterns(mask_type, {"layer.weight": shape})
    assert math.prod(shape) > 1


@pytest.mark.parametrize(
    ("mask_type", "wrong"),
    [
        (
            (4, -1),
            ["'a' of shape (6, 8) (6 outputs, 8 inputs)", "'c' of shape (5, 8, 3) (5 outputs, 3 kernel positions, "],
        ),
        ("filter", ["'d' of shape (1, 9) (1 outputs, 9 inputs)", "'e' of shape (1, 8) (1 outputs, 8 inputs)"]),
    ],
)
def test_all_arrays_that_cannot_have_a_pattern_are_named_in_one_error(mask_type, wrong):
    shapes = {"a": (6, 8), "b": (8, 8), "c": (5, 8, 3)}
    with pytest.raises(SettingError) as refusal:
        mask_patterns(mask_type, shapes if mask_type != "filter" else {"b": (8, 8), "d": (1, 9), "e": (1, 8)})
    assert all(each in str(refusal.value) for each in wrong)
    assert "'b'" not in str(refusal.value)
    assert str(refusal.value).endswith("or leave them out of params")


def test_two_kinds_of_refusal_are_one_error_and_very_many_arrays_are_counted():
    with pytest.raises(SettingError) as refusal:
        mask_patterns((1, -1), {"one": (1, 8), "unknown": (4, 4)}, {"unknown": ()})
    assert "'one' of shape (1, 8)" in str(refusal.value)
    assert "which axes these are is not known for 'unknown' of shape (4, 4)" in str(refusal.value)
    with pytest.raises(SettingError, match=r"'9' of shape \(3, 4\) .* and 20 more; choose sizes that do"):
        mask_patterns((2, 1), {str(number): (3, 4) for number in range(30)})


def test_the_axes_of_outputs_and_inputs_alone_make_a_stack_of_matrices():
    shape = (2, 4, 8)
    for mask_type, expected in (("filter", 2 * 4), ("channel", 2 * 8), ("2:4", 2 * 4 * 2), ((2, 4), 2 * 2 * 2)):
        found, count = groups(mask_type, shape, (1, 2))
        assert count == expected
        of_one, _ = groups(mask_type, shape[1:])
        for number in range(2):
            pairs = set(zip(found[number].ravel().tolist(), of_one.ravel().tolist(), strict=True))
            assert len(pairs) == count // 2  # the groups that this matrix has by itself
        assert not set(found[0].ravel()) & set(found[1].ravel())


def test_the_matrices_of_a_stack_may_lie_the_other_way_round():
    found, _ = groups("2:4", (2, 8, 4), (2, 1))
    assert all(
        len(set(found[number, start : start + 4, output])) == 1 for number, start, output in ((0, 0, 0), (1, 4, 3))
    )


@pytest.mark.parametrize("axes", [(0,), (0, 0), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("mask_type", ["unstructured", "filter"])
def test_axes_that_are_no_permutation_are_refused_by_name(axes, mask_type):
    with pytest.raises(ValueError, match=r"axes\['a'\].*permutation of \(0, 1\)"):
        mask_patterns(mask_type, {"a": (2, 3)}, {"a": axes})


@pytest.mark.parametrize("mask_type", ["unstructured", "filter"])
def test_axes_of_an_unknown_array_are_refused_by_name(mask_type):
    with pytest.raises(ValueError, match=r"axes names b, which"):
        mask_patterns(mask_type, {"a": (2, 3)}, {"b": (0, 1)})


def test_a_mask_type_may_be_written_as_in_recipes():
    assert mask_patterns("block", {"a": (2, 8)}) == mask_patterns("block4", {"a": (2, 8)})
    assert mask_patterns("tensorrt", {"a": (2, 8)}) == mask_patterns("2:4", {"a": (2, 8)})
    assert mask_patterns([1, 4], {"a": (2, 8)}) == mask_patterns((1, 4), {"a": (2, 8)})


@pytest.mark.parametrize(
    ("mask_type", "written", "meant"),
    [
        ("1:3", 0.66, 1 - 1 / 3),
        ("1:3", 0.67, 1 - 1 / 3),
        ("1:3", 0.65, 0.65),
        ("2:4", 0.505, 0.5),
        ("tensorrt", 0.495, 0.5),
        ("2:4", 0.25, 0.25),
        ("unstructured", 0.495, 0.495),
        ((1, 4), 0.495, 0.495),
    ],
)
def test_a_sparsity_that_is_rounded_means_exactly_n_of_m(mask_type, written, meant):
    assert snap_to_n_of_m(mask_type, written) == meant
