import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

import mfac_keras  # noqa: E402

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "keras.md"
README = ROOT / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODULES = [name for _, name, _ in pkgutil.iter_modules(mfac_keras.__path__)]


def test_every_block_of_python_runs_as_it_stands(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)  # the page may write files
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 6
    namespace = {"__name__": "__main__"}
    for block in blocks:
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], PAGE, "exec"), namespace)
    assert "in one pass within each layer" not in caplog.text  # the page does what it is read for: to begin well


def test_the_block_of_the_front_page_runs_by_itself_in_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCK.findall(README.read_text(encoding="utf-8")) if "mfac_keras" in block]
    exec(compile(block, README, "exec"), {"__name__": "__main__"})
    assert "90% of the weights are zero" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"mfac_keras.{name}")).failed == 0
