"""Recipe text -> a checked tree of YAML nodes that know their lines.

Three steps, none of which looks inside modifiers: find the YAML (a file, a text, a Markdown front matter), parse it
into nodes, refuse what a recipe must not contain. No object is ever constructed from a tag, so a recipe cannot run
code.
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
from mfac_core.recipe.places import Place, Wrong

__all__ = [
    "METADATA",
    "TEXT",
    "Document",
    "Entry",
    "Section",
    "data",
    "entries",
    "pairs",
    "read_document",
    "scalar_value",
]

METADATA = "__metadata__"
"""The key of a recipe whose value says nothing to do, and is kept."""

TEXT = "<text>"
"""What messages call a recipe that is given as text."""

_YAML_SUFFIXES = (".yaml", ".yml")
_MARKDOWN_SUFFIXES = (".md", ".markdown")
_STANDARD = "tag:yaml.org,2002:"
_MERGE = _STANDARD + "merge"
_NUMBER_TAGS = frozenset(_STANDARD + name for name in ("int", "float"))
_CONSTRUCTED_TAGS = _NUMBER_TAGS | frozenset(_STANDARD + name for name in ("null", "bool", "str"))
_ALLOWED_TAGS = _CONSTRUCTED_TAGS | {_STANDARD + name for name in ("seq", "map", "merge", "timestamp", "value")}
# YAML 1.1 wants a dot in every float, so that PyYAML reads 1e-5 as a string.
FLOAT_WITHOUT_DOT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
_HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DELIMITERS = ("---", "+++")
# All but what PyYAML takes as the end of a line.
_WITHIN_A_LINE = re.compile(r"[^\r\n\x85\u2028\u2029]")

_logger = logging.getLogger("mfac_core")


class Entry(NamedTuple):
    """One key of a mapping with its value and its line; ``node`` is the key itself."""

    key: str
    line: int
    value: yaml.Node
    node: yaml.ScalarNode


class Section(NamedTuple):
    """The top level of a recipe (``stage`` is empty then), or one of its stages.

    Attributes:
        stage: Name of the stage.
        modifiers: The keys that hold modifiers.
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
        text: The whole text of the source, as it stands.
        parsed: The YAML in it that was parsed: with the same lines, and blanks in place of what stands around it.
    """

    source: str
    root: yaml.MappingNode
    text: str
    parsed: str

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
    """Read a recipe into a checked node tree.

    Args:
        path_or_text: A path to a YAML file or to a Markdown file with a YAML front matter; or, where the string
            contains a newline, the recipe's text itself.
        text_source: What messages call a text.

    Returns:
        The node tree; every mapping has distinct keys, every tag is a standard one or that of a list item under a
        ``modifiers`` key.

    Raises:
        RecipeError: If there is no such file, or it is not a recipe's YAML.
        TypeError: If it is neither a path nor text.
    """
    if isinstance(path_or_text, str) and ("\n" in path_or_text or "\r" in path_or_text):
        source, text = text_source, path_or_text
        markdown = _begins_like_markdown(text)
    else:
        if not isinstance(path_or_text, str | os.PathLike):
            raise TypeError(
                f"the recipe is a {type(path_or_text).__name__}; pass the path of a file or the text of a recipe"
            )
        source = os.fspath(path_or_text)
        text = _read_file(source)
        markdown = Path(source).suffix.lower() in _MARKDOWN_SUFFIXES
    root, parsed = _parse(_front_matter(text, source) if markdown else text, source)
    document = Document(source, root, text, parsed)
    wrong = Wrong()
    _check_keys(document, wrong)
    _check_tags(document, wrong)
    if wrong:
        wrong.refuse()
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
    return [Entry(str(key.value), _line(key), value, key) for key, value in pairs(mapping, place)]


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


def data(node: yaml.Node, place: Place) -> object:
    """Return the Python value of a node as it stands, without variables put in.

    Args:
        node: A scalar, a list or a mapping.
        place: Where it stands.

    Returns:
        ``None``, a bool, a number, a string, or a list or dict of such values; one object for all aliases of a node.

    Raises:
        RecipeError: If it holds itself, or a text that does not fit its tag.
    """
    return _data(node, place, known={}, inside=())


def scalar_value(node: yaml.ScalarNode, place: Place) -> object:
    """Return the Python value of a scalar node.

    Args:
        node: The scalar; its tag must be a standard one.
        place: Where it stands.

    Returns:
        ``None``, a bool, an int, a float or a string. A plain ``1e-5`` is a float, and a plain ``2:4`` a string.

    Raises:
        RecipeError: If the text does not fit an explicit tag, as in ``!!int abc``.
    """
    if node.tag == _STANDARD + "str" and node.style is None and FLOAT_WITHOUT_DOT.fullmatch(node.value):
        return float(node.value)
    # YAML 1.1 reads 2:4 as a number of base 60; in a recipe it is a pattern of zeros.
    if node.tag not in _CONSTRUCTED_TAGS or (node.tag in _NUMBER_TAGS and node.style is None and ":" in node.value):
        return str(node.value)
    try:
        value: object = yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError, IndexError) as error:
        raise place.error(f"{node.value!r} is not a valid {_shown_tag(node.tag)}") from error
    return value


def _data(node: yaml.Node, place: Place, known: dict[int, object], inside: tuple[int, ...]) -> object:
    if isinstance(node, yaml.ScalarNode):
        return scalar_value(node, place)
    if id(node) in inside:
        raise place.error("this holds an alias of itself; remove it")
    if id(node) not in known:
        inside = (*inside, id(node))
        known[id(node)] = (
            {scalar_value(key, place): _data(value, place, known, inside) for key, value in pairs(node, place)}
            if isinstance(node, yaml.MappingNode)
            else [_data(item, place, known, inside) for item in node.value]
        )
    return known[id(node)]


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
        return Path(path).read_bytes().decode("utf-8")
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
        return text.lstrip("\ufeff").lstrip().startswith("<!--")
    delimiter = lines[start].strip("\ufeff \t\r")
    return delimiter == "+++" or any(line.rstrip() == delimiter for line in lines[start + 1 :])


def _front_matter(text: str, source: str) -> str:
    """Return the text with blanks in place of all but the YAML between the two delimiters."""
    lines = text.split("\n")
    start = _front_matter_start(text)
    if start is None:
        raise Place(source, 1).error(
            "no YAML front matter; the first line (after an HTML comment, if any) must be exactly `---`, and another "
            "`---` line must close it"
        )
    delimiter = lines[start].strip("\ufeff \t\r")
    for end in range(start + 1, len(lines)):
        if lines[end].rstrip() == delimiter:
            before, after = "\n".join(lines[: start + 1]), "\n".join(lines[end:])
            yaml_lines = "\n".join(lines[start + 1 : end])
            return _WITHIN_A_LINE.sub(" ", before) + "\n" + yaml_lines + "\n" + _WITHIN_A_LINE.sub(" ", after)
    raise Place(source, start + 1).error(
        f"the YAML front matter that begins here is never closed; add a line that is exactly `{delimiter}`"
    )


def _front_matter_start(text: str) -> int | None:
    """Return the index of the opening delimiter's line, skipping blank lines and HTML comments."""
    position = 1 if text.startswith("\ufeff") else 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip())
        comment = _HTML_COMMENT.match(text, position)
        if comment is None:
            break
        position = comment.end()
    start = text.count("\n", 0, position)
    line = text.split("\n")[start].strip("\ufeff")
    return start if line.rstrip() in _DELIMITERS else None


def _parse(text: str, source: str) -> tuple[yaml.MappingNode, str]:
    """Return the mapping at the top, and the text that it was parsed from."""
    try:
        root = _compose(text, source)
    except RecipeError:
        restored = restore_indentation(text)
    else:
        if not any(isinstance(item, yaml.ScalarNode) and item.value == "" for item in _modifier_items(root)):
            return root, text
        restored = restore_indentation(text)
    root = _compose(restored, source)
    if restored != text:
        _logger.info("%s: restored the indentation of modifier keys that stand at column 0", source)
    return root, restored


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
    root = _below_a_key(root)
    if not isinstance(root, yaml.MappingNode):
        raise Place(source, _line(root)).error(
            "a recipe must be a mapping with keys such as pruning_modifiers at the top"
        )
    return root


def _below_a_key(root: yaml.Node) -> yaml.Node:
    """Return a list of modifiers, or a single one, that is the whole text as the value of a key."""
    items = root.value if isinstance(root, yaml.SequenceNode) else [root]
    if not items or not all(isinstance(item, yaml.MappingNode) and item.tag.startswith("!") for item in items):
        return root
    marks = (root.start_mark, root.end_mark)
    key = yaml.ScalarNode(_STANDARD + "str", "modifiers", *marks)
    return yaml.MappingNode(_STANDARD + "map", [(key, yaml.SequenceNode(_STANDARD + "seq", items, *marks))], *marks)


def _modifier_items(root: yaml.MappingNode) -> Iterator[yaml.Node]:
    """Yield the items of all lists of modifiers, at the top and one level below, where stages have theirs."""
    for value in _values_of_modifiers(root):
        if isinstance(value, yaml.SequenceNode):
            yield from value.value
    for _, stage in root.value:
        if isinstance(stage, yaml.MappingNode):
            for value in _values_of_modifiers(stage):
                if isinstance(value, yaml.SequenceNode):
                    yield from value.value


def _values_of_modifiers(mapping: yaml.MappingNode) -> list[yaml.Node]:
    return [value for key, value in mapping.value if isinstance(key, yaml.ScalarNode) and "modifiers" in key.value]


def _check_keys(document: Document, wrong: Wrong) -> None:
    items = {id(item) for item in _modifier_items(document.root)}
    for node in _nodes(document.root):
        if isinstance(node, yaml.MappingNode):
            _check_keys_of(node, document, wrong, is_modifier=id(node) in items)


def _check_keys_of(node: yaml.MappingNode, document: Document, wrong: Wrong, *, is_modifier: bool) -> None:
    """Refuse a key that is given twice; in a modifier, where recipes in the world do so, the last one counts."""
    written: dict[tuple[bool, object], tuple[yaml.ScalarNode, yaml.Node]] = {}
    for key, value in node.value:
        place = document.place(_line(key))
        with wrong.gathered(place.line):
            if not isinstance(key, yaml.ScalarNode):
                raise place.error("a key must be a single value, not a list or a mapping")
            identity = _identity(key, place)
            if identity in written:
                twice = f"the key {key.value} is given twice, on lines {_line(written[identity][0])} and {_line(key)}"
                if not is_modifier:
                    raise place.error(f"{twice}; keep one")
                _logger.warning(place.message(f"{twice}; the last one counts, keep only that"))
                del written[identity]
            written[identity] = (key, value)
    node.value = list(written.values())


def _check_tags(document: Document, wrong: Wrong) -> None:
    items = {id(item) for item in _modifier_items(document.root)}
    for node in _nodes(document.root):
        if node.tag in _ALLOWED_TAGS or id(node) in items:
            continue
        cure = "remove it"
        if node.tag.startswith("!") and node.tag.endswith("Modifier"):
            cure = "a modifier must be an item of a list whose key contains `modifiers`, such as pruning_modifiers"
        place = document.place(_line(node))
        with wrong.gathered(place.line):
            raise place.error(f"the tag {_shown_tag(node.tag)} is not allowed here: a recipe is plain data; {cure}")


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


def _section(stage: str, keys: list[Entry]) -> Section:
    modifiers = tuple(entry for entry in keys if "modifiers" in entry.key)
    return Section(stage, modifiers, tuple(entry for entry in keys if entry not in modifiers))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shown_tag(tag: str) -> str:
    return "!!" + tag.removeprefix(_STANDARD) if tag.startswith(_STANDARD) else tag
