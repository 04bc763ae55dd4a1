"""Errors in a recipe: where they are, how all of them are reported at once, and which name may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from mfac_core.errors import RecipeError

__all__ = ["CollectedErrors", "Place", "nearest", "nearest_names"]


class Place(NamedTuple):
    """A place in a recipe.

    Attributes:
        source: Path of the recipe, or ``<text>``.
        line: Line number, counted from 1; ``None`` if no single line is meant.
        name: What is there, such as ``MFACPruningModifier.num_grads``; may be empty.
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


class CollectedErrors:
    """Errors of a recipe, collected so that all of them are reported at once.

    Example:
        >>> errors = CollectedErrors()
        >>> for line in (7, 3):
        ...     with errors.collect(line):
        ...         raise Place("a.yaml", line).error("this is wrong")
        >>> errors.raise_all()
        Traceback (most recent call last):
            ...
        mfac_core.errors.RecipeError: a.yaml:3: this is wrong
        a.yaml:7: this is wrong
    """

    def __init__(self) -> None:
        self._found: list[tuple[int, RecipeError]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, line: int | None, error: RecipeError) -> None:
        """Add an error on a line; those without one come first."""
        self._found.append((line or 0, error))

    @contextmanager
    def collect(self, line: int | None) -> Iterator[None]:
        """Collect the error that is raised inside instead of raising it."""
        try:
            yield
        except RecipeError as error:
            self.add(line, error)

    def raise_all(self) -> NoReturn:
        """Raise one error with all messages, in the order of lines."""
        errors = [error for _, error in sorted(self._found, key=lambda found: found[0])]
        if len(errors) == 1:
            raise errors[0]
        raise RecipeError(*dict.fromkeys(message for error in errors for message in error.messages)) from errors[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name closest to an unknown one; empty if none is close.

    Example:
        >>> nearest("finl_sparsity", ["params", "final_sparsity"])
        ' (did you mean final_sparsity?)'
    """
    found = nearest_names(name, known)
    return f" (did you mean {found[0]}?)" if found else ""


def nearest_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known name closest to an unknown one, in a list; empty if none is close."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
