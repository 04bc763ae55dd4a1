"""Gradual runs on several ranks equal those of one process with the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mfac_core.settings.pruning import FROM_PARAM, ACDCSettings, ConstantSettings, MagnitudeSettings, MFACSettings
from tests.core import rank_runs
from tests.core.rank_runs import Run, alone, assert_same_steps, by_rows, compare, on_rank, weights_at_start
from tests.core.thread_ranks import ThreadRanks, run_ranks

LAST = 16


def mfac(**changed: Any) -> MFACSettings:
    usual: dict[str, Any] = dict(
        final_sparsity=0.8, start_epoch=1.0, end_epoch=4.0, update_frequency=1.0, num_gradients=4, block_size=8
    )
    return MFACSettings(**{**usual, **changed})


MFAC = {
    "layer": mfac(damping=1e-2),
    "global": mfac(scope="global"),
    "joint": mfac(update="joint", damping=1e-2),
    "joint, auto": mfac(update="joint", scope="global", damping="auto", num_gradients={0.0: 4, 0.5: 7}),
    "fewer rows later": mfac(num_gradients={0.0: 6, 0.5: 3}),
    "sub-steps": mfac(num_recomputations=3, num_gradients=2),
    "automatic sub-steps": mfac(num_recomputations="auto", num_gradients=1),
    "one block": mfac(block_size=None, damping=1e-2),
    "single columns": mfac(block_size=1),
    "one large block": mfac(block_size=50),
    "zeros": mfac(initial_sparsity=FROM_PARAM),
    "zeros, global": mfac(initial_sparsity=FROM_PARAM, scope="global"),
    "waiting": mfac(start_epoch=0.0, num_gradients=3),
    "bfloat16": mfac(gradients_dtype="bfloat16"),
    "some": mfac(params=["re:a|c"]),
}
OTHERS = {
    "magnitude": MagnitudeSettings(final_sparsity=0.8, start_epoch=1.0, end_epoch=4.0),
    "magnitude, global, zeros": MagnitudeSettings(
        initial_sparsity=FROM_PARAM, final_sparsity=0.8, start_epoch=1.0, end_epoch=4.0, scope="global"
    ),
    "acdc": ACDCSettings(compression_sparsity=0.6, start_epoch=0.0, end_epoch=4.0, update_frequency=1.0),
    "constant": ConstantSettings(start_epoch=1.0, end_epoch=3.0),
}
ALL = {**MFAC, **OTHERS}
LAYOUTS = {"replicated": None, "sharded": 1, "hybrid": 2}


def shards_of(layout: str, size: int) -> Any:
    return None if LAYOUTS[layout] is None else by_rows(size, replicas=LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("settings", ALL.values(), ids=ALL)
def test_a_run_on_ranks_equals_that_of_one_process(settings, size, layout):
    weights = weights_at_start(zeros=0.2)
    compare(size, settings, shards_of(layout, size), LAST, weights=weights)


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("scales", [{"a": 1.0, "b": 30.0, "c": 0.03}, {"a": 1.0, "b": 1.0, "c": 0.0}], ids=str)
def test_damping_auto_is_relative_to_the_blocks_of_all_ranks(scales, layout, monkeypatch):
    def scaled(step: int, shapes: Any = rank_runs.SHAPES) -> rank_runs.Arrays:
        return {name: values * np.float32(scales[name]) for name, values in gradient_at(step, shapes).items()}

    gradient_at = rank_runs.gradient_at
    monkeypatch.setattr(rank_runs, "gradient_at", scaled)
    compare(3, mfac(scope="global", damping="auto", final_sparsity=0.6), shards_of(layout, 3), LAST)


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("live", [True, False])
def test_arrays_of_any_library_are_pruned_on_ranks(layout, live, library):
    settings = mfac(scope="global", block_size=7)
    expected = alone(settings, live=live).train(0, LAST)
    shards = shards_of(layout, 3)

    def train(ranks: ThreadRanks) -> Run:
        run = on_rank(ranks, settings, shards, live=live, to=library.array)
        return run.train(0, LAST)

    runs = run_ranks(3, train)
    for run in runs:
        run.steps = [(step, masks, {k: library.numpy(v) for k, v in now.items()}) for step, masks, now in run.steps]
    assert_same_steps(runs, expected, shards)


def test_shards_must_be_those_of_the_ranks():
    with pytest.raises(ValueError, match="shards are those of 2 ranks, and there are 1; pass both or none"):
        alone(mfac(), shards=by_rows(2))
