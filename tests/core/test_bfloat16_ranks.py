"""Windows in bfloat16 on several ranks: rows move between owners and through states as they are stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mfac_core.settings.pruning import MFACSettings
from tests.core.rank_runs import alone, assert_same_steps, by_rows, compare, gradient_at, on_rank
from tests.core.thread_ranks import ThreadRanks, run_ranks

SETTINGS = MFACSettings(
    final_sparsity=0.8,
    start_epoch=1.0,
    end_epoch=4.0,
    num_gradients={0.0: 4, 0.5: 6},
    block_size=8,
    damping=1e-2,
    scope="global",
    gradients_dtype="bfloat16",
)
LAST = 16


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("live", [True, False])
def test_a_run_on_ranks_equals_that_of_one_process(size, layout, live):
    runs = compare(size, SETTINGS, None if layout == "replicated" else by_rows(size), LAST, live=live)
    for run in runs:
        window = run.pruner._collector.window
        assert window is None or window.row_format.itemsize == 2


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_is_resumed_by_another_number_of_ranks(after):
    expected = alone(SETTINGS).train(0, LAST)
    middle = 10  # inside a window, after the first pruning steps
    first = run_ranks(2, lambda ranks: on_rank(ranks, SETTINGS).train(0, middle))
    states = [run.pruner.state_dict() for run in first]
    assert all(state["window"]["rows"].itemsize == 2 for state in states)

    def resume(ranks: ThreadRanks):
        run = on_rank(ranks, SETTINGS, weights=first[0].now)
        run.pruner.load_state_dict(states)
        return run.train(middle, LAST)

    resumed = run_ranks(after, resume)
    for run in resumed:
        before = len(first[0].steps)
        run.steps = [*first[0].steps, *run.steps]
        run.numbers = first[0].numbers | {before + number: of_step for number, of_step in run.numbers.items()}
    assert_same_steps(resumed, expected, None)


def test_a_state_in_float32_is_refused_by_name():
    in_float32 = run_ranks(2, lambda ranks: on_rank(ranks, replace(SETTINGS, gradients_dtype="float32")).train(0, 6))
    states = [run.pruner.state_dict() for run in in_float32]
    with pytest.raises(ValueError, match="window is float32, this one is bfloat16"):
        run_ranks(2, lambda ranks: on_rank(ranks, SETTINGS).pruner.load_state_dict(states))


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_a_row_that_bfloat16_cannot_hold_is_refused_by_all_ranks(layout):
    def observe(ranks: ThreadRanks) -> tuple[int, int]:
        run = on_rank(ranks, SETTINGS, None if layout == "replicated" else by_rows(2))
        for value in (1.0, 3.4e38):
            gradients = gradient_at(0)
            gradients["b"][7] = np.float32(value)  # in the shard, and in the columns, of one rank
            run.pruner.observe(run.part(gradients))
        return run.pruner.num_rows, run.pruner.refused_rows

    assert run_ranks(2, observe) == [(1, 1)] * 2
