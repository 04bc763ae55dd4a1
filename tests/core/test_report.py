from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from mfac_core.report.run import RunRecord, picture, read_json, table, write_json

GRADUAL = RunRecord(
    method="M-FAC gradual",
    sparsity=0.95,
    accuracy_before=0.981,
    accuracy_after=0.9725,
    seconds=31.25,
    history=((1.0, 0.9, 0.5), (2.0, 0.96, 0.95)),
    layer_sparsity={"conv.weight": 0.75, "fc.weight": 0.96},
    layer_sizes={"conv.weight": 8, "fc.weight": 100},
    seed=3,
    epochs_after=2,
)
ONE_SHOT = RunRecord("magnitude [one-shot]", 0.5, 0.98, 0.985, 0.5)


def printed(records: list[RunRecord]) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(records))
    return console.export_text()


def test_a_written_run_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    write_json([GRADUAL, ONE_SHOT], path, seed=3, model="convnet")

    records, facts = read_json(path)
    assert records == [GRADUAL, ONE_SHOT]
    assert facts == {"seed": 3, "model": "convnet"}


def test_a_file_of_the_version_before_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json([ONE_SHOT], path, seed=3)
    run = json.loads(path.read_text())
    assert run.pop("version") == 2
    for name in ("layer_sizes", "seed", "epochs_after"):
        del run["records"][0][name]
    path.write_text(json.dumps(run))

    assert read_json(path) == ([ONE_SHOT], {"seed": 3})


def test_a_file_of_a_later_version_says_that_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"version": 3, "facts": {}, "records": []}')

    with pytest.raises(ValueError, match="has version 3, and this mfac-core reads up to 2; update mfac-core"):
        read_json(path)


def test_a_number_that_json_cannot_hold_is_refused_rather_than_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_json([RunRecord("M-FAC one-shot", 0.5, 0.9, float("nan"), 1.0)], tmp_path / "run.json")


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"records": []}',
        '{"facts": {}, "records": [{"method": "x"}]}',
        '{"facts": {}, "records": [3]}',
    ],
)
def test_a_file_that_is_no_run_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_json(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("color", "red"),
        ("sparsity", "high"),
        ("history", [[1.0, 2.0]]),
        ("layer_sparsity", [0.5]),
        ("layer_sizes", [3]),
        ("seed", "first"),
        ("epochs_after", None),
    ],
)
def test_a_record_with_an_unknown_key_or_a_wrong_value_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "run.json"
    write_json([ONE_SHOT], path)
    run = json.loads(path.read_text())
    run["records"][0][key] = value
    path.write_text(json.dumps(run))

    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_json(path)


def test_the_table_has_a_row_per_method_with_the_change_in_points() -> None:
    rows = [line.split() for line in printed([GRADUAL, ONE_SHOT]).splitlines() if "%" in line]

    assert rows == [
        ["M-FAC", "gradual", "95.00%", "98.10%", "97.25%", "-0.85", "31.2", "s"],
        ["magnitude", "[one-shot]", "50.00%", "98.00%", "98.50%", "+0.50", "0.5", "s"],
    ]


@pytest.mark.parametrize("records", [[GRADUAL, ONE_SHOT], [ONE_SHOT], []], ids=["both", "one-shot only", "nothing"])
def test_a_picture_is_drawn_for_any_mix_of_records(tmp_path: Path, records: list[RunRecord]) -> None:
    path = tmp_path / "run.png"

    picture(records, path)

    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_methods_layers_and_axes(tmp_path: Path) -> None:
    import matplotlib

    path = tmp_path / "run.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        picture([GRADUAL], path)

    words = path.read_text()
    for word in ("M-FAC gradual", "conv.weight", "fc.weight", "epoch", "test accuracy", "Sparsity per layer"):
        assert word in words
    assert "no gradual run" not in words
    assert words.count(">sparsity<") == 2  # of the axis of the layers, and of the dashed curves in the legend


def test_the_picture_leaves_no_state_in_pyplot(tmp_path: Path) -> None:
    from matplotlib import pyplot

    picture([GRADUAL], tmp_path / "run.png")

    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"facts": {"a": NaN}, "records": []}',
        '{"facts": {}, "records": [{"method": "x", "sparsity": 1' + "0" * 400 + "}]}",
    ],
)
def test_json_that_no_run_is_written_as_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)

    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run.json"))):
        read_json(tmp_path / "run.json")


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path, image = tmp_path / "run.json", tmp_path / "run.svg"
    write_json([ONE_SHOT], path)
    picture([GRADUAL], image)
    before = path.read_bytes(), image.read_bytes()

    with pytest.raises(TypeError):
        write_json([ONE_SHOT], path, seed=object())
    broken = RunRecord("M-FAC", 0.5, 0.9, 0.8, 1.0, history=((0.0, 0.9, 0.0), (1.0, 0.8)))  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        picture([broken], image)

    assert (path.read_bytes(), image.read_bytes()) == before
    assert {each.name for each in tmp_path.iterdir()} == {"run.json", "run.svg"}


def test_folders_are_made(tmp_path: Path) -> None:
    write_json([ONE_SHOT], tmp_path / "new" / "run.json")
    picture([GRADUAL], tmp_path / "other" / "run.pdf")

    assert (tmp_path / "other" / "run.pdf").read_bytes().startswith(b"%PDF")
