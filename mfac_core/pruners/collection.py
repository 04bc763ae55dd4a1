"""Gradient samples of training: gathered, checked for NaN, and stored in a window by the ranks that own the columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, check_float, device_of
from mfac_core.fisher.row_formats import RowFormat
from mfac_core.fisher.window import GradientWindow
from mfac_core.masks.layout import WeightLayout
from mfac_core.pruners.fence import strided
from mfac_core.pruners.row_moves import LoadedRows, kept_ranges, move_rows
from mfac_core.ranks.agreement import together
from mfac_core.ranks.base import Ranks
from mfac_core.ranks.distribution import Distribution
from mfac_core.ranks.routes import Consecutive
from mfac_core.state_checks import check_keys

__all__ = ["GradientCollector"]


@dataclass(eq=False)
class GradientCollector:
    """Collects the gradient samples of the unpruned weights; see :meth:`following` for another mask.

    A sample on a GPU is copied asynchronously, and stored when the next one arrives or the window is read.

    Args:
        layout: Names and shapes of the weights in scope, as this rank has them.
        distribution: Where the unpruned weights are, and which rank stores which of them.
        num_gradients: Maximum number of rows in the window.
        block_size: As in :class:`GradientWindow`.
        device: Where the window is kept.
        row_format: How the window stores the samples.
        consumers: As in :class:`GradientWindow`.
        home: The device of gradients, on which ranks exchange samples.
        warn_once: Logs a message unless one about the same subject has been logged: ``warn_once(subject, message)``.
        window: The samples stored so far, in the columns of this rank; ``None`` before the first sample, which
            allocates it.
        refused_rows: Samples that were left out because they contained NaN or Inf.
    """

    layout: WeightLayout
    distribution: Distribution
    num_gradients: int
    block_size: int | None
    device: Device
    row_format: RowFormat
    consumers: Sequence[Device]
    home: Device
    warn_once: Callable[[str, str], None]
    window: GradientWindow | None = None
    refused_rows: int = 0
    # a few entries of the latest sample of replicas, to be compared between them
    entries: list[Array] | None = field(default=None, init=False)
    # rows of saved states, which are dealt to their owners when all ranks are there
    loaded: LoadedRows | None = field(default=None, init=False)
    # waits for the copy of the last sample and returns it, or None if it is not finite
    _arriving: Callable[[], list[Array] | None] | None = field(default=None, init=False)
    # which entries of gradients on a device are stored
    _unpruned: tuple[Device, dict[str, Array]] | None = field(default=None, init=False)

    @property
    def count(self) -> int:
        """Samples stored now, the last one included."""
        self.store_arriving()
        if self.loaded is not None:
            return self.loaded.count
        return 0 if self.window is None else self.window.count

    def observe(self, gradients: Mapping[str, Array]) -> bool:
        """Store one sample; return False if it is refused. One that is still being copied is checked later.

        Collective if the ranks have shards.
        """
        device, vectors = self._gathered(gradients)
        with device.backend.on(device.name):
            own, flags = self.distribution.row_to_owners(vectors, _flag(vectors))
            if self._ranks.size > 1 and self.distribution.is_whole:
                self.entries = strided(vectors)
            if device.is_host:
                return self._store(None if flags.any() else own)
            if device.backend is self.device.backend:
                fetched = device.backend.fetch(flags)
                self._arriving = lambda: None if fetched().any() else own
            else:  # in one copy
                both = device.backend.fetch(_joined([*own, flags]))
                num_flags = flags.shape[0]
                self._arriving = lambda: _unless_flagged(both(), num_flags)
        return True

    def observe_samples(self, gradients: Mapping[str, Array] | None) -> int:
        """Store a sample of each rank that gives one, in the order of ranks; return their number. Collective.

        Ranks with shards all give theirs of the same sample.
        """
        if self._ranks.size == 1 or not self.distribution.is_whole:
            if gradients is None:
                return 0
            self.observe(gradients)
            return 1
        with together(self._ranks, "taking a gradient sample"):
            if gradients is None:
                device, parts = self.home, [self.home.zeros((0,), np.float32)] * self._ranks.size
            else:
                device, vectors = self._gathered(gradients)
                with device.backend.on(device.name):
                    held, flag = Consecutive(vectors), _flag(vectors)
                    parts = [_joined([*held.cut(*columns), flag]) for columns in self.distribution.ranges]
        received = [part for part in self._ranks.exchange(parts) if part.shape[0]]
        with device.backend.on(device.name):
            for part in received:
                self._store(None if bool(part[-1]) else [self._moved(part[:-1], device)])
        return len(received)

    def store_arriving(self) -> None:
        """Wait for the sample that is being copied, if any, and store it."""
        if self._arriving is not None:
            self._store(self._arriving())
            self._arriving = None

    def forget(self) -> None:
        """Empty the window."""
        self._arriving = self.loaded = None
        if self.window is not None:
            self.window.clear()

    def following(
        self, distribution: Distribution, num_gradients: int, *, keeps_rows: bool = False
    ) -> GradientCollector:
        """Return a new collector for the mask after a pruning step, with or without the stored rows.

        Collective if rows are kept, which then move to the new owners of their columns.
        """
        after = replace(self, distribution=distribution, num_gradients=num_gradients, window=None)
        window = self.window if keeps_rows else None
        if window is not None:
            stay = distribution.mask[self.distribution.mask]
            if num_gradients != window.num_gradients or not stay.all():
                window = self._followed(window, stay, after)
        after.window = window
        return after

    def load_window(self, states: Sequence[Mapping[str, Any]], num_gradients: int) -> None:
        """Take the rows from states of windows of ``num_gradients`` rows; keep the most recent if that is more.

        Of several ranks, each takes what it has been given, and :meth:`settle` deals it out.
        """
        for state in states:
            check_keys("a gradient window", state, ())
        if self._ranks.size == 1 and len(states) == 1 and "columns" not in states[0]:
            window = self._new_window(num_gradients)
            window.load_state_dict(states[0])
            if num_gradients != self.num_gradients:
                window = window.rebuilt(np.ones(window.num_weights, bool), self.num_gradients)
            self.window = window
            return

        def in_host_memory(num_columns: int) -> GradientWindow:
            return GradientWindow(num_columns, num_gradients, block_size=None, dtype=self.row_format.name)

        self.loaded = LoadedRows.checked(states, self.distribution.num_columns, in_host_memory)
        if self._ranks.size == 1:
            self.settle()

    def settle(self) -> None:
        """Deal the rows that ranks have loaded to the owners of their columns, or drop all if some are missing.

        Collective, and nothing if no state has been loaded since the last time.
        """
        if self.loaded is None:
            return
        found = self.loaded.dealt(self._ranks, self.distribution.ranges, self.num_gradients)
        self.loaded = None
        if found.missing:
            self.warn_once(
                "incomplete",
                f"the states that are loaded hold the gradient window without {found.missing:,} of its "
                f"{self.distribution.num_columns:,} columns: its gradient samples are collected anew; to resume with "
                "them, load the states of all ranks that have saved",
            )
        if not found.count:
            return
        window = self._new_window(self.num_gradients)
        for rows in found.rows:
            for row in rows:
                window.push(row)
        self.window = window

    def state_dict(self) -> Any:
        """Return the state of the window; of several ranks, with the columns that this rank has of it."""
        self.store_arriving()
        if self.loaded is not None:
            return self.loaded.state_dict()
        if self.window is None:
            return None
        state = self.window.state_dict()
        if self._ranks.size == 1:
            return state
        return {**state, "columns": list(self.distribution.columns), "num_columns": self.distribution.num_columns}

    @property
    def _ranks(self) -> Ranks:
        return self.distribution.ranks

    def _gathered(self, gradients: Mapping[str, Array]) -> tuple[Device, list[Array]]:
        """Return the unpruned entries of gradients in consecutive float32 vectors, and their device."""
        if self.loaded is not None:
            raise RuntimeError(
                "the rows of a loaded state have not been dealt to the ranks yet; call check_ranks(step) on all ranks "
                "before observe()"
            )
        self.layout.check(gradients, "gradients")
        for name, array in gradients.items():
            check_float(f"gradients[{name!r}]", array)
        self.store_arriving()
        device = device_of(gradients[self.layout.names[0]])
        gradients = {name: device.asarray(device_of(each).move(each, device)) for name, each in gradients.items()}
        unpruned = self._unpruned_on(device)
        if device.is_host:
            with np.errstate(over="ignore"):  # what float32 cannot represent is refused as Inf
                each = self.layout.gather_each(gradients, unpruned)
                return device, [self.row_format.limited(values.astype(np.float32, copy=False)) for values in each]
        with device.backend.on(device.name):
            row = device.asarray(self.layout.gather(gradients, unpruned), np.float32)
            return device, [self.row_format.limited(row)]

    def _unpruned_on(self, device: Device) -> dict[str, Array]:
        if self._unpruned is None or self._unpruned[0] != device:
            self._unpruned = device, self.layout.unpruned(self.distribution.held_mask, device)
        return self._unpruned[1]

    def _moved(self, row: Array, device: Device) -> Array:
        return row if device.backend is self.device.backend else device.to_numpy(row)

    def _store(self, row: list[Array] | None) -> bool:
        # None if it is not finite: checked before anything is written, which in a full window is over the oldest sample
        if row is None:
            self.refused_rows += 1
            self.warn_once("refused", "a gradient sample contains NaN or Inf: it is refused and counted")
            return False
        window = self._new_window(self.num_gradients) if self.window is None else self.window
        window.push(*row)
        self.window = window  # only now, so that no window is kept without a row
        return True

    def _followed(
        self, window: GradientWindow, stay: npt.NDArray[np.bool_], after: GradientCollector
    ) -> GradientWindow:
        """Return the window of the collector after this one: the columns that stay, at their new owners."""
        if self._ranks.size == 1:
            return window.rebuilt(stay, after.num_gradients)
        with together(self._ranks, "making room for the gradient window of the new mask"):
            rebuilt = after._new_window(after.num_gradients)
        start, stop = self.distribution.columns
        kept = window.device.asarray(np.flatnonzero(stay[start:stop]))
        first = max(window.count - after.num_gradients, 0)

        def rows_from(begin: int, end: int) -> Array:
            rows = window.recent(first + begin, first + end)
            return array_namespace(rows).take(rows, kept, axis=1)

        held = [[each] for each in kept_ranges(self.distribution.ranges, stay)]
        for rows in move_rows(self._ranks, held, after.distribution.ranges, rows_from, window.count - first):
            rebuilt.take_over(rows)
        return rebuilt

    def _new_window(self, num_gradients: int) -> GradientWindow:
        start, stop = self.distribution.columns
        return GradientWindow(
            stop - start,
            num_gradients,
            block_size=self.block_size,
            device=self.device,
            consumers=self.consumers,
            dtype=self.row_format.name,
        )


def _joined(vectors: Sequence[Array]) -> Array:
    return vectors[0] if len(vectors) == 1 else array_namespace(vectors[0]).concat(vectors)


def _flag(vectors: Sequence[Array]) -> Array:
    """Return a vector of one number: 0 if all numbers of a sample are finite, else 1."""
    if isinstance(vectors[0], np.ndarray):
        with np.errstate(all="ignore"):
            return np.array([not all(map(_is_finite, vectors))], vectors[0].dtype)
    xp = array_namespace(vectors[0])
    return xp.reshape(xp.astype(~xp.all(xp.isfinite(_joined(vectors))), vectors[0].dtype), (1,))


def _unless_flagged(values: npt.NDArray[Any], num_flags: int) -> list[Array] | None:
    return None if values[-num_flags:].any() else [values[:-num_flags]]


def _is_finite(values: npt.NDArray[Any]) -> bool:
    # one fast pass: NaN and Inf propagate into a sum of squares; overflow of the sum proves nothing
    return bool(np.isfinite(np.dot(values, values))) or bool(np.isfinite(values).all())
