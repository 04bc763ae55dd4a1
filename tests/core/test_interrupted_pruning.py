"""Whatever breaks off a pruning step or an observation leaves a pruner that can go on as if nothing had happened."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mfac_core
from mfac_core import (
    ACDCSettings,
    ConstantSettings,
    MagnitudeSettings,
    MemoryBudgetError,
    MFACPruner,
    MFACSettings,
    make_pruner,
)
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.fisher.window import GradientWindow
from mfac_core.masks.layout import WeightLayout
from mfac_core.pruners import Pruner
from mfac_core.pruners.collection import GradientCollector
from mfac_core.pruners.memory import WindowMemory
from mfac_core.schedules.pruning import ScheduledStep

SHAPES = {"a": (5, 6), "b": (11,), "c": (2, 4, 3)}
TOTAL = 65
STEPS_PER_EPOCH = 8
GRADUAL = dict(initial_sparsity=0.2, final_sparsity=0.8, start_epoch=1.0, end_epoch=4.0)
MFAC = MFACSettings(**GRADUAL, num_gradients={0.0: 4, 0.5: 6}, block_size=20, damping=1e-3)
METHODS = {
    "mfac": MFAC,
    "joint": MFACSettings(**GRADUAL, num_gradients=4, block_size=20, damping=1e-3, update="joint"),
    "parts": MFACSettings(**GRADUAL, num_gradients=4, block_size=20, damping=1e-3, num_recomputations=3),
    "magnitude": MagnitudeSettings(**GRADUAL),
    "pairs": MagnitudeSettings(final_sparsity=0.5, end_epoch=4.0, mask_type="1:2", scope="global"),
    "acdc": ACDCSettings(compression_sparsity=0.5, end_epoch=4.0),
    "constant": ConstantSettings(start_epoch=1.0, end_epoch=2.0),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_exception = pytest.mark.parametrize("exception", [MemoryError, KeyboardInterrupt, RuntimeError])


def make_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights["a"][0] = 0
    return weights


def gradient_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1000 + step)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def make(method: str) -> Pruner:
    return make_pruner(METHODS[method], make_weights(), steps_per_epoch=STEPS_PER_EPOCH)


def in_mid_run(method: str) -> tuple[Pruner, dict[str, np.ndarray]]:
    """Return a pruner that has done its first pruning step, or part of it, and whose next is due; and the weights."""
    pruner, weights = make(method), make_weights()
    for number in range(6):
        if isinstance(pruner, MFACPruner):
            pruner.observe(gradient_at(number))
    weights = pruner.prune(weights).weights
    if isinstance(pruner, MFACPruner):
        pruner.observe(gradient_at(7))
    return pruner, {name: array * np.float32(1.5) for name, array in weights.items()}


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in SHAPES)


def equal(one: Any, other: Any) -> bool:
    try:
        np.testing.assert_equal(one, other)
    except AssertionError:
        return False
    return True


def raises(exception: type[BaseException], at_call: int = 1, instead_of: Callable[..., Any] | None = None) -> Any:
    """Return a function that raises when it is called for the ``at_call``-th time; before that it does what is said."""
    calls = iter(range(1, 1000))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= at_call:
            raise exception("injected")
        return instead_of(*args, **kwargs) if instead_of else None

    return function


@contextmanager
def interrupted(at_line: int, exception: type[BaseException]) -> Iterator[list[int]]:
    """Raise before the core runs its ``at_line``-th line from here; yields the lines run so far."""
    source = str(Path(mfac_core.__file__).parent)
    lines = [0]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(source):
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == at_line:
                raise exception("injected")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def assert_a_retry_is_right(pruner: Pruner, weights: Any, method: str, before: Any) -> None:
    np.testing.assert_equal(pruner.state_dict(), before)
    clean, _ = in_mid_run(method)
    expected, result = clean.prune(weights), pruner.prune(weights)
    assert same(result.weights, expected.weights) and same(result.masks, expected.masks)
    assert result.predicted_loss_increase == expected.predicted_loss_increase
    np.testing.assert_equal(pruner.state_dict(), clean.state_dict())


@every_method
def test_an_interruption_at_any_line_of_a_pruning_step_changes_nothing(method, caplog):
    caplog.set_level(logging.CRITICAL, "mfac_core")
    pruner, weights = in_mid_run(method)
    before = copy.deepcopy(pruner.state_dict())
    line = 1
    while True:
        with interrupted(line, KeyboardInterrupt) as lines:
            try:
                pruner.prune(weights)
                break
            except KeyboardInterrupt:
                pass
        np.testing.assert_equal(pruner.state_dict(), before, err_msg=f"at line {line}")
        line += 1 + line // 40  # nearly all at first; then ever fewer of what goes round for each block
    assert lines[0] > 40
    interrupted_pruner, _ = in_mid_run(method)
    with interrupted(lines[0] - 1, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        interrupted_pruner.prune(weights)
    assert_a_retry_is_right(interrupted_pruner, weights, method, before)


FAILING = [("mfac_core.pruners.base.PruneResult",)]
FAILING += [(WeightLayout, name) for name in ("flatten", "unflatten", "unflatten_like")]
FAILING_MFAC = [(GradientWindow, "rebuilt")]
FAILING_MFAC += [(f"mfac_core.{name}",) for name in ("fisher.window._take_columns", "pruners.mfac.mfac_step")]


@every_exception
@pytest.mark.parametrize(
    ("method", "target"),
    [
        *((method, target) for method in METHODS for target in FAILING),
        *((method, target) for method in ("mfac", "joint", "parts") for target in FAILING_MFAC),
    ],
    ids=lambda each: each if isinstance(each, str) else str(each[-1]),
)
def test_a_step_that_fails_changes_nothing_and_a_retry_gives_the_same(method, target, exception, monkeypatch):
    pruner, weights = in_mid_run(method)
    before = copy.deepcopy(pruner.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(*target, raises(exception))
        with pytest.raises(exception, match="injected"):
            pruner.prune(weights)
    assert_a_retry_is_right(pruner, weights, method, before)


@every_method
@every_exception
def test_what_goes_wrong_in_the_block_is_as_if_the_step_had_not_begun(method, exception):
    pruner, weights = in_mid_run(method)
    before = copy.deepcopy(pruner.state_dict())
    step = pruner.next_step.step
    with pytest.raises(exception, match="in the block"), pruner.pruning(weights, step) as result:
        result.weights["a"][...] = 7
        result.masks["a"][...] = False
        assert pruner.is_due(step)
        raise exception("in the block")
    assert pruner.is_due(step)
    assert_a_retry_is_right(pruner, weights, method, before)


@every_method
def test_a_block_that_ends_is_a_pruning_step(method):
    (one, weights), (other, _) = in_mid_run(method), in_mid_run(method)
    expected = one.prune(weights)
    with other.pruning(weights) as result:
        assert not same(other.masks, result.masks) or other.sparsity == result.sparsity
    assert (
        same(result.weights, expected.weights)
        and same(result.masks, expected.masks)
        and same(result.masks, other.masks)
    )
    assert result.sparsity == expected.sparsity == other.sparsity
    np.testing.assert_equal(other.state_dict(), one.state_dict())


def test_a_second_pruning_step_in_the_block_is_refused():
    pruner, weights = in_mid_run("magnitude")
    with pytest.raises(RuntimeError, match=r"block of pruning\(\)"), pruner.pruning(weights):
        pruner.prune(weights)
    once, _ = in_mid_run("magnitude")
    once.prune(weights)
    np.testing.assert_equal(pruner.state_dict(), once.state_dict())


@pytest.mark.parametrize("rows_before", [0, 1, 3, 4, 6])
def test_an_observation_that_is_interrupted_at_any_line_can_be_repeated(rows_before):
    pruner = make("mfac")
    for number in range(rows_before):
        pruner.observe(gradient_at(number))
    state = copy.deepcopy(pruner.state_dict())
    clean = make("mfac")
    clean.load_state_dict(state)
    clean.observe(gradient_at(rows_before))
    expected = copy.deepcopy(clean.state_dict())
    result = clean.prune(make_weights())
    stored = [gradient_at(number)["b"] for number in range(rows_before)][-4:]
    line = torn = whole = 0
    while True:
        line += 1
        pruner = make("mfac")
        pruner.load_state_dict(copy.deepcopy(state))
        with interrupted(line, KeyboardInterrupt):
            try:
                pruner.observe(gradient_at(rows_before))
                break
            except KeyboardInterrupt:
                pass
        if equal(pruner.state_dict(), expected):  # it came when the row was stored
            whole += 1
            continue
        found = [] if pruner._collector.window is None else pruner._collector.window.to_rows()[:, 30:41]
        assert len(found) == pruner.num_rows
        assert all(any(np.array_equal(row, each) for each in stored) for row in found), f"at line {line}"
        if len(found) < len(stored):  # the oldest had begun to be written over
            torn += 1
            assert len(found) == 3
            resumed = make("mfac")
            resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
            resumed.observe(gradient_at(rows_before))
            assert resumed.num_rows == 4
            assert same(resumed.prune(make_weights()).masks, result.masks)
        pruner.observe(gradient_at(rows_before))
        np.testing.assert_equal(pruner.state_dict(), expected, err_msg=f"at line {line}")
    assert line > 20 and 0 < whole < 5 and bool(torn) == (rows_before >= 4)


@pytest.mark.parametrize("rows_before", [0, 4])
def test_an_interrupted_row_takes_no_part_in_a_pruning_step(rows_before, monkeypatch):
    pruner, clean = make("mfac"), make("mfac")
    for number in range(rows_before):
        pruner.observe(gradient_at(number))
    for number in range(1, rows_before):
        clean.observe(gradient_at(number))
    write = mfac_core.fisher.window._write_blocks
    with monkeypatch.context() as patch:
        patch.setattr("mfac_core.fisher.window._write_blocks", raises(KeyboardInterrupt, 3, write))
        with pytest.raises(KeyboardInterrupt):
            pruner.observe(gradient_at(50))
    assert pruner.num_rows == clean.num_rows
    for each in (pruner, clean):
        each.observe(gradient_at(60))
    result, expected = (each.prune(make_weights()) for each in (pruner, clean))
    assert same(result.masks, expected.masks)
    for name in SHAPES:
        np.testing.assert_allclose(result.weights[name], expected.weights[name], rtol=1e-4, atol=1e-6)


@every_exception
def test_a_window_that_cannot_be_made_leaves_no_trace(exception, monkeypatch):
    pruner = make("mfac")
    before = copy.deepcopy(pruner.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(GradientCollector, "_new_window", raises(exception))
        with pytest.raises(exception):
            pruner.observe(gradient_at(0))
        np.testing.assert_equal(pruner.state_dict(), before)
    assert pruner.observe(gradient_at(0)) and pruner.num_rows == 1


@every_exception
@pytest.mark.parametrize("drawn", [0, 2])
def test_sampling_that_fails_can_be_begun_again(drawn, exception):
    def sampled(pruner: MFACPruner, number: int) -> None:
        pruner.forget_gradients()
        for row in range(number):
            pruner.observe(gradient_at(row))

    pruner, clean = (
        make_pruner(MFAC, make_weights(), steps_per_epoch=STEPS_PER_EPOCH, live_gradients=False) for _ in range(2)
    )
    sampled(pruner, 4)
    pruner.observe(gradient_at(9))
    with pytest.raises(exception):
        sampled(pruner, drawn)
        raise exception
    assert pruner.num_rows == drawn and pruner.is_due(8) and pruner.sparsity == 0
    for each in (pruner, clean):
        sampled(each, 4)
    result, expected = pruner.prune(make_weights(), 8), clean.prune(make_weights(), 8)
    assert same(result.weights, expected.weights) and same(result.masks, expected.masks)
    assert pruner.num_rows == 0, "sampled rows are forgotten with the pruning step"


def test_memory_that_ends_at_the_window_that_follows_loses_nothing(monkeypatch):
    pruner, weights = in_mid_run("mfac")
    before = copy.deepcopy(pruner.state_dict())
    zeros = NumpyBackend.zeros
    with monkeypatch.context() as patch:  # the first chunk of the new window is made, and the second is not
        patch.setattr("mfac_core.fisher.window.partition", each_block_alone)
        patch.setattr(NumpyBackend, "zeros", raises(MemoryError, 4, zeros))
        with pytest.raises(MemoryError):
            pruner.prune(weights)
    assert_a_retry_is_right(pruner, weights, "mfac", before)
    assert pruner.observe(gradient_at(8))


def each_block_alone(num_weights: int, block_size: int | None, **options: Any) -> Any:
    return mfac_core.fisher.partition.partition(num_weights, block_size, **{**options, "group_bytes": 1})


def test_the_window_that_follows_a_pruning_step_is_counted_beside_the_one_before(monkeypatch):
    settings = MFACSettings(
        final_sparsity=0.8, initial_sparsity=0.2, start_epoch=1, end_epoch=2, num_gradients=500, block_size=2
    )
    weights = {"a": np.ones(1000, np.float32)}
    both = 4 * 500 * (1000 + 800)
    for live_gradients, needed in ((True, both), (False, 4 * 500 * 1000)):
        schedule = make_pruner(settings, weights, steps_per_epoch=8).schedule
        assert WindowMemory(settings, 1000, schedule, live_gradients=live_gradients).bytes_at_once() == needed
    monkeypatch.setattr(NumpyBackend, "free_bytes", lambda *_: both)
    assert make_pruner(settings, weights, steps_per_epoch=8)
    monkeypatch.setattr(NumpyBackend, "free_bytes", lambda *_: both - 1)
    with pytest.raises(
        MemoryBudgetError, match=rf"needs {both:,} bytes .* num_gradients \(.*\) of at most 499 would fit"
    ):
        make_pruner(settings, weights, steps_per_epoch=8)
    assert make_pruner(settings, weights, steps_per_epoch=8, live_gradients=False)


def test_windows_between_the_parts_of_a_pruning_step_are_counted():
    settings = MFACSettings(final_sparsity=0.8, end_epoch=0, num_gradients=10, num_recomputations=4)
    linear = replace(settings, recomputation_spacing="linear")
    schedule = make_pruner(settings, {"a": np.ones(1000)}, steps_per_epoch=8).schedule
    assert WindowMemory(linear, 1000, schedule).bytes_at_once() == 4 * 10 * (1000 + 800)
    assert WindowMemory(settings, 1000, schedule).bytes_at_once() == 4 * 10 * (1000 + round(1000 * 0.2**0.25))
    assert WindowMemory(replace(settings, num_recomputations="auto"), 1000, schedule).bytes_at_once() == 4 * 10 * (
        1000 + round(1000 * 0.2 ** (1 / 7))
    )


def test_the_window_after_a_pruning_step_that_passes_a_waiting_one_over_is_counted():
    settings = MFACSettings(final_sparsity=0.9, end_epoch=2, num_gradients={0.0: 10, 0.5: 80})
    schedule = [ScheduledStep(0, 0.0, 0.2), ScheduledStep(8, 1.0, 0.8), ScheduledStep(16, 2.0, 0.9)]
    assert WindowMemory(settings, 1000, schedule).bytes_at_once() == 4 * (10 * 1000 + 80 * 200)
    assert WindowMemory(settings, 1000, schedule, live_gradients=False).bytes_at_once() == 4 * 80 * 200
