"""Where in a recipe something stands, and how an error says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from mfac_core.errors import RecipeError

__all__ = ["Place", "nearest"]


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
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""
