"""Settings -> recipe text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mfac_core.errors import SettingError
from mfac_core.recipe.formats import MODIFIERS, Settings
from mfac_core.recipe.keys import OMIT
from mfac_core.recipe.naming import modifier_name
from mfac_core.recipe.values import flow_text

__all__ = ["recipe_text"]


def recipe_text(settings: Sequence[Settings]) -> str:
    """Return a recipe that loads to these settings.

    Args:
        settings: The settings of each modifier.

    Returns:
        YAML that writes out every key, except those whose absence has a meaning (such as no devices).

    Raises:
        TypeError: If no modifier has settings of some type.
        SettingError: If a recipe cannot contain a value, such as an object among ``sampler_options``.

    Example:
        >>> from mfac_core import MagnitudeSettings
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
    written = []
    for key, meaning in MODIFIERS[name].keys.items():
        if meaning.field is None or meaning.write is None:
            continue
        names_its_weights = isinstance(getattr(settings, "final_sparsity", None), Mapping)
        value = [] if key == "params" and names_its_weights else meaning.write(getattr(settings, meaning.field))
        if value is not OMIT:
            try:
                written.append((key, flow_text(value)))
            except ValueError as error:
                raise SettingError(meaning.field, str(error)) from error
    return written
