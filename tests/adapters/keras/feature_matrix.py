"""Write docs/keras-matrix.md: which feature passes its tests on which backend of Keras.

python tests/adapters/keras/feature_matrix.py            runs the tests of each backend, in a process of its own
python tests/adapters/keras/feature_matrix.py FOLDER      takes the reports in FOLDER, such as jax.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "keras-matrix.md"
BACKENDS = ("tensorflow", "torch", "jax")
PACKAGES = {"tensorflow": ("tensorflow", "tensorflow-cpu"), "torch": ("torch",), "jax": ("jax",)}


def main() -> None:
    if len(sys.argv) > 1:
        reports = read(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for backend in BACKENDS:
                run(backend, Path(folder))
            reports = read(Path(folder))
    PAGE.write_text(page(reports), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def run(backend: str, folder: Path) -> None:
    """Run the tests on a backend; failures are for the table to show."""
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", str(Path(__file__).parent)],
        cwd=ROOT,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "KERAS_BACKEND": backend, "MFAC_KERAS_FEATURES": str(folder / f"{backend}.json")},
        check=False,
    )


def read(folder: Path) -> dict[str, dict[str, list[str]]]:
    return {backend: json.loads((folder / f"{backend}.json").read_text(encoding="utf-8")) for backend in BACKENDS}


def page(reports: dict[str, dict[str, list[str]]]) -> str:
    features = sorted({feature for report in reports.values() for feature in report})
    heads = [f"{backend} {_version(backend)}" for backend in BACKENDS]
    rows = [
        f"| {feature} | {' | '.join(_cell(reports[each].get(feature, [])) for each in BACKENDS)} |"
        for feature in features
    ]
    return "\n".join(
        [
            "# What works on which backend of Keras",
            "",
            "Written by `tests/adapters/keras/feature_matrix.py` from the outcome of the tests, with "
            f"keras {version('keras')} on CPUs. A number counts the tests that passed.",
            "",
            f"| | {' | '.join(heads)} |",
            f"| --- | {' | '.join('---' for _ in heads)} |",
            *rows,
            "",
            "n/a: no test, because Keras does not have it on this backend, or it is another backend's. On torch, "
            "jit_compile=True is torch.compile, which needs a C++ compiler, also for its tests.",
            "",
        ]
    )


def _cell(outcomes: list[str]) -> str:
    failed, passed = outcomes.count("failed"), outcomes.count("passed")
    if failed:
        return f"**fails ({failed} of {failed + passed})**"
    return f"yes ({passed})" if passed else "n/a"


def _version(backend: str) -> str:
    for package in PACKAGES[backend]:
        try:
            return version(package).partition("+")[0]
        except ImportError:
            continue
    return "?"


if __name__ == "__main__":
    main()
