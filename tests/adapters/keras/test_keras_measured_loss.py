"""What a pruning step does to the loss is measured where there is a sampler, and changes nothing else."""

import logging
import re

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

from mfac_keras import MFACPruningCallback, prune_one_shot  # noqa: E402
from mfac_keras.sampling import GradientSampler  # noqa: E402

FEATURE = pytest.mark.feature("sampled gradients")
LINE = re.compile(r"predicted loss increase \S+ \(in-sample\)(?:, measured loss change (\S+) on ([^()]+?))?, \d")


def batches(count):
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((8, 6)).astype("float32"), rng.standard_normal((8, 3)).astype("float32"))
        for _ in range(count)
    ]


def loss_of(model, some):
    return np.mean([np.mean((np.asarray(model.predict(x, verbose=0)) - y) ** 2) for x, y in some])


@FEATURE
@pytest.mark.parametrize(("parts", "where"), [(1, "16 held-out batches"), (2, "16 batches, over all 2 sub-steps")])
def test_the_line_of_the_last_part_has_the_change_on_batches_after_those_of_the_samples(task, caplog, parts, where):
    hidden = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dropout(0.5)])
    model, data = task.model(hidden=hidden), batches(40)
    before = loss_of(model, data[20:36])
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        prune_one_shot(model, data, final_sparsity=0.8, num_grads=20, damp=1e-3, num_recomputations=parts)
    *others, (change, said) = [found.groups() for found in map(LINE.search, caplog.messages) if found]
    assert others == [(None, None)] * (parts - 1)
    assert said == where
    assert float(change) == pytest.approx(loss_of(model, data[20:36]) - before, rel=0.02)


@FEATURE
def test_an_iterator_keeps_its_batches_for_gradient_samples(task, caplog):
    source = iter(batches(40))
    with caplog.at_level(logging.INFO, logger="mfac_keras"):
        prune_one_shot(task.model(), source, final_sparsity=0.5, num_grads=20, damp=1e-3, num_recomputations=1)
    assert [found.groups() for found in map(LINE.search, caplog.messages) if found] == [(None, None)]
    assert len(list(source)) == 20


@FEATURE
@pytest.mark.parametrize("call", ["before", "after"])
def test_a_loss_that_fails_in_the_measurement_leaves_all_as_it_was_and_the_next_try_gives_the_same_bits(
    task, monkeypatch, call
):
    def trained(failing):
        model = task.model(keras.optimizers.Adam(0.01))
        pruning = MFACPruningCallback(task.recipe(damp=0.01, start_epoch=0.0), sampler=batches(20), verbose=0)
        if failing:
            weights, calls, loss = model.get_weights(), [], GradientSampler.loss

            def faulty(self, *arguments):
                calls.append(None)
                if len(calls) == (1 if call == "before" else 2):
                    raise MemoryError
                return loss(self, *arguments)

            with monkeypatch.context() as patches:
                patches.setattr(GradientSampler, "loss", faulty)
                with pytest.raises(MemoryError):
                    task.fit(model, pruning)
            assert pruning.sparsity == 0
            assert pruning.masks == {}
            assert all(map(np.array_equal, weights, model.get_weights()))
        task.fit(model, pruning)
        assert pruning.sparsity == 0.75
        return model

    whole, retried = trained(False), trained(True)
    assert all(map(np.array_equal, whole.get_weights(), retried.get_weights()))


@FEATURE
def test_a_measured_run_trains_as_one_that_is_not(task, monkeypatch):
    def trained():
        model = task.model()
        task.fit(model, MFACPruningCallback(task.recipe(), sampler=batches(20), verbose=0))
        return model.get_weights()

    measured = trained()
    monkeypatch.setattr(GradientSampler, "loss", lambda self, *arguments: 0.0)
    assert all(map(np.array_equal, measured, trained()))
