"""How much sparsity each parameter of a model tolerates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from mfac_core import Sensitivity
from mfac_core.backends import Array
from mfac_core.layer_sensitivity import SPARSITIES
from mfac_core.session.layer_sensitivity import model_sensitivity
from mfac_core.settings.checks import Damping, MaskType, Recomputations
from mfac_torch.conversion import check_prunable, to_array, write_back
from mfac_torch.layout import weight_axes
from mfac_torch.refusals import refuse_several_processes
from mfac_torch.sampling import sampler_of
from mfac_torch.selection import select_parameters
from mfac_torch.wrappers import unwrapped

__all__ = ["sensitivity"]


def sensitivity(
    model: nn.Module,
    loader: Any,
    loss_fn: Any = None,
    *,
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    exclude: str | Sequence[str] = (),
    sparsities: Sequence[float] = SPARSITIES,
    num_grads: int = 64,
    fresh_grads: bool = True,
    num_recomputations: Recomputations = 1,
    num_batches: int = 16,
    held_out: Any = None,
    fisher_block_size: int | None = 2000,
    damp: Damping = "auto",
    mask_type: MaskType = "unstructured",
    progress: bool = True,
) -> Sensitivity:
    """Measure how much the loss grows when one parameter alone is pruned by M-FAC, to a number of rising sparsities.

    The weights of the model change during the measurement and are restored exactly, also after an exception. See
    :func:`mfac_core.sensitivity` for the method and for what the numbers mean.

    Args:
        model: The model; wrappers (``DataParallel``, ``torch.compile``, Fabric's) are unwrapped.
        loader: Batches, as :class:`GradSampler` takes them, or a :class:`GradSampler`.
        loss_fn: ``loss_fn(output, target)``, a scalar tensor; ``None`` uses the loss that the model itself returns, or
            that of the :class:`GradSampler`.
        params: Which parameters, see :func:`mfac_torch.select_parameters`; frozen ones are left out.
        exclude: Exceptions from ``params``, in the same form.
        sparsities: The sparsities, rising, above 0 and below 1.
        num_grads: Gradient samples for each pruning.
        fresh_grads: Whether to draw new samples for each parameter and sparsity, as the recommended one-shot pruning
            does: ``num_grads`` backward passes each time. Otherwise they are drawn once, from the dense model, for all
            parameters together: much faster, but with memory for all of them, and high sparsities look worse than they
            are.
        num_recomputations: In how many sub-steps each sparsity is reached from the one before, each with gradient
            samples of its own if these are fresh; ``auto`` is best if the sparsities lie far apart.
        num_batches: Batches to measure the loss on, drawn once; the loss is their mean.
        held_out: Batches to draw them from, in the form of those of ``loader``, such as validation data; ``None``
            uses those of ``loader``.
        fisher_block_size: Weights per Fisher block; ``None`` means one block.
        damp: Added to the diagonal of the empirical Fisher, positive; or ``auto``, for each block 0.1 times the mean of
            that diagonal.
        mask_type: Pattern of the zeros, as in a recipe; ``N:M`` leaves no sparsity above ``1 - N/M``.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The loss and its increases by parameter name; ``print()`` shows them as a table.

    Raises:
        SettingError: If a setting is out of range or does not fit the model.
        TypeError: If an argument is of the wrong kind.
        ValueError: If a batch has an unsupported form, or the loss of the dense model is not finite.
        MemoryBudgetError: If the gradient samples would not fit.
        IllConditionedError: If a block cannot be inverted accurately.
        NotImplementedError: If there are several processes.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(16)]
        >>> result = sensitivity(model, batches, nn.functional.mse_loss, sparsities=(0.5, 0.9), num_grads=16)
        >>> [(name, len(increases)) for name, increases in result.measured.items()]
        [('0.weight', 2), ('2.weight', 2)]
    """
    refuse_several_processes("sensitivity()")
    model = unwrapped(model)
    sampler = sampler_of(loader, loss_fn)
    parameters = select_parameters(model, params, exclude)
    check_prunable(parameters)

    def gradients(names: Sequence[str], count: int) -> Iterator[dict[str, Array]]:
        for sample in sampler.gradients(model, {name: parameters[name] for name in names}, count):
            yield {name: to_array(gradient) for name, gradient in sample.items()}

    return model_sensitivity(
        {name: to_array(parameter.detach().clone()) for name, parameter in parameters.items()},
        write=lambda name, array: write_back(parameters[name], array),
        gradients=gradients,
        loss=partial(sampler.loss, model),
        batches=(sampler if held_out is None else sampler_of(held_out)).batches,
        axes=weight_axes(model, parameters),
        sparsities=sparsities,
        num_grads=num_grads,
        fresh_grads=fresh_grads,
        num_recomputations=num_recomputations,
        num_batches=num_batches,
        fisher_block_size=fisher_block_size,
        damp=damp,
        mask_type=mask_type,
        progress=progress,
    )
