"""What the demos of all frameworks share, without a framework."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from mfac_core import (
    ConstantSettings,
    MagnitudeSettings,
    MFACSettings,
    RecipeError,
    SettingError,
    load_recipe,
)
from mfac_core.demo import runs as demo_runs
from mfac_core.demo.runs import Demo, Pruned
from mfac_core.files import write_file
from mfac_core.recipe import Recipe
from mfac_core.recipe.recommended import differs_line
from mfac_core.report.run import RunRecord, read_json
from mfac_core.settings.training import LearningRateFunction


def record(method: str, before: float, after: float, seconds: float) -> RunRecord:
    history = ((0.0, 0.9, 0.0), (1.0, 0.8, 0.5))
    return RunRecord(method, 0.5, before, after, seconds, history, layer_sparsity={"a": 0.5}, layer_sizes={"a": 2})


def demo_that(
    train_dense: Callable[[Callable[[int], None]], object], asked: list[tuple[object, ...]] | None = None
) -> Callable[[int], Demo]:
    asked = [] if asked is None else asked

    def of_seed(seed: int) -> Demo:
        def train_by_recipe(recipe: Recipe, method: str, network: object, advance: Callable[[int], None]) -> Pruned:
            asked.append((seed, method, recipe.max_epochs, recipe.pruning, network))
            return Pruned(record(f"{method} gradual", 0.8, 0.85, 3.0), f"trained {network}", {"a": np.ones(2)})

        def prune_in_one_shot(recipe: Recipe, method: str, dense: object) -> Pruned:
            asked.append((seed, method, 0, recipe.pruning, dense))
            return Pruned(record(f"{method} one-shot", 0.9, 0.8, 1.0), f"pruned {dense}", {"a": np.ones(2)})

        def save(result: Pruned, network: Path, masks: Path) -> None:
            write_file(network, str(result.model).encode())
            write_file(masks, b"masks")

        return Demo(
            framework="none",
            versions={},
            check_params=lambda params, exclude: None,
            train_dense=train_dense,
            train_by_recipe=train_by_recipe,
            prune_in_one_shot=prune_in_one_shot,
            num_test_images=540,
            files=("network.bin", "masks.bin"),
            save=save,
        )

    return of_seed


def dense_network(advance: Callable[[int], None]) -> object:
    return "dense network"


def must_not_train(advance: Callable[[int], None]) -> object:
    raise AssertionError("trained before the folder was looked at")


def a_file(folder: Path) -> Path:
    (folder / "taken").write_text("mine")
    return folder / "taken"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "deep" / "down"


def holds_a_folder(folder: Path) -> Path:
    (folder / "out" / "masks.bin").mkdir(parents=True)
    return folder / "out"


def read_only(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("nothing is read-only for the superuser")
    (folder / "out").mkdir(mode=0o555)
    return folder / "out"


def of_the_system(folder: Path) -> Path:
    if not Path("/proc").is_dir():
        pytest.skip("needs a folder in which nobody can make another")
    return Path("/proc/mfac")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (a_file, "taken is a file, and results need a folder"),
        (below_a_file, "taken is a file, and results need a folder"),
        (holds_a_folder, "masks.bin is a folder, but a file must be written there"),
        (read_only, "out cannot be written to"),
        (of_the_system, "/proc/mfac cannot be written to"),
    ],
)
def test_an_output_that_cannot_be_written_to_is_refused_before_any_training(
    tmp_path: Path, make: Callable[[Path], Path], expected: str
) -> None:
    with pytest.raises(SettingError, match="give --output a folder that can be written to") as caught:
        demo_runs.run(demo_that(must_not_train), recipe=None, output=make(tmp_path), seed=0)

    assert expected in str(caught.value)
    assert not (tmp_path / "taken").exists() or (tmp_path / "taken").read_text() == "mine"


def test_a_recipe_that_prunes_nothing_is_refused_before_any_training(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("training_modifiers:\n  - !EpochRangeModifier {end_epoch: 3}\n")

    with pytest.raises(RecipeError, match=r"recipe.yaml: this recipe prunes nothing gradually"):
        demo_runs.run(demo_that(must_not_train), recipe=tmp_path / "recipe.yaml", output=tmp_path, seed=0)


def test_a_recipe_runs_with_one_seed_which_is_called_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, recipe = tmp_path / "new" / "run", demo_runs.recipe_path("digits_gradual.yaml")
    asked: list[tuple[object, ...]] = []

    demo_runs.run(demo_that(dense_network, asked), recipe=recipe, output=output, seed=5)

    printed = capsys.readouterr().out
    assert "This is an example with one seed (5): another seed or another processor gives other numbers." in printed
    assert "network.bin (the network pruned by M-FAC gradual)" in printed
    assert {path.name for path in output.iterdir()} == {"network.bin", "masks.bin", "run.json", "report.png"}
    records, facts = read_json(output / "run.json")
    assert [each.method for each in records] == ["M-FAC gradual", "magnitude gradual"]
    assert (facts["seed"], facts["recipe"]) == (5, str(recipe))
    assert [(seed, method, epochs) for seed, method, epochs, *_ in asked] == [(5, "M-FAC", 8), (5, "magnitude", 8)]


def test_the_comparison_prunes_and_trains_the_same_way_by_both_methods_for_each_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []

    demo_runs.run(demo_that(dense_network, asked), recipe=None, output=tmp_path, seed=7, seeds=2)

    records, facts = read_json(tmp_path / "run.json")
    one_seed = [(method, epochs) for method in demo_runs.METHODS for epochs in (0, 2, 20)] * 2
    assert [(each.method, each.epochs_after) for each in records] == one_seed * 2
    assert [each.seed for each in records] == [7] * 12 + [8] * 12
    assert facts["seeds"] == [7, 8]
    assert {each.accuracy_before for each in records} == {0.9}  # of the dense network, also after further training
    assert [each.seconds for each in records[:3]] == [1.0, 4.0, 4.0]  # of pruning, and of training after it
    assert [(seed, method, epochs) for seed, method, epochs, *_ in asked[:12]] == [(7, *each) for each in one_seed]
    for _, method, epochs, pruning, network in asked:
        (settings,) = pruning  # type: ignore[misc]
        assert network == ("pruned dense network" if epochs else "dense network")
        if epochs:
            assert isinstance(settings, ConstantSettings)
        else:
            assert isinstance(settings, MFACSettings if method == "M-FAC" else MagnitudeSettings)
            assert settings.scope == "global"
    shots = [pruning[0].final_sparsity for *_, epochs, pruning, _ in asked if not epochs]  # type: ignore[index]
    assert shots == [0.95, 0.95, 0.97, 0.97] * 2
    printed = capsys.readouterr().out
    for said in (
        "Means over 2 seeds (7 to 8) and 95% confidence intervals",
        "Read the rows with 20 epochs too: training repairs what pruning breaks",
        "On another processor the numbers differ slightly",
        "network.bin (the network pruned by M-FAC to 50%, with 2 epochs of training after, seed 7)",
    ):
        assert said in printed
    assert (tmp_path / "network.bin").read_text() == "trained pruned dense network"


def test_the_recipe_in_one_shot_has_the_recommended_settings() -> None:
    (settings,) = load_recipe(demo_runs.recipe_path(demo_runs.ONE_SHOT)).pruning

    assert differs_line(settings) == ""


def test_training_after_pruning_moves_the_learning_rate_alike_for_any_number_of_epochs() -> None:
    for epochs in (2, 20):
        recipe = load_recipe(demo_runs.recipe_path(demo_runs.FINE_TUNING), {"epochs": epochs})
        (rate,) = [each for each in recipe.modifiers if isinstance(each, LearningRateFunction)]

        assert recipe.max_epochs == rate.end_epoch == epochs
        assert (rate.function, rate.initial, rate.final) == ("linear", 0.08, 0.0)


def test_the_table_is_printed_even_if_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_runs.report, "write_json", full)

    with pytest.raises(OSError, match="No space left"):
        demo_runs.run(demo_that(dense_network), recipe=None, output=tmp_path, seed=0)

    assert "90.0" in capsys.readouterr().out


def test_a_missing_package_for_the_picture_is_noticed_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        demo_runs.run(demo_that(must_not_train), recipe=None, output=tmp_path, seed=0)
