"""The recommended settings of one-shot M-FAC, in the keys of a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from mfac_core.recipe.keys import MFAC_KEYS, SCOPE
from mfac_core.recipe.modifiers import settings_from_keys
from mfac_core.recipe.values import flow_text
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
    """Return recipe keys of an ``MFACPruningModifier`` that prunes in one shot: those given, then recommended ones.

    The sparsity is given either by itself or as ``final_sparsity``, else a ``TypeError`` is raised. If it is a mapping
    to names of weights, ``global_sparsity`` is false, because each of them gets its own.

    Example:
        >>> keys = recommended_keys({"num_grads": 64}, 0.9)
        >>> keys["final_sparsity"], keys["num_grads"], keys["update"]
        (0.9, 64, 'joint')
    """
    if sparsity is None and "final_sparsity" not in keys:
        raise TypeError("the sparsity is missing; pass sparsity=0.9 to prune nine weights of ten")
    if sparsity is not None and "final_sparsity" in keys:
        raise TypeError(
            f"sparsity={sparsity!r} and final_sparsity={keys['final_sparsity']!r} name one setting twice; pass one"
        )
    given = dict(keys) if sparsity is None else {"final_sparsity": sparsity, **keys}
    return {**given, **_recommended_beside(given), **({} if "end_epoch" in given else {"end_epoch": 0.0})}


def recommended_line(keys: Mapping[str, object]) -> str:
    """Return in one line which recommended settings are used in addition to the given keys; empty if all are given.

    Example:
        >>> recommended_line({"final_sparsity": 0.9, "damp": 0.001, "num_recomputations": 4, "update": "joint"})
        'one-shot pruning with recommended settings where none are given: global_sparsity true, num_grads 256'
    """
    taken = ", ".join(f"{key} {flow_text(value)}" for key, value in _recommended_beside(keys).items())
    return f"one-shot pruning with recommended settings where none are given: {taken}" if taken else ""


def differs_line(settings: PruningSettings) -> str:
    """Return in one line where settings differ from those recommended for one-shot M-FAC; empty if they do not.

    Example:
        >>> from dataclasses import replace
        >>> settings = settings_from_keys("MFACPruningModifier", {**RECOMMENDED, "final_sparsity": 0.9, "end_epoch": 0})
        >>> differs_line(settings)
        ''
        >>> differs_line(replace(settings, scope="layer"))
        'one-shot pruning with other settings than recommended: global_sparsity false (recommended: true)'
    """
    if not isinstance(settings, MFACSettings):
        return ""
    recommended = settings_from_keys(_MODIFIER, {**RECOMMENDED, "final_sparsity": 0.5, "end_epoch": 0.0})
    differs: list[str] = []
    for key, value in RECOMMENDED.items():
        meaning = {"global_sparsity": SCOPE, **MFAC_KEYS}[key]
        value_here = getattr(settings, str(meaning.field))
        if value_here != getattr(recommended, str(meaning.field)) and meaning.write is not None:
            written = meaning.write(value_here)
            if isinstance(written, Mapping) and list(written) == [0.0]:  # num_grads, as it is most often given
                written = written[0.0]
            differs.append(f"{key} {flow_text(written)} ({'' if differs else 'recommended: '}{flow_text(value)})")
    return f"one-shot pruning with other settings than recommended: {', '.join(differs)}" if differs else ""


def _recommended_beside(given: Mapping[str, object]) -> dict[str, object]:
    nested = given.get(_NESTED)
    known = {*given, *(nested if isinstance(nested, Mapping) else ())}
    per_weight = {"global_sparsity": False} if isinstance(given.get("final_sparsity"), Mapping) else {}
    return {key: value for key, value in {**RECOMMENDED, **per_weight}.items() if key not in known}
