"""Detect other code that writes to the weights in scope, trains them without the hooks, or does not train them."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from mfac_core.masks.zero_count import ZeroCount
from mfac_core.weight_names import join_names
from mfac_keras.backends.hooks import TrainingHooks

__all__ = ["WriteMonitor"]

_DURING_FIT = (
    "Other code has written to the model between two training steps: another callback (one that calls set_weights, "
    "load_weights or assign), or an optimizer that this callback does not follow. The next training step sets these "
    "weights to zero again; write before the first pruning step, or write zeros where the masks of this callback are "
    "False"
)
_AFTER_FIT = (
    "Another callback has restored earlier, denser weights at the end of fit (EarlyStopping with "
    "restore_best_weights?), or an optimizer that this callback does not follow has trained them. They are left "
    "unchanged; let that callback choose only among epochs after the last pruning step (start_from_epoch of "
    "EarlyStopping), or pass that optimizer as optimizer=..."
)


class WriteMonitor:
    """Detects what other code does to the weights in scope.

    Args:
        hooks: The hooks in the training step.
        variables: The variables in scope by path.
        logger: Where warnings go.
    """

    def __init__(self, hooks: TrainingHooks, variables: Mapping[str, Any], logger: logging.Logger) -> None:
        self._hooks = hooks
        self._logger = logger
        self._variables = variables
        # checksums of variables that no training step has passed to the optimizer so far
        self._not_followed: dict[str, int] = {}
        # checksums of variables that are going to be pruned, until it is known which of them training changes
        self._before_training: dict[str, int] = {}
        self._warned_of: tuple[dict[str, int], bool] = ({}, False)

    def begin(self, to_prune: Iterable[str]) -> None:
        """Record checksums before training; ``to_prune`` names those that training should change."""
        self.record_checksums()
        self._before_training = self._checksums(to_prune)

    def record_checksums(self) -> None:
        """Record checksums of the variables that the optimizer has not updated so far."""
        self._not_followed = self._checksums_of_not_followed()

    def check_followed(self) -> None:
        """Check that nothing in scope is trained without the optimizer that is followed: its masks would not hold.

        Raises:
            RuntimeError: If something is. The hooks are detached then.
        """
        before = self._not_followed
        now = self._checksums_of_not_followed()
        moved = [name for name, checksum in now.items() if checksum != before.get(name, checksum)]
        if moved:
            self._hooks.detach()
            raise self._hooks.not_followed(f"the gradients of {join_names(moved)}")

    def warn_of_untrained(self) -> None:
        """Warn once about variables to prune that training has not changed, although it has changed others."""
        before, self._before_training = self._before_training, {}
        now = self._checksums(before)
        untrained = [name for name in before if now[name] == before[name]]
        if untrained and len(untrained) < len(before):
            self._logger.warning(
                "training has not changed %s so far, but the recipe prunes them anyway, without training to "
                "compensate. If nothing trains them, as with the teacher in a distillation, remove them from params, "
                "or set trainable = False on their layers before compile",
                join_names(untrained),
            )

    def warn_of_regrown(self, count: ZeroCount, *, after_fit: bool = False) -> None:
        """Warn about pruned weights that are not zero, once about the same ones."""
        before, self._warned_of = self._warned_of, (dict(count.regrown), after_fit)
        if count.regrown and self._warned_of != before:
            self._logger.warning("%s. %s", count.difference(), _AFTER_FIT if after_fit else _DURING_FIT)

    def _checksums_of_not_followed(self) -> dict[str, int]:
        followed = set(map(id, self._hooks.updated))
        return self._checksums(
            name for name, each in self._variables.items() if each.trainable and id(each) not in followed
        )

    def _checksums(self, names: Iterable[str]) -> dict[str, int]:
        names = list(names)
        if names:
            self._hooks.sync()
        return {name: zlib.crc32(self._variables[name].numpy().tobytes()) for name in names}
