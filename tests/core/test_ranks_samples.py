"""Gradient samples and held-out batches that several ranks draw together, and the loss that they measure."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core import MFACPruner, MFACSettings, RankError
from mfac_core.pruners.step import PruneResult
from mfac_core.ranks import Shards
from mfac_core.sample_batches import HeldOut, batches_to_sample, in_step
from mfac_core.session.measured_loss import LossMeasurement
from mfac_core.session.session import Session
from tests.core.numpy_framework import LOGGER, SHAPES, STEPS_PER_EPOCH, ArrayPruning, Model, batch
from tests.core.thread_ranks import outcomes, run_ranks

SIZES = st.integers(1, 4)


def share(count, rank, size):
    return len(range(rank, count, size))


def drawn(size, count, source_of, *, wanted=0):
    """Return the batches of each rank, and its held-out batches: its shares of so many."""

    def draw(ranks):
        held_out = HeldOut(share(wanted, ranks.rank, size)) if wanted else None
        own = share(count, ranks.rank, size)
        return list(batches_to_sample(source_of(ranks.rank), own, None, held_out, ranks=ranks)), held_out

    return run_ranks(size, draw)


def in_order(found):
    rounds = itertools.zip_longest(*(batches for batches, _ in found))
    return [batch for of_round in rounds for batch in of_round if batch is not None]


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 30), st.integers(0, 20), st.integers(0, 8))
def test_ranks_that_read_the_same_data_draw_what_one_process_draws(size, count, further, wanted):
    data = range(count + further)
    alone = HeldOut(wanted)
    samples = list(batches_to_sample(data, count, None, alone))
    found = drawn(size, count, lambda rank: data, wanted=wanted)
    assert in_order(found) == samples
    if wanted and wanted + size <= further:
        held_out = sorted(each for _, held_out in found for each in held_out.batches)
        assert len(set(held_out)) == wanted and not set(held_out) & set(samples)
        assert held_out == alone.batches or count % size
        assert all(held_out.are_new for _, held_out in found)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.integers(1, 12), st.data())
def test_ranks_that_read_parts_of_the_data_draw_nothing_twice_until_all_is_drawn(size, length, data):
    count = data.draw(st.integers(1, size * length))
    found = drawn(size, count, lambda rank: [(rank, number) for number in range(length)])
    samples = in_order(found)
    assert len(samples) == count
    assert max(Counter(samples).values()) == 1


def test_a_rank_that_reads_little_has_its_share_of_held_out_batches_too():
    for batches, held_out in drawn(4, 8, lambda rank: [0, 1], wanted=8):
        assert sorted(batches) == sorted(held_out.batches) == [0, 1]
        assert not held_out.are_new


def test_data_that_end_on_one_rank_and_cannot_be_restarted_are_an_error():
    found = outcomes(3, lambda ranks: list(batches_to_sample(iter(range(8)), 3, ranks=ranks)))
    assert found[:2] == [[0, 3, 6], [1, 4, 7]]
    assert isinstance(found[2], ValueError)
    assert str(found[2]) == (
        "the data ended after 2 of 3 gradient samples on rank 2 and cannot be restarted; instead of an iterator, pass "
        "a data loader, or a function that returns a new iterator"
    )


def test_batches_in_step_end_together_or_name_the_rank_that_ended():
    assert run_ranks(3, lambda ranks: list(in_step("abc", ranks))) == [list("abc")] * 3
    found = outcomes(3, lambda ranks: list(in_step("ab" if ranks.rank == 1 else "abcd", ranks)))
    assert {str(each) for each in found} == {
        "the data ended after 2 batches on rank 1, and the other ranks have more; give each rank the same number of "
        "batches, such as by a DistributedSampler"
    }


def test_batches_in_step_fail_together():
    def read(ranks):
        return list(in_step((1 / (number + ranks.rank - 2) for number in range(3)), ranks))

    found = outcomes(2, read)
    assert isinstance(found[1], ZeroDivisionError)
    assert "rank 1 failed in reading a batch: ZeroDivisionError" in str(found[0])


# --- the measured loss


def measured(ranks, batches, *, sharded=False, fails_on=None):
    weights = {"w": np.arange(1.0, 9.0)}
    shards = None
    if sharded:
        bounds = [8 * rank // ranks.size for rank in range(ranks.size + 1)]
        shards = Shards({"w": (8,)}, {"w": list(itertools.pairwise(bounds))})
        weights = {"w": shards.local("w", weights["w"], ranks.rank)}
    pruner = MFACPruner(
        MFACSettings(final_sparsity=0.5, end_epoch=0.0, num_gradients=8),
        weights,
        steps_per_epoch=1,
        live_gradients=False,
        ranks=ranks,
        shards=shards,
    )
    scale = iter([1.0, 3.0])

    def loss(values):
        if ranks.rank == fails_on:
            raise OSError("the disk is gone")
        return next(scale) * float(np.mean(values))

    measurement = LossMeasurement(loss, ranks)
    measurement.held_out(pruner).batches += batches[ranks.rank]
    measurement.begin()
    result = measurement.end(PruneResult(np.zeros(2), np.zeros(2, bool), 0.5, 0.01))
    return result.measured_loss_change, measurement.where


def test_the_loss_is_the_mean_over_the_batches_of_all_ranks():
    batches = [[1.0, 2.0], [6.0], []]
    assert run_ranks(3, lambda ranks: measured(ranks, batches)) == [(6.0, "3 held-out batches")] * 3
    assert run_ranks(3, lambda ranks: measured(ranks, [[], [], []])) == [(None, "0 held-out batches")] * 3
    # with shards each loss takes all ranks, so that they measure equally many
    batches = [[1.0, 2.0], [6.0], [2.0, 5.0]]
    assert run_ranks(3, lambda ranks: measured(ranks, batches, sharded=True)) == [(6.0, "3 held-out batches")] * 3


def test_a_loss_that_fails_on_one_rank_fails_on_all():
    first, second = outcomes(2, lambda ranks: measured(ranks, [[1.0], [2.0]], fails_on=1))
    assert isinstance(second, OSError)
    assert "rank 1 failed in measuring the loss: OSError: the disk is gone" in str(first)


# --- a pruning step as a whole

SETTINGS = MFACSettings(
    final_sparsity=0.6, end_epoch=0.0, num_gradients=5, block_size=7, damping=1e-3, num_recomputations=2,
    params=tuple(SHAPES), update="joint",
)  # fmt: skip


class SharingPruning(ArrayPruning):
    """Ranks that have all weights, and draw their shares of the samples."""

    spoiled: tuple = ()

    def gradient_samples(self, pruner, held_out):
        numbers = batches_to_sample(range(20), pruner.num_samples_here, None, held_out, ranks=self.ranks)
        for number in numbers:
            if (self.ranks.rank, number) in self.spoiled:
                raise OSError("the disk is gone")
            yield {name: self.model.gradients(batch(number))[name] for name in self.names}

    def loss_function(self):
        return lambda numbers: float(np.mean([self.model.loss(batch(number)) for number in numbers]))


def pruned(ranks=None, fails_on=None):
    model = Model()
    pruning = SharingPruning(SETTINGS, model, sampled=True, ranks=ranks)
    if ranks is not None and ranks.rank == fails_on:
        pruning.spoiled = {(ranks.rank, 3)}
    session = Session([pruning], steps_per_epoch=STEPS_PER_EPOCH, logger=LOGGER)
    try:
        session.prune_if_due()
    except Exception as error:
        return model, error
    return model, None


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_prune_as_one_process_that_draws_the_same_samples(size, caplog):
    caplog.set_level("INFO")
    alone, _ = pruned()
    assert "measured loss change" in caplog.text
    for model, error in run_ranks(size, pruned):
        assert error is None
        for name in SHAPES:
            assert np.array_equal(model.weights[name] == 0, alone.weights[name] == 0)
            np.testing.assert_allclose(model.weights[name], alone.weights[name], rtol=1e-5, atol=1e-6)


def test_a_sample_that_fails_on_one_rank_fails_on_all_and_nothing_changes():
    for rank, (model, error) in enumerate(run_ranks(2, lambda ranks: pruned(ranks, fails_on=1))):
        assert isinstance(error, OSError if rank == 1 else RankError)
        for name, before in Model().weights.items():
            assert np.array_equal(model.weights[name], before)
