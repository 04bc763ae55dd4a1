"""Modifiers -> settings: the names and keys of recipes, and what each means in the terms of the code.

:data:`MODIFIERS` says which keys each modifier takes. Whether a value is in range is the business of the settings;
their errors come back here to get file, line and the key as it was written.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from mfac_core.errors import SettingError
from mfac_core.recipe.documents import entries
from mfac_core.recipe.keys import (
    ACDC_KEYS,
    CONSTANT_KEYS,
    EPOCH_RANGE_KEYS,
    GRADUAL_KEYS,
    LEARNING_RATE_FUNCTION_KEYS,
    LEARNING_RATE_KEYS,
    LEARNING_RATE_SCHEDULE_KEYS,
    MFAC_KEYS,
    MFAC_OPTIONS,
    SCOPE,
    TRAINABLE_KEYS,
    WEIGHT_DECAY_KEYS,
    Key,
    only,
)
from mfac_core.recipe.places import Place, Wrong, nearest, nearest_names
from mfac_core.recipe.values import plain
from mfac_core.recipe.variables import Variables
from mfac_core.schedules.pruning import pruning_epochs
from mfac_core.settings.pruning import (
    ACDCSettings,
    ConstantSettings,
    MagnitudeSettings,
    MFACSettings,
    PruningSettings,
)
from mfac_core.settings.training import (
    EpochRange,
    LearningRateFunction,
    LearningRateSchedule,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
    TrainingSettings,
)

__all__ = [
    "MODIFIERS",
    "ModifierFormat",
    "Settings",
    "is_out_of_scope",
    "name_of",
    "read_modifier",
    "settings_from_keys",
]

Settings = PruningSettings | TrainingSettings
"""What one modifier of a recipe says."""

_TAG = re.compile(r"!(?:(?:pytorch|keras|tensorflow)\.)?(?P<name>\w+)")

_logger = logging.getLogger("mfac_core")


def _lowest_final_sparsity(fields: Mapping[str, Any]) -> float:
    initial = fields.get("initial_sparsity")
    return initial if isinstance(initial, float) and 0 < initial < 1 else _TINY


def _after_start(fields: Mapping[str, Any]) -> float:
    start = fields.get("start_epoch")
    return start + 1.0 if isinstance(start, float) and start > 0 else 1.0


_TINY = 1e-6
_STAND_INS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "final_sparsity": _lowest_final_sparsity,
    "compression_sparsity": lambda fields: _TINY,
    "end_epoch": _after_start,
}
"""Settings without a default -> a value that goes with those of the others that are right."""


class Absent(NamedTuple):
    """What to log where a key is not given.

    Attributes:
        key: The key.
        note: What its absence means.
        beside: Another key, if the absence matters only where that one is given as a number.
    """

    key: str
    note: str
    beside: str = ""


@dataclass(frozen=True)
class ModifierFormat:
    """How a modifier is written in a recipe.

    Args:
        settings: What it is turned into.
        keys: Recipe key -> meaning.
        required: Keys that must be given.
        defaults: Field of the settings -> its value where no key gives it, if it differs from that of the settings.
        nested: Key under which some of the keys may stand instead (``mfac_options``) -> those keys.
        absent: What to log where a key is not given.
    """

    settings: type[Settings]
    keys: Mapping[str, Key]
    required: tuple[str, ...]
    defaults: Mapping[str, object] = field(default_factory=dict)
    nested: Mapping[str, frozenset[str]] = field(default_factory=dict)
    absent: tuple[Absent, ...] = ()


_GRADUAL = ("final_sparsity", "end_epoch")
_NOT_GLOBAL = only(False, "does not fit; write !GlobalMagnitudePruningModifier for one threshold over all layers")
_NOT_LAYERED = only(True, "does not fit: this modifier always prunes over all layers; write the one without Global")
_BY_MAGNITUDE = only(
    "magnitude", "is not supported here; write !MFACPruningModifier for M-FAC; other scores are not supported"
)
_BY_MFAC = only("MFAC", "does not fit: this modifier always prunes by M-FAC; write !MagnitudePruningModifier instead")

MODIFIERS: Mapping[str, ModifierFormat] = {
    "MFACPruningModifier": ModifierFormat(
        settings=MFACSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": SCOPE, **MFAC_KEYS, "score_type": _BY_MFAC},
        required=_GRADUAL,
        nested={"mfac_options": frozenset(MFAC_OPTIONS)},
    ),
    "MFACGlobalPruningModifier": ModifierFormat(
        settings=MFACSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": _NOT_LAYERED, **MFAC_KEYS, "score_type": _BY_MFAC},
        required=_GRADUAL,
        defaults={"scope": "global"},
        nested={"mfac_options": frozenset(MFAC_OPTIONS)},
    ),
    "OBSPruningModifier": ModifierFormat(
        settings=MFACSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": SCOPE, **MFAC_KEYS},
        required=_GRADUAL,
        defaults={
            "scope": "global",
            "num_gradients": 1024,
            "block_size": 1,
            "damping": 1e-7,
            "recomputation_spacing": "linear",
        },
        absent=(
            Absent(
                "fisher_block_size",
                "is absent and therefore 1, which makes the Fisher matrix diagonal; the recipes of oBERT use 50",
            ),
            Absent(
                "recomputation_spacing",
                "is absent and therefore linear, as this modifier always meant it; geometric, which shrinks what is "
                "left by equal factors, is more accurate at high sparsity",
                beside="num_recomputations",
            ),
        ),
    ),
    "MagnitudePruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": _NOT_GLOBAL, "score_type": _BY_MAGNITUDE},
        required=_GRADUAL,
    ),
    "GMPruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": SCOPE, "score_type": _BY_MAGNITUDE},
        required=_GRADUAL,
    ),
    "GlobalMagnitudePruningModifier": ModifierFormat(
        settings=MagnitudeSettings,
        keys={**GRADUAL_KEYS, "global_sparsity": _NOT_LAYERED, "score_type": _BY_MAGNITUDE},
        required=_GRADUAL,
        defaults={"scope": "global"},
    ),
    "ConstantPruningModifier": ModifierFormat(settings=ConstantSettings, keys=CONSTANT_KEYS, required=()),
    "ACDCPruningModifier": ModifierFormat(
        settings=ACDCSettings, keys=ACDC_KEYS, required=("compression_sparsity", "end_epoch")
    ),
    "EpochRangeModifier": ModifierFormat(settings=EpochRange, keys=EPOCH_RANGE_KEYS, required=("end_epoch",)),
    "SetLearningRateModifier": ModifierFormat(
        settings=SetLearningRate, keys=LEARNING_RATE_KEYS, required=("learning_rate",)
    ),
    "LearningRateFunctionModifier": ModifierFormat(
        settings=LearningRateFunction,
        keys=LEARNING_RATE_FUNCTION_KEYS,
        required=("lr_func", "init_lr", "final_lr", "end_epoch"),
    ),
    "LearningRateModifier": ModifierFormat(
        settings=LearningRateSchedule,
        keys=LEARNING_RATE_SCHEDULE_KEYS,
        required=("lr_class", "lr_kwargs", "init_lr"),
    ),
    "SetWeightDecayModifier": ModifierFormat(
        settings=SetWeightDecay, keys=WEIGHT_DECAY_KEYS, required=("weight_decay",)
    ),
    "TrainableParamsModifier": ModifierFormat(settings=TrainableParams, keys=TRAINABLE_KEYS, required=("params",)),
}
"""Name of a modifier in recipes -> how it is written."""

_OUT_OF_SCOPE = frozenset(
    {
        "ASRegModifier",
        "ActivationSparsityModifier",
        "AdaPruneModifier",
        "DistillationModifier",
        "GPTQModifier",
        "GradualParamModifier",
        "LayerPruningModifier",
        "LayerThinningModifier",
        "LegacyGMPruningModifier",
        "LegacyQuantizationModifier",
        "LogarithmicEqualizationModifier",
        "LoggingModifier",
        "MovementPruningModifier",
        "OutputDistillationModifier",
        "PerLayerDistillationModifier",
        "PowerpropagationModifier",
        "QuantizationModifier",
        "RigLPruningModifier",
        "SetParamModifier",
        "SmoothQuantModifier",
        "SparseGPTModifier",
        "SparseLlamaModifier",
        "SparseMPTModifier",
        "SparseOPTModifier",
        "SparsifyingThinningModifier",
        "StructuredPruningModifier",
        "TopKASTPruningModifier",
        "WandaPruningModifier",
        "vLLMQuantizationModifier",
    }
)


def is_out_of_scope(name: str) -> bool:
    """Return whether a modifier is one of SparseML's that prunes in another way, or does not prune at all.

    Args:
        name: Name of the modifier.

    Returns:
        Whether it is known and refused.
    """
    return name in _OUT_OF_SCOPE


def name_of(item: yaml.Node, place: Place) -> str:
    """Return the name of the modifier that an item of a modifiers list is.

    Args:
        item: The item's node.
        place: Where it stands.

    Returns:
        The name that its tag carries, without the name of a framework.

    Raises:
        RecipeError: If it has no such tag.
    """
    found = _TAG.fullmatch(item.tag)
    if found is None:
        raise place.error(
            f"an item of a modifiers list must begin with a modifier, such as `- !{next(iter(MODIFIERS))}`; "
            f"{_supported()}"
        )
    return found["name"]


def read_modifier(name: str, item: yaml.Node, place: Place, variables: Variables, stage: str = "") -> Settings:
    """Turn one item of a modifiers list into settings.

    Args:
        name: Name of the modifier.
        item: The item's node: a mapping of its keys.
        place: Where it stands.
        variables: Turns the nodes of its values into Python values.
        stage: The stage that it stands in; empty for the top.

    Returns:
        The settings, checked.

    Raises:
        RecipeError: If the modifier or one of its keys is unknown, missing, given twice or wrong.
    """
    place = place._replace(name=name)
    modifier = _format(name, place)

    def read(node: yaml.Node, place: Place) -> Callable[[], object]:
        return lambda: variables.value(node, place, stage)

    written: list[_Written] = []
    for entry in _below(item, place):
        key_place = place._replace(line=entry.line, name=f"{name}.{entry.key}")
        if entry.key not in modifier.nested:
            written.append(_Written(entry.key, key_place, read(entry.value, key_place)))
        elif isinstance(entry.value, yaml.ScalarNode):
            written += _nested(entry.key, key_place, variables.value(entry.value, key_place, stage))
        else:
            for inner in _below(entry.value, key_place):
                inner_place = key_place._replace(line=inner.line, name=f"{key_place.name}.{inner.key}")
                written.append(_Written(f"{entry.key}.{inner.key}", inner_place, read(inner.value, inner_place)))
    return _settings(modifier, written, place)


def settings_from_keys(name: str, keys: Mapping[str, object]) -> Settings:
    """Return the settings that a modifier of a recipe with these keys would give.

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
            written += _nested(key, key_place, plain(value))
        else:
            written.append(_Written(key, key_place, lambda value=value: plain(value)))  # type: ignore[misc]
    return _settings(modifier, written, place)


class _Written(NamedTuple):
    """A key as it stands in the recipe; ``path`` names the key above it too, as in ``mfac_options.damp``."""

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
    if is_out_of_scope(name):
        raise place._replace(name="").error(
            f'{name} is not supported; remove it from the recipe, or load it with unsupported="skip"; {_supported()}'
        )
    raise place._replace(name="").error(f"!{name} is not a modifier{nearest(name, MODIFIERS)}; {_supported()}")


def _supported() -> str:
    return f"supported are {', '.join(MODIFIERS)}"


def _below(node: yaml.Node, place: Place) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return entries(node, place)
    if isinstance(node, yaml.ScalarNode) and node.value == "":
        return []
    raise place.error("this must be followed by `key: value` lines, indented below it")


def _nested(key: str, place: Place, value: object) -> list[_Written]:
    """Return the keys below a nesting key whose value is not written out there."""
    if value is None or value == "":
        return []
    if not isinstance(value, Mapping):
        raise place.error(f"{value!r} must be a mapping, or `key: value` lines indented below it")
    return [
        _Written(f"{key}.{inner}", place._replace(name=f"{place.name}.{inner}"), lambda option=option: option)  # type: ignore[misc]
        for inner, option in value.items()
    ]


def _settings(modifier: ModifierFormat, all_written: list[_Written], place: Place) -> Settings:
    fields: dict[str, Any] = {}
    written: dict[str, _Written] = {}
    misspelled: set[str] = set()
    wrong = Wrong()
    for key in all_written:
        with wrong.gathered(key.place.line):
            meaning = _meaning(key, modifier, misspelled)
            earlier = written.get(meaning.field or key.key)
            if earlier is not None:
                on_line = f" on line {earlier.place.line}" if earlier.place.line else ""
                raise key.place.error(f"{earlier.path}{on_line} already gives this setting; keep one of the two")
            written[meaning.field or key.key] = key
            value = _converted(key, meaning)
            if meaning.field is not None:
                fields[meaning.field] = value
    with wrong.gathered(place.line):
        _require(modifier, written, misspelled, place)
    for absent, note, beside in modifier.absent:
        is_by_number = fields.get(str(modifier.keys[beside].field), "auto") != "auto" if beside else True
        if modifier.keys[absent].field not in written and is_by_number:
            _logger.warning(place._replace(name=f"{place.name}.{absent}").message(note))
    with wrong.gathered(written["params"].place.line if "params" in written else None):
        _settle_params(fields, written)
    return _make(modifier, fields, written, place, wrong)


def _meaning(written: _Written, modifier: ModifierFormat, misspelled: set[str]) -> Key:
    allowed = modifier.nested[written.nested_in] if written.nested_in else frozenset(modifier.keys)
    if written.key in allowed:
        return modifier.keys[written.key]
    known = [key for key in (*modifier.keys, *modifier.nested) if not written.nested_in or key in allowed]
    keys = f"the keys are {', '.join(known)}"
    if written.key in modifier.keys:
        beside = f"write {written.key} beside {written.nested_in}, not in it"
        raise written.place.error(f"unknown key; {keys}; {beside}")
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
    """Drop an empty ``params`` beside a ``final_sparsity`` that names weights itself, and refuse any other there."""
    if "params" not in fields or not isinstance(fields.get("final_sparsity"), Mapping):
        return
    if fields["params"]:
        raise written["params"].place.error(
            f"{list(fields['params'])} stands beside a final_sparsity that names weights itself; remove one of the two"
        )
    del fields["params"]


def _make(
    modifier: ModifierFormat, fields: dict[str, Any], written: Mapping[str, _Written], place: Place, wrong: Wrong
) -> Settings:
    keys = {meaning.field: key for key, meaning in modifier.keys.items() if meaning.field}
    defaults: dict[str, Any] = dict(modifier.defaults)
    if issubclass(modifier.settings, PruningSettings):
        defaults["written_as"] = place.name
    if fields.get("num_recomputations") == "auto":  # later than the modifiers that are linear, and never so
        defaults.pop("recomputation_spacing", None)
    for name in {modifier.keys[key].field for key in modifier.required} - fields.keys():
        _put_aside(str(name), fields)
    refused: set[str] = set()
    while True:  # settings refuse one value at a time: without it, they refuse the next one
        try:
            settings = modifier.settings(**{**defaults, **fields})
            if isinstance(settings, PruningSettings) and not wrong:
                pruning_epochs(settings)  # refuses far too many pruning steps here, where the line is known
        except SettingError as error:
            key = written.get(error.field)
            where = key.place if key else place._replace(name=f"{place.name}.{keys.get(error.field, error.field)}")
            with wrong.gathered(where.line):
                raise where.error(_in_recipe_terms(error.message, keys)) from error
            if error.field in refused or not _put_aside(error.field, fields):
                wrong.refuse()
            refused.add(error.field)
        except TypeError:
            if not wrong:
                raise
            wrong.refuse()  # a value that must be there is missing, which is among what is wrong
        else:
            if wrong:
                wrong.refuse()
            return settings


def _put_aside(name: str, fields: dict[str, Any]) -> bool:
    """Take a wrong value out, or put one in its place that nothing else can be wrong with.

    Args:
        name: Field of the settings.
        fields: The values; changed.

    Returns:
        Whether there was anything to take out.
    """
    if name in _STAND_INS:
        fields[name] = _STAND_INS[name](fields)
        return True
    return fields.pop(name, None) is not None


def _in_recipe_terms(message: str, keys: Mapping[str, str]) -> str:
    """Return a message of the settings with the recipe's keys in place of the names of fields."""
    # These are English words first, and their keys do not fit where they stand.
    words = {"devices", "scope", "options", "kind", "function"}
    renamed = {name: key for name, key in keys.items() if name != key and name not in words}
    for name, key in renamed.items():
        message = re.sub(rf"\b{name}\b", key, message)
    return message
