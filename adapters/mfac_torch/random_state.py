"""The state of the random number generators that training draws from, as tensors and plain numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "restore_random_state"]


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators, of Python's ``random`` and of NumPy's global generator.

    Returns:
        Tensors and plain numbers only; ``torch.load(weights_only=True)`` reads it.
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - what augmentations draw from
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


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Set all generators to a state. States of GPUs that are not here are left out.

    Args:
        state: What :func:`random_state` returned, on any device.
    """
    torch.set_rng_state(state["torch"].cpu())
    for index, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator.cpu(), index)
    of_python, of_numpy = state["python"], state["numpy"]
    random.setstate((of_python["version"], tuple(of_python["words"].tolist()), of_python["gauss"]))
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": of_numpy["words"].cpu().numpy().astype(np.uint32), "pos": of_numpy["position"]},
            "has_gauss": of_numpy["has_gauss"],
            "gauss": of_numpy["gauss"],
        }
    )
