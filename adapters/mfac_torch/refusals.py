"""Refuses models that are distributed over processes in ways that are not supported: by name, with the cure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mfac_core.ranks import Alone
from mfac_core.weight_names import join_names
from mfac_torch.ranks import TorchRanks, num_processes, ranks_of
from mfac_torch.sharded import is_sharded, reshard
from mfac_torch.wrappers import layers_of, unwrapped

__all__ = [
    "model_and_ranks",
    "refuse_join",
    "refuse_optimizer",
    "refuse_other_distribution",
    "refuse_replaced",
    "refuse_several_processes",
]

_CURES = {
    "FullyShardedDataParallel (FSDP1)": "call fully_shard(model) of torch.distributed.fsdp (FSDP2) instead: with "
    "Accelerate fsdp_version=2, in Lightning ModelParallelStrategy",
    "DeepSpeed": "use DistributedDataParallel or fully_shard(model) (FSDP2) instead",
}

_NESTED = 4
"""Wrappers around an optimizer that are looked into."""


def model_and_ranks(module: nn.Module) -> tuple[nn.Module, TorchRanks | Alone]:
    """Return a model inside its wrappers, and the ranks that train it.

    Raises:
        NotImplementedError: If it is distributed in a way that is not supported.
    """
    model = unwrapped(module)
    refuse_other_distribution(module)
    reshard(model)
    return model, ranks_of(module, dict(model.named_parameters()))


def refuse_several_processes(what: str) -> None:
    """Raise NotImplementedError if there are several processes, over which ``what`` is not supported."""
    if num_processes() > 1:
        raise NotImplementedError(
            f"there are {num_processes()} processes, over which {what} is not supported: each would measure samples of "
            f"its own. Call {what} in a single process"
        )


def refuse_other_distribution(module: nn.Module) -> None:
    """Raise NotImplementedError for a model, in its wrappers, whose weights FSDP1 or DeepSpeed stores in its own way.

    The number of processes does not matter.
    """
    for each in module.modules():
        if _is_of_deepspeed(each):
            _refuse("DeepSpeed", [f"the model (a {type(each).__name__})"])
    named = dict(module.named_parameters())
    _refuse("DeepSpeed", [name for name, parameter in named.items() if hasattr(parameter, "ds_id")])  # ZeRO's mark
    # FSDP1 marks its flat parameter, or the original ones as its views, also inside its wrapper
    _refuse(
        "FullyShardedDataParallel (FSDP1)",
        [name for name, parameter in named.items() if hasattr(parameter, "_fsdp_flattened")],
    )


def refuse_replaced(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise an error if the model has been sharded, which replaces parameters, since the recipe was attached.

    Raises:
        RuntimeError: If ``fully_shard`` has replaced parameters in scope.
        NotImplementedError: As :func:`refuse_other_distribution`.
    """
    refuse_other_distribution(model)
    now = dict(model.named_parameters(remove_duplicate=False))
    replaced = [name for name, each in parameters.items() if is_sharded(now.get(name)) and not is_sharded(each)]
    if replaced:
        raise RuntimeError(
            f"fully_shard has replaced {join_names(replaced)} after modify(), which prunes parameters that the model "
            "no longer has; call fully_shard(model) first, then create the optimizer, and then call modify()"
        )


def refuse_join(module: nn.Module) -> None:
    """Raise NotImplementedError for a model, in its wrappers, whose ranks may run out of data one after the other."""
    for each in layers_of(module):
        config = getattr(each, "_join_config", None)
        if config is not None and config.enable and not config.throw_on_early_termination:
            raise NotImplementedError(
                "the model is trained inside Join, which is not supported: a rank that runs out of data would miss the "
                "pruning steps of the others. Give each rank the same number of batches (DistributedSampler, or "
                "drop_last), or write Join([model], throw_on_early_termination=True), which ends the loop on all ranks"
            )


def refuse_optimizer(optimizer: Any) -> None:
    """Raise NotImplementedError for an optimizer of DeepSpeed, wrapped or not, and for steps inside a backward pass."""
    inside = optimizer
    for _ in range(_NESTED):
        if _is_of_deepspeed(inside):
            _refuse("DeepSpeed", [f"the optimizer (a {type(inside).__name__})"])
        inside = getattr(inside, "optimizer", None)
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise NotImplementedError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) changes weights inside the backward pass, before the hooks "
            "of its step, which is not supported; leave overlap_with_ddp out"
        )


def _is_of_deepspeed(instance: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(instance).__mro__)


def _refuse(by: str, what: Iterable[str]) -> None:
    names = list(what)
    if names:
        raise NotImplementedError(
            f"{by} has {join_names(names)}, which is not supported: the weights are not stored as parameters of "
            f"their own. To prune them in training, {_CURES[by]}"
        )
