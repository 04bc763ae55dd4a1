"""Recipe keys: the field of the settings that each sets, and how its value is converted to that of the field and back.

Only values that a recipe writes differently are converted here; the settings check ranges and rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mfac_core.recipe.places import nearest
from mfac_core.settings.pruning import FROM_PARAM

__all__ = [
    "ACDC_KEYS",
    "CONSTANT_KEYS",
    "EPOCH_RANGE_KEYS",
    "GRADUAL_KEYS",
    "LEARNING_RATE_FUNCTION_KEYS",
    "LEARNING_RATE_KEYS",
    "LEARNING_RATE_SCHEDULE_KEYS",
    "MFAC_KEYS",
    "MFAC_OPTIONS",
    "OMIT",
    "SCOPE",
    "TRAINABLE_KEYS",
    "WEIGHT_DECAY_KEYS",
    "Key",
    "fixed",
]

OMIT = object()
"""Returned by ``Key.write`` for a value that a recipe expresses by omitting the key."""


def _same(value: object) -> object:
    return value


class Key(NamedTuple):
    """The meaning of a recipe key.

    Attributes:
        field: The field of the settings that it sets; ``None`` for keys without effect.
        convert: Converts the value in the recipe to that of the field; raises ``ValueError`` with the rule.
        write: Converts the value of the field back, or returns :data:`OMIT`; ``None`` if the key is never written.
        note: Returns a message to log for a value in the recipe, or an empty string.
    """

    field: str | None
    convert: Callable[[object], object] = _same
    write: Callable[[Any], object] | None = _same
    note: Callable[[object], str] = lambda value: ""


def _unless(default: object, write: Callable[[Any], object] = _same) -> Callable[[Any], object]:
    """Return a function for :attr:`Key.write` that omits the key for the default."""
    return lambda value: OMIT if value == default else write(value)


def fixed(value: object, cure: str) -> Key:
    """Return a key that has one allowed value and no effect; ``cure`` tells what to write instead of others."""

    def convert(given: object) -> object:
        if given is not value and (type(given) is not type(value) or given != value):
            raise ValueError(cure)
        return given

    return Key(None, convert)


def _number(value: object) -> object:
    if isinstance(value, str):
        if "eval(" in value:
            raise ValueError("mixes eval(...) with other text; write all of it inside, such as eval(2 * epochs)")
        raise ValueError("is text, not a number; write the number without quotes")
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    try:
        return float(value)
    except OverflowError:
        raise ValueError("is too large a number") from None


def _damping(value: object) -> object:
    if value == "auto":
        return value
    hint = nearest(value.lower(), ["auto"]) if isinstance(value, str) else ""
    if hint:
        raise ValueError(f"is neither a number nor auto{hint}")
    return _number(value)


def _recomputations(value: object) -> object:
    if not isinstance(value, str) or value == "auto":
        return value
    hint = nearest(value.lower(), ["auto"]) or "; write numbers without quotes"
    raise ValueError(f"must be a positive integer, or auto{hint}")


def _start_epoch(value: object) -> object:
    number = _number(value)
    return 0.0 if number == -1 else number


def _end_or_never(value: object) -> object:
    number = _number(value)
    return math.inf if number == -1 else number


def _initial_sparsity(value: object) -> object:
    if value == FROM_PARAM:
        return value
    hint = nearest(value, [FROM_PARAM]) if isinstance(value, str) else ""
    if hint:
        raise ValueError(f"is neither a number nor {FROM_PARAM}{hint}")
    return _number(value)


def _final_sparsity(value: object) -> object:
    if not isinstance(value, Mapping):
        return _number(value)
    return {_number(final): _names(params) for final, params in value.items()}


def _write_final_sparsity(value: object) -> object:
    return {final: list(params) for final, params in value.items()} if isinstance(value, Mapping) else value


def _names(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("must be a name or a list of names, such as __ALL_PRUNABLE__ or [conv1.weight, fc.weight]")
    return tuple(names)


def _excluded(value: object) -> tuple[str, ...]:
    try:
        return _names(value)
    except ValueError:
        raise ValueError("must be a name or a list of names, such as [stem, fc.weight]") from None


def _devices(value: object) -> tuple[str, ...]:
    if value is None:
        return ("auto",)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError('must be a list of device names, such as ["cuda:0"]; an empty list means the CPU')
    return tuple(value) or ("cpu",)


def _block_size(value: object) -> object:
    return None if value == "None" else value


def _scope(value: object) -> str:
    if not isinstance(value, bool):
        raise ValueError("must be true (all weights compete) or false (within each layer)")
    return "global" if value else "layer"


def _gradient_origin(value: object) -> str:
    if value is not None and not isinstance(value, bool):
        raise ValueError("must be true (always take gradients of training) or false")
    return "training" if value else "auto"


def _sampler_note(value: object) -> str:
    if value is not False:
        return ""
    return "false means the same as no key: without a gradient sampler, gradients of training are used"


def _sampler_options(value: object) -> object:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError("must be a mapping of arguments for the function that makes the batches")
    return {} if value is None else value


def _param_groups(value: object) -> object:
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ValueError("must be a list of indices of parameter groups, such as [0]")
    return tuple(value)


_SCHEDULE_OPTIONS = {"lr_min": "eta_min", "cycle_epochs": "T_0"}
"""Name that SparseML gives an argument of PyTorch's schedulers -> its name in PyTorch."""


def _schedule_options(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of the scheduler's arguments, such as {step_size: 10, gamma: 0.1}")
    options: dict[object, object] = {}
    for key, option in value.items():
        name = _SCHEDULE_OPTIONS.get(key, key) if isinstance(key, str) else key
        if name in options:
            raise ValueError(f"gives {name} twice, the second time as {key}; keep one")
        whole = name in {"T_0", "T_mult"} and isinstance(option, float) and option.is_integer()
        options[name] = int(option) if whole else option
    return options


def _write_schedule_options(value: object) -> object:
    names = {name: key for key, name in _SCHEDULE_OPTIONS.items()}
    return {names.get(name, name): option for name, option in value.items()}  # type: ignore[attr-defined]


_WITHOUT_EFFECT = Key(None)
_START = Key("start_epoch", _start_epoch)
_END = Key("end_epoch", _number)
_END_OR_NEVER = Key("end_epoch", _end_or_never, lambda end: -1.0 if end == math.inf else end)
_PARAMS = Key("params", _names, list)
# The last name is the one in messages and written recipes.
_EXCLUDE: Mapping[str, Key] = {
    "ignore": Key("exclude", _excluded, None),
    "exclude": Key("exclude", _excluded, _unless((), list)),
}
_PARAM_GROUPS = Key("param_groups", _param_groups, _unless(None, list))
_FREQUENCY = Key("update_frequency", _number)
_LOGGING: Mapping[str, Key] = {"log_types": _WITHOUT_EFFECT}
_CONSTANT_LOGGING: Mapping[str, Key] = {"constant_logging": _WITHOUT_EFFECT, **_LOGGING}

SCOPE = Key("scope", _scope, lambda scope: scope == "global")
GRADUAL_KEYS: Mapping[str, Key] = {
    "params": _PARAMS,
    **_EXCLUDE,
    "init_sparsity": Key("initial_sparsity", _initial_sparsity),
    "final_sparsity": Key("final_sparsity", _final_sparsity, _write_final_sparsity),
    "start_epoch": _START,
    "end_epoch": _END,
    "update_frequency": _FREQUENCY,
    "inter_func": Key("interpolation"),
    "leave_enabled": Key("leave_enabled"),
    "mask_type": Key("mask_type"),
    "phased": fixed(
        False, "is not supported here; alternating phases are what !ACDCPruningModifier is for, so write that instead"
    ),
    **_LOGGING,
}
MFAC_OPTIONS: Mapping[str, Key] = {
    "num_grads": Key("num_gradients"),
    "fisher_block_size": Key("block_size", _block_size),
    "damp": Key("damping", _damping),
    "available_gpus": Key("devices", _devices, None),
    "grads_device": Key("gradients_device", write=_unless("auto")),
    "num_pages": Key(
        None, note=lambda pages: "has no effect and can be removed; blocks are streamed, so pages are not needed"
    ),
}
MFAC_KEYS: Mapping[str, Key] = {
    **MFAC_OPTIONS,
    "available_devices": Key("devices", _devices, _unless(("auto",), list)),
    "grads_dtype": Key("gradients_dtype", write=_unless("float32")),
    "update": Key("update"),
    "num_recomputations": Key("num_recomputations", _recomputations),
    "recomputation_spacing": Key("recomputation_spacing"),
    "use_gradient_buffering": Key(
        "gradient_origin", _gradient_origin, _unless("auto", lambda origin: True), _sampler_note
    ),
    "grad_sampler_kwargs": Key("sampler_options", _sampler_options, _unless({})),
}
CONSTANT_KEYS: Mapping[str, Key] = {
    "params": _PARAMS,
    **_EXCLUDE,
    "start_epoch": _START,
    "end_epoch": _END_OR_NEVER,
    "leave_enabled": Key("leave_enabled"),
    "update_frequency": _WITHOUT_EFFECT,
    **_LOGGING,
}
ACDC_KEYS: Mapping[str, Key] = {
    "compression_sparsity": Key("compression_sparsity", _number),
    "params": _PARAMS,
    **_EXCLUDE,
    "start_epoch": _START,
    "end_epoch": _END,
    "update_frequency": _FREQUENCY,
    "global_sparsity": SCOPE,
    "leave_enabled": Key("leave_enabled"),
    "momentum_buffer_reset": Key("reset_momentum"),
    "mask_type": Key("mask_type"),
    **_LOGGING,
}
EPOCH_RANGE_KEYS: Mapping[str, Key] = {"start_epoch": _START, "end_epoch": _END_OR_NEVER, **_LOGGING}
LEARNING_RATE_KEYS: Mapping[str, Key] = {
    "learning_rate": Key("learning_rate", _number),
    "start_epoch": _START,
    "param_groups": _PARAM_GROUPS,
    "end_epoch": _WITHOUT_EFFECT,
    **_CONSTANT_LOGGING,
}
LEARNING_RATE_FUNCTION_KEYS: Mapping[str, Key] = {
    "lr_func": Key("function"),
    "init_lr": Key("initial", _number),
    "final_lr": Key("final", _number),
    "start_epoch": _START,
    "end_epoch": _END,
    "cycle_epochs": Key("cycle_epochs", _number),
    "param_groups": _PARAM_GROUPS,
    "update_frequency": _WITHOUT_EFFECT,
    **_CONSTANT_LOGGING,
}
LEARNING_RATE_SCHEDULE_KEYS: Mapping[str, Key] = {
    "lr_class": Key("kind"),
    "lr_kwargs": Key("options", _schedule_options, _write_schedule_options),
    "init_lr": Key("initial", _number),
    "start_epoch": _START,
    "end_epoch": _END_OR_NEVER,
    "update_frequency": _WITHOUT_EFFECT,
    **_CONSTANT_LOGGING,
}
WEIGHT_DECAY_KEYS: Mapping[str, Key] = {
    "weight_decay": Key("weight_decay", _number),
    "start_epoch": _START,
    "param_groups": _PARAM_GROUPS,
    "end_epoch": _WITHOUT_EFFECT,
    **_CONSTANT_LOGGING,
}
TRAINABLE_KEYS: Mapping[str, Key] = {
    "params": _PARAMS,
    "trainable": Key("trainable"),
    "params_strict": Key("strict"),
    "start_epoch": _START,
    "end_epoch": _END_OR_NEVER,
    **_LOGGING,
}
