from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.masks.zero_count import count_zeros


@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.0, 1.0))
def test_sparsity_is_that_of_the_weights_and_never_above_that_of_the_masks(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    masks = {"a": rng.random((3, 5)) < 0.5, "b": rng.random(7) < 0.5}
    weights = {
        name: rng.standard_normal(mask.shape) * (mask | (rng.random(mask.shape) < density))
        for name, mask in masks.items()
    }
    count = count_zeros(weights, masks)
    held = sum(int(((weights[name] == 0) & ~mask).sum()) for name, mask in masks.items())
    assert count.weights == 22
    assert count.sparsity == held / 22
    assert count.sparsity_of_masks == sum(int((~mask).sum()) for mask in masks.values()) / 22
    assert bool(count.difference()) == (count.sparsity < count.sparsity_of_masks)


def test_only_what_has_grown_back_is_named() -> None:
    weights = {"back": np.array([1.0, 2.0, 0.0]), "held": np.zeros(3), "free": np.ones(4)}
    masks = {"back": np.array([False, True, False]), "held": np.zeros(3, bool)}
    count = count_zeros(weights, masks)
    assert count.regrown == {"back": 1}
    assert count.difference() == (
        "1 of 5 pruned weights are not zero (back): the sparsity is 0.4000, but 0.5000 according to the masks"
    )


def test_nan_is_not_zero_and_negative_zero_is() -> None:
    count = count_zeros({"w": np.array([np.nan, -0.0])}, {"w": np.zeros(2, bool)})
    assert count.regrown == {"w": 1}


def test_without_masks_nothing_is_pruned_whatever_is_zero() -> None:
    count = count_zeros({"w": np.zeros(4)}, {})
    assert (count.sparsity, count.difference()) == (0.0, "")
