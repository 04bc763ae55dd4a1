import pytest

pytest.importorskip("keras")

from mfac_core.errors import SettingError  # noqa: E402
from mfac_keras.clock import TrainingClock  # noqa: E402

pytestmark = pytest.mark.once


def begun(clock, known, epoch=0):
    clock.begin_fit(known)
    clock.begin_epoch(epoch)
    return clock


@pytest.mark.parametrize(("given", "known"), [(5, None), (None, 5), (5, 5)])
def test_steps_are_counted_over_epochs(given, known):
    clock = begun(TrainingClock(given), known, epoch=2)
    assert (clock.steps_per_epoch, clock.first_epoch, clock.step) == (5, 2, 10)
    clock.count(3)
    assert (clock.steps_in_epoch, clock.step) == (3, 13)
    clock.begin_epoch(3)
    assert (clock.first_epoch, clock.epoch, clock.step) == (2, 3, 15)


def test_the_first_epoch_of_data_of_unknown_length_is_counted():
    clock = begun(TrainingClock(), None)
    clock.count(4)
    assert (clock.steps_per_epoch, clock.steps_in_epoch) == (None, 4)
    clock.end_epoch()
    clock.begin_epoch(1)
    clock.count(1)
    clock.end_epoch()
    assert (clock.steps_per_epoch, clock.step) == (4, 5)


def test_an_epoch_without_a_step_tells_nothing():
    clock = begun(TrainingClock(), None)
    clock.end_epoch()
    assert clock.steps_per_epoch is None


def test_an_execution_of_several_steps_does_not_count_beyond_the_end_of_the_data():
    clock = begun(TrainingClock(), 5)
    clock.count(6)
    assert (clock.steps_in_epoch, clock.step) == (5, 5)


def test_another_fit_begins_anew():
    clock = begun(TrainingClock(), None)
    clock.count(4)
    clock.end_epoch()
    clock.begin_fit(None)
    assert (clock.steps_per_epoch, clock.first_epoch, clock.epoch, clock.step) == (None, None, None, 0)


def test_what_was_given_has_to_agree_with_what_keras_knows():
    clock = begun(TrainingClock(5), 5)
    with pytest.raises(ValueError, match="got steps_per_epoch=5, but an epoch of this fit has 7 steps"):
        clock.begin_fit(7)
    assert (clock.steps_per_epoch, clock.epoch) == (5, 0)


@pytest.mark.parametrize("steps", [0, -1, 1.5, "5", True])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(SettingError, match="steps_per_epoch"):
        TrainingClock(steps)
