"""Names, shapes and offsets of the weights in scope: flatten, gather the unpruned, scatter back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, device_of, numpy_dtype

__all__ = ["Mask", "WeightLayout", "scatter_unpruned", "take_unpruned", "zeros_of"]

Mask = npt.NDArray[np.bool_]
"""In host memory; True keeps."""


class WeightLayout:
    """The weights in scope in their order, seen as one vector of all ``n`` weights.

    Args:
        shapes: Name and shape of each weight array, in order.
        may_be_empty: Whether there may be no weight at all, as in the shard of a rank.

    Raises:
        ValueError: If there is no weight at all, but there must be.

    Example:
        >>> layout = WeightLayout({"a": (2, 2), "b": (3,)})
        >>> layout.num_weights, layout.segments["b"]
        (7, (4, 7))
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, may_be_empty: bool = False) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.segments: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, shape in self.shapes.items():
            self.segments[name] = (offset, offset + math.prod(shape))
            offset += math.prod(shape)
        self.num_weights = offset
        if not (offset or may_be_empty):
            raise ValueError("there are no weights to prune: pass at least one array with at least one element")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weight arrays, in order."""
        return tuple(self.shapes)

    def check(self, arrays: Mapping[str, Array], what: str, *, leading: tuple[int, ...] = ()) -> None:
        """Check that a mapping has exactly these names, and these shapes behind ``leading`` dimensions.

        Raises:
            ValueError: If a name is missing or unknown, or a shape differs; the message names it, and calls the arrays
                ``what``.
        """
        missing = [name for name in self.shapes if name not in arrays]
        unknown = [name for name in arrays if name not in self.shapes]
        if missing or unknown:
            raise ValueError(
                f"{what} must have exactly the names of the weights; "
                f"missing: {missing or 'none'}, unknown: {unknown or 'none'}"
            )
        for name, shape in self.shapes.items():
            if tuple(arrays[name].shape) != leading + shape:
                raise ValueError(f"{what}[{name!r}] has shape {tuple(arrays[name].shape)}, expected {leading + shape}")

    def flatten(self, arrays: Mapping[str, Array], dtype: Any = None) -> Array:
        """Return all weights as a new vector on the device of the first array, in their common dtype or another."""
        device = device_of(arrays[self.names[0]])
        here = [device_of(arrays[name]).move(arrays[name], device) for name in self.names]
        with device.backend.on(device.name):
            xp = array_namespace(here[0])
            return device.asarray(xp.concat([xp.reshape(array, (-1,)) for array in here]), dtype)

    def unflatten(self, vector: Array) -> dict[str, Array]:
        """Return the arrays of a vector of all weights, on its device: views where possible."""
        reshape = array_namespace(vector).reshape
        return {name: reshape(vector[start:stop], self.shapes[name]) for name, (start, stop) in self.segments.items()}

    def unflatten_like(self, vector: Array, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return the arrays of a vector of all weights, each in the dtype and on the device of its namesake."""
        source = device_of(vector)
        like = {}
        for name, array in self.unflatten(vector).items():
            device = device_of(arrays[name])
            like[name] = device.asarray(source.move(array, device), numpy_dtype(arrays[name]))
        return like

    def check_finite(self, vector: Array, mask: Mask, cure: str) -> None:
        """Refuse unpruned weights that are NaN or Inf; the message names their arrays and the ``cure``."""
        device = device_of(vector)
        with device.backend.on(device.name):
            xp = array_namespace(vector)
            finite = xp.isfinite(vector)
            if bool(xp.all(finite)):
                return
            bad = mask & ~device.to_numpy(finite)
        if bad.any():
            names = [name for name, (start, stop) in self.segments.items() if bad[start:stop].any()]
            raise ValueError(f"weights contain NaN or Inf in {', '.join(names)}: {cure}")

    def unpruned(self, mask: Mask, device: Device) -> dict[str, Array]:
        """Return which entries of each array are unpruned, in the form that :meth:`gather` takes on a device.

        Args:
            mask: Which of the ``n`` weights are unpruned, shape ``(n,)``, in host memory.
            device: Where the arrays are that will be gathered.

        Returns:
            For each array ``None`` for all entries, or indices.
        """
        found: dict[str, Array] = {}
        for name, (start, stop) in self.segments.items():
            indices = np.flatnonzero(mask[start:stop])
            if len(indices) == stop - start:
                found[name] = None
            elif device.is_host:
                found[name] = indices  # faster than a mask: the length of the result is known
            else:  # with a mask the host would wait for the length of the result
                found[name] = device.asarray(indices.astype(np.int32))
        return found

    def gather_each(self, arrays: Mapping[str, Array], unpruned: Mapping[str, Array]) -> list[Array]:
        """Return the unpruned entries of each array as a vector, in order: a view if all entries are unpruned.

        Args:
            arrays: Name and array of each weight; all on one device.
            unpruned: The result of :meth:`unpruned` for this device.
        """
        found = []
        for name in self.names:
            xp = array_namespace(arrays[name])
            values = xp.reshape(xp.asarray(arrays[name]), (-1,))
            entries = unpruned[name]
            if entries is not None:
                values = values[entries] if isinstance(entries, np.ndarray) else xp.take(values, entries)
            found.append(values)
        return found

    def gather(self, arrays: Mapping[str, Array], unpruned: Mapping[str, Array]) -> Array:
        """Return the entries of :meth:`gather_each` as one new vector, in the common dtype of the arrays."""
        vectors = self.gather_each(arrays, unpruned)
        return array_namespace(vectors[0]).concat(vectors)


def take_unpruned(weights: Array, mask: Mask) -> Array:
    """Return the weights that a mask in host memory keeps, shape ``(d,)``, on the device of the weights."""
    device = device_of(weights)
    with device.backend.on(device.name):
        return weights[device.asarray(mask)]


def scatter_unpruned(unpruned: Array, mask: Mask) -> Array:
    """Return all weights, shape ``(n,)``, from those that a mask keeps; the others are exactly 0."""
    device = device_of(unpruned)
    with device.backend.on(device.name):
        weights = device.zeros(mask.shape, numpy_dtype(unpruned))
        weights[device.asarray(mask)] = unpruned
    return weights


def zeros_of(weights: Array) -> Mask:
    """Return in host memory which weights are 0."""
    device = device_of(weights)
    with device.backend.on(device.name):
        return device.to_numpy(weights == 0)
