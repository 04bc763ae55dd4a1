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
from mfac_torch.sampling import SamplerArgument
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
    """Runs a recipe inside Lightning's ``Trainer``, with automatic or manual optimization.

    Checkpoints of the trainer include the pruning state, gathered from all ranks, and ``fit(ckpt_path=...)`` resumes
    from it, with any number of ranks: those of the strategies ``ddp`` and ``ModelParallelStrategy``. When training ends
    or fails, the model is a plain module again. The sparsity of each parameter is logged after each pruning step
    as ``ParamPruning/<name>``, and that of all parameters together after each epoch as ``sparsity``. Names are those of
    the ``LightningModule``.

    In the trainer's list of callbacks it moves behind all others except those that write checkpoints, so that it sees
    their changes. An average of the weights (``StochasticWeightAveraging``, ``WeightAveraging``,
    ``EMAWeightAveraging``) gets the zeros of the masks wherever it replaces the weights: in validation, in checkpoints,
    at the end. If anything else has restored denser weights by the end of training, a warning says so, and the weights
    stay as they are.

    Args:
        recipe: Path or text of a recipe, or a manager.
        steps_per_epoch: Optimizer steps per epoch; ``None`` computes it from the batches of the trainer and the number
            of batches that it accumulates. Pass it if the trainer does not know the number of batches, if the
            accumulation changes between epochs, or if manual optimization does not step once per batch.
        grad_sampler: Draws the gradient samples at each pruning step; ``None`` uses the gradients of training.
        gradient_window: Whether checkpoints include the gradient window. Without it they are smaller, and a resumed run
            has to refill its window.
        rng: Whether a resumed run also restores the random number generators of torch, Python and NumPy, which
            Lightning leaves as they are.

    Attributes:
        manager: The manager; ``Trainer(max_epochs=callback.manager.max_epochs)`` trains for the epochs of the recipe.

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
        grad_sampler: SamplerArgument | None = None,
        gradient_window: bool = True,
        rng: bool = False,
    ) -> None:
        self.manager = (
            recipe if isinstance(recipe, ScheduledModifierManager) else ScheduledModifierManager.from_yaml(recipe)
        )
        self._steps_per_epoch = steps_per_epoch
        self._grad_sampler = grad_sampler
        self._gradient_window = gradient_window
        self._rng = rng
        self._is_attached = False
        self._has_warned = False
        self._loaded: dict[str, Any] | None = None
        self._last_state: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move behind the other callbacks, and forget the state of an earlier run.

        The trainer loads the state in its checkpoint after this hook.
        """
        self._loaded = None
        if stage == "fit" and self in trainer.callbacks:
            # A new list, because the trainer is iterating over the old one.
            others = [callback for callback in trainer.callbacks if callback is not self]
            writers = [index for index, callback in enumerate(others) if _is_one_of(callback, "Checkpoint")]
            index = min(writers, default=len(others))
            trainer.callbacks = [*others[:index], self, *others[index:]]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the recipe: the optimizers exist by now, with the state of a checkpoint."""
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
            self.manager.load_state_dict(self._loaded.get("ranks", self._loaded), rng=self._rng)
            self._loaded = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Apply the masks to an average that has replaced the weights; its normalization statistics come after this."""
        self._prune_average(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Apply the masks to an average that is validated in place of the weights."""
        self._prune_average(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Apply the masks to an average that is saved in place of the weights."""
        self._prune_average(trainer, checkpoint["state_dict"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the sparsity of all weights in scope together."""
        pl_module.log("sparsity", self.manager.sparsity, sync_dist=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach from the module, and apply the masks to an average that has replaced the weights."""
        self._prune_average(trainer, pl_module, is_last=True)
        if self._is_attached:
            self._finalize(self._gathered(warn=False))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Warn about pruned weights that have become nonzero since training ended, in the module's own hooks too."""
        regrown = self.manager.regrown() if stage == "fit" else {}
        if regrown and not self._has_warned:
            _logger.warning(
                "%s pruned weights are not zero (%s): they regrew after the end of training, most likely because the "
                "best weights were restored; they are left unchanged, and mfac_torch.apply_masks(model, "
                "callback.manager) sets them to zero",
                f"{sum(regrown.values()):,}",
                join_names(regrown),
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach from a run that failed, perhaps on this rank alone."""
        if self._is_attached:
            self._finalize(self.manager.state_dict(gradient_window=self._gradient_window, warn=False))

    def state_dict(self) -> dict[str, Any]:
        """Return the pruning state for a checkpoint, of the current run or of the last one.

        The trainer calls this on every rank, and saves what rank 0 returns: the states of all ranks.
        """
        return self._gathered() if self._is_attached else self._last_state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until training starts."""
        self._loaded = state_dict

    def _gathered(self, *, warn: bool = True) -> dict[str, Any]:
        """Return the states of all ranks on rank 0, and nothing on the others; collective."""
        states = self.manager.gather_state_dicts(gradient_window=self._gradient_window, warn=warn)
        if len(states) > 1:
            return {"ranks": states}
        return states[0] if states else {}

    def _finalize(self, last_state: dict[str, Any]) -> None:
        # Checkpoints may be saved after the end. finalize() logs its own warning about weights that are not zero.
        self._last_state = last_state
        self._is_attached = False
        self.manager.finalize()
        self._has_warned = bool(self.manager.regrown())

    def _prune_average(self, trainer: Any, model_or_state: Any, *, is_last: bool = False) -> None:
        averages = _averages(trainer)
        masks = self.manager.masks
        if not averages or not masks:
            return
        if isinstance(model_or_state, Mapping):  # a module may save only some of its weights
            masks = {name: mask for name, mask in masks.items() if name in model_or_state}
        changed = apply_masks(model_or_state, masks)
        if changed and is_last:
            _logger.warning(
                "%s replaced the weights by an average in which %s pruned weights were not zero, so they were set to "
                "zero; start averaging after the last pruning step",
                ", ".join(averages),
                f"{changed:,}",
            )
        elif changed:
            _logger.info("%s: %s pruned weights of the average were set to zero", ", ".join(averages), f"{changed:,}")


class _TrainerLoggers:
    """The loggers of a trainer, with the interface that the manager expects."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def log_scalar(self, tag: str, value: float, step: int, /) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics({tag: value}, step=step)


def _averages(trainer: Any) -> list[str]:
    """Return the names of the callbacks that replace the weights by an average."""
    kinds = ("StochasticWeightAveraging", "WeightAveraging")
    return [type(callback).__name__ for callback in trainer.callbacks if _is_one_of(callback, *kinds)]


def _is_one_of(callback: Any, *names: str) -> bool:
    # By name, because `lightning` and `pytorch_lightning` have classes of their own, and older versions lack some.
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
    # Lightning steps after the last batch of an epoch, even if it has accumulated fewer batches.
    steps: int = math.ceil(batches / trainer.accumulate_grad_batches)
    return steps
