"""Pruning as a state machine: observe gradients, ask whether a pruning step is due, prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mfac_core.backends import Array
from mfac_core.pruners.acdc import ACDCPruner
from mfac_core.pruners.base import Pruner
from mfac_core.pruners.constant import ConstantPruner
from mfac_core.pruners.gradual import MagnitudePruner
from mfac_core.pruners.mfac import MFACPruner
from mfac_core.ranks import Ranks, Shards
from mfac_core.settings.pruning import ACDCSettings, ConstantSettings, MagnitudeSettings, MFACSettings, PruningSettings

__all__ = ["ACDCPruner", "ConstantPruner", "MFACPruner", "MagnitudePruner", "Pruner", "make_pruner"]


def make_pruner(
    settings: PruningSettings,
    weights: Mapping[str, Array],
    *,
    steps_per_epoch: int,
    masks: Mapping[str, Array] | None = None,
    live_gradients: bool = True,
    axes: Mapping[str, Sequence[int]] | None = None,
    library: str | None = None,
    ranks: Ranks | None = None,
    shards: Shards | None = None,
) -> Pruner:
    """Return the pruner for these settings.

    Args:
        settings: ``MFACSettings``, ``MagnitudeSettings``, ``ConstantSettings`` or ``ACDCSettings``.
        weights: Name and array of each weight, in order; not stored. Those that ``params`` of the settings names are in
            scope; ``__ALL__`` and ``__ALL_PRUNABLE__`` mean all of them.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True); ``None`` means all.
        live_gradients: Whether gradients arrive while training; False when they are sampled at each pruning step.
        axes: Name and permutation of axes into the order (output, kernel..., input) for the arrays whose layout is not
            PyTorch's (output, input, kernel...).
        library: The library whose devices plain names of the settings mean, as
            :func:`mfac_core.backends.array_library` names it; ``None`` means that of the weights.
        ranks: The processes of the run, each with a pruner like this one; ``None`` for a single process.
        shards: Which part of each array each rank has, by full shapes; ``None`` if every rank has everything. Weights
            and gradients are then the parts of this rank, and masks are complete.

    Returns:
        The pruner.

    Raises:
        TypeError: If the settings are of none of these kinds, or ``weights`` is not a mapping.
        ValueError: If there are no weights, or masks, axes or shards do not fit them.
        SettingError: If an entry of ``params`` names none of the weights, the mask type does not fit a shape, or
            ``final_sparsity`` is a mapping: make a pruner of each of ``settings.by_final_sparsity()``.
        NotImplementedError: If a group of weights that the mask type prunes together is on several ranks.

    Example:
        >>> import numpy as np
        >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1)
        >>> pruner = make_pruner(settings, {"w": np.array([3.0, 1.0, 2.0, 4.0])}, steps_per_epoch=10)
        >>> [scheduled.step for scheduled in pruner.schedule]
        [0, 10]
    """
    match settings:
        case MFACSettings():
            return MFACPruner(
                settings,
                weights,
                steps_per_epoch=steps_per_epoch,
                masks=masks,
                live_gradients=live_gradients,
                axes=axes,
                library=library,
                ranks=ranks,
                shards=shards,
            )
        case MagnitudeSettings():
            return MagnitudePruner(
                settings,
                weights,
                steps_per_epoch=steps_per_epoch,
                masks=masks,
                axes=axes,
                ranks=ranks,
                shards=shards,
            )
        case ConstantSettings():
            return ConstantPruner(
                settings, weights, steps_per_epoch=steps_per_epoch, masks=masks, ranks=ranks, shards=shards
            )
        case ACDCSettings():
            return ACDCPruner(
                settings,
                weights,
                steps_per_epoch=steps_per_epoch,
                masks=masks,
                axes=axes,
                ranks=ranks,
                shards=shards,
            )
    raise TypeError(
        "settings must be MFACSettings, MagnitudeSettings, ConstantSettings or ACDCSettings, "
        f"got {type(settings).__name__}"
    )
