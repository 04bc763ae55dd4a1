from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAKEFILE = """
good:
\t@echo one; echo "== 3 passed in 0.12s =="; echo "noise at exit"
bad:
\t@echo "1 failed, 2 passed"; exit 3
last:
\t@echo done
"""


def run(folder: Path, *targets: str) -> tuple[int, str]:
    (folder / "Makefile").write_text(MAKEFILE)
    command = [sys.executable, str(ROOT / "tests" / "run_parts.py"), "make", *targets]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return ended.returncode, re.sub(r" +\d+ s  ", " ", ended.stdout)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_parts_that_fail_do_not_keep_the_others_from_running(tmp_path: Path) -> None:
    status, output = run(tmp_path, "good", "bad", "last")

    assert status == 1
    assert output.partition("== summary\n")[2].splitlines() == [
        "passed  good 3 passed in 0.12s",
        "FAILED  bad 1 failed, 2 passed",
        "passed  last done",
        "1 of 3 failed; to run one again: make bad",
    ]
    assert output.startswith("== good\none\n== 3 passed in 0.12s ==\nnoise at exit\n== bad\n")
    assert run(tmp_path, "good", "last")[0] == 0


def test_the_lowest_versions_are_single_ones() -> None:
    lowest = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "lowest_versions.py")], capture_output=True, text=True, check=True
    ).stdout.split("\n")

    assert any(line.startswith("numpy==") for line in lowest)
    assert [line for line in lowest if line and not re.fullmatch(r"[\w-]+==[\d.]+", line)] == []
