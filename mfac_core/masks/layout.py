"""Names, shapes and offsets of the weights in scope: flatten, gather the unpruned, scatter back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, device_of

__all__ = ["WeightLayout"]


class WeightLayout:
    """The weights in scope in their order, seen as one vector of all ``n`` weights.

    Args:
        shapes: Name and shape of each weight array, in order.

    Raises:
        ValueError: If there is no weight at all.

    Example:
        >>> layout = WeightLayout({"a": (2, 2), "b": (3,)})
        >>> layout.num_weights, layout.segments["b"]
        (7, (4, 7))
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.segments: dict[str, tuple[int, int]] = {}
        offset = 0
        for name, shape in self.shapes.items():
            self.segments[name] = (offset, offset + math.prod(shape))
            offset += math.prod(shape)
        self.num_weights = offset
        if not offset:
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

    def flatten(self, arrays: Mapping[str, Array], dtype: Any = None) -> npt.NDArray[Any]:
        """Return all weights as one new vector in host memory, in ``dtype`` or else the common one."""
        vectors = [device_of(arrays[name]).to_numpy(arrays[name]).reshape(-1) for name in self.shapes]
        return np.concatenate(vectors, dtype=dtype)

    def unflatten(self, vector: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a vector of all weights by name: views of it where possible."""
        return {name: vector[start:stop].reshape(self.shapes[name]) for name, (start, stop) in self.segments.items()}

    def unflatten_like(self, vector: npt.NDArray[Any], arrays: Mapping[str, Array]) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a vector of all weights by name, each in the dtype of its namesake in ``arrays``."""
        return {
            name: array.astype(np.dtype(arrays[name].dtype), copy=False)
            for name, array in self.unflatten(vector).items()
        }

    def check_finite(self, vector: npt.NDArray[Any], mask: npt.NDArray[np.bool_], cure: str) -> None:
        """Check that no unpruned weight of a vector of all weights is NaN or Inf.

        Raises:
            ValueError: If there are such weights; the message names their arrays and the cure.
        """
        bad = mask & ~np.isfinite(vector)
        if bad.any():
            names = [name for name, (start, stop) in self.segments.items() if bad[start:stop].any()]
            raise ValueError(f"weights hold NaN or Inf in {', '.join(names)}: {cure}")

    def unpruned(self, mask: npt.NDArray[np.bool_], device: Device) -> dict[str, Array]:
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
