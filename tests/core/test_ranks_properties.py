"""What holds of every gradual run on ranks, whatever its settings, sizes and shards: it equals that of one process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core.pruners.memory import WindowMemory
from mfac_core.ranks import Alone, Shards
from mfac_core.settings.pruning import FROM_PARAM, ACDCSettings, ConstantSettings, MagnitudeSettings, MFACSettings
from tests.core.rank_runs import Arrays, Run, alone, assert_same_steps, on_rank
from tests.core.test_gradual_properties import measured_windows
from tests.core.thread_ranks import ThreadRanks, run_ranks

SHAPES = {"a": (6, 8), "b": (9,), "c": (3, 2, 4), "d": (1, 3)}
LAST = 17

few = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    logger = logging.getLogger("mfac_core")
    before, _ = logger.level, logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@st.composite
def mfac(draw: Any) -> MFACSettings:
    start, length = draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.sampled_from([0.0, 1.0, 2.0]))
    parts = draw(st.sampled_from([1, 1, 3, "auto"]))
    return MFACSettings(
        initial_sparsity=draw(st.sampled_from([0.0, 0.3, FROM_PARAM])),
        final_sparsity=draw(st.sampled_from([0.35, 0.8, 0.95])),
        start_epoch=start,
        end_epoch=start + length,
        update_frequency=draw(st.sampled_from([0.3, 1.0])),
        num_gradients=draw(st.sampled_from([1, 3, {0.0: 3, 0.3: 9}, {0.0: 9, 0.3: 2, 0.6: 20}])),
        block_size=draw(st.sampled_from([1, 7, 16, 1000, None])),
        damping=draw(st.sampled_from([1e-2, "auto"])),
        scope=draw(st.sampled_from(["layer", "global"])),
        update=draw(st.sampled_from(["independent", "joint"])),
        num_recomputations=parts,
    )


@st.composite
def others(draw: Any) -> Any:
    initial = draw(st.sampled_from([0.0, FROM_PARAM]))
    scope = draw(st.sampled_from(["layer", "global"]))
    return draw(
        st.sampled_from(
            [
                MagnitudeSettings(initial_sparsity=initial, final_sparsity=0.7, end_epoch=3.0, scope=scope),
                ACDCSettings(compression_sparsity=0.6, end_epoch=3.0, scope=scope, update_frequency=0.5),
                ConstantSettings(start_epoch=0.5, end_epoch=2.0),
            ]
        )
    )


@st.composite
def shards(draw: Any, sizes: tuple[int, int] = (1, 4)) -> tuple[int, Shards | None]:
    """A number of ranks, and what each of them has: everything, or whole rows or any ranges, also none."""
    size = draw(st.integers(*sizes))
    kind = draw(st.sampled_from(["replicated", "any", "rows", "hybrid"]))
    if kind == "replicated" or (kind == "hybrid" and size % 2):
        return size, None
    groups = size // 2 if kind == "hybrid" else size
    ranges = {}
    for name, shape in SHAPES.items():
        in_row = int(np.prod(shape[1:])) if kind == "rows" else 1
        units = int(np.prod(shape)) // in_row
        cuts = sorted(draw(st.lists(st.integers(0, units), min_size=groups - 1, max_size=groups - 1)))
        bounds = [cut * in_row for cut in (0, *cuts, units)]
        ranges[name] = list(zip(bounds[:-1], bounds[1:], strict=True)) * (size // groups)
    return size, Shards(SHAPES, ranges)


@st.composite
def starts(draw: Any) -> tuple[Arrays, Arrays | None]:
    """Weights, and masks that are given or not."""
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name, shape in SHAPES.items():
        weights[name][rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.9]))] = 0
    if draw(st.booleans()):
        return weights, None
    masks = {name: rng.random(shape) < 0.7 for name, shape in SHAPES.items()}
    return {name: each * masks[name] for name, each in weights.items()}, masks


def train(settings: Any, where: tuple[int, Shards | None], start: Any, live: bool, refused: Any) -> list[Run]:
    size, of_ranks = where
    weights, masks = start
    options = dict(weights=weights, masks=masks, live=live)
    expected = alone(settings, **options).train(0, LAST, refused=refused)
    runs = run_ranks(size, lambda ranks: on_rank(ranks, settings, of_ranks, **options).train(0, LAST, refused=refused))
    if expected.steps:
        assert_same_steps(runs, expected, of_ranks)
    for run in runs:
        assert len(run.steps) == len(expected.steps)  # none, if too many rows are refused to fill the window
        assert run.pruner.num_rows == expected.pruner.num_rows
        assert run.pruner.refused_rows == expected.pruner.refused_rows
        np.testing.assert_equal(run.pruner.masks, expected.pruner.masks)
        assert run.pruner.schedule == expected.pruner.schedule
    return runs


@few
@given(mfac(), shards(), starts(), st.booleans(), st.frozensets(st.integers(0, LAST), max_size=LAST))
def test_an_mfac_run_on_ranks_equals_that_of_one_process(settings, where, start, live, refused):
    train(settings, where, start, live, refused)


@few
@given(others(), shards(), starts())
def test_any_other_run_on_ranks_equals_that_of_one_process(settings, where, start):
    train(settings, where, start, True, frozenset())


@few
@given(mfac(), shards(sizes=(2, 4)), starts(), st.booleans())
def test_the_windows_of_a_rank_never_take_more_than_was_counted(settings, where, start, live):
    size, of_ranks = where

    def run(ranks: ThreadRanks) -> int:
        run = on_rank(ranks, settings, of_ranks, weights=start[0], masks=start[1], live=live)
        pruner = run.pruner
        pruner.check_ranks(0)  # measures the initial sparsity of shards
        memory = WindowMemory(
            settings,
            pruner.layout.num_weights,
            pruner.schedule,
            pruner.masks_to_come(),
            live_gradients=live,
            rank=ranks.rank,
            num_ranks=size,
        )
        assert pruner.needed_bytes == memory.needed_bytes()
        run.train(0, LAST)
        return memory.bytes_at_once()

    with measured_windows() as most:  # of all threads together
        counted = run_ranks(size, run)
    assert most[0] <= sum(counted)


@few
@given(mfac(), starts())
def test_a_run_alone_equals_one_without_ranks(settings, start):
    expected = alone(settings, weights=start[0], masks=start[1]).train(0, LAST)
    run = alone(settings, weights=start[0], masks=start[1], ranks=Alone()).train(0, LAST)
    assert_same_steps([run], expected, None)
    np.testing.assert_equal(run.pruner.state_dict(), expected.pruner.state_dict())
