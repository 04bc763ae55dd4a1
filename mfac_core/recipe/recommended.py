"""The recommended settings of one-shot M-FAC, in the keys of a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from mfac_core.recipe.keys import MFAC_KEYS, SCOPE
from mfac_core.recipe.modifiers import settings_from_keys
from mfac_core.settings.pruning import MFACSettings, PruningSettings

__all__ = ["RECOMMENDED", "differs_line", "recommended_keys", "recommended_line"]

RECOMMENDED: Mapping[str, object] = {
    "global_sparsity": True,
    "update": "joint",
    "num_recomputations": "auto",
    "damp": "auto",
    "num_grads": 256,
}
"""Recipe key -> value: what prunes most accurately in one shot, on models of several kinds."""

_MODIFIER = "MFACPruningModifier"
_NESTED = "mfac_options"


def recommended_keys(keys: Mapping[str, object], sparsity: object = None) -> dict[str, object]:
    """Return the keys of an ``MFACPruningModifier`` that prunes in one shot, the recommended ones where none is given.

    Args:
        keys: Recipe keys that are given, with their values.
        sparsity: The sparsity to reach, unless ``keys`` have it as ``final_sparsity``.

    Returns:
        The keys, those that are given first. Where the sparsity is a mapping to names of weights, each of them gets
        its own: ``global_sparsity`` is false.

    Raises:
        TypeError: If the sparsity is missing or given twice.

    Example:
        >>> keys = recommended_keys({"num_grads": 64}, 0.9)
        >>> keys["final_sparsity"], keys["num_grads"], keys["update"]
        (0.9, 64, 'joint')
    """
    if sparsity is None and "final_sparsity" not in keys:
        raise TypeError("there is no sparsity to reach; pass sparsity=0.9 to prune nine weights of ten")
    if sparsity is not None and "final_sparsity" in keys:
        raise TypeError(
            f"sparsity={sparsity!r} and final_sparsity={keys['final_sparsity']!r} are two names of the same; pass one"
        )
    given = dict(keys) if sparsity is None else {"final_sparsity": sparsity, **keys}
    return {**given, **_recommended_beside(given), **({} if "end_epoch" in given else {"end_epoch": 0.0})}


def recommended_line(keys: Mapping[str, object]) -> str:
    """Return in one line which of the recommended settings a one-shot takes.

    Args:
        keys: The recipe keys that are given.

    Returns:
        The line; nothing where all of them are given.

    Example:
        >>> recommended_line({"final_sparsity": 0.9, "damp": 0.001, "num_recomputations": 4})
        'one-shot by recommended settings where none are given: global_sparsity True, update joint, num_grads 256'
    """
    taken = ", ".join(f"{key} {value}" for key, value in _recommended_beside(keys).items())
    return f"one-shot by recommended settings where none are given: {taken}" if taken else ""


def differs_line(settings: PruningSettings) -> str:
    """Return in one line where settings differ from those that are recommended for one-shot M-FAC.

    Args:
        settings: What a modifier says.

    Returns:
        The line; nothing where they do not differ, or prune in another way.

    Example:
        >>> from dataclasses import replace
        >>> settings = settings_from_keys("MFACPruningModifier", {**RECOMMENDED, "final_sparsity": 0.9, "end_epoch": 0})
        >>> differs_line(settings)
        ''
        >>> differs_line(replace(settings, scope="layer"))
        'one-shot by other settings than recommended: global_sparsity False (recommended: True)'
    """
    if not isinstance(settings, MFACSettings):
        return ""
    recommended = settings_from_keys(_MODIFIER, {**RECOMMENDED, "final_sparsity": 0.5, "end_epoch": 0.0})
    differs: list[str] = []
    for key, value in RECOMMENDED.items():
        meaning = {"global_sparsity": SCOPE, **MFAC_KEYS}[key]
        says = getattr(settings, str(meaning.field))
        if says != getattr(recommended, str(meaning.field)) and meaning.write is not None:
            written = meaning.write(says)
            if isinstance(written, Mapping) and list(written) == [0.0]:  # num_grads, as it is most often given
                written = written[0.0]
            differs.append(f"{key} {written} ({'' if differs else 'recommended: '}{value})")
    return f"one-shot by other settings than recommended: {', '.join(differs)}" if differs else ""


def _recommended_beside(given: Mapping[str, object]) -> dict[str, object]:
    nested = given.get(_NESTED)
    known = {*given, *(nested if isinstance(nested, Mapping) else ())}
    # sparsities with names of weights are those of each of them
    of_each = {"global_sparsity": False} if isinstance(given.get("final_sparsity"), Mapping) else {}
    return {key: value for key, value in {**RECOMMENDED, **of_each}.items() if key not in known}
