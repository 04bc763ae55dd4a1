"""Whole gradual runs on several ranks of threads, replicated or sharded, beside the same run in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mfac_core.pruners import MFACPruner, Pruner, make_pruner
from mfac_core.ranks import Shards
from tests.core.thread_ranks import ThreadRanks, run_ranks

SHAPES = {"a": (5, 6), "b": (11,), "c": (2, 3, 4)}
STEPS_PER_EPOCH = 4

Arrays = dict[str, np.ndarray]


def weights_at_start(shapes: Mapping[str, tuple[int, ...]] = SHAPES, zeros: float = 0.0) -> Arrays:
    rng = np.random.default_rng(5)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for array in made.values():
        array[rng.random(array.shape) < zeros] = 0
    return made


def gradient_at(step: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Arrays:
    rng = np.random.default_rng(1000 + step)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def by_rows(size: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, replicas: int = 1) -> Shards:
    """Return shards of whole rows as ``torch.chunk`` cuts them, uneven and often empty; each on several replicas."""
    ranges = {}
    for name, shape in shapes.items():
        in_row, rows = int(np.prod(shape[1:])), shape[0]
        each = -(-rows // (size // replicas))
        cuts = [(min(k * each, rows) * in_row, min((k + 1) * each, rows) * in_row) for k in range(size // replicas)]
        ranges[name] = cuts * replicas
    return Shards(shapes, ranges)


@dataclass
class Run:
    """A run of one rank, or of a single process.

    Args:
        pruner: The pruner.
        full: All weights of the model, as an optimizer that is not sharded would have them.
        part: Returns what this rank has of full arrays.
        steps: The masks and weights after each pruning step.
        numbers: Its predicted loss increase and its dampings.
    """

    pruner: Pruner
    full: Arrays
    part: Callable[[Arrays], Arrays]
    live: bool = True
    steps: list[tuple[int, Arrays, Arrays]] = field(default_factory=list)
    numbers: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def train(self, first: int, last: int, *, refused: frozenset[int] = frozenset()) -> Run:
        """Do the steps of a training loop from ``first`` to ``last``, with the pruning steps due after them."""
        weights = self.part(self.full)
        for step in range(first, last + 1):
            if step > first:
                gradients = gradient_at(step - 1, self.shapes)
                if step in refused:
                    gradients["b"][7] = np.nan
                if self.pruner.needs_gradients(step - 1):
                    self.pruner.observe(self.part(gradients))
                masks = {name: np.ones(array.shape, np.float32) for name, array in self.full.items()}
                masks |= {name: mask.astype(np.float32) for name, mask in self.pruner.masks.items()}
                masks = self.part(masks)
                weights = {name: (each * 1.01 + 0.001) * masks[name] for name, each in weights.items()}
            self.pruner.check_ranks(step)
            while self.pruner.is_due(step):
                if not self.live and self.pruner.uses_gradients(step):
                    self.draw(7919 * step + len(self.steps))
                result = self.pruner.prune(weights, step)
                weights = dict(result.weights)
                self.steps.append((step, result.masks, weights))
                self.numbers[len(self.steps)] = (
                    result.sparsity,
                    result.predicted_loss_increase or 0.0,
                    *(result.damping or ()),
                )
        self.now = weights
        return self

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.full.items()}

    def draw(self, seed: int) -> None:
        pruner = self.pruner
        assert isinstance(pruner, MFACPruner)
        pruner.forget_gradients()
        ranks, count = pruner.ranks, pruner.num_gradients
        if not pruner.shards.is_whole:
            for number in range(count):
                pruner.observe(self.part(gradient_at(seed + number, self.shapes)))
            return
        numbers = iter(range(seed + ranks.rank, seed + count, ranks.size))
        while pruner.observe_samples(next((gradient_at(number, self.shapes) for number in numbers), None)):
            pass


def alone(settings: Any, *, live: bool = True, weights: Arrays | None = None, **options: Any) -> Run:
    weights = weights_at_start() if weights is None else weights
    if live is False:
        options["live_gradients"] = False
    return Run(
        make_pruner(settings, weights, steps_per_epoch=STEPS_PER_EPOCH, **options), weights, lambda full: full, live
    )


def on_rank(
    ranks: ThreadRanks,
    settings: Any,
    shards: Shards | None = None,
    *,
    to: Callable[[np.ndarray], Any] = np.asarray,
    live: bool = True,
    weights: Arrays | None = None,
    **options: Any,
) -> Run:
    weights = weights_at_start() if weights is None else weights

    def part(full: Arrays) -> Arrays:
        own = full if shards is None else {name: shards.local(name, full[name], ranks.rank) for name in full}
        return {name: to(array) for name, array in own.items()}

    pruner = make_pruner(
        settings,
        part(weights),
        steps_per_epoch=STEPS_PER_EPOCH,
        ranks=ranks,
        shards=shards,
        live_gradients=live,
        **options,
    )
    return Run(pruner, weights, part, live)


def whole(parts: list[Arrays], shards: Shards | None) -> Arrays:
    """Return the full arrays that ranks have together; replicas have the same."""
    if shards is None:
        for other in parts[1:]:
            np.testing.assert_equal(other, parts[0])
        return parts[0]
    full: Arrays = {}
    for name, shape in shards.shapes.items():
        values = np.full(int(np.prod(shape)), np.nan, np.float32)
        for rank, arrays in enumerate(parts):
            start, stop = shards.of_rank(rank)[name]
            assert arrays[name].shape == shards.local_shape(name, rank)
            here = arrays[name].reshape(-1)
            before = values[start:stop]
            assert np.array_equal(before[~np.isnan(before)], here[~np.isnan(before)])
            values[start:stop] = here
        full[name] = values.reshape(shape)
    return full


def assert_same_steps(runs: list[Run], expected: Run, shards: Shards | None) -> None:
    """Compare all pruning steps of the ranks with those of one process: masks exactly, weights to 1e-5."""
    assert expected.steps
    for run in runs:
        assert [step for step, *_ in run.steps] == [step for step, *_ in expected.steps]
        for number, of_step in run.numbers.items():
            assert of_step == pytest.approx(expected.numbers.get(number, of_step), rel=1e-4)
            assert of_step == runs[0].numbers[number]
    for number, (step, masks, weights) in enumerate(expected.steps):
        for run in runs:
            np.testing.assert_equal(run.steps[number][1], masks, err_msg=f"masks at step {step}")
        together = whole([run.steps[number][2] for run in runs], shards)
        for name, array in weights.items():
            np.testing.assert_allclose(together[name], array, rtol=1e-5, atol=1e-5, err_msg=f"{name} at step {step}")


def compare(size: int, settings: Any, shards: Shards | None, last: int, **options: Any) -> list[Run]:
    """Train on ranks and alone; compare."""
    expected = alone(settings, **options).train(0, last)
    runs = run_ranks(size, lambda ranks: on_rank(ranks, settings, shards, **options).train(0, last))
    assert_same_steps(runs, expected, shards)
    return runs
