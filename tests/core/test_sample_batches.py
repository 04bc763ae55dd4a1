import itertools

import numpy as np
import pytest

from mfac_core import sample_batches
from mfac_core.errors import SettingError
from mfac_core.sample_batches import (
    HeldOut,
    Sampler,
    batches_of_one_pass,
    batches_to_sample,
    mean_loss,
    zero_in_all_samples,
)


def test_batches_are_begun_anew_and_a_function_is_called_anew(caplog):
    calls = []

    def make():
        calls.append(1)
        return iter("ab")

    assert list(batches_to_sample("ab", 5)) == list("ababa")
    with caplog.at_level("INFO", logger="mfac_core"):
        assert list(batches_to_sample(make, 5)) == list("ababa")
    assert len(calls) == 3
    assert caplog.text.count("the data ended after 2 of 5 gradient samples and are restarted") == 1


def test_no_batch_more_than_asked_for_is_drawn():
    source = itertools.count()
    assert list(batches_to_sample(source, 3)) == [0, 1, 2]
    assert next(source) == 3


def test_an_iterator_yields_what_it_has_with_a_warning(caplog):
    assert list(batches_to_sample(iter("abc"), 5)) == list("abc")
    assert "the data ended after 3 of 5 gradient samples and cannot be restarted" in caplog.text


@pytest.mark.parametrize("source", [[], lambda: []])
def test_a_source_without_batches_is_refused(source):
    with pytest.raises(ValueError, match="yields no batch; instead of a generator that is exhausted, pass a callable"):
        list(batches_to_sample(source, 2))


def test_a_function_that_returns_no_batches_is_refused():
    with pytest.raises(TypeError, match="returned a NoneType; it must return an iterable of batches"):
        list(batches_to_sample(lambda: None, 2))


def test_weights_whose_gradient_is_always_zero_are_one_sentence():
    assert zero_in_all_samples([], 3) == []
    assert zero_in_all_samples(["a.weight", "b.weight"], 2) == []  # of which the gradient window is spoken
    (sentence,) = zero_in_all_samples(["a.weight", "b.weight"], 3)
    assert sentence.startswith("the gradient is zero in every gradient sample for a.weight, b.weight, ")


def test_a_function_gets_its_options_by_name_or_as_one_dictionary():
    assert list(batches_to_sample(lambda size: "x" * size, 2, {"size": 2})) == ["x", "x"]
    assert list(batches_to_sample(lambda kwargs: [kwargs], 1, {"size": 2})) == [{"size": 2}]
    assert list(batches_to_sample(lambda kwargs: [kwargs], 1)) == [None]


@pytest.mark.parametrize("source", [[1], lambda: [1]])
def test_options_that_the_source_does_not_take_are_refused(source):
    with pytest.raises(TypeError, match=r"gives grad_sampler_kwargs \{'size': 2\}.*takes none of these"):
        list(batches_to_sample(source, 1, {"size": 2}))


def test_a_function_that_needs_arguments_is_refused():
    with pytest.raises(TypeError, match="cannot be called without arguments"):
        list(batches_to_sample(lambda output, target: [output], 1))


def test_one_pass_ends_with_the_data_or_before():
    assert list(batches_of_one_pass("abc")) == list("abc")
    assert list(batches_of_one_pass("abc", 5)) == list("abc")
    assert list(batches_of_one_pass("abc", 2)) == list("ab")
    assert list(batches_of_one_pass(lambda size: "x" * size, options={"size": 3})) == list("xxx")


class OfUnknownLength:
    """As a data loader over data without a length."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        return iter(range(self.number))

    def __len__(self):
        raise TypeError("no length")


@pytest.mark.parametrize("source", [itertools.count, lambda: OfUnknownLength(10)])
def test_one_pass_over_data_that_may_have_no_end_ends_somewhere(source, monkeypatch, caplog):
    monkeypatch.setattr(sample_batches, "_MAX_WITHOUT_LENGTH", 4)
    with caplog.at_level("INFO", logger="mfac_core"):
        assert list(batches_of_one_pass(source)) == [0, 1, 2, 3]
    assert "no length: the first 4 batches count as one pass" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="mfac_core"):
        assert list(batches_of_one_pass(source, 6)) == [0, 1, 2, 3, 4, 5]  # who names a number gets it
        assert list(batches_of_one_pass(range(6))) == [0, 1, 2, 3, 4, 5]
        assert list(batches_of_one_pass(lambda: iter(range(3)))) == [0, 1, 2]
    assert not caplog.text


@pytest.mark.parametrize("at_most", [0, -1, 2.5, True, "2"])
def test_a_number_of_batches_that_is_none_is_refused(at_most):
    with pytest.raises(SettingError, match="num_batches: .* must be a positive integer, or None for all batches"):
        list(batches_of_one_pass("abc", at_most))


def test_one_pass_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="yields no batch; instead of a generator that is exhausted, pass a callable"):
        list(batches_of_one_pass(iter([])))
    with pytest.raises(TypeError, match="returned a NoneType; it must return an iterable of batches"):
        list(batches_of_one_pass(lambda: None))


def held_out(source, count, wanted):
    further = HeldOut(wanted)
    assert len(list(batches_to_sample(source, count, held_out=further))) == count
    return further.batches, further.are_new


def test_batches_to_hold_out_follow_in_the_same_pass_and_a_new_one_begins_only_where_it_ends():
    assert held_out(range(10), 3, 4) == ([3, 4, 5, 6], True)
    assert held_out(lambda: iter(range(10)), 3, 7) == ([3, 4, 5, 6, 7, 8, 9], True)
    assert held_out(range(5), 3, 4) == ([3, 4, 0, 1], False)
    assert held_out(range(3), 3, 2) == ([0, 1], False)
    assert held_out(range(3), 4, 1) == ([1], False)
    assert held_out(range(3), 3, 16) == ([0, 1, 2], False)


def test_what_cannot_begin_anew_gives_no_batches_to_hold_out_and_says_nothing(caplog):
    source = iter(range(10))
    assert held_out(source, 3, 4)[0] == []
    assert next(source) == 3
    once = iter(range(3))
    assert held_out(lambda: once, 3, 4)[0] == []
    assert caplog.text == ""


def test_nothing_is_held_out_before_all_samples_are_drawn():
    further = HeldOut(2)
    batches = batches_to_sample(range(10), 2, held_out=further)
    assert [next(batches), next(batches)] == [0, 1]
    assert further.batches == []


def test_a_sampler_fills_gaps_and_names_what_stays_zero(caplog):
    sampler, names = Sampler("ab"), ["used", "unused", "zero"]
    samples = [(np.ones(2), None, np.zeros(2)), (np.zeros(2), None, np.zeros(2))]

    for _ in range(2):
        rows = list(sampler._without_gaps(samples, names, 2, lambda index: np.full(2, float(index))))

    np.testing.assert_array_equal(rows, [[[1, 1], [1, 1], [0, 0]], [[0, 0], [1, 1], [0, 0]]])
    assert caplog.text.count("the gradient is zero in every gradient sample for unused, zero, ") == 1
    with pytest.raises(ValueError, match="depends on none of the weights to prune: a, b"):
        next(sampler._without_gaps([(None, None)], ["a", "b"], 1, lambda index: None))


def test_the_mean_loss_needs_a_batch():
    assert mean_loss([1.0, 2.0]) == 1.5
    with pytest.raises(ValueError, match="no batch to evaluate the loss on"):
        mean_loss([])


def test_data_are_restarted_for_held_out_batches_only_if_some_are_lacking():
    opened = []

    def make():
        opened.append(1)
        return iter(range(5))

    for wanted, passes in ((2, 1), (3, 2)):
        opened.clear()
        held_out = HeldOut(wanted)
        assert list(batches_to_sample(make, 3, None, held_out)) == [0, 1, 2]
        assert held_out.batches == [3, 4, 0][:wanted]
        assert (len(opened), held_out.are_new) == (passes, passes == 1)
