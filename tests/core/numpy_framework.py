"""A third framework, of NumPy arrays: all that the core's session asks of an adapter."""

from __future__ import annotations

import logging

import numpy as np

from mfac_core import load_recipe
from mfac_core.session.live_pruning import LivePruning
from mfac_core.session.session import Session, attached, gradual_in_order

LOGGER = logging.getLogger("mfac_core")
STEPS_PER_EPOCH, EPOCHS = 6, 4
SHAPES = {"body": (6, 5), "head": (3, 6)}
X = np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((48, 3)).astype(np.float32)


class Model:
    """A linear network with two layers, and an optimizer with momentum."""

    def __init__(self):
        rng = np.random.default_rng(2)
        self.weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
        self.momentum = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    def loss(self, batch):
        x, y = batch
        return float(np.mean((x @ self.weights["body"].T @ self.weights["head"].T - y) ** 2))

    def gradients(self, batch):
        x, y = batch
        hidden = x @ self.weights["body"].T
        error = 2 * (hidden @ self.weights["head"].T - y) / y.size
        return {"body": (error @ self.weights["head"]).T @ x, "head": error.T @ hidden}

    def step(self, gradients):
        for name, gradient in gradients.items():
            self.momentum[name] = 0.9 * self.momentum[name] + gradient
            self.weights[name] -= 0.01 * self.momentum[name]


def batch(number):
    part = slice(number % STEPS_PER_EPOCH * 8, number % STEPS_PER_EPOCH * 8 + 8)
    return X[part], Y[part]


class ArrayPruning(LivePruning):
    """All that an adapter has to write."""

    def __init__(self, settings, model, *, sampled=False, ranks=None, shards=None, **options):
        self.model, self.names = model, [name for name in SHAPES if name in settings.params]
        sizes = {name: model.weights[name].size for name in self.names}
        self.gather = lambda: None  # makes the weights of a sharded model whole, of which this rank has some rows
        self.own = None if shards is None else lambda name, full: shards.local(name, full, ranks.rank)
        shards = None if shards is None else shards.restricted(self.names)
        super().__init__(
            settings, sizes, sampled=sampled, steps_per_epoch=STEPS_PER_EPOCH, ranks=ranks, shards=shards, **options
        )

    def part(self, arrays):
        return {name: self.own(name, arrays[name]) if self.own else arrays[name] for name in self.names}

    def weights(self):
        return self.part(self.model.weights)

    def write(self, weights):
        for name, array in self.weights().items():
            array[...] = weights[name]

    def snapshot(self, undo):
        for array in self.weights().values():
            undo.callback(np.copyto, array, array.copy())

    def gradient_samples(self, pruner, held_out):
        # a batch of each rank, or of all ranks together
        first, stride = (pruner.ranks.rank, pruner.ranks.size) if self.own is None else (0, 1)
        for number in range(first, pruner.num_gradients, stride):
            self.gather()
            yield self.part(self.model.gradients(batch(number)))
        if held_out is not None and first == 0:
            held_out.batches.append(batch(5))

    def loss_function(self):
        def loss(batches):
            self.gather()
            return float(np.mean([self.model.loss(each) for each in batches]))

        return loss

    def enforce_masks(self, result, undo):
        if result.resets_optimizer:
            for name in self.names:
                undo.callback(np.copyto, self.model.momentum[name], self.model.momentum[name].copy())
                self.model.momentum[name][...] = 0


def session_of(recipe, model, **options):
    settings = gradual_in_order(load_recipe(recipe).pruning)
    prunings = attached(settings, lambda each, name: ArrayPruning(each, model, name=name, **options))
    return Session(prunings, steps_per_epoch=STEPS_PER_EPOCH, logger=LOGGER)


def train(session, model, until, gather=lambda: None):
    """Train all ranks on the same batches; ``gather()`` makes the weights of a sharded model whole again."""
    for pruning in session.prunings:
        pruning.gather = gather
    session.prune_if_due()  # what is due before the first step, such as the masks of a constant modifier
    gather()
    hold(session, model)
    while session.step < until:
        gradients = model.gradients(batch(session.step))
        for pruning in session.prunings:
            if pruning.needs_gradients(session.step):
                pruning.observe(pruning.part(gradients))
        model.step(gradients)
        session.step += 1
        hold(session, model)
        session.prune_if_due()
        gather()


def hold(session, model):
    for pruning in session.prunings:
        for name, mask in pruning.masks.items():
            model.weights[name][~mask] = 0
