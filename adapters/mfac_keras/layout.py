"""The layout that the weight of each variable has in PyTorch, in which the core sees it.

PyTorch keeps the weights of a layer as (output, input, *window), Keras as (*window, input, output), and some layers
differ again. Fisher blocks, and the blocks and N:M groups of masks, follow the order of the weights: both frameworks
prune the same weights only if they pass them to the core in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from mfac_core.backends import Array
from mfac_keras.selection import layers_of

__all__ = ["PyTorchForm", "pytorch_forms"]

_TRANSPOSED = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
_DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)


@dataclass(frozen=True)
class PyTorchForm:
    """How to turn a variable into PyTorch's weight, and back.

    Args:
        axes: Permutation of the variable's axes into PyTorch's order.
        permuted_shape: Shape of the permuted variable.
        shape: Shape of PyTorch's weight, in which some of these axes are merged.
        core_axes: Permutation of PyTorch's axes to (output, *window, input), if it is not PyTorch's usual one; the
            axes of output and input alone for a stack of matrices.
    """

    axes: tuple[int, ...]
    permuted_shape: tuple[int, ...]
    shape: tuple[int, ...]
    core_axes: tuple[int, ...] | None = None

    def of(self, array: Array) -> Array:
        """Return an array of the variable's shape in PyTorch's layout, as a view if possible."""
        return array.transpose(self.axes).reshape(self.shape)

    def back(self, array: Array) -> Array:
        """Return an array in PyTorch's layout in the variable's own, as a view if possible."""
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return array.reshape(self.permuted_shape).transpose(inverse)


def pytorch_forms(model: Any, variables: Mapping[str, Any]) -> dict[str, PyTorchForm]:
    """Return the PyTorch form of each variable, by name.

    Variables that PyTorch has in the same order (embeddings, biases), and those of custom layers whose names are not
    those of Keras' kernels, stay as they are; if they have three or more axes, the last axis holds the inputs and the
    one before it the outputs.

    Example:
        >>> model = keras.Sequential([keras.Input([8, 8, 3]), keras.layers.Conv2D(4, 5)])
        >>> pytorch_forms(model, {"kernel": model.layers[0].kernel})["kernel"].shape
        (4, 3, 5, 5)
    """
    owners = {
        id(variable): layer
        for layer in layers_of(model)
        if not isinstance(layer, keras.Model)
        for variable in layer.trainable_variables
    }
    return {name: _form(owners.get(id(variable)), variable) for name, variable in variables.items()}


def _form(layer: Any, variable: Any) -> PyTorchForm:
    shape = tuple(int(size) for size in variable.shape)
    rank = len(shape)
    window = tuple(range(rank - 2))
    if rank >= 2:
        if isinstance(layer, keras.layers.EinsumDense):
            outputs, inputs = _einsum_axes(layer.equation, rank)
            return _permuted(shape, (*outputs, *inputs), merged=(len(outputs), len(inputs)))
        if variable.name == "depthwise_kernel" or isinstance(layer, _DEPTHWISE):
            # (*window, input, multiplier): outputs are input by input, and each has a single input
            form = _permuted(shape, (rank - 2, rank - 1, *window))
            return PyTorchForm(form.axes, form.permuted_shape, (shape[-2] * shape[-1], 1, *shape[:-2]))
        if isinstance(layer, _TRANSPOSED):  # (*window, output, input); PyTorch has (input, output, *window)
            form = _permuted(shape, (rank - 1, rank - 2, *window))
            return PyTorchForm(form.axes, form.permuted_shape, form.shape, (1, *range(2, rank), 0))
        if variable.name in {"kernel", "recurrent_kernel", "pointwise_kernel"}:  # (*window, input, output)
            return _permuted(shape, (rank - 1, rank - 2, *window))
    unchanged = tuple(range(rank))
    return PyTorchForm(unchanged, shape, shape, (rank - 2, rank - 1) if rank > 2 else None)


def _permuted(shape: tuple[int, ...], axes: tuple[int, ...], merged: tuple[int, int] | None = None) -> PyTorchForm:
    permuted = tuple(shape[axis] for axis in axes)
    as_matrix = permuted if merged is None else (math.prod(permuted[: merged[0]]), math.prod(permuted[merged[0] :]))
    return PyTorchForm(axes, permuted, as_matrix)


def _einsum_axes(equation: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    operands, _, output = equation.replace("...", "").partition("->")
    kernel = operands.split(",")[1].strip()
    outputs = tuple(axis for axis in range(rank) if kernel[axis] in output)
    return outputs, tuple(axis for axis in range(rank) if axis not in outputs)
