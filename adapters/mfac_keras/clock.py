"""Where in training a fit is: its epoch, its step, and how many steps an epoch has."""

from __future__ import annotations

from mfac_core.schedules.pruning import checked_steps_per_epoch

__all__ = ["TrainingClock"]


class TrainingClock:
    """Counts the epochs and the training steps of one fit after another.

    Args:
        steps_per_epoch: Training steps per epoch as given by the user; ``None`` takes the number that Keras knows, or
            counts the steps of the first epoch.

    Attributes:
        steps_per_epoch: Training steps per epoch; ``None`` while unknown.
        first_epoch: The epoch that the fit began with; ``None`` before it.
        epoch: The epoch of now, from 0; ``None`` before the first of the fit.
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
        """Start anew for another fit.

        Args:
            steps_per_epoch: The number that Keras knows, if it does.

        Raises:
            ValueError: If another number was given.
        """
        if self._given is not None and steps_per_epoch is not None and self._given != steps_per_epoch:
            raise ValueError(
                f"steps_per_epoch is {self._given} for MFACPruningCallback, and an epoch of this fit has "
                f"{steps_per_epoch} steps; leave it out where Keras knows the length of the data"
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
        """Count the training steps of this epoch; an execution of several may go beyond the end of the data."""
        self.steps_in_epoch = min(steps_in_epoch, self.steps_per_epoch or steps_in_epoch)

    def end_epoch(self) -> None:
        """Take the steps of this epoch as those of every epoch, where their number is unknown."""
        if self.steps_per_epoch is None:
            self.steps_per_epoch = self.steps_in_epoch or None
