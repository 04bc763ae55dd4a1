"""Real processes for the tests: ranks of ``torch.distributed`` over gloo, spawned once, that run functions in turn."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["RankFailure", "RankProcesses"]

GROUP_TIMEOUT = timedelta(seconds=30)
"""A rank that misses a collective fails after this time."""

_RUN_TIMEOUT = 120.0
_SPAWN = multiprocessing.get_context("spawn")


class RankFailure(AssertionError):
    """A rank raised an exception, or its process ended."""


class RankProcesses:
    """Processes that form a process group, and run module-level functions together.

    A function gets the process group of the ranks that run it, and then the arguments of :meth:`run`. Arguments and
    results are pickled. Once a function has raised an exception, the ranks may be in different collectives, so that the
    next run starts new processes.

    Args:
        size: The number of processes. The first k of them also form a group of their own, for each k from 2 on.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        """Run ``function(group, *args)`` on the first ``size`` ranks, and return their results in order.

        Raises:
            RankFailure: If a rank raises an exception or dies; the message begins with the number of the rank.
        """
        outcomes = self.outcomes(function, *args, size=size)
        failed = [f"rank {rank} {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, _Failure)]
        if failed:
            others = [each.partition("\n")[0] for each in failed[1:]]  # without their tracebacks
            raise RankFailure("\n".join([failed[0], *others]))
        return outcomes

    def outcomes(self, function: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        """Run a function as :meth:`run` does, and return what became of each rank: a result, or what failed."""
        size = self.size if size is None else size
        if not self._processes:
            self._start()
        task = pickle.dumps((function, args, size))
        for pipe in self._pipes[:size]:
            pipe.send_bytes(task)
        outcomes: dict[int, Any] = {}
        deadline = time.monotonic() + _RUN_TIMEOUT
        while len(outcomes) < size:
            missing = [rank for rank in range(size) if rank not in outcomes]
            ready = wait([self._pipes[rank] for rank in missing], deadline - time.monotonic())
            for rank in missing:
                if self._pipes[rank] in ready:
                    outcomes[rank] = self._received(rank)
                elif not ready:
                    outcomes[rank] = _Failure(f"has not answered for {_RUN_TIMEOUT:g} s")
        if any(isinstance(outcome, _Failure) for outcome in outcomes.values()):
            self._end()
        return [outcomes[rank] for rank in range(size)]

    def close(self) -> None:
        """Let the processes leave their groups together, and end them."""
        for pipe in self._pipes:
            try:
                pipe.send_bytes(pickle.dumps(None))
            except OSError:  # the process has ended
                continue
        for process in self._processes:
            process.join(10)
        self._end()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mfac-ranks-", ignore_cleanup_errors=True)
        for rank in range(self.size):
            here, there = _SPAWN.Pipe()
            store = Path(self._folder.name, "store").as_uri()
            process = _SPAWN.Process(target=_serve, args=(there, rank, self.size, store), daemon=True)
            process.start()
            there.close()  # so that the pipe ends when the process does
            self._pipes.append(here)
            self._processes.append(process)

    def _received(self, rank: int) -> Any:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(10)
            return _Failure(f"has ended with exit code {self._processes[rank].exitcode}")

    def _end(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class _Failure(str):
    """What became of a rank that has no result."""


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    """Run functions that arrive until ``None`` does."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    groups = {size: dist.group.WORLD}
    for members in range(2, size):  # every rank takes part in making every group
        groups[members] = dist.new_group(list(range(members)), timeout=GROUP_TIMEOUT)
    while (task := pickle.loads(pipe.recv_bytes())) is not None:
        function, args, members = task
        try:
            outcome = function(groups[members], *args)
        except BaseException as error:
            outcome = _Failure(f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}")
        pipe.send_bytes(pickle.dumps(outcome))
    dist.barrier()  # a group that one rank leaves while another still uses it aborts
    dist.destroy_process_group()
    os._exit(0)  # a process that has imported much takes seconds to clear it away
