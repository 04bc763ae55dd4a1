"""Load a recipe: from a path or a text to settings, in one call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

from mfac_core.recipe.documents import Document, entries, read_document
from mfac_core.recipe.modifiers import EpochRange, Modifier, read_modifier
from mfac_core.recipe.variables import Variables
from mfac_core.settings import PruningSettings

__all__ = ["Recipe", "load_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe.

    Args:
        modifiers: The settings of every modifier, in document order.
        source: Path of the recipe, or ``<text>``.
    """

    modifiers: tuple[Modifier, ...]
    source: str

    @property
    def pruning(self) -> tuple[PruningSettings, ...]:
        """The modifiers that prune, in document order."""
        return tuple(modifier for modifier in self.modifiers if isinstance(modifier, PruningSettings))

    @property
    def max_epochs(self) -> float:
        """The largest ``end_epoch`` of all modifiers; 0.0 if none has one."""
        ends = (
            modifier.end_epoch for modifier in self.modifiers if isinstance(modifier, (PruningSettings, EpochRange))
        )
        return float(max(ends, default=0.0))


def load_recipe(path_or_text: str | os.PathLike[str], variables: Mapping[str, object] | None = None) -> Recipe:
    """Load a recipe; nothing in it is ever run.

    Args:
        path_or_text: A path to a YAML file or to a Markdown file with a YAML front matter; or, where the string
            contains a newline, the recipe's text itself.
        variables: Values to use instead of those of the recipe's variables (its top-level keys with a single value).

    Returns:
        The recipe's modifiers as checked settings.

    Raises:
        RecipeError: If there is no such file, or anything in it is unknown, missing, given twice or out of range. The
            message has the form ``<source>:<line>: <modifier>.<key>: <what is wrong, the rule, the cure>``.

    Example:
        >>> recipe = load_recipe('''
        ... pruning_modifiers:
        ...   - !MFACPruningModifier
        ...     final_sparsity: 0.85
        ...     end_epoch: 10.0
        ... ''')
        >>> recipe.max_epochs, recipe.pruning[0].final_sparsity
        (10.0, 0.85)
    """
    document = read_document(path_or_text)
    values = Variables(document, variables or {})
    modifiers = tuple(
        read_modifier(item, document.place(int(item.start_mark.line) + 1), values) for item in _modifier_items(document)
    )
    if not modifiers:
        raise document.place().error(
            "no modifiers found; write at least one item under a key whose name contains `modifiers`, such as "
            "pruning_modifiers"
        )
    return Recipe(modifiers=modifiers, source=document.source)


def _modifier_items(document: Document) -> Iterator[yaml.Node]:
    for entry in document.entries:
        place = document.place(entry.line, entry.key)
        if "modifiers" not in entry.key:
            if isinstance(entry.value, yaml.MappingNode) and any(
                "modifiers" in inner.key for inner in entries(entry.value, place)
            ):
                raise place.error("stages are not supported yet; move the lists of modifiers to the top level")
        elif isinstance(entry.value, yaml.SequenceNode):
            yield from entry.value.value
        elif not (isinstance(entry.value, yaml.ScalarNode) and entry.value.value == ""):
            raise place.error(
                "this key contains `modifiers`, so it must hold a list of items such as `- !MFACPruningModifier`"
            )
