"""Log lines about pruning steps, the same in every adapter."""

from __future__ import annotations

from collections.abc import Iterable

from mfac_core.fisher.damping import damping_text
from mfac_core.pruners.step import PruneResult
from mfac_core.settings.pruning import MFACSettings, PruningSettings
from mfac_core.weight_names import join_names

__all__ = ["pruning_step_line", "scope_in_line", "shares_line", "unfinished_line"]


def scope_in_line(modifier: str, names: Iterable[str]) -> str:
    """Return the names of weights, after that of their modifier if there are several modifiers.

    Example:
        >>> scope_in_line("MFACPruningModifier 2", ["fc.weight"]), scope_in_line("", ["fc.weight"])
        ('MFACPruningModifier 2: fc.weight', 'fc.weight')
    """
    return f"{modifier}: {join_names(names)}" if modifier else join_names(names)


def shares_line(num_ranks: int, settings: MFACSettings, num_weights: int, window_bytes: int, modifier: str = "") -> str:
    """Return the line about what each rank keeps and computes; ``window_bytes`` are those of this rank, the first.

    Example:
        >>> settings = MFACSettings(final_sparsity=0.5, end_epoch=2)
        >>> shares_line(8, settings, 3_670_016, 112 * 2**20)
        '8 ranks: each keeps 1/8 of the gradient window (112 MiB) and computes 1/8 of the blocks'
    """
    size = f"{window_bytes / 2**20:,.0f} MiB" if window_bytes >= 2**20 else f"{window_bytes:,} bytes"
    ranks = f"{modifier}, {num_ranks} ranks" if modifier else f"{num_ranks} ranks"
    num_blocks = 1 if settings.block_size is None else -(-num_weights // settings.block_size)
    if num_blocks < num_ranks:
        kept = f"the first keeps the gradient window ({size}) and computes its only block"
        if num_blocks > 1:
            kept = f"the first {num_blocks} keep and compute one block of the gradient window each ({size})"
        smaller = f"fisher_block_size: {max(num_weights // num_ranks, 1)} or less gives each a block"
        return f"{ranks}: {kept}, the others have none; {smaller}"
    share = f"1/{num_ranks}"
    return f"{ranks}: each keeps {share} of the gradient window ({size}) and computes {share} of the blocks"


def pruning_step_line(
    result: PruneResult,
    *,
    settings: PruningSettings,
    modifier: str,
    names: Iterable[str],
    step: int,
    steps_per_epoch: int,
    substep: tuple[int, int] = (1, 1),
    num_rows: int,
    seconds: float,
    measured_on: str = "",
) -> str:
    """Return the line about a completed pruning step, or about a sub-step: its number, and how many there are.

    ``measured_on`` names the batches of the measured loss change. At step 0, as in one shot, the line of a sub-step
    gives neither epoch nor step, because all of its pruning step is done before training.

    Example:
        >>> import numpy as np
        >>> from mfac_core.settings.pruning import MagnitudeSettings
        >>> result = PruneResult(np.zeros(2), np.zeros(2, bool), 0.5, None)
        >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=2)
        >>> pruning_step_line(
        ...     result, settings=settings, modifier="MagnitudePruningModifier 2", names=["fc.weight"], step=15,
        ...     steps_per_epoch=10, num_rows=0, seconds=0.1,
        ... )
        'pruning step at epoch 1.50 (step 15): sparsity 0.5000, 0.10 s (MagnitudePruningModifier 2: fc.weight)'
    """
    increase = result.predicted_loss_increase
    by_mfac = ""
    if increase is not None:
        by_mfac += f", {num_rows} gradient sample{'' if num_rows == 1 else 's'}"
        if isinstance(settings, MFACSettings) and settings.damping == "auto" and result.damping is not None:
            by_mfac += f", damping {damping_text(*result.damping)}"
        by_mfac += f", predicted loss increase {increase:.3g} (in-sample)"
    if result.measured_loss_change is not None:
        by_mfac += f", measured loss change {result.measured_loss_change:+.3g} on {measured_on}"
    number, count = substep
    subject = f"pruning step at epoch {step / steps_per_epoch:.2f} (step {step})"
    if count > 1:
        which = f"sub-step {number} of {count}"
        subject = f"{which} of the {subject}" if step else f"pruning step, {which}"
    scope = scope_in_line(modifier, names)
    return f"{subject}: sparsity {result.sparsity:.4f}{by_mfac}, {seconds:.2f} s ({scope})"


def unfinished_line(
    event: str,
    *,
    modifier: str,
    names: Iterable[str],
    epoch: float,
    due: float,
    sparsity: float,
    refused_rows: int,
) -> str:
    """Return the line about a run that has ended before the last pruning step of a modifier.

    Example:
        >>> unfinished_line(
        ...     "fit ended", modifier="", names=["fc.weight"], epoch=2.0, due=3.0, sparsity=0.5,
        ...     refused_rows=0,
        ... )
        'fit ended at epoch 2.00 without the pruning step of epoch 3 (fc.weight): sparsity is 0.5000'
    """
    refused = f"; {refused_rows} gradient samples were refused because of NaN or Inf" if refused_rows else ""
    return (
        f"{event} at epoch {epoch:.2f} without the pruning step of epoch {due:g} ({scope_in_line(modifier, names)}): "
        f"sparsity is {sparsity:.4f}{refused}"
    )
