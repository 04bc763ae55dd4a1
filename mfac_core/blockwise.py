"""All blocks over the listed devices: each worker takes group after group, streamed through its device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, device_of, resolve_devices
from mfac_core.blocks import BlockGroup, deal
from mfac_core.errors import IllConditionedError
from mfac_core.gradient_matrix import GradientMatrix
from mfac_core.inverse_fisher import Factor, factor
from mfac_core.settings import check_block_size, check_damping

__all__ = ["BlockwiseFisher", "GradientSource", "InverseFisher", "inverse_fisher"]

Vector = npt.NDArray[Any]


class GradientSource(Protocol):
    """Gradient samples that can be read block by block: a window, or plain arrays.

    Attributes:
        groups: How the columns are cut.
        count: Rows ``m``.
        num_weights: Columns ``d``.
        dtype: dtype of the rows.
    """

    groups: tuple[BlockGroup, ...]
    count: int
    num_weights: int
    dtype: np.dtype[Any]

    def chunks(self, index: int) -> list[Array]:
        """Return the chunks of group ``index``, each of shape ``(n, m, width)``."""


def inverse_fisher(
    gradients: Array,
    *,
    block_size: int | None = 2000,
    damping: float = 1e-5,
    devices: Sequence[str | Device] | str | Device = ("cpu",),
) -> InverseFisher:
    """Return the inverse of the damped, block-diagonal empirical Fisher of some gradient samples.

    Args:
        gradients: One gradient sample per row, shape ``(m, d)``, float32 or float64, NumPy or CuPy. Not modified;
            must stay unchanged while the result is in use.
        block_size: Weights per block; ``None`` means one block of all weights.
        damping: Added to the diagonal of the empirical Fisher, positive.
        devices: Where the blocks are computed.

    Returns:
        An object with ``diagonal()`` and ``apply(x)``.

    Raises:
        ValueError: If ``gradients`` is not a matrix of floats, or a setting is out of range.
        DeviceError: If a device does not exist.

    Example:
        >>> import numpy as np
        >>> gradients = np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> inverse_fisher(gradients, damping=0.5).diagonal()
        array([1., 1.])

    References:
        Frantar, Kurtic and Alistarh (2021), M-FAC: Efficient Matrix-Free Approximations of Second-Order Information.
    """
    if getattr(gradients, "ndim", None) != 2:
        raise ValueError(
            f"gradients must be a matrix with one sample per row, got shape {tuple(getattr(gradients, 'shape', ()))}"
        )
    if np.dtype(gradients.dtype) not in (np.float32, np.float64):
        raise ValueError(f"gradients must be float32 or float64, got {gradients.dtype}; convert them first")
    if 0 in gradients.shape:
        raise ValueError(f"gradients must have at least one row and one column, got shape {tuple(gradients.shape)}")
    check_block_size(block_size)
    check_damping(damping)
    return InverseFisher(gradients, block_size, damping, devices)


class InverseFisher:
    """The inverse Fisher of :func:`inverse_fisher`; factored anew for each call unless :meth:`apply` has kept it.

    Args:
        gradients: Shape ``(m, d)``.
        block_size: Weights per block, or ``None``.
        damping: Added to the diagonal of the empirical Fisher.
        devices: Where the blocks are computed.
    """

    def __init__(
        self,
        gradients: Array,
        block_size: int | None,
        damping: float,
        devices: Sequence[str | Device] | str | Device,
    ) -> None:
        self._home = device_of(gradients)
        self._fisher = BlockwiseFisher(
            GradientMatrix([gradients], block_size=block_size), damping=damping, devices=devices
        )
        self.shape = (self._fisher.source.num_weights,) * 2

    def diagonal(self) -> Array:
        """Return ``diag(F^-1)``, shape ``(d,)``, in the dtype and on the device of the gradients.

        Raises:
            ValueError: If a row of the gradients holds NaN or Inf.
            IllConditionedError: If a block cannot be inverted accurately.
        """
        return self._home.asarray(self._fisher.diagonal())

    def apply(self, x: Array) -> Array:
        """Return ``F^-1 x``; the first call keeps the factors, up to as much memory as the gradients take.

        Args:
            x: Shape ``(d,)``, in the dtype and on the device of the gradients. Not modified.

        Returns:
            Shape ``(d,)``, same dtype and device.

        Raises:
            ValueError: If the shape differs, or a row of the gradients holds NaN or Inf.
            IllConditionedError: If a block cannot be inverted accurately.
        """
        if tuple(x.shape) != self.shape[:1]:
            raise ValueError(f"x must have shape {self.shape[:1]}, got {tuple(x.shape)}")
        self._fisher.keep_factors()
        vector = device_of(x).to_numpy(x).astype(self._fisher.source.dtype, copy=False)
        return self._home.asarray(self._fisher.apply(vector))


class BlockwiseFisher:
    """The damped Fisher of a gradient source, computed group by group on several devices.

    Args:
        source: The gradient samples.
        damping: Added to the diagonal of the empirical Fisher, positive.
        devices: Where the groups are computed.

    Raises:
        DeviceError: If a device does not exist.
        MemoryBudgetError: If one group does not fit on a device.
    """

    def __init__(
        self, source: GradientSource, *, damping: float, devices: Sequence[str | Device] | str | Device
    ) -> None:
        self.source = source
        self.damping = float(damping)
        self._devices = {device.name: device for device in resolve_devices(devices)}
        self._dealt = deal(
            source.groups,
            {name: device.backend.free_bytes(name) for name, device in self._devices.items()},
            num_gradients=source.count,
            itemsize=source.dtype.itemsize,
        )
        # which groups needed float64; known once their diagonal has been computed
        self._precise: list[bool | None] = [None] * len(source.groups)
        self._factors: dict[int, Factor] | None = None

    def keep_factors(self) -> None:
        """Keep the factors of the groups from now on, for repeated products."""
        if self._factors is None:
            self._factors = {}

    def diagonal(self) -> Vector:
        """Return ``diag(F^-1)`` in host memory, shape ``(d,)``."""
        out = np.empty(self.source.num_weights, self.source.dtype)

        def task(index: int, device: Device, chunks: list[Array]) -> None:
            group = self.source.groups[index]
            out[group.start : group.stop] = device.to_numpy(self.factor(index, chunks).diagonal()).reshape(-1)

        self.run(task)
        return out

    def apply(self, x: Vector) -> Vector:
        """Return ``F^-1 x`` in host memory.

        Args:
            x: Shape ``(d,)``, in host memory.

        Returns:
            Shape ``(d,)``.
        """
        out = np.empty(self.source.num_weights, self.source.dtype)

        def task(index: int, device: Device, chunks: list[Array]) -> None:
            columns = self.columns(index)
            out[columns] = self.on_group(index, device, self.factor(index, chunks).apply, x[columns])

        self.run(task)
        return out

    def columns(self, index: int) -> slice:
        """Return the columns of group ``index``."""
        group = self.source.groups[index]
        return slice(group.start, group.stop)

    def on_group(self, index: int, device: Device, function: Callable[[Array], Array], x: Vector) -> Vector:
        """Call ``function`` with a group's part of a vector, in the group's shape and precision.

        Args:
            index: Which group.
            device: Where it is computed.
            function: Takes an array of shape ``(n, B)`` on the device, and returns one.
            x: The group's columns of the vector, in host memory.

        Returns:
            The result in host memory, as a vector.
        """
        dtype = np.float64 if self._precise[index] else self.source.dtype
        count = self.source.groups[index].count
        return device.to_numpy(function(device.asarray(x.reshape(count, -1), dtype))).reshape(-1)

    def factor(self, index: int, chunks: list[Array]) -> Factor:
        """Return the factor of group ``index``, and remember whether it needed float64.

        Args:
            index: Which group.
            chunks: Its gradients.

        Returns:
            The factor, kept from an earlier call if :meth:`keep_factors` was called.

        Raises:
            ValueError: If a row of the gradients holds NaN or Inf.
            IllConditionedError: If the group cannot be inverted.
        """
        if self._factors is not None and index in self._factors:
            return self._factors[index]
        try:
            made = factor(chunks, self.damping, precise=self._precise[index])
        except IllConditionedError:
            _refuse_bad_rows(chunks)
            raise
        self._precise[index] = made.precise
        if self._factors is not None:
            self._factors[index] = made
        return made

    def chunks_in_precision(self, index: int, chunks: list[Array]) -> list[Array]:
        """Return the gradients of group ``index`` in the precision that it needs."""
        if not self._precise[index]:
            return chunks
        xp = array_namespace(chunks[0])
        return [xp.asarray(chunk, dtype=xp.float64) for chunk in chunks]

    def run(self, task: Callable[[int, Device, list[Array]], None], groups: Iterable[int] | None = None) -> None:
        """Run ``task(index, device, chunks)`` for groups, each on the device that it was dealt to.

        Args:
            task: What to do; called from several threads.
            groups: Which groups; ``None`` means all.
        """
        wanted = None if groups is None else set(groups)
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
        with device.backend.on(device.name):
            while queue:
                try:
                    index = queue.popleft()
                except IndexError:  # another worker took the last one
                    return
                try:
                    task(index, device, [device.asarray(chunk) for chunk in self.source.chunks(index)])
                except BaseException:
                    queue.clear()  # the others stop after the group at hand
                    raise


def _refuse_bad_rows(chunks: list[Array]) -> None:
    xp = array_namespace(chunks[0])
    bad: set[int] = set()
    for chunk in chunks:
        finite = xp.all(xp.all(xp.isfinite(chunk), axis=-1), axis=0)
        bad |= {row for row in range(finite.shape[0]) if not bool(finite[row])}
    if bad:
        raise ValueError(
            f"gradients hold NaN or Inf in {len(bad)} of their rows: {', '.join(map(str, sorted(bad)[:10]))}"
            f"{', ...' if len(bad) > 10 else ''}; leave these samples out"
        )
