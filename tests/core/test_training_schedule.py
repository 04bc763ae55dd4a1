import pytest

from mfac_core.errors import SettingError
from mfac_core.schedules.training import OptionsSchedule, TrainableSchedule, check_param_groups
from mfac_core.settings.training import (
    EpochRange,
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
)


def due(schedule, steps):
    return {step: [(change.option, change.value) for change in schedule.due(step)] for step in steps}


def test_a_value_is_due_once_at_the_step_nearest_to_its_epoch():
    settings = [SetWeightDecay(weight_decay=0.1, start_epoch=0.7), SetLearningRate(learning_rate=0.5)]
    schedule = OptionsSchedule([EpochRange(end_epoch=3.0), *settings], steps_per_epoch=5)
    changes = due(schedule, range(6))
    assert changes.pop(0) == [("learning_rate", 0.5)]
    assert changes.pop(4) == [("weight_decay", 0.1)]  # 3.5, and halves go to the even step
    assert not any(changes.values())


def test_a_curve_is_due_at_each_step_and_a_last_time_at_its_end():
    curve = LearningRateFunction(function="linear", initial=1.0, final=0.0, start_epoch=0.5, end_epoch=1.5)
    changes = due(OptionsSchedule([curve], steps_per_epoch=4), range(9))
    assert [value for step in range(9) for _, value in changes[step]] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert not changes[7]


def test_what_was_missed_is_due_in_order_so_that_the_latest_counts():
    settings = [SetLearningRate(learning_rate=rate, start_epoch=start) for rate, start in ((0.3, 2.0), (0.1, 1.0))]
    assert due(OptionsSchedule(settings, steps_per_epoch=5), [12]) == {
        12: [("learning_rate", 0.1), ("learning_rate", 0.3)]
    }


def test_a_schedule_goes_on_from_its_state_and_refuses_that_of_another_recipe():
    settings = [SetLearningRate(learning_rate=0.1), SetLearningRate(learning_rate=0.2, start_epoch=2.0)]
    first = OptionsSchedule(settings, steps_per_epoch=5)
    due(first, [0])
    second = OptionsSchedule(settings, steps_per_epoch=5)
    second.load_state_dict(first.state_dict())
    assert due(second, [1, 10]) == {1: [], 10: [("learning_rate", 0.2)]}
    with pytest.raises(ValueError, match=r"contains 2 modifiers .* this recipe has 1"):
        OptionsSchedule(settings[:1], steps_per_epoch=5).load_state_dict(first.state_dict())


def test_param_groups_are_checked_and_told_apart():
    settings = [
        SetLearningRate(learning_rate=0.1, param_groups=(1,)),
        SetWeightDecay(weight_decay=0.1),
        LearningRateSchedule(kind="ExponentialLR", initial=0.1, options={"gamma": 0.5}, start_epoch=1.0),
    ]
    schedule = OptionsSchedule(settings[:2], steps_per_epoch=5)
    for each in settings:
        check_param_groups(each, 2)
    check_param_groups(settings[1], 1)
    with pytest.raises(
        SettingError, match="param_groups: 1 is not the index of a parameter group; the optimizer has 1"
    ):
        check_param_groups(settings[0], 1)
    assert schedule.options_of(0) == ["weight_decay"]
    assert schedule.options_of(1) == ["learning_rate", "weight_decay"]
    assert OptionsSchedule(settings[1:], steps_per_epoch=5).options_of(0) == ["learning_rate", "weight_decay"]
    changes = list(schedule.due(0))
    assert [[change.concerns(group) for group in (0, 1)] for change in changes] == [[False, True], [True, True]]


def test_parameters_are_frozen_from_the_first_epoch_to_before_the_last():
    settings = [
        TrainableParams(params=("b",), start_epoch=2.0),
        TrainableParams(params=("a",), trainable=False, start_epoch=1.0, end_epoch=2.0),
    ]
    schedule = TrainableSchedule(settings, steps_per_epoch=3)
    assert [each.params for each in schedule.settings] == [("a",), ("b",)]
    assert [schedule.active(step) for step in (2, 3, 5, 6, 600)] == [
        (False, False),
        (True, False),
        (True, False),
        (False, True),
        (False, True),
    ]
