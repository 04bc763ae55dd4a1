import doctest
import importlib
import logging
import pkgutil
import re
from pathlib import Path

import pytest

import mfac_torch

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "pytorch.md"
README = ROOT / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEED_FURTHER_PACKAGES = {"demo", "digits", "lightning", "transformers"}
MODULES = [name for _, name, _ in pkgutil.iter_modules(mfac_torch.__path__) if name not in NEED_FURTHER_PACKAGES]


@pytest.fixture
def log_levels_restored():
    levels = {name: logging.getLogger(name).level for name in ("mfac_core", "mfac_torch")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.usefixtures("log_levels_restored")
def test_every_block_of_python_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the page may write files
    text = PAGE.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], PAGE, "exec"), namespace)


def test_the_page_has_blocks():
    assert len(BLOCK.findall(PAGE.read_text(encoding="utf-8"))) >= 8


def test_the_block_of_the_front_page_runs_by_itself_in_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in BLOCK.findall(README.read_text(encoding="utf-8")) if "mfac_torch" in block]
    exec(compile(block, README, "exec"), {"__name__": "__main__"})
    assert "90% of the weights are zero" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"mfac_torch.{name}")).failed == 0
