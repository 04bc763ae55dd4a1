"""The entry point: the manager attaches the modifiers of a recipe to a model and its optimizers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from mfac_core.ranks import Alone
from mfac_core.ranks.logs import logger_of
from mfac_core.schedules.one_shot import one_shot_in_order
from mfac_core.session.live_pruning import combined_masks
from mfac_core.session.one_shot import attached_at_once, check_has_batches, prune_in_one_shot
from mfac_core.session.plan_log import log_plan
from mfac_core.session.session import Session, attached, gradual_in_order
from mfac_core.settings.checks import check_number
from mfac_core.settings.pruning import PruningSettings
from mfac_torch.batchnorm import RunningStatistics
from mfac_torch.checkpoint import load_checkpoint, write_checkpoint
from mfac_torch.conditions import (
    check_optimizers,
    check_trained,
    refuse_unsupported,
    unwrapped_optimizers,
    whole_steps,
)
from mfac_torch.finalization import current_zeros, reconcile, warn_of_replaced
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.modifier_list import ModifierList
from mfac_torch.rank_states import gathered_states
from mfac_torch.ranks import TorchRanks
from mfac_torch.refusals import model_and_ranks
from mfac_torch.sampling import GradSampler, SamplerArgument
from mfac_torch.scalar_loggers import ScalarLoggers, log_functions
from mfac_torch.selection import select_parameters
from mfac_torch.session import TrainingSession
from mfac_torch.sharded import reshard
from mfac_torch.state_files import states_beside, write_state
from mfac_torch.tensor_files import read_tensors
from mfac_torch.training_changes import TrainingChanges
from mfac_torch.wrappers import unwrapped

__all__ = ["ScheduledModifierManager"]

_logger = logging.getLogger("mfac_torch")


class ScheduledModifierManager(ModifierList):
    """Runs the modifiers of a recipe while a model is trained, or in one shot.

    Args:
        modifiers: The modifiers, such as ``[MFACPruningModifier(final_sparsity=0.85, end_epoch=10.0)]``.
        metadata: Plain values by name that :meth:`save` writes into the recipe.

    Raises:
        TypeError: If ``modifiers`` is a recipe, or an entry is not a modifier.
        ValueError: If there are no modifiers.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> manager = ScheduledModifierManager.from_yaml('''
        ... pruning_modifiers:
        ...   - !MFACPruningModifier
        ...     final_sparsity: 0.5
        ...     start_epoch: 1.0
        ...     end_epoch: 2.0
        ...     num_grads: 4
        ... ''')
        >>> optimizer = manager.modify(model, optimizer, steps_per_epoch=5)
        >>> for step in range(10):
        ...     optimizer.zero_grad()
        ...     nn.functional.mse_loss(model(torch.randn(16, 8)), torch.randn(16, 4)).backward()
        ...     optimizer.step()
        >>> manager.finalize(model)
        >>> int((model.weight == 0).sum())
        16
    """

    _model: nn.Module | None = None
    _is_finalized: bool = False
    _prunings: tuple[TorchPruning, ...] = ()
    _session: TrainingSession | None = None
    _loggers: ScalarLoggers | None = None
    _sampler: SamplerArgument | None = None
    _epoch: float = 0.0

    @property
    def initialized(self) -> bool:
        """Whether the manager is attached to a model."""
        return self._model is not None

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The current masks by parameter name: boolean, True keeps; empty before the first pruning step.

        They are complete on each rank; those of sharded parameters are in host memory.
        """
        return combined_masks(pruning.mask_tensors for pruning in self._prunings)

    @property
    def sparsity(self) -> float:
        """Fraction of all weights in scope that is pruned and zero, counted from the weights.

        Of sharded weights, those of this rank are counted; of the others, the masks.
        """
        return current_zeros(self._prunings).sparsity

    def regrown(self) -> dict[str, int]:
        """Return the parameters whose pruned weights are not all zero; also after :meth:`finalize`.

        Returns:
            The number of nonzero pruned weights by parameter name; empty if weights and masks agree.
        """
        return dict(current_zeros(self._prunings).regrown)

    def initialize(
        self,
        module: nn.Module,
        epoch: float = 0.0,
        loggers: ScalarLoggers | None = None,
        *,
        grad_sampler: SamplerArgument | None = None,
        **unsupported: object,
    ) -> None:
        """Store arguments for a later call of :meth:`modify`; nothing else changes.

        Args:
            module: The model.
            epoch: As in :meth:`modify`.
            loggers: As in :meth:`modify`.
            grad_sampler: As in :meth:`modify`.
            **unsupported: Not supported; anything but None raises an error.

        Raises:
            TypeError: If an argument has the wrong type or is not supported.
        """
        refuse_unsupported("initialize", unsupported)
        unwrapped(module)
        self._epoch, self._sampler = epoch, grad_sampler
        if loggers is not None:
            self.initialize_loggers(loggers)

    def initialize_loggers(self, loggers: ScalarLoggers | None) -> None:
        """Store loggers for a later call of :meth:`modify`.

        Args:
            loggers: As in :meth:`modify`.

        Raises:
            TypeError: If a logger has the wrong type.
        """
        log_functions(loggers)
        self._loggers = loggers

    def modify(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        steps_per_epoch: float,
        wrap_optim: Any = None,
        epoch: float | None = None,
        allow_parallel_module: bool = True,
        *,
        loggers: ScalarLoggers | None = None,
        grad_sampler: SamplerArgument | None = None,
        **unsupported: object,
    ) -> Any:
        """Attach the modifiers to a model and its optimizers; the training loop stays as it is.

        After an exception, manager, model and optimizers are unchanged, and the call can be repeated.

        Args:
            module: The model, in ``DistributedDataParallel`` or after ``fully_shard`` if there are several processes,
                each of which makes this call. Other wrappers (``DataParallel``, ``torch.compile``, Fabric's) are
                unwrapped.
            optimizer: The optimizer of the model, or a list of several, the first of which counts the steps. They have
                hooks until :meth:`finalize`. Wrappers of ``accelerate`` are unwrapped.
            steps_per_epoch: Optimizer steps per epoch: ``len(loader)``, or less with gradient accumulation. A fraction
                is rounded up, since the rest of an epoch is a batch too.
            wrap_optim: A ``GradScaler`` to return instead of the optimizer; it needs no change.
            epoch: Epoch at which training begins; fractions are allowed.
            allow_parallel_module: Has no effect: parameters have their names in the unwrapped model.
            loggers: Objects with ``log_scalar(tag, value, step)``, or TensorBoard's ``SummaryWriter``. They get the
                sparsity of each parameter after a pruning step, as ``ParamPruning/<name>``.
            grad_sampler: Draws gradient samples for each pruning step; ``None`` uses the gradients of training.
            **unsupported: Not supported; anything but None raises an error.

        Returns:
            ``wrap_optim`` if it is given, otherwise ``optimizer`` itself.

        Raises:
            RuntimeError: If the manager is attached already, or another one to the same optimizer.
            NotImplementedError: If the model is distributed in another way than by ``DistributedDataParallel`` or
                ``fully_shard``.
            SettingError: If a modifier does not fit the model, or ``steps_per_epoch`` or ``epoch`` is out of range.
            TypeError: If an argument has the wrong type or is not supported.
            ValueError: If no optimizer trains a parameter in scope, or the same optimizer is given twice.
        """
        refuse_unsupported("modify", unsupported)
        if isinstance(wrap_optim, int | float):
            raise TypeError(
                f"wrap_optim is the number {wrap_optim!r}; pass a GradScaler or nothing, and the epoch by name: "
                f"epoch={wrap_optim!r}"
            )
        if wrap_optim is not None and not callable(getattr(wrap_optim, "step", None)):
            raise TypeError(f"wrap_optim is {wrap_optim!r}, which has no step(); pass a GradScaler or nothing")
        self._check_not_attached()
        optimizers = check_optimizers(optimizer)
        model, ranks = model_and_ranks(module)
        logger = logger_of(ranks, _logger)
        sampler = self._sampler if grad_sampler is None else grad_sampler
        steps = whole_steps(steps_per_epoch, logger)
        start = self._epoch if epoch is None else epoch
        check_number("epoch", start, "epoch >= 0, at which training begins; fractions allowed", lambda x: x >= 0)
        attach = self._attaching(
            model, steps_per_epoch=steps, optimizers=optimizers, sampler=sampler, loggers=loggers, ranks=ranks
        )
        prunings = attached(gradual_in_order(modifier.settings for modifier in self.pruning_modifiers), attach)
        check_trained(prunings)
        others = [each.settings for each in self.modifiers if not isinstance(each.settings, PruningSettings)]
        changes = TrainingChanges(others, model, optimizers, steps_per_epoch=steps)
        log_plan(
            logger,
            prunings,
            others,
            steps,
            sampled=sampler is not None,
            trainable=changes.trainable,
            logged=self._logged,
        )
        session = TrainingSession(
            optimizers,
            prunings,
            changes,
            steps_per_epoch=steps,
            step=round(start * steps),
            ranks=ranks,
            module=module,
        )
        session.attach()
        self._model, self._prunings, self._session = model, prunings, session
        return optimizer if wrap_optim is None else wrap_optim

    def apply(
        self,
        module: nn.Module,
        epoch: float = math.inf,
        loggers: ScalarLoggers | None = None,
        finalize: bool = True,
        *,
        grad_sampler: SamplerArgument | None = None,
        recalibrate_batchnorm: bool = False,
        layers_at_once: int | None = None,
        **unsupported: object,
    ) -> None:
        """Prune in one shot, without training, to the sparsity that the recipe has at an epoch.

        Over several processes, each makes this call; after it, all have the same masks. After an exception, manager and
        model are unchanged.

        Args:
            module: As in :meth:`modify`.
            epoch: The epoch whose sparsity is reached; infinity for the final sparsity.
            loggers: As in :meth:`modify`.
            finalize: Whether to finalize at once. Otherwise, after fine-tuning, :meth:`finalize` sets pruned weights
                to zero once more.
            grad_sampler: Draws gradient samples; M-FAC needs it.
            recalibrate_batchnorm: Whether to recalibrate the running statistics of batch normalization afterwards, as
                :func:`mfac_torch.recalibrate_batchnorm` does, over at most 256 batches of the sampler. Otherwise a
                warning says that they are stale.
            layers_at_once: Number of parameters whose gradient samples are in memory at one time; ``None`` for all.
                M-FAC prunes groups of so many parameters in the order of the model, one after the other. Each group
                draws samples of its own, after the previous one was pruned. Needs ``global_sparsity: false``.
            **unsupported: Not supported; anything but None raises an error.

        Raises:
            RuntimeError: If the manager is attached already.
            NotImplementedError: If the model is distributed in another way than by ``DistributedDataParallel`` or
                ``fully_shard``.
            RankError: If another process fails.
            RecipeError: If there is no pruning modifier.
            SettingError: If a modifier does not fit the model or ``layers_at_once``, or a number is out of range.
            TypeError: If M-FAC or the recalibration has no sampler, or an argument has the wrong type or is not
                supported.
        """
        refuse_unsupported("apply", unsupported)
        self._check_not_attached()
        if epoch != math.inf:
            check_number("epoch", epoch, "epoch >= 0, or infinity for the end of the recipe", lambda x: x >= 0)
        settings = [modifier.settings for modifier in self.pruning_modifiers]
        groups = one_shot_in_order(settings, epoch)
        sampler = self._sampler if grad_sampler is None else grad_sampler
        check_has_batches(
            settings,
            sampler,
            recalibrate_batchnorm=recalibrate_batchnorm,
            cure="pass grad_sampler=GradSampler(data_loader, loss_fn) to apply()",
        )
        model, ranks = model_and_ranks(module)
        sampler = None if sampler is None else GradSampler.of(sampler)
        logged: set[str] = set()
        logger = logger_of(ranks, _logger)
        parts = attached_at_once(
            [at_once for _, at_once in groups],
            self._attaching(model, steps_per_epoch=1, sampler=sampler, loggers=loggers, ranks=ranks),
            layers_at_once=layers_at_once,
            names_of=lambda each: select_parameters(model, each.params, each.exclude, logged=logged, logger=logger),
        )
        prunings = tuple(pruning for each in parts for pruning in each)
        prune_in_one_shot(
            Session(prunings, logger=logger),
            groups,
            RunningStatistics(model, ranks),
            modifiers=settings,
            sampler=sampler,
            recalibrate_batchnorm=recalibrate_batchnorm,
            cure="mfac_torch.recalibrate_batchnorm(model, loader)",
            parts=parts,
        )
        self._model, self._prunings = model, prunings
        if finalize:
            self.finalize(module)

    def apply_structure(
        self,
        module: nn.Module,
        epoch: float = 0.0,
        loggers: ScalarLoggers | None = None,
        finalize: bool = False,
        **kwargs: object,
    ) -> None:
        """Do nothing: pruning does not change the structure of a model, so weights can be loaded as they are.

        Args:
            module: The model.
            epoch: Ignored.
            loggers: Ignored.
            finalize: Ignored.
            **kwargs: Ignored.

        Raises:
            TypeError: If the model is not a module.
        """
        unwrapped(module)

    def finalize(
        self,
        module: nn.Module | None = None,
        reset_loggers: bool = True,
        *,
        hold: bool | None = None,
        **unsupported: object,
    ) -> None:
        """Detach from model and optimizers; a plain module remains, whose pruned weights are exactly zero.

        If other code has written to the model after the last optimizer step, such as ``load_state_dict`` of the best
        epoch, pruned weights may have regrown. A warning counts them then, and ``hold`` decides what is done. A second
        call does nothing, nor does one after :meth:`apply`, which finalizes by itself.

        Args:
            module: The model, to check that it is the one that was modified.
            reset_loggers: Whether to drop the loggers that :meth:`initialize_loggers` has stored.
            hold: Whether to set regrown weights to zero again; otherwise they are left unchanged. ``None`` sets them to
                zero after ``apply(finalize=False)`` only.
            **unsupported: Not supported; anything but None raises an error.

        Raises:
            RuntimeError: If nothing was modified.
            ValueError: If ``module`` is another model.
            TypeError: If an argument is not supported.
        """
        refuse_unsupported("finalize", unsupported)
        if self._model is None and self._is_finalized:
            _logger.info("the manager is finalized already")
            return
        if self._model is None:
            raise RuntimeError("there is nothing to finalize; call modify() or apply() first")
        if module is not None and unwrapped(module) is not self._model:
            raise ValueError(
                "finalize() got a different model than modify() or apply() did; pass the same one, or none"
            )
        monitor = None
        if self._session is not None:
            monitor = self._session.monitor
            self._session.detach()
            self._session.warn_of_unfinished("finalized", monitor.missing_steps())
        reshard(self._model)
        warn_of_replaced(self._prunings, self._model)
        reconcile(self._prunings, hold, monitor)
        if reset_loggers:
            self._loggers = None
        self._session = None
        self._model = None
        self._is_finalized = True

    def state_dict(self, *, gradient_window: bool = True, warn: bool = True) -> dict[str, Any]:
        """Return everything a resumed run needs besides model and optimizers, as tensors and plain values.

        Call it between two optimizer steps, together with ``model.state_dict()`` and ``optimizer.state_dict()``. The
        state includes that of the random number generators of torch, Python and NumPy.

        No rank waits for another, so one of several ranks may call it alone. Its state has the masks and the progress,
        which are the same on all ranks, and its own part of the gradient windows.

        Args:
            gradient_window: Whether to include gradient windows. Without them files are small, and a resumed run prunes
                with the gradient samples that it collects from then on.
            warn: Whether to warn about pruned weights that are not zero. They are saved with the model as they are.

        Returns:
            The state; ``torch.load(weights_only=True)`` reads it.

        Raises:
            RuntimeError: If no run is in progress.
        """
        return self._running_session("state_dict").state_dict(gradient_window=gradient_window, warn=warn)

    def gather_state_dicts(self, *, gradient_window: bool = True, warn: bool = True) -> list[dict[str, Any]]:
        """Return the states of all ranks on rank 0, for a trainer that saves those of rank 0 only.

        Collective: every rank calls it. Rank 0 needs host memory for the complete gradient windows.

        Args:
            gradient_window: As in :meth:`state_dict`.
            warn: As in :meth:`state_dict`.

        Returns:
            What :meth:`state_dict` returns on each rank, in order; an empty list on ranks other than 0.

        Raises:
            RuntimeError: If no run is in progress.
            RankError: If another rank has failed.
        """
        session = self._running_session("gather_state_dicts")
        return gathered_states(session.ranks, lambda: session.state_dict(gradient_window=gradient_window, warn=warn))

    def load_state_dict(
        self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]], strict: bool = True, *, rng: bool = False
    ) -> None:
        """Resume from :meth:`state_dict`; call :meth:`modify` first, and on every rank.

        A state that was saved with another ``steps_per_epoch`` resumes at the same epoch, with a warning.

        The number of ranks may change. Each rank loads the states of one or several ranks of the same save, in any
        distribution. At the next optimizer step the ranks exchange the parts of the gradient windows, or drop them all
        and collect new gradient samples if a part is missing.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model, or a list of the states of
                several ranks.
            strict: Whether all of it must fit. Otherwise modifiers whose state does not fit start over, with a warning.
            rng: Whether to restore the random number generators of torch, Python and NumPy too, so that shuffling and
                dropout continue as in an uninterrupted run. They are restored on the ranks that load their own state,
                in a run with as many ranks; other ranks leave them as they are, with a warning.

        Raises:
            RuntimeError: If no run is in progress.
            ValueError: If the state is broken, or belongs to another recipe or model. Nothing is changed then.
        """
        states: Sequence[Mapping[str, Any]] = state if isinstance(state, list | tuple) else [cast(Any, state)]
        self._running_session("load_state_dict").resumption(states, strict=strict, rng=rng)()

    def save_state(self, path: str | os.PathLike[str], *, gradient_window: bool = True) -> None:
        """Write :meth:`state_dict` into a file; call it beside the code that saves model and optimizers.

        Of several ranks, rank 0 writes ``path``, and each of the others that calls this writes a file beside it, such
        as ``<path>.rank-3-of-8``. No rank waits for another. A file is replaced atomically.

        Args:
            path: The file, on a disk that all ranks can read.
            gradient_window: As in :meth:`state_dict`.

        Raises:
            RuntimeError: If no run is in progress.
            OSError: If the file cannot be written. It is unchanged then.
        """
        write_state(path, self._running_session("save_state").state_dict(gradient_window=gradient_window))

    def load_state(self, path: str | os.PathLike[str], *, strict: bool = True, rng: bool = False) -> None:
        """Resume from the files of :meth:`save_state`; call :meth:`modify` first, and this on every rank.

        The number of ranks may change. If the file of a rank is missing, damaged or of another save, gradient samples
        are collected anew.

        Args:
            path: The file of rank 0.
            strict: As in :meth:`load_state_dict`.
            rng: As in :meth:`load_state_dict`.

        Raises:
            RuntimeError: If no run is in progress.
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or belongs to another recipe or model. Nothing is changed then.
        """
        session = self._running_session("load_state")
        session.resumption(states_beside(path, read_tensors(path), session.ranks), strict=strict, rng=rng)()

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        gradient_window: bool = True,
        **more: Any,
    ) -> None:
        """Write everything a resumed run needs into one file; call it between two optimizer steps.

        The file is replaced atomically, so a killed process leaves it intact. The previous checkpoint is kept as
        ``<path>.previous``.

        Of several ranks, rank 0 writes this file, and each of the others that calls this writes its part of the
        gradient windows into a file beside it, such as ``<path>.rank-3-of-8``. No rank waits for another, so rank 0 may
        call this alone; a run that resumes from its file collects new gradient samples.

        Args:
            path: The file, on a disk that all ranks can read.
            model: The model to save, if it is not the one given to :meth:`modify`.
            optimizer: The optimizers to save, if they are not those given to :meth:`modify`.
            gradient_window: As in :meth:`state_dict`.
            **more: Further entries, such as ``epoch=epoch`` or ``scheduler=scheduler.state_dict()``: plain values,
                tensors, and dictionaries and lists of these.

        Raises:
            RuntimeError: If no run is in progress.
            NotImplementedError: If the weights are distributed over ranks (``fully_shard``).
            TypeError: If an entry has another type. The file is unchanged then.
            OSError: If the file cannot be written. It is unchanged then.
        """
        session = self._running_session("save_checkpoint")
        to_save = self._model if model is None else unwrapped(model)
        assert to_save is not None  # a run is in progress
        optimizers = session.optimizers if optimizer is None else unwrapped_optimizers(optimizer)
        write_checkpoint(path, to_save, optimizers, session.state_dict(gradient_window=gradient_window), more)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        strict: bool = True,
        rng: bool = False,
    ) -> dict[str, Any]:
        """Resume from a file of :meth:`save_checkpoint`; call :meth:`modify` first, and this on every rank.

        Model, optimizers and manager are all restored or, if something does not fit, left unchanged. If the file is
        damaged and the previous one is intact, that is loaded, with a warning.

        The number of ranks may change. The files of other ranks that belong to this checkpoint are found beside it. If
        one is missing, damaged or of another checkpoint, gradient samples are collected anew.

        Args:
            path: The file.
            model: The model to load into, if it is not the one given to :meth:`modify`.
            optimizer: The optimizers to load into, if they are not those given to :meth:`modify`.
            strict: As in :meth:`load_state_dict`.
            rng: As in :meth:`load_state_dict`.

        Returns:
            The further entries that were saved.

        Raises:
            RuntimeError: If no run is in progress.
            NotImplementedError: If the weights are distributed over ranks (``fully_shard``).
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a checkpoint, is damaged, or belongs to another recipe, model or optimizer.
        """
        session = self._running_session("load_checkpoint")
        to_load = self._model if model is None else unwrapped(model)
        assert to_load is not None  # a run is in progress
        optimizers = session.optimizers if optimizer is None else unwrapped_optimizers(optimizer)
        return load_checkpoint(
            path,
            to_load,
            optimizers,
            lambda state: session.resumption(states_beside(path, state, session.ranks), strict=strict, rng=rng),
        )

    def _attaching(
        self,
        model: nn.Module,
        *,
        steps_per_epoch: int,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        sampler: SamplerArgument | None,
        loggers: ScalarLoggers | None,
        ranks: TorchRanks | Alone,
    ) -> Callable[[PruningSettings, str], TorchPruning]:
        """Return a function that attaches a modifier to a model, given its settings and its name in the log."""
        functions = log_functions(self._loggers if loggers is None else loggers)
        logged: set[str] = set()
        return lambda settings, name: TorchPruning(
            settings,
            model,
            steps_per_epoch=steps_per_epoch,
            optimizers=optimizers,
            grad_sampler=None if sampler is None else GradSampler.of(sampler),
            loggers=functions,
            name=name,
            logged=logged,
            ranks=ranks,
        )

    def _check_not_attached(self) -> None:
        if self._model is not None:
            raise RuntimeError("the manager is attached to a model already; call finalize() first")

    def _running_session(self, method: str) -> TrainingSession:
        if self._session is None:
            raise RuntimeError(f"{method}() needs a run in progress; call modify() first")
        return self._session
