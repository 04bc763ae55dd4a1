"""Nodes -> plain Python values, with the recipe's variables put in.

A variable is a top-level key with a single value. It is used as ``eval(name)``, or through a YAML anchor::

    num_epochs: &num_epochs 10.0
    training_modifiers:
      - !EpochRangeModifier
        end_epoch: eval(num_epochs)     # or: *num_epochs

A value that is given from outside replaces the variable in both places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

from mfac_core.recipe.documents import Document, pairs, scalar_value
from mfac_core.recipe.places import Place, nearest

__all__ = ["Variables"]

_DEEPEST = 4
_EVAL = re.compile(r"eval\(\s*(?P<inside>.*?)\s*\)")
_NAME = re.compile(r"[A-Za-z_]\w*")
_NOT_VARIABLES = frozenset({"version", "__metadata__"})


class Variables:
    """The variables of a recipe, and what they make of its nodes.

    Args:
        document: The recipe.
        overrides: Variable name -> value to use instead of the one in the recipe.

    Raises:
        RecipeError: If an override names no variable of the recipe.
    """

    def __init__(self, document: Document, overrides: Mapping[str, object]) -> None:
        self._nodes = {
            entry.key: entry.value
            for entry in document.entries
            if isinstance(entry.value, yaml.ScalarNode) and entry.key not in _NOT_VARIABLES
        }
        for name in overrides:
            if name not in self._nodes:
                raise document.place().error(f"variables: {self._unknown(name)}")
        # By node, so that an alias of the variable's anchor sees the override too.
        self._overrides = {id(self._nodes[name]): value for name, value in overrides.items()}

    def value(self, node: yaml.Node, place: Place) -> object:
        """Return the Python value of a node.

        Args:
            node: A scalar, a list or a mapping.
            place: Where it stands.

        Returns:
            ``None``, a bool, a number, a string, or a list or dict of such values.

        Raises:
            RecipeError: If the value refers to an unknown variable, calculates, or is nested too deeply.
        """
        return self._value(node, place, inside=())

    def _value(self, node: yaml.Node, place: Place, inside: tuple[str, ...], depth: int = 0) -> object:
        if id(node) in self._overrides:
            return self._overrides[id(node)]
        if isinstance(node, yaml.ScalarNode):
            value = scalar_value(node, place)
            return self._evaluate(value, place, inside) if isinstance(value, str) else value
        if depth == _DEEPEST:
            raise place.error("lists and mappings are nested too deeply here; no key of a recipe needs that")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, place, inside, depth + 1) for child in node.value]
        if not isinstance(node, yaml.MappingNode):
            raise place.error("this is neither a value, a list nor a mapping")
        return {
            scalar_value(key, place): self._value(child, place, inside, depth + 1) for key, child in pairs(node, place)
        }

    def _evaluate(self, text: str, place: Place, inside: tuple[str, ...]) -> object:
        """Return the value of the variable if the text is ``eval(name)``, else the text itself."""
        if "eval(" not in text:
            return text
        found = _EVAL.fullmatch(text.strip())
        if found is None or not _NAME.fullmatch(found["inside"]):
            raise place.error(
                f"{text!r}: arithmetic in eval(...) is not supported yet; write eval(name) with the name of a variable"
            )
        name = found["inside"]
        if name not in self._nodes:
            raise place.error(self._unknown(name))
        if name in inside:
            raise place.error(f"the variable {name} refers to itself ({' -> '.join((*inside, name))}); give it a value")
        return self._value(self._nodes[name], place, (*inside, name))

    def _unknown(self, name: str) -> str:
        if not self._nodes:
            return f"{name} is not a variable: this recipe has none; a variable is a top-level key with a single value"
        known = ", ".join(self._nodes)
        return f"{name} is not a variable of this recipe{nearest(name, self._nodes)}; its variables are {known}"
