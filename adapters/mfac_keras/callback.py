"""The entry point: a callback that runs the modifiers of a recipe inside ``model.fit``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import numpy.typing as npt

from mfac_core.ranks import Alone, Ranks
from mfac_core.ranks.agreement import together
from mfac_core.ranks.logs import logger_of
from mfac_core.recipe import Recipe
from mfac_core.session.rank_states import file_of_rank
from mfac_keras.backends import current_backend
from mfac_keras.clock import TrainingClock
from mfac_keras.conditions import check_model, check_optimizer, checked_verbose, refuse_keras_2
from mfac_keras.end_of_fit import call_at_end_of_fit
from mfac_keras.rank_states import read_states_of_ranks
from mfac_keras.recipes import modifiers_of
from mfac_keras.resuming import resume
from mfac_keras.sampling import GradientSampler
from mfac_keras.session import TrainingSession, new_session
from mfac_keras.state_file import SavedState, check_state, read_state, write_state

__all__ = ["MFACPruningCallback"]

_logger = logging.getLogger("mfac_keras")


class MFACPruningCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Prunes a model while ``model.fit`` trains it.

    After ``fit`` the model is an ordinary one: no wrappers, no custom objects, zeros where weights were pruned. A
    training step is one batch, also with gradient accumulation.

    Args:
        recipe: Path of a recipe, the text of one, or a :class:`mfac_core.Recipe`.
        sampler: Batches to sample gradients from at each pruning step, see
            :class:`mfac_keras.sampling.GradientSampler`; ``None`` uses the gradients of training.
        loss: The loss of the sampled batches; ``None`` is the loss that the model was compiled with.
        optimizer: The optimizer that trains the weights in scope, if it is not ``model.optimizer``.
        state_path: The file of the pruning state: written after each epoch, read when a later run resumes. Of several
            processes the first writes it, and process 3 of 8 writes ``<state_path>.rank-3-of-8``.
        save_window: Whether to save the gradient window too; otherwise a resumed run collects a new one.
        steps_per_epoch: Training steps per epoch, for data whose length Keras does not know.
        verbose: 1 prints a line for each pruning step, 0 does not; the log has the line either way.
        recipe_variables: Values that override those of the recipe's variables.
        unsupported: ``error`` refuses modifiers that are known but not supported, such as quantization; ``skip`` leaves
            them out, with a warning.
        **recipe_keys: Instead of a recipe, the keys of an ``MFACPruningModifier``: ``final_sparsity``, ``end_epoch``,
            ``num_grads``, ``fisher_block_size``, ``damp``, ...

    Raises:
        RecipeError: If the recipe or a key is wrong; the message names the key, the rule and the cure.
        SettingError: If ``steps_per_epoch`` is not a positive integer.
        TypeError: If neither a recipe nor keys are given, or both, or if the optimizer or the loss belongs to Keras 2.

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
        verbose: int | str = 1,
        recipe_variables: Mapping[str, object] | None = None,
        unsupported: Literal["error", "skip"] = "error",
        **recipe_keys: Any,
    ) -> None:
        super().__init__()
        self._modifiers = modifiers_of(recipe, recipe_keys, recipe_variables, unsupported)
        if loss is not None and sampler is None:
            raise TypeError("loss applies to sampled batches only; pass the batches as well, as sampler=dataset")
        refuse_keras_2("the loss", loss)
        if optimizer is not None:
            check_optimizer(optimizer)
        self._sampler = None if sampler is None else GradientSampler(sampler, loss)
        self._given_optimizer = optimizer
        self._state_path = None if state_path is None else Path(state_path)
        self._save_window = save_window
        self._clock = TrainingClock(steps_per_epoch)
        self._verbose = checked_verbose(verbose)
        self._session: TrainingSession | None = None
        self._last_session: TrainingSession | None = None
        self._pruned_model: Any = None
        self._is_testing = False
        self._is_saved = False
        self._keeps_previous = True
        self._ended: TrainingSession | None = None
        self._ranks: Ranks = Alone()

    @property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The current masks by variable path, True keeps; after ``fit``, the last ones."""
        session = self._session or self._last_session
        return {} if session is None else session.masks

    @property
    def sparsity(self) -> float:
        """Fraction of all weights in scope that is pruned and zero, counted from the current weights."""
        session = self._session or self._last_session
        return 0.0 if session is None else session.zeros().sparsity

    def set_model(self, model: Any) -> None:
        """Set the model to train; Keras calls this.

        Args:
            model: The model.

        Raises:
            TypeError: If it is not a model of Keras 3.
        """
        super().set_model(model)
        check_model(self.model)

    def close(self) -> None:
        """Detach from model and optimizer; ``fit`` does so by itself, even if a training step raises."""
        if self._session is not None:
            self._session.detach()
            self._last_session, self._session = self._session, None
            self._pruned_model = self._model

    def on_train_begin(self, logs: Any = None) -> None:
        """Detach from an earlier run that was interrupted, and check that this one is supported.

        Args:
            logs: Not used.

        Raises:
            ValueError: If ``steps_per_epoch`` differs from the number of steps that Keras knows.
            NotImplementedError: If training in this way is not supported.
        """
        self._clock.begin_fit((self.params or {}).get("steps"))
        self.close()
        if self._pruned_model is not self._model:
            self._last_session = None
        self._keeps_previous = True
        self._ranks = current_backend().ranks(self._model)
        current_backend().refuse_unsupported(self._model)
        self._ended = None
        call_at_end_of_fit(self._model, self._warn_of_restored)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Attach to the model before the first epoch, after other callbacks have restored weights.

        Args:
            epoch: Completed epochs.
            logs: Not used.

        Raises:
            ValueError: If this callback is in the list of callbacks twice.
        """
        if self._clock.epoch == epoch:
            raise ValueError("the same MFACPruningCallback is among the callbacks of fit twice; remove one of them")
        self._begin_epoch(epoch)
        if self._session is None and self._model.built:
            self._attach()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Warn before the first step of an epoch if another callback has written into pruned weights.

        Args:
            batch: Number of the first batch of the execution, from 0.
            logs: Not used.
        """
        if not self._clock.steps_in_epoch and self._session is not None:
            self._session.monitor.warn_of_regrown(self._session.zeros())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Collect the gradients of the last execution, and prune if a pruning step is due.

        Args:
            batch: Number of the last batch of the execution, from 0.
            logs: Gains ``sparsity``.
        """
        self._clock.count(batch + 1)
        if self._session is None:
            self._attach()  # built by its first batch
        else:
            self._session.advance(self._clock.step)
            if batch + 1 == self.params.get("steps"):
                self._save()  # before BackupAndRestore, in either order
        if logs is not None:
            logs["sparsity"] = 0.0 if self._session is None else self._session.sparsity

    def on_test_begin(self, logs: Any = None) -> None:
        """Stop adding to the metrics, which belong to an evaluation now.

        Args:
            logs: Not used.
        """
        self._is_testing = True

    def on_test_end(self, logs: Any = None) -> None:
        """Add to the metrics again, which belong to training now.

        Args:
            logs: Not used.
        """
        self._is_testing = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Check that the optimizer trains the weights in scope, and save the pruning state.

        Args:
            epoch: The epoch that has ended, from 0.
            logs: Gains ``sparsity``, counted from the weights.

        Raises:
            RuntimeError: If something else trains them.
        """
        self._clock.end_epoch()
        if self._session is not None:
            self._session.check_training()
        if logs is not None:
            logs["sparsity"] = self._sparsity_now()
        self._save()

    def on_train_end(self, logs: Any = None) -> None:
        """Detach, and warn if pruning is not complete or another callback has made pruned weights nonzero.

        Args:
            logs: Not used.
        """
        if self._clock.epoch is None:
            self._look_back()
            return
        session = self._session
        if session is not None:
            session.take_fingerprints()
        self.close()
        if session is None:
            self._logger.warning(
                "fit ended before pruning began: the length of the data is known only after the first epoch; pass "
                "steps_per_epoch=... to MFACPruningCallback"
            )
            return
        session.warn_of_unfinished("fit ended")
        self._ended = session
        self._warn_of_restored()

    @property
    def _logger(self) -> logging.Logger:
        return logger_of(self._ranks, _logger)

    def _warn_of_restored(self) -> None:
        # called twice: a callback that restores weights may come before this one or after it
        if self._ended is not None:
            self._ended.monitor.warn_of_regrown(self._ended.zeros(), after_fit=True)

    def _begin_epoch(self, epoch: int) -> None:
        self._clock.begin_epoch(epoch)
        self._is_saved = False
        if self._clock.steps_per_epoch is None and self._clock.first_epoch:
            steps = (int(saved.state["steps_per_epoch"]) for saved in self._saved_states())
            self._clock.steps_per_epoch = next(steps, None)

    def _attach(self) -> None:
        steps_per_epoch, epoch = self._clock.steps_per_epoch, self._clock.epoch
        if steps_per_epoch is None:
            if epoch:
                raise ValueError(
                    f"training resumes at epoch {epoch} with data of unknown length; pass steps_per_epoch=... to "
                    "MFACPruningCallback, or the state_path of the run that is resumed"
                )
            return
        with together(self._ranks, "attaching the pruning callback"):
            session = self._new_session(steps_per_epoch)
        self._session = session
        self._session.begin()

    def _new_session(self, steps_per_epoch: int) -> TrainingSession:
        session = new_session(
            self._modifiers,
            self.model,
            self.model.optimizer if self._given_optimizer is None else self._given_optimizer,
            steps_per_epoch=steps_per_epoch,
            step=self._clock.step,
            sampler=self._sampler,
            verbose=self._verbose,
            metrics=self._metrics_now,
            ranks=self._ranks,
        )
        if self._clock.first_epoch:
            self._resume(session)
        elif self._last_session is not None and self.sparsity:
            self._logger.warning(
                "this callback has pruned in an earlier fit (sparsity %.4f) and starts over at epoch 0: its masks are "
                "released, and weights regrow until they are pruned again; to resume, pass initial_epoch=... to fit",
                self.sparsity,
            )
        elif self._state_path is not None:
            self._warn_of_replacing(self._state_path)
        session.log_plan(sampled=self._sampler is not None, epochs=self.params.get("epochs"))
        return session

    def _look_back(self) -> None:
        """Restore masks and sparsity after a fit without an epoch: its training was complete before it began."""
        epoch = getattr(self.model, "_initial_epoch", None) or self.params.get("epochs") or 0
        if not epoch or not self.model.built:
            return
        self._begin_epoch(epoch)
        steps_per_epoch = self._clock.steps_per_epoch
        if steps_per_epoch is None:
            self._logger.warning(
                "there was no epoch left to train, so the masks and the sparsity of the earlier run are unknown; pass "
                "steps_per_epoch=... to MFACPruningCallback, or the state_path of that run"
            )
            return
        self._last_session, self._pruned_model = self._new_session(steps_per_epoch), self._model
        self._last_session.take_fingerprints()

    def _warn_of_replacing(self, state_path: Path) -> None:
        if state_path.exists():
            state = read_state(state_path, check_state)
            self._logger.warning(
                "%s holds the state of a run at step %d, which will be replaced, because this fit starts at epoch 0; "
                "to resume, use BackupAndRestore together with this callback, or pass initial_epoch=... to fit",
                state_path,
                state["step"],
            )

    def _metrics_now(self) -> dict[str, float]:
        if self._is_testing:
            return {}
        rate = None if self._session is None else self._session.learning_rate
        return {"sparsity": self._sparsity_now()} | ({} if rate is None else {"learning_rate": rate})

    def _sparsity_now(self) -> float:
        return 0.0 if self._session is None else self._session.zeros().sparsity

    def _resume(self, session: TrainingSession) -> None:
        found = resume(session, self._saved_states())
        # a later state than the one that was found is replaced
        self._keeps_previous = found is None or not found.is_previous

    def _saved_states(self) -> Iterator[SavedState]:
        if self._last_session is not None:
            yield SavedState(self._last_session.state_dict())
        if self._state_path is not None:
            yield from read_states_of_ranks(self._state_path, check_state, self._ranks)

    def _save(self) -> None:
        if self._state_path is None or self._session is None or self._is_saved:
            return
        self._session.take_fingerprints()
        state = self._session.state_dict(gradient_window=self._save_window)
        path = file_of_rank(self._state_path, self._ranks.rank, self._ranks.size)
        write_state(path, state, keep_previous=self._keeps_previous)
        self._is_saved = self._keeps_previous = True
