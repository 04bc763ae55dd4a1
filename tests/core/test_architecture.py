from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "mfac_core", ROOT / "adapters" / "mfac_torch", ROOT / "adapters" / "mfac_keras")


def map_of_modules() -> set[str]:
    """Return the path of each module that the design document lists: folders are nested by indentation."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = design[design.index("## 2. Architecture") : design.index("Imports run one way")]
    folders: dict[int, str] = {}
    found: list[str] = []
    for line in section.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent < 4:
            continue
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        above = {depth: name for depth, name in folders.items() if depth < indent}
        if names[0].endswith("/"):
            folders = {**above, indent: names[0]}
        else:
            found += ["".join([*above.values(), name]) for name in names]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_design_lists_the_modules_that_exist_and_no_others(package: Path) -> None:
    prefix = f"{package.relative_to(ROOT).as_posix()}/"
    exist = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}

    assert {path for path in map_of_modules() if path.startswith(prefix)} == exist


def test_the_folder_of_adapters_is_no_package() -> None:
    assert not (ROOT / "adapters" / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_each_package_is_marked_as_typed(package: Path) -> None:
    assert (package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_no_module_is_named_after_nothing_in_particular(package: Path) -> None:
    drawers = re.compile(r"_?(utils?|helpers?|misc|common)(\.py)?$")

    assert [str(path) for path in package.rglob("*") if drawers.fullmatch(path.name)] == []


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"]
)
def test_the_project_has_its_documents(name: str) -> None:
    assert (ROOT / name).is_file()


def test_the_log_has_each_heading_once_in_a_version() -> None:
    for version in re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        headings = re.findall(r"^### (.*)$", version, re.MULTILINE)

        assert headings == [each for each in ("Added", "Changed", "Removed", "Fixed") if each in headings]
