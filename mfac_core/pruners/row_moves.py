"""Rows of the gradient window move to the ranks that own their columns: after a pruning step, and after loading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array
from mfac_core.errors import RankError
from mfac_core.fisher.window import GradientWindow
from mfac_core.ranks.agreement import gathered
from mfac_core.ranks.base import Ranks
from mfac_core.ranks.routes import Interval, Route
from mfac_core.state_checks import check_keys, checked_integer, refuse

__all__ = ["DealtRows", "LoadedRows", "kept_ranges", "move_rows"]

_NUMBERS_AT_ONCE = 2**22


def kept_ranges(ranges: Sequence[Interval], stay: npt.NDArray[np.bool_]) -> list[Interval]:
    """Return where the columns of each rank that stay are among all columns that stay.

    Example:
        >>> kept_ranges([(0, 3), (3, 5)], np.array([True, False, True, False, True]))
        [(0, 2), (2, 3)]
    """
    counts = (int(np.count_nonzero(stay[start:stop])) for start, stop in ranges)
    return list(pairwise(accumulate(counts, initial=0)))


def move_rows(
    ranks: Ranks,
    held: Sequence[Sequence[Interval]],
    wanted: Sequence[Interval],
    rows_from: Callable[[int, int], Array],
    count: int,
) -> Iterator[Array]:
    """Yield rows, a few at a time, in the columns that this rank wants. Each time is a collective.

    Args:
        ranks: The ranks.
        held: For each rank the intervals of columns that it has.
        wanted: For each rank the columns that it wants.
        rows_from: Returns the rows from a first to a last, in the columns that this rank has.
        count: How many rows there are, on all ranks.
    """
    route = Route(ranks, held=held, wanted=[[each] for each in wanted])
    widths = [sum(stop - start for start, stop in each) for each in (*held, *([each] for each in wanted))]
    at_once = max(1, _NUMBERS_AT_ONCE // max(*widths, 1))  # the same on all ranks
    for first in range(0, count, at_once):
        yield route.move(rows_from(first, min(first + at_once, count)))


@dataclass(frozen=True)
class DealtRows:
    """Loaded rows in the columns of this rank.

    Args:
        count: How many rows there are.
        missing: Columns that no rank has loaded; there are then no rows.
        rows: The rows, oldest first, a few at a time; each time is a collective.
    """

    count: int = 0
    missing: int = 0
    rows: Iterable[Array] = ()


@dataclass(frozen=True)
class LoadedRows:
    """What this rank has loaded of a gradient window: the states of some ranks, of all, or of none.

    Args:
        states: States of windows, with ``columns`` and ``num_columns`` where they are those of one of several ranks.
        windows: These windows, in the same order.
        columns: Their columns.
    """

    states: Sequence[Mapping[str, Any]]
    windows: Sequence[GradientWindow]
    columns: Sequence[Interval]

    @classmethod
    def checked(
        cls, states: Sequence[Mapping[str, Any]], num_columns: int, new_window: Callable[[int], GradientWindow]
    ) -> LoadedRows:
        """Return checked states of windows with ``num_columns`` columns together; ``new_window`` makes one.

        Raises:
            ValueError: If a state is broken or does not fit, or they are not from the same time.
        """
        windows, columns = [], []
        for state in states:
            interval = _columns(state, num_columns)
            window = new_window(interval[1] - interval[0])
            window.load_state_dict(state)
            windows.append(window)
            columns.append(interval)
        counts = sorted({window.count for window in windows})
        if len(counts) > 1:
            raise ValueError(
                f"the states of several ranks hold {' and '.join(map(str, counts))} gradient samples; load the states "
                "that all ranks have saved at the same step"
            )
        return cls(states, windows, columns)

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.windows[0].count if self.windows else 0

    def state_dict(self) -> Any:
        """Return the states as they were loaded."""
        return self.states[0] if len(self.states) == 1 else list(self.states) or None

    def dealt(self, ranks: Ranks, ranges: Sequence[Interval], num_gradients: int) -> DealtRows:
        """Deal the rows that all ranks have loaded to the owners of their columns. Collective.

        Args:
            ranks: The ranks.
            ranges: The columns that each rank owns.
            num_gradients: The largest number of rows to return, the most recent ones.
        """
        parts = self._disjoint()
        held = _told(ranks, [interval for interval, _ in parts])
        counts = gathered(ranks, [self.count])[:, 0]
        counts = counts[[bool(each) for each in held]]
        if not counts.any():
            return DealtRows()
        if (counts != counts[0]).any():
            raise RankError(
                f"ranks have loaded gradient windows with {' and '.join(map(str, sorted(set(counts.tolist()))))} rows; "
                "resume all ranks from the same checkpoint"
            )
        num_columns, covered = ranges[-1][1], 0
        reached = 0
        for start, stop in sorted(interval for each in held for interval in each):
            covered += max(stop - max(start, reached), 0)
            reached = max(reached, stop)
        if covered < num_columns:
            return DealtRows(missing=num_columns - covered)
        count = int(counts[0])
        first = max(count - num_gradients, 0)

        def rows_from(begin: int, end: int) -> Array:
            # a rank without any state still has rows, of no columns
            empty = np.zeros((end - begin, 0), np.float32)
            return np.concatenate([empty, *(rows(first + begin, first + end) for _, rows in parts)], axis=1)

        return DealtRows(count - first, rows=move_rows(ranks, held, ranges, rows_from, count - first))

    def _disjoint(self) -> list[tuple[Interval, Callable[[int, int], npt.NDArray[Any]]]]:
        """Return disjoint intervals in order, each with a function that returns some of its rows."""
        parts: list[tuple[Interval, Callable[[int, int], npt.NDArray[Any]]]] = []
        reached = 0
        for (start, stop), window in sorted(zip(self.columns, self.windows, strict=True), key=lambda each: each[0]):
            begin = max(start, reached)
            if begin < stop:
                parts.append(((begin, stop), _rows_of(window, begin - start)))
                reached = stop
        return parts


def _rows_of(window: GradientWindow, skipped: int) -> Callable[[int, int], npt.NDArray[Any]]:
    return lambda first, last: window.device.to_numpy(window.recent(first, last))[:, skipped:]


def _columns(state: Mapping[str, Any], num_columns: int) -> Interval:
    """Return the columns that a state holds of a window of ``num_columns``; all, if it does not say."""
    check_keys("a gradient window", state, ("rows", "position"))
    if "columns" not in state:
        return 0, num_columns
    check_keys("the gradient window of one of several ranks", state, ("num_columns",))
    of_all = checked_integer("num_columns of the gradient window", state["num_columns"])
    if of_all != num_columns:
        raise ValueError(
            f"the stored gradient window is one of {of_all} weights, this one is of {num_columns}; resume with the "
            "settings and the model that the state was saved with"
        )
    columns = state["columns"]
    if not isinstance(columns, list | tuple | np.ndarray) or len(columns) != 2:
        refuse("columns of the gradient window", columns, "the first and one past the last column")
    start = checked_integer("first column of the gradient window", columns[0], at_most=num_columns)
    return start, checked_integer("last column of the gradient window", columns[1], start, num_columns)


def _told(ranks: Ranks, intervals: Sequence[Interval]) -> list[list[Interval]]:
    """Return the intervals of each rank. Collective."""
    numbers = gathered(ranks, [len(intervals)])[:, 0].tolist()
    padded = [bound for interval in intervals for bound in interval] + [0, 0] * (max(numbers) - len(intervals))
    bounds = gathered(ranks, padded).reshape(ranks.size, -1, 2).tolist() if padded else [[]] * ranks.size
    return [
        [(start, stop) for start, stop in of_rank[:number]] for of_rank, number in zip(bounds, numbers, strict=True)
    ]
