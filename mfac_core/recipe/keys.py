"""Recipe keys: the field of the settings that each goes to, and how its value is turned into that field's value.

Only what a recipe writes differently from the settings is turned here; ranges and rules are those of the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["EPOCH_RANGE_KEYS", "GLOBAL_KEYS", "LEARNING_RATE_KEYS", "MFAC_KEYS", "MFAC_OPTIONS", "PRUNING_KEYS", "Key"]


class Key(NamedTuple):
    """What a recipe key means.

    Attributes:
        field: The field of the settings it goes to; ``None`` for keys that are accepted without effect.
        convert: Turns the plain value of the recipe into the field's value; raises ``ValueError`` with the rule.
        note: What to log when an ignored key is used; empty for nothing.
    """

    field: str | None
    convert: Callable[[object], object]
    note: str = ""


def _as_written(value: object) -> object:
    return value


def _number(value: object) -> object:
    if isinstance(value, str):
        raise ValueError("is text where a number must stand; write the number without quotes")
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError("is too large a number") from None


def _initial_sparsity(value: object) -> object:
    if value == "__FROM_PARAM__":
        raise ValueError("is not supported yet; write the sparsity to begin with, such as 0.05")
    return _number(value)


def _final_sparsity(value: object) -> object:
    if isinstance(value, Mapping):
        raise ValueError(
            "is a mapping, which is not supported yet; write one modifier per sparsity, each with its own params"
        )
    return _number(value)


def _mask_type(value: object) -> object:
    if isinstance(value, int):
        raise ValueError('is not the name of a mask type; YAML reads 2:4 as a number, so write it as "2:4"')
    return value


def _names(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError("must be a name or a list of names, such as __ALL_PRUNABLE__ or [conv1.weight, fc.weight]")
    return tuple(names)


def _devices(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(
            'must be a list of device names, such as ["cuda:0"]; an empty list or no key at all means the CPU'
        )
    return tuple(value) or ("cpu",)


def _block_size(value: object) -> object:
    return None if value == "None" else value


def _scope(value: object) -> str:
    if not isinstance(value, bool):
        raise ValueError("must be true (all weights compete) or false (within each layer)")
    return "global" if value else "layer"


PRUNING_KEYS: Mapping[str, Key] = {
    "params": Key("params", _names),
    "init_sparsity": Key("initial_sparsity", _initial_sparsity),
    "final_sparsity": Key("final_sparsity", _final_sparsity),
    "start_epoch": Key("start_epoch", _number),
    "end_epoch": Key("end_epoch", _number),
    "update_frequency": Key("update_frequency", _number),
    "inter_func": Key("interpolation", _as_written),
    "leave_enabled": Key("leave_enabled", _as_written),
    "mask_type": Key("mask_type", _mask_type),
    "log_types": Key(None, _as_written),
}
GLOBAL_KEYS: Mapping[str, Key] = {"global_sparsity": Key("scope", _scope)}
MFAC_OPTIONS: Mapping[str, Key] = {
    "num_grads": Key("num_gradients", _as_written),
    "fisher_block_size": Key("block_size", _block_size),
    "damp": Key("damping", _number),
    "available_gpus": Key("devices", _devices),
    "grads_device": Key("gradients_device", _as_written),
    "num_pages": Key(
        None, _as_written, "has no effect and can be removed; blocks are streamed, so pages are not needed"
    ),
}
MFAC_KEYS: Mapping[str, Key] = {
    **MFAC_OPTIONS,
    "available_devices": Key("devices", _devices),
    "update": Key("update", _as_written),
}
EPOCH_RANGE_KEYS: Mapping[str, Key] = {
    "start_epoch": Key("start_epoch", _number),
    "end_epoch": Key("end_epoch", _number),
}
LEARNING_RATE_KEYS: Mapping[str, Key] = {
    "learning_rate": Key("learning_rate", _number),
    "start_epoch": Key("start_epoch", _number),
    "constant_logging": Key(None, _as_written),
    "log_types": Key(None, _as_written),
}
