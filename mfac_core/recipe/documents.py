"""Recipe text -> a checked tree of YAML nodes that know their lines.

Three steps, none of which looks at modifiers: find the YAML (a file, a text, a Markdown front matter), parse it into
nodes, refuse what a recipe must not contain. No object is ever constructed from a tag, so a recipe cannot run code.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from mfac_core.errors import RecipeError
from mfac_core.recipe.indentation import restore_indentation
from mfac_core.recipe.places import Place

__all__ = ["Document", "Entry", "entries", "pairs", "read_document", "scalar_value"]

_YAML_SUFFIXES = (".yaml", ".yml")
_MARKDOWN_SUFFIXES = (".md", ".markdown")
_STANDARD = "tag:yaml.org,2002:"
_MERGE = _STANDARD + "merge"
_CONSTRUCTED_TAGS = frozenset(_STANDARD + name for name in ("null", "bool", "int", "float", "str"))
_ALLOWED_TAGS = _CONSTRUCTED_TAGS | {_STANDARD + name for name in ("seq", "map", "merge", "timestamp", "value")}
# YAML 1.1 wants a dot in every float, so that PyYAML reads 1e-5 as a string.
_FLOAT_WITHOUT_DOT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
_HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)

_logger = logging.getLogger("mfac_core")


class Entry(NamedTuple):
    """One key of a mapping with its line and its value."""

    key: str
    line: int
    value: yaml.Node


@dataclass(frozen=True)
class Document:
    """A recipe as a checked node tree.

    Args:
        source: Path of the recipe, or ``<text>``.
        root: The mapping at the top; lines of its nodes are lines of the source.
    """

    source: str
    root: yaml.MappingNode

    def place(self, line: int | None = None, name: str = "") -> Place:
        """Return a place in this document."""
        return Place(self.source, line, name)

    @property
    def entries(self) -> list[Entry]:
        """The top-level keys."""
        return entries(self.root, self.place())


def read_document(path_or_text: str | os.PathLike[str]) -> Document:
    """Read a recipe into a checked node tree.

    Args:
        path_or_text: A path to a YAML file or to a Markdown file with a YAML front matter; or, where the string
            contains a newline, the recipe's text itself.

    Returns:
        The node tree; every mapping has distinct keys, every tag is a standard one or that of a list item under a
        ``modifiers`` key.

    Raises:
        RecipeError: If there is no such file, or it is not a recipe's YAML.
    """
    if isinstance(path_or_text, str) and "\n" in path_or_text:
        source, text = "<text>", path_or_text.removeprefix("\ufeff").replace("\r\n", "\n")
        markdown = _begins_like_markdown(text)
    else:
        source = os.fspath(path_or_text)
        text = _read_file(source)
        markdown = Path(source).suffix.lower() in _MARKDOWN_SUFFIXES
    if markdown:
        text = _front_matter(text, source)
    root = _parse(text, source)
    document = Document(source, root)
    _check_keys(document)
    _refuse_foreign_tags(document)
    return document


def entries(mapping: yaml.MappingNode, place: Place) -> list[Entry]:
    """Return the keys of a mapping in document order, merge keys (``<<``) resolved.

    Args:
        mapping: The mapping node.
        place: Where it stands.

    Returns:
        One entry per key; the line is that of the key.

    Raises:
        RecipeError: If a merge key merges something that is not a mapping.
    """
    return [Entry(key.value, _line(key), value) for key, value in pairs(mapping, place)]


def pairs(mapping: yaml.MappingNode, place: Place) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Return the keys and values of a mapping as nodes, merge keys (``<<``) resolved.

    Args:
        mapping: The mapping node.
        place: Where it stands.

    Returns:
        Key and value nodes; keys that are written in the mapping win over merged ones.

    Raises:
        RecipeError: If a merge key merges something that is not a mapping.
    """
    found: dict[tuple[bool, object], tuple[yaml.ScalarNode, yaml.Node]] = {}
    for key, value in _all_pairs(mapping, place, inside=()):
        found.setdefault(_identity(key, place), (key, value))
    return list(found.values())


def scalar_value(node: yaml.ScalarNode, place: Place) -> object:
    """Return the Python value of a scalar node.

    Args:
        node: The scalar; its tag must be a standard one.
        place: Where it stands.

    Returns:
        ``None``, a bool, an int, a float or a string. A plain ``1e-5`` is a float.

    Raises:
        RecipeError: If the text does not fit an explicit tag, as in ``!!int abc``.
    """
    if node.tag == _STANDARD + "str" and node.style is None and _FLOAT_WITHOUT_DOT.fullmatch(node.value):
        return float(node.value)
    if node.tag not in _CONSTRUCTED_TAGS:
        return str(node.value)
    try:
        value: object = yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError, IndexError) as error:
        raise place.error(f"{node.value!r} is not a valid {_shown_tag(node.tag)}") from error
    return value


def _read_file(path: str) -> str:
    place = Place(path)
    if path.startswith("zoo:"):
        raise place.error("SparseZoo stubs are not supported yet; download the recipe and give its path")
    if not os.path.isfile(path):
        if os.path.isdir(path):
            raise place.error("this is a folder; give the path of a recipe file in it")
        if "modifiers:" in path or "!" in path or ": " in path:
            raise place.error("there is no such file; if this is the text of a recipe, it must contain a newline")
        raise place.error("there is no such file; give the path of a recipe, or the text of one (with newlines)")
    accepted = _YAML_SUFFIXES + _MARKDOWN_SUFFIXES
    suffix = Path(path).suffix.lower()
    if suffix not in accepted:
        raise place.error(f"a recipe cannot have the suffix {suffix or '(none)'!r}; accepted are {', '.join(accepted)}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise place.error(
            f"the file is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise place.error(f"the file cannot be read ({error.strerror}); check its permissions") from error


def _begins_like_markdown(text: str) -> bool:
    start = _front_matter_start(text)
    lines = text.split("\n")
    if start is None:
        return text.lstrip().startswith("<!--")
    return any(_is_delimiter(line) for line in lines[start + 1 :])


def _front_matter(text: str, source: str) -> str:
    """Return the YAML between the two ``---`` lines, at its own line numbers."""
    lines = text.split("\n")
    start = _front_matter_start(text)
    if start is None:
        raise Place(source, 1).error(
            "no YAML front matter; the first line (after an HTML comment, if any) must be exactly `---`, and another "
            "`---` line must close it"
        )
    for end in range(start + 1, len(lines)):
        if _is_delimiter(lines[end]):
            return "\n".join([""] * (start + 1) + lines[start + 1 : end]) + "\n"
    raise Place(source, start + 1).error(
        "the YAML front matter that begins here is never closed; add a line that is exactly `---`"
    )


def _front_matter_start(text: str) -> int | None:
    """Return the index of the opening ``---`` line, skipping blank lines and HTML comments."""
    position = 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip())
        comment = _HTML_COMMENT.match(text, position)
        if comment is None:
            break
        position = comment.end()
    start = text.count("\n", 0, position)
    return start if _is_delimiter(text.split("\n")[start]) else None


def _is_delimiter(line: str) -> bool:
    return line.rstrip() == "---"


def _parse(text: str, source: str) -> yaml.MappingNode:
    try:
        root = _compose(text, source)
    except RecipeError:
        restored = restore_indentation(text)
    else:
        if not any(isinstance(item, yaml.ScalarNode) and item.value == "" for item in _modifier_items(root)):
            return root
        restored = restore_indentation(text)
    root = _compose(restored, source)
    if restored != text:
        _logger.info("%s: restored the indentation of modifier keys that stand at column 0", source)
    return root


def _compose(text: str, source: str) -> yaml.MappingNode:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # What is never closed is noticed on the line after the last.
        line = None if mark is None else min(mark.line + 1, len(text.splitlines()))
        context = f"{error.context} on line {error.context_mark.line + 1}, " if error.context_mark else ""
        raise Place(source, line).error(f"this is not valid YAML: {context}{error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Place(source, line).error(
            f"the character U+{error.character:04X} is not allowed in YAML; remove it"
        ) from error
    except RecursionError as error:
        raise Place(source).error("the YAML is nested too deeply to be a recipe") from error
    if root is None:
        raise Place(source).error(
            "the recipe is empty; write at least one modifier under a key such as pruning_modifiers"
        )
    if not isinstance(root, yaml.MappingNode):
        raise Place(source, _line(root)).error(
            "a recipe must be a mapping with keys such as pruning_modifiers at the top"
        )
    return root


def _modifier_items(root: yaml.MappingNode) -> Iterator[yaml.Node]:
    for key, value in root.value:
        if isinstance(key, yaml.ScalarNode) and "modifiers" in key.value and isinstance(value, yaml.SequenceNode):
            yield from value.value


def _check_keys(document: Document) -> None:
    for node in _nodes(document.root):
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[bool, object], int] = {}
        for key, _ in node.value:
            place = document.place(_line(key))
            if not isinstance(key, yaml.ScalarNode):
                raise place.error("a key must be a single value, not a list or a mapping")
            identity = _identity(key, place)
            if identity in lines:
                raise place.error(
                    f"the key {key.value} is given twice, on lines {lines[identity]} and {_line(key)}; keep one"
                )
            lines[identity] = _line(key)


def _refuse_foreign_tags(document: Document) -> None:
    items = {id(item) for item in _modifier_items(document.root)}
    for node in _nodes(document.root):
        if node.tag in _ALLOWED_TAGS or id(node) in items:
            continue
        cure = "remove it"
        if node.tag.startswith("!") and node.tag.endswith("Modifier"):
            cure = "a modifier must be an item of a list whose key contains `modifiers`, such as pruning_modifiers"
        raise document.place(_line(node)).error(
            f"the tag {_shown_tag(node.tag)} is not allowed here: a recipe is plain data; {cure}"
        )


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Yield every node once; aliases may repeat nodes or close a circle."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(reversed(node.value))
        elif isinstance(node, yaml.MappingNode):
            waiting.extend(child for pair in reversed(node.value) for child in reversed(pair))


def _all_pairs(
    mapping: yaml.MappingNode, place: Place, inside: tuple[int, ...]
) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Yield the mapping's own pairs, then those that it merges."""
    if id(mapping) in inside:
        raise place.error("the merge key << merges a mapping into itself; remove it")
    merged: list[yaml.Node] = []
    for key, value in mapping.value:
        if key.tag != _MERGE:
            yield key, value
        elif isinstance(value, yaml.SequenceNode):
            merged.extend(value.value)
        else:
            merged.append(value)
    for node in merged:
        if not isinstance(node, yaml.MappingNode):
            raise place.error("the merge key << must be followed by an alias of a mapping, such as `<<: *defaults`")
        yield from _all_pairs(node, place, (*inside, id(mapping)))


def _identity(key: yaml.ScalarNode, place: Place) -> tuple[bool, object]:
    """Return what makes two keys the same: 0 and 0.0 are, 1 and true are not."""
    value = scalar_value(key, place)
    return isinstance(value, bool), value


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shown_tag(tag: str) -> str:
    return "!!" + tag.removeprefix(_STANDARD) if tag.startswith(_STANDARD) else tag
