"""What holds of every gradual M-FAC run with parts of pruning steps, whatever its schedule."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core.fisher.window import GradientWindow
from mfac_core.pruners import MFACPruner, make_pruner
from mfac_core.pruners.memory import WindowMemory
from mfac_core.settings.pruning import FROM_PARAM, MFACSettings

SHAPES = {"a": (6, 8), "b": (2, 4), "c": (4, 4)}

few = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    logger = logging.getLogger("mfac_core")
    before, _ = logger.level, logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def gradient_at(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1000 + step)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@st.composite
def runs(draw: Any) -> tuple[MFACSettings, dict[str, np.ndarray], int, bool]:
    """Settings, weights, steps per epoch, and whether gradients are live."""
    start, length = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])), draw(st.sampled_from([0.0, 1.0, 1.3, 2.0]))
    parts = draw(st.sampled_from([1, 2, 3, 5, "auto"]))
    mask_type = draw(st.sampled_from(["unstructured", "unstructured", "2:4", "channel", (2, 2)]))
    made = MFACSettings(
        initial_sparsity=draw(st.sampled_from([0.0, 0.1, 0.3, FROM_PARAM])),
        final_sparsity=0.5 if mask_type == "2:4" else draw(st.sampled_from([0.35, 0.5, 0.8, 0.95])),
        start_epoch=start,
        end_epoch=start + length,
        update_frequency=draw(st.sampled_from([0.25, 0.3, 0.7, 1.0])),
        num_gradients=draw(st.sampled_from([1, 3, 30, {0.0: 3, 0.3: 9}, {0.0: 9, 0.3: 2, 0.6: 20}])),
        block_size=8,
        damping=1e-2,
        scope=draw(st.sampled_from(["layer", "global"])),
        update=draw(st.sampled_from(["independent", "joint"])),
        mask_type=mask_type,
        num_recomputations=parts,
        recomputation_spacing="geometric" if parts == "auto" else draw(st.sampled_from(["geometric", "linear"])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name, shape in SHAPES.items():
        weights[name][rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.9]))] = 0
    return made, weights, draw(st.sampled_from([1, 2, 5, 12])), draw(st.booleans())


def trained(
    pruner: MFACPruner, weights: dict[str, np.ndarray], live: bool, steps: range, refused: frozenset[int] = frozenset()
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield each step of a training loop once its pruning steps are done, with the weights."""
    for step in steps:
        if step:
            if pruner.needs_gradients(step - 1):
                gradients = gradient_at(step - 1)
                if step in refused:
                    gradients["a"][0, 0] = np.nan
                pruner.observe(gradients)
            weights = {name: (each * 1.01 + 0.001) * pruner.masks[name] for name, each in weights.items()}
        while pruner.is_due(step):
            if not live and pruner.uses_gradients(step):
                pruner.forget_gradients()
                for number in range(pruner.num_gradients):
                    pruner.observe(gradient_at(7919 * step + 100 * pruner.state_dict()["parts_done"] + number))
            before = pruner.masks
            weights = dict(pruner.prune(weights, step).weights)
            for name, mask in pruner.masks.items():
                assert not np.any(mask & ~before[name])
                assert np.all(weights[name][~mask] == 0) and np.all(np.isfinite(weights[name]))
        yield step, weights


def all_steps(made: MFACSettings, steps_per_epoch: int) -> range:
    return range(round(made.end_epoch * steps_per_epoch) + 32)  # a step that waits has its rows by then


def masked(masks: dict[str, np.ndarray]) -> list[int]:
    return [int(np.count_nonzero(~mask)) for mask in masks.values()]


@few
@given(runs())
def test_each_planned_step_has_its_sparsity_and_the_last_is_exact(run):
    made, weights, steps_per_epoch, live = run
    pruner = make_pruner(made, weights, steps_per_epoch=steps_per_epoch, live_gradients=live)
    scheduled = {each.step: each.sparsity for each in pruner.schedule}
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    exact = made.mask_type == "unstructured" and made.initial_sparsity != FROM_PARAM

    def wanted(sparsity: float) -> list[int]:
        parts = sizes if made.scope == "layer" else [sum(sizes)]
        return [round(size * sparsity) for size in parts]

    for step, _ in trained(pruner, weights, live, all_steps(made, steps_per_epoch)):
        if exact and step in scheduled and (step or not live) and made.start_epoch * steps_per_epoch >= 1:
            found = masked(pruner.masks)
            assert (found if made.scope == "layer" else [sum(found)]) == wanted(scheduled[step])
    assert pruner.is_finished
    if exact:
        found = masked(pruner.masks)
        assert (found if made.scope == "layer" else [sum(found)]) == wanted(made.final_sparsity)


@few
@given(runs(), st.integers(0, 10**6), st.frozensets(st.integers(0, 60), max_size=60))
def test_a_run_that_is_resumed_after_any_step_ends_the_same(run, stopped, refused):
    made, weights, steps_per_epoch, live = run
    steps = all_steps(made, steps_per_epoch)
    stop = stopped % (len(steps) - 1)
    pruner, resumed = (
        make_pruner(made, weights, steps_per_epoch=steps_per_epoch, live_gradients=live) for _ in range(2)
    )
    for step, now in trained(pruner, weights, live, steps, refused):
        expected = now
        if step == stop:
            resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
            saved = now
    found = [saved, *(now for _, now in trained(resumed, saved, live, steps[stop + 1 :], refused))][-1]
    np.testing.assert_equal(resumed.masks, pruner.masks)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)


@contextmanager
def measured_windows() -> Iterator[list[int]]:
    """Yield a list of which the last number is the most bytes that gradient windows have taken together."""
    there: dict[int, int] = {}
    most = [0]
    make = GradientWindow.__init__

    def init(window: GradientWindow, *args: Any, **options: Any) -> None:
        make(window, *args, **options)
        there[id(window)] = window.num_bytes
        weakref.finalize(window, there.pop, id(window))
        most[0] = max(most[0], sum(there.values()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientWindow, "__init__", init)
        yield most


@few
@given(runs(), st.frozensets(st.integers(0, 60), max_size=60))
def test_gradient_windows_never_take_more_than_was_counted(run, refused):
    made, weights, steps_per_epoch, live = run
    with measured_windows() as most:
        pruner = make_pruner(made, weights, steps_per_epoch=steps_per_epoch, live_gradients=live)
        counted = WindowMemory(
            made, pruner.layout.num_weights, pruner.schedule, pruner.masks_to_come(), live_gradients=live
        ).bytes_at_once()
        for _ in trained(pruner, weights, live, all_steps(made, steps_per_epoch), refused):
            pass
    assert 0 <= most[0] <= counted


def test_windows_that_layers_of_other_sparsities_leave_are_counted():
    """The layer without zeros goes in more parts than the mean of both would, so the second window is larger."""
    weights = {"a": np.ones(1000), "b": np.where(np.arange(1000) < 900, 0.0, 1.0)}
    made = MFACSettings(
        initial_sparsity=FROM_PARAM,
        final_sparsity=0.8,
        start_epoch=1.0,
        end_epoch=2.0,
        num_gradients=2,
        num_recomputations="auto",
    )
    pruner = make_pruner(made, weights, steps_per_epoch=8)
    assert pruner.schedule[0].sparsity == 0.45
    of_means = WindowMemory(made, 2000, pruner.schedule).bytes_at_once()
    assert WindowMemory(made, 2000, pruner.schedule, pruner.masks_to_come()).bytes_at_once() > of_means
