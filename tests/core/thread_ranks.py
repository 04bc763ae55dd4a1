"""Ranks that are threads of one process, for tests of everything that needs several ranks but no framework."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mfac_core.backends import Array, array_namespace, numpy_dtype
from mfac_core.errors import RankError
from mfac_core.ranks import Parts

Result = TypeVar("Result")

SECONDS = 20
"""A collective that takes longer has been called by some ranks only."""


class _Meeting:
    """Where the threads meet: each collective is complete when all ranks have come to it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._brought: list[dict[int, tuple[str, Any]]] = []
        self._gone: set[int] = set()

    def bring(self, rank: int, index: int, what: str, value: Any) -> list[Any]:
        """Bring a value to the collective with this index; return those of all ranks."""
        with self._changed:
            if index == len(self._brought):
                self._brought.append({})
            brought = self._brought[index]
            brought[rank] = (what, value)
            self._changed.notify_all()
            while len(brought) < self.size:
                gone = self._gone.difference(brought)
                if gone:
                    raise RankError(f"rank {min(gone)} is gone")
                if not self._changed.wait(SECONDS):
                    raise RankError(f"only ranks {sorted(brought)} have come to {what}")
        if len({of_rank for of_rank, _ in brought.values()}) > 1:
            raise AssertionError(f"ranks are in different collectives: {[brought[k][0] for k in range(self.size)]}")
        return [brought[k][1] for k in range(self.size)]

    def leave(self, rank: int) -> None:
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()


class ThreadRanks:
    """One rank; it checks that calls keep to the contract of :class:`mfac_core.ranks.Ranks`.

    Attributes:
        calls: The collectives of this rank so far: their name, and the bytes that it has sent to others.
    """

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = meeting.size
        self.calls: list[tuple[str, int]] = []

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        assert len(parts) == self.size
        assert all(len(part.shape) == 1 for part in parts)
        (dtype,) = {numpy_dtype(part) for part in parts}
        assert dtype in ("float32", "float64", "int64", "uint8")
        (_,) = {(type(part), str(getattr(part, "device", "cpu"))) for part in parts}
        lengths = [part.shape[0] for rank, part in enumerate(parts) if rank != self.rank]
        copies = [array_namespace(part).asarray(part, copy=True) for part in parts]
        brought = self._bring(f"exchange of {type(parts).__name__} of {dtype}", copies, sum(lengths) * dtype.itemsize)
        received = [of_rank[self.rank] for of_rank in brought]
        if isinstance(parts, Parts):
            assert parts.arriving == [part.shape[0] for part in received]
        return received

    def sum(self, array: np.ndarray) -> np.ndarray:
        assert isinstance(array, np.ndarray) and array.dtype in ("int64", "float64")
        brought = self._bring(f"sum of {array.dtype} {array.shape}", array.copy(), array.nbytes)
        return np.sum(brought, axis=0)

    def _bring(self, what: str, value: Any, num_bytes: int) -> list[Any]:
        self.calls.append((what.partition(" ")[0], num_bytes))
        return self._meeting.bring(self.rank, len(self.calls) - 1, what, value)


def outcomes(size: int, function: Callable[[ThreadRanks], Result]) -> list[Result | BaseException]:
    """Call a function with each rank, in a thread of its own; return what each has returned or raised."""
    meeting = _Meeting(size)
    found: list[Result | BaseException] = [RankError("not run")] * size

    def run(rank: int) -> None:
        try:
            found[rank] = function(ThreadRanks(meeting, rank))
        except BaseException as error:
            found[rank] = error
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def run_ranks(size: int, function: Callable[[ThreadRanks], Result]) -> list[Result]:
    """Call a function with each rank, in a thread of its own; return the results in the order of ranks.

    If a rank raises, the others raise in their next collective, and the first error that is not caused by another
    rank is raised here.
    """
    found = outcomes(size, function)
    errors = [each for each in found if isinstance(each, BaseException)]
    if errors:
        raise next((each for each in errors if not isinstance(each, RankError)), errors[0])
    return found  # type: ignore[return-value]
