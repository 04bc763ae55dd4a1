"""YAML nodes -> keys with their lines, and plain values. No object is ever constructed from a tag."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import yaml

from mfac_core.recipe.places import Place

__all__ = [
    "FLOAT_WITHOUT_DOT",
    "STANDARD",
    "Entry",
    "data",
    "entries",
    "key_identity",
    "line_of",
    "pairs",
    "scalar_value",
    "tag_text",
]

STANDARD = "tag:yaml.org,2002:"
"""What the tags of standard YAML begin with."""

_MERGE = STANDARD + "merge"

FLOAT_WITHOUT_DOT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")
"""A number such as ``1e-5``: YAML 1.1 wants a dot in every float, so PyYAML reads it as a string."""

_NUMBER_TAGS = frozenset(STANDARD + name for name in ("int", "float"))
_CONSTRUCTED_TAGS = _NUMBER_TAGS | frozenset(STANDARD + name for name in ("null", "bool", "str"))


class Entry(NamedTuple):
    """One key of a mapping with its value and its line; ``node`` is the key itself."""

    key: str
    line: int
    value: yaml.Node
    node: yaml.ScalarNode


def entries(mapping: yaml.MappingNode, place: Place) -> list[Entry]:
    """Return the keys of a mapping in document order, merge keys (``<<``) resolved, each with its own line."""
    return [Entry(str(key.value), line_of(key), value, key) for key, value in pairs(mapping, place)]


def pairs(mapping: yaml.MappingNode, place: Place) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Return the keys and values of a mapping as nodes; its own keys win over merged ones."""
    found: dict[tuple[bool, object], tuple[yaml.ScalarNode, yaml.Node]] = {}
    for key, value in _all_pairs(mapping, place, inside=()):
        found.setdefault(key_identity(key, place), (key, value))
    return list(found.values())


def data(node: yaml.Node, place: Place) -> object:
    """Return the Python value of a node without replacing variables; all aliases of a node share one object."""
    return _data(node, place, known={}, inside=())


def scalar_value(node: yaml.ScalarNode, place: Place) -> object:
    """Return the Python value of a scalar node; a plain ``1e-5`` is a float, and a plain ``2:4`` a string."""
    if node.tag == STANDARD + "str" and node.style is None and FLOAT_WITHOUT_DOT.fullmatch(node.value):
        return float(node.value)
    # YAML 1.1 reads 2:4 as a number of base 60; in a recipe it is a pattern of zeros.
    if node.tag not in _CONSTRUCTED_TAGS or (node.tag in _NUMBER_TAGS and node.style is None and ":" in node.value):
        return str(node.value)
    try:
        value: object = yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError, IndexError) as error:
        raise place.error(f"{node.value!r} is not a valid {tag_text(node.tag)}") from error
    return value


def key_identity(key: yaml.ScalarNode, place: Place) -> tuple[bool, object]:
    """Return what makes two keys the same: 0 and 0.0 are, 1 and true are not."""
    value = scalar_value(key, place)
    return isinstance(value, bool), value


def line_of(node: yaml.Node) -> int:
    """Return the line on which a node begins, counted from 1."""
    return int(node.start_mark.line) + 1


def tag_text(tag: str) -> str:
    """Return a tag as it is written in YAML."""
    return "!!" + tag.removeprefix(STANDARD) if tag.startswith(STANDARD) else tag


def _data(node: yaml.Node, place: Place, known: dict[int, object], inside: tuple[int, ...]) -> object:
    if isinstance(node, yaml.ScalarNode):
        return scalar_value(node, place)
    if id(node) in inside:
        raise place.error("this contains an alias of itself; remove it")
    if id(node) not in known:
        inside = (*inside, id(node))
        known[id(node)] = (
            {scalar_value(key, place): _data(value, place, known, inside) for key, value in pairs(node, place)}
            if isinstance(node, yaml.MappingNode)
            else [_data(item, place, known, inside) for item in node.value]
        )
    return known[id(node)]


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
