"""Names of modifiers, from their settings: in recipes, in messages, and if a run has several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from mfac_core.errors import SettingError
from mfac_core.recipe.formats import MODIFIERS, Settings
from mfac_core.settings.pruning import GradualSettings, MagnitudeSettings, PruningSettings

__all__ = [
    "modifier_name",
    "log_names",
    "display_name",
    "named_groups",
    "named_in_errors",
    "numbered_names",
]

_NAMES: Mapping[type[Settings], str] = {
    MODIFIERS[name].settings: name for name in reversed(list(MODIFIERS)) if not MODIFIERS[name].defaults
}


def modifier_name(settings: Settings) -> str:
    """Return the name under which :func:`mfac_core.recipe.recipe_text` writes settings.

    It need not be the name that they were read from: ``OBSPruningModifier`` and ``MFACGlobalPruningModifier`` are
    written as ``MFACPruningModifier`` with the same settings.

    Args:
        settings: The settings of a modifier.

    Returns:
        The name of the modifier.

    Raises:
        TypeError: If no modifier has settings of this type.

    Example:
        >>> modifier_name(MagnitudeSettings(final_sparsity=0.9, end_epoch=3.0, scope="global"))
        'GlobalMagnitudePruningModifier'
    """
    if isinstance(settings, MagnitudeSettings) and settings.scope == "global":
        return "GlobalMagnitudePruningModifier"
    try:
        return _NAMES[type(settings)]
    except KeyError:
        raise TypeError(f"{type(settings).__name__} is not the settings class of any modifier") from None


def display_name(settings: Settings) -> str:
    """Return the name that the recipe gives a modifier, or that of :func:`modifier_name`.

    Example:
        >>> display_name(MagnitudeSettings(final_sparsity=0.9, end_epoch=3.0, written_as="GMPruningModifier"))
        'GMPruningModifier'
    """
    written = getattr(settings, "written_as", "")
    fits = written in MODIFIERS and MODIFIERS[written].settings is type(settings)
    return written if fits else modifier_name(settings)


@contextmanager
def named_in_errors(settings: Settings) -> Iterator[None]:
    """Put the name of a modifier before the message of a :class:`SettingError` that is raised inside.

    Example:
        >>> with named_in_errors(MagnitudeSettings(final_sparsity=0.9, end_epoch=3.0)):
        ...     raise SettingError("params", "'fc' matches no weight")
        Traceback (most recent call last):
            ...
        mfac_core.errors.SettingError: MagnitudePruningModifier.params: 'fc' matches no weight
    """
    try:
        yield
    except SettingError as error:
        error.args = (f"{display_name(settings)}.{error}",)
        raise


def numbered_names(pruning: Iterable[PruningSettings]) -> list[tuple[str, PruningSettings]]:
    """Return each pruning modifier with its name, numbered if there are several."""
    pruning = list(pruning)
    return [
        (f"{display_name(settings)} {number}" if len(pruning) > 1 else display_name(settings), settings)
        for number, settings in enumerate(pruning, start=1)
    ]


def named_groups(pruning: Iterable[PruningSettings]) -> list[tuple[str, PruningSettings]]:
    """Return the entries of ``by_final_sparsity()`` of each modifier with their names, in order.

    Example:
        >>> settings = MagnitudeSettings(final_sparsity={0.5: ["a"], 0.9: ["b"]}, end_epoch=3.0)
        >>> [name for name, group in named_groups([settings])]
        ['MagnitudePruningModifier (0.5)', 'MagnitudePruningModifier (0.9)']
    """
    found = []
    for name, settings in numbered_names(pruning):
        groups = settings.by_final_sparsity()
        for group in groups:
            has_its_own = len(groups) > 1 and isinstance(group, GradualSettings)
            found.append((f"{name} ({group.final_sparsity:g})" if has_its_own else name, group))  # type: ignore[attr-defined]
    return found


def log_names(pruning: Iterable[PruningSettings]) -> list[str]:
    """Return the names that tell pruning modifiers apart in the log; an empty one for a single modifier.

    Example:
        >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=2.0)
        >>> log_names([settings]), log_names([settings, settings])
        ([''], ['MagnitudePruningModifier 1', 'MagnitudePruningModifier 2'])
    """
    names = [name for name, _ in numbered_names(pruning)]
    return names if len(names) > 1 else [""] * len(names)
