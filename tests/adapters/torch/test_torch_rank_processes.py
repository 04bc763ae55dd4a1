"""The real processes that the tests of several ranks run in."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.adapters.torch.rank_processes import RankFailure, RankProcesses


def _sum_of_ranks(group, factor):
    total = torch.tensor(float(dist.get_rank() * factor))
    dist.all_reduce(total, group=group)
    return float(total)


def _process(group):
    return os.getpid()


def _raise_on(group, rank):
    if dist.get_rank() == rank:
        raise ValueError("no such row")


def _die_on(group, rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("size", "total"), [(2, 10.0), (3, 30.0), (4, 60.0)])
def test_the_first_ranks_run_a_function_together(rank_processes, size, total):
    assert rank_processes.run(_sum_of_ranks, 10, size=size) == [total] * size


def test_processes_persist(rank_processes):
    first = rank_processes.run(_process)
    assert len(set(first)) == 4
    assert rank_processes.run(_process) == first


def test_a_failure_names_the_rank_and_the_next_run_has_new_processes():
    processes = RankProcesses(2)
    try:
        with pytest.raises(RankFailure, match=r"^rank 1 raised ValueError: no such row"):
            processes.run(_raise_on, 1)
        with pytest.raises(RankFailure, match=r"^rank 1 has ended with exit code -9"):
            processes.run(_die_on, 1)
    finally:
        processes.close()
