"""The fence: what must be the same on all ranks before they go on together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, device_of
from mfac_core.errors import RankError
from mfac_core.ranks.agreement import gathered, named_ranks, same_on_all
from mfac_core.ranks.base import Ranks

__all__ = ["check_alike", "check_same", "digest", "strided"]

_SAME_CHECKPOINT = "resume all ranks from the same checkpoint"

_CURES = {
    "step": "pass the same steps_per_epoch on all ranks, and resume them from the same checkpoint",
    "steps_per_epoch": "pass the same number on all ranks",
    "the modifiers, or the weights that they prune": "use the same recipe and the same model on all ranks",
    "the modifiers that do not prune": "use the same recipe on all ranks",
    "the schedule": "use the same recipe on all ranks",
    "the settings": "use the same recipe on all ranks",
    "which weights each of them has": "build the same model on all ranks, and shard it alike",
    "whether a state is loaded": _SAME_CHECKPOINT,
    "gradient samples": "pass the gradients of each step on all ranks",
    "the device of the gradient window": "name it (grads_device in a recipe)",
    "refused gradient samples": "pass the gradients of each step on all ranks, after they are reduced",
}

_ONE_MODEL = "wrap the model in DistributedDataParallel, or in Keras use keras.distribution.DataParallel"

_ENTRIES = 4096
"""Entries of a vector that are compared."""

_PROJECTIONS = 8

_ALIKE = 1e-3
"""Largest difference of projections, relative to the norm. Reductions in another order leave less than 1e-5; gradients
of other batches differ by about the norm, so that one projection in a thousand would agree by chance, and not all."""


def check_same(ranks: Ranks, values: Mapping[str, int | str]) -> None:
    """Raise the same error on all ranks if a value differs between them; the message names it. Collective."""
    same_on_all(ranks, values, {name: _CURES.get(name, _SAME_CHECKPOINT) for name in values})


def digest(array: npt.NDArray[Any]) -> str:
    """Return a short text that is equal for equal arrays."""
    return blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def strided(vectors: Sequence[Array]) -> list[Array]:
    """Return copies of a few thousand entries of consecutive vectors, by which :func:`check_alike` compares them."""
    stride = max(1, sum(int(vector.shape[0]) for vector in vectors) // _ENTRIES)
    return [device_of(vector).asarray(vector[::stride] + 0) for vector in vectors]


def check_alike(ranks: Ranks, what: str, entries: Sequence[Array] | None) -> None:
    """Raise the same error on all ranks if vectors that are replicated differ by more than rounding. Collective.

    Args:
        ranks: The ranks.
        what: What is compared, in the plural.
        entries: From :func:`strided`; ``None`` if there are none, on all ranks.
    """
    on_host = [device_of(each).to_numpy(each) for each in entries or ()]
    values = np.concatenate([np.zeros(0), *on_host])[:_ENTRIES]
    with np.errstate(invalid="ignore", over="ignore"):  # of NaN and Inf, which are refused elsewhere
        projections = _signs()[:, : len(values)] @ values
        found = gathered(ranks, [float(np.linalg.norm(values)), *projections.tolist()])
        differs = np.abs(found - found[0]).max(axis=1) > _ALIKE * found[:, 0].max()
    if differs.any():
        others = named_ranks(np.flatnonzero(differs).tolist())
        raise RankError(f"{what} differ between ranks ({others} from rank 0): {_ONE_MODEL}")


@cache
def _signs() -> npt.NDArray[np.float64]:
    """Return rows of random signs, the same on all ranks."""
    return np.random.default_rng(0).choice([-1.0, 1.0], (_PROJECTIONS, 2 * _ENTRIES))
