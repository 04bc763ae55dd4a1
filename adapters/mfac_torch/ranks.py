"""Ranks of the core over ``torch.distributed``, and the process group that a model is trained by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from mfac_core.backends import Array
from mfac_core.errors import RankError
from mfac_core.ranks import Alone, Parts
from mfac_torch.conversion import to_tensor
from mfac_torch.sharded import mesh_of
from mfac_torch.wrappers import layers_of

__all__ = ["TorchRanks", "all_ranks", "num_processes", "ranks_of"]


def num_processes() -> int:
    """Return the number of processes of the default group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_ranks() -> TorchRanks | Alone:
    """Return the ranks of the default group, for what is logged before there is a model."""
    return TorchRanks(_default_group()) if num_processes() > 1 else Alone()


def ranks_of(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> TorchRanks | Alone:
    """Return the ranks that train a model: those of its shards, of ``DistributedDataParallel``, or all.

    Args:
        module: The model, in its wrappers.
        parameters: All its parameters, by name.

    Raises:
        NotImplementedError: If the parameters are distributed in a way that is not supported.
    """
    if not dist.is_available() or not dist.is_initialized():
        return Alone()
    group = _group(module, mesh_of(parameters))
    return Alone() if group.size() == 1 else TorchRanks(group)


def _group(module: nn.Module, mesh: Any) -> Any:
    if mesh is not None and mesh.ndim == 1:
        return mesh.get_group()
    replicated = (each for each in layers_of(module) if isinstance(each, nn.parallel.DistributedDataParallel))
    return next((each.process_group for each in replicated), _default_group())


def _default_group() -> Any:
    return dist.group.WORLD


class TorchRanks:
    """The processes of a group, as the core needs them.

    Args:
        group: The process group; this process is a member.

    Attributes:
        group: The process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        # such as "cpu:gloo,cuda:nccl"
        config = dist.distributed_c10d.get_backend_config(group)
        self._backends = dict(each.split(":") for each in str(config).split(","))

    @property
    def rank(self) -> int:
        """This process, from 0 to ``size - 1``."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.group.size()

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        """Send ``parts[i]`` to rank ``i``, and return what each rank has sent to this one."""
        if not isinstance(parts, Parts):
            parts = self._told(parts)
        tensor = to_tensor(parts.vector)
        via, itemsize = self._transport(tensor.device), tensor.dtype.itemsize
        arriving, lengths = ([itemsize * count for count in counts] for counts in (parts.arriving, parts.lengths))
        with _raising(self, "an exchange"):
            # bytes: not every backend takes every dtype; an empty NumPy array arrives with stride 0, which has no view
            sent = tensor.to(via).as_strided(tensor.shape, (1,)).view(torch.uint8)
            received = torch.empty(sum(arriving), dtype=torch.uint8, device=via)
            dist.all_to_all_single(received, sent, arriving, lengths, group=self.group)
        found = received.to(tensor.device).view(tensor.dtype).split(parts.arriving)
        return [each.numpy() for each in found] if isinstance(parts.vector, np.ndarray) else list(found)

    def sum(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the sum over all ranks, with the same bits on each."""
        via = self._transport(torch.device("cpu"))
        total = torch.tensor(array, device=via)
        with _raising(self, "a sum"):
            dist.all_reduce(total, group=self.group)
            if total.is_floating_point():  # ranks may add in different orders
                dist.broadcast(total, dist.get_global_rank(self.group, 0), group=self.group)
            return total.cpu().numpy()

    def _told(self, parts: Sequence[Array]) -> Parts:
        """Return parts with their lengths, after the ranks have told each other those."""
        vector = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(list(parts))
        lengths = [len(part) for part in parts]
        via = self._transport(torch.device("cpu"))
        arriving = torch.empty(self.size, dtype=torch.int64, device=via)
        with _raising(self, "an exchange"):
            dist.all_to_all_single(arriving, torch.tensor(lengths, device=via), group=self.group)
        return Parts(vector, lengths, arriving.tolist())

    def _transport(self, device: torch.device) -> torch.device:
        """Return the device through which tensors of another one travel: itself, where the group has a backend."""
        if self._backends.get(device.type, "gloo") == "gloo":  # gloo exchanges parts in host memory only
            device = torch.device("cpu")
        if device.type in self._backends:
            return device
        return torch.device(next(iter(self._backends)))  # NCCL alone: through the current GPU


@contextmanager
def _raising(ranks: TorchRanks, doing: str) -> Iterator[None]:
    """Raise RankError for a collective that fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RankError(
            f"{doing} between the {ranks.size} ranks has failed on rank {ranks.rank}: another rank has raised an "
            "error, has ended or does not make the same calls. Look for its error, call modify() and each optimizer "
            f"step on all ranks, and start all of them again from the last checkpoint ({error})"
        ) from error
