"""The ranks of the core over ``torch.distributed``, and the choice of their process group."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mfac_core.errors import RankError
from mfac_core.ranks import Alone, Parts
from mfac_torch.ranks import TorchRanks, ranks_of
from tests.adapters.torch.rank_processes import RankProcesses


def _part(sender, receiver, dtype):
    """A vector that names both ends; rank 1 gets nothing from anyone, and rank 0 nothing from itself."""
    length = 0 if receiver == 1 or sender == receiver == 0 else 2 * sender + receiver + 1
    return (np.arange(length) + 10 * sender + receiver).astype(dtype)


def _exchange(group, dtype, as_tensors):
    ranks = TorchRanks(group)
    parts = [_part(ranks.rank, receiver, dtype) for receiver in range(ranks.size)]
    for part in parts:
        part.flags.writeable = False
    received = ranks.exchange([torch.tensor(part) for part in parts] if as_tensors else parts)
    assert {type(each) for each in received} == {torch.Tensor if as_tensors else np.ndarray}
    assert all(np.asarray(each).dtype == dtype for each in received)
    return [np.asarray(each).tolist() for each in received]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "as_tensors"),
    [
        ("float32", True),
        ("float32", False),
        ("float64", False),
        ("int64", False),
        ("uint8", False),
        ("bool", True),
        ("uint16", False),
    ],
)
def test_each_rank_gets_what_the_others_have_sent_to_it(rank_processes, size, dtype, as_tensors):
    received = rank_processes.run(_exchange, dtype, as_tensors, size=size)
    for receiver, of_each in enumerate(received):
        assert of_each == [_part(sender, receiver, dtype).tolist() for sender in range(size)]


def _exchange_with_known_lengths(group, as_tensors):
    ranks = TorchRanks(group)
    parts = [_part(ranks.rank, receiver, "float32") for receiver in range(ranks.size)]
    arriving = [len(_part(sender, ranks.rank, "float32")) for sender in range(ranks.size)]
    vector = np.concatenate(parts)
    sent = Parts(torch.from_numpy(vector) if as_tensors else vector, [len(part) for part in parts], arriving)
    calls = []
    all_to_all = dist.all_to_all_single

    def counted(received, given, *args, **options):
        calls.append(np.shares_memory(given.numpy(), vector))
        return all_to_all(received, given, *args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_to_all_single", counted)
        received = ranks.exchange(sent)
    assert {type(each) for each in received} == {torch.Tensor if as_tensors else np.ndarray}
    return [np.asarray(each).tolist() for each in received], len(calls), all(calls) or not len(vector)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_one_vector_are_sent_as_they_are_in_a_single_call(rank_processes, size, as_tensors):
    found = rank_processes.run(_exchange_with_known_lengths, as_tensors, size=size)
    for receiver, (of_each, num_calls, is_not_copied) in enumerate(found):
        assert of_each == [_part(sender, receiver, "float32").tolist() for sender in range(size)]
        assert num_calls == 1
        assert is_not_copied


def _exchange_nothing(group):
    return [len(each) for each in TorchRanks(group).exchange([np.zeros(0, np.float32)] * group.size())]


def test_all_parts_may_be_empty(rank_processes):
    assert rank_processes.run(_exchange_nothing, size=3) == [[0, 0, 0]] * 3


def _one_sends_nothing(group):
    length = 0 if dist.get_rank(group) == 1 else 1
    return [each.tolist() for each in TorchRanks(group).exchange([np.ones(length, np.float32)] * group.size())]


def test_one_rank_may_have_nothing_for_any(rank_processes):
    assert rank_processes.run(_one_sends_nothing, size=3) == [[[1.0], [], [1.0]]] * 3


def _sum(group, values):
    array = np.array(values)[dist.get_rank()]
    before = array.copy()
    total = TorchRanks(group).sum(array)
    np.testing.assert_array_equal(array, before)
    return total


def test_a_sum_has_the_same_bits_on_each_rank(rank_processes):
    values = np.random.default_rng(0).normal(size=(4, 1000)) * 10.0 ** np.arange(-8, 8).repeat(63)[:1000]
    totals = rank_processes.run(_sum, values)
    assert {total.tobytes() for total in totals} == {totals[0].tobytes()}
    np.testing.assert_allclose(totals[0], values.sum(0), rtol=1e-12, atol=1e-12)


def test_a_sum_of_integers_is_exact(rank_processes):
    values = np.array([[2**62, -1], [1 - 2**62, 2**53 + 1], [2**40, 7]])
    totals = rank_processes.run(_sum, values, size=3)
    assert [total.tolist() for total in totals] == [values.sum(0).tolist()] * 3
    assert totals[0].dtype == np.int64


def _stay_after_a_death(group):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"a sum between the 2 ranks has failed on rank 0: another rank .* has ended"):
        TorchRanks(group).sum(np.zeros(3))
    return time.monotonic() - start


def test_the_death_of_a_rank_is_an_error_on_the_others():
    processes = RankProcesses(2)
    try:
        alive, dead = processes.outcomes(_stay_after_a_death)
    finally:
        processes.close()
    assert alive < 30
    assert dead == "has ended with exit code -9"


def _group_size(group, wrap):
    model = nn.Linear(4, 4)
    module = model
    if wrap == "ddp":
        module = nn.parallel.DistributedDataParallel(model, process_group=group)
    elif wrap == "compiled ddp":
        module = torch.compile(nn.parallel.DistributedDataParallel(model, process_group=group), backend="eager")
    elif wrap == "fsdp2":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    return ranks_of(module, dict(model.named_parameters())).size


@pytest.mark.parametrize(("wrap", "size"), [("ddp", 2), ("compiled ddp", 2), ("fsdp2", 2), ("none", 4)])
def test_the_group_is_that_of_the_wrapper_or_the_mesh_or_the_default(rank_processes, wrap, size):
    assert rank_processes.run(_group_size, wrap, size=2) == [size] * 2


def test_without_a_process_group_a_process_is_alone():
    model = nn.Linear(4, 4)
    assert isinstance(ranks_of(model, dict(model.named_parameters())), Alone)
