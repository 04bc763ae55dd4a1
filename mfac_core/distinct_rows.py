"""How many of the gradient samples differ: a sample that comes twice tells no more about the curvature than once."""

from __future__ import annotations

import hashlib

import numpy as np

from mfac_core.backends import device_of
from mfac_core.blockwise import GradientSource

__all__ = ["num_distinct_rows", "repeated_rows"]

_COLUMNS = 4096
"""Columns that are looked at before the rows are compared."""


def num_distinct_rows(source: GradientSource) -> int:
    """Return how many rows of a gradient window, or of plain gradients, are different from each other, bit for bit.

    Rows are read block by block until all of them differ, which most often is after the first block.

    Args:
        source: The gradient samples.

    Returns:
        A number from 0 to the number of rows.

    Example:
        >>> from mfac_core.gradient_matrix import GradientMatrix
        >>> num_distinct_rows(GradientMatrix([np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]])], block_size=1))
        2
    """
    digests = [hashlib.blake2b(digest_size=16) for _ in range(source.count)]
    distinct = min(source.count, 1)
    for slab in source.slabs:
        at_once = max(1, _COLUMNS // slab.width)
        for first in range(0, slab.count, at_once):
            for chunk in source.chunks(slab.part(first, min(at_once, slab.count - first))):
                rows = device_of(chunk).to_numpy(chunk).swapaxes(0, 1)
                for digest, row in zip(digests, rows, strict=True):
                    digest.update(np.ascontiguousarray(row).data)
            distinct = len({digest.digest() for digest in digests})
            if distinct == source.count:
                return distinct
    return distinct


def repeated_rows(count: int, distinct: int) -> str:
    """Return the warning about gradient samples that repeat.

    Args:
        count: Number of gradient samples.
        distinct: How many of them are different.

    Returns:
        The sentence.
    """
    return (
        f"of {count} gradient samples only {distinct} {'is' if distinct == 1 else 'are'} distinct, so that the Fisher "
        "has no more rank than that; draw more or smaller batches (a data loader that shuffles gives other batches in "
        "each pass), or lower num_gradients (num_grads in a recipe)"
    )
