from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "mfac_core", ROOT / "adapters" / "mfac_torch", ROOT / "adapters" / "mfac_keras")


def modules(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")} - {"__init__.py"}


def map_of_the_house() -> str:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = design[design.index("## 2. The house") : design.index("Imports run one way")]
    return "\n".join(line for line in section.splitlines() if line.startswith("    "))


def core_lines() -> list[str]:
    lines = map_of_the_house().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("    mfac_core/"))
    end = next(number for number, line in enumerate(lines) if line.startswith("    adapters/"))
    return lines[start + 1 : end]


def core_modules_on_the_map() -> set[str]:
    heads = [re.split(r"\s{2,}", line.strip())[0] for line in core_lines()]
    return {name for head in heads for name in head.split(", ") if name.endswith(".py")}


def test_the_map_in_the_design_lists_the_modules_of_the_core_and_no_others() -> None:
    assert core_modules_on_the_map() == modules(ROOT / "mfac_core")


def test_the_map_in_the_design_lists_the_backends() -> None:
    line = next(line for line in core_lines() if line.strip().startswith("backends/"))

    assert set(re.findall(r"\w+\.py", line)) <= modules(ROOT / "mfac_core" / "backends")


def test_the_map_in_the_design_lists_modules_of_the_torch_adapter_that_exist() -> None:
    line = next(line for line in map_of_the_house().splitlines() if line.strip().startswith("mfac_torch/"))
    names = {f"{name}.py" for name in line.split("/", 1)[1].strip().split(", ")}

    assert names <= modules(ROOT / "adapters" / "mfac_torch")


def test_the_shelf_of_adapters_is_no_package() -> None:
    assert not (ROOT / "adapters" / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_each_package_is_marked_as_typed(package: Path) -> None:
    assert (package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_module_is_a_drawer_for_everything(package: Path) -> None:
    drawers = re.compile(r"_?(utils?|helpers?|misc|common)(\.py)?$")

    assert [str(path) for path in package.rglob("*") if drawers.fullmatch(path.name)] == []


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "CHANGELOG.md", ".ci/run"]
)
def test_the_house_has_its_papers(name: str) -> None:
    assert (ROOT / name).is_file()
