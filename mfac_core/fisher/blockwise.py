"""All blocks on the chosen devices: each worker takes group after group, streamed through its device."""

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

from mfac_core.backends import Array, Device, array_namespace, numpy_dtype, readable_on, resolve_device, resolve_devices
from mfac_core.errors import IllConditionedError
from mfac_core.fisher.chunks import cache_slices
from mfac_core.fisher.damping import damping_text, dampings, mean_diagonals
from mfac_core.fisher.factors import Factor, evaluate, factor
from mfac_core.fisher.kernels import Float64Needed, wide_dtype
from mfac_core.fisher.partition import BlockGroup, DeviceShare, assign
from mfac_core.fisher.row_formats import widened
from mfac_core.ranks.base import Ranks
from mfac_core.settings.checks import Damping

__all__ = ["BlockwiseFisher", "GradientSource"]

RETAINED_FRACTION = 0.25
"""Share of a device's free memory that factors retained between the two passes may take. They never take more than half
of the memory of the gradients."""

_MIN_COLUMNS = 32

_logger = logging.getLogger("mfac_core")


class GradientSource(Protocol):
    """Gradient samples that can be read block by block: a window, or plain arrays.

    Attributes:
        stored_groups: The blocks, in the groups in which they are stored.
        num_weights: Columns ``d``.
        dtype: dtype of the rows when they are read.
    """

    stored_groups: tuple[BlockGroup, ...]
    num_weights: int
    dtype: np.dtype[Any]

    @property
    def count(self) -> int:
        """Rows ``m``."""

    def chunks(self, group: BlockGroup) -> list[Array]:
        """Return the chunks of a group, each of shape ``(n, m, width)``, as they are stored."""


class BlockwiseFisher:
    """The damped Fisher of a gradient source, computed group by group on several devices.

    Vectors of ``d`` numbers live on the first device, the home. A pruning step makes two passes over the groups. To
    factor each group again in the second pass would cost as much as the first, so factors of size ``m x m`` are
    retained for it, within :data:`RETAINED_FRACTION`; the others are computed again. Factors of the size of a block are
    always computed again: together they would be as large as all dense inverses.

    Args:
        source: The gradient samples.
        damping: Added to the diagonal of the empirical Fisher, positive; ``auto`` measures the gradients first.
        devices: Where the groups are computed; the first is the home.
        rtol: Largest relative error of the diagonal.
        retain: Whether factors are retained for one more use (``once``), for all uses (``always``) or ``never``.

    Attributes:
        unit: Power of two near the measured dampings; 1 if the damping is a number. In this unit float32 can represent
            the diagonal and what follows from it, for any scale of the gradients.

    Raises:
        DeviceError: If a device does not exist.
        MemoryBudgetError: If no device has memory for a single block.
        ValueError: If gradients are measured and one of their rows contains NaN or Inf.
        IllConditionedError: If gradients are measured and their squares overflow float64.
    """

    def __init__(
        self,
        source: GradientSource,
        *,
        damping: Damping,
        devices: Sequence[str | Device] | str | Device,
        rtol: float = 1e-5,
        retain: Literal["once", "always", "never"] = "once",
    ) -> None:
        self.source = source
        self.rtol = rtol
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
        assigned = assign(source.stored_groups, shares, num_gradients=source.count, itemsize=source.dtype.itemsize)
        self._assigned: dict[str, range] = {}
        self.groups: tuple[BlockGroup, ...] = ()
        for name, groups in assigned.items():
            if not groups and source.num_weights:
                _logger.info("device %s is idle: it has no memory for a block, or there are too few blocks", name)
            self._assigned[name] = range(len(self.groups), len(self.groups) + len(groups))
            self.groups += groups
        # whether each group needs float64; None until its diagonal has been computed
        self._in_float64: list[bool | None] = [None] * len(self.groups)
        self._retained: dict[int, Factor] = {}
        self._retention = retain
        # the devices share half of the memory of the gradients equally
        most = float("inf") if retain == "always" else total / 2 / len(shares)
        self._room = {
            name: int(min(RETAINED_FRACTION * (share.free_bytes or 0), most)) for name, share in shares.items()
        }
        self._lock = Lock()
        # a device without float64 leaves the groups that need it to the host
        self._host = resolve_device("cpu")
        self._on_host: set[int] = set()
        self._wide = {device: _widest_dtype(device) for device in (*self._devices.values(), self._host)}
        self._is_measured = damping == "auto"
        if damping == "auto":
            self._means = self._measured()
            self._dampings, self.unit = dampings(self._means, [group.width for group in self.groups])
        else:
            self._dampings, self.unit = [np.full(group.count, float(damping)) for group in self.groups], 1.0

    def join(self, ranks: Ranks) -> None:
        """Measure damping ``auto`` relative to the blocks of all ranks, each of which has some of them. Collective."""
        if self._is_measured:
            self._dampings, self.unit = dampings(self._means, [group.width for group in self.groups], ranks)

    @property
    def damping_range(self) -> tuple[float, float]:
        """The smallest and the largest damping of a block."""
        limits = [float(limit) for of_group in self._dampings for limit in (of_group.min(), of_group.max())]
        return min(limits, default=self.unit), max(limits, default=self.unit)

    @property
    def has_float64(self) -> bool:
        """Whether all of its devices have float64."""
        return all(dtype == np.float64 for dtype in self._wide.values())

    @property
    def float64_share(self) -> float:
        """Share of the groups whose diagonal was computed in float64."""
        return sum(map(bool, self._in_float64)) / max(len(self._in_float64), 1)

    def diagonal(self) -> Array:
        """Return ``diag(F^-1)`` times :attr:`unit` on the home device, shape ``(d,)``.

        Raises:
            ValueError: If a row of the gradients contains NaN or Inf.
            IllConditionedError: If a block cannot be inverted, or the dtype cannot represent the result.
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
        out = self.home.zeros(x.shape, numpy_dtype(x))
        columns, results = (each if each.ndim == 2 else each[:, None] for each in (x, out))
        # no more columns at once than there are rows, so that they take no more memory than the gradients of a group
        at_once = max(self.source.count, _MIN_COLUMNS)

        def task(index: int, device: Device, chunks: list[Array]) -> None:
            factored = self.factor(index, device, chunks)
            damping = self.damping(index, device)[:, None, None]
            for first in range(0, columns.shape[1], at_once):
                some = slice(first, min(first + at_once, columns.shape[1]))
                right = self.take(columns[:, some], index, device)
                products = [
                    factored.select_blocks(blocks).apply([chunk[blocks, :, :] for chunk in chunks], right[blocks, :, :])
                    for blocks in cache_slices(chunks)
                ]
                here = array_namespace(right)
                product = here.concat(products, axis=0)
                self.put(results[:, some], index, device, product / here.asarray(damping, dtype=product.dtype))

        self.run(task)
        return out

    def damping(self, index: int, device: Device) -> Array:
        """Return the damping of each block of a group, shape ``(n,)``, on ``device`` in its widest dtype."""
        dtype = self._wide[device]
        if self._is_measured:
            return device.asarray(self._dampings[index].astype(dtype, copy=False))
        # one number for all blocks needs no copy from the host
        return device.zeros((self.groups[index].count,), dtype) + float(self._dampings[index][0])

    def scale(self, index: int, device: Device) -> Array:
        """Return :attr:`unit` over the damping of each block of a group, shape ``(n,)``, on ``device``."""
        return self.unit / self.damping(index, device)

    def take(self, x: Array, index: int, device: Device) -> Array:
        """Return the entries of a group on ``device``, by block.

        Args:
            x: Shape ``(d,)`` or ``(d, k)``, on the home device.
            index: Which group.
            device: Where the entries are wanted.

        Returns:
            Shape ``(n, B)`` or ``(n, B, k)``.
        """
        group = self.groups[index]
        values = self.home.move(x[group.start : group.stop, ...], device)
        return array_namespace(values).reshape(values, (group.count, group.width, *x.shape[1:]))

    def put(self, out: Array, index: int, device: Device, values: Array) -> None:
        """Write the entries of a group: ``values`` of shape ``(n, B)`` or ``(n, B, k)`` on ``device`` into ``out``."""
        group = self.groups[index]
        values = device.move(values, self.home)
        with self.home.backend.on(self.home.name):
            out[group.start : group.stop, ...] = array_namespace(values).reshape(values, (-1, *out.shape[1:]))

    def factor(self, index: int, device: Device, chunks: list[Array]) -> Factor:
        """Return the factor of a group of gradients: the retained one, or computed on ``device``.

        Raises:
            ValueError: If a row of the gradients contains NaN or Inf.
            IllConditionedError: If a block cannot be inverted.
        """
        retained = self._retained.get(index) if self._retention == "always" else self._take_retained(index, device)
        if retained is not None:
            return retained
        in_float64 = self._in_float64[index]
        if in_float64 is None:
            return self._evaluate(index, device, chunks)[0]
        factored = factor(chunks, self.damping(index, device), in_float64)
        if self._retention == "always":
            self._retain(index, device, factored)
        return factored

    def check_range(self, diagonal: Array) -> None:
        """Raise an error if entries of an inverse diagonal have left the range of their dtype.

        Raises:
            IllConditionedError: If an entry is not positive and finite.
        """
        xp = array_namespace(diagonal)
        if not bool(xp.all(xp.isfinite(diagonal) & (diagonal > 0))):
            cure = "scale the gradients" if self._is_measured else "choose a damping closer to 1"
            raise IllConditionedError(
                f"damping {damping_text(*self.damping_range)} gives an inverse Fisher that {self.source.dtype} cannot "
                f"hold; {cure}, or use float64 gradients"
            )

    def run(self, task: Callable[[int, Device, list[Array]], None], groups: Iterable[int] | None = None) -> None:
        """Run ``task(index, device, chunks)`` for each group on the device that it is assigned to.

        Args:
            task: Called from several threads.
            groups: Which groups; ``None`` means all.
        """
        wanted = None if groups is None else set(groups)
        # the workers read vectors that may still be written on the home device
        self.home.backend.synchronize(self.home.name)
        with ExitStack() as stack:
            jobs = []
            for name, indices in self._assigned.items():
                device = self._devices[name]
                queue = deque(index for index in indices if wanted is None or index in wanted)
                workers = stack.enter_context(device.backend.workers(name, len(queue)))
                jobs += [(device, queue)] * min(workers, len(queue))
            # a single job stays in this thread, to which the backend may have given spare threads
            if len(jobs) < 2:
                for device, queue in jobs:
                    self._work(task, device, queue)
                return
            with ThreadPoolExecutor(len(jobs)) as pool:
                for future in [pool.submit(self._work, task, device, queue) for device, queue in jobs]:
                    future.result()
        # the workers of other devices may still be writing on the home device
        self.home.backend.synchronize(self.home.name)

    def _work(self, task: Callable[[int, Device, list[Array]], None], device: Device, queue: deque[int]) -> None:
        # a backend loads groups ahead, so several may be taken from the queue before the first is worked on
        taken: deque[int] = deque()

        def loaders() -> Iterator[Callable[[], list[Array]]]:
            while queue:
                try:
                    index = queue.popleft()
                except IndexError:  # another worker has taken the last one
                    return
                taken.append(index)
                yield partial(self._readable_chunks, index, device)

        with device.backend.on(device.name):
            try:
                with closing(device.backend.stream(device.name, loaders())) as items:
                    for chunks in items:
                        # widened on the device: copies to it take the bytes that are stored
                        self._work_on(task, taken.popleft(), device, [widened(chunk) for chunk in chunks])
            except BaseException:
                queue.clear()  # the other workers stop after their current group
                raise
            device.backend.synchronize(device.name)

    def _readable_chunks(self, index: int, device: Device) -> list[Array]:
        return [readable_on(device, chunk) for chunk in self.source.chunks(self.groups[index])]

    def _work_on(
        self, task: Callable[[int, Device, list[Array]], None], index: int, device: Device, chunks: list[Array]
    ) -> None:
        if index not in self._on_host:
            try:
                return task(index, device, chunks)
            except Float64Needed:
                if not self._on_host:
                    _logger.info("device %s has no float64: blocks that need it are computed on the host", device)
                self._on_host.add(index)
        task(index, self._host, [device.to_numpy(chunk) for chunk in chunks])

    def _measured(self) -> list[Array]:
        """Return the mean diagonals of the blocks of each group."""
        means: list[Array] = [None] * len(self.groups)

        def task(index: int, device: Device, chunks: list[Array]) -> None:
            # each task writes an item of its own, so that workers need no lock
            means[index] = device.to_numpy(mean_diagonals(chunks))

        self.run(task)
        if not all(np.isfinite(mean).all() for mean in means):
            self._check_rows()
            raise IllConditionedError(
                "damping auto cannot be measured: the squares of the gradients overflow float64; scale the gradients "
                "down"
            )
        return means

    def _evaluate(self, index: int, device: Device, chunks: list[Array]) -> tuple[Factor, Array]:
        try:
            factored, damped = evaluate(chunks, self.damping(index, device), self.rtol)
        except IllConditionedError:
            self._check_rows()
            raise
        xp = array_namespace(damped)
        with np.errstate(over="ignore"):  # check_range raises an error of its own
            scale = xp.asarray(self.scale(index, device), dtype=damped.dtype)
            diagonal = xp.asarray(damped * scale[:, None], dtype=chunks[0].dtype)
        self.check_range(diagonal)
        self._in_float64[index] = factored.in_float64
        self._retain(index, device, factored)
        return factored, diagonal

    def _retain(self, index: int, device: Device, factored: Factor) -> None:
        # a factor of the primal form is as large as the dense inverse of its blocks
        is_block_sized = self.groups[index].width <= self.source.count
        if self._retention == "never" or (self._retention == "once" and is_block_sized):
            return
        with self._lock:
            if index not in self._retained and factored.num_bytes <= self._room.get(device.name, 0):
                self._room[device.name] -= factored.num_bytes
                self._retained[index] = factored

    def _take_retained(self, index: int, device: Device) -> Factor | None:
        with self._lock:
            retained = self._retained.pop(index, None)
            if retained is not None:
                self._room[device.name] += retained.num_bytes
            return retained

    def _check_rows(self) -> None:
        """Raise an error that names the rows with NaN or Inf, if there are any."""
        bad: set[int] = set()
        for group in self.groups:
            for chunk in map(widened, self.source.chunks(group)):
                xp = array_namespace(chunk)
                finite = xp.all(xp.all(xp.isfinite(chunk), axis=-1), axis=0)
                bad |= {row for row in range(finite.shape[0]) if not bool(finite[row])}
        if bad:
            raise ValueError(
                f"gradients contain NaN or Inf in {len(bad)} of their rows: {', '.join(map(str, sorted(bad)[:10]))}"
                f"{', ...' if len(bad) > 10 else ''}; leave these samples out"
            )


def _widest_dtype(device: Device) -> type[np.float32 | np.float64]:
    sample = device.zeros((1,), np.float32)
    xp = array_namespace(sample)
    return np.float64 if wide_dtype(sample) == xp.float64 else np.float32
