"""Block-by-block access to gradient samples in plain arrays, with the interface of a gradient window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace, check_float, device_of, numpy_dtype
from mfac_core.fisher.partition import BlockGroup, partition

__all__ = ["GradientMatrix"]


class GradientMatrix:
    """Gradient samples in the caller's own arrays; only the current block is copied.

    Args:
        arrays: Arrays of shape ``(m, columns)`` side by side, float32 or float64, all on one device.
        mask: Which of all columns take part, in host memory; ``None`` means all.
        block_size: Weights per Fisher block; ``None`` means one block.

    Raises:
        ValueError: If an array is neither float32 nor float64.
    """

    def __init__(
        self, arrays: Sequence[Array], mask: npt.NDArray[np.bool_] | None = None, *, block_size: int | None
    ) -> None:
        for array in arrays:
            check_float("gradients", array)
        self._device = device_of(arrays[0])
        self._arrays = list(arrays)
        self._starts = np.concatenate([[0], np.cumsum([array.shape[1] for array in arrays])])
        self._indices = None if mask is None or bool(mask.all()) else np.flatnonzero(mask)
        self.dtype = numpy_dtype(arrays[0])
        self.count = int(arrays[0].shape[0])
        self.num_weights = int(self._starts[-1]) if self._indices is None else len(self._indices)
        # nothing is allocated here, so a group may be as large as all arrays
        self.stored_groups = partition(
            self.num_weights,
            block_size,
            num_gradients=self.count,
            itemsize=self.dtype.itemsize,
            group_bytes=max(1, self.num_weights * self.count * self.dtype.itemsize),
        )

    def chunks(self, group: BlockGroup) -> list[Array]:
        """Return the rows of a group of consecutive blocks of one of the :attr:`stored_groups`.

        Each chunk has shape ``(count, m, width)``: a view if its columns are adjacent in one array.
        """
        with self._device.backend.on(self._device.name):
            chunks = []
            for start, stop in group.chunk_bounds:
                columns = self._columns(start, stop)
                xp = array_namespace(columns)
                # (m, columns) -> (blocks, m, width), as views if the library allows
                split = xp.reshape(columns, (self.count, group.count, -1))
                chunks.append(xp.permute_dims(split, (1, 0, 2)))
            return chunks

    def _columns(self, start: int, stop: int) -> Array:
        """Return the columns ``[start, stop)`` of the masked matrix, shape ``(m, stop - start)``."""
        if self._indices is None:
            first, last = start, stop
        else:
            wanted = self._indices[start:stop]
            # indices are in order: only arrays between the first and the last can hold any of these columns
            first, last = int(wanted[0]), int(wanted[-1]) + 1
        pieces = []
        for array, offset, end in zip(self._arrays, self._starts[:-1], self._starts[1:], strict=True):
            low, high = max(first, int(offset)), min(last, int(end))
            if low >= high:
                continue
            # a slice first, so that take() reads no column outside it
            piece = array[:, low - offset : high - offset]
            if self._indices is not None:
                inside = wanted[(wanted >= low) & (wanted < high)] - low
                piece = array_namespace(piece).take(piece, self._device.asarray(inside), axis=1)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else array_namespace(pieces[0]).concat(pieces, axis=1)
