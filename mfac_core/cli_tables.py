"""Tables of the command line, and numbers in words."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from mfac_core.schedules.rows import ScheduleRow
from mfac_core.session.plan import Plan
from mfac_core.terminal import plain_text

__all__ = ["bytes_text", "counts_text", "ranks_table", "schedule_table", "weights_table"]


def weights_table(plan: Plan) -> Table:
    """Return the weights, the largest gradient window and the memory of each modifier."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("Modifier")
    for heading in ("Parameters", "Weights", "Largest window", "Memory"):
        result.add_column(heading, justify="right")
    for modifier in plan.modifiers:
        rows, columns = modifier.window
        result.add_row(
            Text(plain_text(modifier.modifier)),
            f"{len(modifier.weights):,}",
            f"{modifier.num_weights:,}",
            f"{rows:,} x {columns:,}" if rows else "-",
            bytes_text(modifier.needed_bytes) if rows else "-",
        )
    return result


def ranks_table(plan: Plan, num_ranks: int) -> Table:
    """Return what the rank with the most blocks keeps and sends, for each modifier with a gradient window."""
    result = Table(f"On each of {num_ranks} ranks", box=box.SIMPLE_HEAD)
    for heading in ("Keeps", "Sends per row", "Per pruning step"):
        result.add_column(heading, justify="right")
    for modifier in plan.modifiers:
        costs = modifier.of_rank
        if costs is None:
            continue
        result.add_row(Text(plain_text(modifier.modifier)))
        blocks = "1 block" if costs.blocks == 1 else f"{costs.blocks:,} blocks"
        result.add_row(f"  window of {blocks}", bytes_text(costs.window_bytes))
        result.add_row("  memory", bytes_text(costs.needed_bytes))
        for layout, traffic in (("replicated (DDP)", costs.replicated), ("sharded (FSDP2)", costs.sharded)):
            sent = [bytes_text(each) for each in traffic]
            result.add_row(f"  weights {layout}", "", *(f"<= {each}" if each != "0 B" else each for each in sent))
        if costs.moved_bytes:
            result.add_row("  live rows that move", "", "", f"<= {bytes_text(costs.moved_bytes)}")
    return result


def schedule_table(rows: Sequence[ScheduleRow]) -> Table:
    """Return the pruning steps, one per row."""
    result = Table(box=box.SIMPLE_HEAD)
    result.add_column("Modifier")
    for heading in ("Epoch", "Step", "Sparsity", "Gradients"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            Text(str(row.modifier)),
            f"{row.epoch:g}",
            "-" if row.step is None else str(row.step),
            "-" if row.sparsity is None else f"{row.sparsity:.2%}",
            "-" if row.num_gradients is None else str(row.num_gradients),
        )
    return result


def bytes_text(number: int) -> str:
    """Return a number of bytes with its unit."""
    size, units = float(number), iter(("kB", "MB", "GB", "TB", "PB"))
    unit = "B"
    while size >= 1000 and (larger := next(units, None)):
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def counts_text(rows: Sequence[ScheduleRow], warnings: Sequence[str]) -> str:
    """Return how many pruning steps and warnings there are."""
    counts = ((len(rows), "pruning step"), (len(warnings), "warning"))
    return ", ".join(f"{number} {noun}" if number == 1 else f"{number} {noun}s" for number, noun in counts)
