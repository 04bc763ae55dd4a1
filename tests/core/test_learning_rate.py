from __future__ import annotations

import math

import pytest

from mfac_core.errors import SettingError
from mfac_core.schedules.learning_rate import learning_rate_at
from mfac_core.settings.training import LearningRateFunction, LearningRateSchedule, SetLearningRate


def function(kind: str, **changes: object) -> LearningRateFunction:
    return LearningRateFunction(**{"function": kind, "initial": 0.1, "final": 0.02, "end_epoch": 8.0, **changes})


def schedule(kind: str, options: dict[str, object], **changes: object) -> LearningRateSchedule:
    return LearningRateSchedule(**{"kind": kind, "options": options, "initial": 0.8, **changes})


class TestSetLearningRate:
    def test_it_holds_from_its_epoch_on(self):
        settings = SetLearningRate(learning_rate=0.3, start_epoch=2.5)
        assert [learning_rate_at(settings, epoch) for epoch in (0.0, 2.4, 2.5, 99.0)] == [None, None, 0.3, 0.3]

    def test_an_epoch_that_misses_the_start_by_rounding_counts(self):
        assert learning_rate_at(SetLearningRate(learning_rate=0.3, start_epoch=0.3), 3 * 0.1 - 1e-16) == 0.3


class TestFunctions:
    @pytest.mark.parametrize("kind", ["linear", "cosine", "cyclic_linear"])
    def test_both_ends_are_exact_and_the_final_value_holds(self, kind):
        settings = function(kind, start_epoch=2.0, cycle_epochs=3.0)
        assert learning_rate_at(settings, 1.9) is None
        assert [learning_rate_at(settings, epoch) for epoch in (2.0, 8.0, 100.0)] == [0.1, 0.02, 0.02]

    def test_linear(self):
        assert learning_rate_at(function("linear"), 2.0) == pytest.approx(0.08)
        assert learning_rate_at(function("linear", initial=0.0, final=0.4), 2.0) == pytest.approx(0.1)

    @pytest.mark.parametrize(("initial", "final"), [(0.1, 0.02), (0.02, 0.1)])
    def test_cosine_goes_half_a_wave_down_or_up(self, initial, final):
        settings = function("cosine", initial=initial, final=final)
        for epoch in (1.0, 2.0, 4.0, 6.5):
            wave = (1 + math.cos(math.pi * epoch / 8)) / 2
            assert learning_rate_at(settings, epoch) == pytest.approx(final + (initial - final) * wave)

    def test_cyclic_linear_begins_again_every_cycle_epochs(self):
        settings = function("cyclic_linear", start_epoch=2.0, end_epoch=10.0, cycle_epochs=4.0)
        expected = {2.0: 0.1, 4.0: 0.06, 5.999: 0.02, 6.0: 0.1, 8.0: 0.06, 9.999: 0.02, 10.0: 0.02}
        for epoch, learning_rate in expected.items():
            assert learning_rate_at(settings, epoch) == pytest.approx(learning_rate, abs=1e-4)

    def test_a_last_cycle_that_is_cut_short_ends_at_the_final_value(self):
        settings = function("cyclic_linear", end_epoch=11.0, cycle_epochs=4.0)
        assert learning_rate_at(settings, 8.0) == pytest.approx(0.1)
        assert learning_rate_at(settings, 9.5) == pytest.approx(0.06)
        assert learning_rate_at(settings, 10.999) == pytest.approx(0.02, abs=1e-4)

    def test_a_cycle_that_is_longer_than_the_curve(self):
        settings = function("cyclic_linear", cycle_epochs=100.0)
        assert learning_rate_at(settings, 4.0) == learning_rate_at(function("linear"), 4.0)

    def test_cycle_borders_that_miss_by_rounding(self):
        settings = function("cyclic_linear", end_epoch=1.0, cycle_epochs=0.1)
        for cycle in range(10):
            assert learning_rate_at(settings, cycle * 0.1) == pytest.approx(0.1)


class TestSchedules:
    def test_steps(self):
        settings = schedule("StepLR", {"step_size": 2, "gamma": 0.5}, start_epoch=1.0)
        rates = [learning_rate_at(settings, epoch) for epoch in (0.5, 1.0, 2.9, 3.0, 4.9, 5.0)]
        assert rates == pytest.approx([None, 0.8, 0.8, 0.4, 0.4, 0.2])

    def test_steps_of_a_part_of_an_epoch(self):
        settings = schedule("StepLR", {"step_size": 0.1, "gamma": 0.5})
        assert learning_rate_at(settings, 0.3) == pytest.approx(0.1)

    def test_milestones_are_epochs_of_the_whole_training(self):
        settings = schedule("MultiStepLR", {"milestones": [107, 103.5], "gamma": 0.5}, start_epoch=100.0)
        rates = [learning_rate_at(settings, epoch) for epoch in (100.0, 103.4, 103.5, 106.9, 107.0)]
        assert rates == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2])

    def test_exponential_falls_once_per_epoch(self):
        settings = schedule("ExponentialLR", {"gamma": 0.5})
        assert [learning_rate_at(settings, epoch) for epoch in (0.9, 1.0, 3.5)] == pytest.approx([0.8, 0.4, 0.1])

    def test_restarts(self):
        settings = schedule("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 2, "eta_min": 0.2})
        rates = [learning_rate_at(settings, epoch) for epoch in (0, 1, 2, 4, 6)]
        assert rates == pytest.approx([0.8, 0.5, 0.8, 0.5, 0.8])

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("StepLR", {"step_size": 3}),
            ("MultiStepLR", {"milestones": [2, 5.5]}),
            ("ExponentialLR", {"gamma": 0.9}),
            ("CosineAnnealingWarmRestarts", {"T_0": 6}),
        ],
    )
    def test_what_was_reached_before_the_end_holds(self, kind, options):
        settings = schedule(kind, options, start_epoch=1.0, end_epoch=7.0)
        unending = schedule(kind, options, start_epoch=1.0)
        held = learning_rate_at(unending, 6.999)
        assert held < 0.8
        assert [learning_rate_at(settings, epoch) for epoch in (7.0, 7.3, 200.0)] == [held] * 3
        assert learning_rate_at(settings, 5.2) == learning_rate_at(unending, 5.2)

    def test_gamma_has_the_default_of_pytorch(self):
        assert learning_rate_at(schedule("StepLR", {"step_size": 1}), 1.0) == pytest.approx(0.08)
        assert learning_rate_at(schedule("MultiStepLR", {"milestones": [1]}), 1.0) == pytest.approx(0.08)


class TestSettings:
    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("StepLR", {}, "step_size is missing; StepLR needs it"),
            ("StepLR", {"step_size": 0}, "step_size: 0 is out of range; the rule is step_size > 0"),
            ("StepLR", {"step_size": "2"}, "step_size: '2' is not a finite number"),
            ("StepLR", {"step_size": 2, "gamma": 0}, "gamma: 0 is out of range"),
            ("StepLR", {"step_size": 2, "gama": 0.1}, "StepLR has no option 'gama'; its options are step_size, gamma"),
            ("StepLR", [], r"\[\] must be a mapping with step_size"),
            ("MultiStepLR", {"gamma": 0.1}, "milestones is missing"),
            ("MultiStepLR", {"milestones": []}, r"milestones: \[\] must be a list of epochs"),
            ("MultiStepLR", {"milestones": [1]}, r"milestones: 1 is out of range; the rule is start_epoch \(2.0\) <"),
            ("MultiStepLR", {"milestones": [9]}, r"9 is out of range; .* < milestone < end_epoch \(9.0\)"),
            ("ExponentialLR", {}, "gamma is missing"),
            ("ExponentialLR", {"gamma": 0.1, "step_size": 1}, "ExponentialLR has no option 'step_size'"),
            ("CosineAnnealingWarmRestarts", {}, "T_0 is missing"),
            ("CosineAnnealingWarmRestarts", {"T_0": 2.5}, "T_0: 2.5 must be a positive integer"),
            ("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 0}, "T_mult: 0 must be a positive integer"),
            ("CosineAnnealingWarmRestarts", {"T_0": 2, "eta_min": -1}, "eta_min: -1 is out of range"),
        ],
    )
    def test_bad_options_are_refused_by_name(self, kind, options, message):
        with pytest.raises(SettingError, match=f"^options: .*{message}"):
            schedule(kind, options, start_epoch=2.0, end_epoch=9.0)

    @pytest.mark.parametrize("groups", [[], 3, "01", [True], [-1], [0.5]])
    def test_bad_parameter_groups(self, groups):
        with pytest.raises(SettingError, match="^param_groups: .* must be a list of indices"):
            SetLearningRate(learning_rate=0.1, param_groups=groups)

    def test_parameter_groups_become_a_tuple(self):
        assert SetLearningRate(learning_rate=0.1, param_groups=[0, 2]).param_groups == (0, 2)

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"function": "quadratic"}, "function"),
            ({"initial": 1.5}, "initial"),
            ({"final": -0.1}, "final"),
            ({"cycle_epochs": 0}, "cycle_epochs"),
            ({"start_epoch": -1}, "start_epoch"),
            ({"start_epoch": 8.0}, "end_epoch"),
        ],
    )
    def test_bad_functions(self, changes, field):
        with pytest.raises(SettingError, match=f"^{field}: "):
            function(**{"kind": "linear", **changes} if "function" not in changes else {"kind": changes["function"]})

    @pytest.mark.parametrize(("changes", "field"), [({"kind": "LambdaLR"}, "kind"), ({"initial": 0.0}, "initial")])
    def test_bad_schedules(self, changes, field):
        with pytest.raises(SettingError, match=f"^{field}: "):
            LearningRateSchedule(**{"kind": "StepLR", "initial": 0.1, "options": {"step_size": 1}, **changes})
