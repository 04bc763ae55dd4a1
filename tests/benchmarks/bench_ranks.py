"""Measure a pruning step and the collecting of rows in several processes, and write docs/benchmarks-ranks.md.

Run it from the root of the project: ``python tests/benchmarks/bench_ranks.py`` (a few minutes). It drives the pruner of
the core by the gradients of real DDP and FSDP2 models over gloo. Beside it runs the scheme that it replaces: one rank
stores all rows, computes all blocks and sends the results.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from machine import YOURS_WILL_DIFFER, commit, processor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mfac_core import MFACPruner, MFACSettings
from mfac_core.ranks import Alone, Shards

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mfac_torch.ranks import TorchRanks  # noqa: E402
from tests.adapters.torch.rank_processes import RankProcesses  # noqa: E402

PAGE = ROOT / "docs" / "benchmarks-ranks.md"
SIZES = (1, 2, 4)
SCHEMES = ("DDP", "FSDP2", "rank 0")
WIDTH = 1000  # two layers of WIDTH x WIDTH weights
ROWS = 64
BATCH = 512  # of all ranks together
WARM_UP = 4
HEADS = ("scheme", "ranks", "processor s", "window MiB", "peak MiB", "step ratio", "row", "pruning", "calls", "differ")
SETTINGS = MFACSettings(
    final_sparsity=0.5, end_epoch=1.0, num_gradients=ROWS, damping="auto", scope="global", update="independent"
)


class Measured(NamedTuple):
    """What one rank has measured.

    Attributes:
        step_ratio: Processor seconds of a training step that collects, relative to one that does not: the medians.
        processor_seconds: Of the pruning step.
        window_bytes: Of the gradient window.
        peak_bytes: How much the peak of its memory has risen from before the first row to the end.
        row: Bytes sent to other ranks for a row, and collective calls.
        step: The same for the pruning step.
        mask: The masks, as bits.
    """

    step_ratio: float
    processor_seconds: float
    window_bytes: int
    peak_bytes: int
    row: tuple[int, int]
    step: tuple[int, int]
    mask: bytes


class Counted:
    """Ranks that count what this one sends."""

    def __init__(self, ranks: Any) -> None:
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks = ranks
        self.sent = self.calls = 0

    def exchange(self, parts: Sequence[Any]) -> list[Any]:
        """Count and pass on."""
        self.calls += 1
        self.sent += sum(part.nbytes for to, part in enumerate(parts) if to != self.rank)
        return self._ranks.exchange(parts)

    def sum(self, array: np.ndarray) -> np.ndarray:
        """Count and pass on."""
        self.calls += 1
        self.sent += array.nbytes if self.size > 1 else 0
        return self._ranks.sum(array)

    def since(self, sent: int, calls: int) -> tuple[int, int]:
        """Return the bytes and calls since there were so many."""
        return self.sent - sent, self.calls - calls


def main() -> None:
    """Measure, and write the page."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for size in SIZES:
        for scheme in SCHEMES:
            if size == 1 and scheme != "DDP":
                continue
            processes = RankProcesses(size)  # new ones, whose peaks of memory are their own
            try:
                found[scheme, size] = processes.run(run, scheme)
            finally:
                processes.close()
            assert len({each.mask for each in found[scheme, size]}) == 1, "ranks have different masks"
            print(scheme, size, found[scheme, size][0]._replace(mask=b""), flush=True)
    PAGE.write_text(document(found), encoding="utf-8")
    print(f"wrote {PAGE}")


def run(group: dist.ProcessGroup, scheme: str) -> Measured:
    """Train and prune on one rank."""
    torch.manual_seed(0)
    first, last = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
    model = nn.Sequential(first, nn.ReLU(), last)
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    size, rank = group.size(), group.rank()
    if scheme == "FSDP2":
        mesh = init_device_mesh("cpu", (size,))
        for layer in (first, last, model):
            fully_shard(layer, mesh=mesh)
    replicated = scheme != "FSDP2" and size > 1
    wrapped: nn.Module = DistributedDataParallel(model, process_group=group) if replicated else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)

    def training_step() -> None:
        batch = torch.randn(2, BATCH, WIDTH, generator=generator).chunk(size, dim=1)[rank]
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(batch[0]), batch[1]).backward()

    for _ in range(WARM_UP):
        training_step()
        optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    collects = scheme != "rank 0" or rank == 0
    ranks = Counted(Alone() if scheme == "rank 0" or size == 1 else TorchRanks(group))
    shards = _shards(shapes, size) if scheme == "FSDP2" else None
    pruner = MFACPruner(SETTINGS, _local(model), steps_per_epoch=ROWS, ranks=ranks, shards=shards) if collects else None
    seconds: dict[bool, list[float]] = {True: [], False: []}
    row = (0, 0)
    for number in range(2 * ROWS):
        counted = ranks.sent, ranks.calls
        observes = number % 2 == 0
        begun = time.process_time()
        training_step()
        if observes and pruner is not None:
            pruner.observe(_local_gradients(model))
            row = ranks.since(*counted)
        optimizer.step()
        seconds[observes].append(time.process_time() - begun)
    dist.barrier(group)
    counted, begun = (ranks.sent, ranks.calls), time.process_time()
    masks: Mapping[str, np.ndarray] = {}
    if pruner is not None:
        result = pruner.prune(_local(model), ROWS)
        masks = {name: np.asarray(mask) for name, mask in result.masks.items()}
        for name, parameter in model.named_parameters():
            _local_part(parameter).copy_(torch.as_tensor(result.weights[name]))
    step = ranks.since(*counted)
    if scheme == "rank 0" and size > 1:
        masks = _broadcast(model, masks, shapes, group)
        step = (size - 1) * sum(5 * mask.size for mask in masks.values()) if rank == 0 else 0, 2 * len(shapes)
    used = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Measured(
        statistics.median(seconds[True]) / statistics.median(seconds[False]),
        used,
        pruner.window_bytes if pruner is not None else 0,
        1024 * peak,
        row,
        step,
        np.packbits(np.concatenate([mask.ravel() for mask in masks.values()])).tobytes(),
    )


def document(found: Mapping[tuple[str, int], list[Measured]]) -> str:
    """Return the page."""
    lines = [
        "# Several processes on the CPU",
        "",
        fill(
            f"One pruning step of {2 * WIDTH * WIDTH:,} weights by {ROWS} gradients of training, in 1, 2 and 4 "
            "processes over gloo, each with one thread. DDP: all ranks have all weights. FSDP2: each has a shard. Rank "
            "0: one rank stores all rows, computes all blocks, and sends weights and masks to the others, as older "
            "tools do. Numbers are those of the rank with the most.",
            120,
        ),
        "",
        fill(
            f"Python {platform.python_version()}, {platform.system()} on {processor()}, "
            f"{len(os.sched_getaffinity(0))} cores, PyTorch {torch.__version__}, at commit {commit()}, by "
            f"`python tests/benchmarks/bench_ranks.py`. {YOURS_WILL_DIFFER}",
            120,
        ),
        "",
        f"| {' | '.join(HEADS)} |",
        f"| --- | {' | '.join(['---:'] * (len(HEADS) - 1))} |",
    ]
    alone = next(iter(found.values()))[0].mask
    for (scheme, size), ranks in found.items():
        most = Measured(*(max(each) for each in zip(*ranks, strict=True)))
        changed = np.frombuffer(most.mask, np.uint8) ^ np.frombuffer(alone, np.uint8)
        cells = [
            f"{most.processor_seconds:.2f}",
            f"{most.window_bytes / 2**20:.0f}",
            f"{most.peak_bytes / 2**20:.0f}",
            f"{most.step_ratio:.2f}",
            _sent(most.row[0]),
            _sent(most.step[0]),
            str(most.step[1] if size > 1 else 0),
            str(int(np.unpackbits(changed).sum())),
        ]
        lines.append(f"| {'one process' if size == 1 else scheme} | {size} | {' | '.join(cells)} |")
    lines += [
        "",
        fill(
            "Processor s: of the pruning step. Peak: how much the largest memory of the process has risen by pruning. "
            "Step ratio: processor time of a training step that stores a row, relative to one that does not, taken in "
            "turns. Row, pruning: bytes sent. Calls: collectives of the pruning step. Differ: entries of the mask "
            "other than those of one process; ranks add up the gradient of the batch in another order.",
            120,
        ),
    ]
    return "\n".join(lines) + "\n"


def _sent(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number else "0"


def _local_part(tensor: Any) -> torch.Tensor:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach()


def _local(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: _local_part(parameter).numpy() for name, parameter in model.named_parameters()}


def _local_gradients(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: _local_part(parameter.grad).numpy() for name, parameter in model.named_parameters()}


def _shards(shapes: Mapping[str, tuple[int, ...]], size: int) -> Shards:
    """Return the shards of ``fully_shard``: rows of each weight, divisible here."""
    each = WIDTH * WIDTH // size
    return Shards(shapes, {name: [(rank * each, (rank + 1) * each) for rank in range(size)] for name in shapes})


def _broadcast(
    model: nn.Module,
    masks: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    group: dist.ProcessGroup,
) -> dict[str, np.ndarray]:
    received = {}
    for name, parameter in model.named_parameters():
        dist.broadcast(parameter.data, 0, group=group)
        mask = torch.as_tensor(masks[name]) if masks else torch.empty(shapes[name], dtype=torch.bool)
        dist.broadcast(mask, 0, group=group)
        received[name] = mask.numpy()
    return received


if __name__ == "__main__":
    main()
