"""Pruning inside Lightning's ``Trainer``: a callback that runs a recipe.

Needs the package ``lightning`` or ``pytorch_lightning``.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

from mfac_core.weight_names import join_names
from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.sampling import GradSampler
from mfac_torch.zeros import apply_masks

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            'mfac_torch.lightning needs Lightning; install it with: pip install "mfac-core[lightning]"'
        ) from error

__all__ = ["PruningCallback"]

_logger = logging.getLogger("mfac_torch")


class PruningCallback(Callback):  # type: ignore[misc]  # Lightning may be absent where types are checked
    """Runs a recipe inside Lightning's ``Trainer``, automatic and manual optimization alike.

    Checkpoints of the trainer hold the state of pruning too, and ``fit(ckpt_path=...)`` goes on from there. When
    training ends, or breaks off, the model is a plain module again. After each pruning step the trainer's loggers are
    told the sparsity of each parameter as ``ParamPruning/<name>``, and after each epoch the sparsity of all of them
    together as ``sparsity``. Names are those of the ``LightningModule``.

    In the trainer's list of callbacks it goes behind all others but those that write checkpoints, wherever it was
    given, so that it sees what they have done. An average of the weights (``StochasticWeightAveraging``,
    ``WeightAveraging``, ``EMAWeightAveraging``) gets the zeros of the masks wherever it takes the place of the weights:
    in validation, in checkpoints, at the end. Where anything else has put denser weights back by the end of training, a
    warning says so, and they are left as they are.

    Args:
        recipe: Path or text of a recipe, or a manager.
        steps_per_epoch: Optimizer steps per epoch; ``None`` counts the batches of the trainer, as many as it
            accumulates for one step. Give it where the trainer does not know how many batches there are, where the
            accumulation changes between epochs, or where manual optimization does not step once per batch.
        grad_sampler: Draws the gradient samples at each pruning step; ``None`` takes the gradients of training.
        gradient_window: Whether checkpoints hold the gradient window. Without it they are smaller, and a resumed run
            has to fill its window anew.

    Attributes:
        manager: The manager; ``Trainer(max_epochs=callback.manager.max_epochs)`` trains as long as the recipe
            says.

    Raises:
        RecipeError: If the recipe is wrong.

    Example:
        >>> recipe = '''
        ... pruning_modifiers:
        ...   - !MFACPruningModifier
        ...     final_sparsity: 0.85
        ...     end_epoch: 10.0
        ... '''
        >>> callback = PruningCallback(recipe)
        >>> callback.manager.max_epochs
        10
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | ScheduledModifierManager,
        *,
        steps_per_epoch: int | None = None,
        grad_sampler: GradSampler | Mapping[str, Any] | None = None,
        gradient_window: bool = True,
    ) -> None:
        self.manager = (
            recipe if isinstance(recipe, ScheduledModifierManager) else ScheduledModifierManager.from_yaml(recipe)
        )
        self._steps_per_epoch = steps_per_epoch
        self._grad_sampler = grad_sampler
        self._gradient_window = gradient_window
        self._is_attached = False
        self._has_warned = False
        self._loaded: dict[str, Any] | None = None
        self._last_state: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Go behind the other callbacks, and forget the state of an earlier run.

        The trainer loads that of its checkpoint after this hook.
        """
        self._loaded = None
        if stage == "fit" and self in trainer.callbacks:
            # A new list: the trainer is just going through the old one.
            others = [callback for callback in trainer.callbacks if callback is not self]
            writers = [number for number, callback in enumerate(others) if _is_one_of(callback, "Checkpoint")]
            place = min(writers, default=len(others))
            trainer.callbacks = [*others[:place], self, *others[place:]]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the recipe: optimizers are there by now, and hold what a checkpoint remembers."""
        optimizers = trainer.optimizers
        self.manager.modify(
            pl_module,
            optimizers[0] if len(optimizers) == 1 else optimizers,
            steps_per_epoch=self._steps_per_epoch or _steps_per_epoch(trainer),
            epoch=trainer.current_epoch,
            grad_sampler=self._grad_sampler,
            loggers=_TrainerLoggers(trainer),
        )
        self._is_attached = True
        if self.manager.learning_rate_modifiers and trainer.lr_scheduler_configs:
            _logger.warning(
                "the recipe sets the learning rate and so does a scheduler of the LightningModule, which may undo it; "
                "keep one of the two"
            )
        if self._loaded is not None:
            self.manager.load_state_dict(self._loaded)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Give an average that has taken the place of the weights its zeros, as before normalization statistics."""
        self._hold_average(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Give an average that is validated in place of the weights its zeros; it keeps them afterwards."""
        self._hold_average(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Give an average that is saved in place of the weights its zeros."""
        self._hold_average(trainer, checkpoint["state_dict"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the sparsity of all weights in scope together."""
        pl_module.log("sparsity", self.manager.sparsity)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach: a plain module remains, and an average that has taken the place of the weights has their zeros."""
        self._hold_average(trainer, pl_module, is_last=True)
        self._finalize()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Say what has come back since training ended, in the hooks of the module too."""
        regrown = self.manager.regrown() if stage == "fit" else {}
        if regrown and not self._has_warned:
            _logger.warning(
                "%s pruned weights are not zero (%s): they came back after the end of training, most likely with best "
                "weights that were restored; they are left as they are, and mfac_torch.apply_masks(model, "
                "callback.manager) sets them to zero",
                f"{sum(regrown.values()):,}",
                join_names(regrown),
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach from a run that broke off."""
        self._finalize()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of pruning for a checkpoint: that of the run in progress, or that of the last one."""
        if not self._is_attached:
            return self._last_state
        return self.manager.state_dict(gradient_window=self._gradient_window)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training starts."""
        self._loaded = state_dict

    def _finalize(self) -> None:
        if self._is_attached:
            # Checkpoints may be saved after the end. What finalize finds, it says itself.
            self._last_state = self.manager.state_dict(gradient_window=self._gradient_window, warn=False)
            self._is_attached = False
            self.manager.finalize()
            self._has_warned = bool(self.manager.regrown())

    def _hold_average(self, trainer: Any, model_or_state: Any, *, is_last: bool = False) -> None:
        averages = _averages(trainer)
        masks = self.manager.masks
        if not averages or not masks:
            return
        if isinstance(model_or_state, Mapping):  # a module may save a part of its weights only
            masks = {name: mask for name, mask in masks.items() if name in model_or_state}
        changed = apply_masks(model_or_state, masks)
        if changed and is_last:
            _logger.warning(
                "%s has put an average in the place of the weights in which %s pruned weights were not zero, so they "
                "were set to zero; let averaging begin after the last pruning step to average pruned weights alone",
                ", ".join(averages),
                f"{changed:,}",
            )
        elif changed:
            _logger.info("%s: %s pruned weights of the average were set to zero", ", ".join(averages), f"{changed:,}")


class _TrainerLoggers:
    """The loggers of a trainer, in the form that the manager knows."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def log_scalar(self, tag: str, value: float, step: int, /) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics({tag: value}, step=step)


def _averages(trainer: Any) -> list[str]:
    """Return the names of the callbacks that put an average in the place of the weights."""
    kinds = ("StochasticWeightAveraging", "WeightAveraging")
    return [type(callback).__name__ for callback in trainer.callbacks if _is_one_of(callback, *kinds)]


def _is_one_of(callback: Any, *names: str) -> bool:
    # By name: `lightning` and `pytorch_lightning` have a class each, and older versions lack some.
    return any(each.__name__ in names for each in type(callback).__mro__)


def _steps_per_epoch(trainer: Any) -> int:
    batches = trainer.num_training_batches
    if math.isinf(batches):
        raise ValueError(
            "the trainer does not know how many batches an epoch has; pass steps_per_epoch to PruningCallback, or "
            "limit_train_batches to the Trainer"
        )
    if any(hasattr(callback, "going_to_accumulate_grad_batches") for callback in trainer.callbacks):
        raise ValueError(
            "a GradientAccumulationScheduler gives epochs different numbers of steps; pass steps_per_epoch to "
            "PruningCallback"
        )
    # Lightning makes a step after the last batch of an epoch too.
    steps: int = math.ceil(batches / trainer.accumulate_grad_batches)
    return steps
