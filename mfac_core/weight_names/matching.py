"""Which weights ``params`` and ``exclude`` mean: all callers read an entry by :func:`matching_names`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from mfac_core.errors import SettingError
from mfac_core.weight_names.model import ALL, ALL_PRUNABLE, PATTERN, ModelNames, join_names
from mfac_core.weight_names.suggestions import why_nothing_matches

__all__ = ["excluded_names", "matching_names", "names_in_layers", "selected_names"]


def matching_names(
    entry: str, model: ModelNames, *, setting: str = "params", whole_layers: bool = False, strict: bool = True
) -> list[str]:
    """Return the names that one entry of ``params`` or ``exclude`` matches, in the order of the model.

    Args:
        entry: An exact name; the exact name of a layer, for its prunable weights; ``re:`` and a pattern, matched from
            the start of the name (``re.match``); ``__ALL__``; or ``__ALL_PRUNABLE__``.
        model: The names of the model.
        setting: The setting that has the entry. For ``exclude``, layers count as a whole, and computed weights too.
        whole_layers: Whether the name of a layer means all weights in it.
        strict: Whether an entry that matches nothing is an error.

    Returns:
        The names.

    Raises:
        SettingError: If a pattern is not a regular expression, or the entry matches nothing and ``strict``.

    Example:
        >>> from mfac_core.weight_names import names_of_shapes
        >>> model = names_of_shapes({"conv1.weight": (2, 3), "fc.weight": (4, 2), "fc.bias": (4,)})
        >>> matching_names("re:conv", model), matching_names("fc", model)
        (['conv1.weight'], ['fc.weight'])
    """
    excludes = setting == "exclude"
    every = [*model.shapes, *(model.computed if excludes else ())]
    if entry == ALL:
        found = every
    elif entry == ALL_PRUNABLE:
        found = [name for name in every if name in model.prunable or name in model.computed]
    elif entry.startswith(PATTERN):
        pattern = _compiled(entry, setting)
        found = [name for name in every if pattern.match(name)]
    elif entry in every:
        found = [entry]
    else:
        inside = set(model.layers.get(entry, ()))
        if excludes:
            inside.update(model.computed_in(entry))
        elif not whole_layers:
            inside &= set(model.prunable)
        found = [name for name in every if name in inside]
    if not found and strict:
        raise SettingError(setting, why_nothing_matches(entry, model, is_whole=whole_layers or excludes))
    return found


def selected_names(params: Sequence[str], exclude: Sequence[str], model: ModelNames) -> dict[str, list[str]]:
    """Return the weights that ``params`` selects and ``exclude`` does not remove.

    Args:
        params: Entries, as in :func:`matching_names`.
        exclude: Entries; the name of a layer means all that is in it.
        model: The names of the model.

    Returns:
        The first name of each weight, in the order of the model -> the entries of ``params`` that select it.

    Raises:
        SettingError: If entries match nothing, a frozen weight is selected by its own name, or nothing is left.

    Example:
        >>> from mfac_core.weight_names import names_of_shapes
        >>> names = names_of_shapes({"conv.weight": (2, 3), "fc.weight": (4, 2), "fc.bias": (4,)})
        >>> selected_names(["__ALL_PRUNABLE__"], ["fc"], names)
        {'conv.weight': ['__ALL_PRUNABLE__']}
    """
    selected: dict[str, list[str]] = {}
    for entry, names in _matches("params", params, model).items():
        for name in names:
            selected.setdefault(name, []).append(entry)
    excluded = excluded_names(exclude, model)
    wanted = [name for name in dict.fromkeys(map(model.first, model.shapes)) if name in selected]
    left = [name for name in wanted if name not in excluded]
    frozen = set(map(model.first, model.frozen))
    _refuse_frozen_by_name([name for name in left if name in frozen], selected, model)
    chosen = [name for name in left if name not in frozen]
    if not chosen:
        _refuse_nothing(params, exclude, model, is_any_left=bool(left), is_any_excluded=len(left) < len(wanted))
    return {name: selected[name] for name in chosen}


def excluded_names(exclude: Sequence[str], model: ModelNames) -> set[str]:
    """Return the first names of the weights that ``exclude`` means, and the names of computed ones."""
    return {name for names in _matches("exclude", exclude, model).values() for name in names}


def names_in_layers(params: Sequence[str], model: ModelNames, logger: logging.Logger, *, strict: bool) -> set[str]:
    """Return the first names of the weights that entries match, where the name of a layer means all weights in it.

    An entry that matches nothing is an error if ``strict``; otherwise the logger warns about it.
    """
    matches = _matches("params", params, model, whole_layers=True, strict=strict)
    for entry in [entry for entry, names in matches.items() if not names]:
        logger.warning("params: %r matches no %s of the model and is left out", entry, model.kind)
    return {name for names in matches.values() for name in names}


def _matches(setting: str, entries: Sequence[str], model: ModelNames, **options: bool) -> dict[str, list[str]]:
    """Return each entry with the first names of what it matches; one error names all entries that match nothing."""
    found: dict[str, list[str]] = {}
    wrong = []
    for entry in entries:
        try:
            names = matching_names(entry, model, setting=setting, **options)
            found[entry] = list(dict.fromkeys(map(model.first, names)))
        except SettingError as error:
            wrong.append(error.message)
    if wrong:
        raise SettingError(setting, "; ".join(dict.fromkeys(wrong)))
    return found


def _refuse_frozen_by_name(frozen: Sequence[str], selected: Mapping[str, Sequence[str]], model: ModelNames) -> None:
    by_name = [name for name in frozen if any(entry in model.shapes for entry in selected[name])]
    if by_name:
        names, is_, it = (repr(by_name[0]), "is", "it") if len(by_name) == 1 else (join_names(by_name), "are", "them")
        raise SettingError(
            "params", f"{names} {is_} frozen ({model.frozen_because}); unfreeze {it}, or remove {it} from params"
        )


def _refuse_nothing(
    params: Sequence[str], exclude: Sequence[str], model: ModelNames, *, is_any_left: bool, is_any_excluded: bool
) -> NoReturn:
    if not is_any_left:
        raise SettingError(
            "exclude",
            f"{list(exclude)} leaves nothing to prune: it excludes every {model.kind} that params {list(params)} "
            "selects",
        )
    others = f", except those that exclude {list(exclude)} removes" if is_any_excluded else ""
    raise SettingError(
        "params",
        f"{list(params)} leaves nothing to prune: every {model.kind} that it selects is frozen "
        f"({model.frozen_because}){others}",
    )


def _compiled(entry: str, setting: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(PATTERN))
    except re.error as error:
        raise SettingError(setting, f"{entry!r} is not a regular expression: {error}") from error
