"""The docstrings of public names are Google style with full sections, as documentation tools parse them.

The sources are read, not imported, so the adapters are checked without their frameworks.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe
import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mfac_core", "mfac_core.backends", "mfac_core.ranks", "mfac_torch", "mfac_torch.export", "mfac_keras")
# exceptions that a caller cannot act on, and those that only end a generator or mark an abstract method
NOT_DOCUMENTED = {"NotImplementedError", "AssertionError", "StopIteration"}
SECTIONS = {"example", "note", "references", "warning"}  # heads that griffe reads as admonitions


@cache
def loaded() -> griffe.GriffeLoader:
    loader = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "adapters"])
    for package in ("mfac_core", "mfac_torch", "mfac_keras"):
        loader.load(package)
    loader.resolve_aliases()
    return loader


def exported() -> Iterator[tuple[str, Any]]:
    """Yield the public functions and classes, by the name under which they are imported."""
    for package in PACKAGES:
        module = loaded().modules_collection[package]
        for name in module.exports or ():
            target = module[str(name)]
            target = target.final_target if target.is_alias else target
            if target.is_class or target.is_function:
                yield f"{package}.{name}", target


def members(owner: Any) -> Iterator[Any]:
    """Yield the public methods and properties of a class, inherited ones included."""
    for name, member in owner.all_members.items():
        target = member.final_target if member.is_alias else member
        if not name.startswith("_") and (target.is_function or "property" in target.labels):
            yield target


def documented() -> dict[str, Any]:
    """Return all objects whose docstrings are checked, by path."""
    found = dict(exported())
    for owner in list(found.values()):
        if owner.is_class:
            found |= {member.path: member for member in members(owner)}
    return found


OBJECTS = documented()
CALLABLES = [path for path, each in OBJECTS.items() if each.is_function]
SIGNATURES = [path for path, each in OBJECTS.items() if each.is_function or each.is_class]


def is_exception(each: Any) -> bool:
    return each.is_class and any(str(base).endswith(("Error", "Exception")) for base in each.bases)


def is_of_protocol(path: str) -> bool:
    """Return whether a method is declared by a protocol, whose docstring describes all of them together."""
    owner = OBJECTS[path].parent
    return owner.is_class and any(str(base) == "Protocol" for base in owner.bases)


def sections(each: Any) -> list[Any]:
    return each.docstring.parse("google") if each.docstring else []


def entries(each: Any, kind: str) -> list[Any]:
    return [entry for section in sections(each) if section.kind.value == kind for entry in section.value]


def described(each: Any) -> dict[str, str]:
    """Return the descriptions of parameters; those of a class may be in a class that it extends."""
    owners = [each, *each.mro()] if each.is_class else [each]
    return {
        entry.name.lstrip("*"): entry.description
        for owner in reversed(owners)
        for kind in ("parameters", "other parameters")
        for entry in entries(owner, kind)
    }


def parameters(each: Any) -> list[str]:
    return [name for name in (each.name.lstrip("*") for each in each.parameters) if name not in {"self", "cls"}]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def body(each: Any) -> ast.FunctionDef:
    return next(
        node
        for node in ast.walk(tree(each.filepath))
        if isinstance(node, ast.FunctionDef) and node.name == each.name and node.end_lineno == each.endlineno
    )


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of functions inside."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from own_nodes(child)


def raised(function: ast.FunctionDef) -> set[str]:
    """Return the names of the exceptions that the body raises itself."""
    calls = (node.exc for node in own_nodes(function) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    names = {ast.unparse(call.func).rpartition(".")[2] for call in calls}
    return {name for name in names if name[0].isupper()} - NOT_DOCUMENTED


@pytest.mark.parametrize("path", OBJECTS)
def test_a_docstring_begins_with_one_sentence(path: str) -> None:
    docstring = OBJECTS[path].docstring
    assert docstring is not None
    summary, _, rest = docstring.value.partition("\n")
    assert summary.endswith(".")
    assert not re.search(r"(?<!e\.g)(?<!i\.e)[.!?] [A-Z]", summary)
    assert not rest or rest.startswith("\n")


@pytest.mark.parametrize("path", OBJECTS)
def test_a_docstring_parses_without_warnings(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="griffe"):
        found = sections(OBJECTS[path])

    assert [record.getMessage() for record in caplog.records] == []
    heads = {section.value.kind for section in found if section.kind.value == "admonition"}
    assert heads <= SECTIONS
    text = "\n".join(section.value for section in found if section.kind.value == "text")
    assert not re.search(r"^[A-Z]\w*( \(.*\))?:$", text, re.MULTILINE), "a head that no tool knows"


@pytest.mark.parametrize("path", [path for path in SIGNATURES if not is_of_protocol(path)])
def test_each_parameter_is_described(path: str) -> None:
    each = OBJECTS[path]
    texts = described(each)
    assert [name for name in parameters(each) if not texts.get(name)] == []


@pytest.mark.parametrize("path", [path for path in CALLABLES if not is_of_protocol(path)])
def test_what_a_function_returns_and_raises_is_described(path: str) -> None:
    function = OBJECTS[path]
    returned = function.returns
    if returned is not None and str(returned) != "None":
        kinds = {section.kind.value for section in sections(function)}
        assert kinds & {"returns", "yields"}
    named = {str(entry.annotation) for entry in entries(function, "raises")}
    assert raised(body(function)) - named == set()


@pytest.mark.parametrize("path", [path for path, each in exported() if not is_exception(each)])
def test_public_functions_and_classes_have_an_example(path: str) -> None:
    kinds = {section.kind.value for section in sections(OBJECTS[path])}
    admonitions = {section.value.kind for section in sections(OBJECTS[path]) if section.kind.value == "admonition"}
    assert "examples" in kinds or "example" in admonitions
