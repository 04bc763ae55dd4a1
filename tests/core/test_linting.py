from __future__ import annotations

import pytest

from mfac_core.errors import SettingError
from mfac_core.recipe import EpochRange, Recipe, SetLearningRate
from mfac_core.recipe.linting import describe, lint
from mfac_core.settings import MagnitudeSettings, MFACSettings, PruningSettings


def recipe(*modifiers) -> Recipe:
    return Recipe(modifiers=modifiers, source="<text>")


def mfac(**changes: object) -> MFACSettings:
    return MFACSettings(**{"final_sparsity": 0.8, "start_epoch": 2.0, "end_epoch": 6.0, **changes})


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
        warning = only(lint(recipe(mfac(num_gradients=21)), steps_per_epoch=10))
        assert warning.startswith(
            "MFACPruningModifier: the pruning step at epoch 2 (optimizer step 20) falls due while its gradient window "
            "has 20 of 21 rows, and uses those; "
        )

    def test_a_window_that_is_just_full_is_not_named(self):
        assert lint(recipe(mfac(num_gradients=20)), steps_per_epoch=10) == ()

    def test_it_needs_the_steps_per_epoch(self):
        assert lint(recipe(mfac(num_gradients=10**6))) == ()

    def test_rows_outlive_a_pruning_step(self):
        # 20 rows at epoch 2 and 10 more per epoch: the window of 40 rows is full at epoch 4.
        warning = only(lint(recipe(mfac(num_gradients=40)), steps_per_epoch=10))
        assert "20 of 40 rows, and uses those (the first of 2 such steps);" in warning

    def test_a_window_that_grows_faster_than_rows_arrive(self):
        # Sparsity 0.4 is reached at epoch 4, so the step at epoch 5 is the first to want 31 rows; 20 + 10 are there.
        growing = mfac(num_gradients={0.0: 20, 0.4: 31}, interpolation="linear")
        warning = only(lint(recipe(growing), steps_per_epoch=10))
        assert "the pruning step at epoch 5 (optimizer step 50)" in warning
        assert "has 30 of 31 rows, and uses those;" in warning

    def test_magnitude_needs_no_window(self):
        assert lint(recipe(magnitude(start_epoch=0.0)), steps_per_epoch=1) == ()


class TestStartBeforeAnyGradient:
    @pytest.mark.parametrize("steps_per_epoch", [None, 100])
    def test_a_start_at_epoch_0_waits(self, steps_per_epoch):
        warning = only(lint(recipe(mfac(start_epoch=0.0, num_gradients=8)), steps_per_epoch))
        assert warning.startswith(
            "MFACPruningModifier: the first pruning step is due at epoch 0, before there is any grad"
        )
        assert "waits for its first window of 8 rows" in warning

    def test_a_start_that_rounds_to_step_0_waits(self):
        early = recipe(mfac(start_epoch=0.01, num_gradients=8))
        assert lint(early) == ()
        assert "due at epoch 0.01, before there is any gradient" in only(lint(early, steps_per_epoch=10))


class TestEndOfTraining:
    def test_pruning_that_ends_after_training(self):
        warning = only(lint(recipe(EpochRange(end_epoch=5.0), mfac())))
        assert warning == (
            "MFACPruningModifier: final_sparsity 0.8 is not reached, because its end_epoch 6 lies after the end of "
            "training at epoch 5 (EpochRangeModifier); train longer or end pruning earlier"
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

    def test_other_params_are_fine(self):
        assert lint(recipe(mfac(params=("a",)), magnitude(params=("b",)))) == ()


class TestDescribe:
    def test_rows_with_steps(self):
        settings = mfac(num_gradients={0.0: 64, 0.4: 128, 0.8: 256}, interpolation="linear", update_frequency=2.0)
        assert describe(recipe(settings), steps_per_epoch=10) == [
            ("MFACPruningModifier", 2.0, 20, 0.0, 64),
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
        assert names(magnitude(scope="global"), mfac()) == ["GMPruningModifier 1", "MFACPruningModifier 2"]

    def test_magnitude_has_no_gradients(self):
        assert {row.num_gradients for row in describe(recipe(magnitude()))} == {None}

    def test_modifiers_that_do_not_prune_have_no_rows(self):
        assert describe(recipe(EpochRange(end_epoch=3.0), SetLearningRate(learning_rate=0.1))) == []


@pytest.mark.parametrize("function", [lint, describe])
def test_steps_per_epoch_is_checked(function):
    with pytest.raises(SettingError, match="steps_per_epoch: 0 must be a positive integer"):
        function(recipe(mfac()), 0)
