"""The entry point: a recipe's modifiers at work inside ``model.fit``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from mfac_core.recipe import Recipe, named_in_errors
from mfac_core.recipe.naming import modifier_names
from mfac_core.schedules.pruning import checked_steps_per_epoch
from mfac_core.session.plan import plan_model
from mfac_core.settings.pruning import PruningSettings
from mfac_keras.backends import current_backend
from mfac_keras.conditions import check_model, check_optimizer, check_trained, refuse_keras_2
from mfac_keras.end_of_fit import call_at_end_of_fit
from mfac_keras.live_pruning import LivePruning, variables_in_scope
from mfac_keras.optimizers import innermost, trained_by
from mfac_keras.recipes import modifiers_of
from mfac_keras.resuming import resume
from mfac_keras.sampling import GradientSampler
from mfac_keras.session import TrainingSession, check_state
from mfac_keras.state_file import SavedState, read_state, read_states, write_state
from mfac_keras.training_changes import TrainingChanges

__all__ = ["MFACPruningCallback"]

_HELD = (
    "Something has written other weights into the model between two training steps: another callback (one that calls "
    "set_weights, load_weights or assign), or an optimizer that this callback does not follow. The masks are held, so "
    "the next training step sets these weights to zero; let it write before the first pruning step, or zeros where "
    "the callback's masks are False"
)
_LEFT = (
    "Another callback has put earlier, denser weights back at the end of fit (EarlyStopping with "
    "restore_best_weights?), or an optimizer that this callback does not follow has trained them. They are left as "
    "they are; let that callback choose among the epochs after the last pruning step, which EarlyStopping does with "
    "start_from_epoch, or pass that optimizer as optimizer=..."
)

_logger = logging.getLogger("mfac_keras")


class MFACPruningCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Prunes a model while ``model.fit`` trains it.

    After ``fit`` the model is plain: no wrappers, no custom objects, zeros where weights were pruned. A training step
    is one batch, also with gradient accumulation.

    Args:
        recipe: Path of a recipe, the text of one, or a :class:`mfac_core.Recipe`.
        sampler: Batches to sample gradients from at each pruning step, see
            :class:`mfac_keras.sampling.GradientSampler`; ``None`` takes the gradients of training.
        loss: The loss of the sampled batches; ``None`` is the one that the model was compiled with.
        optimizer: The optimizer that trains the weights in scope, where it is not ``model.optimizer``.
        state_path: Where to keep the state of pruning, written after each epoch, so that a resumed run goes on.
        save_window: Whether the gradient window belongs to that state; without it, it is collected anew.
        steps_per_epoch: Training steps per epoch, for data of which Keras does not know the length.
        verbose: 1 prints a line for each pruning step, 0 does not; it is logged either way.
        recipe_variables: Values to use instead of those of the recipe's variables.
        unsupported: What to do with a modifier of the recipe that is out of scope, such as one that quantizes:
            ``error``, or ``skip`` it with a warning.
        **recipe_keys: In place of a recipe, the keys of an ``MFACPruningModifier``: ``final_sparsity``, ``end_epoch``,
            ``num_grads``, ``fisher_block_size``, ``damp``, ...

    Raises:
        RecipeError: If the recipe or a key is wrong; the message names the key, the rule and the cure.
        SettingError: If ``steps_per_epoch`` is no positive integer.
        TypeError: If there is neither a recipe nor keys, or both, or the optimizer or the loss is one of Keras 2.

    Example:
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        >>> model.compile("sgd", "mse")
        >>> x, y = np.ones([64, 8], "float32"), np.ones([64, 4], "float32")
        >>> callback = MFACPruningCallback(final_sparsity=0.5, start_epoch=1, end_epoch=2, num_grads=2, verbose=0)
        >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])
        >>> int((model.layers[0].kernel.numpy() == 0).sum()), history.history["sparsity"][-1]
        (16, 0.5)
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | Recipe | None = None,
        *,
        sampler: Any = None,
        loss: Any = None,
        optimizer: Any = None,
        state_path: str | os.PathLike[str] | None = None,
        save_window: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 1,
        recipe_variables: Mapping[str, object] | None = None,
        unsupported: Literal["error", "skip"] = "error",
        **recipe_keys: Any,
    ) -> None:
        super().__init__()
        self._modifiers = modifiers_of(recipe, recipe_keys, recipe_variables, unsupported)
        if loss is not None and sampler is None:
            raise TypeError("loss is the loss of sampled batches; pass the batches too, as sampler=dataset")
        refuse_keras_2("the loss", loss)
        if optimizer is not None:
            check_optimizer(optimizer)
        self._sampler = None if sampler is None else GradientSampler(sampler, loss)
        self._given_optimizer = optimizer
        self._state_path = None if state_path is None else Path(state_path)
        self._save_window = save_window
        self._given_steps_per_epoch = None if steps_per_epoch is None else checked_steps_per_epoch(steps_per_epoch)
        self._verbose = verbose
        self._session: TrainingSession | None = None
        self._last_session: TrainingSession | None = None
        self._pruned_model: Any = None
        self._begun: int | None = None
        self._counted_steps: int | None = None
        self._first_epoch: int | None = None
        self._seen = 0
        self._epoch = 0
        self._is_testing = False
        self._is_saved = False
        self._keeps_previous = True
        self._ended: TrainingSession | None = None

    @property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The masks held now by variable path, True keeps; those of the end once ``fit`` is over."""
        session = self._session or self._last_session
        return {} if session is None else session.masks

    @property
    def sparsity(self) -> float:
        """Fraction of all weights in scope that is pruned and zero, counted from the weights that the model has now."""
        session = self._session or self._last_session
        return 0.0 if session is None else session.zeros().sparsity

    def set_model(self, model: Any) -> None:
        """Take the model that is going to be trained; Keras calls this.

        Args:
            model: The model.

        Raises:
            TypeError: If it is not a model of Keras 3.
        """
        super().set_model(model)
        check_model(self.model)

    def close(self) -> None:
        """Leave model and optimizer as they were; ``fit`` does so by itself, also when a training step raises."""
        if self._session is not None:
            self._session.detach()
            self._last_session, self._session = self._session, None
            self._pruned_model = self._model

    def on_train_begin(self, logs: Any = None) -> None:
        """Forget an earlier run that was interrupted.

        Args:
            logs: Not used.

        Raises:
            ValueError: If an epoch has another number of steps than was given.
        """
        self._check_steps_per_epoch()
        self.close()
        if self._pruned_model is not self._model:
            self._last_session = None
        self._counted_steps = self._first_epoch = self._begun = None
        self._keeps_previous = True
        current_backend().refuse_unsupported(self._model)
        self._ended = None
        call_at_end_of_fit(self._model, self._warn_of_restored)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Attach to the model before its first epoch, once every other callback has restored what it restores.

        Args:
            epoch: Completed epochs.
            logs: Not used.

        Raises:
            ValueError: If this callback is in the list of callbacks twice.
        """
        if self._begun == epoch:
            raise ValueError("the same MFACPruningCallback stands twice among the callbacks of fit; leave one of them")
        self._begun = epoch
        self._is_saved = False
        self._epoch, self._seen = epoch, 0
        if self._first_epoch is None:
            self._first_epoch = epoch
        if self._session is None and self._model.built:
            self._attach(step_of_epoch=0)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Look before the first step of an epoch, when all others have written what they write, whether zeros are left.

        Args:
            batch: Number of the first batch of the execution, from 0.
            logs: Not used.
        """
        if not self._seen and self._session is not None:
            self._session.warn_of_regrown(_HELD)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Take the gradients of the steps that were made, and prune if it is due.

        Args:
            batch: Number of the last batch of the execution, from 0.
            logs: Gains ``sparsity``.
        """
        known = self._steps_per_epoch()
        self._seen = batch + 1 if known is None else min(batch + 1, known)
        if self._session is None:
            self._attach(step_of_epoch=self._seen)  # built by its first batch
        else:
            self._session.advance(self._epoch * self._session.steps_per_epoch + self._seen)
            if batch + 1 == self.params.get("steps"):
                self._save()  # before BackupAndRestore, in either order
        if logs is not None:
            logs["sparsity"] = 0.0 if self._session is None else self._session.sparsity

    def on_test_begin(self, logs: Any = None) -> None:
        """Know that metrics are those of an evaluation.

        Args:
            logs: Not used.
        """
        self._is_testing = True

    def on_test_end(self, logs: Any = None) -> None:
        """Know that metrics are those of training again.

        Args:
            logs: Not used.
        """
        self._is_testing = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save the state of pruning.

        Args:
            epoch: The epoch that has ended, from 0.
            logs: Gains ``sparsity``, counted from the weights.

        Raises:
            RuntimeError: If the optimizer is not the one that trains.
        """
        if self._counted_steps is None and self._seen:
            self._counted_steps = self._seen
        if self._session is not None:
            self._session.check_followed()
            self._session.warn_of_untrained()
        if logs is not None:
            logs["sparsity"] = self._sparsity_now()
        self._save()

    def on_train_end(self, logs: Any = None) -> None:
        """Detach: a plain model remains.

        Args:
            logs: Not used.
        """
        if self._first_epoch is None:
            self._look_back()
            return
        session = self._session
        if session is not None:
            session.sign()
        self.close()
        if session is None:
            _logger.warning(
                "fit ended before pruning began: the length of the data is known only after the first epoch; pass "
                "steps_per_epoch=... to MFACPruningCallback"
            )
            return
        for pruning in session.prunings:
            unfinished = pruning.unfinished("fit ended", session.step)
            if unfinished:
                _logger.warning("%s", unfinished)
        self._ended = session
        self._warn_of_restored()

    def _check_steps_per_epoch(self) -> None:
        given, known = self._given_steps_per_epoch, (self.params or {}).get("steps")
        if given is not None and known is not None and given != known:
            raise ValueError(
                f"steps_per_epoch is {given} for MFACPruningCallback, and an epoch of this fit has {known} steps; "
                "leave it out where Keras knows the length of the data"
            )

    def _warn_of_restored(self) -> None:
        # Called twice, as a callback that restores weights may come before this one or after it.
        if self._ended is not None:
            self._ended.warn_of_regrown(_LEFT)

    def _attach(self, step_of_epoch: int) -> None:
        steps_per_epoch = self._steps_per_epoch()
        if steps_per_epoch is None:
            if self._epoch:
                raise ValueError(
                    f"training goes on at epoch {self._epoch} with data of unknown length; pass steps_per_epoch=... to "
                    "MFACPruningCallback, or the state_path of the run that is resumed"
                )
            return
        self._session = self._new_session(steps_per_epoch, step_of_epoch)
        self._session.begin()

    def _new_session(self, steps_per_epoch: int, step_of_epoch: int) -> TrainingSession:
        model = self.model
        optimizer = model.optimizer if self._given_optimizer is None else self._given_optimizer
        check_optimizer(optimizer)
        if not optimizer.built:
            with _scope(model):
                optimizer.build(model.trainable_variables)
        settings = [each for each in self._modifiers if isinstance(each, PruningSettings)]
        logged: set[str] = set()
        prunings = [
            self._live_pruning(each, steps_per_epoch, name, logged)
            for each, name in zip(settings, modifier_names(settings), strict=True)
        ]
        # zeros that are only held need no optimizer where nothing moves
        check_trained([each.variables for each in prunings if not each.only_holds], optimizer)
        others = [each for each in self._modifiers if not isinstance(each, PruningSettings)]
        forms = {name: form for pruning in prunings for name, form in pruning.forms.items()}
        trained = _trained(prunings, optimizer)
        hooks = current_backend().Hooks(
            model,
            optimizer,
            list(trained.values()),
            [forms[name].axes for name in trained],
            metrics=self._metrics_now,
        )
        changes = TrainingChanges(others, model, optimizer, hooks, steps_per_epoch=steps_per_epoch)
        session = TrainingSession(
            prunings,
            changes,
            hooks,
            trained,
            steps_per_epoch=steps_per_epoch,
            steps_per_execution=int(model.steps_per_execution),
            step=self._epoch * steps_per_epoch + step_of_epoch,
        )
        if self._first_epoch:
            self._resume(session)
        elif self._last_session is not None and self.sparsity:
            _logger.warning(
                "this callback has pruned in an earlier fit (sparsity %.4f) and begins anew at epoch 0: its masks are "
                "let go, and weights come back until it prunes them again; to go on, pass initial_epoch=... to fit",
                self.sparsity,
            )
        elif self._state_path is not None:
            self._warn_of_replacing(self._state_path)
        self._log_plan(prunings, others, changes, steps_per_epoch)
        return session

    def _look_back(self) -> None:
        """Know masks and sparsity of a training that was over before this fit, in which no epoch ran."""
        epoch = getattr(self.model, "_initial_epoch", None) or self.params.get("epochs") or 0
        if not epoch or not self.model.built:
            return
        self._first_epoch = self._epoch = epoch
        steps_per_epoch = self._steps_per_epoch()
        if steps_per_epoch is None:
            _logger.warning(
                "no epoch was left to train, and masks and sparsity of the training before are not known: pass "
                "steps_per_epoch=... to MFACPruningCallback, or the state_path of that run"
            )
            return
        self._last_session, self._pruned_model = self._new_session(steps_per_epoch, 0), self._model
        self._last_session.sign()

    def _live_pruning(
        self, settings: PruningSettings, steps_per_epoch: int, name: str, logged: set[str]
    ) -> LivePruning:
        with named_in_errors(settings):
            return LivePruning(
                settings,
                self.model,
                steps_per_epoch=steps_per_epoch,
                sampler=self._sampler,
                verbose=self._verbose > 0,
                name=name,
                logged=logged,
            )

    def _warn_of_replacing(self, state_path: Path) -> None:
        if state_path.exists():
            state = read_state(state_path, check_state)
            _logger.warning(
                "%s holds the state of a run at step %d, and will be replaced, because this fit begins anew at epoch "
                "0; to go on, use BackupAndRestore beside this callback, or pass initial_epoch=... to fit",
                state_path,
                state["step"],
            )

    def _log_plan(
        self,
        prunings: Sequence[LivePruning],
        others: Sequence[Any],
        changes: TrainingChanges,
        steps_per_epoch: int,
    ) -> None:
        plan = plan_model(
            [*(pruning.settings for pruning in prunings), *others],
            [
                {name: int(np.prod(variable.shape)) for name, variable in pruning.variables.items()}
                for pruning in prunings
            ],
            steps_per_epoch,
            epochs=self.params.get("epochs"),
            sampled=self._sampler is not None,
            trainable=changes.trainable,
        )
        for modifier, pruning in zip(plan.modifiers, prunings, strict=True):
            _logger.info("%s", modifier.summary(pruning.schedule))
        for note in plan.notes:
            _logger.info("%s", note)
        for warning in plan.warnings:
            _logger.warning("%s", warning)

    def _metrics_now(self) -> dict[str, float]:
        if self._is_testing:
            return {}
        rate = None if self._session is None else self._session.learning_rate
        return {"sparsity": self._sparsity_now()} | ({} if rate is None else {"learning_rate": rate})

    def _sparsity_now(self) -> float:
        return 0.0 if self._session is None else self._session.zeros().sparsity

    def _steps_per_epoch(self) -> int | None:
        if self._session is not None:
            return self._session.steps_per_epoch
        known = self._given_steps_per_epoch or (self.params or {}).get("steps") or self._counted_steps
        if known is None and self._first_epoch:
            known = next((saved.state["steps_per_epoch"] for saved in self._saved_states()), None)
        return None if known is None else int(known)

    def _resume(self, session: TrainingSession) -> None:
        found = resume(session, self._saved_states())
        # a later state, of a time that has not come to pass, is replaced
        self._keeps_previous = found is None or not found.is_previous

    def _saved_states(self) -> Iterator[SavedState]:
        if self._last_session is not None:
            yield SavedState(self._last_session.state_dict())
        if self._state_path is not None:
            yield from read_states(self._state_path, check_state)

    def _save(self) -> None:
        if self._state_path is None or self._session is None or self._is_saved:
            return
        self._session.sign()
        state = self._session.state_dict(window=self._save_window)
        write_state(self._state_path, state, keep_previous=self._keeps_previous)
        self._is_saved = self._keeps_previous = True


def _scope(model: Any) -> AbstractContextManager[Any]:
    strategy = getattr(model, "distribute_strategy", None)
    return nullcontext() if strategy is None else strategy.scope()


def _trained(prunings: Sequence[LivePruning], optimizer: Any) -> dict[str, Any]:
    trained = {id(variable) for leaf in innermost(optimizer) for variable in trained_by(leaf)}
    return {name: variable for name, variable in variables_in_scope(prunings).items() if id(variable) in trained}
