"""The state of the random number generators that training uses, as tensors and plain numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mfac_core.state_checks import check_keys, checked_integer, refuse

__all__ = ["check_random_state", "random_state", "restore_random_state"]

_WORDS = 624
"""The number of words in the state of a Mersenne Twister, which Python and NumPy use."""


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators, of Python's ``random`` and of NumPy's global generator."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - data augmentations use it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "words": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }


def check_random_state(state: Mapping[str, Any]) -> None:
    """Raise ValueError for a broken state of the generators. Nothing is changed."""
    what = "the random number generators"
    check_keys(what, state, ("torch", "cuda", "python", "numpy"))
    check_keys(f"{what} (python)", state["python"], ("version", "words", "gauss"))
    check_keys(f"{what} (numpy)", state["numpy"], ("words", "position", "has_gauss", "gauss"))
    of_numpy = state["numpy"]
    checked_integer("random['python']['version']", state["python"]["version"], at_least=3, at_most=3)
    checked_integer("random['numpy']['position']", of_numpy["position"], at_most=_WORDS)
    checked_integer("random['numpy']['has_gauss']", of_numpy["has_gauss"], at_most=1)
    for name, words, count in (
        ("python", state["python"]["words"], _WORDS + 1),
        ("numpy", of_numpy["words"], _WORDS),
    ):
        is_right = _is_dense(words, torch.int64) and tuple(words.shape) == (count,)
        if not is_right or not bool(((words >= 0) & (words < 2**32)).all()):
            refuse(f"random[{name!r}]['words']", words, f"a tensor of {count} integers from 0 to 2**32 - 1")
    for name, value in (("python", state["python"]["gauss"]), ("numpy", of_numpy["gauss"])):
        if not (isinstance(value, float) and math.isfinite(value)) and not (value is None and name == "python"):
            refuse(f"random[{name!r}]['gauss']", value, "a finite number")
    if not isinstance(state["cuda"], list | tuple):
        refuse("random['cuda']", state["cuda"], "a list with a tensor for each GPU")
    for name, value in (("torch", state["torch"]), *((f"cuda, {i}", each) for i, each in enumerate(state["cuda"]))):
        if not _is_dense(value, torch.uint8) or value.ndim != 1:
            refuse(f"random[{name!r}]", value, "a tensor of bytes")
    try:  # fresh generators check the rest
        torch.Generator().set_state(state["torch"].cpu())
        for index, each in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.Generator(f"cuda:{index}").set_state(each.cpu())
        random.Random().setstate(_of_python(state["python"]))  # noqa: S311
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"the state is broken: a random number generator refuses it ({error}); load another checkpoint"
        ) from error


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to a state, whose tensors may be on any device. States of missing GPUs are ignored."""
    torch.set_rng_state(state["torch"].cpu())
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator.cpu(), index)
    random.setstate(_of_python(state["python"]))
    of_numpy = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": of_numpy["words"].cpu().numpy().astype(np.uint32), "pos": of_numpy["position"]},
            "has_gauss": of_numpy["has_gauss"],
            "gauss": of_numpy["gauss"],
        }
    )


def _of_python(state: Mapping[str, Any]) -> tuple[Any, ...]:
    return state["version"], tuple(state["words"].tolist()), state["gauss"]


def _is_dense(value: Any, dtype: torch.dtype) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == dtype and value.layout == torch.strided
