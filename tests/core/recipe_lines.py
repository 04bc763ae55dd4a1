"""Short recipes for the tests, and what becomes of them."""

from __future__ import annotations

import pytest

from mfac_core.errors import RecipeError
from mfac_core.recipe import load_recipe


def item(*keys: str, modifier: str = "MFACPruningModifier") -> str:
    return "\n".join(["pruning_modifiers:", f"  - !{modifier}", *(f"    {key}" for key in keys), ""])


def mfac(*keys: str) -> str:
    """Keys begin on line 5."""
    return item("final_sparsity: 0.8", "end_epoch: 10.0", *keys)


def only(text: str, **options: object):
    (modifier,) = load_recipe(text, **options).modifiers
    return modifier


def refusal(text: str, **options: object) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text, **options)
    return str(caught.value)
