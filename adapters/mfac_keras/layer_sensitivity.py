"""How much sparsity each variable of a model tolerates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mfac_core import Sensitivity
from mfac_core.backends import Array
from mfac_core.layer_sensitivity import SPARSITIES
from mfac_core.session.layer_sensitivity import model_sensitivity
from mfac_core.settings.checks import Damping, MaskType, Recomputations
from mfac_keras.assigning import assign
from mfac_keras.backends import current_backend
from mfac_keras.conditions import check_model, refuse_keras_2
from mfac_keras.layout import pytorch_forms
from mfac_keras.sampling import GradientSampler
from mfac_keras.selection import select_variables

__all__ = ["sensitivity"]


def sensitivity(
    model: Any,
    dataset: Any,
    loss: Any = None,
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
    """Measure how much the loss grows when one variable alone is pruned by M-FAC, to a number of rising sparsities.

    The weights of the model change during the measurement and are restored exactly, also after an exception. See
    :func:`mfac_core.sensitivity` for the method and for what the numbers mean.

    Args:
        model: A built Keras model.
        dataset: Batches, as :class:`mfac_keras.sampling.GradientSampler` takes them.
        loss: A Keras loss, its name, or a function ``loss(y_true, y_pred)``; ``None`` is the loss that the model was
            compiled with.
        params: Which variables, see :func:`mfac_keras.select_variables`; frozen ones are left out.
        exclude: Exceptions from ``params``, in the same form.
        sparsities: The sparsities, rising, above 0 and below 1.
        num_grads: Gradient samples for each pruning.
        fresh_grads: Whether to draw new samples for each variable and sparsity, as the recommended one-shot pruning
            does: ``num_grads`` backward passes each time. Otherwise they are drawn once, from the dense model, for all
            variables together: much faster, but with memory for all of them, and high sparsities look worse than they
            are.
        num_recomputations: In how many sub-steps each sparsity is reached from the one before, each with gradient
            samples of its own if these are fresh; ``auto`` is best if the sparsities lie far apart.
        num_batches: Batches to measure the loss on, drawn once; the loss is their mean.
        held_out: Batches to draw them from, in the form of those of ``dataset``, such as validation data; ``None`` uses
            those of ``dataset``.
        fisher_block_size: Weights per Fisher block; ``None`` means one block.
        damp: Added to the diagonal of the empirical Fisher, positive; or ``auto``, for each block 0.1 times the mean of
            that diagonal.
        mask_type: Pattern of the zeros, as in a recipe; ``N:M`` leaves no sparsity above ``1 - N/M``.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The loss and its increases by variable path; ``print()`` shows them as a table.

    Raises:
        SettingError: If a setting is out of range or does not fit the model.
        TypeError: If an argument is of the wrong kind, or the model or the loss is not of Keras 3.
        ValueError: If the model is not built or has no loss, a batch has an unsupported form, or the loss of the dense
            model is not finite.
        MemoryBudgetError: If the gradient samples would not fit.
        IllConditionedError: If a block cannot be inverted accurately.
        NotImplementedError: If several processes share the model.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4, name="body")])
        >>> data = np.ones([64, 8], "float32"), np.ones([64, 4], "float32")
        >>> result = sensitivity(model, data, "mse", sparsities=(0.5, 0.9), num_grads=4)
        >>> [(path.rpartition("/")[2], len(increases)) for path, increases in result.measured.items()]
        [('kernel', 2)]
    """
    check_model(model)
    refuse_keras_2("the loss", loss)
    backend = current_backend()
    ranks = backend.ranks(model)
    if ranks.size > 1:
        raise NotImplementedError(
            f"sensitivity() is a measurement of one process, but it runs in {ranks.size}; call it in a script of its "
            "own, without keras.distribution.initialize()"
        )
    sampler = GradientSampler(dataset, loss)
    variables = select_variables(model, params, exclude)
    forms = pytorch_forms(model, variables)

    def gradients(names: Sequence[str], count: int) -> Iterator[dict[str, Array]]:
        for sample in sampler.gradients(model, [variables[name] for name in names], count):
            yield {name: forms[name].of(gradient) for name, gradient in zip(names, sample, strict=True)}

    return model_sensitivity(
        # copies, because on torch an array shares the memory of the variable
        {name: forms[name].of(backend.to_array(variable)).copy() for name, variable in variables.items()},
        write=lambda name, array: assign(variables[name], backend.to_tensor(forms[name].back(array))),
        gradients=gradients,
        loss=partial(sampler.loss, model),
        batches=(sampler if held_out is None else GradientSampler(held_out)).batches,
        axes={name: form.core_axes for name, form in forms.items() if form.core_axes is not None},
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
