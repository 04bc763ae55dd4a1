"""Where in a recipe something stands, and how an error says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from mfac_core.errors import RecipeError

__all__ = ["Place", "Wrong", "nearest", "nearest_names"]


class Place(NamedTuple):
    """Where in a recipe something stands.

    Attributes:
        source: Path of the recipe, or ``<text>``.
        line: Line number, counted from 1; ``None`` where no single line is meant.
        name: What stands there, such as ``MFACPruningModifier.num_grads``; may be empty.
    """

    source: str
    line: int | None = None
    name: str = ""

    def message(self, what: str) -> str:
        """Return ``<source>:<line>: <name>: <what>``, without the parts that are not known."""
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return ": ".join(part for part in (where, self.name, what) if part)

    def error(self, what: str) -> RecipeError:
        """Return an error that says what is wrong at this place."""
        return RecipeError(self.message(what))


class Wrong:
    """What is wrong with a recipe, gathered so that all of it is said at once.

    Example:
        >>> wrong = Wrong()
        >>> for line in (7, 3):
        ...     with wrong.gathered(line):
        ...         raise Place("a.yaml", line).error("this is wrong")
        >>> wrong.refuse()
        Traceback (most recent call last):
            ...
        mfac_core.errors.RecipeError: a.yaml:3: this is wrong
        a.yaml:7: this is wrong
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, RecipeError]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    @contextmanager
    def gathered(self, line: int | None) -> Iterator[None]:
        """Take up the error that is raised inside, and go on.

        Args:
            line: Where it belongs among the others.

        Yields:
            Nothing.
        """
        try:
            yield
        except RecipeError as error:
            self._found.append((line or 0, error))

    def refuse(self) -> NoReturn:
        """Raise one error that says all of it, in the order of lines.

        Raises:
            RecipeError: Always.
        """
        errors = [error for _, error in sorted(self._found, key=lambda found: found[0])]
        if len(errors) == 1:
            raise errors[0]
        raise RecipeError(*dict.fromkeys(message for error in errors for message in error.messages)) from errors[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that looks most like a wrong one.

    Args:
        name: The name that is not known.
        known: The names that are.

    Returns:
        ``" (did you mean X?)"``, or an empty string if nothing looks like it.

    Example:
        >>> nearest("finl_sparsity", ["params", "final_sparsity"])
        ' (did you mean final_sparsity?)'
    """
    found = nearest_names(name, known)
    return f" (did you mean {found[0]}?)" if found else ""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known name that looks most like a wrong one.

    Args:
        name: The name that is not known.
        known: The names that are.

    Returns:
        That name alone, or nothing if none looks like it.
    """
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
