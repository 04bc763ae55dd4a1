"""The processes of JAX as ranks: what they exchange travels through collectives of JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mfac_core.backends import Array, device_of
from mfac_core.errors import RankError

__all__ = ["JaxRanks", "jax_ranks"]

Bytes = npt.NDArray[np.uint8]

_SMALLEST = 1 << 10
_LARGEST = 1 << 24
"""Bytes that a process sends to all others at once; longer arrays travel in several rounds."""


class JaxRanks:
    """All processes of JAX as ranks, see :class:`mfac_core.ranks.Ranks`; arrays travel through host memory.

    Everything travels as bytes, because JAX has 64-bit numbers only if ``jax_enable_x64`` is set, and padded to a power
    of two, because JAX compiles a collective for each size.
    """

    def __init__(self) -> None:
        self.rank: int = jax.process_index()
        self.size: int = jax.process_count()
        devices = [jax.local_devices(process_index=process)[0] for process in range(self.size)]
        mesh = Mesh(np.array(devices), ("rank",))
        self._device = devices[self.rank]
        self._by_sender = NamedSharding(mesh, PartitionSpec("rank"))
        self._to_receivers = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec(None, "rank")))
        self._to_all = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        """Send ``parts[i]`` to rank i, and return what each rank has sent to this one."""
        device = device_of(parts[0])
        sent = [np.ascontiguousarray(device.to_numpy(part)) for part in parts]
        received = self._exchanged([part.view(np.uint8) for part in sent])
        return [device.asarray(each.view(sent[0].dtype)) for each in received]

    def sum(self, array: Any) -> npt.NDArray[Any]:
        """Return the sum over ranks, added in the order of ranks by each of them."""
        array = np.ascontiguousarray(array)
        everyone = self._gathered(array.reshape(-1).view(np.uint8)).view(array.dtype)
        return np.asarray(everyone.sum(axis=0, dtype=array.dtype).reshape(array.shape))

    def _exchanged(self, parts: list[Bytes]) -> list[Bytes]:
        lengths = self._gathered(np.array([len(part) for part in parts], np.int64).view(np.uint8)).view(np.int64)
        received = [np.empty(length, np.uint8) for length in lengths[:, self.rank]]
        received[self.rank][:] = parts[self.rank]
        np.fill_diagonal(lengths, 0)  # what a rank keeps does not travel
        start, end = 0, int(lengths.max())
        while start < end:
            size = min(_padded(end - start), max(_LARGEST // _padded(self.size, 1), _SMALLEST))
            sent = np.zeros((self.size, size), np.uint8)
            for rank, part in enumerate(parts):
                if rank != self.rank:
                    piece = part[start : start + size]
                    sent[rank, : len(piece)] = piece
            arrived = self._run(self._to_receivers, sent)[:, 0]
            for rank, whole in enumerate(received):
                if rank != self.rank:
                    piece = whole[start : start + size]
                    piece[:] = arrived[rank, : len(piece)]
            start += size
        return received

    def _gathered(self, local: Bytes) -> npt.NDArray[Any]:
        """Return the bytes of each rank, which have the same number of them: shape (ranks, bytes)."""
        sent = np.zeros(_padded(len(local)), np.uint8)
        sent[: len(local)] = local
        return np.ascontiguousarray(self._run(self._to_all, sent)[:, : len(local)])

    def _run(self, collective: Callable[[Any], Any], sent: Bytes) -> npt.NDArray[Any]:
        try:
            of_all = jax.make_array_from_single_device_arrays(
                (self.size, *sent.shape), self._by_sender, [jax.device_put(sent[np.newaxis], self._device)]
            )
            return np.asarray(collective(of_all).addressable_data(0))
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises either
            raise RankError(
                f"rank {self.rank} of {self.size} lost the others: a process has ended or has raised an error, or JAX "
                f"cannot reach it; look for the first error in the logs of all processes ({error})"
            ) from error


@cache
def jax_ranks() -> JaxRanks:
    """Return all processes of JAX as ranks; the collectives are compiled once."""
    return JaxRanks()


def _same(array: Any) -> Any:
    return array


def _padded(size: int, at_least: int = _SMALLEST) -> int:
    """Return the next power of two."""
    return max(1 << (size - 1).bit_length(), at_least) if size else at_least
