"""One training run: the work between the training steps of one model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.masks.zero_count import ZeroCount
from mfac_core.pruners.fingerprint import fingerprint
from mfac_core.ranks import Ranks
from mfac_core.ranks.logs import logger_of
from mfac_core.session.live_pruning import combined_masks
from mfac_core.session.plan_log import log_plan
from mfac_core.session.session import ParsedState, Session, attached, gradual_in_order
from mfac_core.settings.pruning import PruningSettings
from mfac_keras.backends import current_backend
from mfac_keras.backends.hooks import TrainingHooks
from mfac_keras.conditions import check_optimizer, check_trained
from mfac_keras.live_pruning import KerasPruning
from mfac_keras.optimizers import innermost, trained_by
from mfac_keras.sampling import GradientSampler
from mfac_keras.training_changes import TrainingChanges
from mfac_keras.write_monitor import WriteMonitor

__all__ = ["TrainingSession", "new_session"]

_logger = logging.getLogger("mfac_keras")


class TrainingSession(Session[KerasPruning, TrainingChanges]):
    """Runs the modifiers of a recipe while Keras trains, by hooks in the training step.

    Args:
        prunings: The pruning modifiers, attached to the model.
        changes: The changes of training other than pruning.
        hooks: The hooks in the training step.
        trained: The variables in scope that the optimizer trains, by path, in the order in which the hooks have them.
        steps_per_epoch: Training steps per epoch.
        steps_per_execution: Training steps between two calls of :meth:`advance`.
        step: Completed training steps so far.

    Attributes:
        monitor: Detects what other code does to the weights in scope.
        fingerprints: Fingerprints of the weights that the state belongs to; None once training has changed them.
    """

    def __init__(
        self,
        prunings: Sequence[KerasPruning],
        changes: TrainingChanges,
        hooks: TrainingHooks,
        trained: Mapping[str, Any],
        *,
        steps_per_epoch: int,
        steps_per_execution: int,
        step: int,
    ) -> None:
        super().__init__(prunings, changes, steps_per_epoch=steps_per_epoch, step=step, logger=_logger)
        self._steps_per_execution = steps_per_execution
        self._hooks = hooks
        self._variables = _in_scope(prunings)
        self._trained = trained
        self.monitor = WriteMonitor(hooks, self._variables, self.logger)
        self.fingerprints: dict[str, str] | None = None
        self._taps = False
        self._has_advanced = False
        self._sparsity: float | None = None

    @property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The current masks by path, True keeps."""
        return combined_masks(pruning.variable_masks for pruning in self.prunings)

    @property
    def sparsity(self) -> float:
        """Fraction of all weights in scope that the masks prune; :meth:`zeros` counts the weights themselves."""
        if self._sparsity is None:  # read at every step
            weights = sum(int(np.prod(variable.shape)) for variable in self._variables.values())
            pruned = sum(int(np.count_nonzero(~mask)) for mask in self.masks.values())
            self._sparsity = pruned / weights if weights else 0.0
        return self._sparsity

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the last step, if the recipe sets it."""
        return self._changes.learning_rate

    def zeros(self) -> ZeroCount:
        """Count the zeros of pruned weights, whatever has written them."""
        self._hooks.sync()
        return super().zeros()

    def log_plan(self, *, sampled: bool, epochs: int | None) -> None:
        """Log what each modifier matches and when it prunes, and warn about settings that may not be intended."""
        log_plan(
            self.logger,
            self.prunings,
            self._changes.settings,
            self.steps_per_epoch,
            sampled=sampled,
            epochs=epochs,
            trainable=self._changes.trainable,
        )

    def begin(self) -> None:
        """Attach to the training step, and make the changes that are due before it."""
        self.fence()
        self._hooks.attach()
        self._hold_masks()
        self._make_due_changes()
        self.monitor.begin(
            name
            for pruning in self.prunings
            if not (pruning.holds_zeros_only or pruning.is_finished)
            for name, variable in pruning.variables.items()
            if not self._hooks.is_frozen(variable)
        )

    def advance(self, step: int) -> None:
        """Collect the gradients of the training steps since the last call, and make the changes that are due.

        Args:
            step: Completed training steps now.

        Raises:
            RuntimeError: If something has taken the hooks away, or the optimizer is not the one that trains.
        """
        self._check_attached()
        if self._taps:
            for done, row in enumerate(self._hooks.rows()):
                gradients = {id(variable): array for variable, array in zip(self._trained.values(), row, strict=True)}
                for pruning in self.prunings:
                    pruning.observe_gradients(self.step + done, gradients)
        self.step = step
        if not self._has_advanced:
            self._has_advanced = True
            self.monitor.check_followed()
        self._make_due_changes()

    def check_training(self) -> None:
        """Check that the optimizer trains the weights in scope; warn about those that nothing trains.

        Raises:
            RuntimeError: If something else trains them.
        """
        self.monitor.check_followed()
        if self._has_advanced:
            self.monitor.warn_of_untrained()

    def detach(self) -> None:
        """Leave model and optimizer as they were."""
        self._hooks.detach()

    def take_fingerprints(self) -> dict[str, str]:
        """Return fingerprints of the weights that the model has now, which the state belongs to from now on."""
        self._hooks.sync()
        to_array = current_backend().to_array
        self.fingerprints = {name: fingerprint(to_array(each)) for name, each in self._variables.items()}
        return self.fingerprints

    def prune_if_due(self) -> None:
        """Run the pruning steps that are due."""
        if not self.is_due():
            return
        self._hooks.sync()
        self.check_training()
        self._sparsity = None
        super().prune_if_due()
        self._hold_masks()
        self.monitor.record_checksums()

    def state_dict(self, *, gradient_window: bool = True) -> dict[str, Any]:
        """Return the progress, and which weights it belongs to."""
        return {**super().state_dict(gradient_window=gradient_window), "fingerprints": self.fingerprints}

    def resume(self, parsed: ParsedState) -> None:
        """Resume from a state, at the same epoch; call it before :meth:`begin`. No weight is changed."""
        super().resume(parsed)
        self._sparsity = None

    def _resumed_step(self, parsed: ParsedState) -> int:
        """Return the step at which ``fit`` resumes."""
        return self.step

    def resume_without_state(self, why: str) -> None:
        """Resume in the middle of a schedule from the zeros of the weights; ``why`` is part of the warning."""
        if any([pruning.resume_from_zeros(self.step) for pruning in self.prunings]):
            self._sparsity = None
            self.logger.warning(
                "training resumes at step %d, but %s: every weight in scope that is exactly zero counts as pruned "
                "(sparsity %.4f), and the gradient window starts empty",
                self.step,
                why,
                self.sparsity,
            )

    def _check_attached(self) -> None:
        if not self._hooks.is_attached:
            raise RuntimeError(
                "the pruning hooks were removed from the training step during fit, because another callback called "
                "model.make_train_function, train_on_batch or compile; pruned weights would regrow. Remove that call"
            )
        if not self._hooks.is_followed:
            raise RuntimeError(
                "another callback replaced model.optimizer during fit, and this callback does not follow the new "
                "optimizer; pruned weights would regrow. Replace the optimizer between two fits, and resume with "
                "initial_epoch=..."
            )

    def _make_due_changes(self) -> None:
        self.fingerprints = None
        self.prune_if_due()
        coming = range(self.step, self.step + self._steps_per_execution)
        self._taps = any(pruning.needs_gradients(step) for step in coming for pruning in self.prunings)
        self._hooks.tap(self._taps)
        self._changes.make_due(self.step)

    def _hold_masks(self) -> None:
        self._sparsity = None
        masks = self.masks
        self._hooks.hold([masks.get(name) for name in self._trained])


def new_session(
    modifiers: Sequence[Any],
    model: Any,
    optimizer: Any,
    *,
    steps_per_epoch: int,
    step: int,
    sampler: GradientSampler | None,
    verbose: bool,
    metrics: Callable[[], Mapping[str, float]],
    ranks: Ranks,
) -> TrainingSession:
    """Attach the modifiers of a recipe to a model, but not to its training step yet.

    Args:
        modifiers: The settings of all modifiers.
        model: The model, built.
        optimizer: The optimizer that trains it.
        steps_per_epoch: Training steps per epoch.
        step: Completed training steps so far.
        sampler: Where gradient samples come from; None uses those of training.
        verbose: Whether to print a line for each pruning step.
        metrics: Returns metrics to add to those of an epoch.
        ranks: The processes that train the model.

    Raises:
        TypeError: If the optimizer is not of Keras 3.
        ValueError: If a modifier does not fit the model, or the optimizer does not train the weights in scope.
    """
    check_optimizer(optimizer)
    if not optimizer.built:
        with _strategy_scope(model):
            optimizer.build(model.trainable_variables)
    logged: set[str] = set()
    prunings = attached(
        gradual_in_order(each for each in modifiers if isinstance(each, PruningSettings)),
        lambda settings, name: KerasPruning(
            settings,
            model,
            steps_per_epoch=steps_per_epoch,
            optimizer=optimizer,
            sampler=sampler,
            verbose=verbose,
            name=name,
            logged=logged,
            ranks=ranks,
        ),
    )
    # a modifier that only holds zeros needs no optimizer
    check_trained([each.variables for each in prunings if not each.holds_zeros_only], optimizer)
    is_trained = {id(variable) for leaf in innermost(optimizer) for variable in trained_by(leaf)}
    trained = {name: variable for name, variable in _in_scope(prunings).items() if id(variable) in is_trained}
    forms = {name: form for pruning in prunings for name, form in pruning.forms.items()}
    hooks = current_backend().Hooks(
        model, optimizer, list(trained.values()), [forms[name].axes for name in trained], metrics=metrics
    )
    others = [each for each in modifiers if not isinstance(each, PruningSettings)]
    return TrainingSession(
        prunings,
        TrainingChanges(
            others, model, optimizer, hooks, steps_per_epoch=steps_per_epoch, logger=logger_of(ranks, _logger)
        ),
        hooks,
        trained,
        steps_per_epoch=steps_per_epoch,
        steps_per_execution=int(model.steps_per_execution),
        step=step,
    )


def _in_scope(prunings: Sequence[KerasPruning]) -> dict[str, Any]:
    return {name: variable for pruning in prunings for name, variable in pruning.variables.items()}


def _strategy_scope(model: Any) -> AbstractContextManager[Any]:
    strategy = getattr(model, "distribute_strategy", None)
    return nullcontext() if strategy is None else strategy.scope()
