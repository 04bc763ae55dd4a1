"""Parameters that ``fully_shard`` (FSDP2) distributes over ranks: what this rank has, and what the others have."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import torch.distributed
from torch import nn

from mfac_core.ranks import Shards
from mfac_core.weight_names import join_names

__all__ = ["imported", "is_sharded", "local", "local_part", "mesh_of", "reshard", "shards_of"]

_SUPPORTED = "fully_shard(model) on the whole model, with the default mesh, or a 2-D one (HSDP) over all processes"


def is_sharded(tensor: object) -> TypeGuard[Any]:
    """Return whether a tensor is a DTensor."""
    return isinstance(tensor, imported("torch.distributed.tensor", "DTensor"))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor, without autograd; it shares the memory of the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the part of a full tensor that this rank has of another one of its shape, as a view."""
    if not is_sharded(like):
        return full
    mesh: Any = like.device_mesh
    return full[slice(*_rows(len(full), mesh, torch.distributed.get_rank()))]


def reshard(model: nn.Module) -> None:
    """Put DTensors back in the place of the full parameters that a forward pass without a backward pass leaves."""
    for module in model.modules():
        if isinstance(module, imported("torch.distributed.fsdp", "FSDPModule")):
            module.reshard()


def mesh_of(parameters: Mapping[str, torch.Tensor]) -> Any:
    """Return the device mesh over which parameters are sharded; None if they are not.

    Raises:
        NotImplementedError: If one is distributed in another way than by rows, they have several meshes, or a mesh of
            two dimensions does not cover all processes.
    """
    sharded = {name: parameter for name, parameter in parameters.items() if is_sharded(parameter)}
    for name, parameter in sharded.items():
        if not _is_by_rows(parameter):
            raise NotImplementedError(
                f"{name} is distributed with the placements {tuple(parameter.placements)}, which is not supported "
                f"(tensor parallelism?): only rows can be distributed, by {_SUPPORTED}. Distribute the model so, or "
                "prune it before it is distributed"
            )
    if not sharded:
        return None
    first, mesh = next((name, parameter.device_mesh) for name, parameter in sharded.items())
    others = [name for name, parameter in sharded.items() if parameter.device_mesh != mesh]
    if others:
        raise NotImplementedError(
            f"{join_names(others)} and {first} are distributed over different meshes, which is not supported; use "
            f"{_SUPPORTED}"
        )
    num_processes = torch.distributed.get_world_size()
    if mesh.ndim > 1 and mesh.size() != num_processes:
        raise NotImplementedError(
            f"{first} is distributed over {mesh.size()} of {num_processes} processes, by a mesh of {mesh.ndim} "
            f"dimensions, which is not supported; use {_SUPPORTED}"
        )
    return mesh


def shards_of(parameters: Mapping[str, torch.Tensor], group: Any) -> Shards | None:
    """Return what each rank of a group has of parameters; None if each has everything, or there is no group.

    Raises:
        NotImplementedError: If some parameters are sharded and others are not.
    """
    whole = [name for name, parameter in parameters.items() if not is_sharded(parameter)]
    if len(whole) == len(parameters):
        return None
    if whole:
        raise NotImplementedError(
            f"fully_shard has distributed some of the weights in scope, and not {join_names(whole)}, whose gradients "
            f"it does not average; use {_SUPPORTED}, without ignored_params, or add these weights to exclude"
        )
    if group is None:
        return None
    mesh = mesh_of(parameters)
    ranges = {}
    for name, parameter in parameters.items():
        in_row = parameter.shape[1:].numel()
        rows = [_rows(len(parameter), mesh, each) for each in torch.distributed.get_process_group_ranks(group)]
        ranges[name] = [(start * in_row, stop * in_row) for start, stop in rows]
    return Shards({name: tuple(parameter.shape) for name, parameter in parameters.items()}, ranges)


def _is_by_rows(parameter: Any) -> bool:
    # placements beyond those of FSDP2 and HSDP have classes of their own, or another dimension
    kinds = [type(each).__name__ for each in parameter.placements]
    if kinds not in (["Shard"], ["Replicate", "Shard"]) or parameter.placements[-1].dim != 0:
        return False
    start, stop = _rows(len(parameter), parameter.device_mesh, torch.distributed.get_rank())
    return len(local(parameter)) == stop - start


def _rows(num_rows: int, mesh: Any, rank: int) -> tuple[int, int]:
    """Return the first and one-past-last row that a rank of the default group has: possibly none."""
    # Ranks in a row of the mesh share a parameter; those of another row have replicas (HSDP). Shards are those of
    # torch.chunk, numbered as ranks in their process group, which a mesh in another order does not change.
    sharing = next(row for row in mesh.mesh.reshape(-1, mesh.shape[-1]).tolist() if rank in row)
    number, in_each = sorted(sharing).index(rank), -(-num_rows // len(sharing))
    return min(number * in_each, num_rows), min((number + 1) * in_each, num_rows)


def imported(module: str, name: str) -> Any:
    """Return a class, or ``()`` if its module is not imported, so that it can have no instances."""
    return getattr(sys.modules.get(module), name, ())
