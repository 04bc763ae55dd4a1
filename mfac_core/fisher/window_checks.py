"""Warnings about uninformative gradient samples: zero, below the damping, nearly equal or repeated."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np

from mfac_core.backends import Array, array_namespace, device_of
from mfac_core.fisher.blockwise import GradientSource
from mfac_core.fisher.kernels import wide_dtype
from mfac_core.fisher.row_formats import widened
from mfac_core.ranks.agreement import gathered, together
from mfac_core.ranks.base import Alone, Ranks
from mfac_core.settings.checks import Damping

__all__ = ["window_warnings"]

_NUMBERS_AT_ONCE = 2**20

_ROUNDING_ERRORS = 32
"""Norm of rows, in units of the dtype's eps, up to which they count as rounding errors. A network distilled against
itself leaves norms up to 11; the smallest norm seen for a real loss, scaled down by 1e-4, is 75."""

_NEARLY_EQUAL = 1e-6
"""Squared distance of rows from their mean, relative to their squared norm, up to which they count as nearly equal.
Rounding leaves 1e-13, and mini-batches that share 99% of their examples leave 1e-3."""

_LOST_UNDER_DAMPING = 0.01
"""Trace of the empirical Fisher of a block, in units of the damping, up to which it is negligible: the relative
difference of ``F^-1`` from ``I / damping`` is no larger than that."""

_NO_GRADIENT = (
    "The loss has no gradient for this model, for example because it is distilled against itself: sample the targets "
    "from its own output instead, or use the labels"
)

_ONE_BATCH = (
    "Either the same batch was drawn repeatedly, or the loss does not depend on the data; draw different batches (a "
    "data loader that shuffles does so in each pass)"
)


def window_warnings(source: GradientSource, *, damping: Damping, ranks: Ranks | None = None) -> list[str]:
    """Return a warning, as a sentence, for each way in which gradient samples are uninformative.

    The samples are read piece by piece until no warning can apply, usually after the first piece.

    Args:
        source: The gradient samples: a window, or plain gradients.
        damping: Added to the diagonal of their empirical Fisher; with ``auto`` none is negligible.
        ranks: The processes of which each has some of the columns, in which case this is collective: all return the
            same.

    Example:
        >>> from mfac_core.fisher.matrix import GradientMatrix
        >>> rows = GradientMatrix([np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]])], block_size=1)
        >>> window_warnings(rows, damping=1e-5)[0].partition(",")[0]
        'of 3 gradient samples only 2 are distinct'
    """
    ranks = ranks or Alone()
    if not source.count:
        return []
    seen = _Seen(source)
    with together(ranks, "checking the gradient samples"):
        is_informative = _reads(seen, source, damping)
    informative, num_weights = gathered(ranks, [is_informative, source.num_weights]).T
    if informative.any() or not num_weights.any():
        return []
    seen.join(ranks)
    if not math.isfinite(seen.squares):  # a pruning step names the rows with NaN or Inf
        return []
    count = source.count
    if seen.squares == 0:
        return [f"all {count} gradient samples are zero, so M-FAC reduces to magnitude pruning. {_NO_GRADIENT}"]
    if seen.is_small:
        return [
            f"the {count} gradient samples are as small as rounding errors (norm {seen.norm:.1g}): M-FAC then "
            f"follows noise, or equals magnitude pruning under a fixed damping. {_NO_GRADIENT}; if the loss was "
            "scaled down, scale it up"
        ]
    warnings = []
    if seen.is_lost_under(damping):
        warnings.append(
            f"the damping of {damping:g} hides the empirical Fisher of the {count} gradient samples, of which no block "
            f"has a trace above {seen.largest_trace:.1g}: M-FAC reduces to magnitude pruning. Use damp: auto "
            '(damping="auto" in Python), which follows the scale of the loss, or a smaller damping; a model that is '
            "distilled against itself needs other targets"
        )
    if count > 1 and seen.distinct == 1:
        warnings.append(f"of {count} gradient samples only 1 is distinct, so the Fisher has rank 1. {_ONE_BATCH}")
    elif seen.is_alike:
        warnings.append(
            f"the {count} gradient samples are nearly equal (their differences are {seen.deviation / seen.squares:.1g} "
            f"of their squared norm), so the Fisher has little more than rank 1. {_ONE_BATCH}"
        )
    elif seen.distinct < count:
        warnings.append(
            f"of {count} gradient samples only {seen.distinct} are distinct, so the Fisher has no more rank than "
            "that; draw more or smaller batches (a data loader that shuffles gives other batches in each pass), or "
            "lower num_gradients (num_grads in a recipe)"
        )
    return warnings


def _reads(seen: _Seen, source: GradientSource, damping: Damping) -> bool:
    """Read the samples piece by piece; return whether what is read so far rules all warnings out."""
    for piece, begins_block in _pieces(source):
        with np.errstate(over="ignore", invalid="ignore"):  # sums that overflow are checked later
            seen.add(piece, begins_block=begins_block)
        if not (seen.is_small or seen.is_lost_under(damping) or seen.is_alike or seen.distinct < source.count):
            return True
    return False


class _Seen:
    """Statistics of gradient samples over the columns read so far.

    Attributes:
        squares: Sum of the squares of all entries.
        deviation: Sum of the squared differences from the mean of the rows.
        largest_trace: The largest trace of the empirical Fisher of a block.
        distinct: Number of rows that differ from each other, bit for bit.
    """

    def __init__(self, source: GradientSource) -> None:
        self.squares = self.deviation = self.largest_trace = 0.0
        self.distinct = min(source.count, 1)
        self._count = source.count
        self._noise = _ROUNDING_ERRORS * float(np.finfo(source.dtype).eps)
        self._block_trace = 0.0
        self._digests = [hashlib.blake2b(digest_size=16) for _ in range(source.count)]

    @property
    def norm(self) -> float:
        """Root mean square of the norms of the rows."""
        return math.sqrt(self.squares / self._count)

    @property
    def is_small(self) -> bool:
        """Whether the rows may be rounding errors."""
        return self.norm <= self._noise

    @property
    def is_alike(self) -> bool:
        """Whether there are several rows, nearly equal to each other."""
        return self._count > 1 and self.deviation <= _NEARLY_EQUAL * self.squares < math.inf

    def is_lost_under(self, damping: Damping) -> bool:
        """Return whether the empirical Fisher is negligible relative to the damping."""
        return damping != "auto" and self.squares < math.inf and self.largest_trace <= _LOST_UNDER_DAMPING * damping

    def add(self, piece: Array, *, begins_block: bool) -> None:
        """Add columns of shape ``(n, m, width)``: some of one block, or those of ``n`` whole blocks."""
        xp = array_namespace(piece)
        # float64, on the host if need be: squares of small float32 gradients underflow
        if wide_dtype(piece) != xp.float64:
            piece, xp = device_of(piece).to_numpy(piece), np
        wide = xp.asarray(piece, dtype=xp.float64)
        squares = xp.sum(wide * wide, axis=(1, 2))
        differences = wide - xp.mean(wide, axis=1, keepdims=True)
        self.squares += float(xp.sum(squares))
        self.deviation += float(xp.sum(differences * differences))
        # trace(G^T G / m) is the sum of squares over m; pieces of one block add up
        trace = float(xp.max(squares)) / self._count
        self._block_trace = trace if begins_block else self._block_trace + trace
        self.largest_trace = max(self.largest_trace, self._block_trace)
        # once all rows differ, further columns cannot make them equal
        if self.distinct < self._count:
            self._compare(piece)

    def join(self, ranks: Ranks) -> None:
        """Take in the columns of all ranks. Collective."""
        words = [np.frombuffer(digest.digest(), np.int64) for digest in self._digests]
        found = gathered(ranks, [self.squares, self.deviation, self.largest_trace])
        self.squares, self.deviation = found[:, 0].sum(), found[:, 1].sum()
        self.largest_trace = found[:, 2].max()
        # rows are equal if they are in the columns of each rank
        digests = gathered(ranks, np.concatenate(words).tolist()).reshape(ranks.size, self._count, -1)
        self.distinct = len(np.unique(digests.swapaxes(0, 1).reshape(self._count, -1), axis=0))

    def _compare(self, piece: Array) -> None:
        # rows are equal if all their bytes are: a digest of each takes the pieces one after another
        rows = device_of(piece).to_numpy(piece).swapaxes(0, 1)
        for digest, row in zip(self._digests, rows, strict=True):
            digest.update(np.ascontiguousarray(row).data)
        self.distinct = len({digest.digest() for digest in self._digests})


def _pieces(source: GradientSource) -> Iterator[tuple[Array, bool]]:
    """Yield columns as arrays of shape ``(n, m, width)``, and whether they begin a block: whole blocks if small."""
    at_once = max(1, _NUMBERS_AT_ONCE // source.count)
    for group in source.stored_groups:
        blocks = max(1, at_once // group.width)
        for first in range(0, group.count, blocks):
            begins_block = True
            for chunk in source.chunks(group.subgroup(first, min(blocks, group.count - first))):
                width = chunk.shape[2]
                for start in range(0, width, at_once):
                    yield widened(chunk[:, :, start : min(start + at_once, width)]), begins_block
                    begins_block = False
