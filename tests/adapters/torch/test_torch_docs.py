import doctest
import importlib
import logging
import pkgutil
import re
import shutil
from pathlib import Path

import pytest

import mfac_torch

ROOT = Path(__file__).parents[3]
PAGES = [page for page in (ROOT / "docs" / "pytorch.md", ROOT / "README.md") if page.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEED_FURTHER_PACKAGES = {"demo", "digits", "lightning", "transformers"}
MODULES = [name for _, name, _ in pkgutil.iter_modules(mfac_torch.__path__) if name not in NEED_FURTHER_PACKAGES]


@pytest.fixture
def log_levels_restored():
    levels = {name: logging.getLogger(name).level for name in ("mfac_core", "mfac_torch")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("log_levels_restored")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_runs_as_it_stands(page, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)  # pages name the recipes of the project, and may write files
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if "keras" in block[1]:
            continue  # a block of the other adapter, which may not be installed
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], page, "exec"), namespace)


def test_the_page_has_blocks():
    assert len(BLOCK.findall((ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8"))) >= 8


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"mfac_torch.{name}")).failed == 0
