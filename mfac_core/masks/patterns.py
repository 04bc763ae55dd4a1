"""Patterns of zeros: which weights of an array are pruned together.

Every array is seen as outputs x kernel positions x inputs. By default it has PyTorch's layout of linear and convolution
layers: the first axis holds the outputs, the second the inputs, and the others the kernel; an array with one axis is
one row of inputs. Other layouts are described by a permutation of the axes, or by the axes of outputs and inputs alone
if the others index independent matrices, such as those of fused experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mfac_core.errors import SettingError
from mfac_core.settings.checks import MaskType, checked_mask_type
from mfac_core.weight_names import join_names

__all__ = ["MaskPattern", "mask_patterns", "snap_to_n_of_m"]

_ROUNDED = 0.01
"""Largest difference from ``1 - N/M`` that counts as rounding."""

_MAX_NAMED = 10
"""Maximum number of arrays named in a message."""

# Why arrays cannot have a pattern, and the cure
_NOT_DIVIDED = ("{mask_type} do not divide {arrays}", "choose sizes that do")
_ONE_GROUP = (
    "{mask_type} makes {arrays} a single group each, which could only be pruned as a whole",
    "choose another mask type",
)
_NOT_KNOWN = (
    "{mask_type} needs outputs and inputs, and which axes these are is not known for {arrays}, because layers that "
    "share it read it differently",
    "prune it unstructured",
)


@dataclass(frozen=True)
class MaskPattern:
    """How the weights of one array are grouped.

    Args:
        shape: Shape of the array.
        axes: Permutation that brings its axes into the order (output, kernel..., input).
        outputs: Outputs of a group.
        inputs: Inputs of a group; the last group of a row is short if they do not divide the row.
        whole_kernel: Whether a group contains all positions of the kernel; else each position has groups of its own.
        unpruned_per_group: Smallest number of weights that each group keeps; ``None`` if a group is pruned as a whole.

    Example:
        >>> MaskPattern((2, 4), (0, 1), outputs=1, inputs=2).groups().tolist()
        [0, 0, 1, 1, 2, 2, 3, 3]
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    outputs: int
    inputs: int
    whole_kernel: bool = False
    unpruned_per_group: int | None = None

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        if not math.prod(self.shape):
            return 0
        outputs, kernel, inputs = self._extents
        kernel = 1 if self.whole_kernel else kernel
        return math.ceil(outputs / self.outputs) * kernel * math.ceil(inputs / self.inputs)

    @property
    def max_pruned(self) -> int:
        """Largest number of weights that can be pruned."""
        outputs, kernel, inputs = self._extents
        if self.unpruned_per_group is None:
            return outputs * kernel * inputs
        whole, short = divmod(inputs, self.inputs)
        in_a_row = whole * (self.inputs - self.unpruned_per_group) + max(short - self.unpruned_per_group, 0)
        return outputs * kernel * in_a_row

    def is_cut_at(self, positions: Iterable[int]) -> bool:
        """Return whether some group has weights both before and from one of these positions in the array on.

        Example:
            >>> [MaskPattern((2, 4), (0, 1), outputs=1, inputs=2).is_cut_at([position]) for position in (2, 3)]
            [False, True]
        """
        if self.unpruned_per_group is None:
            groups = self.groups()
            first, last = np.full(self.num_groups, len(groups)), np.zeros(self.num_groups, int)
            np.minimum.at(first, groups, np.arange(len(groups)))
            np.maximum.at(last, groups, np.arange(len(groups)))
        else:
            members = self.members()
            last = members.max(axis=1)
            first = np.where(members < 0, last[:, None], members).min(axis=1)
        return any(((first < position) & (position <= last)).any() for position in positions)

    def groups(self) -> npt.NDArray[np.int32]:
        """Return the group of each weight, from 0 to ``num_groups - 1``, in the order of the array."""
        _, kernel, inputs = self._extents
        kernel = 1 if self.whole_kernel else kernel
        of_output, of_position, of_input = np.ogrid[tuple(slice(extent) for extent in self._extents)]
        of_position = 0 * of_position if self.whole_kernel else of_position
        across = math.ceil(inputs / self.inputs)
        group = ((of_output // self.outputs) * kernel + of_position) * across + of_input // self.inputs
        # written through a transposed view, which brings them back into the order of the array
        in_order = np.empty(self.shape, np.int32)
        transposed = in_order.transpose(self.axes)
        transposed[...] = group.reshape(transposed.shape)
        return in_order.reshape(-1)

    def members(self) -> npt.NDArray[np.intp]:
        """Return the weights of each group of inputs at one output and kernel position, in the order of the inputs.

        Returns:
            Positions in the array, shape ``(num_groups, inputs)``; -1 for inputs missing from a short group.
        """
        outputs, kernel, inputs = self._extents
        positions = np.arange(outputs * kernel * inputs).reshape(self.shape).transpose(self.axes)
        short = -inputs % self.inputs
        rows = np.pad(positions.reshape(outputs * kernel, inputs), ((0, 0), (0, short)), constant_values=-1)
        return rows.reshape(-1, self.inputs)

    @property
    def _extents(self) -> tuple[int, int, int]:
        return _extents(self.shape, self.axes)


def mask_patterns(
    mask_type: MaskType, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, MaskPattern] | None:
    """Return how the weights of each array are grouped under a mask type.

    * ``channel``: all weights of one input; ``filter``: all of one output.
    * ``block4``: four consecutive inputs of one output at one kernel position; the last group of a row may be short.
    * ``(a, b)``: ``a`` outputs x ``b`` inputs at one kernel position; -1 is the whole extent. Extents must divide.
    * ``N:M``: ``M`` consecutive inputs of one output at one kernel position, of which ``N`` are kept. A short last
      group counts its missing inputs as pruned.

    Args:
        mask_type: The mask type, see :data:`mfac_core.settings.checks.MaskType`.
        shapes: Name and shape of each array.
        axes: Name and permutation of axes into the order (output, kernel..., input); or the two axes (output, input),
            if the others index separate matrices; or empty, if the layout is unknown. Names may be absent.

    Returns:
        Name and pattern of each array; ``None`` for ``unstructured``: each weight is pruned individually.

    Raises:
        SettingError: If blocks do not divide some arrays, if arrays are a single group, which would be pruned as a
            whole, or if their layout is unknown; the message names all of them and the cure.
        ValueError: If ``axes`` names an unknown array, or is not a permutation.

    Example:
        >>> patterns = mask_patterns("channel", {"conv": (2, 3, 1, 1)})
        >>> patterns["conv"].groups().tolist(), mask_patterns("unstructured", {"conv": (2, 3, 1, 1)})
        ([0, 1, 2, 0, 1, 2], None)
    """
    orders = {name: _axes(name, shape, (axes or {}).get(name)) for name, shape in shapes.items()}
    unknown = sorted(set(axes or {}) - set(shapes))
    if unknown:
        raise ValueError(f"axes names {', '.join(unknown)}, which are not among the weights; leave them out")
    mask_type = checked_mask_type(mask_type)
    if mask_type == "unstructured":
        return None
    patterns: dict[str, MaskPattern] = {}
    refused: dict[tuple[str, str], list[str]] = {}  # reason and cure -> arrays
    for name, shape in shapes.items():
        given = (axes or {}).get(name, orders[name])
        patterns[name] = _pattern(mask_type, shape, orders[name], is_stack=len(given) < len(shape))
        why = _NOT_KNOWN if len(given) < min(len(shape), 2) else _refusal(mask_type, patterns[name])
        if why is not None:
            refused.setdefault(why, []).append(f"{name!r} of shape {shape} ({_in_words(patterns[name])})")
    if refused:
        reasons = [
            f"{reason.format(mask_type=_written(mask_type), arrays=join_names(arrays, _MAX_NAMED))}; {cure}, or leave "
            f"{'it' if len(arrays) == 1 else 'them'} out of params"
            for (reason, cure), arrays in refused.items()
        ]
        raise SettingError("mask_type", "; ".join(reasons))
    return patterns


def snap_to_n_of_m(mask_type: MaskType, sparsity: float) -> float:
    """Return ``1 - N/M`` if the mask type is ``N:M`` and the sparsity within 0.01 of that, else the sparsity itself.

    Example:
        >>> snap_to_n_of_m("1:3", 0.66), snap_to_n_of_m("1:3", 0.5)
        (0.6666666666666667, 0.5)
    """
    mask_type = checked_mask_type(mask_type)
    if not isinstance(mask_type, str) or ":" not in mask_type:
        return sparsity
    kept, of_each = map(int, mask_type.split(":"))
    most = 1 - kept / of_each
    return most if abs(sparsity - most) <= _ROUNDED else sparsity


def _axes(name: str, shape: tuple[int, ...], axes: Sequence[int] | None) -> tuple[int, ...]:
    rank = len(shape)
    if axes is None or (not axes and rank > 1):
        return (0, *range(2, rank), 1) if rank > 1 else tuple(range(rank))
    if rank > 2 and len(axes) == len(set(axes)) == 2 and set(axes) <= set(range(rank)):  # noqa: PLR2004
        return (axes[0], *(axis for axis in range(rank) if axis not in axes), axes[1])
    if sorted(axes) != list(range(rank)):
        raise ValueError(
            f"axes[{name!r}] is {tuple(axes)}, which does not order the {rank} axes of shape {shape}; "
            f"write a permutation of {tuple(range(rank))} that begins with the output and ends with the input"
        )
    return tuple(axes)


def _pattern(mask_type: MaskType, shape: tuple[int, ...], axes: tuple[int, ...], *, is_stack: bool) -> MaskPattern:
    outputs, _, inputs = _extents(shape, axes)
    match mask_type:
        case "channel":
            return MaskPattern(shape, axes, max(outputs, 1), 1, whole_kernel=not is_stack)
        case "filter":
            return MaskPattern(shape, axes, 1, max(inputs, 1), whole_kernel=not is_stack)
        case "block4":
            return MaskPattern(shape, axes, 1, 4)
        case (high, wide):
            high, wide = (outputs or 1) if high == -1 else high, (inputs or 1) if wide == -1 else wide
            return MaskPattern(shape, axes, high, wide)
        case _:
            kept, of_each = map(int, str(mask_type).split(":"))
            return MaskPattern(shape, axes, 1, of_each, unpruned_per_group=kept)


def _refusal(mask_type: MaskType, pattern: MaskPattern) -> tuple[str, str] | None:
    """Return why an array cannot have a pattern, and the cure; ``None`` if it can."""
    outputs, _, inputs = _extents(pattern.shape, pattern.axes)
    if isinstance(mask_type, tuple) and (outputs % pattern.outputs or inputs % pattern.inputs):
        return _NOT_DIVIDED
    is_one_group = pattern.num_groups == 1 and math.prod(pattern.shape) > 1
    return _ONE_GROUP if is_one_group and pattern.unpruned_per_group is None else None


def _written(mask_type: MaskType) -> str:
    if isinstance(mask_type, str):
        return mask_type
    high, wide = ("all" if size == -1 else str(size) for size in mask_type)
    return f"blocks of {high} outputs x {wide} inputs"


def _in_words(pattern: MaskPattern) -> str:
    outputs, kernel, inputs = _extents(pattern.shape, pattern.axes)
    positions = f"{kernel} kernel positions, " if kernel > 1 else ""
    return f"{outputs} outputs, {positions}{inputs} inputs"


def _extents(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the numbers of outputs, kernel positions and inputs of an array."""
    if len(shape) < 2:
        return 1, 1, math.prod(shape)
    outputs, *kernel, inputs = (shape[axis] for axis in axes)
    return outputs, math.prod(kernel), inputs
