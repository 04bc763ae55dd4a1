"""Gradient samples of training: gathered, checked for NaN, and stored in a window."""

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

__all__ = ["GradientCollector"]


@dataclass(eq=False)
class GradientCollector:
    """Collects the gradient samples of the weights that a mask keeps; see :meth:`following` for another mask.

    A sample on a GPU is copied asynchronously, and stored when the next one arrives or the window is read.

    Args:
        layout: Names and shapes of the weights in scope.
        mask: Which of them are unpruned, shape ``(n,)``; never written to.
        num_gradients: Maximum number of rows in the window.
        block_size: As in :class:`GradientWindow`.
        device: Where the window is kept.
        row_format: How the window stores the samples.
        consumers: As in :class:`GradientWindow`.
        warn_once: Logs a message unless one about the same subject has been logged: ``warn_once(subject, message)``.
        window: The samples stored so far; ``None`` before the first sample, which allocates it.
        refused_rows: Samples that were left out because they contained NaN or Inf.
    """

    layout: WeightLayout
    mask: npt.NDArray[np.bool_]
    num_gradients: int
    block_size: int | None
    device: Device
    row_format: RowFormat
    consumers: Sequence[Device]
    warn_once: Callable[[str, str], None]
    window: GradientWindow | None = None
    refused_rows: int = 0
    # waits for the copy of the last sample and returns it, or None if it is not finite
    _arriving: Callable[[], Array | None] | None = field(default=None, init=False)
    # which entries of gradients on a device are stored
    _entries: tuple[Device, dict[str, Array]] | None = field(default=None, init=False)

    @property
    def count(self) -> int:
        """Samples stored now, the last one included."""
        self.store_arriving()
        return 0 if self.window is None else self.window.count

    def observe(self, gradients: Mapping[str, Array]) -> bool:
        """Store one sample; return False if it is refused. One that is still being copied is checked later."""
        self.layout.check(gradients, "gradients")
        for name, array in gradients.items():
            check_float(f"gradients[{name!r}]", array)
        self.store_arriving()
        device = device_of(gradients[self.layout.names[0]])
        gradients = {name: device.asarray(device_of(each).move(each, device)) for name, each in gradients.items()}
        entries = self._entries_on(device)
        if device.is_host:
            with np.errstate(over="ignore"):  # what float32 cannot represent is refused as Inf
                each = self.layout.gather_each(gradients, entries)
                return self._store([self.row_format.limited(values.astype(np.float32, copy=False)) for values in each])
        with device.backend.on(device.name):
            row = self.row_format.limited(device.asarray(self.layout.gather(gradients, entries), np.float32))
            if device.backend is self.device.backend:
                xp = array_namespace(row)
                finite = device.backend.fetch(xp.all(xp.isfinite(row)))
                self._arriving = lambda: row if bool(finite()) else None
            else:
                self._arriving = device.backend.fetch(row)
        return True

    def store_arriving(self) -> None:
        """Wait for the sample that is being copied, if any, and store it."""
        if self._arriving is not None:
            row = self._arriving()
            self._store(None if row is None else [row])
            self._arriving = None

    def forget(self) -> None:
        """Empty the window."""
        self._arriving = None
        if self.window is not None:
            self.window.clear()

    def following(
        self, mask: npt.NDArray[np.bool_], num_gradients: int, *, keeps_rows: bool = False
    ) -> GradientCollector:
        """Return a new collector for the mask after a pruning step, with or without the stored rows."""
        window = self.window if keeps_rows else None
        if window is not None:
            stay = mask[self.mask]
            if num_gradients != window.num_gradients or not stay.all():
                window = window.rebuilt(stay, num_gradients)
        return replace(self, mask=mask, num_gradients=num_gradients, window=window)

    def load_window(self, state: Mapping[str, Any], num_gradients: int) -> None:
        """Take the rows from the state of a window of ``num_gradients`` rows; keep the most recent if that is more."""
        window = self._new_window(num_gradients)
        window.load_state_dict(state)
        if num_gradients != self.num_gradients:
            window = window.rebuilt(np.ones(window.num_weights, bool), self.num_gradients)
        self.window = window

    def _entries_on(self, device: Device) -> dict[str, Array]:
        if self._entries is None or self._entries[0] != device:
            self._entries = device, self.layout.unpruned(self.mask, device)
        return self._entries[1]

    def _store(self, row: list[Array] | None) -> bool:
        # checked before anything is written: in a full window it overwrites the oldest sample
        if row is None or not all(_is_finite(values) for values in row if isinstance(values, np.ndarray)):
            self.refused_rows += 1
            self.warn_once("refused", "a gradient sample contains NaN or Inf: it is refused and counted")
            return False
        window = self._new_window(self.num_gradients) if self.window is None else self.window
        window.push(*row)
        self.window = window  # only now, so that no window is kept without a row
        return True

    def _new_window(self, num_gradients: int) -> GradientWindow:
        return GradientWindow(
            int(np.count_nonzero(self.mask)),
            num_gradients,
            block_size=self.block_size,
            device=self.device,
            consumers=self.consumers,
            dtype=self.row_format.name,
        )


def _is_finite(values: npt.NDArray[Any]) -> bool:
    with np.errstate(all="ignore"):
        # one fast pass: NaN and Inf propagate into a sum of squares; overflow of the sum proves nothing
        return bool(np.isfinite(np.dot(values, values))) or bool(np.isfinite(values).all())
