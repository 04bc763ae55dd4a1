"""Parameters of ``fully_shard``: what each rank has of them, and models whose distribution is refused."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mfac_torch import MagnitudePruningModifier, ScheduledModifierManager
from mfac_torch.refusals import refuse_other_distribution
from mfac_torch.sharded import local, local_part, mesh_of, reshard, shards_of


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3), nn.Conv1d(2, 5, 3))


def _sharded(group, *, replicas=1):
    """Return a model and its full parameters, after ``fully_shard``; the third layer is not in a group of its own."""
    model = _model()
    full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if replicas == 1:
        mesh = DeviceMesh.from_group(group, "cpu")
    else:
        mesh = init_device_mesh("cpu", (replicas, group.size() // replicas), mesh_dim_names=("replicas", "shards"))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, full


def _shares(group, replicas):
    """What this rank has, as tensors say it and as ranges say it, of each parameter."""
    model, full = _sharded(group, replicas=replicas)
    parameters = dict(model.named_parameters())
    shards = shards_of(parameters, group)
    rank = dist.get_rank(group)
    for name, parameter in parameters.items():
        here = local(parameter)
        assert here.data_ptr() == parameter.to_local().data_ptr()
        assert not here.requires_grad
        expected = here.numpy()
        np.testing.assert_array_equal(local_part(full[name], parameter).numpy(), expected)
        np.testing.assert_array_equal(shards.local(name, full[name].numpy(), rank).reshape(expected.shape), expected)
    return {name: len(local(parameter)) for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("size", "rows_of_7", "rows_of_3"),
    [(2, [4, 3], [2, 1]), (3, [3, 3, 1], [1, 1, 1]), (4, [2, 2, 2, 1], [1, 1, 1, 0])],
)
def test_each_rank_has_whole_rows_possibly_none(rank_processes, size, rows_of_7, rows_of_3):
    shares = rank_processes.run(_shares, 1, size=size)
    assert [of_rank["0.weight"] for of_rank in shares] == rows_of_7
    assert [of_rank["2.weight"] for of_rank in shares] == rows_of_3


def test_ranks_of_a_hybrid_mesh_have_the_same_rows_in_pairs(rank_processes):
    shares = rank_processes.run(_shares, 2)
    assert [of_rank["0.weight"] for of_rank in shares] == [4, 3, 4, 3]


def _ranges_in_another_order(group):
    mesh = DeviceMesh("cpu", [2, 0, 3, 1])
    model = fully_shard(_model(), mesh=mesh)
    parameters = dict(model.named_parameters())
    shards = shards_of(parameters, mesh.get_group())
    rank = dist.get_rank(mesh.get_group())
    full = _model()[0].weight.detach()
    np.testing.assert_array_equal(
        shards.local("0.weight", full.numpy(), rank).reshape(-1), local(parameters["0.weight"]).numpy().reshape(-1)
    )
    np.testing.assert_array_equal(local_part(full, parameters["0.weight"]), local(parameters["0.weight"]))


def test_a_mesh_may_number_its_ranks_in_another_order(rank_processes):
    rank_processes.run(_ranges_in_another_order)


def _resharded(group):
    model = fully_shard(nn.Linear(6, 7), mesh=DeviceMesh.from_group(group, "cpu"))
    parameter = model.weight
    with torch.no_grad():
        model(torch.ones(1, 6))
    before = type(model.weight)
    reshard(model)
    return before is DTensor, model.weight is parameter


def test_full_parameters_that_an_evaluation_leaves_are_sharded_again(rank_processes):
    assert rank_processes.run(_resharded, size=2) == [(False, True)] * 2


def _refusal(group, make):
    with pytest.raises(NotImplementedError) as caught:
        make(group)
    return str(caught.value)


def _tensor_parallel(group):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (4,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    mesh_of(dict(model.named_parameters()))


def _tensor_parallel_and_sharded(group):
    model = nn.Linear(8, 8, bias=False)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], ColwiseParallel())
    fully_shard(model, mesh=mesh["data"])
    mesh_of(dict(model.named_parameters()))


def _by_columns(group):
    model = fully_shard(nn.Linear(8, 8, bias=False), shard_placement_fn=lambda parameter: Shard(1))
    mesh_of(dict(model.named_parameters()))


def _two_meshes(group):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    fully_shard(model[0], mesh=mesh["a"])
    fully_shard(model[1], mesh=mesh["b"])
    mesh_of(dict(model.named_parameters()))


def _part_of_the_processes(group):
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicas", "shards"))
    model = fully_shard(nn.Linear(8, 8), mesh=mesh)
    dist_size, dist.get_world_size = dist.get_world_size, lambda: 8
    try:
        mesh_of(dict(model.named_parameters()))
    finally:
        dist.get_world_size = dist_size


def _partly_sharded(group):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(model[0])
    shards_of(dict(model.named_parameters()), dist.group.WORLD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_tensor_parallel, r"1\.weight is distributed with the placements \(Shard\(dim=1\),\).*fully_shard"),
        (_tensor_parallel_and_sharded, r"weight is distributed with the placements .*tensor parallelism"),
        (_by_columns, r"weight is distributed with the placements \(Shard\(dim=1\),\)"),
        (_two_meshes, r"1\.weight, 1\.bias and 0\.weight are distributed over different meshes"),
        (_part_of_the_processes, r"weight is distributed over 4 of 8 processes, by a mesh of 2 dimensions"),
        (_partly_sharded, r"some of the weights in scope, and not 1\.weight, 1\.bias.*exclude"),
    ],
)
def test_other_distributions_are_refused_by_name(rank_processes, make, message):
    for refusal in rank_processes.run(_refusal, make):
        assert re.search(message, refusal), refusal


def _fsdp1(group, original, unwrap):
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(8, 8)), group, use_orig_params=original, device_id=torch.device("cpu")
    )
    refuse_other_distribution(model.module if unwrap else nn.Sequential(model))


@pytest.mark.parametrize("unwrap", [False, True], ids=["wrapped", "unwrapped"])
@pytest.mark.parametrize("original", [False, True], ids=["flat", "original"])
def test_fsdp1_is_refused_with_the_way_to_fsdp2(rank_processes, original, unwrap):
    for refusal in rank_processes.run(_refusal, partial(_fsdp1, original=original, unwrap=unwrap), size=2):
        assert re.search(r"FullyShardedDataParallel \(FSDP1\) has .*(_flat_param|0\.weight).*fully_shard", refusal)


class _OfDeepSpeed:
    """What the tests know of DeepSpeed, which is not installed: the module of its classes, and the mark of ZeRO."""

    __module__ = "deepspeed.runtime.engine"


class DeepSpeedEngine(_OfDeepSpeed, nn.Module):
    pass


class DeepSpeedOptimizer(_OfDeepSpeed):
    optimizer = None


class AcceleratedOptimizer:
    optimizer = DeepSpeedOptimizer()


def test_deepspeed_is_refused_by_name():
    zero = nn.Linear(2, 2)
    zero.weight.ds_id = 0
    plain = nn.Linear(2, 2)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for model, optimizer, message in (
        (DeepSpeedEngine(), sgd, r"DeepSpeed has the model \(a DeepSpeedEngine\).*fully_shard"),
        (zero, sgd, r"DeepSpeed has weight"),
        (plain, DeepSpeedOptimizer(), r"DeepSpeed has the optimizer \(a DeepSpeedOptimizer\)"),
        (plain, AcceleratedOptimizer(), r"DeepSpeed has the optimizer \(a DeepSpeedOptimizer\)"),
    ):
        manager = ScheduledModifierManager([MagnitudePruningModifier(final_sparsity=0.5, end_epoch=1.0)])
        with pytest.raises(NotImplementedError, match=message):
            manager.modify(model, optimizer, 5)
        assert not manager.initialized
