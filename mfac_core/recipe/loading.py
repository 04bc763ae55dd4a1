"""Load a recipe: from a path or a text to settings, in one call."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import yaml

from mfac_core.recipe.documents import METADATA, Document, read_document
from mfac_core.recipe.formats import Settings, is_unsupported
from mfac_core.recipe.front_matter import TEXT
from mfac_core.recipe.modifiers import name_of, read_modifier
from mfac_core.recipe.nodes import Entry, data, entries, line_of
from mfac_core.recipe.places import CollectedErrors, Place
from mfac_core.recipe.variables import Variables, VariableValues, read_variables
from mfac_core.settings.pruning import PruningSettings

__all__ = ["Recipe", "load_recipe"]

_NOT_A_MODIFIER = "this is not a modifier; a key that contains `modifiers` holds items such as `- !MFACPruningModifier`"
_NOT_A_LIST = "this key contains `modifiers`, so it must hold a list of items such as `- !MFACPruningModifier`"

_logger = logging.getLogger("mfac_core")


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe.

    Args:
        modifiers: The settings of every modifier, in document order: those at the top, then those of each stage.
        source: Path of the recipe, or ``<text>``.
        metadata: Data under its key ``__metadata__``, by name.

    Example:
        >>> from mfac_core import MagnitudeSettings
        >>> Recipe((MagnitudeSettings(final_sparsity=0.9, end_epoch=5.0),), "recipe.yaml").max_epochs
        5.0
    """

    modifiers: tuple[Settings, ...]
    source: str
    metadata: Mapping[str, object] = field(default_factory=dict)

    @property
    def pruning(self) -> tuple[PruningSettings, ...]:
        """The modifiers that prune."""
        return tuple(modifier for modifier in self.modifiers if isinstance(modifier, PruningSettings))

    @property
    def max_epochs(self) -> float:
        """The largest ``end_epoch`` of all modifiers that end; 0.0 if none does."""
        ends = (getattr(modifier, "end_epoch", math.inf) for modifier in self.modifiers)
        return float(max((end for end in ends if end != math.inf), default=0.0))


def load_recipe(
    path_or_text: str | os.PathLike[str],
    variables: VariableValues | None = None,
    unsupported: Literal["error", "skip"] = "error",
    *,
    source: str = TEXT,
) -> Recipe:
    """Load a recipe; nothing in it is ever executed.

    Args:
        path_or_text: A path to a YAML file, or to a Markdown file with a YAML front matter; a string with a line break
            is the text of a recipe.
        variables: Values that replace those of the recipe's variables: a mapping, JSON text, or
            ``name=value,other=value``.
        unsupported: What to do with a modifier of SparseML that is out of scope, such as one that quantizes: ``error``
            refuses the recipe, ``skip`` leaves the modifier out and logs a warning that names it.
        source: The name of a text in messages; a path has its own.

    Returns:
        The recipe's modifiers as checked settings.

    Raises:
        RecipeError: If there is no such file, or anything in it is unknown, missing, given twice or out of range. The
            message has one line ``<source>:<line>: <modifier>.<key>: <what is wrong, the rule, the cure>`` for each
            error.
        TypeError: If ``path_or_text`` is neither a path nor text.
        ValueError: If ``unsupported`` is neither of the two.

    Example:
        >>> recipe = load_recipe('''
        ... epochs: 10
        ... pruning_modifiers:
        ...   - !MFACPruningModifier
        ...     final_sparsity: 0.85
        ...     end_epoch: eval(epochs - 2)
        ... ''')
        >>> recipe.max_epochs, recipe.pruning[0].final_sparsity
        (8.0, 0.85)
    """
    if unsupported not in ("error", "skip"):
        raise ValueError(f"unsupported={unsupported!r} is neither 'error' nor 'skip'")
    document = read_document(path_or_text, source)
    values = Variables(document, read_variables(variables))
    errors = CollectedErrors()
    items = list(_items(document, errors))
    if not items and not errors:
        raise document.place().error(
            "no modifiers found; write at least one item under a key whose name contains `modifiers`, such as "
            "pruning_modifiers"
        )
    modifiers = []
    for item in items:
        if unsupported == "skip" and _is_skipped(item):
            continue
        with errors.collect(item.place.line):
            modifiers.append(read_modifier(item.name, item.node, item.place, values, item.stage))
    if errors:
        errors.raise_all()
    return Recipe(modifiers=tuple(modifiers), source=document.source, metadata=_metadata(document))


class _Item(NamedTuple):
    name: str
    node: yaml.Node
    place: Place
    stage: str


def _items(document: Document, errors: CollectedErrors) -> Iterator[_Item]:
    for section in document.sections():
        for entry in section.modifiers:
            place = document.place(entry.line, entry.key)
            if isinstance(entry.value, yaml.SequenceNode):
                for node in entry.value.value:
                    place = document.place(line_of(node))
                    with errors.collect(place.line):
                        yield _Item(name_of(node, place), node, place, section.stage)
            elif isinstance(entry.value, yaml.MappingNode):
                with errors.collect(place.line):
                    for inner in entries(entry.value, place):
                        with errors.collect(inner.line):
                            yield _item_of_key(inner, document.place(inner.line), section.stage)
            elif not (isinstance(entry.value, yaml.ScalarNode) and entry.value.value == ""):
                errors.add(place.line, place.error(_NOT_A_LIST))


def _item_of_key(entry: Entry, place: Place, stage: str) -> _Item:
    """Return the item for a key in a mapping of modifiers, the form of SparseML 1.6 and later."""
    if is_unsupported(entry.key):
        return _Item(entry.key, entry.value, place, stage)
    if not entry.key.endswith("Modifier"):
        raise place._replace(name=entry.key).error(_NOT_A_MODIFIER)
    raise place._replace(name=entry.key).error(
        "modifiers as keys, with start, end and targets, are not supported; write an item of a list, such as "
        f"`- !{entry.key}`, with start_epoch, end_epoch and params"
    )


def _is_skipped(item: _Item) -> bool:
    if not is_unsupported(item.name):
        return False
    _logger.warning(item.place.message(f"{item.name} is not supported and is left out"), extra={"asked_for": True})
    return True


def _metadata(document: Document) -> dict[str, object]:
    entry = next((entry for entry in document.sections()[0].others if entry.key == METADATA), None)
    if entry is None:
        return {}
    place = document.place(entry.line, entry.key)
    found = data(entry.value, place)
    if isinstance(found, dict):
        return found
    if found:
        cure = "write `name: value` lines below it"
        _logger.warning(place.message(f"{found!r} is not a mapping and is ignored; {cure}"))
    return {}
