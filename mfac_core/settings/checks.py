"""The values that settings may have, and the functions that check them and raise ``SettingError``."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeGuard, get_args

from mfac_core.errors import SettingError

__all__ = [
    "Damping",
    "GradientOrigin",
    "GradientsDtype",
    "Interpolation",
    "MaskType",
    "Recomputations",
    "Scope",
    "Spacing",
    "Update",
    "check_block_size",
    "check_choice",
    "check_damping",
    "check_number",
    "check_recomputations",
    "checked_groups",
    "checked_mask_type",
    "checked_num_gradients",
    "checked_params",
    "is_integer",
]

Interpolation = Literal["linear", "cubic", "inverse_cubic"]
Scope = Literal["layer", "global"]
Update = Literal["independent", "joint"]
Spacing = Literal["geometric", "linear"]
Recomputations = int | Literal["auto"]
Damping = float | Literal["auto"]
"""A number, or ``auto``: 0.1 times the mean diagonal of the empirical Fisher of each block."""

GradientOrigin = Literal["auto", "training"]
GradientsDtype = Literal["float32", "bfloat16"]
MaskType = str | tuple[int, int]
"""``unstructured``, ``channel``, ``filter``, ``block4``, ``N:M`` such as ``2:4``, or the shape of a block."""

_PATTERN = "re:"
_N_OF_M = re.compile(r"(?P<n>[1-9][0-9]*):(?P<m>[1-9][0-9]*)")


def check_block_size(block_size: object) -> None:
    """Refuse a block size that is neither a positive integer nor ``None``."""
    if block_size is not None and (not is_integer(block_size) or block_size < 1):
        raise SettingError(
            "block_size", f"{block_size!r} must be a positive integer, or null (None) for one block of all weights"
        )


def check_damping(damping: object) -> None:
    """Refuse a damping that is neither a positive number nor ``auto``."""
    if not (isinstance(damping, str) and damping == "auto"):
        check_number("damping", damping, 'damping > 0, or "auto"', lambda x: x > 0)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise SettingError(name, f"{value!r} is not one of {', '.join(choices)}")


def checked_mask_type(mask_type: object, final_sparsities: Sequence[float] = ()) -> MaskType:
    """Return a mask type in its canonical spelling; a block shape as a tuple.

    Args:
        mask_type: ``unstructured``, ``channel``, ``filter``, ``block4`` (or ``block``), ``N:M`` (``tensorrt`` is
            ``2:4``), or two numbers of outputs and inputs, of which -1 means all.
        final_sparsities: The sparsities to reach, which ``N:M`` must allow.

    Example:
        >>> checked_mask_type("tensorrt", [0.5]), checked_mask_type([1, 4])
        ('2:4', (1, 4))
    """
    mask_type = (
        {"tensorrt": "2:4", "block": "block4"}.get(mask_type, mask_type) if isinstance(mask_type, str) else mask_type
    )
    if mask_type in ("unstructured", "channel", "filter", "block4"):
        return str(mask_type)
    pattern = _N_OF_M.fullmatch(mask_type) if isinstance(mask_type, str) else None
    if pattern is not None and int(pattern["n"]) < int(pattern["m"]):
        most = 1 - int(pattern["n"]) / int(pattern["m"])
        for final in final_sparsities:
            if final > most + 0.01:
                raise SettingError(
                    "mask_type",
                    f"{mask_type} allows a sparsity of at most {most:g}, but the final sparsity is {final:g}; "
                    "lower that, or keep fewer weights of each group",
                )
        return str(mask_type)
    if isinstance(mask_type, list | tuple) and len(mask_type) == 2:  # noqa: PLR2004
        if all(is_integer(size) and (size > 0 or size == -1) for size in mask_type):
            return (int(mask_type[0]), int(mask_type[1]))
    raise SettingError(
        "mask_type",
        f'{mask_type!r} is not a mask type; write unstructured, channel, filter, block4, N:M such as "2:4", or the '
        "shape of a block such as [1, 4] (outputs, inputs; -1 for all)",
    )


def check_number(name: str, value: object, rule: str, holds: Callable[[float], bool]) -> None:
    """Refuse a value that is not a finite number, or for which ``holds`` is false; ``rule`` is the rule in words."""
    try:
        finite = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can represent
        finite = False
    if not finite:
        raise SettingError(name, f"{value!r} is not a finite number; the rule is {rule}")
    if not holds(float(value)):  # type: ignore[arg-type]  # a number by now
        raise SettingError(name, f"{value!r} is out of range; the rule is {rule}")


def check_recomputations(num_recomputations: object, spacing: object) -> None:
    """Refuse a number of recomputations that is not a positive integer or ``auto``, or does not suit the spacing."""
    if num_recomputations != "auto" and (not is_integer(num_recomputations) or num_recomputations < 1):
        raise SettingError(
            "num_recomputations",
            f"{num_recomputations!r} must be a positive integer, or auto; 1 computes the Fisher once",
        )
    check_choice("recomputation_spacing", spacing, get_args(Spacing))
    if num_recomputations == "auto" and spacing == "linear":
        raise SettingError(
            "recomputation_spacing",
            "linear cannot be combined with num_recomputations auto, which is geometric; write geometric, or a number "
            "of recomputations",
        )


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer of Python or NumPy; booleans are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def checked_params(params: object, name: str = "params") -> tuple[str, ...]:
    """Return a name or a list of names as a tuple; only ``exclude`` may be empty. ``re:`` begins a pattern."""
    names = (params,) if isinstance(params, str) else params
    may_be_empty = name == "exclude"
    if (
        not isinstance(names, list | tuple)
        or not (names or may_be_empty)
        or not all(isinstance(each, str) and each for each in names)
    ):
        rule = (
            "list of names, such as [stem, fc]" if may_be_empty else "non-empty list of names, such as __ALL_PRUNABLE__"
        )
        raise SettingError(name, f"{params!r} must be a name or a {rule}")
    for each in names:
        if each.startswith(_PATTERN):
            _check_pattern(each, name)
    return tuple(names)


def _check_pattern(pattern: str, name: str) -> None:
    try:
        re.compile(pattern.removeprefix(_PATTERN))
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingError(
            name,
            f"{pattern!r} is not a regular expression: {error}; in one, .* is any text, [.] a dot and [0-9]+ a number",
        ) from error


def checked_groups(groups: Mapping[float, object]) -> dict[float, tuple[str, ...]]:
    """Return the names of each final sparsity as tuples."""
    if not groups:
        raise SettingError("final_sparsity", "{} is empty; write a sparsity, or sparsities with lists of names")
    try:
        return {final: checked_params(params) for final, params in groups.items()}
    except SettingError as error:
        raise SettingError("final_sparsity", error.message) from error


def checked_num_gradients(value: object) -> Mapping[float, int]:
    """Return the rows of the gradient window by the sparsity from which they apply, in ascending order.

    An integer applies from 0.0; a mapping must have that key.
    """
    rule = "must be a positive integer, or a mapping from sparsity to positive integers with the key 0.0"
    if is_integer(value) and value > 0:
        return {0.0: int(value)}
    if is_integer(value):
        raise SettingError("num_gradients", f"{value!r} must be a positive integer")
    if not isinstance(value, Mapping) or not value:
        raise SettingError("num_gradients", f"{value!r} {rule}, such as {{0.0: 64, 0.5: 128}}")
    checked: dict[float, int] = {}
    for threshold, rows in value.items():
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
            raise SettingError("num_gradients", f"the key {threshold!r} is not a sparsity; keys must lie in [0, 1)")
        if not is_integer(rows) or rows < 1:
            raise SettingError(
                "num_gradients", f"{rows!r} at sparsity {threshold} is not a number of rows; write a positive integer"
            )
        if float(threshold) in checked:
            raise SettingError("num_gradients", f"the sparsity {float(threshold)} is given twice; keep one of them")
        checked[float(threshold)] = int(rows)
    if 0.0 not in checked:
        raise SettingError(
            "num_gradients",
            f"{dict(value)} has no key 0.0, the number of rows from the start; "
            f"add it, such as {{0.0: {min(checked.values())}, ...}}",
        )
    return dict(sorted(checked.items()))
