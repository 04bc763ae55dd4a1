"""All blocks over the listed devices: each worker takes group after group, streamed through its device."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, resolve_devices
from mfac_core.errors import IllConditionedError
from mfac_core.fisher.damping import damping_text, dampings, mean_diagonals
from mfac_core.fisher.factors import Factor, Precise, cache_parts, evaluate, factor
from mfac_core.fisher.partition import BlockGroup, DeviceShare, assign
from mfac_core.settings.checks import Damping

__all__ = ["BlockwiseFisher", "GradientSource"]

KEPT_FRACTION = 0.25
"""Share of a device's free memory that factors kept from the first pass to the second may take; and no more than
half of what the gradients take."""

_LEAST_COLUMNS = 32

_logger = logging.getLogger("mfac_core")


class GradientSource(Protocol):
    """Gradient samples that can be read block by block: a window, or plain arrays.

    Attributes:
        slabs: How the columns are stored.
        num_weights: Columns ``d``.
        dtype: dtype of the rows.
    """

    slabs: tuple[BlockGroup, ...]
    num_weights: int
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        """Rows ``m``."""

    def chunks(self, group: BlockGroup) -> list[Array]:
        """Return the chunks of a group, each of shape ``(n, m, width)``."""


class BlockwiseFisher:
    """The damped Fisher of a gradient source, computed group by group on several devices.

    Vectors of ``d`` numbers live on one of them, the home. A pruning step makes two passes over the groups. The second
    would have to factor each group again, which costs as much as the first, so factors of the size of the number of
    gradients are kept in between, as far as :data:`KEPT_FRACTION` allows; the rest is made again.
    Factors of the size of a block are always made again: kept, they would be as large as all dense inverses.

    Args:
        source: The gradient samples.
        damping: Added to the diagonal of the empirical Fisher, positive; ``auto`` measures the gradients first.
        devices: Where the groups are computed; the first is the home.
        keep: Whether factors are kept for one more use, ``always`` (for repeated products) or ``never``.

    Attributes:
        unit: Power of two near the dampings that were measured, 1 for a number. In this unit float32 holds the diagonal
            and what follows from it, whatever the scale of the gradients is.
        damping_range: The smallest and the largest damping of a block.

    Raises:
        DeviceError: If a device does not exist.
        MemoryBudgetError: If one block fits on none of the devices.
        ValueError: If gradients are measured and a row of them holds NaN or Inf.
        IllConditionedError: If they are measured and too large for it.
    """

    def __init__(
        self,
        source: GradientSource,
        *,
        damping: Damping,
        devices: Sequence[str | Device] | str | Device,
        keep: Literal["once", "always", "never"] = "once",
    ) -> None:
        self.source = source
        self._devices = {device.name: device for device in resolve_devices(devices)}
        self.home = next(iter(self._devices.values()))
        total = source.num_weights * source.count * source.dtype.itemsize
        shares = {
            name: DeviceShare(
                device.backend.speed(name),
                device.backend.group_bytes(name, total),
                device.backend.free_bytes(name),
            )
            for name, device in self._devices.items()
        }
        dealt = assign(source.slabs, shares, num_gradients=source.count, itemsize=source.dtype.itemsize)
        self._dealt: dict[str, range] = {}
        self.groups: tuple[BlockGroup, ...] = ()
        for name, groups in dealt.items():
            if not groups:
                _logger.info("device %s has no room for a block, or there are too few: it computes nothing", name)
            self._dealt[name] = range(len(self.groups), len(self.groups) + len(groups))
            self.groups += groups
        # which blocks needed float64; known once the diagonal of their group has been computed
        self._precise: list[Precise | None] = [None] * len(self.groups)
        self._kept: dict[int, Factor] = {}
        self._keep_mode = keep
        most = float("inf") if keep == "always" else total / 2 / len(shares)
        self._room = {name: int(min(KEPT_FRACTION * (share.free_bytes or 0), most)) for name, share in shares.items()}
        self._lock = Lock()
        self._is_measured = damping == "auto"
        if damping == "auto":
            self._dampings, self.unit = self._measured()
        else:
            self._dampings, self.unit = [np.full(group.count, float(damping)) for group in self.groups], 1.0
        limits = [float(limit) for of_group in self._dampings for limit in (of_group.min(), of_group.max())]
        self.damping_range = (min(limits, default=self.unit), max(limits, default=self.unit))

    def diagonal(self) -> Array:
        """Return ``diag(F^-1)`` times :attr:`unit` on the home device, shape ``(d,)``.

        Raises:
            ValueError: If a row of the gradients holds NaN or Inf.
            IllConditionedError: If a group cannot be inverted, or the dtype of the gradients cannot hold the result.
        """
        out = self.home.zeros((self.source.num_weights,), self.source.dtype)

        def task(index: int, device: Device, chunks: list[Array]) -> None:
            _, diagonal = self._evaluate(index, device, chunks)
            self.put(out, index, device, diagonal)

        self.run(task)
        return out

    def apply(self, x: Array) -> Array:
        """Return ``F^-1 x`` on the home device.

        Args:
            x: Shape ``(d,)`` or ``(d, k)``, on the home device; float64 for an answer in float64.

        Returns:
            The shape and the dtype of ``x``.
        """
        xp = array_namespace(x)
        out = xp.zeros_like(x)
        columns, results = (each if each.ndim == 2 else each[:, None] for each in (x, out))
        # no more columns at once than there are rows, so that they take no more memory than the gradients of a group
        at_once = max(self.source.count, _LEAST_COLUMNS)

        def task(index: int, device: Device, chunks: list[Array]) -> None:
            made = self.factor(index, device, chunks)
            damping = self.damping(index, device)[:, None, None]
            for first in range(0, columns.shape[1], at_once):
                some = slice(first, min(first + at_once, columns.shape[1]))
                right = self.take(columns[:, some], index, device)
                parts = [
                    made.part(blocks).apply([chunk[blocks, :, :] for chunk in chunks], right[blocks, :, :])
                    for blocks in cache_parts(chunks)
                ]
                product = array_namespace(right).concat(parts, axis=0)
                self.put(results[:, some], index, device, product / xp.asarray(damping, dtype=product.dtype))

        self.run(task)
        return out

    def damping(self, index: int, device: Device) -> Array:
        """Return the damping of each block of a group.

        Args:
            index: Which group.
            device: Where it is wanted.

        Returns:
            Shape ``(n,)``, float64.
        """
        if self._is_measured:
            return device.asarray(self._dampings[index], np.float64)
        return device.zeros((self.groups[index].count,), np.float64) + float(self._dampings[index][0])

    def scale(self, index: int, device: Device) -> Array:
        """Return :attr:`unit` over the damping of each block of a group.

        Args:
            index: Which group.
            device: Where it is wanted.

        Returns:
            Shape ``(n,)``, float64.
        """
        return self.unit / self.damping(index, device)

    def take(self, x: Array, index: int, device: Device) -> Array:
        """Return a group's part of a vector, or of several.

        Args:
            x: Shape ``(d,)`` or ``(d, k)``, on the home device.
            index: Which group.
            device: Where the part is wanted.

        Returns:
            Shape ``(n, B)`` or ``(n, B, k)``, on ``device``.
        """
        group = self.groups[index]
        part = self.home.move(x[group.start : group.stop, ...], device)
        return array_namespace(part).reshape(part, (group.count, group.width, *x.shape[1:]))

    def put(self, out: Array, index: int, device: Device, part: Array) -> None:
        """Write a group's part of a vector, or of several.

        Args:
            out: Shape ``(d,)`` or ``(d, k)``, on the home device.
            index: Which group.
            device: Where the part is.
            part: Shape ``(n, B)`` or ``(n, B, k)``.
        """
        group = self.groups[index]
        part = device.move(part, self.home)
        with self.home.backend.on(self.home.name):
            out[group.start : group.stop, ...] = array_namespace(part).reshape(part, (-1, *out.shape[1:]))

    def factor(self, index: int, device: Device, chunks: list[Array]) -> Factor:
        """Return the factor of a group: the one that was kept, or made again.

        Args:
            index: Which group.
            device: Where it is computed.
            chunks: Its gradients.

        Returns:
            The factor.

        Raises:
            ValueError: If a row of the gradients holds NaN or Inf.
            IllConditionedError: If the group cannot be inverted.
        """
        kept = self._kept.get(index) if self._keep_mode == "always" else self._drop(index, device)
        if kept is not None:
            return kept
        precise = self._precise[index]
        if precise is None:
            return self._evaluate(index, device, chunks)[0]
        made = factor(chunks, self.damping(index, device), precise)
        if self._keep_mode == "always":
            self._keep(index, device, made)
        return made

    def refuse_unheld(self, diagonal: Array) -> None:
        """Refuse an inverse diagonal that its dtype cannot hold.

        Args:
            diagonal: Part of it, or all.

        Raises:
            IllConditionedError: If an entry is not positive and finite.
        """
        xp = array_namespace(diagonal)
        if not bool(xp.all(xp.isfinite(diagonal) & (diagonal > 0))):
            cure = "scale the gradients" if self._is_measured else "choose a damping closer to 1"
            raise IllConditionedError(
                f"damping {damping_text(*self.damping_range)} gives an inverse Fisher that {self.source.dtype} cannot "
                f"hold; {cure}, or float64 gradients"
            )

    def run(self, task: Callable[[int, Device, list[Array]], None], groups: Iterable[int] | None = None) -> None:
        """Run ``task(index, device, chunks)`` for groups, each on the device that it was dealt to.

        Args:
            task: What to do; called from several threads.
            groups: Which groups; ``None`` means all.
        """
        wanted = None if groups is None else set(groups)
        self.home.backend.synchronize(self.home.name)
        with ExitStack() as stack:
            jobs = []
            for name, indices in self._dealt.items():
                device = self._devices[name]
                queue = deque(index for index in indices if wanted is None or index in wanted)
                workers = stack.enter_context(device.backend.workers(name, len(queue)))
                jobs += [(device, queue)] * min(workers, len(queue))
            if len(jobs) < 2:
                for device, queue in jobs:
                    self._work(task, device, queue)
                return
            with ThreadPoolExecutor(len(jobs)) as pool:
                for future in [pool.submit(self._work, task, device, queue) for device, queue in jobs]:
                    future.result()

    def _work(self, task: Callable[[int, Device, list[Array]], None], device: Device, queue: deque[int]) -> None:
        taken: deque[int] = deque()

        def loads() -> Iterator[Callable[[], list[Array]]]:
            while queue:
                try:
                    index = queue.popleft()
                except IndexError:  # another worker took the last one
                    return
                taken.append(index)
                yield partial(self.source.chunks, self.groups[index])

        with device.backend.on(device.name):
            try:
                with closing(device.backend.stream(device.name, loads())) as items:
                    for chunks in items:
                        task(taken.popleft(), device, chunks)
            except BaseException:
                queue.clear()  # the others stop after the group at hand
                raise
            device.backend.synchronize(device.name)

    def _measured(self) -> tuple[list[npt.NDArray[np.float64]], float]:
        """Return the dampings of the blocks of each group, and their unit.

        Raises:
            ValueError: If a row of the gradients holds NaN or Inf.
            IllConditionedError: If the gradients are too large to be measured.
        """
        means: list[Array] = [None] * len(self.groups)

        def task(index: int, device: Device, chunks: list[Array]) -> None:
            means[index] = device.to_numpy(mean_diagonals(chunks))

        self.run(task)
        if not all(np.isfinite(mean).all() for mean in means):
            self._refuse_bad_rows()
            raise IllConditionedError(
                "damping auto cannot be measured: the squares of the gradients are too large for float64; scale the "
                "gradients down"
            )
        return dampings(means, [group.width for group in self.groups])

    def _evaluate(self, index: int, device: Device, chunks: list[Array]) -> tuple[Factor, Array]:
        try:
            made, share = evaluate(chunks, self.damping(index, device))
        except IllConditionedError:
            self._refuse_bad_rows()
            raise
        xp = array_namespace(share)
        with np.errstate(over="ignore"):  # refused below
            scale = xp.asarray(self.scale(index, device), dtype=share.dtype)
            diagonal = xp.asarray(share * scale[:, None], dtype=chunks[0].dtype)
        self.refuse_unheld(diagonal)
        self._precise[index] = made.precise
        self._keep(index, device, made)
        return made, diagonal

    def _keep(self, index: int, device: Device, made: Factor) -> None:
        if self._keep_mode == "never" or (self._keep_mode == "once" and self.groups[index].width <= self.source.count):
            return
        with self._lock:
            if index not in self._kept and made.num_bytes <= self._room[device.name]:
                self._room[device.name] -= made.num_bytes
                self._kept[index] = made

    def _drop(self, index: int, device: Device) -> Factor | None:
        with self._lock:
            kept = self._kept.pop(index, None)
            if kept is not None:
                self._room[device.name] += kept.num_bytes
            return kept

    def _refuse_bad_rows(self) -> None:
        bad: set[int] = set()
        for group in self.groups:
            for chunk in self.source.chunks(group):
                xp = array_namespace(chunk)
                finite = xp.all(xp.all(xp.isfinite(chunk), axis=-1), axis=0)
                bad |= {row for row in range(finite.shape[0]) if not bool(finite[row])}
        if bad:
            raise ValueError(
                f"gradients hold NaN or Inf in {len(bad)} of their rows: {', '.join(map(str, sorted(bad)[:10]))}"
                f"{', ...' if len(bad) > 10 else ''}; leave these samples out"
            )
