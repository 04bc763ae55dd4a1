"""Pruning inside Hugging Face's ``Trainer``: a callback that runs a recipe.

Needs the packages ``transformers`` and ``accelerate``.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.sampling import SamplerArgument
from mfac_torch.scalar_loggers import ScalarLoggers

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        "mfac_torch.transformers needs transformers and accelerate; install them with: "
        'pip install "mfac-core[transformers]"'
    ) from error

__all__ = ["STATE_FILE", "PruningCallback"]

STATE_FILE = "pruning_state.pt"
"""Name of the file with the pruning state in the folder of a checkpoint."""

_logger = logging.getLogger("mfac_torch")


class PruningCallback(TrainerCallback):  # type: ignore[misc]  # transformers may be absent where types are checked
    """Runs a recipe inside Hugging Face's ``Trainer``.

    Each checkpoint of the trainer gets a file :data:`STATE_FILE`, and ``train(resume_from_checkpoint=...)`` resumes
    from it. Of several ranks, each writes a file of its own, and the number of ranks may change. When training ends,
    the model is a plain module again; after a run that failed, call ``callback.manager.finalize()``. The logs of the
    trainer include the sparsity as ``sparsity``: in ``trainer.state.log_history``, and for the callbacks after this
    one. If the recipe sets the learning rate, the scheduler of the trainer has no effect.

    Args:
        recipe: Path or text of a recipe, or a manager.
        steps_per_epoch: Optimizer steps per epoch; ``None`` computes it from the batches of the trainer and the number
            of batches that it accumulates. Pass it if the data set has no length.
        grad_sampler: Draws the gradient samples at each pruning step; ``None`` uses the gradients of training.
        loggers: Get the sparsity of each parameter after a pruning step, as in ``ScheduledModifierManager.modify``.
        gradient_window: Whether checkpoints include the gradient window. Without it they are smaller, and a resumed run
            has to refill its window.
        resume_from_checkpoint: Folder of the checkpoint that ``train`` resumes from, if it is outside the
            ``output_dir`` of this run.

    Attributes:
        manager: The manager; ``TrainingArguments(num_train_epochs=callback.manager.max_epochs)`` trains for the epochs
            of the recipe.

    Raises:
        RecipeError: If the recipe is wrong.

    Example:
        >>> recipe = '''
        ... pruning_modifiers:
        ...   - !MFACPruningModifier
        ...     params: re:bert.encoder.*dense.weight
        ...     final_sparsity: 0.85
        ...     end_epoch: 3.0
        ... '''
        >>> callback = PruningCallback(recipe)
        >>> callback.manager.max_epochs
        3
    """

    def __init__(
        self,
        recipe: str | os.PathLike[str] | ScheduledModifierManager,
        *,
        steps_per_epoch: int | None = None,
        grad_sampler: SamplerArgument | None = None,
        loggers: ScalarLoggers | None = None,
        gradient_window: bool = True,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self.manager = (
            recipe if isinstance(recipe, ScheduledModifierManager) else ScheduledModifierManager.from_yaml(recipe)
        )
        self._steps_per_epoch = steps_per_epoch
        self._grad_sampler = grad_sampler
        self._loggers = loggers
        self._gradient_window = gradient_window
        self._resume_from = resume_from_checkpoint
        self._is_attached = False
        self._learning_rates: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the recipe, and resume from a checkpoint if the trainer does."""
        _refuse_best_model(args)
        self._finalize()  # a run that failed, or was restarted with a smaller batch size
        resumed = self._state_file(args, state) if state.global_step else None
        if self.manager.learning_rate_modifiers and resumed is None:
            _logger.info("the recipe sets the learning rate, so the scheduler of the trainer has no effect")
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])  # without warm-up
        self.manager.modify(
            kwargs["model"],
            getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]),  # what accelerate wraps
            steps_per_epoch=self._steps_per_epoch or _steps_per_epoch(args, kwargs["train_dataloader"]),
            grad_sampler=self._grad_sampler,
            loggers=self._loggers,
        )
        self._is_attached = True
        if resumed is not None:
            self.manager.load_state(resumed)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the learning rates of the optimizer step."""
        self._learning_rates = [group["lr"] for group in kwargs["optimizer"].param_groups]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore learning rates that the recipe sets and the trainer's scheduler has changed."""
        if self.manager.learning_rate_modifiers:
            for group, rate in zip(kwargs["optimizer"].param_groups, self._learning_rates, strict=True):
                group["lr"] = rate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the sparsity to the logs of training."""
        if not self._is_attached:
            return
        added = {"sparsity": self.manager.sparsity}
        if self.manager.learning_rate_modifiers and "learning_rate" in logs:
            added["learning_rate"] = float(self._learning_rates[0])
        logs.update(added)
        state.log_history[-1].update(added)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the pruning state in the checkpoint that the trainer has written; each rank saves its own."""
        folder = _checkpoint(args, state)
        # rank 0 may not have made the folder yet when another rank arrives here
        if state.is_hyper_param_search or (args.should_save and not folder.is_dir()):
            _logger.warning(
                "the pruning state is not saved: the trainer did not write its checkpoint to %s, as in a "
                "hyperparameter search",
                folder,
            )
            return
        self.manager.save_state(folder / STATE_FILE, gradient_window=self._gradient_window)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach from the module."""
        self._finalize()

    def _finalize(self) -> None:
        if self._is_attached:
            self._is_attached = False
            self.manager.finalize()

    def _state_file(self, args: Any, state: Any) -> Path:
        folders = [self._resume_from] if self._resume_from else [args.resume_from_checkpoint, _checkpoint(args, state)]
        files = [Path(folder) / STATE_FILE for folder in folders if isinstance(folder, str | os.PathLike)]
        for file in files:
            if file.exists():
                return file
        raise FileNotFoundError(
            f"training resumes at step {state.global_step} without a pruning state: {' and '.join(map(str, files))} "
            "not found; pass the folder of the checkpoint to PruningCallback as resume_from_checkpoint, or start a "
            "new run from the model in the checkpoint"
        )


def _refuse_best_model(args: Any) -> None:
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end would restore the weights of a checkpoint with another sparsity, usually from "
            "before pruning; remove it from TrainingArguments"
        )


def _steps_per_epoch(args: Any, batches: Any) -> int:
    try:
        # The last batches of an epoch make a step, even if they are fewer than the trainer accumulates.
        steps: int = math.ceil(len(batches) / args.gradient_accumulation_steps)
    except TypeError as error:
        raise ValueError(
            "the data set has no length, so the number of steps per epoch is unknown; pass steps_per_epoch to "
            "PruningCallback"
        ) from error
    return steps


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
