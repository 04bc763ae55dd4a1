from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.errors import MemoryBudgetError, SettingError
from mfac_core.pruners import make_pruner
from mfac_core.pruners.memory import WindowMemory
from mfac_core.recipe import EpochRange, Recipe, SetLearningRate
from mfac_core.recipe.linting import lint, lint_one_shot, notes
from mfac_core.schedules.pruning import pruning_schedule
from mfac_core.session.plan import Plan, describe, plan_model
from mfac_core.settings.pruning import (
    FROM_PARAM,
    ACDCSettings,
    ConstantSettings,
    MagnitudeSettings,
    MFACSettings,
    PruningSettings,
)
from mfac_core.settings.training import LearningRateFunction, SetWeightDecay, TrainableParams


def recipe(*modifiers) -> Recipe:
    return Recipe(modifiers=modifiers, source="<text>")


def mfac(**changes: object) -> MFACSettings:
    return MFACSettings(**{"final_sparsity": 0.8, "start_epoch": 2.0, "end_epoch": 6.0, "scope": "global", **changes})


def magnitude(**changes: object) -> MagnitudeSettings:
    return MagnitudeSettings(**{"final_sparsity": 0.8, "start_epoch": 2.0, "end_epoch": 6.0, **changes})


def only(warnings: tuple[str, ...]) -> str:
    (warning,) = warnings
    return warning


@pytest.mark.parametrize("steps_per_epoch", [None, 100])
def test_a_sound_recipe_has_no_warnings(steps_per_epoch):
    sound = recipe(EpochRange(end_epoch=6.0), SetLearningRate(learning_rate=0.1), mfac())
    assert lint(sound, steps_per_epoch) == ()


class TestWindowThatIsNotFull:
    def test_it_is_named_with_epoch_step_and_rows(self):
        warning = only(lint(recipe(mfac(num_gradients=21, initial_sparsity=0.1)), steps_per_epoch=10))
        assert warning.startswith(
            "MFACPruningModifier: the pruning step at epoch 2 (optimizer step 20) falls due while its gradient window "
            "has 20 of 21 gradient samples, and uses those; "
        )

    def test_a_window_that_is_just_full_is_not_named(self):
        assert lint(recipe(mfac(num_gradients=20, initial_sparsity=0.1)), steps_per_epoch=10) == ()

    def test_it_needs_the_steps_per_epoch(self):
        assert lint(recipe(mfac(num_gradients=10**6))) == ()

    def test_rows_outlive_a_pruning_step(self):
        # 20 rows at epoch 2 and 10 more per epoch: the window of 40 rows is full at epoch 4.
        warning = only(lint(recipe(mfac(num_gradients=40, initial_sparsity=0.1)), steps_per_epoch=10))
        assert "20 of 40 gradient samples, and uses those (the first of 2 such steps);" in warning

    def test_a_step_that_prunes_nothing_needs_none(self):
        # The first is at sparsity 0, and at epoch 3, where the next is, there are 30 rows.
        assert lint(recipe(mfac(num_gradients=30)), steps_per_epoch=10) == ()
        warning = only(lint(recipe(mfac(num_gradients=31)), steps_per_epoch=10))
        assert (
            "at epoch 3 (optimizer step 30) falls due while its gradient window has 30 of 31 gradient samples"
            in warning
        )
        level = mfac(num_gradients=20, initial_sparsity=0.8)
        assert lint(recipe(level), steps_per_epoch=10) == ()
        assert [row.num_gradients for row in describe(recipe(level), 10)] == [20, None, None, None, None]

    def test_a_window_that_grows_faster_than_rows_arrive(self):
        # Sparsity 0.4 is reached at epoch 4, so the step at epoch 5 is the first to want 31 rows; 20 + 10 are there.
        growing = mfac(num_gradients={0.0: 20, 0.4: 31}, interpolation="linear")
        warning = only(lint(recipe(growing), steps_per_epoch=10))
        assert "the pruning step at epoch 5 (optimizer step 50)" in warning
        assert "has 30 of 31 gradient samples, and uses those;" in warning

    def test_magnitude_needs_no_window(self):
        assert lint(recipe(magnitude(start_epoch=0.0)), steps_per_epoch=1) == ()


class TestStartBeforeAnyGradient:
    @pytest.mark.parametrize("steps_per_epoch", [None, 100])
    def test_a_start_at_epoch_0_waits(self, steps_per_epoch):
        warning = only(lint(recipe(mfac(start_epoch=0.0, num_gradients=8, initial_sparsity=0.1)), steps_per_epoch))
        assert warning.startswith(
            "MFACPruningModifier: the first pruning step is due at epoch 0, before there is any grad"
        )
        assert "waits for its first window of 8 gradient samples" in warning

    def test_a_start_that_rounds_to_step_0_waits(self):
        early = recipe(mfac(start_epoch=0.01, num_gradients=8, initial_sparsity=0.1))
        assert lint(early) == ()
        assert "due at epoch 0.01, before there is any gradient" in only(lint(early, steps_per_epoch=10))

    @pytest.mark.parametrize("initial_sparsity", [0.0, FROM_PARAM])
    def test_one_that_prunes_nothing_waits_for_nothing(self, initial_sparsity):
        early = mfac(start_epoch=0.0, num_gradients=8, initial_sparsity=initial_sparsity)
        assert lint(recipe(early), steps_per_epoch=10) == lint(recipe(early)) == ()


class TestEndOfTraining:
    def test_pruning_that_ends_after_training(self):
        warning = only(lint(recipe(EpochRange(end_epoch=5.0), mfac())))
        assert warning == (
            "MFACPruningModifier: final_sparsity 0.8 is not reached, because its end_epoch 6 lies after the end of "
            "training at epoch 5 (EpochRangeModifier); train longer or end pruning earlier"
        )

    def test_alternating_phases_that_end_after_training(self):
        alternating = ACDCSettings(compression_sparsity=0.9, end_epoch=8.0)
        assert only(lint(recipe(EpochRange(end_epoch=5.0), alternating))).startswith(
            "ACDCPruningModifier: its last compressed phase is not reached, because its end_epoch 8 lies after"
        )

    def test_several_final_sparsities_are_one_warning(self):
        several = mfac(final_sparsity={0.8: ("a",), 0.9: ("b",)})
        assert "final_sparsity 0.8, 0.9 is not reached" in only(lint(recipe(EpochRange(end_epoch=5.0), several)))

    def test_masks_that_are_held_have_no_end_to_reach(self):
        assert lint(recipe(EpochRange(end_epoch=5.0), ConstantSettings(end_epoch=9.0), ConstantSettings())) == (
            "ConstantPruningModifier 1 and ConstantPruningModifier 2 cover the same params (__ALL_PRUNABLE__) at the "
            "same time, and ConstantPruningModifier 1 only keeps zeros; let one start when the other ends, or give "
            "each weight to one modifier",
        )

    def test_the_longest_range_counts(self):
        assert lint(recipe(EpochRange(end_epoch=5.0), EpochRange(end_epoch=6.0), magnitude())) == ()

    def test_without_a_range_there_is_nothing_to_say(self):
        assert lint(recipe(mfac())) == ()


class TestSameParams:
    def test_two_modifiers_with_the_same_params(self):
        both = recipe(mfac(params=("a", "b")), magnitude(params=("b", "a")))
        assert only(lint(both)) == (
            "MFACPruningModifier 1 and MagnitudePruningModifier 2 prune the same params (a, b); "
            "give each weight to one modifier"
        )

    def test_what_one_of_them_excludes_may_be_all_that_the_other_prunes(self):
        assert lint(recipe(mfac(exclude=("fc",)), magnitude(exclude=("re:(?!fc)",)))) == ()
        assert "prune the same params" in only(lint(recipe(mfac(exclude=("fc",)), magnitude(exclude=("fc",)))))

    def test_shared_names_are_enough(self):
        grouped = magnitude(final_sparsity={0.5: ("x",), 0.6: ("b", "c")})
        assert "prune the same params (c, b);" in only(lint(recipe(mfac(params=("a", "c", "b")), grouped)))

    def test_one_after_the_other_is_fine(self):
        held = ConstantSettings(start_epoch=6.0)
        alternating = ACDCSettings(compression_sparsity=0.9, end_epoch=2.0)
        assert lint(recipe(mfac(), held)) == lint(recipe(alternating, mfac())) == ()
        assert lint(recipe(mfac(), ConstantSettings(start_epoch=5.5))) != ()

    def test_other_params_are_fine(self):
        assert lint(recipe(mfac(params=("a",)), magnitude(params=("b",)))) == ()


class TestDescribe:
    def test_rows_with_steps(self):
        settings = mfac(num_gradients={0.0: 64, 0.4: 128, 0.8: 256}, interpolation="linear", update_frequency=2.0)
        assert describe(recipe(settings), steps_per_epoch=10) == [
            ("MFACPruningModifier", 2.0, 20, 0.0, None),
            ("MFACPruningModifier", 4.0, 40, 0.4, 64),
            ("MFACPruningModifier", 6.0, 60, 0.8, 128),
        ]

    def test_rows_without_steps(self):
        settings = mfac(initial_sparsity=0.2, interpolation="linear", update_frequency=3.0)
        rows = describe(recipe(settings))
        assert [(row.epoch, row.step, row.num_gradients) for row in rows] == [
            (2.0, None, 64),
            (5.0, None, 64),
            (6.0, None, 64),
        ]
        assert [row.sparsity for row in rows] == pytest.approx([0.2, 0.65, 0.8])
        assert (rows[0].sparsity, rows[-1].sparsity) == (0.2, 0.8)

    def test_a_single_step_is_at_the_final_sparsity(self):
        for steps_per_epoch in (None, 10):
            (row,) = describe(recipe(mfac(end_epoch=2.0, initial_sparsity=0.1)), steps_per_epoch)
            assert (row.epoch, row.sparsity) == (2.0, 0.8)

    def test_names(self):
        def names(*settings: PruningSettings) -> list[str]:
            return list(dict.fromkeys(row.modifier for row in describe(recipe(*settings))))

        assert names(magnitude()) == ["MagnitudePruningModifier"]
        assert names(magnitude(scope="global"), mfac()) == ["GlobalMagnitudePruningModifier 1", "MFACPruningModifier 2"]

    def test_magnitude_has_no_gradients(self):
        assert {row.num_gradients for row in describe(recipe(magnitude()))} == {None}

    def test_modifiers_that_do_not_prune_have_no_rows(self):
        assert describe(recipe(EpochRange(end_epoch=3.0), SetLearningRate(learning_rate=0.1))) == []

    def test_alternating_phases(self):
        alternating = ACDCSettings(compression_sparsity=0.9, start_epoch=1.0, end_epoch=5.0, update_frequency=2.0)
        for steps_per_epoch in (None, 10):
            rows = describe(recipe(alternating), steps_per_epoch)
            scheduled = pruning_schedule(alternating, steps_per_epoch or 10)
            assert [(row.epoch, row.sparsity) for row in rows] == [(each.epoch, each.sparsity) for each in scheduled]
            assert [row.step for row in rows] == [each.step if steps_per_epoch else None for each in scheduled]
            assert rows[-1].sparsity == 0.9

    def test_masks_that_are_held_make_no_pruning_step(self):
        assert describe(recipe(ConstantSettings(end_epoch=5.0)), 10) == []

    def test_each_final_sparsity_has_its_rows(self):
        rows = describe(recipe(mfac(final_sparsity={0.8: ("a",), 0.95: ("b",)}, update_frequency=4.0)), 10)
        assert [(row.modifier, row.epoch, row.sparsity) for row in rows] == [
            ("MFACPruningModifier (0.8)", 2.0, 0.0),
            ("MFACPruningModifier (0.8)", 6.0, 0.8),
            ("MFACPruningModifier (0.95)", 2.0, 0.0),
            ("MFACPruningModifier (0.95)", 6.0, 0.95),
        ]

    @pytest.mark.parametrize("steps_per_epoch", [None, 10])
    def test_a_sparsity_that_depends_on_the_weights_is_left_open(self, steps_per_epoch):
        rows = describe(recipe(mfac(initial_sparsity=FROM_PARAM, update_frequency=2.0)), steps_per_epoch)
        assert [row.sparsity for row in rows] == [None, None, 0.8]


class TestLayersInOnePass:
    WARNING = (
        "MFACPruningModifier: goes from sparsity 0 to 0.8 in one pass within each layer, which is usually less "
        "accurate than global magnitude pruning; write global_sparsity: true and num_recomputations: auto (and update: "
        "joint, damp: auto), or prune in smaller steps"
    )

    @pytest.mark.parametrize("changes", [{"end_epoch": 2.0}, {"initial_sparsity": 0.8}])
    def test_a_large_step_within_layers_is_named(self, changes):
        settings = mfac(scope="layer", num_gradients=1, **changes)
        assert lint(recipe(settings)) == (self.WARNING,)
        assert plan_model([settings], [{"a": 10, "b": 10}], 100).warnings == (self.WARNING,)
        assert lint_one_shot([(settings, settings)], [["a", "b"]]) == (self.WARNING,)

    @pytest.mark.parametrize(
        "changes",
        [
            {"scope": "global"},
            {"num_recomputations": 2},
            {"num_recomputations": "auto"},
            {"final_sparsity": 0.5},
            {"mask_type": "1:8"},
            {"params": ("a",)},
        ],
    )
    def test_others_are_not(self, changes):
        settings = mfac(**{"scope": "layer", "num_gradients": 1, "end_epoch": 2.0, **changes})
        assert lint(recipe(settings)) == ()
        assert lint_one_shot([(settings, settings)], [["a", "b"]]) == ()

    def test_a_single_layer_has_nothing_to_share(self):
        settings = mfac(scope="layer", num_gradients=1, end_epoch=2.0)
        assert plan_model([settings], [{"a": 10}], 100).warnings == ()
        assert lint_one_shot([(settings, settings)], [["a"]]) == ()

    def test_each_final_sparsity_counts(self):
        settings = mfac(scope="layer", num_gradients=1, end_epoch=2.0, final_sparsity={0.3: ("a", "b"), 0.9: ("re:c",)})
        assert "from sparsity 0 to 0.9 in one pass" in only(lint(recipe(settings)))

    def test_small_steps_are_a_note(self):
        settings = mfac(scope="layer", end_epoch=22.0, num_gradients=1, devices=("cpu",))
        assert lint(recipe(settings)) == ()
        note = only(notes(recipe(settings)))
        assert note.startswith(
            "MFACPruningModifier: prunes each layer to the same sparsity, and does each pruning step in one pass"
        )
        assert plan_model([settings], [{"a": 10, "b": 10}], 100).notes == (note,)
        assert plan_model([settings], [{"a": 10}], 100).notes == ()


class TestSubstepsThatShareRows:
    def test_they_are_named_with_the_steps_between(self):
        settings = mfac(num_gradients=30, num_recomputations=4)  # 100 steps between two pruning steps
        warning = only(lint(recipe(settings), 100))
        assert (
            "the 4 sub-steps of the pruning step at epoch 3 (optimizer step 300) share gradient samples: they are "
            in (warning)
        )
        assert "25 optimizer steps apart, and a window has 30" in warning
        assert lint(recipe(mfac(num_gradients=25, num_recomputations=4)), 100) == ()
        assert lint(recipe(settings), 100, sampled=True) == ()
        assert lint(recipe(settings)) == ()

    def test_those_of_the_first_pruning_step_are_all_at_once(self):
        warning = only(lint(recipe(mfac(num_gradients=2, initial_sparsity=0.5, num_recomputations="auto")), 100))
        assert (
            "the 3 sub-steps of the pruning step at epoch 2 (optimizer step 200) share gradient samples: they are 0"
            in (warning)
        )

    def test_a_window_must_be_full_at_the_first_substep(self):
        # 100 steps to epoch 3, of which the last 60 are for the second and third sub-step
        assert lint(recipe(mfac(num_gradients=30, num_recomputations=3, start_epoch=0.0)), 100) == ()
        short = lint(recipe(mfac(num_gradients=40, num_recomputations=3, start_epoch=0.0, end_epoch=1.0)), 100)
        assert any("falls due while its gradient window has 34 of 40 gradient samples" in each for each in short)


class TestNotes:
    def test_substeps_are_described(self):
        cases = {
            (4, "geometric"): "in 4 sub-steps that shrink what is left by equal factors, each with gradients of",
            (4, "linear"): "in 4 sub-steps that remove equally many weights, each with",
            ("auto", "geometric"): "in as many sub-steps as are needed for none to remove more than about a fifth",
        }
        for (number, spacing), words in cases.items():
            settings = mfac(num_recomputations=number, recomputation_spacing=spacing, devices=("cpu",))
            assert words in only(notes(recipe(settings)))

    def test_devices_that_are_decided_later(self):
        assert only(notes(recipe(mfac()))) == (
            "MFACPruningModifier: computes on the model's device (for a Keras model on a GPU only if CuPy is "
            "installed, else on the CPU); set available_devices to choose"
        )
        assert notes(recipe(mfac(devices=("cpu",)))) == ()

    def test_a_window_whose_place_is_decided_later(self):
        assert "keeps the gradient window on the first GPU of cuda:0, cuda:1 that has room for it" in only(
            notes(recipe(mfac(devices=("cuda:0", "cuda:1"))))
        )
        assert notes(recipe(mfac(devices=("cuda:0",), gradients_device="cpu"))) == ()

    def test_what_is_held_and_from_where_pruning_begins(self):
        assert notes(recipe(ConstantSettings(start_epoch=2.0), magnitude(initial_sparsity=FROM_PARAM))) == (
            "ConstantPruningModifier 1: keeps the zeros that exist at epoch 2",
            "MagnitudePruningModifier 2: starts at the sparsity that the weights have when it is attached",
        )
        assert only(notes(recipe(ConstantSettings(end_epoch=5.0)))).endswith("at epoch 0 until epoch 5")


class TestModel:
    WEIGHTS = {"a.weight": 600, "b.weight": 400}

    def plan(self, *settings: object, weights: object = None, steps_per_epoch: int = 10, **options: object) -> Plan:
        return plan_model(settings, [self.WEIGHTS] if weights is None else weights, steps_per_epoch, **options)

    def test_matched_weights_steps_and_memory(self):
        settings = mfac(num_gradients={0.0: 16, 0.4: 32}, interpolation="linear", update_frequency=2.0)
        (modifier,) = self.plan(settings, EpochRange(end_epoch=9.0)).modifiers
        assert (modifier.modifier, modifier.weights, modifier.num_weights) == (
            "MFACPruningModifier",
            self.WEIGHTS,
            1000,
        )
        assert modifier.steps == (
            ("MFACPruningModifier", 2.0, 20, 0.0, None),
            ("MFACPruningModifier", 4.0, 40, 0.4, 16),
            ("MFACPruningModifier", 6.0, 60, 0.8, 32),
        )
        assert modifier.window == (32, 600)
        assert modifier.window_bytes == 32 * 600 * 4

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"num_gradients": {0.0: 8, 0.3: 16, 0.7: 99}},
            {"num_gradients": {0.0: 64, 0.5: 65}},
            {"initial_sparsity": 0.5, "update_frequency": 0.3},
        ],
    )
    def test_the_window_is_that_of_the_memory_check(self, changes):
        settings = mfac(**changes)
        (modifier,) = self.plan(settings, weights=[{"a": 997}]).modifiers
        assert modifier.window == WindowMemory(settings, 997, pruning_schedule(settings, 10)).peak()

    def test_the_bytes_are_those_of_the_check_before_the_run(self, monkeypatch):
        settings = mfac(num_gradients=500, initial_sparsity=0.2, end_epoch=3.0, block_size=2)
        with_the_next_window, one_window = 4 * 500 * (1000 + 800), 4 * 500 * 1000
        to_compute = 2 * (2 * 4 * 500 * 2 + 8 * 8 * 2 * 2)  # a block of 500 x 2 and a copy, factors of 2 x 2 in float64
        for sampled, needed in ((False, with_the_next_window), (True, one_window + to_compute)):
            assert self.plan(settings, sampled=sampled).needed_bytes == needed
            weights = {name: np.ones(size, np.float32) for name, size in self.WEIGHTS.items()}
            for lacking in (0, 1):
                monkeypatch.setattr(NumpyBackend, "free_bytes", lambda *_, free=needed - lacking: free)
                with pytest.raises(MemoryBudgetError) if lacking else nullcontext():
                    make_pruner(settings, weights, steps_per_epoch=10, live_gradients=not sampled)

    def test_gradients_of_training_count_as_such_beside_a_sampler(self):
        settings = mfac(initial_sparsity=0.2, gradient_origin="training")
        assert self.plan(settings, sampled=True).needed_bytes == self.plan(settings).needed_bytes

    def test_the_bytes_of_all_modifiers_are_summed(self):
        plan = self.plan(
            mfac(params="a"), magnitude(params="b"), mfac(params="c"), weights=[{"a": 9}, {"b": 9}, {"c": 4}]
        )
        assert [each.window_bytes for each in plan.modifiers] == [64 * 9 * 4, 0, 64 * 4 * 4]
        assert plan.window_bytes == 64 * 13 * 4
        assert plan.needed_bytes == sum(each.needed_bytes for each in plan.modifiers) > plan.window_bytes

    def test_a_sound_plan_has_no_warnings(self):
        assert self.plan(mfac(num_gradients=20), EpochRange(end_epoch=6.0)).warnings == ()
        assert self.plan(mfac(num_gradients=20), epochs=6.0).warnings == ()

    def test_windows_that_cannot_fill_in_time(self):
        assert "has 20 of 21 gradient samples" in only(self.plan(mfac(num_gradients=21, initial_sparsity=0.1)).warnings)
        early = mfac(num_gradients=9, start_epoch=0.0, initial_sparsity=0.1)
        assert "before there is any gradient" in only(self.plan(early).warnings)

    def test_a_sampler_fills_them_unless_gradients_of_training_are_wanted(self):
        assert self.plan(mfac(num_gradients=21, start_epoch=0.0), sampled=True).warnings == ()
        of_training = mfac(num_gradients=21, initial_sparsity=0.1, gradient_origin="training")
        assert "has 20 of 21 gradient samples" in only(self.plan(of_training, sampled=True).warnings)

    @pytest.mark.parametrize(
        ("epochs", "expected"), [(5.5, "training at epoch 5.5; train"), (None, "epoch 5 (EpochRangeModifier); train")]
    )
    def test_a_final_sparsity_that_is_not_reached(self, epochs, expected):
        warning = only(self.plan(magnitude(), EpochRange(end_epoch=5.0), epochs=epochs).warnings)
        assert warning.startswith(
            "MagnitudePruningModifier: final_sparsity 0.8 is not reached, because its end_epoch 6"
        )
        assert expected in warning

    def test_the_epochs_given_count_more_than_those_of_the_recipe(self):
        assert self.plan(magnitude(), EpochRange(end_epoch=5.0), epochs=6.0).warnings == ()

    def test_two_modifiers_on_one_parameter(self):
        both = [{"a": 1, "b": 2}, {"b": 2, "c": 3}]
        assert only(self.plan(magnitude(params="re:[ab]"), magnitude(params="re:[bc]"), weights=both).warnings) == (
            "MagnitudePruningModifier 1 and MagnitudePruningModifier 2 prune the same parameters (b), so more is "
            "pruned than either says; give each weight to one modifier"
        )
        assert self.plan(magnitude(), ConstantSettings(start_epoch=6.0), weights=both).warnings == ()

    def test_holding_zeros_prunes_nothing_more(self):
        for settings in ([magnitude(), ConstantSettings()], [ConstantSettings(), magnitude()]):
            warning = only(self.plan(*settings, weights=[{"a": 1}] * 2).warnings)
            assert "more is pruned" not in warning
            assert "cover the same parameters (a) at the same time, and ConstantPruningModifier" in warning
            assert " only keeps zeros; let one start when the other ends" in warning

    @pytest.mark.parametrize(("epoch", "count"), [(1.0, 0), (2.0, 0), (4.0, 1), (6.0, 0), (7.0, 0)])
    def test_a_single_pruning_step_amid_those_of_another_modifier(self, epoch, count):
        at_once = magnitude(start_epoch=epoch, end_epoch=epoch)
        for settings in ([magnitude(), at_once], [at_once, magnitude()]):
            assert len(self.plan(*settings, weights=[{"a": 1}] * 2).warnings) == count
            assert self.plan(*settings, weights=[{"a": 1}] * 2).warnings == lint_one_shot(
                [(each, each) for each in settings], [["a"], ["a"]]
            )

    def test_long_lists_of_shared_parameters_are_cut_short(self):
        many = {f"layer{number}": 1 for number in range(9)}
        assert "(layer0, layer1, layer2 and 6 more)" in only(
            self.plan(magnitude(), magnitude(), weights=[many] * 2).warnings
        )

    def test_two_final_sparsities_on_one_parameter(self):
        grouped = magnitude(final_sparsity={0.5: ("re:a",), 0.6: ("re:.*",)})
        warning = only(self.plan(grouped, weights=[{"a": 1}, {"a": 1, "b": 1}]).warnings)
        assert warning.startswith(
            "MagnitudePruningModifier (0.5) and MagnitudePruningModifier (0.6) prune the same par"
        )

    def test_a_modifier_that_matches_nothing(self):
        assert only(self.plan(magnitude(), weights=[{}]).warnings) == (
            "MagnitudePruningModifier: no weights match params; nothing is pruned"
        )

    def test_each_group_of_weights_needs_its_mapping(self):
        grouped = magnitude(final_sparsity={0.5: ("a",), 0.6: ("b",)})
        with pytest.raises(ValueError, match="weights: 1 mappings for 2 groups of weights"):
            self.plan(grouped)


@pytest.mark.parametrize("function", [lint, describe])
def test_steps_per_epoch_is_checked(function):
    with pytest.raises(SettingError, match="steps_per_epoch: 0 must be a positive integer"):
        function(recipe(mfac()), 0)


def test_plan_model_checks_the_steps_per_epoch():
    with pytest.raises(SettingError, match="steps_per_epoch: 0 must be a positive integer"):
        plan_model([mfac()], [{"a": 1}], 0)


def curve(**changes: object) -> LearningRateFunction:
    return LearningRateFunction(
        **{"function": "linear", "initial": 0.1, "final": 0.0, "start_epoch": 1.0, "end_epoch": 3.0, **changes}
    )


ZEROS = ConstantSettings()


class TestTrainingModifiers:
    @pytest.mark.parametrize(
        ("one", "other", "count"),
        [
            (curve(), SetLearningRate(learning_rate=0.5, start_epoch=2.0), 1),
            (SetLearningRate(learning_rate=0.5, start_epoch=2.0), curve(), 1),
            (curve(), curve(start_epoch=2.0, end_epoch=9.0), 1),
            (curve(), curve(start_epoch=3.0, end_epoch=9.0), 0),
            (curve(), SetLearningRate(learning_rate=0.5, start_epoch=1.0), 0),
            (curve(), SetLearningRate(learning_rate=0.5, start_epoch=3.0), 0),
            (curve(param_groups=(0,)), SetLearningRate(learning_rate=0.5, start_epoch=2.0, param_groups=(1,)), 0),
            (curve(param_groups=(0,)), SetLearningRate(learning_rate=0.5, start_epoch=2.0, param_groups=(0, 1)), 1),
            (curve(param_groups=(0,)), SetLearningRate(learning_rate=0.5, start_epoch=2.0), 1),
            (curve(), SetWeightDecay(weight_decay=0.5, start_epoch=2.0), 0),
        ],
    )
    def test_two_learning_rates_at_once(self, one, other, count):
        warnings = lint(recipe(one, other, mfac()))
        assert len(warnings) == count
        assert plan_model([one, other, ZEROS], [{"a": 1}], 10).warnings == warnings
        if count:
            assert "at epoch 2, while LearningRateFunctionModifier moves it from epoch 1 to 3" in only(warnings)

    def test_what_begins_after_the_end_of_training_does_nothing(self):
        late = SetWeightDecay(weight_decay=0.1, start_epoch=6.0)
        assert lint(recipe(late, mfac())) == ()
        assert only(lint(recipe(late, mfac(), EpochRange(end_epoch=6.0)))) == (
            "SetWeightDecayModifier: nothing happens, because its start_epoch 6 lies at or after the end of training "
            "at epoch 6 (EpochRangeModifier); train longer or begin earlier"
        )
        assert "end of training at epoch 5;" in only(plan_model([late, ZEROS], [{"a": 1}], 10, epochs=5.0).warnings)

    def test_shorter_training_than_the_recipe_is_for(self):
        assert only(plan_model([EpochRange(end_epoch=9.0), ZEROS], [{"a": 1}], 10, epochs=8).warnings) == (
            "training ends at epoch 8, but the recipe trains until epoch 9 (EpochRangeModifier)"
        )
        assert plan_model([EpochRange(end_epoch=9.0), ZEROS], [{"a": 1}], 10, epochs=9).warnings == ()
        assert plan_model([EpochRange(end_epoch=9.0), ZEROS], [{"a": 1}], 10).warnings == ()

    def test_a_recipe_that_does_not_prune_is_legal_and_said(self):
        settings = SetLearningRate(learning_rate=0.5)
        warning = only(plan_model([settings], [], 10).warnings)
        assert (warning,) == lint(recipe(settings))
        assert warning == "the recipe has no pruning modifier: nothing is pruned"

    @pytest.mark.parametrize(
        ("freezing", "names", "count"),
        [
            ({"start_epoch": 3.0}, "ab", 1),
            ({"start_epoch": 6.0}, "ab", 1),
            ({"start_epoch": 6.5}, "ab", 0),
            ({"start_epoch": 0.0, "end_epoch": 2.0}, "ab", 0),
            ({"start_epoch": 0.0, "end_epoch": 2.5}, "ab", 1),
            ({"start_epoch": 3.0}, "c", 0),
            ({"start_epoch": 3.0, "trainable": True}, "ab", 0),
        ],
    )
    def test_pruning_what_is_frozen(self, freezing, names, count):
        settings = TrainableParams(**{"params": ("re:.*",), "trainable": False, **freezing})
        plan = plan_model([magnitude(), settings], [{"a": 5, "b": 5}], 10, trainable=[(settings, names)])
        assert len(plan.warnings) == count
        if count:
            assert "MagnitudePruningModifier prunes a, b while TrainableParamsModifier freezes" in only(plan.warnings)
