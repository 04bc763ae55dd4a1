from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

import mfac_core
from mfac_core.cli import app
from mfac_core.report import RunRecord, write_json

RECIPE = """
pruning_modifiers:
  - !MFACPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.85
    start_epoch: 1.0
    end_epoch: 3.0
    update_frequency: 1.0
    num_grads: {0.0: 64, 0.5: 128}
"""


def mfac(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def demo_module() -> Iterator[ModuleType]:
    module = ModuleType("a_demo")
    sys.modules["a_demo"] = module
    yield module
    del sys.modules["a_demo"]


def install_demo(monkeypatch: pytest.MonkeyPatch, *demos: EntryPoint) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: EntryPoints(demos).select(group=group))


def entry_point(value: str, *, name: str = "torch", group: str = "mfac_core.demos") -> EntryPoint:
    return EntryPoint(name=name, value=value, group=group)


def table_rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if "%" in line]


def test_version_is_that_of_the_package() -> None:
    result = mfac("--version")

    assert (result.exit_code, result.stdout) == (0, f"mfac {mfac_core.__version__}\n")


def test_python_dash_m_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mfac_core", "check", str(tmp_path / "missing.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 2
    assert "missing.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_check_shows_each_pruning_step_with_epoch_step_sparsity_and_gradients(
    write_recipe: Callable[[str], Path],
) -> None:
    result = mfac("check", write_recipe(RECIPE), "--steps-per-epoch", "200")

    assert result.exit_code == 0
    assert table_rows(result.stdout) == [
        ["MFACPruningModifier", "1", "200", "5.00%", "64"],
        ["MFACPruningModifier", "2", "400", "75.00%", "64"],
        ["MFACPruningModifier", "3", "600", "85.00%", "128"],
    ]
    assert result.stdout.endswith("3 pruning steps, 0 warnings\n")


def test_check_without_steps_per_epoch_leaves_the_steps_open(write_recipe: Callable[[str], Path]) -> None:
    rows = table_rows(mfac("check", write_recipe(RECIPE)).stdout)

    assert [row[2] for row in rows] == ["-", "-", "-"]


def test_check_prints_the_warnings_and_counts_them(write_recipe: Callable[[str], Path]) -> None:
    result = mfac("check", write_recipe(RECIPE), "--steps-per-epoch", "10")

    assert result.exit_code == 0
    assert "warning: MFACPruningModifier: the pruning step at epoch 1" in result.stdout
    assert result.stdout.endswith("3 pruning steps, 1 warning\n")


def test_check_of_a_recipe_that_prunes_nothing_shows_no_table(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe("training_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: 5.0\n")

    assert mfac("check", path).stdout == f"{path}: 0 pruning steps, 0 warnings\n"


def test_check_reports_a_wrong_value_with_its_line_on_stderr_and_exits_2(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe(RECIPE.replace("0.85", "1.85"))

    result = mfac("check", path)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {path}:6: MFACPruningModifier.final_sparsity: 1.85")
    assert "Traceback" not in result.output


def test_check_prints_brackets_of_a_message_as_they_are(write_recipe: Callable[[str], Path]) -> None:
    result = mfac("check", write_recipe(RECIPE + '    available_gpus: ["cuda:0", "cuda:0"]\n'))

    assert result.exit_code == 2
    assert "['cuda:0', 'cuda:0'] names a device twice" in result.stderr


def test_check_warns_of_devices_that_are_not_here(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe(
        """
pruning_modifiers:
  - !MFACPruningModifier
    final_sparsity: 0.8
    start_epoch: 1.0
    end_epoch: 4.0
    available_gpus: ["gpu0"]
"""
    )
    result = mfac("check", path)
    assert result.exit_code == 0
    assert "warning: on this machine: device 'gpu0' does not exist here" in result.output


def test_check_of_a_missing_file_names_it(tmp_path: Path) -> None:
    result = mfac("check", tmp_path / "missing.yaml")

    assert result.exit_code == 2
    assert str(tmp_path / "missing.yaml") in result.stderr


def test_check_refuses_zero_steps_per_epoch(write_recipe: Callable[[str], Path]) -> None:
    assert mfac("check", write_recipe(RECIPE), "--steps-per-epoch", "0").exit_code == 2


@pytest.mark.parametrize("given", ["folder", "file"])
def test_report_shows_the_records_and_facts_of_a_run(tmp_path: Path, given: str) -> None:
    write_json([RunRecord("M-FAC one-shot", 0.5, 0.9, 0.875, 2.0)], tmp_path / "run.json", random_seed=7)

    result = mfac("report", tmp_path if given == "folder" else tmp_path / "run.json")

    assert result.exit_code == 0
    assert table_rows(result.stdout) == [["M-FAC", "one-shot", "50.00%", "90.00%", "87.50%", "-2.50", "2.0", "s"]]
    assert "random seed: 7" in result.stdout


def test_report_of_a_folder_without_a_run_names_the_file_it_looked_for(tmp_path: Path) -> None:
    result = mfac("report", tmp_path)

    assert result.exit_code == 2
    assert str(tmp_path / "run.json") in result.stderr


def test_report_of_another_file_says_what_to_give_instead(write_recipe: Callable[[str], Path]) -> None:
    result = mfac("report", write_recipe(RECIPE))

    assert result.exit_code == 2
    assert "is not JSON" in result.stderr
    assert "mfac demo" in result.stderr


def test_demo_passes_its_options_to_the_runner_of_the_framework(
    monkeypatch: pytest.MonkeyPatch, demo_module: ModuleType, tmp_path: Path
) -> None:
    calls: list[dict[str, object]] = []
    demo_module.run = lambda **options: calls.append(options)
    install_demo(monkeypatch, entry_point("a_demo:run"), entry_point("another:run", name="other"))

    first = mfac("demo")
    second = mfac("demo", "--recipe", tmp_path / "r.yaml", "--output", tmp_path / "out", "--seed", "5")

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert calls == [
        {"recipe": None, "output": Path("mfac-demo"), "seed": 0},
        {"recipe": tmp_path / "r.yaml", "output": tmp_path / "out", "seed": 5},
    ]


def test_demo_without_a_runner_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install_demo(monkeypatch)

    result = mfac("demo")

    assert result.exit_code == 2
    assert 'pip install "mfac-core[demo,torch]"' in result.stderr


def test_demo_of_an_unknown_framework_names_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install_demo(monkeypatch, entry_point("a_demo:run"))

    result = mfac("demo", "--framework", "jax")

    assert result.exit_code == 2
    assert "'jax'" in result.stderr
    assert "the demos found are: torch" in result.stderr


def test_demo_whose_framework_is_not_installed_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install_demo(monkeypatch, entry_point("a_framework_that_is_not_there:run"))

    result = mfac("demo")

    assert result.exit_code == 2
    assert "a_framework_that_is_not_there is not installed" in result.stderr
    assert 'pip install "mfac-core[demo,torch]"' in result.stderr


def test_demo_reports_a_recipe_error_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, demo_module: ModuleType, write_recipe: Callable[[str], Path]
) -> None:
    demo_module.run = lambda recipe, **options: mfac_core.load_recipe(recipe)
    install_demo(monkeypatch, entry_point("a_demo:run"))

    result = mfac("demo", "--recipe", write_recipe(RECIPE.replace("0.85", "1.85")))

    assert result.exit_code == 2
    assert "final_sparsity: 1.85" in result.stderr
