"""Names of weights: which of them a recipe's ``params`` mean, and how to write many on one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

from mfac_core.errors import SettingError

__all__ = ["ALL", "ALL_PRUNABLE", "PATTERN", "listed", "matching_names"]

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"
PATTERN = "re:"


def matching_names(
    entry: str,
    names: Sequence[str],
    *,
    prunable: Callable[[], Iterable[str]],
    of_all: Callable[[], Iterable[str]] | None = None,
    kind: str = "weight",
    strict: bool = True,
) -> list[str]:
    """Return the names that one entry of ``params`` matches.

    Args:
        entry: An exact name; ``re:`` and a pattern, matched from the start of the name (``re.match``); ``__ALL__`` or
            ``__ALL_PRUNABLE__``.
        names: Every name of the model.
        prunable: Gives the names that ``__ALL_PRUNABLE__`` means.
        of_all: Gives the names that ``__ALL__`` means; ``None`` for every name.
        kind: What a name names, for the message.
        strict: Whether matching nothing is an error.

    Returns:
        The names, in the order of their source.

    Raises:
        SettingError: If a pattern is not a regular expression, or the entry matches nothing, and ``strict``.

    Example:
        >>> matching_names("re:conv", ["conv1.weight", "fc.weight"], prunable=list)
        ['conv1.weight']
    """
    if entry == ALL:
        found = list(names if of_all is None else of_all())
    elif entry == ALL_PRUNABLE:
        found = list(prunable())
    elif entry.startswith(PATTERN):
        pattern = _compiled(entry)
        found = [name for name in names if pattern.match(name)]
    else:
        found = [entry] if entry in names else []
    if not found and strict:
        raise SettingError("params", f"{entry!r} matches no {kind} of the model; {_suggestion(entry, names, kind)}")
    return found


def listed(names: Iterable[str], at_most: int = 5) -> str:
    """Return names for one line.

    Args:
        names: Names.
        at_most: How many to write out.

    Returns:
        The names with commas between, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d"], at_most=2)
        'a, b and 2 more'
    """
    every = list(names)
    more = f" and {len(every) - at_most} more" if len(every) > at_most else ""
    return ", ".join(every[:at_most]) + more


def _compiled(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(PATTERN))
    except re.error as error:
        raise SettingError("params", f"{entry!r} is not a regular expression: {error}") from error


def _suggestion(entry: str, names: Sequence[str], kind: str) -> str:
    if not names:
        return f"the model has no {kind}s"
    inside = next((sign for sign in "./" if any(name.startswith(entry + sign) for name in names)), None)
    if inside is not None:
        return f"it is a layer; {PATTERN}{entry}[{inside}] selects what is in it"
    nearest = get_close_matches(entry.removeprefix(PATTERN), names, n=3, cutoff=0.0)
    return f"the nearest names are {', '.join(nearest)}"
