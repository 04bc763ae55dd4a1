"""How much sparsity each variable of a model bears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import mfac_core
from mfac_core import Sensitivity
from mfac_core.backends import Array, device_of
from mfac_core.layer_sensitivity import SPARSITIES, check_num_batches, check_rows_fit, stacked_rows
from mfac_core.settings.checks import Damping, MaskType, Recomputations
from mfac_keras.backends import current_backend
from mfac_keras.conditions import check_model, refuse_keras_2
from mfac_keras.layout import PyTorchForm, pytorch_forms
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

    The model is written to meanwhile, and is exactly as before afterwards, also after an exception. For what is
    measured, and what it tells, see :func:`mfac_core.sensitivity`.

    Args:
        model: A built Keras model.
        dataset: Batches, as :class:`mfac_keras.sampling.GradientSampler` takes them.
        loss: A Keras loss, its name, or a function ``loss(y_true, y_pred)``; ``None`` is the loss that the model was
            compiled with.
        params: Which variables, see :func:`mfac_keras.select_variables`; frozen ones are left out.
        exclude: What is left out of it, in the same form.
        sparsities: The sparsities, rising, above 0 and below 1.
        num_grads: Gradient samples for each pruning.
        fresh_grads: Whether they are drawn anew for each variable and sparsity, as the recommended one-shot pruning
            does: ``num_grads`` backward passes each time. Otherwise they are drawn once, at the dense model, for all
            variables together: much faster, takes memory for all of them, and shows high sparsities worse than they
            are.
        num_recomputations: In how many parts each of the sparsities is reached from the one before, each with gradient
            samples of its own where these are fresh; ``auto`` where they lie far apart.
        num_batches: Batches to measure the loss on, drawn once; the loss is their mean.
        held_out: Batches to draw these from, in the form of those of ``dataset``, such as validation data; ``None``
            takes those of ``dataset``.
        fisher_block_size: Weights per Fisher block; ``None`` means one block.
        damp: Added to the diagonal of the empirical Fisher, positive; or ``auto``, for each block 0.1 times the mean of
            that diagonal.
        mask_type: Pattern of the zeros, as in a recipe; ``N:M`` leaves no sparsity above ``1 - N/M``.
        progress: Whether a progress bar is shown, on a terminal or in a notebook.

    Returns:
        The loss and its increases by variable path; ``print()`` shows them as a table.

    Raises:
        SettingError: If a setting is out of range or does not fit the model.
        TypeError: If an argument is of the wrong kind, or the model or the loss is none of Keras 3.
        ValueError: If the model is not built or has no loss, a batch has another form, or the loss of the dense model
            is not finite.
        MemoryBudgetError: If the gradient samples would not fit.
        IllConditionedError: If a block cannot be inverted accurately.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4, name="body")])
        >>> data = np.ones([64, 8], "float32"), np.ones([64, 4], "float32")
        >>> result = sensitivity(model, data, "mse", sparsities=(0.5, 0.9), num_grads=4)
        >>> [(path.rpartition("/")[2], len(increases)) for path, increases in result.measured.items()]
        [('kernel', 2)]
    """
    check_model(model)
    refuse_keras_2("the loss", loss)
    sampler = GradientSampler(dataset, loss)
    variables = select_variables(model, params, exclude)
    forms = pytorch_forms(model, variables)
    check_num_batches(num_batches)
    with _put_back(variables):
        # a copy, because on torch an array shares the memory of the variable
        weights = {name: forms[name].of(current_backend().to_array(each)).copy() for name, each in variables.items()}
        check_rows_fit(weights, num_grads, fisher_block_size, together=not fresh_grads)
        batches = (sampler if held_out is None else GradientSampler(held_out)).batches(num_batches)
        written = dict(weights)

        def write(changed: Mapping[str, Array]) -> None:
            for name, array in changed.items():
                if array is not written[name]:
                    variables[name].assign(current_backend().to_tensor(forms[name].back(array)))
                    written[name] = array

        def loss_of(pruned: Mapping[str, Array]) -> float:
            write(pruned)
            return sampler.loss(model, batches)

        def fresh(layer: Mapping[str, Array]) -> dict[str, Array]:
            write({**weights, **layer})
            return _rows(model, {name: variables[name] for name in layer}, forms, sampler, num_grads)

        return mfac_core.sensitivity(
            weights,
            loss_of,
            fresh if fresh_grads else _rows(model, variables, forms, sampler, num_grads),
            sparsities=sparsities,
            block_size=fisher_block_size,
            damping=damp,
            num_recomputations=num_recomputations,
            mask_type=mask_type,
            axes={name: form.core_axes for name, form in forms.items() if form.core_axes is not None},
            devices=[device_of(next(iter(weights.values())))],
            progress=progress,
        )


@contextmanager
def _put_back(variables: Mapping[str, Any]) -> Iterator[None]:
    """Put the values of variables back after a block."""
    values = [(variable, np.array(variable.numpy(), copy=True)) for variable in variables.values()]
    try:
        yield
    finally:
        for variable, value in values:
            variable.assign(value)


def _rows(
    model: Any,
    variables: Mapping[str, Any],
    forms: Mapping[str, PyTorchForm],
    sampler: GradientSampler,
    count: int,
) -> dict[str, Array]:
    samples = (
        {name: forms[name].of(gradient) for name, gradient in zip(variables, row, strict=True)}
        for row in sampler.gradients(model, list(variables.values()), count)
    )
    return stacked_rows(samples, count)
