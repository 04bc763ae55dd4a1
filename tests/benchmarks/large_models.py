"""Write the tables of docs/distributed.md about large models: bytes and seconds on paper, counted as by ``mfac plan``.

Run it from the root of the project: ``python tests/benchmarks/large_models.py``. Nothing is measured. A test checks
that the page has what this script writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mfac_core.cli_tables import bytes_text
from mfac_core.pruners.memory import WindowMemory
from mfac_core.pruners.rank_costs import RankCosts, rank_costs
from mfac_core.schedules.pruning import ScheduledStep
from mfac_core.settings.checks import GradientsDtype
from mfac_core.settings.pruning import MFACSettings

__all__ = ["PAGE", "costs_of", "in_page", "place", "seconds", "tables"]

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
BEGIN, END = "<!-- written by tests/benchmarks/large_models.py -->", "<!-- end -->"

GPUS = (8, 16, 32, 64)
ROWS = (64, 256, 1024)
DTYPES: tuple[GradientsDtype, ...] = ("float32", "bfloat16")

OPERATIONS_PER_SECOND = 30e12
BUS_BYTES_PER_SECOND = 50e9
PASSES = 2  # over the window at a pruning step: the diagonal, and the update
GPU_BYTES = 80e9
HOST_BYTES = 250e9  # of a GPU's share
USABLE = 0.8
TRAINING_BYTES = 16  # per weight: the weight, its gradient, and two moments of Adam, in float32
ONE_SHOT_BYTES = 8  # per weight: the weight and its gradient, in float32
FSDP_BYTES = 8  # per weight and step: gathered twice in 16 bits, and the gradient reduced in float32
MASK_COPIES = 5  # in host memory during a pruning step: zeros, masks before and after, and those that are returned


class Model(NamedTuple):
    """A transformer, by its numbers of weights."""

    name: str
    weights: int
    layer: int


MODELS = (
    Model("1 billion", 1_000_000_000, 61_000_000),
    Model("7 billion", 7_000_000_000, 202_000_000),
    Model("70 billion", 70_000_000_000, 856_000_000),
)


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")


def in_page(page: str) -> str:
    """Return the page with the tables in it."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([f"{before}{BEGIN}", "", *tables(), "", f"{END}{after}"])


def tables() -> list[str]:
    """Return both tables as lines."""
    return [*_windows(), "", *_traffic()]


def costs_of(num_weights: int, num_gradients: int, dtype: GradientsDtype, num_ranks: int) -> RankCosts:
    """Return what a GPU keeps, computes and sends for a pruning step with sampled gradients."""
    settings = MFACSettings(
        final_sparsity=0.5, end_epoch=0.0, num_gradients=num_gradients, gradients_dtype=dtype, block_size=2000
    )
    steps = [ScheduledStep(0, 0.0, 0.5)]
    return rank_costs(WindowMemory(settings, num_weights, steps, live_gradients=False, num_ranks=num_ranks))


def place(costs: RankCosts, model_bytes: float, mask_bytes: int) -> str:
    """Return where the window of one GPU fits: on the ``GPU``, in ``host`` memory, or nowhere.

    Args:
        costs: What the GPU keeps.
        model_bytes: What the model takes on it.
        mask_bytes: What masks take in host memory.
    """
    left, left_on_host = USABLE * GPU_BYTES - model_bytes, USABLE * HOST_BYTES - mask_bytes
    if left < costs.needed_bytes - costs.window_bytes or left_on_host < 0:
        return ""
    if costs.needed_bytes <= left:
        return "GPU"
    return "host" if costs.window_bytes <= left_on_host else ""


def seconds(costs: RankCosts, where: str) -> float:
    """Return the seconds of a pruning step: of its operations, or of copies from host memory if these take longer."""
    computed = costs.operations / OPERATIONS_PER_SECOND
    return max(computed, PASSES * costs.window_bytes / BUS_BYTES_PER_SECOND) if where == "host" else computed


def _windows() -> Iterator[str]:
    yield f"| in the window | m | `grads_dtype` | {' | '.join(f'{gpus} GPUs' for gpus in GPUS)} |"
    yield f"| --- | ---: | --- | {' | '.join('---:' for _ in GPUS)} |"
    for model in MODELS:
        for what, weights, bytes_per_weight in (
            (f"all {model.name}", model.weights, TRAINING_BYTES),
            (f"one layer of {model.name}", model.layer, ONE_SHOT_BYTES),
        ):
            # the masks of all layers, one byte per weight, and further copies of those that are pruned now
            mask_bytes = model.weights + (MASK_COPIES - 1) * weights
            for m in ROWS:
                for dtype in DTYPES:
                    each = [costs_of(weights, m, dtype, gpus) for gpus in GPUS]
                    cells = [_cell(costs, bytes_per_weight * model.weights, mask_bytes) for costs in each]
                    yield f"| {what} | {m} | {dtype} | {' | '.join(cells)} |"


def _cell(costs: RankCosts, model_bytes: int, mask_bytes: int) -> str:
    where = place(costs, model_bytes / costs.num_ranks, mask_bytes)
    size = bytes_text(costs.window_bytes)
    return f"{size}, {where}, {_seconds_text(seconds(costs, where))}" if where else f"{size}, -"


def _seconds_text(number: float) -> str:
    return "< 0.1 s" if number < 0.1 else f"{number:.1f} s"


def _traffic() -> Iterator[str]:
    heads = ("GPUs", "state, DDP", "state, FSDP2", "FSDP2 step", "row, FSDP2", "pruning, DDP", "pruning, FSDP2")
    yield f"| weights | {' | '.join(heads)} |"
    yield f"| --- | {' | '.join(['---:'] * 7)} |"
    for model in MODELS:
        for gpus in GPUS:
            costs = costs_of(model.weights, 64, "float32", gpus)
            numbers = [
                TRAINING_BYTES * model.weights,
                TRAINING_BYTES * model.weights // gpus,
                FSDP_BYTES * model.weights * (gpus - 1) // gpus,
                costs.sharded.per_row,
                costs.replicated.per_step,
                costs.sharded.per_step,
            ]
            yield f"| {model.name} | {gpus} | {' | '.join(map(bytes_text, numbers))} |"


if __name__ == "__main__":
    main()
