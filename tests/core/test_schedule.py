from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.errors import SettingError
from mfac_core.schedules.pruning import interpolate, num_gradients_at, pruning_epochs, pruning_schedule, sparsity_at
from mfac_core.settings.pruning import FROM_PARAM, ACDCSettings, ConstantSettings, GradualSettings, PruningSettings

KINDS = ("linear", "cubic", "inverse_cubic")


def settings(**changes: object) -> GradualSettings:
    return GradualSettings(**{"final_sparsity": 0.8, "end_epoch": 10.0, **changes})


@st.composite
def schedules(draw: st.DrawFn) -> tuple[GradualSettings, int]:
    start = draw(st.floats(0, 20))
    end = start + draw(st.one_of(st.just(0.0), st.floats(0, 20)))
    initial = draw(st.floats(0, 0.98))
    return (
        settings(
            start_epoch=start,
            end_epoch=end,
            update_frequency=draw(st.floats(0.05, 50)),
            initial_sparsity=initial,
            final_sparsity=draw(st.floats(max(initial, 0.01), 0.99)),
            interpolation=draw(st.sampled_from(KINDS)),
        ),
        draw(st.integers(1, 400)),
    )


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("linear", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("cubic", [0.0, 37 / 64, 7 / 8, 63 / 64, 1.0]),
        ("inverse_cubic", [0.0, 0.09143970358393, 0.20629947401590, 0.37003947505256, 1.0]),
    ],
)
def test_interpolation_values(kind, values):
    assert [interpolate(x, kind) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(values, abs=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fraction", "value"), [(-1.0, 0.0), (0.0, 0.0), (1.0, 1.0), (1.5, 1.0), (math.inf, 1.0)])
def test_interpolation_is_clamped_and_exact_at_its_ends(kind, fraction, value):
    result = interpolate(fraction, kind)
    assert isinstance(result, float)
    assert result == value


def test_unknown_interpolation_is_refused_by_name():
    with pytest.raises(SettingError, match="interpolation: 'cosine' is not one of linear, cubic, inverse_cubic"):
        interpolate(0.5, "cosine")


@given(
    initial=st.floats(0, 0.99),
    final=st.floats(0, 0.99),
    fractions=st.lists(st.integers(0, 1000), min_size=2),
    kind=st.sampled_from(KINDS),
)
def test_sparsity_is_monotone_within_its_ends_and_exact_at_them(initial, final, fractions, kind):
    initial, final = sorted((initial, final))
    values = [
        sparsity_at(k / 1000, initial=initial, final=final, interpolation=kind) for k in (0, *sorted(fractions), 1000)
    ]
    assert values == sorted(values)
    assert values[0] == initial
    assert values[-1] == final


def test_sparsity_never_rounds_past_its_end():
    assert 0.03 + (0.29 - 0.03) > 0.29
    assert sparsity_at(1.0, initial=0.03, final=0.29, interpolation="cubic") == 0.29
    assert sparsity_at(1 - 1e-9, initial=0.03, final=0.29, interpolation="cubic") <= 0.29


def test_schedule_of_the_documentation():
    scheduled = pruning_schedule(
        settings(initial_sparsity=0.05, final_sparsity=0.85, start_epoch=1.0, end_epoch=61.0, update_frequency=4.0), 100
    )
    assert [step.step for step in scheduled] == list(range(100, 6101, 400))
    assert [step.epoch for step in scheduled] == [1.0 + 4.0 * k for k in range(16)]
    assert scheduled[0].sparsity == 0.05
    assert scheduled[-1] == (6100, 61.0, 0.85)
    assert scheduled[1].sparsity == pytest.approx(0.05 + 0.8 * (1 - (14 / 15) ** 3))


@pytest.mark.parametrize(
    ("changes", "steps_per_epoch", "steps"),
    [
        ({"start_epoch": 0.0, "end_epoch": 3.0}, 10, [0, 10, 20, 30]),
        ({"start_epoch": 0.5, "end_epoch": 3.0}, 10, [5, 15, 25, 30]),  # the end is no multiple of the frequency
        ({"start_epoch": 2.0, "end_epoch": 2.0}, 10, [20]),
        ({"start_epoch": 0.0, "end_epoch": 0.0}, 10, [0]),
        ({"start_epoch": 0.0, "end_epoch": 2.0, "update_frequency": 100.0}, 10, [0, 20]),
        ({"start_epoch": 0.0, "end_epoch": 2.0, "update_frequency": 0.1}, 3, [0, 1, 2, 3, 4, 5, 6]),
        ({"start_epoch": 0.0, "end_epoch": 2.0, "update_frequency": 0.001}, 1, [0, 1, 2]),
        ({"start_epoch": 0.1, "end_epoch": 0.2, "update_frequency": 1.0}, 1, [0]),
    ],
)
def test_schedule_steps(changes, steps_per_epoch, steps):
    scheduled = pruning_schedule(settings(**changes), steps_per_epoch)
    assert [step.step for step in scheduled] == steps
    assert scheduled[-1].sparsity == 0.8


def test_start_equal_to_end_prunes_once_to_the_final_sparsity():
    scheduled = pruning_schedule(settings(initial_sparsity=0.3, start_epoch=4.0, end_epoch=4.0), 7)
    assert scheduled == ((28, 4.0, 0.8),)


def test_epochs_that_share_the_last_step_become_one_step_at_the_final_sparsity():
    scheduled = pruning_schedule(settings(start_epoch=0.0, end_epoch=1.0, update_frequency=0.3), 2)
    assert [(step.step, step.epoch) for step in scheduled] == [(0, 0.0), (1, 0.3), (2, 1.0)]
    assert scheduled[-1].sparsity == 0.8


def test_rounding_noise_makes_no_extra_step_just_before_the_end():
    just_under = math.nextafter(1.75, 0)
    assert round(2 * just_under) == 3  # the extra step that there would be beside round(3.5) == 4
    run = settings(start_epoch=0.0, end_epoch=3.5, update_frequency=just_under)
    assert [step.step for step in pruning_schedule(run, 1)] == [0, 2, 4]
    noisy = settings(start_epoch=0.0, end_epoch=3.0, update_frequency=0.9999999999)
    assert pruning_epochs(noisy) == (0.0, 0.9999999999, 1.9999999998, 3.0)


def test_noise_guard_keeps_a_start_that_is_close_to_the_end_in_periods():
    far = settings(start_epoch=0.0, end_epoch=1.0, update_frequency=1e9)
    assert pruning_epochs(far) == (0.0, 1.0)


@given(schedules())
def test_schedule_properties(case):
    run, steps_per_epoch = case
    scheduled = pruning_schedule(run, steps_per_epoch)
    steps = [step.step for step in scheduled]
    sparsities = [step.sparsity for step in scheduled]
    assert steps == sorted(set(steps))
    assert sparsities == sorted(sparsities)
    assert scheduled[-1].step == round(run.end_epoch * steps_per_epoch)
    assert scheduled[-1].sparsity == run.final_sparsity
    assert scheduled[-1].epoch == run.end_epoch
    assert scheduled[0].step == round(run.start_epoch * steps_per_epoch)
    if len(scheduled) > 1:
        assert scheduled[0].sparsity == run.initial_sparsity


@given(schedules())
def test_schedule_does_not_drift(case):
    run, steps_per_epoch = case
    epochs = pruning_epochs(run)
    for k, epoch in enumerate(epochs[:-1]):
        exact = Fraction(run.start_epoch) + k * Fraction(run.update_frequency)
        assert abs(Fraction(epoch) - exact) <= Fraction(1, 10**12)
    nearest = {round(epoch * steps_per_epoch) for epoch in epochs}
    assert {step.step for step in pruning_schedule(run, steps_per_epoch)} == nearest


def test_ten_thousand_updates_of_a_tenth_of_an_epoch_stay_on_their_steps():
    run = settings(start_epoch=0.0, end_epoch=1000.0, update_frequency=0.1)
    assert [step.step for step in pruning_schedule(run, 10)] == list(range(10_001))


@pytest.mark.parametrize("steps_per_epoch", [0, -1, 1.5, True, "10", None])
def test_steps_per_epoch_must_be_a_positive_integer(steps_per_epoch):
    with pytest.raises(SettingError, match="steps_per_epoch: .* must be a positive integer") as caught:
        pruning_schedule(settings(), steps_per_epoch)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("frequency", [1e-7, 5e-324])
def test_too_many_pruning_steps_are_refused(frequency):
    with pytest.raises(SettingError, match="update_frequency: .* more than 1000000 pruning steps"):
        pruning_schedule(settings(update_frequency=frequency), 10)


@pytest.mark.parametrize(
    ("sparsity", "rows"),
    [(0.0, 64), (0.1, 64), (0.4999999999, 64), (0.5, 128), (0.51, 128), (0.74, 128), (0.75, 256), (1.0, 256)],
)
def test_num_gradients_holds_from_its_threshold_on(sparsity, rows):
    assert num_gradients_at({0.75: 256, 0.0: 64, 0.5: 128}, sparsity) == rows


def test_num_gradients_as_an_integer_holds_everywhere():
    assert num_gradients_at(32, 0.9) == 32


def test_num_gradients_without_a_threshold_that_is_reached_is_refused():
    with pytest.raises(SettingError, match=r"num_gradients: .* add the key 0\.0"):
        num_gradients_at({0.5: 128}, 0.2)


def acdc(**changes: object) -> ACDCSettings:
    return ACDCSettings(**{"compression_sparsity": 0.9, "end_epoch": 8.0, **changes})


@pytest.mark.parametrize(
    ("changes", "epochs", "compressed"),
    [
        # the phase that begins at the end is compressed: it begins there
        ({"end_epoch": 3.0}, [0.0, 1.0, 3.0], "dcc"),
        ({"end_epoch": 4.0}, [0.0, 1.0, 2.0, 3.0, 4.0], "dcdcc"),
        # a decompressed phase that would be the last is not begun
        ({"end_epoch": 9.0, "update_frequency": 2.0}, [0.0, 2.0, 4.0, 6.0, 9.0], "dcdcc"),
        ({"end_epoch": 8.0, "update_frequency": 2.0}, [0.0, 2.0, 4.0, 6.0, 8.0], "dcdcc"),
        ({"end_epoch": 6.0, "update_frequency": 2.0}, [0.0, 2.0, 6.0], "dcc"),
        # phases count from the start
        ({"start_epoch": 1.5, "end_epoch": 7.0, "update_frequency": 2.0}, [1.5, 3.5, 7.0], "dcc"),
        # with room for no second phase all are compressed at the end
        ({"end_epoch": 1.0}, [0.0, 1.0], "dc"),
        ({"end_epoch": 0.5}, [0.0, 0.5], "dc"),
        ({"start_epoch": 2.0, "end_epoch": 2.0}, [2.0], "c"),
    ],
)
def test_phases_of_acdc(changes, epochs, compressed):
    scheduled = pruning_schedule(acdc(**changes), 10)
    assert [step.epoch for step in scheduled] == epochs == list(pruning_epochs(acdc(**changes)))
    assert [step.step for step in scheduled] == [round(10 * epoch) for epoch in epochs]
    assert [step.sparsity for step in scheduled] == [0.9 if phase == "c" else 0.0 for phase in compressed]


@given(st.floats(0, 5), st.floats(0, 20), st.floats(0.05, 5), st.integers(1, 50))
def test_acdc_alternates_and_ends_compressed(start, length, frequency, steps_per_epoch):
    run = acdc(start_epoch=start, end_epoch=start + length, update_frequency=frequency)
    scheduled = pruning_schedule(run, steps_per_epoch)
    steps = [step.step for step in scheduled]
    assert steps == sorted(set(steps))
    assert scheduled[-1].sparsity == 0.9 and scheduled[-1].step == round(run.end_epoch * steps_per_epoch)
    phases = [k for k, _ in enumerate(pruning_epochs(run)[:-1])]
    for k in phases:
        begins = Fraction(start) + k * Fraction(frequency)
        assert abs(Fraction(pruning_epochs(run)[k]) - begins) <= Fraction(1, 10**12)
    assert len(phases) in (0, 1) or len(phases) % 2 == 0


def test_zeros_are_taken_at_the_start_and_let_go_at_the_end():
    held = ConstantSettings(start_epoch=1.0, end_epoch=2.5)
    assert pruning_schedule(held, 10) == ((10, 1.0, 0.0), (25, 2.5, 0.0))
    assert pruning_schedule(held, 10, sparsities=(0.4, 0.4)) == ((10, 1.0, 0.4), (25, 2.5, 0.0))
    assert pruning_schedule(ConstantSettings(start_epoch=1.0), 10) == ((10, 1.0, 0.0),)
    assert pruning_schedule(ConstantSettings(start_epoch=1.0, end_epoch=1.0), 10, sparsities=(0.4, 0.4)) == (
        (10, 1.0, 0.0),
    )


def test_measured_sparsities_stand_in_for_those_of_the_settings():
    run = settings(initial_sparsity=FROM_PARAM, end_epoch=2.0, interpolation="linear")
    assert [step.sparsity for step in pruning_schedule(run, 10)] == [0.0, 0.4, 0.8]
    measured = pruning_schedule(run, 10, sparsities=(0.5, 0.75))
    assert [step.sparsity for step in measured] == [0.5, 0.625, 0.75]


def test_several_final_sparsities_are_refused_with_the_cure():
    with pytest.raises(SettingError, match=r"final_sparsity: .*by_final_sparsity\(\)"):
        pruning_schedule(settings(final_sparsity={0.5: ("a",), 0.6: ("b",)}), 10)


def test_settings_without_pruning_steps_are_refused():
    with pytest.raises(TypeError, match="PruningSettings"):
        pruning_schedule(PruningSettings(end_epoch=1.0), 10)
