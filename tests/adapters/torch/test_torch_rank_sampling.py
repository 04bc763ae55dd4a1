"""Gradient samples, one-shot pruning and batch statistics over ranks, against one process with the same rows."""

import random
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from mfac_torch import (
    GradSampler,
    MagnitudePruningModifier,
    MFACPruningModifier,
    ScheduledModifierManager,
    prune_one_shot,
    recalibrate_batchnorm,
)
from mfac_torch.sharded import is_sharded
from tests.adapters.torch.rank_training import full_weights, logged

LOSS = nn.functional.mse_loss
NUM_BATCHES = 48

KEYS = {"num_grads": 10, "fisher_block_size": 16, "damp": 0.01}
GLOBAL = KEYS | {"global_sparsity": True, "update": "joint", "num_recomputations": 2}
LAYERS = KEYS | {"global_sparsity": False, "update": "independent", "num_recomputations": 1}


def model(seed=0):
    """Weights of 8, 7 and 3 rows, so that shards are uneven, and empty on the last of four ranks."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).eval()


def batches(count=NUM_BATCHES):
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)) for _ in range(count)]


def distributed(group, how, inside, **ddp):
    """Return a model over the ranks of a group."""
    if group is None:
        return inside
    if how == "ddp":
        return DistributedDataParallel(inside, process_group=group, **ddp)
    mesh = DeviceMesh.from_group(group, "cpu")
    if how == "hsdp":
        mesh = init_device_mesh("cpu", (2, group.size() // 2), mesh_dim_names=("replicas", "shards"))
    fully_shard(inside[0], mesh=mesh)
    return fully_shard(inside, mesh=mesh)


def size_of(group):
    return 1 if group is None else group.size()


class Merged:
    """For one process: samples that are each the mean over a batch of each of several ranks."""

    def __init__(self, size):
        self.size = size

    def __call__(self, output, target):
        pairs = zip(output.chunk(self.size), target.chunk(self.size), strict=True)
        return torch.stack([LOSS(*pair) for pair in pairs]).mean()


def merged(size):
    every = batches()
    joined = [every[first : first + size] for first in range(0, len(every), size)]
    return [tuple(torch.cat(each) for each in zip(*group, strict=True)) for group in joined]


def result_of(inside, masks, lines=()):
    buffers = {name: buffer.numpy().copy() for name, buffer in inside.named_buffers()}
    return {name: mask.numpy() for name, mask in masks.items()}, full_weights(inside), buffers, list(lines)


def one_shot(group, how, keys, sparsity=0.6, **options):
    inside = model()
    module = distributed(group, how, inside)
    with logged() as lines:
        masks = prune_one_shot(module, batches(), LOSS, sparsity=sparsity, **keys, **options)
    assert how == "ddp" or all(map(is_sharded, inside.parameters()))  # evaluation has left nothing in full
    return result_of(inside, masks, lines)


def one_shot_alone(how, keys, size, sparsity=0.6, **options):
    inside = model()
    # of shards, each sample is the mean over a batch of each rank
    data, loss = (batches(), LOSS) if how == "ddp" else (merged(size), Merged(size))
    with logged() as lines:
        masks = prune_one_shot(inside, data, loss, sparsity=sparsity, **keys, **options)
    return result_of(inside, masks, lines)


def assert_equal(found, alone, *, buffers=False):
    for masks, weights, buffers_here, _ in found:
        assert masks.keys() == alone[0].keys()
        for name, mask in alone[0].items():
            np.testing.assert_array_equal(masks[name], mask, err_msg=name)
        for name, values in alone[1].items():
            np.testing.assert_allclose(weights[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(weights[name], found[0][1][name], err_msg=name)
        for name, values in alone[2].items() if buffers else ():
            np.testing.assert_allclose(buffers_here[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("keys", [GLOBAL, LAYERS, LAYERS | {"layers_at_once": 2}], ids=["global", "layers", "groups"])
@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_one_shot_is_that_of_one_process_with_the_same_rows(rank_processes, how, size, keys):
    found = rank_processes.run(one_shot, how, keys, size=size)
    alone = one_shot_alone(how, keys, size)
    assert_equal(found, alone)
    assert [lines for *_, lines in found[1:]] == [[]] * (size - 1)  # what all would log alike, the first logs
    of_steps, of_alone = ([line for line in each[3] if "pruning step" in line] for each in (found[0], alone))
    assert len(of_steps) == len(of_alone) > 0
    if how == "ddp" and not keys["num_grads"] % size:  # otherwise the batches to measure on are others
        for line, of_one in zip(of_steps, of_alone, strict=True):
            assert measured(line) == pytest.approx(measured(of_one), abs=2e-4)


def measured(line):
    """Return the change of the loss in a log line, and on how many batches it is measured."""
    _, _, after = line.partition("measured loss change ")
    change, _, where = after.partition(" on ")
    return [float(change), float(where.split()[0])] if after else []


def evaluated(group, how):
    """Evaluate a model without a backward pass before it is pruned and after."""
    inside, inputs = model(), batches()[0][0]
    module = distributed(group, how, inside)
    with torch.no_grad():
        module(inputs)
    masks = prune_one_shot(
        module, batches() if group else merged(2), LOSS if group else Merged(2), sparsity=0.6, **LAYERS
    )
    with torch.no_grad():
        output = module(inputs).numpy()
    for each in inside.modules():
        if hasattr(each, "reshard"):
            each.reshard()
    return result_of(inside, masks), output


def test_a_sharded_model_that_has_been_evaluated_is_pruned_and_then_computes_with_its_new_weights(rank_processes):
    found = rank_processes.run(evaluated, "fsdp2", size=2)
    alone, output = evaluated(None, "fsdp2")
    assert_equal([each for each, _ in found], alone)
    for _, here in found:
        np.testing.assert_allclose(here, output, rtol=1e-5, atol=1e-5)


def unwrapped(group, seed):
    inside = model(seed + dist.get_rank())
    try:
        return result_of(inside, prune_one_shot(inside, batches(), LOSS, sparsity=0.6, **LAYERS))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def unwrapped_alike(group):
    return unwrapped(group, -dist.get_rank())


def test_a_model_that_is_not_wrapped_is_pruned_by_all_processes_if_its_weights_are_the_same(rank_processes):
    assert_equal(rank_processes.run(unwrapped_alike), one_shot_alone("ddp", LAYERS, 4))
    for message in rank_processes.run(unwrapped, 0):
        assert "differ between ranks" in message and "DistributedDataParallel" in message


def by_magnitude(group, how):
    inside = model()
    manager = ScheduledModifierManager([MagnitudePruningModifier(final_sparsity=0.6, end_epoch=0.0)])
    manager.apply(distributed(group, how, inside))
    return result_of(inside, manager.masks)


@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("fsdp2", 4)])
def test_one_shot_by_magnitude_needs_no_samples(rank_processes, how, size):
    assert_equal(rank_processes.run(by_magnitude, how, size=size), by_magnitude(None, how))


def spread(group, how, keys):
    """Prune weights of one row and of two, of which most ranks have no shard."""
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 1), nn.Linear(1, 3))
    module = distributed(group, how, inside)
    masks = prune_one_shot(module, batches(), LOSS, sparsity=0.5, **keys)
    return result_of(inside, masks)


def spread_alone(keys, size):
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 1), nn.Linear(1, 3))
    return result_of(inside, prune_one_shot(inside, merged(size), Merged(size), sparsity=0.5, **keys))


@pytest.mark.parametrize("size", [3, 4])
def test_ranks_may_have_no_part_of_a_weight(rank_processes, size):
    keys = LAYERS | {"num_grads": 6}
    assert_equal(rank_processes.run(spread, "fsdp2", keys, size=size), spread_alone(keys, size))


# --- which rows


class Recorder:
    """A loader that notes the number of each batch that it is asked for, and a loss that notes those that are used."""

    def __init__(self, loader):
        self.loader = loader
        self.used = []

    def __call__(self, output, target):
        self.used.append(int(target[0, 0]))
        return output.square().mean()


def rows_used(group, sharded, count, num_batches):
    inputs = torch.arange(float(num_batches))[:, None]
    data = TensorDataset(inputs, inputs)
    sampler = DistributedSampler(data, group.size(), dist.get_rank(group), shuffle=True) if sharded else None
    inside = nn.Linear(1, 2)
    DistributedDataParallel(inside, process_group=group)
    loss = Recorder(None)
    manager = ScheduledModifierManager(
        [MFACPruningModifier(final_sparsity=0.5, end_epoch=0.0, params=["weight"], num_grads=count)]
    )
    module = DistributedDataParallel(inside, process_group=group)
    manager.apply(module, grad_sampler=GradSampler(DataLoader(data, sampler=sampler), loss))
    held_out = min(16, count)
    own = len(range(dist.get_rank(group), count, group.size()))
    return loss.used[:own], loss.used[own:], held_out


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("sharded", [False, True])
def test_no_row_is_drawn_twice_with_a_distributed_sampler_or_without(rank_processes, size, sharded):
    found = rank_processes.run(rows_used, sharded, 10, 32, size=size)
    drawn = [number for samples, *_ in found for number in samples]
    assert len(drawn) == len(set(drawn)) == 10
    measured_on = [number for _, held_out, _ in found for number in held_out]
    assert len(measured_on) == 20 and len(set(measured_on)) == 10  # each before and after
    assert not set(drawn) & set(measured_on)
    if not sharded:
        assert sorted(drawn) == list(range(10)) and set(measured_on) < set(range(10, 24))
        assert [samples for samples, *_ in found] == [list(range(rank, 10, size)) for rank in range(size)]


def test_all_rows_are_drawn_before_one_is_drawn_again(rank_processes):
    found = rank_processes.run(rows_used, True, 32, 32, size=4)
    assert sorted(number for samples, *_ in found for number in samples) == list(range(32))


# --- what fails on one rank


def failing(group, how, what):
    """Return the error of each rank, and whether the model is as it was."""
    rank, inside = dist.get_rank(group), model()
    before = {name: values.clone() for name, values in inside.state_dict().items()}
    module = distributed(group, how, inside)
    data, keys = batches(), LAYERS
    if rank == 1 and what == "nan":
        data = [(inputs * float("nan"), targets) for inputs, targets in data]
    elif what == "ends":
        data = iter(data[:5] if rank == 1 else data)
    elif rank == 1 and what == "raises":
        data = _Raising(data, at=5)
    elif what == "last group":
        keys, at = LAYERS | {"layers_at_once": 1}, iter([100, 100, 3])
        data = (lambda: iter(_Raising(batches(100), next(at)))) if rank == 1 else batches(100)
    elif rank == 1 and what == "form":
        data = [*data[:4], "not a batch", *data[5:]]
    error = None
    with logged() as lines:
        try:
            prune_one_shot(module, data, LOSS, sparsity=0.6, **keys)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    after = full_weights(inside)
    zeros = sum(int((values == 0).sum()) for values in after.values())
    same = all(np.array_equal(values, before[name].numpy()) for name, values in after.items())
    return error, same, zeros, lines


class _Raising:
    def __init__(self, data, at):
        self.data, self.at = data, at

    def __iter__(self):
        yield from self.data[: self.at]
        raise OSError("the disk is gone")


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("what", "own", "of_others"),
    [
        ("raises", "OSError: the disk is gone", "OSError: the disk is gone"),
        ("last group", "OSError: the disk is gone", "OSError: the disk is gone"),
        ("form", "ValueError: the data loader of the GradSampler yields a str", "a str"),
        ("ends", "ValueError: the data ended after 2 of .* on rank 1", "the data ended after 2 of"),
    ],
)
def test_a_failure_on_one_rank_is_known_to_all_and_changes_nothing(rank_processes, how, what, own, of_others):
    (first, *rest) = rank_processes.run(failing, how, what, size=3)
    second = rest[0]
    assert re.match(own, second[0]), second[0]
    assert re.match(f"RankError: rank 1 failed in .*{of_others}", first[0]), first[0]
    assert all(same for _, same, *_ in (first, *rest))


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_batch_with_nan_on_one_rank_is_refused_by_all(rank_processes, how):
    found = rank_processes.run(failing, how, "nan", size=2)
    if how == "fsdp2":  # every sample is the mean over a batch of each
        assert all("all 10 contained NaN or Inf" in error for error, *_ in found)
        assert all(same for _, same, *_ in found)
        return
    assert all(error is None for error, *_ in found)
    assert len({zeros for _, _, zeros, _ in found}) == 1
    (line,) = [line for line in found[0][3] if "pruning step at" in line]
    assert " 5 gradient samples" in line


def missing_loader(group):
    """Let one rank have more batches than the other to recalibrate with."""
    inside = model()
    module = distributed(group, "ddp", inside)
    try:
        recalibrate_batchnorm(module, batches(4 if dist.get_rank(group) == 1 else 6))
    except ValueError as error:
        return str(error), float(inside[3].running_mean.abs().sum())
    return None


def test_batches_to_recalibrate_with_are_as_many_on_each_rank(rank_processes):
    found = rank_processes.run(missing_loader, size=2)
    assert all(
        message.startswith("the data ended after 4 batches on rank 1, and the other ranks have more") and changed == 0
        for message, changed in found
    )


# --- batch normalization


def recalibrated(group, how, sharded):
    inside = model()
    module = distributed(group, how, inside)
    every = batches(12)
    data = every[dist.get_rank(group) :: group.size()] if sharded and group is not None else every
    count = recalibrate_batchnorm(module, data)
    return count, result_of(inside, {})


@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("ddp", 4), ("fsdp2", 4)])
@pytest.mark.parametrize("sharded", [False, True])
def test_statistics_are_averaged_over_the_batches_of_all_ranks(rank_processes, how, size, sharded):
    found = rank_processes.run(recalibrated, how, sharded, size=size)
    count, alone = recalibrated(None, how, sharded)
    assert [each for each, _ in found] == [count] * size == [1] * size
    assert_equal([each for _, each in found], ({}, {}, _untracked(alone[2]), []), buffers=True)
    tracked = {int(each[2]["3.num_batches_tracked"]) for _, each in found}
    assert tracked == {12 if sharded else 12 * size}


def _untracked(buffers):
    return {name: values for name, values in buffers.items() if "tracked" not in name}


def test_one_shot_recalibrates_over_all_ranks(rank_processes):
    options = {"recalibrate_batchnorm": True}
    found = rank_processes.run(one_shot_with, "ddp", LAYERS, options, size=2)
    alone = one_shot_alone("ddp", LAYERS, 2, **options)
    assert_equal(found, (*alone[:2], _untracked(alone[2]), []), buffers=True)


def recommended(group):
    with logged() as lines:
        prune_one_shot(distributed(group, "ddp", model()), batches(), LOSS, sparsity=0.5, num_grads=4)
    return lines


def test_only_the_first_rank_logs_the_recommended_settings(rank_processes):
    first, second = rank_processes.run(recommended, size=2)
    assert any("recommended settings where none are given" in line for line in first)
    assert not second


def one_shot_with(group, how, keys, options):
    return one_shot(group, how, keys, **options)


# --- DistributedDataParallel


class Branches(nn.Module):
    """A model of which training uses one branch, and the loss of the samples all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.unused = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.samples = False

    def forward(self, inputs):
        hidden = torch.tanh(self.body(inputs))
        return self.head(hidden) + self.unused(hidden) if self.samples else self.head(hidden)


def trained(group, ddp, sampled):
    """Train with a sampler, or without one; return what becomes of the gradients of each step."""
    inside = Branches()
    if not ddp.get("find_unused_parameters"):
        inside.unused.requires_grad_(False)
    module = DistributedDataParallel(inside, process_group=group, **ddp)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    if sampled:
        inside.samples = True
        sampler = GradSampler(batches(), LOSS)
        parameters = {name: each for name, each in inside.named_parameters() if each.requires_grad}
        for _ in sampler.gradients(inside, parameters, 3):
            pass
    gradients = []
    for step in range(4):
        inside.samples = False
        optimizer.zero_grad()
        inputs, targets = batches()[step]
        LOSS(module(inputs[dist.get_rank(group) :: 2]), targets[dist.get_rank(group) :: 2]).backward()
        gradients.append([None if each.grad is None else each.grad.numpy().copy() for each in inside.parameters()])
        if sampled:
            inside.samples = True
            for _ in sampler.gradients(inside, parameters, 2):
                pass
        kept = [None if each.grad is None else each.grad.numpy() for each in inside.parameters()]
        assert all(a is b is None or np.array_equal(a, b) for a, b in zip(gradients[-1], kept, strict=True))
        optimizer.step()
    return gradients


@pytest.mark.parametrize(
    "ddp", [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}]
)
def test_sampling_before_and_between_steps_leaves_training_as_it_is(rank_processes, ddp):
    with_samples = rank_processes.run(trained, ddp, True, size=2)
    without = rank_processes.run(trained, ddp, False, size=2)
    for one, other in zip(with_samples, without, strict=True):
        for step, expected in zip(one, other, strict=True):
            assert [each is None for each in step] == [each is None for each in expected]
            for found, wanted in zip(step, expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


def gradual(group, ddp, how="ddp"):
    inside = model().train()
    module = distributed(group, how, inside, **ddp)
    optimizer = torch.optim.SGD(inside.parameters(), lr=0.05)
    keys = LAYERS | {"num_grads": 6}
    manager = ScheduledModifierManager(
        [MFACPruningModifier(init_sparsity=0.2, final_sparsity=0.6, start_epoch=0.0, end_epoch=2.0, **keys)]
    )
    size = size_of(group)
    rank = 0 if group is None else dist.get_rank(group)
    data, loss = (batches(), LOSS) if how == "ddp" or group is not None else (merged(ddp["size"]), Merged(ddp["size"]))
    manager.modify(module, optimizer, steps_per_epoch=2, grad_sampler=GradSampler(data, loss))
    for step in range(5):
        optimizer.zero_grad()
        inside.eval()  # the statistics of a batch are those of a part of it
        inputs, targets = batches()[step]
        LOSS(module(inputs[:4][rank::size]), targets[:4][rank::size]).backward()
        optimizer.step()
    masks = manager.masks
    manager.finalize()
    return result_of(inside, masks)


@pytest.mark.parametrize("ddp", [{}, {"static_graph": True}])
@pytest.mark.parametrize("size", [2, 4])
def test_samples_at_each_pruning_step_of_training(rank_processes, size, ddp):
    assert_equal(rank_processes.run(gradual, ddp, size=size), gradual(None, {}))


def test_samples_at_each_pruning_step_of_training_with_shards(rank_processes):
    assert_equal(rank_processes.run(gradual, {}, "fsdp2", size=4), gradual(None, {"size": 4}, "fsdp2"))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.second, self.use_reentrant = nn.Linear(6, 8), nn.Linear(8, 3), use_reentrant

    def forward(self, inputs):
        return checkpoint(self.second, self.first(inputs), use_reentrant=self.use_reentrant)


def test_a_reentrant_checkpoint_is_refused_with_the_cure(one_process):
    sampler = GradSampler(batches(), LOSS)
    reentrant, other = Checkpointed(True), Checkpointed(False)
    for parameters in (dict(reentrant.named_parameters()), {"second.weight": reentrant.second.weight}):
        with pytest.raises(NotImplementedError, match=r"reentrant checkpoint.*pass use_reentrant=False"):
            next(sampler.gradients(reentrant, parameters, 1))
    next(sampler.gradients(other, dict(other.named_parameters()), 1))


def random_states(group):
    rank, inside = dist.get_rank(group), model()
    module = distributed(group, "ddp", inside)
    torch.manual_seed(rank)
    random.seed(rank)
    prune_one_shot(module, DataLoader(batches(), batch_size=None, shuffle=True), LOSS, sparsity=0.6, **LAYERS)
    return torch.rand(1).item(), random.random()


def test_each_rank_keeps_a_random_state_of_its_own(rank_processes):
    first, second = rank_processes.run(random_states, size=2)
    assert all(one != other for one, other in zip(first, second, strict=True))
