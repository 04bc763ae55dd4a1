"""The entry point: a recipe's modifiers, attached to a model and its optimizers."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mfac_core.masks.zero_count import ZeroCount
from mfac_core.schedules.one_shot import one_shot_in_order
from mfac_core.session.live_pruning import combined_masks
from mfac_core.session.one_shot import prune_in_one_shot
from mfac_core.session.plan_log import log_plan
from mfac_core.session.session import Session, attached, gradual_in_order
from mfac_core.settings.checks import check_number
from mfac_core.settings.pruning import MFACSettings, PruningSettings
from mfac_torch.batchnorm import RunningStatistics
from mfac_torch.checkpoint import load_optimizers, load_weights, read_checkpoint, write_checkpoint
from mfac_torch.conditions import check_optimizers, check_trained, refuse_distributed, unwrapped_optimizers
from mfac_torch.live_pruning import TorchPruning
from mfac_torch.modifier_list import ModifierList
from mfac_torch.sampling import GradSampler
from mfac_torch.scalar_loggers import ScalarLoggers, log_functions
from mfac_torch.session import TrainingSession
from mfac_torch.training_changes import TrainingChanges
from mfac_torch.wrappers import unwrapped
from mfac_torch.zeros import apply_masks, zeros_of

__all__ = ["ScheduledModifierManager"]

_logger = logging.getLogger("mfac_torch")

Sampler = GradSampler | Mapping[str, Any]


class ScheduledModifierManager(ModifierList):
    """Runs the modifiers of a recipe while a model is trained, or in one shot.

    Args:
        modifiers: The modifiers, such as ``[MFACPruningModifier(final_sparsity=0.85, end_epoch=10.0)]``.
        metadata: Anything to keep beside them: plain values by name.

    Raises:
        TypeError: If ``modifiers`` is a recipe, or an entry is not a modifier.
        ValueError: If there is none.

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
    _sampler: Sampler | None = None
    _epoch: float = 0.0

    @property
    def initialized(self) -> bool:
        """Whether the manager is attached to a model."""
        return self._model is not None

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks held now by parameter name: boolean, True keeps; none before the first pruning step."""
        return combined_masks(pruning.mask_tensors for pruning in self._prunings)

    @property
    def sparsity(self) -> float:
        """Fraction of all weights in scope that is pruned, counted from the weights: those that are zero now."""
        return self._zeros().sparsity

    def regrown(self) -> dict[str, int]:
        """Return the parameters of which pruned weights are not zero now, after :meth:`finalize` too.

        Returns:
            Name of each such parameter -> how many; nothing where weights and masks agree.
        """
        return dict(self._zeros().regrown)

    def initialize(
        self,
        module: nn.Module,
        epoch: float = 0.0,
        loggers: ScalarLoggers | None = None,
        *,
        grad_sampler: Sampler | None = None,
        **unsupported: object,
    ) -> None:
        """Keep arguments for :meth:`modify`, for scripts that pass them here; nothing changes yet.

        Args:
            module: The model.
            epoch: As in :meth:`modify`.
            loggers: As in :meth:`modify`.
            grad_sampler: As in :meth:`modify`.
            **unsupported: Refused by name.

        Raises:
            TypeError: If an argument is of the wrong kind or not supported.
        """
        _refuse("initialize", unsupported)
        unwrapped(module)
        self._epoch, self._sampler = epoch, grad_sampler
        if loggers is not None:
            self.initialize_loggers(loggers)

    def initialize_loggers(self, loggers: ScalarLoggers | None) -> None:
        """Keep loggers for :meth:`modify`, for scripts that pass them here.

        Args:
            loggers: As in :meth:`modify`.

        Raises:
            TypeError: If one of them is of the wrong kind.
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
        grad_sampler: Sampler | None = None,
        **unsupported: object,
    ) -> Any:
        """Attach the modifiers to a model and its optimizers; the training loop stays as it is.

        Args:
            module: The model; wrappers (``DataParallel``, ``torch.compile``, Fabric's) are looked through.
            optimizer: The optimizer that trains it, or a list of several: steps are counted by the first. Hooks follow
                their steps until :meth:`finalize`; wrappers (of ``accelerate``) are looked through.
            steps_per_epoch: Optimizer steps per epoch: ``len(loader)``, or less when gradients are accumulated. A
                fraction is rounded up: what is left at the end of an epoch is a batch too.
            wrap_optim: A ``GradScaler`` to return in place of the optimizer; it needs no change.
            epoch: Epoch at which training begins; fractions allowed.
            allow_parallel_module: Without effect: parameters have their names in the model without its wrappers.
            loggers: Objects with ``log_scalar(tag, value, step)``, or TensorBoard's ``SummaryWriter``; told the
                sparsity of each parameter after a pruning step, as ``ParamPruning/<name>``.
            grad_sampler: Draws the gradient samples at each pruning step; ``None`` takes the gradients of training.
            **unsupported: Refused by name.

        Returns:
            ``wrap_optim`` if there is one, otherwise ``optimizer`` itself.

        Raises:
            RuntimeError: If the manager is attached already, or another one to the same optimizer.
            NotImplementedError: If training is distributed over several processes.
            SettingError: If a modifier does not fit the model, or ``steps_per_epoch`` or ``epoch`` is out of range.
            TypeError: If an argument is of the wrong kind or not supported.
            ValueError: If no optimizer trains a parameter in scope, or one of them is there twice.

        Whatever is raised, manager, model and optimizers are as before, and the call may be made again.
        """
        _refuse("modify", unsupported)
        refuse_distributed()
        self._check_free()
        optimizers = check_optimizers(optimizer)
        model = unwrapped(module)
        sampler = self._sampler if grad_sampler is None else grad_sampler
        steps = _whole(steps_per_epoch)
        start = self._epoch if epoch is None else epoch
        check_number("epoch", start, "epoch >= 0, at which training begins; fractions allowed", lambda x: x >= 0)
        prunings = self._attached_to(
            model,
            gradual_in_order(modifier.settings for modifier in self.pruning_modifiers),
            steps_per_epoch=steps,
            optimizers=optimizers,
            sampler=sampler,
            loggers=loggers,
        )
        check_trained(prunings)
        others = [each.settings for each in self.modifiers if not isinstance(each.settings, PruningSettings)]
        changes = TrainingChanges(others, model, optimizers, steps_per_epoch=steps)
        log_plan(
            _logger,
            prunings,
            others,
            steps,
            sampled=sampler is not None,
            trainable=changes.trainable,
            logged=self._logged,
        )
        session = TrainingSession(optimizers, prunings, changes, steps_per_epoch=steps, step=round(start * steps))
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
        grad_sampler: Sampler | None = None,
        recalibrate_batchnorm: bool = False,
        **unsupported: object,
    ) -> None:
        """Prune in one shot, without training: as far as the recipe is at an epoch.

        Args:
            module: The model; wrappers are looked through.
            epoch: The epoch whose sparsity is to be reached; infinity for the final sparsity.
            loggers: As in :meth:`modify`.
            finalize: Whether the manager is done afterwards; otherwise :meth:`finalize` sets pruned weights to zero
                once more, after a fine-tuning of your own.
            grad_sampler: Draws the gradient samples; needed by M-FAC.
            recalibrate_batchnorm: Whether the running statistics of batch normalization are estimated anew afterwards,
                as by :func:`mfac_torch.recalibrate_batchnorm`, over at most 256 batches of the sampler. Otherwise a
                warning says that they are those of before.
            **unsupported: Refused by name.

        Raises:
            RuntimeError: If the manager is attached already.
            NotImplementedError: If training is distributed over several processes.
            SettingError: If a modifier does not fit the model.
            TypeError: If M-FAC or the recalibration has no sampler, or an argument is of the wrong kind or not
                supported.

        Whatever is raised, manager and model are as before.
        """
        _refuse("apply", unsupported)
        refuse_distributed()
        self._check_free()
        settings = [modifier.settings for modifier in self.pruning_modifiers]
        sampler = self._sampler if grad_sampler is None else grad_sampler
        if sampler is None and any(isinstance(each, MFACSettings) for each in settings):
            raise TypeError(
                "M-FAC in one shot needs gradients; pass grad_sampler=GradSampler(data_loader, loss_fn) to apply()"
            )
        if sampler is None and recalibrate_batchnorm:
            raise TypeError(
                "recalibrate_batchnorm needs batches; pass grad_sampler=GradSampler(data_loader, loss_fn) to apply()"
            )
        model = unwrapped(module)
        sampler = None if sampler is None else GradSampler.of(sampler)
        groups = one_shot_in_order(settings, epoch)
        prunings = self._attached_to(
            model, [at_once for _, at_once in groups], steps_per_epoch=1, sampler=sampler, loggers=loggers
        )
        prune_in_one_shot(
            Session(prunings, logger=_logger),
            groups,
            RunningStatistics(model),
            sampler=sampler,
            recalibrate_batchnorm=recalibrate_batchnorm,
            cure="mfac_torch.recalibrate_batchnorm(model, loader)",
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
        """Do nothing: pruning does not change the structure of a model, so that weights can be loaded as they are.

        Args:
            module: The model.
            epoch: Not looked at.
            loggers: Not looked at.
            finalize: Not looked at.
            **kwargs: Not looked at.

        Raises:
            TypeError: If the model is no module.
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
        """Detach from model and optimizers: a plain module remains, whose pruned weights are exactly zero.

        Where something else has written to the model after the last step of its optimizer, such as ``load_state_dict``
        of the best epoch, pruned weights may not be zero any more. A warning counts them then, and ``hold`` decides.
        A second call, and one after :meth:`apply`, which finalizes by itself, does nothing.

        Args:
            module: The model, to check that it is the one that was modified.
            reset_loggers: Whether to forget the loggers that :meth:`initialize_loggers` has kept.
            hold: Whether pruned weights that are not zero any more are set to zero once more; otherwise they are left
                as they are. ``None`` sets them to zero after ``apply(finalize=False)`` only.
            **unsupported: Refused by name.

        Raises:
            RuntimeError: If nothing was modified.
            ValueError: If ``module`` is another model.
            TypeError: If an argument is not supported.
        """
        _refuse("finalize", unsupported)
        if self._model is None and self._is_finalized:
            _logger.info("there is nothing more to finalize")
            return
        if self._model is None:
            raise RuntimeError("there is nothing to finalize; call modify() or apply() first")
        if module is not None and unwrapped(module) is not self._model:
            raise ValueError("finalize() got another model than modify() or apply(); pass the same one, or none")
        if self._session is not None:
            self._session.detach()
            self._session.warn_of_unfinished("finalized", self._session.outside.missing_steps())
        self._warn_replaced(self._model)
        self._settle(hold)
        if reset_loggers:
            self._loggers = None
        self._session = None
        self._model = None
        self._is_finalized = True

    def state_dict(self, *, gradient_window: bool = True, warn: bool = True) -> dict[str, Any]:
        """Return all that a resumed run needs beside model and optimizers: tensors and plain values only.

        Take it between two optimizer steps, together with ``model.state_dict()`` and ``optimizer.state_dict()``. The
        state of the random number generators of torch, Python and NumPy is part of it.

        Args:
            gradient_window: Whether gradient windows are part of it. Without them files are small, and a resumed run
                prunes by the rows that it sees from then on.
            warn: Whether a warning names pruned weights that are not zero, which are saved with the model as they are.

        Returns:
            The state; ``torch.load(weights_only=True)`` reads it.

        Raises:
            RuntimeError: If no run is in progress.
        """
        return self._attached("state_dict").state_dict(gradient_window=gradient_window, warn=warn)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, *, rng: bool = False) -> None:
        """Go on from :meth:`state_dict`; call :meth:`modify` first.

        A state that was saved with other ``steps_per_epoch`` goes on at the same epoch, which the log says.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model.
            strict: Whether all of it must fit; otherwise modifiers whose state does not fit begin anew, with a warning
                in the log.
            rng: Whether to restore the random number generators of torch, Python and NumPy too. Pass True where a
                resumed run is to shuffle and drop out as one that was not interrupted.

        Raises:
            RuntimeError: If no run is in progress.
            ValueError: If the state is broken, or does not belong to this recipe or model; nothing is changed then.
        """
        self._attached("load_state_dict").resumption(state, strict=strict, rng=rng)()

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        gradient_window: bool = True,
        **more: Any,
    ) -> None:
        """Write all that a resumed run needs into one file; call it between two optimizer steps.

        A process that is killed meanwhile leaves the file that was there before. The one before stays as
        ``<path>.previous``.

        Args:
            path: The file.
            model: The model, where another is to be saved than the one that :meth:`modify` got.
            optimizer: The optimizers, where others are to be saved than those that :meth:`modify` got.
            gradient_window: As in :meth:`state_dict`.
            **more: Further entries, such as ``epoch=epoch`` or ``scheduler=scheduler.state_dict()``: plain values,
                tensors, and dictionaries and lists of these.

        Raises:
            RuntimeError: If no run is in progress.
            TypeError: If an entry is of another kind. What was there before is untouched then.
            OSError: If the file cannot be written. What was there before is untouched then.
        """
        session = self._attached("save_checkpoint")
        optimizers = session.optimizers if optimizer is None else unwrapped_optimizers(optimizer)
        parts = {
            "model": self._attached_model(model).state_dict(),
            "optimizers": [each.state_dict() for each in optimizers],
            "manager": session.state_dict(gradient_window=gradient_window),
            "more": more,
        }
        write_checkpoint(path, parts)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        strict: bool = True,
        rng: bool = False,
    ) -> dict[str, Any]:
        """Go on from a file of :meth:`save_checkpoint`; call :meth:`modify` first.

        Model, optimizers and manager go on together or, if something does not fit, not at all. Where the file is
        damaged and the one before it is whole, that one is taken, with a warning in the log.

        Args:
            path: The file.
            model: As in :meth:`save_checkpoint`.
            optimizer: As in :meth:`save_checkpoint`.
            strict: As in :meth:`load_state_dict`.
            rng: As in :meth:`load_state_dict`.

        Returns:
            The further entries that were saved.

        Raises:
            RuntimeError: If no run is in progress.
            FileNotFoundError: If there is no such file.
            ValueError: If it is no checkpoint, is damaged, or belongs to another recipe, model or optimizer.
        """
        session = self._attached("load_checkpoint")
        to_load = self._attached_model(model)
        optimizers = session.optimizers if optimizer is None else unwrapped_optimizers(optimizer)
        parts = read_checkpoint(path, ("model", "optimizers", "manager", "more"))
        resume = session.resumption(parts["manager"], strict=strict, rng=rng)
        with ExitStack() as undo:
            load_weights(to_load, parts["model"], undo)
            load_optimizers(optimizers, parts["optimizers"], undo)
            resume()
            undo.pop_all()
        more: dict[str, Any] = parts["more"]
        return more

    def _attached_model(self, given: nn.Module | None) -> nn.Module:
        assert self._model is not None  # a run is in progress
        return self._model if given is None else unwrapped(given)

    def _attached_to(
        self,
        model: nn.Module,
        settings: Sequence[PruningSettings],
        *,
        steps_per_epoch: int,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        sampler: Sampler | None,
        loggers: ScalarLoggers | None,
    ) -> tuple[TorchPruning, ...]:
        functions = log_functions(self._loggers if loggers is None else loggers)
        logged: set[str] = set()
        return attached(
            settings,
            lambda each, name: TorchPruning(
                each,
                model,
                steps_per_epoch=steps_per_epoch,
                optimizers=optimizers,
                grad_sampler=None if sampler is None else GradSampler.of(sampler),
                loggers=functions,
                name=name,
                logged=logged,
            ),
        )

    def _check_free(self) -> None:
        if self._model is not None:
            raise RuntimeError("the manager is attached to a model already; call finalize() first")

    def _attached(self, method: str) -> TrainingSession:
        if self._session is None:
            raise RuntimeError(f"{method}() is about a run in progress; call modify() first")
        return self._session

    def _zeros(self) -> ZeroCount:
        return zeros_of(self._parameters(), self._masks_that_fit())

    def _masks_that_fit(self) -> dict[str, torch.Tensor]:
        """Return the masks without those of layers that are not there any more, or have another shape."""
        now = self._parameters()
        return {name: mask for name, mask in self.masks.items() if name in now and now[name].shape == mask.shape}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: each for pruning in self._prunings for name, each in pruning.current_parameters.items()}

    def _settle(self, hold: bool | None) -> None:
        """Compare weights and masks at the end, and say what was found and done."""
        difference = self._zeros().difference()
        if not difference:
            return
        if hold or (hold is None and self._session is None):
            changed = apply_masks(self._parameters(), self._masks_that_fit())
            level = logging.INFO if hold is None else logging.WARNING  # after a fine-tuning it is what was announced
            _logger.log(level, "%s; finalize has set %s weights to zero", difference, f"{changed:,}")
            return
        cause = "" if self._session is None else f" The likely cause: {self._session.outside.likely_cause()}."
        _logger.warning(
            "%s.%s The weights are left as they are; finalize(hold=True) would have set these to zero, and "
            "mfac_torch.apply_masks(model, manager) does it now",
            difference,
            cause,
        )

    def _warn_replaced(self, model: nn.Module) -> None:
        now = {id(parameter) for parameter in model.parameters()}
        replaced = [
            name
            for pruning in self._prunings
            for name, parameter in pruning.parameters.items()
            if id(parameter) not in now
        ]
        if replaced:
            _logger.warning(
                "%s: the model has other parameters there than when the recipe was attached, and those are not pruned; "
                "attach the recipe after the model has its layers, and load weights without assign=True",
                ", ".join(replaced),
            )


def _refuse(method: str, unsupported: Mapping[str, object]) -> None:
    given = [name for name, value in unsupported.items() if value is not None]
    if given:
        raise TypeError(f"{method}() does not support {', '.join(map(repr, given))}; leave it out")


def _whole(steps_per_epoch: float) -> int:
    rule = "steps_per_epoch > 0, such as len(loader) for one step per batch; a fraction is rounded up"
    check_number("steps_per_epoch", steps_per_epoch, rule, lambda x: x > 0)
    whole = math.ceil(steps_per_epoch)
    if whole != steps_per_epoch:
        _logger.info("steps_per_epoch %g is taken as %d", steps_per_epoch, whole)
    return whole
