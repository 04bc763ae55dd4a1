"""What ranks must agree on: values that must be the same on all, and errors of one that all must know."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.errors import RankError
from mfac_core.ranks.base import Ranks

__all__ = ["gathered", "named_ranks", "same_on_all", "together"]

_FLOATS = (float, np.floating)

_MESSAGE_BYTES = 2000
"""Bytes of an error message that the other ranks are told."""

_GROUPS = 4
"""Different values that a message names."""


def gathered(ranks: Ranks, values: Sequence[float | int]) -> npt.NDArray[Any]:
    """Return the values of all ranks, shape ``(size, len(values))``: int64 if all are integers, else float64.

    Collective, by a single sum. All ranks give the same number of values, of the same types.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> gathered(Alone(), [3, 2**60]).tolist()
        [[3, 1152921504606846976]]
    """
    row = np.asarray(values, np.int64 if all(isinstance(value, int | np.integer) for value in values) else np.float64)
    rows = np.zeros((ranks.size, len(row)), row.dtype)
    rows[ranks.rank] = row
    return ranks.sum(rows)


@contextmanager
def together(ranks: Ranks, doing: str, *, sharded: bool = False) -> Generator[None]:
    """Let a block fail on all ranks if it fails on one, which raises its own error.

    Collective, by one small sum at the end of the block. Inside it all ranks make the same collective calls, or none:
    what may fail on a single rank belongs before or after them.

    Args:
        ranks: The ranks.
        doing: What the block does, for the message on the other ranks, such as ``the update of the weights``.
        sharded: Whether the block runs a model of shards, in which ranks wait for each other anyway. Nothing is sent
            then: a rank that fails alone cannot tell the others, and can only end, so that they notice.

    Raises:
        RankError: If the block has succeeded here and failed elsewhere.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> with together(Alone(), "the division"):
        ...     1 / 0
        Traceback (most recent call last):
        ZeroDivisionError: division by zero
    """
    if ranks.size == 1 or sharded:
        yield
        return
    try:
        yield
    except Exception as error:
        # if the others cannot be told because they are gone, the error of this rank says more
        with suppress(Exception):
            _tell(ranks, f"{type(error).__name__}: {error}")
        raise
    failed, message = _tell(ranks, "")
    if failed:
        raise RankError(f"{named_ranks(failed)} failed in {doing}: {message}; nothing has changed")


def same_on_all(ranks: Ranks, values: Mapping[str, float | int | str], cures: Mapping[str, str]) -> None:
    """Raise the same error on all ranks if a value is not the same on all.

    Collective, by a single sum. Floats are compared bit by bit, and texts by a digest, which no message shows.

    Args:
        ranks: The ranks.
        values: What is compared, by name; the first that differs is named.
        cures: What to do if it differs, by name.

    Raises:
        RankError: If a value differs; the message names it, the ranks and the cure.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> same_on_all(Alone(), {"step": 119}, {"step": "pass the same steps_per_epoch on all ranks"})
    """
    if ranks.size == 1:
        return
    columns = gathered(ranks, [_bits(value) for value in values.values()]).T
    for (name, value), column in zip(values.items(), columns, strict=True):
        if (column != column[0]).any():
            raise RankError(f"ranks differ in {name}{_difference(column, type(value))}; {cures[name]}")


def _tell(ranks: Ranks, message: str) -> tuple[list[int], str]:
    """Tell all ranks a message, if it is not empty; return the ranks that have one, and the message of the first."""
    text = message.encode()[:_MESSAGE_BYTES]
    lengths = gathered(ranks, [len(text)])[:, 0]
    failed = np.flatnonzero(lengths).tolist()
    if not failed:
        return [], ""
    characters = np.zeros(lengths[failed[0]], np.int64)
    if ranks.rank == failed[0]:
        characters[:] = np.frombuffer(text, np.uint8)
    return failed, ranks.sum(characters).astype(np.uint8).tobytes().decode(errors="replace")


def _bits(value: float | int | str) -> int:
    """Return 64 bits that are equal for equal values."""
    if isinstance(value, str):
        return int.from_bytes(blake2b(value.encode(), digest_size=8).digest(), "little", signed=True)
    return int(np.float64(value).view(np.int64)) if isinstance(value, _FLOATS) else int(value)


def _difference(column: npt.NDArray[np.int64], kind: type) -> str:
    """Return which ranks have which value, for a message; nothing if values have no form to show and all differ."""
    having: dict[int, list[int]] = {}
    for rank, bits in enumerate(column.tolist()):
        having.setdefault(bits, []).append(rank)
    most = max(having, key=lambda bits: len(having[bits]))
    has_majority = 2 * len(having[most]) > len(column)
    if issubclass(kind, str):
        if not has_majority:
            return ""
        others = sorted(rank for bits, of_value in having.items() if bits != most for rank in of_value)
        return f": {named_ranks(others)} from the others"
    shown = {bits: str(np.int64(bits).view(np.float64) if issubclass(kind, _FLOATS) else bits) for bits in having}
    few = [bits for bits in having if bits != most or not has_majority][:_GROUPS]
    parts = [f"{shown[bits]} on {named_ranks(having[bits])}" for bits in few]
    if has_majority:
        parts.append(f"{shown[most]} on the others")
    return f": {', '.join(parts)}"


def named_ranks(ranks: Iterable[int]) -> str:
    """Return ranks in words: ``rank 1``, or ``ranks 1, 2 and 5``."""
    *first, last = map(str, ranks)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"
