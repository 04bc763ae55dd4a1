from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.backends import resolve_device
from mfac_core.masks.layout import WeightLayout
from tests.core.strict_backend import strict_devices

NAMES = st.text("abc.", min_size=1, max_size=4)
SHAPES = st.dictionaries(NAMES, st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5).filter(
    lambda shapes: any(math.prod(shape) for shape in shapes.values())
)
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def gather(layout, arrays, kept):
    return layout.gather(arrays, layout.unpruned(kept, resolve_device("cpu")))


def numbered(shapes, dtype=np.float64) -> dict[str, np.ndarray]:
    arrays, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        arrays[name] = np.arange(start, start + size, dtype=dtype).reshape(shape)
        start += size
    return arrays


@given(SHAPES)
def test_segments_are_consecutive_in_order_of_names(shapes):
    layout = WeightLayout(shapes)
    assert layout.names == tuple(shapes)
    assert layout.num_weights == sum(math.prod(shape) for shape in shapes.values())
    stops = [0]
    for name, shape in shapes.items():
        assert layout.segments[name] == (stops[-1], stops[-1] + math.prod(shape))
        stops.append(layout.segments[name][1])
    assert stops[-1] == layout.num_weights


@given(SHAPES)
def test_flatten_and_unflatten_are_inverse(shapes):
    layout, arrays = WeightLayout(shapes), numbered(shapes)
    vector = layout.flatten(arrays)
    np.testing.assert_array_equal(vector, np.arange(layout.num_weights))
    for name, array in layout.unflatten(vector).items():
        assert array.shape == shapes[name]
        np.testing.assert_array_equal(array, arrays[name])


@given(SHAPES, st.randoms(use_true_random=False))
def test_gather_equals_masking_the_flattened_vector(shapes, random):
    layout, arrays = WeightLayout(shapes), numbered(shapes)
    kept = np.array([random.random() < 0.5 for _ in range(layout.num_weights)], dtype=bool)
    np.testing.assert_array_equal(gather(layout, arrays, kept), np.arange(layout.num_weights)[kept])


@given(SHAPES)
def test_the_order_of_the_arrays_is_irrelevant(shapes):
    layout, arrays = WeightLayout(shapes), numbered(shapes)
    backwards = dict(reversed(arrays.items()))
    kept = np.arange(layout.num_weights) % 3 > 0
    np.testing.assert_array_equal(layout.flatten(backwards), layout.flatten(arrays))
    np.testing.assert_array_equal(gather(layout, backwards, kept), gather(layout, arrays, kept))
    layout.check(backwards, "weights")


def test_flatten_gives_a_new_vector():
    arrays = {"a": np.zeros(4)}
    WeightLayout({"a": (4,)}).flatten(arrays)[:] = 1
    assert not arrays["a"].any()


@pytest.mark.parametrize("kept", [[True] * 4, [False] * 4, [True, False, True, True]])
def test_gather_gives_a_new_vector(kept):
    arrays = {"a": np.arange(4, dtype=np.float32)}
    gathered = gather(WeightLayout({"a": (4,)}), arrays, np.array(kept))
    assert gathered.dtype == np.float32
    gathered[:] = -1
    np.testing.assert_array_equal(arrays["a"], [0, 1, 2, 3])


def test_parts_are_views_of_what_is_unpruned_as_a_whole():
    arrays = {"a": np.arange(4.0).reshape(2, 2), "b": np.arange(3.0)}
    layout = WeightLayout({"a": (2, 2), "b": (3,)})
    kept = np.array([True] * 4 + [True, False, True])
    whole, part = layout.gather_each(arrays, layout.unpruned(kept, resolve_device("cpu")))
    assert np.shares_memory(whole, arrays["a"]) and whole.shape == (4,)
    np.testing.assert_array_equal(part, [0, 2])


def test_a_strided_array_is_read_in_its_logical_order():
    array = np.arange(6.0).reshape(2, 3)
    layout = WeightLayout({"a": (3, 2)})
    np.testing.assert_array_equal(layout.flatten({"a": array.T}), [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(gather(layout, {"a": array.T}, np.arange(6) > 1), [1, 4, 2, 5])


@DTYPES
def test_flatten_keeps_the_dtype_or_takes_the_wanted_one(dtype):
    layout, arrays = WeightLayout({"a": (2,)}), {"a": np.ones(2, dtype)}
    assert layout.flatten(arrays).dtype == dtype
    assert layout.flatten(arrays, np.float64).dtype == np.float64


def test_shapes_are_checked_by_name():
    layout = WeightLayout({"a": (2, 3), "b": (4,)})
    layout.check({"a": np.zeros((2, 3)), "b": np.zeros(4)}, "weights")
    layout.check({"a": np.zeros((7, 2, 3)), "b": np.zeros((7, 4))}, "gradients", leading=(7,))
    with pytest.raises(ValueError, match=r"gradients\['b'\].*\(6, 4\).*\(7, 4\)"):
        layout.check({"a": np.zeros((7, 2, 3)), "b": np.zeros((6, 4))}, "gradients", leading=(7,))
    with pytest.raises(ValueError, match=r"weights\['a'\].*\(3, 2\).*\(2, 3\)"):
        layout.check({"a": np.zeros((3, 2)), "b": np.zeros(4)}, "weights")


def test_missing_and_unknown_names_are_refused():
    layout = WeightLayout({"a": (2,), "b": (4,)})
    with pytest.raises(ValueError, match=r"missing: \['b'\].*unknown: \['c'\]"):
        layout.check({"a": np.zeros(2), "c": np.zeros(4)}, "masks")


@pytest.mark.parametrize("shapes", [{}, {"a": (0,)}, {"a": (3, 0), "b": (0,)}])
def test_no_weights_at_all_are_refused(shapes):
    with pytest.raises(ValueError, match="weights"):
        WeightLayout(shapes)


@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_gathering_on_another_device_equals_gathering_in_host_memory(kept):
    layout, (device, _) = WeightLayout({"a": (2, 3), "b": (6,)}), strict_devices(2)
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(6.0, 12.0)}
    there = {name: device.asarray(array) for name, array in arrays.items()}
    row = layout.gather(there, layout.unpruned(np.array(kept), device))
    np.testing.assert_array_equal(device.to_numpy(row), gather(layout, arrays, np.array(kept)))
