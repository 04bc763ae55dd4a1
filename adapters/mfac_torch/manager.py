"""The entry point: a recipe's modifiers, attached to a model and its optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed
from torch import nn

from mfac_core.recipe import EpochRange, load_recipe
from mfac_core.settings import MFACSettings, PruningSettings
from mfac_torch.live_pruning import LivePruning, ScalarLogger, one_shot
from mfac_torch.modifier import Modifier, PruningModifier, SetLearningRateModifier, modifier_for
from mfac_torch.sampling import GradSampler
from mfac_torch.session import TrainingSession

__all__ = ["ScheduledModifierManager"]

_logger = logging.getLogger("mfac_torch")


class ScheduledModifierManager:
    """Runs the modifiers of a recipe while a model is trained, or in one shot.

    Args:
        modifiers: The modifiers, such as ``[MFACPruningModifier(final_sparsity=0.85, end_epoch=10.0)]``.

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

    def __init__(self, modifiers: Iterable[Modifier]) -> None:
        if isinstance(modifiers, str | os.PathLike):
            raise TypeError("modifiers is a path or text; pass a recipe to ScheduledModifierManager.from_yaml")
        self.modifiers = tuple(modifiers)
        for modifier in self.modifiers:
            if not isinstance(modifier, Modifier):
                raise TypeError(
                    f"{modifier!r} is not a modifier; pass modifiers such as MFACPruningModifier(...), "
                    "or a recipe to ScheduledModifierManager.from_yaml"
                )
        if not self.modifiers:
            raise ValueError("there are no modifiers; pass at least one, such as MFACPruningModifier(...)")
        self._model: nn.Module | None = None
        self._prunings: tuple[LivePruning, ...] = ()
        self._session: TrainingSession | None = None

    @classmethod
    def from_yaml(
        cls,
        file_path: str | os.PathLike[str],
        add_modifiers: Iterable[Modifier] | None = None,
        recipe_variables: Mapping[str, object] | None = None,
    ) -> Self:
        """Return the manager of a recipe.

        Args:
            file_path: Path of a recipe, or the text of one.
            add_modifiers: Further modifiers, after those of the recipe.
            recipe_variables: Values to use instead of those of the recipe's variables.

        Returns:
            The manager.

        Raises:
            RecipeError: If the recipe is wrong; the message names line, key, rule and cure.
        """
        recipe = load_recipe(file_path, recipe_variables)
        return cls([*(modifier_for(settings) for settings in recipe.modifiers), *(add_modifiers or ())])

    @property
    def max_epochs(self) -> float:
        """The largest ``end_epoch`` of all modifiers: how long to train; 0.0 if none has one."""
        every = [modifier.settings for modifier in self.modifiers]
        return float(max((s.end_epoch for s in every if isinstance(s, PruningSettings | EpochRange)), default=0.0))

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks held now by parameter name: boolean, True keeps; none before the first pruning step."""
        return {name: mask for pruning in self._prunings for name, mask in pruning.masks.items()}

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all weights in scope, by the masks held now."""
        weights = sum(parameter.numel() for pruning in self._prunings for parameter in pruning.parameters.values())
        pruned = sum(int((~mask).sum()) for mask in self.masks.values())
        return pruned / weights if weights else 0.0

    def iter_modifiers(self) -> Iterator[Modifier]:
        """Yield the modifiers, in order.

        Yields:
            Each modifier.
        """
        yield from self.modifiers

    def modify(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        wrap_optim: Any = None,
        epoch: float | None = None,
        *,
        loggers: ScalarLogger | Sequence[ScalarLogger] | None = None,
        grad_sampler: GradSampler | Mapping[str, Any] | None = None,
        **unsupported: object,
    ) -> Any:
        """Attach the modifiers to a model and its optimizer; the training loop stays as it is.

        Args:
            module: The model; wrappers (``DataParallel``, ``torch.compile``) are looked through.
            optimizer: The optimizer that trains it. Hooks follow its steps until :meth:`finalize`.
            steps_per_epoch: Optimizer steps per epoch: ``len(loader)``, or less when gradients are accumulated.
            wrap_optim: A ``GradScaler`` to return in place of the optimizer; it needs no change.
            epoch: Epoch at which training begins; fractions allowed.
            loggers: Objects with ``log_scalar(tag, value, step)``; told the sparsity of each parameter after a pruning
                step, as ``ParamPruning/<name>``.
            grad_sampler: Draws the gradient samples at each pruning step; ``None`` takes the gradients of training.
            **unsupported: Refused by name.

        Returns:
            ``wrap_optim`` if there is one, otherwise ``optimizer`` itself.

        Raises:
            RuntimeError: If the manager is attached already, or training is distributed.
            SettingError: If a modifier does not fit the model. Model and optimizer are untouched then.
            TypeError: If an argument is of the wrong kind or not supported.
        """
        _refuse("modify", unsupported)
        _refuse_distributed()
        self._check_free()
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer of the model")
        model = _unwrapped(module)
        prunings = self._live_prunings(
            [modifier.settings for modifier in self._pruning_modifiers()], model, steps_per_epoch, grad_sampler, loggers
        )
        _check_trained(prunings, optimizer)
        self._session = TrainingSession(
            optimizer,
            prunings,
            [modifier.settings for modifier in self.modifiers if isinstance(modifier, SetLearningRateModifier)],
            steps_per_epoch=steps_per_epoch,
            step=round((epoch or 0.0) * steps_per_epoch),
        )
        self._model, self._prunings = model, prunings
        self._session.attach()
        return optimizer if wrap_optim is None else wrap_optim

    def apply(
        self,
        module: nn.Module,
        grad_sampler: GradSampler | Mapping[str, Any] | None = None,
        finalize: bool = True,
        loggers: ScalarLogger | Sequence[ScalarLogger] | None = None,
        **unsupported: object,
    ) -> None:
        """Prune to the final sparsity in one shot, without training.

        Args:
            module: The model; wrappers are looked through.
            grad_sampler: Draws the gradient samples; needed by M-FAC.
            finalize: Whether the manager is done afterwards; otherwise :meth:`finalize` sets pruned weights to zero
                once more, after a fine-tuning of your own.
            loggers: As in :meth:`modify`.
            **unsupported: Refused by name.

        Raises:
            RuntimeError: If the manager is attached already, or training is distributed.
            SettingError: If a modifier does not fit the model.
            TypeError: If M-FAC has no sampler, or an argument is of the wrong kind or not supported.
        """
        _refuse("apply", unsupported)
        _refuse_distributed()
        self._check_free()
        settings = [one_shot(modifier.settings) for modifier in self._pruning_modifiers()]
        if grad_sampler is None and any(isinstance(each, MFACSettings) for each in settings):
            raise TypeError(
                "M-FAC in one shot needs gradients; pass grad_sampler=GradSampler(data_loader, loss_fn) to apply()"
            )
        model = _unwrapped(module)
        prunings = self._live_prunings(settings, model, 1, grad_sampler, loggers)
        for pruning in prunings:
            pruning.prune_if_due(0)
        self._model, self._prunings = model, prunings
        if finalize:
            self.finalize(module)

    def finalize(self, module: nn.Module | None = None) -> None:
        """Detach from model and optimizer: a plain module remains, whose pruned weights are exactly zero.

        Args:
            module: The model, to check that it is the one that was modified.

        Raises:
            RuntimeError: If nothing was modified.
            ValueError: If ``module`` is another model.
        """
        if self._model is None:
            raise RuntimeError("there is nothing to finalize; call modify() or apply() first")
        if module is not None and _unwrapped(module) is not self._model:
            raise ValueError("finalize() got another model than modify() or apply(); pass the same one, or none")
        for pruning in self._prunings:
            pruning.hold_masks()
        if self._session is not None:
            self._session.detach()
            self._warn_unfinished(self._session)
        self._session = None
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs beside model and optimizer: tensors and plain values only.

        Take it between two optimizer steps, together with ``model.state_dict()`` and ``optimizer.state_dict()``.

        Returns:
            The state; ``torch.load(weights_only=True)`` reads it.
        """
        return self._attached("state_dict").state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; call :meth:`modify` first.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model.

        Raises:
            RuntimeError: If the manager is not attached.
            ValueError: If the state does not belong to this recipe, model or ``steps_per_epoch``.
        """
        self._attached("load_state_dict").load_state_dict(state)

    def _pruning_modifiers(self) -> list[PruningModifier]:
        return [modifier for modifier in self.modifiers if isinstance(modifier, PruningModifier)]

    def _check_free(self) -> None:
        if self._model is not None:
            raise RuntimeError("the manager is attached to a model already; call finalize() first")

    def _attached(self, method: str) -> TrainingSession:
        if self._session is None:
            raise RuntimeError(f"{method}() is about a run in progress; call modify() first")
        return self._session

    def _live_prunings(
        self,
        settings: Sequence[PruningSettings],
        model: nn.Module,
        steps_per_epoch: int,
        grad_sampler: GradSampler | Mapping[str, Any] | None,
        loggers: ScalarLogger | Sequence[ScalarLogger] | None,
    ) -> tuple[LivePruning, ...]:
        sampler = None if grad_sampler is None else GradSampler.of(grad_sampler)
        checked = _scalar_loggers(loggers)
        prunings = tuple(
            LivePruning(each, model, steps_per_epoch=steps_per_epoch, grad_sampler=sampler, loggers=checked)
            for each in settings
        )
        _check_disjoint(prunings)
        return prunings

    def _warn_unfinished(self, session: TrainingSession) -> None:
        for pruning in self._prunings:
            if not pruning.is_finished:
                refused = pruning.refused_rows
                _logger.warning(
                    "finalized at epoch %.2f without the pruning step of epoch %g: sparsity is %.4f, not %g%s",
                    session.step / session.steps_per_epoch,
                    pruning.settings.end_epoch,
                    self.sparsity,
                    pruning.settings.final_sparsity,
                    f"; {refused} gradient samples were refused for NaN or Inf" if refused else "",
                )


def _unwrapped(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"the model is a {type(module).__name__}; pass a torch.nn.Module")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _unwrapped(module.module)
    compiled = module._modules.get("_orig_mod")  # what torch.compile(module) wraps
    return module if compiled is None else _unwrapped(compiled)


def _refuse(method: str, unsupported: Mapping[str, object]) -> None:
    if unsupported:
        raise TypeError(f"{method}() does not support {', '.join(map(repr, unsupported))}; leave it out")


def _refuse_distributed() -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    world_size = torch.distributed.get_world_size()
    if world_size > 1:
        raise NotImplementedError(
            f"training is distributed over {world_size} processes, which is not supported yet: each would choose "
            "its own masks. Prune in a single process"
        )


def _scalar_loggers(loggers: ScalarLogger | Sequence[ScalarLogger] | None) -> tuple[ScalarLogger, ...]:
    if loggers is None:
        return ()
    every = tuple(loggers) if isinstance(loggers, Sequence) else (loggers,)
    for scalar_logger in every:
        if not callable(getattr(scalar_logger, "log_scalar", None)):
            raise TypeError(f"the logger {scalar_logger!r} has no method log_scalar(tag, value, step)")
    return every


def _check_disjoint(prunings: Sequence[LivePruning]) -> None:
    seen: set[str] = set()
    for pruning in prunings:
        twice = seen.intersection(pruning.parameters)
        if twice:
            raise ValueError(
                f"two pruning modifiers select {', '.join(sorted(twice))}; let one of them prune each parameter"
            )
        seen.update(pruning.parameters)


def _check_trained(prunings: Sequence[LivePruning], optimizer: torch.optim.Optimizer) -> None:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for pruning in prunings:
        missing = [name for name, parameter in pruning.parameters.items() if id(parameter) not in trained]
        if missing:
            raise ValueError(
                f"the optimizer does not train {', '.join(missing)}, so their masks could not be held; give them "
                "to the optimizer, or name in params only what it trains"
            )
