"""Pruning steps that ask for no more zeros than there are, in Keras."""

from __future__ import annotations

import logging

import keras
import numpy as np
import pytest

from mfac_keras import MFACPruningCallback


@pytest.mark.parametrize("sampled", [True, False])
def test_a_step_at_sparsity_0_draws_and_warns_of_nothing(sampled, caplog):
    caplog.set_level(logging.INFO)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(2)])
    model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 6)), rng.standard_normal((20, 2))
    drawn = []

    def batches():
        drawn.append(int(model.optimizer.iterations.numpy()))
        yield from ((x[first : first + 4], y[first : first + 4]) for first in range(0, 20, 4))

    callback = MFACPruningCallback(
        final_sparsity=0.75,
        start_epoch=0.0,
        end_epoch=2.0,
        update_frequency=1.0,
        num_grads=4,
        sampler=batches if sampled else None,
    )
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[callback])
    assert callback.sparsity == 0.75
    assert set(drawn) == ({5, 10} if sampled else set())
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING and "gradient" in each.getMessage()]
    steps = [each.getMessage() for each in caplog.records if each.getMessage().startswith("pruning step at")]
    assert "sparsity 0.0000, 0 gradient samples, predicted loss increase 0 (in-sample)," in steps[0]
