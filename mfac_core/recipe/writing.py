"""Settings -> recipe text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mfac_core.errors import SettingError
from mfac_core.recipe.keys import OMIT
from mfac_core.recipe.modifiers import MODIFIERS, Settings
from mfac_core.recipe.values import flow_text
from mfac_core.settings.pruning import MagnitudeSettings

__all__ = ["modifier_name", "name_in_messages", "named_in_errors", "recipe_text"]

_NAMES: Mapping[type[Settings], str] = {
    MODIFIERS[name].settings: name for name in reversed(list(MODIFIERS)) if not MODIFIERS[name].defaults
}


def modifier_name(settings: Settings) -> str:
    """Return the name of the modifier that writes settings in a recipe.

    Args:
        settings: What a modifier says.

    Returns:
        Its name. What was read from ``OBSPruningModifier`` or ``MFACGlobalPruningModifier`` is written as
        ``MFACPruningModifier``, and pruning by magnitude as ``MagnitudePruningModifier`` or
        ``GlobalMagnitudePruningModifier``: the settings are the same.

    Raises:
        TypeError: If a recipe has no modifier for such settings.

    Example:
        >>> modifier_name(MagnitudeSettings(final_sparsity=0.9, end_epoch=3.0, scope="global"))
        'GlobalMagnitudePruningModifier'
    """
    if isinstance(settings, MagnitudeSettings) and settings.scope == "global":
        return "GlobalMagnitudePruningModifier"
    try:
        return _NAMES[type(settings)]
    except KeyError:
        raise TypeError(f"{type(settings).__name__} is not what a modifier of a recipe carries") from None


def name_in_messages(settings: Settings) -> str:
    """Return the name of a modifier as its recipe has it, for whoever reads about it.

    Args:
        settings: What the modifier says.

    Returns:
        The name it was written by, where there is one that still fits; otherwise that of :func:`modifier_name`.

    Raises:
        TypeError: If a recipe has no modifier for such settings.

    Example:
        >>> name_in_messages(MagnitudeSettings(final_sparsity=0.9, end_epoch=3.0, written_as="GMPruningModifier"))
        'GMPruningModifier'
    """
    written = getattr(settings, "written_as", "")
    fits = written in MODIFIERS and MODIFIERS[written].settings is type(settings)
    return written if fits else modifier_name(settings)


@contextmanager
def named_in_errors(settings: Settings) -> Iterator[None]:
    """Put the name of a modifier before the message of an error in its settings.

    Args:
        settings: What the modifier says.

    Yields:
        Nothing.

    Raises:
        SettingError: The error that was raised inside, with the name.

    Example:
        >>> with named_in_errors(MagnitudeSettings(final_sparsity=0.9, end_epoch=3.0)):
        ...     raise SettingError("params", "'fc' matches no weight")
        Traceback (most recent call last):
        mfac_core.errors.SettingError: MagnitudePruningModifier.params: 'fc' matches no weight
    """
    try:
        yield
    except SettingError as error:
        error.args = (f"{name_in_messages(settings)}.{error}",)
        raise


def recipe_text(settings: Sequence[Settings]) -> str:
    """Return a recipe that loads to these settings.

    Args:
        settings: What each modifier says.

    Returns:
        YAML with every key written out, except those whose absence says what is meant (such as no devices).

    Raises:
        TypeError: If a recipe has no modifier for some settings.
        SettingError: If a value cannot stand in a recipe, such as an object among ``sampler_options``.

    Example:
        >>> print(recipe_text([MagnitudeSettings(final_sparsity=0.9, end_epoch=3.0)]), end="")
        version: 1.1.0
        <BLANKLINE>
        modifiers:
          - !MagnitudePruningModifier
            params: [__ALL_PRUNABLE__]
            init_sparsity: 0.0
            final_sparsity: 0.9
            start_epoch: 0.0
            end_epoch: 3.0
            update_frequency: 1.0
            inter_func: cubic
            leave_enabled: true
            mask_type: unstructured
    """
    lines = ["version: 1.1.0", "", "modifiers:" if settings else "modifiers: []"]
    for each in settings:
        name = modifier_name(each)
        lines.append(f"  - !{name}")
        lines += [f"    {key}: {text}" for key, text in _written(each, name)]
    return "\n".join(lines) + "\n"


def _written(settings: Settings, name: str) -> list[tuple[str, str]]:
    found = []
    for key, meaning in MODIFIERS[name].keys.items():
        if meaning.field is None or meaning.write is None:
            continue
        names_its_weights = isinstance(getattr(settings, "final_sparsity", None), Mapping)
        value = [] if key == "params" and names_its_weights else meaning.write(getattr(settings, meaning.field))
        if value is not OMIT:
            try:
                found.append((key, flow_text(value)))
            except ValueError as error:
                raise SettingError(meaning.field, str(error)) from error
    return found
