import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

keras = pytest.importorskip("keras", reason="needs Keras: pip install 'mfac-core[keras]'")

import mfac_keras  # noqa: E402

PAGE = Path(__file__).parents[3] / "docs" / "keras.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODULES = [name for _, name, _ in pkgutil.iter_modules(mfac_keras.__path__)]


def test_every_block_of_python_runs_as_it_stands():
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 6
    namespace = {"__name__": "__main__"}
    for block in blocks:
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], PAGE, "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"mfac_keras.{name}")).failed == 0
