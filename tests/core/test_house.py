from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADAPTERS = (ROOT / "adapters" / "mfac_torch", ROOT / "adapters" / "mfac_keras")
PACKAGES = (ROOT / "mfac_core", *ADAPTERS)


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


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_the_map_in_the_design_lists_the_modules_of_an_adapter_and_no_others(adapter: Path) -> None:
    line = next(line for line in map_of_the_house().splitlines() if line.strip().startswith(f"{adapter.name}/"))
    names = line.split("/", 1)[1].partition(";")[0].strip().split(", ")

    assert {f"{name}.py" for name in names} == modules(adapter)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_an_adapter_says_which_modules_it_has(adapter: Path) -> None:
    text = ast.get_docstring(ast.parse((adapter / "__init__.py").read_text(encoding="utf-8"))) or ""
    heads = [line.partition(":")[0] for line in text.splitlines() if line.startswith("* ")]
    names = {f"{name}.py" for head in heads for name in re.findall("``(\\w+)``", head)}

    assert names - {"backends.py"} == modules(adapter)


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


def test_the_log_has_each_heading_once_in_a_version() -> None:
    for version in re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (.*)$", version, re.MULTILINE)

        assert headings == [each for each in ("Added", "Changed", "Removed", "Fixed") if each in headings]
