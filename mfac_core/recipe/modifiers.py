"""Modifier items -> settings: the recipe's tags and keys, and what each means in the terms of the code.

:data:`MODIFIERS` says which keys each modifier takes. Whether a value is in range is the business of the settings;
their errors come back here to get file, line and the key as it was written.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from mfac_core.errors import SettingError
from mfac_core.recipe.documents import Entry, entries
from mfac_core.recipe.keys import (
    EPOCH_RANGE_KEYS,
    GLOBAL_KEYS,
    LEARNING_RATE_KEYS,
    MFAC_KEYS,
    MFAC_OPTIONS,
    PRUNING_KEYS,
    Key,
)
from mfac_core.recipe.places import Place, nearest
from mfac_core.recipe.variables import Variables
from mfac_core.schedule import planned_epochs
from mfac_core.settings import MagnitudeSettings, MFACSettings, PruningSettings

__all__ = ["MODIFIERS", "EpochRange", "Modifier", "ModifierFormat", "SetLearningRate", "read_modifier"]

_TAG = re.compile(r"!(?:(?:pytorch|keras|tensorflow)\.)?(?P<name>\w+)")

_logger = logging.getLogger("mfac_core")


@dataclass(frozen=True, kw_only=True)
class EpochRange:
    """How long to train.

    Args:
        end_epoch: Epoch at which training ends, after ``start_epoch``.
        start_epoch: Epoch at which it begins, ``>= 0``.

    Raises:
        SettingError: If a value breaks its rule.
    """

    end_epoch: float
    start_epoch: float = 0.0

    def __post_init__(self) -> None:
        _check("start_epoch", self.start_epoch, "start_epoch >= 0", lambda x: x >= 0)
        _check(
            "end_epoch", self.end_epoch, f"end_epoch > start_epoch ({self.start_epoch})", lambda x: x > self.start_epoch
        )


@dataclass(frozen=True, kw_only=True)
class SetLearningRate:
    """Set the learning rate of every parameter group once.

    Args:
        learning_rate: The learning rate, in ``(0, 1]``.
        start_epoch: Epoch from which on it holds, ``>= 0``.

    Raises:
        SettingError: If a value breaks its rule.
    """

    learning_rate: float
    start_epoch: float = 0.0

    def __post_init__(self) -> None:
        _check("learning_rate", self.learning_rate, "0 < learning_rate <= 1", lambda x: 0 < x <= 1)
        _check("start_epoch", self.start_epoch, "start_epoch >= 0 (0 is from the beginning)", lambda x: x >= 0)


Modifier = MFACSettings | MagnitudeSettings | EpochRange | SetLearningRate


@dataclass(frozen=True)
class ModifierFormat:
    """How a modifier is written in a recipe.

    Args:
        settings: What it is turned into.
        keys: Recipe key -> meaning.
        required: Keys that must be given.
        nested: Key under which some of the keys may stand instead (``mfac_options``) -> those keys.
        unsupported: Keys that are known from SparseML and refused by name.
    """

    settings: type[Modifier]
    keys: Mapping[str, Key]
    required: tuple[str, ...]
    nested: Mapping[str, frozenset[str]] = field(default_factory=dict)
    unsupported: frozenset[str] = frozenset()


_FROM_OTHER_PRUNERS = frozenset({"phased", "score_type"})

MODIFIERS: Mapping[str, ModifierFormat] = {
    "MFACPruningModifier": ModifierFormat(
        settings=MFACSettings,
        keys={**PRUNING_KEYS, **GLOBAL_KEYS, **MFAC_KEYS},
        required=("final_sparsity", "end_epoch"),
        nested={"mfac_options": frozenset(MFAC_OPTIONS)},
        unsupported=_FROM_OTHER_PRUNERS | {"grad_sampler_kwargs", "use_gradient_buffering", "num_recomputations"},
    ),
    "MagnitudePruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys=PRUNING_KEYS,
        required=("final_sparsity", "end_epoch"),
        unsupported=_FROM_OTHER_PRUNERS,
    ),
    "GMPruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys={**PRUNING_KEYS, **GLOBAL_KEYS},
        required=("final_sparsity", "end_epoch"),
        unsupported=_FROM_OTHER_PRUNERS,
    ),
    "EpochRangeModifier": ModifierFormat(settings=EpochRange, keys=EPOCH_RANGE_KEYS, required=("end_epoch",)),
    "SetLearningRateModifier": ModifierFormat(
        settings=SetLearningRate,
        keys=LEARNING_RATE_KEYS,
        required=("learning_rate",),
        unsupported=frozenset({"param_groups"}),
    ),
}
"""Name of a modifier in recipes -> how it is written."""

# Known from SparseML -> what to write instead, where there is something.
_NOT_SUPPORTED_YET: Mapping[str, str] = {
    "GlobalMagnitudePruningModifier": "write !GMPruningModifier with global_sparsity: true",
    "MFACGlobalPruningModifier": "write !MFACPruningModifier with global_sparsity: true",
    "LearningRateFunctionModifier": "set the schedule in the training script",
    "LearningRateModifier": "set the schedule in the training script",
    "SetWeightDecayModifier": "set the weight decay in the training script",
    **dict.fromkeys(
        (
            "ACDCPruningModifier",
            "ConstantPruningModifier",
            "DistillationModifier",
            "GradualParamModifier",
            "LayerPruningModifier",
            "LayerThinningModifier",
            "LegacyQuantizationModifier",
            "MovementPruningModifier",
            "OBSPruningModifier",
            "PerLayerDistillationModifier",
            "PowerpropagationModifier",
            "QuantizationModifier",
            "RigLPruningModifier",
            "SetParamModifier",
            "StructuredPruningModifier",
            "TopKASTPruningModifier",
            "TrainableParamsModifier",
        ),
        "",
    ),
}


def read_modifier(item: yaml.Node, place: Place, variables: Variables) -> Modifier:
    """Turn one item of a modifiers list into settings.

    Args:
        item: The item's node: a tag with a mapping below it.
        place: Where it stands.
        variables: Turns the nodes of its values into Python values.

    Returns:
        The settings, checked.

    Raises:
        RecipeError: If the modifier or one of its keys is unknown, missing, given twice or wrong.
    """
    name = _modifier_name(item, place)
    place = place._replace(name=name)
    modifier = MODIFIERS[name]
    fields: dict[str, object] = {}
    written: dict[str, _Written] = {}
    for key in _written_keys(item, modifier, place):
        meaning = _meaning(key, modifier)
        earlier = written.get(meaning.field or key.key)
        if earlier is not None:
            raise key.place.error(
                f"{earlier.path} on line {earlier.place.line} already gives this setting; keep one of the two"
            )
        written[meaning.field or key.key] = key
        value = _converted(key, meaning, variables)
        if meaning.field is not None:
            fields[meaning.field] = value
    _require(modifier, written, place)
    return _make(modifier, fields, written, place)


class _Written(NamedTuple):
    """A key as it stands in the recipe; ``path`` names the key above it too, as in ``mfac_options.damp``."""

    path: str
    place: Place
    node: yaml.Node
    nested_in: str = ""

    @property
    def key(self) -> str:
        return self.path.rpartition(".")[2]


def _modifier_name(item: yaml.Node, place: Place) -> str:
    found = _TAG.fullmatch(item.tag)
    supported = f"supported are {', '.join(MODIFIERS)}"
    if found is None:
        raise place.error(
            f"an item of a modifiers list must begin with a modifier, such as `- !{next(iter(MODIFIERS))}`; {supported}"
        )
    name = found["name"]
    if name in MODIFIERS:
        return name
    if name in _NOT_SUPPORTED_YET:
        cure = _NOT_SUPPORTED_YET[name] or "remove it from the recipe"
        raise place.error(f"{name} is not supported yet; {cure}; {supported}")
    raise place.error(f"{item.tag} is not a modifier{nearest(name, MODIFIERS)}; {supported}")


def _written_keys(item: yaml.Node, modifier: ModifierFormat, place: Place) -> list[_Written]:
    """Return the keys of an item, those under a nesting key in its place."""
    found: list[_Written] = []
    for entry in _mapping_entries(item, place):
        key_place = place._replace(line=entry.line, name=f"{place.name}.{entry.key}")
        if entry.key not in modifier.nested:
            found.append(_Written(entry.key, key_place, entry.value))
            continue
        for inner in _mapping_entries(entry.value, key_place):
            inner_place = key_place._replace(line=inner.line, name=f"{key_place.name}.{inner.key}")
            found.append(_Written(f"{entry.key}.{inner.key}", inner_place, inner.value, nested_in=entry.key))
    return found


def _mapping_entries(node: yaml.Node, place: Place) -> list[Entry]:
    if isinstance(node, yaml.MappingNode):
        return entries(node, place)
    if isinstance(node, yaml.ScalarNode) and node.value == "":
        return []
    raise place.error("this must be followed by `key: value` lines, indented below it")


def _meaning(written: _Written, modifier: ModifierFormat) -> Key:
    allowed = modifier.nested[written.nested_in] if written.nested_in else frozenset(modifier.keys)
    if written.key in allowed:
        return modifier.keys[written.key]
    if written.key in modifier.unsupported:
        raise written.place.error("this key is not supported yet; remove it")
    known = [key for key in (*modifier.keys, *modifier.nested) if not written.nested_in or key in allowed]
    raise written.place.error(f"unknown key{nearest(written.key, known)}; the keys are {', '.join(known)}")


def _converted(written: _Written, meaning: Key, variables: Variables) -> object:
    if meaning.note:
        _logger.warning(written.place.message(meaning.note))
    value = variables.value(written.node, written.place)
    try:
        return meaning.convert(value)
    except ValueError as error:
        raise written.place.error(f"{value!r} {error}") from error


def _require(modifier: ModifierFormat, written: Mapping[str, _Written], place: Place) -> None:
    missing = [key for key in modifier.required if modifier.keys[key].field not in written]
    if missing:
        are = "is missing; add it" if len(missing) == 1 else "are missing; add them"
        raise place.error(f"{' and '.join(missing)} {are}")


def _make(modifier: ModifierFormat, fields: dict[str, Any], written: Mapping[str, _Written], place: Place) -> Modifier:
    try:
        settings = modifier.settings(**fields)
        if isinstance(settings, PruningSettings):
            planned_epochs(settings)  # refuses far too many pruning steps here, where the line is known
    except SettingError as error:
        keys = {meaning.field: key for key, meaning in modifier.keys.items() if meaning.field}
        key = written.get(error.field)
        where = key.place if key else place._replace(name=f"{place.name}.{keys.get(error.field, error.field)}")
        raise where.error(_in_recipe_terms(error.message, keys)) from error
    return settings


def _in_recipe_terms(message: str, keys: Mapping[str, str]) -> str:
    """Return a message of the settings with the recipe's keys in place of the names of fields."""
    # "devices" and "scope" are English words first, and their keys do not fit where they stand.
    renamed = {name: key for name, key in keys.items() if name not in {key, "devices", "scope"}}
    for name, key in renamed.items():
        message = re.sub(rf"\b{name}\b", key, message)
    return message


def _check(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingError(name, f"{value!r} is not a finite number; the rule is {rule}")
    if not holds(value):
        raise SettingError(name, f"{value!r} is out of range; the rule is {rule}")
