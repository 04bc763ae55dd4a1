"""The mask that several ranks choose is that of one process with all saliencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mfac_core.errors import SettingError
from mfac_core.masks.patterns import mask_patterns
from mfac_core.masks.selection import MaskRule, newly_pruned
from mfac_core.ranks import Alone, Shards
from mfac_core.ranks.distribution import Distribution
from mfac_core.ranks.smallest import smallest
from tests.core.thread_ranks import ThreadRanks, outcomes, run_ranks

with_fixture = settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def floats_of(dtype: type) -> st.SearchStrategy[float]:
    """Any number: few different ones, so that ties are the rule, and those where a selection by bits may go wrong."""
    info = np.finfo(dtype)
    tiny = float(info.smallest_subnormal)
    special = [0.0, -0.0, tiny, -tiny, 2 * tiny, float(info.tiny), 1.0, float(np.nextafter(dtype(1), dtype(2)))]
    special += [-1.0, float(info.max), float(info.min), np.inf, -np.inf]
    return st.one_of(st.sampled_from(special), st.floats(allow_nan=False, width=8 * np.dtype(dtype).itemsize))


@st.composite
def vectors(draw, dtype: type, length: int) -> np.ndarray:
    if draw(st.booleans()):
        return np.full(length, draw(floats_of(dtype)), dtype)
    few = draw(st.lists(floats_of(dtype), min_size=1, max_size=3))
    elements = draw(st.sampled_from([st.sampled_from(few), floats_of(dtype)]))
    return draw(hnp.arrays(dtype, length, elements=elements, fill=st.nothing()))


SIZES = st.integers(1, 6)
DTYPES = st.sampled_from([np.float32, np.float64])


@given(st.data(), DTYPES, SIZES, st.integers(1, 3))
def test_the_smallest_of_several_vectors_are_the_first_of_stable_sorts(data, dtype, size, num_vectors):
    lengths = [data.draw(st.integers(0, 30)) for _ in range(num_vectors)]
    whole = [data.draw(vectors(dtype, length)) for length in lengths]
    counts = [data.draw(st.integers(-2, length)) for length in lengths]
    cuts = [
        [0, *sorted(data.draw(st.lists(st.integers(0, n), min_size=size - 1, max_size=size - 1))), n] for n in lengths
    ]

    def choose(ranks: ThreadRanks):
        return smallest(ranks, [v[c[ranks.rank] : c[ranks.rank + 1]] for v, c in zip(whole, cuts, strict=True)], counts)

    found = run_ranks(size, choose)
    for index, (vector, count) in enumerate(zip(whole, counts, strict=True)):
        chosen = np.concatenate([of_rank[index] for of_rank in found])
        expected = np.argsort(vector, kind="stable")[: max(count, 0)]
        np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(expected))


@st.composite
def layers(draw, dtype: type):
    """Segments of layers, a mask, the saliencies of its unpruned weights, the scope and a sparsity."""
    sizes = draw(st.lists(st.integers(0, 15), min_size=1, max_size=4))
    ends = np.cumsum(sizes).tolist()
    segments = {str(k): (end - size, end) for k, (size, end) in enumerate(zip(sizes, ends, strict=True))}
    mask = draw(
        st.one_of(hnp.arrays(bool, ends[-1]), st.just(np.ones(ends[-1], bool)), st.just(np.zeros(ends[-1], bool)))
    )
    saliencies = draw(vectors(dtype, int(np.count_nonzero(mask))))
    scope = draw(st.sampled_from(["layer", "global"]))
    fractions = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
    sparsity = draw(fractions)
    if scope == "layer" and draw(st.booleans()):
        sparsity = {name: draw(fractions) for name in segments}
    return MaskRule(segments, scope), mask, saliencies, sparsity


def chosen_by_ranks(size, block_size, rule, mask, saliencies, sparsity, asarray=np.asarray) -> np.ndarray:
    """What all ranks choose, each from its own columns."""
    shards = Shards.whole({"all": (len(mask),)}, size)

    def choose(ranks: ThreadRanks):
        distribution = Distribution(ranks, shards, mask, block_size=block_size)
        own = asarray(saliencies[slice(*distribution.columns)])
        chosen = newly_pruned(own, mask, sparsity, rule, distribution)
        assert type(chosen) is type(own) and chosen.shape == own.shape
        return np.asarray(chosen)

    return np.concatenate(run_ranks(size, choose))


@given(st.data(), DTYPES, SIZES, st.sampled_from([1, 2, 5, None]))
def test_ranks_choose_as_one_process_does(data, dtype, size, block_size):
    rule, mask, saliencies, sparsity = data.draw(layers(dtype))
    chosen = chosen_by_ranks(size, block_size, rule, mask, saliencies, sparsity)
    assert chosen.dtype == np.bool_
    np.testing.assert_array_equal(chosen, newly_pruned(saliencies, mask, sparsity, rule))


@with_fixture
@given(st.data(), DTYPES)
def test_ranks_choose_on_each_library(library, data, dtype):
    rule, mask, saliencies, sparsity = data.draw(layers(dtype))
    shards = Shards.whole({"all": (len(mask),)}, 3)

    def choose(ranks: ThreadRanks):
        distribution = Distribution(ranks, shards, mask, block_size=2)
        own = library.array(saliencies[slice(*distribution.columns)])
        return library.numpy(newly_pruned(own, mask, sparsity, rule, distribution))

    chosen = np.concatenate(run_ranks(3, choose))
    np.testing.assert_array_equal(chosen, newly_pruned(saliencies, mask, sparsity, rule))


SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=3)


@given(st.data(), SHAPES, st.sampled_from(["filter", "channel", "block4", "2:4", "1:3"]), SIZES)
def test_groups_are_chosen_as_one_process_does(data, shapes, mask_type, size):
    named = {str(k): shape for k, shape in enumerate(shapes)}
    try:
        patterns = mask_patterns(mask_type, named)
    except SettingError:
        assume(False)
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    segments = dict(zip(named, zip([0, *ends[:-1]], ends, strict=True), strict=True))
    mask = data.draw(hnp.arrays(bool, ends[-1]))
    saliencies = data.draw(
        hnp.arrays(np.float64, int(mask.sum()), elements=st.sampled_from([0.0, 1.0, 2.5, 4.0]) | st.floats(0, 1e6))
    )
    rule = MaskRule(segments, data.draw(st.sampled_from(["layer", "global"])), patterns)
    sparsity = data.draw(st.floats(0, 1))
    chosen = chosen_by_ranks(size, data.draw(st.sampled_from([1, 3, None])), rule, mask, saliencies, sparsity)
    np.testing.assert_array_equal(chosen, newly_pruned(saliencies, mask, sparsity, rule))


@pytest.mark.parametrize("patterns", [None, mask_patterns("2:4", {"a": (2, 4), "b": (1, 4)})])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bad", [0, 5, 11])
def test_nan_on_one_rank_is_refused_by_all(bad, sparsity, patterns):
    saliencies, mask = np.arange(12.0), np.ones(12, bool)
    saliencies[bad] = np.nan
    rule = MaskRule({"a": (0, 8), "b": (8, 12)}, "layer", patterns)

    def choose(ranks: ThreadRanks):
        distribution = Distribution(ranks, Shards.whole({"all": (12,)}, 3), mask, block_size=1)
        newly_pruned(saliencies[slice(*distribution.columns)], mask, sparsity, rule, distribution)

    errors = outcomes(3, choose)
    assert [type(error) for error in errors] == [ValueError] * 3
    assert {str(error) for error in errors} == {
        "a saliency is NaN: the weights contain NaN or Inf; prune from finite weights"
    }


@pytest.mark.parametrize(("dtype", "passes"), [(np.float32, 4), (np.float64, 8)])
def test_only_counts_are_sent(dtype, passes):
    rule = MaskRule({"a": (0, 60), "b": (60, 100), "c": (100, 1000)}, "layer")
    saliencies, mask = np.random.default_rng(0).random(1000).astype(dtype), np.ones(1000, bool)

    def choose(ranks: ThreadRanks):
        distribution = Distribution(ranks, Shards.whole({"all": (1000,)}, 2), mask, block_size=10)
        newly_pruned(saliencies[slice(*distribution.columns)], mask, 0.5, rule, distribution)
        return ranks.calls

    # whether any is NaN, histograms of all layers at once, and how many are equal to the threshold on each rank
    histograms = [("sum", 3 * 256 * 8)] * passes
    assert run_ranks(2, choose) == [[("sum", 8), *histograms, ("sum", 2 * 3 * 8)]] * 2


def test_ties_across_ranks_are_pruned_in_the_order_of_the_weights():
    rule = MaskRule({"a": (0, 6)}, "layer")
    chosen = chosen_by_ranks(3, 1, rule, np.ones(6, bool), np.array([1.0, 2.0, 1.0, 1.0, 0.5, 1.0]), 0.5)
    assert chosen.tolist() == [True, False, True, False, True, False]


def test_the_sign_of_zero_breaks_no_tie():
    rule = MaskRule({"a": (0, 4)}, "layer")
    for dtype in (np.float32, np.float64):
        chosen = chosen_by_ranks(2, 1, rule, np.ones(4, bool), np.array([0.0, -0.0, -0.0, 0.0], dtype), 0.75)
        assert chosen.tolist() == [True, True, True, False]


def test_many_digits_are_counted_in_parts(monkeypatch):
    monkeypatch.setattr("mfac_core.ranks.smallest._COUNTED_AT_ONCE", 7)
    values = np.random.default_rng(1).standard_normal(100)
    (chosen,) = smallest(Alone(), [values], [40])
    np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(np.argsort(values)[:40]))


def test_a_rank_alone_selects_without_passes_over_the_bits(monkeypatch):
    monkeypatch.delattr("mfac_core.masks.selection.smallest")
    mask, rule = np.ones(4, bool), MaskRule({"a": (0, 4)}, "layer")
    alone = Distribution(Alone(), Shards.whole({"a": (4,)}, 1), mask, block_size=None)
    chosen = newly_pruned(np.array([3.0, 1.0, 2.0, 0.5]), mask, 0.5, rule, alone)
    assert chosen.tolist() == [False, True, False, True]
