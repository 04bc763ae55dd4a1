from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

import mfac_core
from mfac_core.backends import lookup
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.cli import app
from mfac_core.report.run import RunRecord, write_json

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
    global_sparsity: true
"""


def mfac(*arguments: str | int | Path, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150"}, input=input)


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

    assert mfac("check", path).stdout == (
        f"warning: the recipe has no pruning modifier: nothing is pruned\n{path}: 0 pruning steps, 1 warning\n"
    )


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

    assert "note: MFACPruningModifier: computes on the model's device" in output
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
    assert "note: ConstantPruningModifier 2: keeps the zeros that exist at epoch 4" in result.stdout
    assert "warning: ACDCPruningModifier 1: its last compressed phase is not reached" in result.stdout
    assert result.stdout.endswith("7 pruning steps, 1 warning\n")


def test_plan_counts_weights_steps_and_bytes(write_recipe: Callable[[str], Path]) -> None:
    result = mfac("plan", write_recipe(RECIPE), "--weights", "1000000", "--steps-per-epoch", "200")

    assert result.exit_code == 0
    assert ["MFACPruningModifier", "1", "1,000,000", "64", "x", "1,000,000", "499.2", "MB"] in [
        line.split() for line in result.stdout.splitlines()
    ]
    assert table_rows(result.stdout)[1] == ["MFACPruningModifier", "2", "400", "75.00%", "64"]
    assert result.stdout.endswith("3 pruning steps, 0 warnings, 499.2 MB of memory\n")
    # gradients of training need the next window of 64 x 950,000 beside that of 64 x 1,000,000; sampled ones do not
    sampled = mfac("plan", write_recipe(RECIPE), "--weights", "1000000", "--steps-per-epoch", "200", "--sampled")
    assert sampled.stdout.endswith("0 warnings, 258.2 MB of memory\n")


def test_plan_for_ranks_shows_what_each_keeps_and_sends(write_recipe: Callable[[str], Path]) -> None:
    arguments = ["plan", write_recipe(RECIPE), "--weights", "1000000", "--steps-per-epoch", "200", "--ranks"]

    result = mfac(*arguments, "8")

    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "On each of 8 ranks Keeps Sends per row Per pruning step" in lines
    assert "window of 63 blocks 32.3 MB" in lines  # 126,000 of the weights
    assert "weights replicated (DDP) 0 B <= 3.6 MB" in lines
    assert "weights sharded (FSDP2) <= 500.0 kB <= 1.2 MB" in lines
    assert "live rows that move <= 32.3 MB" in lines
    assert lines[-1].endswith("3 pruning steps, 0 warnings, 63.0 MB of memory on each of 8 ranks")
    assert max(map(len, lines[:-1])) <= 80
    assert "window of 1 block " in mfac("plan", write_recipe(RECIPE), "--weights", "9", *arguments[4:], "8").stdout
    for ranks in ("0", "-1", "x"):
        assert mfac(*arguments, ranks).exit_code == 2
    assert "On each of" not in mfac(*arguments[:-1]).stdout


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


def test_report_shows_means_and_intervals_of_a_run_over_seeds(tmp_path: Path) -> None:
    records = [RunRecord("M-FAC", 0.5, 0.9, after, 2.0, seed=seed) for seed, after in ((0, 0.86), (1, 0.88))]
    write_json(records, tmp_path / "run.json", framework="none")

    result = mfac("report", tmp_path)

    assert result.exit_code == 0
    assert ["50%", "M-FAC", "none", "87.0", "±", "12.7", "2.0", "s"] in table_rows(result.stdout)
    assert "Means over 2 seeds (0 to 1) and 95% confidence intervals of the mean" in result.stdout
    assert "framework: none" in result.stdout


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
    third = mfac("demo", "--seeds", "3")

    assert (first.exit_code, second.exit_code, third.exit_code) == (0, 0, 0)
    assert calls == [
        {"recipe": None, "output": Path("mfac-demo"), "seed": 0},
        {"recipe": tmp_path / "r.yaml", "output": tmp_path / "out", "seed": 5},
        {"recipe": None, "output": Path("mfac-demo"), "seed": 0, "seeds": 3},
    ]


def test_demo_refuses_several_seeds_for_a_recipe_and_none_at_all(tmp_path: Path) -> None:
    both = mfac("demo", "--recipe", tmp_path / "r.yaml", "--seeds", "3")

    assert both.exit_code == 2
    assert "give either --recipe or --seeds" in both.stderr
    assert mfac("demo", "--seeds", "0").exit_code == 2


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


# --- the kinds of terminals


def in_a_terminal(*arguments: str | Path, **variables: str) -> str:
    """Return what the command prints to a terminal, escape sequences included."""
    pty = pytest.importorskip("pty", reason="needs terminals as POSIX has them")
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    command = [sys.executable, "-m", "mfac_core", *map(str, arguments)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment | variables) as process:
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # how the end of a terminal looks
            while read := os.read(ours, 65536):
                printed += read
    os.close(ours)
    assert process.returncode in (0, 2)
    return printed.decode()


@pytest.mark.parametrize("what", ["warnings", "errors", "help", "usage"])
@pytest.mark.parametrize("plain", [{"NO_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_no_escape_sequences_where_colors_are_not_wanted(
    write_recipe: Callable[[str], Path], what: str, plain: dict[str, str]
) -> None:
    path = write_recipe(RECIPE if what == "warnings" else RECIPE.replace("0.85", "1.85"))
    arguments = {"help": ["check", "--help"], "usage": ["chek"]}.get(what, ["check", path, "--steps-per-epoch", "10"])

    printed = in_a_terminal(*arguments, **plain)

    assert {"warnings": "warning: ", "errors": "error: ", "help": "Usage: ", "usage": "No such command"}[
        what
    ] in printed
    assert "\x1b" not in printed


def test_warnings_are_yellow_and_errors_red_in_a_terminal(write_recipe: Callable[[str], Path]) -> None:
    assert "\x1b[33mwarning: " in in_a_terminal("check", write_recipe(RECIPE), "--steps-per-epoch", "10", TERM="xterm")
    assert "\x1b[31merror: " in in_a_terminal("check", "missing.yaml", TERM="xterm")


def test_no_escape_sequences_in_a_pipe(write_recipe: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "mfac_core", "check", str(write_recipe(RECIPE)), "--steps-per-epoch", "10"]
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"} | {"TERM": "xterm"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, encoding="utf-8")

    assert "warning: " in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_long_messages_stay_on_one_line_and_markup_is_text(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe(RECIPE.replace("__ALL_PRUNABLE__", '["[red]a", "\\e[31m", "re:("]'))

    message = mfac("check", path).stderr

    assert message.count("\n") == 1
    assert len(message) > 150
    assert "re:(" in message
    assert "\x1b" not in message


def test_escape_sequences_out_of_files_are_written_out(tmp_path: Path) -> None:
    write_json([RunRecord("\x1b[31mM-FAC", 0.5, 0.9, 0.875, 2.0)], tmp_path / "run.json", note="\x1b]0;title\x07")

    printed = mfac("report", tmp_path).stdout

    assert "\\x1b[31mM-FAC" in printed
    assert "note: \\x1b]0;title\\x07" in printed
    assert "\x1b" not in printed


# --- standard input, JSON, exit codes, completion


def test_check_reads_standard_input(write_recipe: Callable[[str], Path]) -> None:
    given = mfac("check", "-", "--steps-per-epoch", "200", input=RECIPE)

    assert given.exit_code == 0
    assert table_rows(given.stdout) == table_rows(
        mfac("check", write_recipe(RECIPE), "--steps-per-epoch", "200").stdout
    )
    assert given.stdout.endswith("<stdin>: 3 pruning steps, 0 warnings\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RECIPE.replace("0.85", "1.85"), "<stdin>:6: MFACPruningModifier.final_sparsity: 1.85"),
        ("", "<stdin>: the recipe is empty"),
        ("no recipe", "<stdin>:1: a recipe must be a mapping"),
        (b"\xff\xfe", "<stdin>: this is not UTF-8 text"),
    ],
)
def test_errors_in_standard_input_say_so(text: str | bytes, expected: str) -> None:
    result = mfac("check", "-", input=text)

    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {expected}")


def test_plan_reads_recipe_or_shapes_from_standard_input(write_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"a.weight": [10, 20]}')
    path = write_recipe(RECIPE)
    options = ["--steps-per-epoch", "200"]

    first = mfac("plan", "-", "--shapes", tmp_path / "model.json", *options, input=RECIPE)
    second = mfac("plan", path, "--shapes", "-", *options, input='{"a.weight": [10, 20]}')
    both = mfac("plan", "-", "--shapes", "-", *options, input=RECIPE)

    assert "<stdin>: 3 pruning steps" in first.stdout
    assert first.stdout.splitlines()[:-1] == second.stdout.splitlines()[:-1]
    assert both.exit_code == 2
    assert "standard input can be read only once" in both.stderr


def test_every_error_of_a_recipe_is_shown(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe(RECIPE.replace("0.85", "1.85").replace("start_epoch: 1.0", "start_epok: 1.0") + "    damp: 0\n")

    result = mfac("check", path)

    assert [line.split(": ")[:2] for line in result.stderr.splitlines()] == [
        ["error", f"{path}:6"],
        ["error", f"{path}:7"],
        ["error", f"{path}:12"],
    ]


def test_check_as_json(write_recipe: Callable[[str], Path]) -> None:
    path = write_recipe(RECIPE)

    result = mfac("check", path, "--steps-per-epoch", "10", "--json")

    found = json.loads(result.stdout)
    assert list(found) == ["version", "recipe", "pruning_steps", "notes", "warnings", "errors"]
    assert (found["version"], found["recipe"], found["errors"]) == (1, str(path), [])
    assert found["pruning_steps"][1] == {
        "modifier": "MFACPruningModifier",
        "epoch": 2.0,
        "step": 20,
        "sparsity": pytest.approx(0.75),
        "num_gradients": 64,
    }
    assert "falls due while its gradient window has" in found["warnings"][0]
    assert "computes on the model's device" in found["notes"][0]


def test_plan_as_json(write_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"a.weight": [10, 20], "a.bias": [10]}')

    result = mfac("plan", write_recipe(RECIPE), "--shapes", tmp_path / "model.json", "--steps-per-epoch", 99, "--json")

    found = json.loads(result.stdout)
    assert list(found) == [
        "version",
        "recipe",
        "modifiers",
        "window_bytes",
        "needed_bytes",
        "notes",
        "warnings",
        "errors",
    ]
    (modifier,) = found["modifiers"]
    assert modifier["parameters"] == {"a.weight": 200}
    assert modifier["window"] == {"rows": 64, "columns": 200, "bytes": 51200}
    assert found["window_bytes"] == 51200
    assert found["needed_bytes"] == modifier["needed_bytes"] == 51200 + 2 * (2 * 51200 + 3 * 8 * 64 * 64)
    assert [step["step"] for step in modifier["pruning_steps"]] == [99, 198, 297]


def test_plan_for_ranks_as_json(write_recipe: Callable[[str], Path]) -> None:
    arguments = ["plan", write_recipe(RECIPE), "--weights", "1000000", "--steps-per-epoch", "200", "--json"]

    found, alone = json.loads(mfac(*arguments, "--ranks", "8").stdout), json.loads(mfac(*arguments).stdout)

    (modifier,) = found["modifiers"]
    costs = modifier.pop("of_rank")
    assert list(costs) == [
        "num_ranks",
        "columns",
        "blocks",
        "window_bytes",
        "needed_bytes",
        "operations",
        "moved_bytes",
        "replicated",
        "sharded",
    ]
    assert (costs["num_ranks"], costs["columns"], costs["window_bytes"]) == (8, 126_000, 64 * 126_000 * 4)
    assert costs["replicated"] == {"per_row": 0, "per_step": 7 * (4 * 126_000 + 126_000 // 8)}
    assert costs["sharded"]["per_row"] == 4 * 125_000
    assert found["ranks"] == 8
    assert found["needed_bytes_of_rank"] == costs["needed_bytes"]
    # what is said of a single process is the same
    assert modifier == {key: value for key, value in alone["modifiers"][0].items() if key != "of_rank"}
    assert alone["modifiers"][0]["of_rank"] is None and "ranks" not in alone


def test_report_as_json(tmp_path: Path) -> None:
    write_json([RunRecord("M-FAC one-shot", 0.5, 0.9, 0.875, 2.0)], tmp_path / "run.json", seed=7)

    found = json.loads(mfac("report", tmp_path, "--json").stdout)

    assert list(found) == ["version", "run", "facts", "records", "errors"]
    assert found["facts"] == {"seed": 7}
    assert found["records"][0]["accuracy_after"] == 0.875
    assert (found["records"][0]["seed"], found["records"][0]["epochs_after"]) == (None, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "missing.yaml"],
        ["plan", "missing.yaml", "--weights", "5", "--steps-per-epoch", "5"],
        ["plan", "missing.yaml", "--steps-per-epoch", "5"],
        ["report", "missing"],
    ],
)
def test_errors_are_in_the_json_too(arguments: list[str]) -> None:
    result = mfac(*arguments, "--json")

    found = json.loads(result.stdout)
    assert result.exit_code == 2
    assert found["version"] == 1
    assert [f"error: {message}" for message in found["errors"]] == result.stderr.splitlines()


@pytest.mark.parametrize("command", [["check"], ["plan", "--weights", "10"]])
def test_strict_gives_exit_code_1_for_warnings(write_recipe: Callable[[str], Path], command: list[str]) -> None:
    arguments = [*command, write_recipe(RECIPE), "--strict", "--steps-per-epoch"]

    assert mfac(*arguments, "200").exit_code == 0
    assert mfac(*arguments, "10").exit_code == 1
    assert mfac(*arguments, "10", "--json").exit_code == 1
    assert mfac(*arguments[:-2], "--steps-per-epoch", "10").exit_code == 0
    write_recipe(RECIPE.replace("0.85", "1.85"))
    assert mfac(*arguments, "10").exit_code == 2


def test_what_loading_a_recipe_logs_is_among_the_warnings_and_what_was_asked_for_among_the_notes(
    write_recipe: Callable[[str], Path],
) -> None:
    path = write_recipe(RECIPE + "    num_pages: 4\n  - !QuantizationModifier {}\n")

    result = mfac("check", path, "--skip-unsupported", "--strict")

    assert f"warning: {path}:12: MFACPruningModifier.num_pages: has no effect" in result.stdout
    assert f"note: {path}:13: QuantizationModifier is not supported and is left out" in result.stdout
    assert result.exit_code == 1
    write_recipe(RECIPE + "  - !QuantizationModifier {}\n")
    assert mfac("check", path, "--skip-unsupported", "--strict").exit_code == 0


def test_exit_codes_are_in_the_help() -> None:
    for command in ("demo", "check", "plan", "report"):
        said = " ".join(mfac(command, "--help").stdout.split())
        assert "Exit codes: 0 success; 1 warnings, with --strict; 2 errors" in said


def test_the_shell_completes_commands_options_and_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    install_demo(monkeypatch, entry_point("a_demo:run"), entry_point("another:run", name="other"))

    def completed(words: str) -> list[str]:
        variables = {"_MFAC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(app, [], prog_name="mfac", env=variables).stdout.split()

    assert completed("mfac ch") == ["check"]
    assert "--strict" in completed("mfac check --")
    assert completed("mfac demo --framework ") == ["other", "torch"]
    assert "--install-completion" in mfac("--help").stdout


# --- what a recipe matches in a file of shapes


def shapes_of(path: Path, **shapes: list[int]) -> Path:
    path.write_text(json.dumps({name.replace("__", "."): shape for name, shape in shapes.items()}))
    return path


def test_plan_of_params_that_match_nothing_is_an_error_that_names_all_of_them(
    write_recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    shapes = shapes_of(tmp_path / "model.json", fc__weight=[10, 20], conv__weight=[4, 3, 2, 2])
    recipe = RECIPE.replace("__ALL_PRUNABLE__", "[fc.wei, conv.weight, 're:block.*']")
    recipe += "  - !MagnitudePruningModifier {params: [none], final_sparsity: 0.5, end_epoch: 1}\n"

    result = mfac("plan", write_recipe(recipe), "--shapes", shapes, "--steps-per-epoch", "200")

    assert result.exit_code == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("error: MFACPruningModifier 1: params: 'fc.wei' matches no parameter of the model; ")
    assert "nearest names are fc.weight" in first
    assert "'re:block.*' matches no parameter" in first
    assert "MagnitudePruningModifier 2: params: 'none' matches no parameter" in second


def test_plan_says_what_all_prunable_may_not_mean(write_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    names = {"fc__weight": [10, 20], "embed_tokens__weight": [50, 20], "attn__in_proj_weight": [9, 3], "pos": [1, 5, 4]}
    shapes = shapes_of(tmp_path / "model.json", **names, norm__weight=[10])

    result = mfac("plan", write_recipe(RECIPE), "--shapes", shapes, "--steps-per-epoch", "200", "--strict")

    assert result.exit_code == 1
    (warning,) = [line for line in result.stdout.splitlines() if line.startswith("warning")]
    assert "__ALL_PRUNABLE__ counts embed_tokens.weight, attn.in_proj_weight, pos here" in warning
    shapes_of(tmp_path / "model.json", fc__weight=[10, 20], norm__weight=[10])
    assert "warning:" not in mfac("plan", write_recipe(RECIPE), "--shapes", shapes, "--steps-per-epoch", "200").stdout


def test_plan_says_that_a_pattern_matches_biases_and_normalization(
    write_recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    shapes = shapes_of(tmp_path / "model.json", fc__weight=[10, 20], fc__bias=[10], norm__weight=[10])
    arguments = ["--shapes", shapes, "--steps-per-epoch", "200"]

    pattern = mfac("plan", write_recipe(RECIPE.replace("__ALL_PRUNABLE__", "'re:.*'")), *arguments).stdout
    by_name = mfac(
        "plan", write_recipe(RECIPE.replace("__ALL_PRUNABLE__", "[fc.bias, norm.weight]")), *arguments
    ).stdout

    warning = "warning: MFACPruningModifier: params 're:.*' selects normalization weights, biases or scales too: "
    assert f"{warning}fc.bias, norm.weight." in pattern
    assert "warning:" not in by_name


def test_plan_counts_no_buffers(write_recipe: Callable[[str], Path], tmp_path: Path) -> None:
    header = {
        "fc.weight": {"dtype": "F32", "shape": [10, 20]},
        "fc.codes": {"dtype": "I64", "shape": [10, 20]},
        "norm.running_mean": {"dtype": "F32", "shape": [10]},
        "norm.num_batches_tracked": {"dtype": "I64", "shape": []},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    recipe = write_recipe(RECIPE.replace("__ALL_PRUNABLE__", "__ALL__"))

    result = mfac("plan", recipe, "--shapes", tmp_path / "model.safetensors", "--steps-per-epoch", "200", "--json")

    assert json.loads(result.stdout)["modifiers"][0]["parameters"] == {"fc.weight": 200}


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": [true, 2]}', '{"a": [1e3]}', f'{{"a": [1{"0" * 400}]}}', '{"a": 3}']
)
def test_plan_refuses_odd_shapes(write_recipe: Callable[[str], Path], content: str) -> None:
    result = mfac("plan", write_recipe(RECIPE), "--shapes", "-", "--steps-per-epoch", "10", input=content)

    assert result.exit_code == 2
    assert result.stderr.startswith("error: <stdin>: ")


def test_plan_refuses_a_safetensors_header_that_holds_no_entries(
    write_recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    text = b'{"a": 3}'
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    result = mfac("plan", write_recipe(RECIPE), "--shapes", tmp_path / "model.safetensors", "--steps-per-epoch", "10")

    assert "a: 3 is not a shape" in result.stderr


# --- devices and files that are not there


class Tensors(NumpyBackend):
    """A library with a GPU, which its package registers when it is imported."""

    name = "tensors"

    def devices(self) -> tuple[str, ...]:
        return ("cpu", "cuda:0")


@pytest.fixture
def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_has_cupy", lambda: False)
    monkeypatch.setattr(lookup, "_registered", {})
    monkeypatch.setattr(lookup, "entry_points", lambda **_: ())


@pytest.mark.usefixtures("without_gpus")
@pytest.mark.parametrize("value", ["cuda:0", "mps", "tensors:cuda:0", "cupy:cuda:0"])
@pytest.mark.parametrize("key", ['available_gpus: ["{}"]', 'available_devices: ["{}"]', 'grads_device: "{}"'])
def test_check_warns_of_a_gpu_that_is_not_here(write_recipe: Callable[[str], Path], key: str, value: str) -> None:
    result = mfac("check", write_recipe(f"{RECIPE}    {key.format(value)}\n"), "--strict")

    assert result.exit_code == 1
    if value == "cupy:cuda:0":
        assert "warning: on this machine: device 'cupy:cuda:0' needs cupy, which is not installed" in result.stdout
    else:
        there = f"warning: on this machine: device '{value}' does not exist here; the devices are cpu"
        assert there in result.stdout
    # only CuPy's devices, and plain names that may mean them, need CuPy
    needs_cupy = "NumPy arrays and Keras models need CuPy on a GPU" in result.stdout
    assert needs_cupy == (value in {"cuda:0", "cupy:cuda:0"})


@pytest.mark.usefixtures("without_gpus")
@pytest.mark.parametrize("value", ["cuda:0", "tensors:cuda:0"])
def test_check_warns_once_of_a_framework_that_cannot_be_imported(
    write_recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    def load() -> None:
        raise OSError("libtensors.so: undefined symbol")

    entry = SimpleNamespace(name="tensors", value="mfac_tensors", load=load)
    monkeypatch.setattr(lookup, "entry_points", lambda group, name="tensors": [entry] if name == "tensors" else [])
    lookup._import_package_for.cache_clear()

    result = mfac("check", write_recipe(f'{RECIPE}    available_gpus: ["{value}"]\n'))

    warning = "warning: on this machine: arrays and devices of tensors cannot be used: importing mfac_tensors raises OS"
    assert result.exit_code == 0
    assert result.stdout.count(warning) == 1


@pytest.mark.usefixtures("without_gpus")
@pytest.mark.parametrize("value", ["cuda:0", "tensors:cuda:0", "cpu"])
def test_check_finds_the_gpus_of_installed_frameworks(
    write_recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    imported = []

    def load() -> None:
        imported.append(None)
        lookup.register(Tensors())

    entry = SimpleNamespace(name="tensors", load=load)
    monkeypatch.setattr(lookup, "entry_points", lambda group, name="tensors": [entry] if name == "tensors" else [])
    lookup._import_package_for.cache_clear()

    result = mfac("check", write_recipe(f'{RECIPE}    available_gpus: ["{value}"]\n    grads_device: "cpu"\n'))

    lookup._import_package_for.cache_clear()
    assert result.exit_code == 0
    assert "on this machine" not in result.stdout
    assert bool(imported) == (value != "cpu")


def test_files_that_cannot_be_read_are_errors_without_a_traceback(
    write_recipe: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "latin.yaml").write_bytes(RECIPE.encode() + b"# \xe9\n")
    (tmp_path / "run.json").write_bytes(b"\xff")
    for arguments in (
        ["check", tmp_path],
        ["check", tmp_path / "latin.yaml"],
        ["plan", write_recipe(RECIPE), "--shapes", tmp_path, "--steps-per-epoch", "5"],
        ["plan", write_recipe(RECIPE), "--shapes", tmp_path / "latin.yaml", "--steps-per-epoch", "5"],
        ["report", tmp_path],
        ["report", tmp_path / "run.json" / "below"],
    ):
        result = mfac(*arguments)
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {tmp_path}")


def test_demo_refuses_a_seed_that_is_none() -> None:
    assert mfac("demo", "--seed", "-1").exit_code == 2


def test_demo_whose_framework_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, demo_module: ModuleType
) -> None:
    class Broken(EntryPoint):
        def load(self) -> object:
            raise ValueError("Unable to import backend : theano")

    install_demo(monkeypatch, Broken(name="torch", value="a_demo:run", group="mfac_core.demos"))

    result = mfac("demo")

    assert result.exit_code == 2
    assert "the demo for torch cannot be loaded: Unable to import backend : theano" in result.stderr
