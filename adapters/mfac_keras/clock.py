"""The current epoch and step of a fit, and the number of steps per epoch."""

from __future__ import annotations

from mfac_core.schedules.pruning import checked_steps_per_epoch

__all__ = ["TrainingClock"]


class TrainingClock:
    """Counts epochs and training steps, fit after fit.

    Args:
        steps_per_epoch: Training steps per epoch as given by the user; ``None`` uses the number that Keras knows, or
            counts the steps of the first epoch.

    Attributes:
        steps_per_epoch: Training steps per epoch; ``None`` while unknown.
        first_epoch: The epoch that the fit began with; ``None`` before it.
        epoch: The current epoch, from 0; ``None`` before the first one of the fit.
        steps_in_epoch: Completed training steps of this epoch.

    Raises:
        SettingError: If ``steps_per_epoch`` is not a positive integer.
    """

    def __init__(self, steps_per_epoch: int | None = None) -> None:
        self._given = None if steps_per_epoch is None else checked_steps_per_epoch(steps_per_epoch)
        self.steps_per_epoch = self._given
        self.first_epoch: int | None = None
        self.epoch: int | None = None
        self.steps_in_epoch = 0

    @property
    def step(self) -> int:
        """Completed training steps, all epochs counted; 0 before the first epoch."""
        return (self.epoch or 0) * (self.steps_per_epoch or 0) + self.steps_in_epoch

    def begin_fit(self, steps_per_epoch: int | None) -> None:
        """Reset all counts for another fit.

        Args:
            steps_per_epoch: The number of steps per epoch, if Keras knows it.

        Raises:
            ValueError: If it differs from the number that the user gave.
        """
        if self._given is not None and steps_per_epoch is not None and self._given != steps_per_epoch:
            raise ValueError(
                f"MFACPruningCallback got steps_per_epoch={self._given}, but an epoch of this fit has "
                f"{steps_per_epoch} steps; omit steps_per_epoch if Keras knows the length of the data"
            )
        self.steps_per_epoch = self._given or steps_per_epoch
        self.first_epoch = self.epoch = None
        self.steps_in_epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.steps_in_epoch = epoch, 0
        if self.first_epoch is None:
            self.first_epoch = epoch

    def count(self, steps_in_epoch: int) -> None:
        """Set the number of completed steps of this epoch; an execution of several steps may overrun the data."""
        self.steps_in_epoch = min(steps_in_epoch, self.steps_per_epoch or steps_in_epoch)

    def end_epoch(self) -> None:
        """If the number of steps per epoch is unknown, set it to that of the epoch that has ended."""
        if self.steps_per_epoch is None:
            self.steps_per_epoch = self.steps_in_epoch or None
