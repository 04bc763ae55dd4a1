"""Modifiers of a recipe -> settings.

:data:`mfac_core.recipe.formats.MODIFIERS` lists the keys of each modifier. The settings check the values; their errors
get the file, the line and the key of the recipe here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import yaml

from mfac_core.errors import SettingError
from mfac_core.recipe.formats import MODIFIERS, ModifierFormat, Settings, is_unsupported
from mfac_core.recipe.keys import Key
from mfac_core.recipe.nodes import Entry, entries
from mfac_core.recipe.places import CollectedErrors, Place, nearest, nearest_names
from mfac_core.recipe.values import as_python
from mfac_core.recipe.variables import Variables
from mfac_core.schedules.pruning import pruning_epochs
from mfac_core.settings.pruning import PruningSettings

__all__ = ["name_of", "read_modifier", "settings_from_keys"]

_TAG = re.compile(r"!(?:(?:pytorch|keras|tensorflow)\.)?(?P<name>\w+)")

_logger = logging.getLogger("mfac_core")


_TINY = 1e-6


def _lowest_final_sparsity(fields: Mapping[str, Any]) -> float:
    initial = fields.get("initial_sparsity")
    return initial if isinstance(initial, float) and 0 < initial < 1 else _TINY


def _after_start(fields: Mapping[str, Any]) -> float:
    start = fields.get("start_epoch")
    return start + 1.0 if isinstance(start, float) and start > 0 else 1.0


_PLACEHOLDERS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "final_sparsity": _lowest_final_sparsity,
    "compression_sparsity": lambda fields: _TINY,
    "end_epoch": _after_start,
}
"""Field without a default -> a value with which the settings check all other values."""


def name_of(item: yaml.Node, place: Place) -> str:
    """Return the name of the modifier in the tag of a list item, without the name of a framework."""
    found = _TAG.fullmatch(item.tag)
    if found is None:
        raise place.error(
            f"an item of a modifiers list must begin with a modifier, such as `- !{next(iter(MODIFIERS))}`; "
            f"{_supported()}"
        )
    return found["name"]


def read_modifier(name: str, item: yaml.Node, place: Place, variables: Variables, stage: str = "") -> Settings:
    """Return the checked settings of a list item in a stage (empty for the top), its values read by ``variables``."""
    place = place._replace(name=name)
    modifier = _format(name, place)

    written: list[_Written] = []
    for entry in _keys_below(item, place):
        key_place = place._replace(line=entry.line, name=f"{name}.{entry.key}")
        if entry.key not in modifier.nested:
            written.append(_Written(entry.key, key_place, partial(variables.value, entry.value, key_place, stage)))
        elif isinstance(entry.value, yaml.ScalarNode):
            written += _nested(entry.key, key_place, variables.value(entry.value, key_place, stage))
        else:
            for inner in _keys_below(entry.value, key_place):
                inner_place = key_place._replace(line=inner.line, name=f"{key_place.name}.{inner.key}")
                value = partial(variables.value, inner.value, inner_place, stage)
                written.append(_Written(f"{entry.key}.{inner.key}", inner_place, value))
    return _settings(modifier, written, place)


def settings_from_keys(name: str, keys: Mapping[str, object]) -> Settings:
    """Return the settings of a modifier with these recipe keys.

    Args:
        name: Name of the modifier, such as ``MFACPruningModifier``.
        keys: Recipe key -> value, in Python's types or NumPy's.

    Returns:
        The settings, checked.

    Raises:
        RecipeError: If the modifier or one of its keys is unknown, missing, given twice or wrong; as for a recipe, but
            without file and line.

    Example:
        >>> settings_from_keys("GMPruningModifier", {"final_sparsity": 0.9, "end_epoch": 3}).end_epoch
        3.0
    """
    place = Place("", None, name)
    modifier = _format(name, place._replace(name=""))
    written: list[_Written] = []
    for key, value in keys.items():
        key_place = place._replace(name=f"{name}.{key}")
        if key in modifier.nested:
            written += _nested(key, key_place, as_python(value))
        else:
            written.append(_Written(key, key_place, partial(as_python, value)))
    return _settings(modifier, written, place)


class _Written(NamedTuple):
    """A key of a recipe; ``path`` names the key above it too, as in ``mfac_options.damp``."""

    path: str
    place: Place
    value: Callable[[], object]

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def nested_in(self) -> str:
        return self.path.rpartition(".")[0]


def _format(name: str, place: Place) -> ModifierFormat:
    if name in MODIFIERS:
        return MODIFIERS[name]
    if is_unsupported(name):
        raise place._replace(name="").error(
            f'{name} is not supported; remove it from the recipe, or load it with unsupported="skip"; {_supported()}'
        )
    raise place._replace(name="").error(f"!{name} is not a modifier{nearest(name, MODIFIERS)}; {_supported()}")


def _supported() -> str:
    return f"supported are {', '.join(MODIFIERS)}"


def _keys_below(node: yaml.Node, place: Place) -> list[Entry]:
    if isinstance(node, yaml.MappingNode):
        return entries(node, place)
    if isinstance(node, yaml.ScalarNode) and node.value == "":
        return []
    raise place.error("this must be followed by `key: value` lines, indented below it")


def _nested(key: str, place: Place, value: object) -> list[_Written]:
    """Return the keys in the value of a nesting key, such as a variable that contains a mapping."""
    if value is None or value == "":
        return []
    if not isinstance(value, Mapping):
        raise place.error(f"{value!r} must be a mapping, or `key: value` lines indented below it")
    return [
        _Written(f"{key}.{inner}", place._replace(name=f"{place.name}.{inner}"), partial(as_python, option))
        for inner, option in value.items()
    ]


def _settings(modifier: ModifierFormat, all_written: list[_Written], place: Place) -> Settings:
    fields: dict[str, Any] = {}
    written: dict[str, _Written] = {}
    misspelled: set[str] = set()
    errors = CollectedErrors()
    for key in all_written:
        with errors.collect(key.place.line):
            meaning = _meaning(key, modifier, misspelled)
            earlier = written.get(meaning.field or key.key)
            if earlier is not None:
                on_line = f" on line {earlier.place.line}" if earlier.place.line else ""
                raise key.place.error(f"{earlier.path}{on_line} already gives this setting; keep one of the two")
            written[meaning.field or key.key] = key
            value = _converted(key, meaning)
            if meaning.field is not None:
                fields[meaning.field] = value
    with errors.collect(place.line):
        _require(modifier, written, misspelled, place)
    for absent, note, other in modifier.absent:
        matters = not other or fields.get(str(modifier.keys[other].field), "auto") != "auto"
        if modifier.keys[absent].field not in written and matters:
            _logger.warning(place._replace(name=f"{place.name}.{absent}").message(note))
    with errors.collect(written["params"].place.line if "params" in written else None):
        _settle_params(fields, written)
    return _make(modifier, fields, written, place, errors)


def _meaning(written: _Written, modifier: ModifierFormat, misspelled: set[str]) -> Key:
    allowed = modifier.nested[written.nested_in] if written.nested_in else frozenset(modifier.keys)
    if written.key in allowed:
        return modifier.keys[written.key]
    known = [key for key in (*modifier.keys, *modifier.nested) if not written.nested_in or key in allowed]
    keys = f"the keys are {', '.join(known)}"
    if written.key in modifier.keys:
        cure = f"write {written.key} next to {written.nested_in}, not inside it"
        raise written.place.error(f"unknown key; {keys}; {cure}")
    misspelled.update(nearest_names(written.key, known))
    raise written.place.error(f"unknown key{nearest(written.key, known)}; {keys}")


def _converted(written: _Written, meaning: Key) -> object:
    value = written.value()
    try:
        converted = meaning.convert(value)
    except ValueError as error:
        raise written.place.error(f"{value!r} {error}") from error
    note = meaning.note(value)
    if note:
        _logger.warning(written.place.message(note))
    return converted


def _require(
    modifier: ModifierFormat, written: Mapping[str, _Written], misspelled: Collection[str], place: Place
) -> None:
    missing = [key for key in modifier.required if modifier.keys[key].field not in written and key not in misspelled]
    if missing:
        are = "is missing; add it" if len(missing) == 1 else "are missing; add them"
        raise place.error(f"{' and '.join(missing)} {are}")


def _settle_params(fields: dict[str, Any], written: Mapping[str, _Written]) -> None:
    """Drop an empty ``params`` next to a ``final_sparsity`` that names weights itself, and refuse any other."""
    if "params" not in fields or not isinstance(fields.get("final_sparsity"), Mapping):
        return
    if fields["params"]:
        raise written["params"].place.error(
            f"{list(fields['params'])} cannot be given with a final_sparsity that names weights; remove one of the two"
        )
    del fields["params"]


def _make(
    modifier: ModifierFormat,
    fields: dict[str, Any],
    written: Mapping[str, _Written],
    place: Place,
    errors: CollectedErrors,
) -> Settings:
    """Return the settings, or raise all errors of the modifier.

    Settings refuse one value at a time: a wrong value is replaced or removed until no further value is refused.
    """
    keys = {meaning.field: key for key, meaning in modifier.keys.items() if meaning.field}
    defaults: dict[str, Any] = dict(modifier.defaults)
    if issubclass(modifier.settings, PruningSettings):
        defaults["written_as"] = place.name
    if fields.get("num_recomputations") == "auto":  # is always geometric, also for modifiers whose default is linear
        defaults.pop("recomputation_spacing", None)
    for name in {modifier.keys[key].field for key in modifier.required} - fields.keys():
        _replace_value(str(name), fields)
    refused: set[str] = set()
    while True:
        try:
            settings = modifier.settings(**{**defaults, **fields})
            if isinstance(settings, PruningSettings) and not errors:
                pruning_epochs(settings)  # refuses too many pruning steps here, where the line is known
        except SettingError as error:
            key = written.get(error.field)
            where = key.place if key else place._replace(name=f"{place.name}.{keys.get(error.field, error.field)}")
            with errors.collect(where.line):
                raise where.error(_in_recipe_terms(error.message, keys)) from error
            if error.field in refused or not _replace_value(error.field, fields):
                errors.raise_all()
            refused.add(error.field)
        except TypeError:
            if not errors:
                raise
            errors.raise_all()  # a required value is missing, which has been collected
        else:
            if errors:
                errors.raise_all()
            return settings


def _replace_value(name: str, fields: dict[str, Any]) -> bool:
    """Replace a wrong value by a placeholder, or remove it; return whether there was a value."""
    if name in _PLACEHOLDERS:
        fields[name] = _PLACEHOLDERS[name](fields)
        return True
    return fields.pop(name, None) is not None


def _in_recipe_terms(message: str, keys: Mapping[str, str]) -> str:
    """Return a message of the settings with recipe keys in place of the names of fields."""
    # In messages these are English words, not names of fields.
    words = {"devices", "scope", "options", "kind", "function"}
    renamed = {name: key for name, key in keys.items() if name != key and name not in words}
    for name, key in renamed.items():
        message = re.sub(rf"\b{name}\b", key, message)
    return message
