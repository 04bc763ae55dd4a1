"""What the demos of all frameworks share, without a framework."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from mfac_core import RecipeError, SettingError, demo_runs
from mfac_core.demo_runs import Demo, Pruned
from mfac_core.files import write_file
from mfac_core.recipe import Recipe
from mfac_core.report import RunRecord, read_json


def record(method: str) -> RunRecord:
    return RunRecord(method, 0.5, 0.9, 0.8, 1.0, history=((0.0, 0.9, 0.0), (1.0, 0.8, 0.5)), layer_sparsity={"a": 0.5})


def demo_that(train_dense: Callable[[Callable[[int], None]], object]) -> Demo:
    def prune(
        recipe: Recipe, method: str, dense: object, advance: Callable[[int], None] = lambda epoch: None
    ) -> Pruned:
        return Pruned(
            record(f"{method} {'one-shot' if advance.__defaults__ else 'gradual'}"), b"network", {"a": np.ones(2)}
        )

    def save(result: Pruned, network: Path, masks: Path) -> None:
        write_file(network, result.model)
        write_file(masks, b"masks")

    return Demo("none", {}, lambda params, exclude: None, train_dense, prune, prune, ("network.bin", "masks.bin"), save)


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
        (holds_a_folder, "masks.bin is a folder, where a file is to be written"),
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


def test_the_table_is_called_an_example_and_all_files_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "run"

    demo_runs.run(demo_that(lambda advance: None), recipe=None, output=output, seed=5)

    printed = capsys.readouterr().out
    assert "This is one seed (5), an example: another seed or another processor gives other digits." in printed
    assert {path.name for path in output.iterdir()} == {"network.bin", "masks.bin", "run.json", "report.png"}
    records, facts = read_json(output / "run.json")
    assert len(records) == 4
    assert facts["seed"] == 5


def test_the_table_is_printed_even_if_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_runs.report, "write_json", full)

    with pytest.raises(OSError, match="No space left"):
        demo_runs.run(demo_that(lambda advance: None), recipe=None, output=tmp_path, seed=0)

    assert "90.00%" in capsys.readouterr().out


def test_a_missing_package_for_the_picture_is_noticed_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        demo_runs.run(demo_that(must_not_train), recipe=None, output=tmp_path, seed=0)
