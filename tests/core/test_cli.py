from __future__ import annotations

import importlib.metadata
import json
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
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150"})


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


def test_check_says_what_is_decided_later(write_recipe: Callable[[str], Path]) -> None:
    output = mfac("check", write_recipe(RECIPE)).stdout

    assert "note: MFACPruningModifier: computes where the model is" in output
    assert "on this machine" not in output


def test_check_takes_every_modifier(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe(
        """
epochs: 8
m_modifiers:
  - !EpochRangeModifier {end_epoch: eval(epochs)}
  - !ACDCPruningModifier {compression_sparsity: 0.9, end_epoch: 4}
  - !ConstantPruningModifier {start_epoch: 4}
  - !GMPruningModifier {final_sparsity: {0.5: a}, params: [], init_sparsity: __FROM_PARAM__, end_epoch: 1}
  - !LearningRateFunctionModifier {lr_func: cosine, init_lr: 0.1, final_lr: 0.0, end_epoch: eval(epochs)}
  - !QuantizationModifier {start_epoch: 3}
"""
    )

    assert "QuantizationModifier is not supported" in mfac("check", path).stderr

    result = mfac("check", path, "--skip-unsupported", "--variables", "epochs=3", "--steps-per-epoch", "10")

    assert result.exit_code == 0
    assert table_rows(result.stdout) == [
        ["ACDCPruningModifier", "1", "0", "0", "0.00%", "-"],
        ["ACDCPruningModifier", "1", "1", "10", "90.00%", "-"],
        ["ACDCPruningModifier", "1", "2", "20", "0.00%", "-"],
        ["ACDCPruningModifier", "1", "3", "30", "90.00%", "-"],
        ["ACDCPruningModifier", "1", "4", "40", "90.00%", "-"],
        ["GMPruningModifier", "3", "1", "10", "50.00%", "-"],
    ]
    assert ["GMPruningModifier", "3", "0", "0", "-", "-"] in [line.split() for line in result.stdout.splitlines()]
    assert "note: ConstantPruningModifier 2: holds the zeros that are there at epoch 4" in result.stdout
    assert "warning: ACDCPruningModifier 1: its last compressed phase is not reached" in result.stdout
    assert result.stdout.endswith("7 pruning steps, 1 warning\n")


def test_plan_counts_weights_steps_and_bytes(write_recipe: Callable[[str], Path]) -> None:
    result = mfac("plan", write_recipe(RECIPE), "--weights", "1000000", "--steps-per-epoch", "200")

    assert result.exit_code == 0
    assert ["MFACPruningModifier", "1", "1,000,000", "64", "x", "1,000,000", "256.0", "MB"] in [
        line.split() for line in result.stdout.splitlines()
    ]
    assert table_rows(result.stdout)[1] == ["MFACPruningModifier", "2", "400", "75.00%", "64"]
    assert result.stdout.endswith("3 pruning steps, 0 warnings, 256.0 MB for gradient windows\n")


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_plan_finds_the_weights_in_a_file(write_recipe: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    shapes = {"fc.weight": [10, 20], "fc.bias": [10], "conv.weight": [4, 3, 2, 2]}
    path = tmp_path / f"model.{kind}"
    if kind == "json":
        path.write_text(json.dumps(shapes))
    else:
        header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"weights")

    def counted(params: str) -> list[str]:
        recipe = write_recipe(RECIPE.replace("params: __ALL_PRUNABLE__", f"params: {params}"))
        output = mfac("plan", recipe, "--shapes", path, "--steps-per-epoch", "200").stdout
        return next(line.split() for line in output.splitlines() if "MFACPruningModifier" in line)[1:3]

    assert counted("__ALL_PRUNABLE__") == ["2", "248"]
    assert counted("__ALL__") == ["3", "258"]
    assert counted("[fc.bias, 're:conv']") == ["2", "58"]


def test_plan_takes_each_final_sparsity_on_its_own(write_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"a.weight": [10, 20], "b.weight": [3, 3]}')
    path = write_recipe(
        "m_modifiers:\n  - !GMPruningModifier {final_sparsity: {0.5: a.weight, 0.75: 're:b'}, end_epoch: 1}\n"
    )

    lines = [
        line.split()
        for line in mfac("plan", path, "--shapes", tmp_path / "model.json", "--steps-per-epoch", 5).stdout.splitlines()
    ]

    assert ["GMPruningModifier", "(0.5)", "1", "200", "-", "-"] in lines
    assert ["GMPruningModifier", "(0.75)", "1", "9", "-", "-"] in lines


def test_plan_prints_the_warnings(write_recipe: Callable[[str], Path]) -> None:
    arguments = ["plan", write_recipe(RECIPE), "--weights", "10", "--steps-per-epoch", "10"]

    assert "warning: MFACPruningModifier: the pruning step at epoch 1 (optimizer step 10)" in mfac(*arguments).stdout
    assert "warning:" not in mfac(*arguments, "--sampled").stdout
    assert "final_sparsity 0.85 is not reached" in mfac(*arguments, "--sampled", "--epochs", "2").stdout


def test_the_epochs_given_to_plan_count_whatever_the_recipe_says(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe(RECIPE + "epoch_modifiers:\n  - !EpochRangeModifier {end_epoch: 2}\n")
    arguments = ["plan", path, "--weights", "10", "--steps-per-epoch", "10", "--sampled"]

    assert "is not reached" in mfac(*arguments).stdout
    assert "is not reached" not in mfac(*arguments, "--epochs", "99").stdout
    said = " ".join(mfac("plan", "--help").stdout.replace("│", " ").split())
    assert "Epochs of training, instead of the end of the recipe's" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file or directory; give a JSON file of names and shapes"),
        ("[1]", "this must map names to shapes"),
        ("{", "this is neither JSON nor a safetensors file"),
        ('{"a": [1, "2"]}', "a: [1, '2'] is not a shape; write a list of lengths"),
    ],
)
def test_plan_refuses_other_files(
    write_recipe: Callable[[str], Path], tmp_path: Path, content: str | None, expected: str
) -> None:
    path = tmp_path / "model.json"
    if content is not None:
        path.write_text(content)

    result = mfac("plan", write_recipe(RECIPE), "--shapes", path, "--steps-per-epoch", "10")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: ")
    assert expected in result.stderr


def test_plan_refuses_a_safetensors_file_that_is_none(write_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a safetensors file")

    assert (
        "this is not a safetensors file"
        in mfac("plan", write_recipe(RECIPE), "--shapes", path, "--steps-per-epoch", "10").stderr
    )


@pytest.mark.parametrize("arguments", [[], ["--weights", "5", "--shapes", "model.json"]])
def test_plan_needs_weights_or_shapes(write_recipe: Callable[[str], Path], arguments: list[str]) -> None:
    result = mfac("plan", write_recipe(RECIPE), "--steps-per-epoch", "10", *arguments)

    assert result.exit_code == 2
    assert "give either --weights or --shapes" in result.stderr


def test_plan_refuses_a_pattern_that_is_none(write_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"a": [2, 2]}')
    path = write_recipe(RECIPE.replace("__ALL_PRUNABLE__", "'re:('"))

    result = mfac("plan", path, "--shapes", tmp_path / "model.json", "--steps-per-epoch", "10")

    assert "params: 're:(' is not a regular expression" in result.stderr


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
