"""Recipe text with other values for its variables and no other change: the recipe of one run of a sweep."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import yaml

from mfac_core.recipe.documents import Document, read_document
from mfac_core.recipe.nodes import Entry
from mfac_core.recipe.values import flow_text
from mfac_core.recipe.variables import Variables, VariableValues, read_variables

__all__ = ["recipe_with_variables"]

_LINE_END = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_BEGINNINGS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_ENDS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


def recipe_with_variables(path_or_text: str | os.PathLike[str], variables: VariableValues | None) -> str:
    r"""Return the text of a recipe with other values for its variables.

    Comments, anchors, layout and the text around the YAML stay the same, byte for byte.

    Args:
        path_or_text: A path to a recipe, or its text, as for :func:`load_recipe`.
        variables: Values for its variables: a mapping, JSON text, or ``name=value,other=value``.

    Returns:
        The text. A variable that is defined at the top and in stages is replaced everywhere.

    Raises:
        RecipeError: If the recipe is not YAML, or has no such variable.
        ValueError: If a value is of a type that a recipe cannot hold.

    Example:
        >>> print(recipe_with_variables("epochs: &epochs 3  # short\nx_modifiers: []", {"epochs": 30}))
        epochs: &epochs 30  # short
        x_modifiers: []
    """
    document = read_document(path_or_text)
    values = read_variables(variables)
    known = Variables(document, values)
    tokens = list(yaml.scan(document.parsed, Loader=yaml.SafeLoader))
    edits = [
        _edit(document, tokens, entry, flow_text(value, expressions=True))
        for name, value in values.items()
        for entry in known.entries(name, document.place()).values()
    ]
    text = document.text
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


class _Edit(NamedTuple):
    start: int
    end: int
    text: str


def _edit(document: Document, tokens: list[yaml.Token], entry: Entry, text: str) -> _Edit:
    """Return the position of the value of a variable, and its replacement."""
    index = next(
        number
        for number, token in enumerate(tokens)
        if isinstance(token, yaml.ValueToken) and token.start_mark.index >= entry.node.end_mark.index
    )
    while isinstance(tokens[index + 1], yaml.AnchorToken | yaml.TagToken):
        index += 1
    before, first = tokens[index], tokens[index + 1]
    last = _last_token(tokens, index + 1)
    if last is None:
        at = _offset(document, before.end_mark)
        return _Edit(at, at, f" {text}")
    start, end = _offset(document, first.start_mark), _offset(document, last.end_mark)
    # The end of a block scalar is the beginning of what follows it.
    end = start + len(document.text[start:end].rstrip())
    # A list may begin in the column of its key; in one line, a value may not.
    too_far_left = first.start_mark.line > entry.node.start_mark.line and (
        first.start_mark.column <= entry.node.start_mark.column
    )
    return _Edit(start, end, f" {text}" if too_far_left else text)


def _last_token(tokens: list[yaml.Token], first: int) -> yaml.Token | None:
    """Return the last token of the value that begins with the token ``first``; ``None`` if the value is empty."""
    if isinstance(tokens[first], yaml.ScalarToken | yaml.AliasToken):
        return tokens[first]
    last, depth = None, 0
    for token in tokens[first:]:
        if depth == 0 and isinstance(token, (*_ENDS, yaml.KeyToken, yaml.StreamEndToken, yaml.DocumentEndToken)):
            break
        depth += isinstance(token, _BEGINNINGS) - isinstance(token, _ENDS)
        if not isinstance(token, yaml.BlockEndToken):
            last = token
        if depth == 0 and isinstance(token, _ENDS):
            break
    return last


def _offset(document: Document, mark: yaml.Mark) -> int:
    """Return the position in the source of a mark of the parsed YAML; both have the same lines."""
    ends = [match.end() for match in _LINE_END.finditer(document.text)]
    return (ends[mark.line - 1] if mark.line else 0) + int(mark.column)
