"""Recipe text -> a checked tree of YAML nodes that know their lines.

The checks find what a recipe must not contain: keys given twice, and tags other than those of modifiers. What a
modifier contains is not checked here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import yaml

from mfac_core.errors import RecipeError
from mfac_core.recipe.front_matter import TEXT, read_text, yaml_of
from mfac_core.recipe.indentation import restore_indentation
from mfac_core.recipe.nodes import STANDARD, Entry, entries, key_identity, line_of, tag_text
from mfac_core.recipe.places import CollectedErrors, Place

__all__ = ["METADATA", "Document", "Section", "read_document"]

METADATA = "__metadata__"
"""The key of a recipe under which it keeps data that has no effect."""

_ALLOWED_TAGS = {
    STANDARD + name for name in ("int", "float", "null", "bool", "str", "seq", "map", "merge", "timestamp", "value")
}

_logger = logging.getLogger("mfac_core")


class Section(NamedTuple):
    """The top level of a recipe (``stage`` is empty then), or one of its stages.

    Attributes:
        stage: Name of the stage.
        modifiers: The keys that contain modifiers.
        others: All other keys, stages excluded.
    """

    stage: str
    modifiers: tuple[Entry, ...]
    others: tuple[Entry, ...]


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

    def sections(self) -> tuple[Section, ...]:
        """Return the top level and the stages, in document order."""
        top = entries(self.root, self.place())
        stages = [entry for entry in top if self._is_stage(entry)]
        rest = [entry for entry in top if entry not in stages]
        return (
            _section("", rest),
            *(
                _section(entry.key, entries(entry.value, self.place(entry.line, entry.key)))  # type: ignore[arg-type]
                for entry in stages
            ),
        )

    def _is_stage(self, entry: Entry) -> bool:
        return isinstance(entry.value, yaml.MappingNode) and any(
            "modifiers" in inner.key for inner in entries(entry.value, self.place(entry.line, entry.key))
        )


def read_document(path_or_text: str | os.PathLike[str], text_source: str = TEXT) -> Document:
    """Read a recipe from a path or a text into a checked node tree; messages call a text ``text_source``."""
    source, text, is_markdown = read_text(path_or_text, text_source)
    document = Document(source, _parse(yaml_of(text, source) if is_markdown else text, source))
    errors = CollectedErrors()
    _check_keys(document, errors)
    _check_tags(document, errors)
    if errors:
        errors.raise_all()
    return document


def _parse(text: str, source: str) -> yaml.MappingNode:
    """Return the mapping at the top, with indentation restored if it was lost."""
    with suppress(RecipeError):
        root = _compose(text, source)
        if not any(isinstance(item, yaml.ScalarNode) and item.value == "" for item in _modifier_items(root)):
            return root
    restored = restore_indentation(text)
    root = _compose(restored, source)
    if restored != text:
        _logger.info("%s: restored the indentation of modifier keys at column 0", source)
    return root


def _compose(text: str, source: str) -> yaml.MappingNode:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # PyYAML reports a bracket that is never closed on the line after the last.
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
    root = _below_a_key(root)
    if not isinstance(root, yaml.MappingNode):
        raise Place(source, line_of(root)).error(
            "a recipe must be a mapping with keys such as pruning_modifiers at the top"
        )
    return root


def _below_a_key(root: yaml.Node) -> yaml.Node:
    """Wrap a text that is nothing but a list of modifiers, or a single one, into a mapping with one key."""
    items = root.value if isinstance(root, yaml.SequenceNode) else [root]
    if not items or not all(isinstance(item, yaml.MappingNode) and item.tag.startswith("!") for item in items):
        return root
    marks = (root.start_mark, root.end_mark)
    key = yaml.ScalarNode(STANDARD + "str", "modifiers", *marks)
    return yaml.MappingNode(STANDARD + "map", [(key, yaml.SequenceNode(STANDARD + "seq", items, *marks))], *marks)


def _modifier_items(root: yaml.MappingNode) -> Iterator[yaml.Node]:
    """Yield the items of all lists of modifiers, at the top and in stages, one level below."""
    for mapping in (root, *(stage for _, stage in root.value if isinstance(stage, yaml.MappingNode))):
        for key, value in mapping.value:
            if isinstance(key, yaml.ScalarNode) and "modifiers" in key.value and isinstance(value, yaml.SequenceNode):
                yield from value.value


def _check_keys(document: Document, errors: CollectedErrors) -> None:
    items = {id(item) for item in _modifier_items(document.root)}
    for node in _nodes(document.root):
        if isinstance(node, yaml.MappingNode):
            _check_keys_of(node, document, errors, is_modifier=id(node) in items)


def _check_keys_of(node: yaml.MappingNode, document: Document, errors: CollectedErrors, *, is_modifier: bool) -> None:
    """Refuse a key that is given twice; in a modifier, where published recipes have it, the last one counts."""
    written: dict[tuple[bool, object], tuple[yaml.ScalarNode, yaml.Node]] = {}
    for key, value in node.value:
        place = document.place(line_of(key))
        with errors.collect(place.line):
            if not isinstance(key, yaml.ScalarNode):
                raise place.error("a key must be a single value, not a list or a mapping")
            known = key_identity(key, place)
            if known in written:
                twice = f"the key {key.value} is given twice, on lines {line_of(written[known][0])} and {line_of(key)}"
                if not is_modifier:
                    raise place.error(f"{twice}; keep one")
                _logger.warning(place.message(f"{twice}; the last one counts, keep only that"))
                del written[known]
            written[known] = (key, value)
    node.value = list(written.values())


def _check_tags(document: Document, errors: CollectedErrors) -> None:
    items = {id(item) for item in _modifier_items(document.root)}
    for node in _nodes(document.root):
        if node.tag in _ALLOWED_TAGS or id(node) in items:
            continue
        cure = "remove it"
        if node.tag.startswith("!") and node.tag.endswith("Modifier"):
            cure = "a modifier must be an item of a list whose key contains `modifiers`, such as pruning_modifiers"
        place = document.place(line_of(node))
        errors.add(
            place.line,
            place.error(f"the tag {tag_text(node.tag)} is not allowed here: a recipe is plain data; {cure}"),
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


def _section(stage: str, keys: list[Entry]) -> Section:
    modifiers = tuple(entry for entry in keys if "modifiers" in entry.key)
    return Section(stage, modifiers, tuple(entry for entry in keys if entry not in modifiers))
