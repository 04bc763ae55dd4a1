"""Errors for unknown keyword arguments of settings, which suggest the field that is probably meant."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Self

__all__ = ["RECIPE_SPELLINGS", "NamesItsFields"]

RECIPE_SPELLINGS = {
    "init_sparsity": "initial_sparsity",
    "inter_func": "interpolation",
    "num_grads": "num_gradients",
    "fisher_block_size": "block_size",
    "damp": "damping",
    "available_gpus": "devices",
    "available_devices": "devices",
    "grads_device": "gradients_device",
    "grads_dtype": "gradients_dtype",
    "use_gradient_buffering": "gradient_origin",
    "grad_sampler_kwargs": "sampler_options",
    "global_sparsity": "scope",
    "momentum_buffer_reset": "reset_momentum",
    "ignore": "exclude",
    "params_strict": "strict",
    "lr_func": "function",
    "lr_class": "kind",
    "lr_kwargs": "options",
    "init_lr": "initial",
    "final_lr": "final",
}
"""Recipe key -> field of the settings, for the keys that differ."""


class NamesItsFields:
    """A dataclass whose error for an unknown keyword suggests the field that is probably meant.

    Raises:
        TypeError: If a keyword is not a field; the message suggests one, or lists all.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Step(NamesItsFields):
        ...     damping: float = 1e-5
        >>> Step(damp=1e-3)
        Traceback (most recent call last):
        TypeError: Step has no field 'damp'; did you mean damping?
    """

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Refuse a keyword that is not a field."""
        known = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]  # a dataclass
        for name in values:
            if name not in known:
                meant = RECIPE_SPELLINGS.get(name)
                near = [meant] if meant in known else get_close_matches(name, known, n=1)
                cure = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
                raise TypeError(f"{cls.__name__} has no field {name!r}; {cure}")
        return super().__new__(cls)
