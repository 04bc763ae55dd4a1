"""The learning rate that a recipe asks for at an epoch: pure functions."""

from __future__ import annotations

from mfac_core.training_settings import LearningRateFunction, LearningRateSchedule, SetLearningRate

__all__ = ["learning_rate_at"]


def learning_rate_at(
    settings: SetLearningRate | LearningRateFunction | LearningRateSchedule, epoch: float
) -> float | None:
    """Return the learning rate that settings ask for.

    Args:
        settings: How the learning rate goes.
        epoch: Completed epochs, fractions allowed.

    Returns:
        The learning rate; ``None`` before ``start_epoch``.
    """
    raise NotImplementedError
