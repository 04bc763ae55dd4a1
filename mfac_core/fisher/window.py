"""The ``m`` most recent gradient samples over the unpruned weights, stored block by block.

Each chunk of a stored group is one contiguous array of shape ``(count, m, width)``, so that a pruning step reads every
block as one piece, and many small blocks in one call.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, check_float, resolve_device
from mfac_core.fisher.partition import BlockGroup, partition
from mfac_core.fisher.row_formats import BFLOAT16, RowFormat, widened
from mfac_core.state_checks import check_keys, checked_array, checked_integer

__all__ = ["GradientWindow"]


class GradientWindow:
    """A ring buffer of gradient samples.

    Args:
        num_weights: Number of unpruned weights ``d``.
        num_gradients: Maximum number of rows ``m``; a further row replaces the oldest.
        block_size: Weights per Fisher block; ``None`` means one block.
        device: Where the rows are stored, a name or a device.
        consumers: GPUs that read the rows; rows in host memory are then page-locked for fast copies.
        dtype: dtype of the rows, or ``bfloat16``: they are then stored in 16 bits, and read as float32.

    Example:
        >>> window = GradientWindow(3, 2, block_size=None)
        >>> for value in (1.0, 2.0, 3.0):
        ...     window.push(np.full(3, value, np.float32))
        >>> window.count, window.to_rows()[:, 0].tolist()
        (2, [3.0, 2.0])
    """

    def __init__(
        self,
        num_weights: int,
        num_gradients: int,
        *,
        block_size: int | None,
        device: str | Device = "cpu",
        consumers: Sequence[Device] = (),
        dtype: Any = np.float32,
    ) -> None:
        self.num_weights = num_weights
        self.num_gradients = num_gradients
        self.block_size = block_size
        self.device = resolve_device(device)
        self.row_format = RowFormat.named(dtype)
        self.dtype = self.row_format.dtype
        # each of these changes in a single assignment, so that an interruption leaves whole rows only
        self._pushed = 0  # rows since the window was empty
        self._rebuilt_with = 0  # rows taken over from another window
        self._overwritten: int | None = None  # the value of `_pushed` when a row was started over the oldest
        self._consumers = tuple(consumers)
        # stored groups suit the device with the largest groups, as others can work on subgroups
        self._group_bytes = max(each.backend.group_bytes(each.name, sys.maxsize) for each in (self.device, *consumers))
        self.stored_groups = self._partition(num_weights, num_gradients)
        self._storage = [self._allocate(group, num_gradients) for group in self.stored_groups]

    @property
    def count(self) -> int:
        """Stored rows. A row whose writing was interrupted does not count, nor does the oldest row under it."""
        return min(self._pushed, self.num_gradients) - (self._torn is not None)

    @property
    def is_full(self) -> bool:
        """Whether the window holds all the rows that it has room for."""
        return self.count == self.num_gradients

    @property
    def num_fresh(self) -> int:
        """Rows of the window that were pushed since it was rebuilt from another."""
        return min(self._pushed - self._rebuilt_with, self.num_gradients)

    @property
    def num_bytes(self) -> int:
        """Memory of the rows in bytes."""
        return self.num_weights * self.num_gradients * self.row_format.itemsize

    def push(self, *vectors: Array) -> None:
        """Store one gradient sample; a full window drops its oldest.

        Args:
            vectors: The sample as one vector of shape ``(d,)``, or as consecutive vectors, which need not be
                concatenated; float32 or float64, on the window's device or in host memory. Copied.

        Raises:
            ValueError: If there are not ``d`` numbers in total, or a vector has another dtype.
        """
        for vector in vectors:
            check_float("gradients", vector)
        shapes = [tuple(vector.shape) for vector in vectors]
        if any(len(shape) != 1 for shape in shapes) or sum(shape[0] for shape in shapes) != self.num_weights:
            got = " and ".join(map(str, shapes))
            raise ValueError(f"a gradient sample of this window has shape ({self.num_weights},), got {got}")
        with self.device.backend.on(self.device.name):
            here = [self.device.asarray(vector, self.dtype) for vector in vectors]
            self._overwritten = self._pushed if self._pushed >= self.num_gradients else None
            first = 0
            for vector in here:
                self._write(first, vector)
                first += vector.shape[0]
        self._pushed += 1

    def take_over(self, rows: Array) -> None:
        """Store rows of another window, shape ``(rows, d)``: they do not count as fresh."""
        for index in range(rows.shape[0]):
            self.push(rows[index, :])
        self._rebuilt_with = self._pushed

    def chunks(self, group: BlockGroup) -> list[Array]:
        """Return the stored rows of a group of consecutive blocks of one of the :attr:`stored_groups`.

        Each chunk has shape ``(count, rows, width)``: a view, in ring order; a copy after an interrupted :meth:`push`.
        It is as stored: :func:`mfac_core.fisher.row_formats.widened` returns its numbers.
        """
        index = bisect_right(self.stored_groups, group.start, key=lambda stored: stored.start) - 1
        first = (group.start - self.stored_groups[index].start) // group.width
        return [self._rows(chunk[first : first + group.count, :, :]) for chunk in self._storage[index]]

    def clear(self) -> None:
        """Drop all rows."""
        self._pushed = self._rebuilt_with = 0

    def rebuilt(self, mask: npt.NDArray[np.bool_], num_gradients: int) -> GradientWindow:
        """Return a window on the same device with fewer columns and room for another number of rows.

        Args:
            mask: Which columns the new window has, shape ``(d,)``, in host memory.
            num_gradients: Rows that it has room for; it starts with the most recent rows of this window.

        Example:
            >>> window = GradientWindow(3, 2, block_size=None)
            >>> window.push(np.arange(3.0))
            >>> window.rebuilt(np.array([True, False, True]), 4).to_rows()
            array([[0., 2.]], dtype=float32)
        """
        rows = self._chronological()[-num_gradients:]
        window = GradientWindow(
            int(np.count_nonzero(mask)),
            num_gradients,
            block_size=self.block_size,
            device=self.device,
            consumers=self._consumers,
            dtype=self.row_format.name,
        )
        with self.device.backend.on(self.device.name):
            # chunk by chunk, so that only a few chunks are held in addition to the two windows
            pieces = self._columns(mask, rows)
            rest: Array | None = None
            for group, chunks in zip(window.stored_groups, window._storage, strict=True):
                for (start, stop), chunk in zip(group.chunk_bounds, chunks, strict=True):
                    columns, rest = _take_columns(pieces, rest, stop - start)
                    xp = array_namespace(columns)
                    chunk[:, : len(rows), :] = xp.permute_dims(
                        xp.reshape(columns, (len(rows), group.count, chunk.shape[2])), (1, 0, 2)
                    )
        window._pushed = window._rebuilt_with = len(rows)
        return window

    def recent(self, first: int, last: int) -> Array:
        """Return some of the rows on the device of the window, counted from the oldest, shape ``(last - first, d)``."""
        with self.device.backend.on(self.device.name):
            rows = self.device.asarray(self._chronological()[first:last])
            pieces = [self.device.zeros((last - first, 0), self.dtype)]
            for chunks in self._storage:
                for chunk in chunks:
                    xp = array_namespace(chunk)
                    # (blocks, rows, width) -> (rows, columns)
                    taken = xp.permute_dims(widened(xp.take(chunk, rows, axis=1)), (1, 0, 2))
                    pieces.append(xp.reshape(taken, (last - first, chunk.shape[0] * chunk.shape[2])))
            return array_namespace(pieces[0]).concat(pieces, axis=1)

    def to_rows(self) -> npt.NDArray[Any]:
        """Return the stored rows in host memory, shape ``(count, d)``, in ring order."""
        return np.asarray(widened(self._stored_rows()))

    def _stored_rows(self) -> npt.NDArray[Any]:
        """Return the rows of :meth:`to_rows` as they are stored."""
        rows = np.empty((self.count, self.num_weights), self.row_format.stored_dtype)
        for group, chunks in zip(self.stored_groups, self._storage, strict=True):
            for (start, stop), chunk in zip(group.chunk_bounds, chunks, strict=True):
                stored = self.device.to_numpy(self._rows(chunk))
                rows[:, start:stop] = stored.transpose(1, 0, 2).reshape(self.count, stop - start)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, as they are stored, and the position in the ring."""
        rows = self._stored_rows()
        if self._torn is None:
            return {"rows": rows, "position": self._pushed % self.num_gradients}
        # oldest first, so that the next row follows the last one
        return {"rows": np.roll(rows, -self._torn, axis=0), "position": self.count}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Check that a state is that of a window like this one. Nothing is changed.

        Raises:
            ValueError: If rows or position are invalid or do not fit this window.
        """
        check_keys("a gradient window", state, ("rows", "position"))
        self._check_row_format(state["rows"])
        rows = checked_array("rows of the gradient window", state["rows"], self.row_format.stored_dtype, 2)
        if rows.shape[1] != self.num_weights or rows.shape[0] > self.num_gradients:
            raise ValueError(
                f"the stored gradient window has shape {rows.shape}, this one holds {self.num_gradients} gradient "
                f"samples of {self.num_weights} weights; resume with the settings and the model that the state was "
                "saved with"
            )
        # until the window is full, the next row follows the others
        full = len(rows) == self.num_gradients
        if not full and checked_integer("position in the gradient window", state["position"]) < len(rows):
            raise ValueError(
                f"the stored gradient window is full with {len(rows)} gradient samples, this one holds "
                f"{self.num_gradients}; resume with the num_gradients (num_grads in a recipe) that the state was saved "
                "with"
            )
        bounds = (0, len(rows) - 1) if full else (len(rows), len(rows))
        checked_integer("position in the gradient window", state["position"], *bounds)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore rows and position from a result of :meth:`state_dict`.

        Raises:
            ValueError: As in :meth:`check_state`; nothing is changed then.
        """
        self.check_state(state)
        rows = state["rows"]
        self.clear()
        # rows come in ring order: pushed one by one, each lands at its old index
        for row in rows:
            self.push(widened(row))
        if self.is_full:
            self._pushed = self.num_gradients + int(state["position"])

    def _check_row_format(self, rows: object) -> None:
        """Refuse the rows of a state in another of the formats that a window has."""
        known = [RowFormat.named(name) for name in ("float32", "float64", BFLOAT16)]
        names = [each.name for each in known if isinstance(rows, np.ndarray) and rows.dtype == each.stored_dtype]
        if names and names != [self.row_format.name]:
            raise ValueError(
                f"the stored gradient window is {names[0]}, this one is {self.row_format.name}; resume with the "
                "gradients_dtype (grads_dtype in a recipe) that the state was saved with"
            )

    @property
    def _torn(self) -> int | None:
        """The index of a row that is half overwritten, after an interrupted :meth:`push` into a full window."""
        return self._pushed % self.num_gradients if self._pushed == self._overwritten else None

    def _rows(self, chunk: Array) -> Array:
        """Return the rows stored so far of a chunk of shape ``(n, m, width)``."""
        torn = self._torn
        if torn is None:
            return chunk[:, : self.count, :]
        return array_namespace(chunk).concat([chunk[:, :torn, :], chunk[:, torn + 1 :, :]], axis=1)

    def _write(self, first: int, values: Array) -> None:
        """Write consecutive columns of the next row, from column ``first``."""
        position = self._pushed % self.num_gradients
        last = first + values.shape[0]
        # the first group that holds any of these columns
        begin = max(bisect_right(self.stored_groups, first, key=lambda stored: stored.start) - 1, 0)
        for group, chunks in zip(self.stored_groups[begin:], self._storage[begin:], strict=True):
            for (start, stop), chunk in zip(group.chunk_bounds, chunks, strict=True):
                if start >= last:
                    return
                if first < stop:
                    here = values[max(start, first) - first : min(stop, last) - first]
                    _write_blocks(chunk, position, max(first - start, 0), self.row_format.stored(here))

    def _partition(self, num_weights: int, num_gradients: int) -> tuple[BlockGroup, ...]:
        return partition(
            num_weights,
            self.block_size,
            num_gradients=num_gradients,
            itemsize=self.dtype.itemsize,
            group_bytes=self._group_bytes,
        )

    def _allocate(self, group: BlockGroup, num_gradients: int) -> list[Array]:
        shapes = [(group.count, num_gradients, width) for width in group.chunk_widths]
        # page-locked memory, if the backend has it: copies from it to a GPU do not wait
        if self.device.is_host and self._consumers:
            return [self._consumers[0].backend.host_zeros(shape, self.row_format.stored_dtype) for shape in shapes]
        return [self.device.zeros(shape, self.row_format.stored_dtype) for shape in shapes]

    def _chronological(self) -> npt.NDArray[np.intp]:
        """Return the indices of the stored rows, oldest first."""
        oldest = max(self._pushed - self.num_gradients, 0) + (self._torn is not None)
        return np.arange(oldest, self._pushed) % self.num_gradients

    def _columns(self, mask: npt.NDArray[np.bool_], rows: npt.NDArray[np.intp]) -> Iterator[Array]:
        """Yield the columns of each chunk in which the mask is true, shape ``(rows, columns)``."""
        for group, chunks in zip(self.stored_groups, self._storage, strict=True):
            for (start, stop), chunk in zip(group.chunk_bounds, chunks, strict=True):
                xp = array_namespace(chunk)
                # (blocks, rows, width) -> (rows, columns)
                wide = xp.reshape(xp.permute_dims(chunk, (1, 0, 2)), (chunk.shape[1], stop - start))
                columns = self.device.asarray(np.flatnonzero(mask[start:stop]))
                yield xp.take(xp.take(wide, columns, axis=1), self.device.asarray(rows), axis=0)


def _write_blocks(chunk: Array, position: int, first: int, values: Array) -> None:
    """Write consecutive columns of one row from column ``first``: the end of a block, whole blocks, a beginning."""
    width = chunk.shape[2]
    block, column = divmod(first, width)
    if column:
        left = min(width - column, values.shape[0])
        chunk[block, position, column : column + left] = values[:left]
        values = values[left:]
        block += 1
    whole, rest = divmod(values.shape[0], width)
    xp = array_namespace(values)
    # all whole blocks in one assignment
    if whole:
        chunk[block : block + whole, position, :] = xp.reshape(values[: whole * width], (whole, width))
    if rest:
        chunk[block + whole, position, :rest] = values[whole * width :]


def _take_columns(pieces: Iterator[Array], rest: Array | None, count: int) -> tuple[Array, Array]:
    """Return the next ``count`` columns of ``rest`` and then of the pieces, and the rest of the last piece."""
    taken = [] if rest is None else [rest]
    have = sum(piece.shape[1] for piece in taken)
    while have < count:
        taken.append(next(pieces))
        have += taken[-1].shape[1]
    xp = array_namespace(taken[0])
    columns = taken[0] if len(taken) == 1 else xp.concat(taken, axis=1)
    return columns[:, :count], columns[:, count:]
