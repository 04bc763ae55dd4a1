"""Plain arrays of gradient samples seen block by block, as a gradient window is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, array_namespace, check_float, device_of
from mfac_core.fisher.partition import BlockGroup, partition

__all__ = ["GradientMatrix"]


class GradientMatrix:
    """Gradient samples in the caller's own arrays; nothing is copied but the block at hand.

    Args:
        parts: Arrays of shape ``(m, columns)`` that stand side by side, float32 or float64, all on one device.
        kept: Which of all columns take part, in host memory; ``None`` means all.
        block_size: Weights per Fisher block; ``None`` means one block.

    Raises:
        ValueError: If an array is neither float32 nor float64.
    """

    def __init__(
        self, parts: Sequence[Array], kept: npt.NDArray[np.bool_] | None = None, *, block_size: int | None
    ) -> None:
        for part in parts:
            check_float("gradients", part)
        self._parts = list(parts)
        self._device = device_of(parts[0])
        self._starts = np.concatenate([[0], np.cumsum([part.shape[1] for part in parts])])
        self._kept = None if kept is None or bool(kept.all()) else np.flatnonzero(kept)
        self.dtype = np.dtype(parts[0].dtype)
        self.count = int(parts[0].shape[0])
        self.num_weights = int(self._starts[-1]) if self._kept is None else len(self._kept)
        # nothing is stored here, so that a slab may be as large as the arrays
        self.slabs = partition(
            self.num_weights,
            block_size,
            num_gradients=self.count,
            itemsize=self.dtype.itemsize,
            slab_bytes=max(1, self.num_weights * self.count * self.dtype.itemsize),
        )

    def chunks(self, group: BlockGroup) -> list[Array]:
        """Return the rows of one group.

        Args:
            group: Consecutive blocks of one of the :attr:`slabs`.

        Returns:
            For each chunk an array of shape ``(count, m, width)``; a view where the columns lie side by side.
        """
        with self._device.backend.on(self._device.name):
            chunks = []
            for start, stop in group.chunk_bounds:
                columns = self._columns(start, stop)
                xp = array_namespace(columns)
                split = xp.reshape(columns, (self.count, group.count, -1))
                chunks.append(xp.permute_dims(split, (1, 0, 2)))
            return chunks

    def _columns(self, start: int, stop: int) -> Array:
        if self._kept is None:
            first, last = start, stop
        else:
            wanted = self._kept[start:stop]
            first, last = int(wanted[0]), int(wanted[-1]) + 1
        pieces = []
        for part, offset, end in zip(self._parts, self._starts[:-1], self._starts[1:], strict=True):
            low, high = max(first, int(offset)), min(last, int(end))
            if low >= high:
                continue
            piece = part[:, low - offset : high - offset]
            if self._kept is not None:
                inside = wanted[(wanted >= low) & (wanted < high)] - low
                piece = array_namespace(piece).take(piece, self._device.asarray(inside), axis=1)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else array_namespace(pieces[0]).concat(pieces, axis=1)
