"""Variables of a recipe: nodes -> Python values, with variables replaced by their values.

A variable is a key that holds no modifiers. At the top of the recipe it is visible everywhere; in a stage it is visible
in that stage alone and hides one of the same name at the top. It is used in ``eval(...)`` or through a YAML anchor::

    num_epochs: &num_epochs 10.0
    training_modifiers:
      - !EpochRangeModifier
        end_epoch: eval(num_epochs + 2)     # or: *num_epochs

A value that is given from outside replaces the variable in both uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import yaml

from mfac_core.errors import RecipeError
from mfac_core.recipe.documents import METADATA, Document
from mfac_core.recipe.expressions import ExpressionError, evaluate
from mfac_core.recipe.nodes import Entry, pairs, scalar_value
from mfac_core.recipe.places import Place, nearest
from mfac_core.recipe.values import as_python

__all__ = ["VariableValues", "Variables", "read_variables"]

VariableValues = Mapping[str, object] | str
"""Values for variables: a mapping, JSON text, or ``name=value,other=value``."""

_DEEPEST = 4
_MAX_VALUES = 100_000
_NOT_VARIABLES = frozenset({"version", METADATA})
_GIVEN = Place("variables")
_CURE = 'write a mapping, JSON, or "name=value,other=value"'

_Name = tuple[str, str]
"""A variable: the stage that defines it (empty for the top), and its name."""


def read_variables(variables: VariableValues | None) -> dict[str, object]:
    """Return values for variables as a mapping; those in ``name=value,other=value`` are read as YAML.

    Example:
        >>> read_variables("num_epochs=30,mask=2:4"), read_variables('{"params": ["a"]}')
        ({'num_epochs': 30, 'mask': '2:4'}, {'params': ['a']})
    """
    if variables is None or (isinstance(variables, str) and not variables.strip()):
        return {}
    values: object = variables
    if isinstance(variables, str):
        values = _from_json(variables) if variables.lstrip().startswith(("{", "[")) else _from_pairs(variables)
    if not isinstance(values, Mapping):
        raise _GIVEN.error(f"{values!r} is not a mapping; {_CURE}")
    for name in values:
        if not isinstance(name, str):
            raise _GIVEN.error(f"{name!r} is not the name of a variable; {_CURE}")
    return {name: as_python(value) for name, value in values.items()}


class Variables:
    """The variables of a recipe.

    Args:
        document: The recipe.
        replaced: Variable name -> value that replaces the one in the recipe, at the top and in all stages.

    Raises:
        RecipeError: If a name is that of no variable of the recipe.
    """

    def __init__(self, document: Document, replaced: Mapping[str, object]) -> None:
        self._entries: dict[_Name, Entry] = {
            (section.stage, entry.key): entry
            for section in document.sections()
            for entry in section.others
            if entry.key not in _NOT_VARIABLES
        }
        self._values: dict[_Name, object] = {}
        self._by_node: dict[int, object] = {}
        self._read = 0
        # Scalars alone: variables that use one another many times are evaluated once each.
        self._known: dict[_Name, object] = {}
        for name, value in replaced.items():
            for key, entry in self._entries_of(name, document.place()).items():
                self._values[key] = value
                # By node, so that an alias of the variable's anchor sees the value too. Where the variable is itself
                # an alias, its node belongs to another variable, which stays as it is.
                if entry.value.start_mark.index > entry.node.start_mark.index:
                    self._by_node[id(entry.value)] = value

    def _entries_of(self, name: str, place: Place) -> dict[_Name, Entry]:
        """Return the entries of a variable: at most one at the top and in each stage, at least one in all."""
        found = {key: entry for key, entry in self._entries.items() if key[1] == name}
        if not found:
            raise place.error(f"variables: {self._unknown(name)}")
        return found

    def value(self, node: yaml.Node, place: Place, stage: str = "") -> object:
        """Return the Python value of a node in a stage; empty for the top."""
        self._read = 0
        return self._value(node, place, stage, inside=())

    def _value(self, node: yaml.Node, place: Place, stage: str, inside: tuple[_Name, ...], depth: int = 0) -> object:
        self._read += 1
        if self._read > _MAX_VALUES:
            raise place.error(f"this contains more than {_MAX_VALUES} values; no key of a recipe needs that")
        if id(node) in self._by_node:
            return self._evaluated(self._by_node[id(node)], place, stage, inside, depth)
        if isinstance(node, yaml.ScalarNode):
            return self._evaluated(scalar_value(node, place), place, stage, inside, depth)
        if depth == _DEEPEST:
            raise place.error("lists and mappings are nested too deeply here; no key of a recipe needs that")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, place, stage, inside, depth + 1) for child in node.value]
        if not isinstance(node, yaml.MappingNode):
            raise place.error("this is neither a value, a list nor a mapping")
        return {
            scalar_value(key, place): self._value(child, place, stage, inside, depth + 1)
            for key, child in pairs(node, place)
        }

    def _evaluated(self, value: object, place: Place, stage: str, inside: tuple[_Name, ...], depth: int) -> object:
        """Return the value of ``eval(...)``; any other value as it is."""
        if not isinstance(value, str):
            return value
        text = value.strip()
        if not (text.startswith("eval(") and text.endswith(")")):
            return value
        expression = text.removeprefix("eval(").removesuffix(")").strip()
        if self._found(expression, stage) is not None:
            return self._variable(expression, place, stage, inside, depth)
        try:
            return evaluate(expression, lambda name: self._variable(name, place, stage, inside, depth))
        except ExpressionError as error:
            raise place.error(f"{value!r}: {error}") from error

    def _variable(self, name: str, place: Place, stage: str, inside: tuple[_Name, ...], depth: int) -> object:
        found = self._found(name, stage)
        if found is None:
            raise place.error(self._unknown(name))
        if found in inside:
            circle = " -> ".join(name for _, name in (*inside, found))
            raise place.error(f"the variable {name} refers to itself ({circle}); give it a value")
        inside = (*inside, found)
        if found in self._known:
            return self._known[found]
        if found in self._values:
            value = self._evaluated(self._values[found], place, found[0], inside, depth)
        else:
            value = self._value(self._entries[found].value, place, found[0], inside, depth)
        if not isinstance(value, list | dict):
            self._known[found] = value
        return value

    def _found(self, name: str, stage: str) -> _Name | None:
        return next((key for key in ((stage, name), ("", name)) if key in self._entries), None)

    def _unknown(self, name: str) -> str:
        names = list(dict.fromkeys(name for _, name in self._entries))
        if not names:
            return f"{name} is not a variable: this recipe has none; a variable is a key that holds no modifiers"
        return f"{name} is not a variable of this recipe{nearest(name, names)}; its variables are {', '.join(names)}"


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _GIVEN.error(f"{text!r} is not valid JSON ({error}); {_CURE}") from error


def _from_pairs(text: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for part in text.split(","):
        name, separator, value = part.partition("=" if "=" in part else ":")
        if not separator or not name.strip():
            raise _GIVEN.error(f"{part.strip()!r} in {text!r} is not of the form name=value; {_CURE}")
        values[name.strip()] = _from_scalar(value.strip())
    return values


def _from_scalar(text: str) -> object:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return scalar_value(node, Place("")) if isinstance(node, yaml.ScalarNode) else text
    except (yaml.YAMLError, RecipeError):
        return text
