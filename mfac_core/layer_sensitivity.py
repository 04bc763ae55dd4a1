"""How much sparsity each layer tolerates: the loss measured with one layer pruned at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mfac_core.backends import Array, Device, array_library, array_namespace, check_float, device_of, resolve_devices
from mfac_core.errors import SettingError
from mfac_core.masks.layout import WeightLayout
from mfac_core.masks.patterns import mask_patterns
from mfac_core.one_shot import Gradients, as_given, by_name, in_rows, named_axes, prune
from mfac_core.report.sensitivity import draw_increases, increases_table, printed
from mfac_core.settings.checks import (
    Damping,
    MaskType,
    Recomputations,
    Update,
    check_block_size,
    check_choice,
    check_damping,
    check_number,
    check_recomputations,
    checked_mask_type,
)
from mfac_core.terminal import console, plain_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SPARSITIES", "Sensitivity", "sensitivity"]

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
"""The sparsities at which each layer is measured by default."""

_logger = logging.getLogger("mfac_core")


@dataclass(frozen=True)
class Sensitivity:
    """How much the loss grows when one layer alone is pruned and the others stay dense.

    All fields are plain values: ``json.dumps(dataclasses.asdict(result))`` keeps them.

    Args:
        dense_loss: The loss before anything is pruned.
        sparsities: The sparsities, rising.
        measured: Name of each layer and, at each sparsity, the loss minus :attr:`dense_loss`; infinite from the
            sparsity on at which the loss was NaN or infinite, and negative where pruning made it smaller.
        predicted: The increase that M-FAC predicts, ``1/2 dw^T F dw`` summed over the steps; infinite if a layer was
            not pruned any further. The prediction is in-sample: it uses the gradient samples that chose the update, and
            is usually far too small.
        num_weights: Name of each layer and its number of weights.

    Example:
        >>> increases = {"a": (0.01, 0.03, 0.9), "b": (0.2, 0.5, 2.0)}
        >>> result = Sensitivity(1.0, (0.5, 0.9, 0.99), increases, increases, {"a": 100, "b": 20})
        >>> result.final_sparsity(max_increase=0.05)
        {0.9: ['a']}
    """

    dense_loss: float
    sparsities: tuple[float, ...]
    measured: Mapping[str, tuple[float, ...]]
    predicted: Mapping[str, tuple[float, ...]]
    num_weights: Mapping[str, int]

    def highest(self, max_increase: float) -> dict[str, float]:
        """Return how far each layer can be pruned within a budget.

        Args:
            max_increase: The largest acceptable increase of the loss per layer, such as ``0.05 * dense_loss``.

        Returns:
            Name of each layer and the highest of the sparsities up to which no measured increase exceeds the budget;
            0.0 if the increase at the lowest sparsity does.

        Raises:
            SettingError: If the budget is not a finite number.

        Example:
            >>> increases = {"a": (0.01, 0.03, 0.9), "b": (0.2, 0.5, 2.0)}
            >>> result = Sensitivity(1.0, (0.5, 0.9, 0.99), increases, increases, {"a": 100, "b": 20})
            >>> result.highest(0.05)
            {'a': 0.9, 'b': 0.0}
        """
        check_number("max_increase", max_increase, "the increase of the loss to accept", lambda _: True)
        found = {}
        for name, increases in self.measured.items():
            too_large = (index for index, increase in enumerate(increases) if not increase <= max_increase)
            count = next(too_large, len(increases))
            found[name] = self.sparsities[count - 1] if count else 0.0
        return found

    def final_sparsity(self, max_increase: float) -> dict[float, list[str]]:
        """Return the sparsities of :meth:`highest` as a value for ``final_sparsity`` in a recipe.

        Args:
            max_increase: As in :meth:`highest`.

        Returns:
            Sparsity and the names of the layers that get it, the lowest sparsity first. Layers for which the lowest
            sparsity exceeds the budget are left out and stay dense.

        Raises:
            SettingError: If the budget is not a finite number.

        Example:
            >>> increases = {"a": (0.01, 0.9), "b": (0.02, 0.03), "c": (0.04, 2.0), "d": (0.2, 0.7)}
            >>> result = Sensitivity(1.0, (0.5, 0.9), increases, increases, dict.fromkeys("abcd", 10))
            >>> result.final_sparsity(0.05)
            {0.5: ['a', 'c'], 0.9: ['b']}
        """
        highest = self.highest(max_increase)
        names = {sparsity: [name for name, own in highest.items() if own == sparsity] for sparsity in self.sparsities}
        return {sparsity: named for sparsity, named in names.items() if named}

    def table(self) -> Table:
        """Return the increases as a table, one row per layer, with the predicted ones below the measured ones.

        Returns:
            A table for :meth:`rich.console.Console.print`; ``str()`` of the result is the same as plain text.
        """
        return increases_table(self.dense_loss, self.sparsities, self.measured, self.predicted, self.num_weights)

    def picture(self, path: str | Path) -> None:
        """Draw the increases: one row per layer, one column per sparsity, measured on the left, predicted on the right.

        Args:
            path: The file to write; its suffix selects the format, such as ``.png`` or ``.svg``. Its folder is created
                if missing.
        """
        draw_increases(path, self.dense_loss, self.sparsities, self.measured, self.predicted, self.num_weights)

    def __str__(self) -> str:
        return printed(self.table())


def sensitivity(
    weights: Array | Mapping[str, Array],
    loss: Callable[[Any], float],
    gradients: Gradients | Callable[[Any], Gradients],
    *,
    sparsities: Sequence[float] = SPARSITIES,
    block_size: int | None = 2000,
    damping: Damping = "auto",
    update: Update = "joint",
    num_recomputations: Recomputations = 1,
    mask_type: MaskType = "unstructured",
    axes: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    devices: Sequence[str | Device] | str | Device = ("cpu",),
    progress: bool = True,
) -> Sensitivity:
    """Measure how much the loss grows when one layer alone is pruned, to a number of rising sparsities.

    Each layer is pruned by :func:`mfac_core.prune`, from one sparsity to the next: that increases the loss less than to
    start from the dense weights each time. If the gradient samples are always the same, they describe the remaining
    weights less and less well, and high sparsities look worse than they are with fresh samples: pass a function that
    draws them at each sparsity.

    The increase for several layers together is usually more than the sum of their increases, and training recovers much
    of it: the numbers rank layers, and do not predict the loss of a pruned model.

    Args:
        weights: A mapping from the name of each layer to its array, or one array; float32 or float64. Not modified.
        loss: Returns the loss of all weights, one layer of them pruned, given in the form of ``weights``. It is called
            once for the dense weights and at most once for each layer and sparsity.
        gradients: Gradient samples in a form that :func:`mfac_core.prune` takes; or a function that returns fresh ones
            at each sparsity. It gets the current weights of the layer that is pruned, in the form of ``weights``, and
            returns rows for that layer; the other layers are dense.
        sparsities: The sparsities, rising, above 0 and below 1.
        block_size: As in :func:`mfac_core.prune`.
        damping: As in :func:`mfac_core.prune`.
        update: As in :func:`mfac_core.prune`.
        num_recomputations: In how many sub-steps each sparsity is reached from the previous one, as in
            :func:`mfac_core.prune`; ``auto`` is best if they lie far apart.
        mask_type: As in :func:`mfac_core.prune`; ``N:M`` leaves no sparsity above ``1 - N/M``.
        axes: As in :func:`mfac_core.prune`.
        devices: As in :func:`mfac_core.prune`.
        progress: Whether to show a progress bar, on a terminal or in a notebook.

    Returns:
        The loss and its increases, measured and predicted.

    Raises:
        TypeError: If an argument is not an array, or ``loss`` is not callable or returns no number.
        ValueError: If shapes or names do not fit, a setting is out of range, weights or gradients contain NaN or Inf,
            or the loss of the dense weights is not finite.
        SettingError: If the sparsities do not rise between 0 and 1, or the mask type does not fit them or the shape of
            an array.
        DeviceError: If a device does not exist.
        IllConditionedError: If a block cannot be inverted accurately.

    Example:
        The loss of a linear model, whose gradient samples are those of its targets:

        >>> import numpy as np
        >>> x = np.random.default_rng(0).standard_normal((64, 8))
        >>> weights = {"first": np.arange(1.0, 5.0), "second": np.arange(5.0, 9.0)}
        >>> y = x @ np.concatenate(list(weights.values()))
        >>> def loss(w):
        ...     return float(np.mean((x @ np.concatenate([w["first"], w["second"]]) - y) ** 2) / 2)
        >>> result = sensitivity(weights, loss, {"first": x[:, :4], "second": x[:, 4:]}, sparsities=(0.5, 0.75))
        >>> print(result)
        Increase of the loss when one layer alone is pruned; dense: 0
        <BLANKLINE>
         Layer        Weights  50%  75%
        ───────────────────────────────
         first              4  1.9  5.9
           predicted           2.1  6.6
         second             4   32   69
           predicted            35   77
        <BLANKLINE>
        Predicted is in-sample: by the gradient samples that chose the update.
        >>> result.final_sparsity(3.0)
        {0.5: ['first']}
    """
    named, axes = by_name(weights), named_axes(axes)
    if not callable(loss):
        raise TypeError(f"loss is a {type(loss).__name__}; pass a function that returns the loss of weights")
    levels = _checked_sparsities(sparsities)
    check_choice("update", update, get_args(Update))
    check_block_size(block_size)
    check_damping(damping)
    check_recomputations(num_recomputations, "geometric")
    mask_type = checked_mask_type(mask_type, levels)
    layout = _checked_layout(named)
    resolve_devices(devices, array_library(named[layout.names[0]]))
    mask_patterns(mask_type, layout.shapes, axes)
    rows_of = _rows_of(gradients, weights, layout)

    def loss_of(pruned: Mapping[str, Array]) -> float:
        return _checked_loss(loss(as_given({**named, **pruned}, weights)))

    prune_layer = partial(
        prune,
        block_size=block_size,
        damping=damping,
        scope="layer",
        mask_type=mask_type,
        update=update,
        num_recomputations=num_recomputations,
        devices=devices,
    )
    with _each_message_once(), _bar(1 + len(named) * len(levels), shown=progress) as advance:
        dense_loss = loss_of({})
        if not math.isfinite(dense_loss):
            raise ValueError(f"the loss of the dense weights is {dense_loss}, so no increase can be measured")
        advance("")
        measured: dict[str, tuple[float, ...]] = {}
        predicted: dict[str, tuple[float, ...]] = {}
        for name, array in named.items():
            pruned, masks = {name: array}, {name: device_of(array).asarray(np.ones(tuple(array.shape), bool))}
            own_axes = None if axes is None or name not in axes else {name: axes[name]}
            losses, increases = [dense_loss], [0.0]
            for level in levels:
                result = prune_layer(pruned, rows_of(name), sparsity=level, masks=masks, axes=own_axes)
                has_changed = bool(array_namespace(array).any(result.masks[name] != masks[name]))
                pruned, masks = dict(result.weights), dict(result.masks)
                losses.append(loss_of(pruned) if has_changed else losses[-1])
                increases.append(increases[-1] + (result.predicted_loss_increase or 0.0))
                advance(name)
                if not math.isfinite(losses[-1]):  # its gradients are not finite either, most likely
                    _logger.warning(
                        "the loss is %s with %s pruned to %g: its increase counts as infinite from there",
                        losses[-1],
                        name,
                        level,
                    )
                    losses[-1] = math.inf
                    break
            measured[name] = _padded_with_inf((loss - dense_loss for loss in losses[1:]), len(levels))
            predicted[name] = _padded_with_inf(increases[1:], len(levels))
    sizes = {name: math.prod(shape) for name, shape in layout.shapes.items()}
    return Sensitivity(dense_loss, levels, measured, predicted, sizes)


def _checked_sparsities(sparsities: Sequence[float]) -> tuple[float, ...]:
    if isinstance(sparsities, str | Mapping) or not isinstance(sparsities, Iterable):
        raise SettingError("sparsities", f"{sparsities!r} must be a list of numbers, such as [0.5, 0.9]")
    levels = list(sparsities)
    for level in levels:
        check_number("sparsities", level, "0 < sparsity < 1; 0.9 prunes nine weights of ten", lambda x: 0 < x < 1)
    if not levels or any(level >= following for level, following in pairwise(levels)):
        raise SettingError("sparsities", f"{levels} must contain at least one number, each above the previous one")
    return tuple(map(float, levels))


def _checked_layout(named: Mapping[str, Array]) -> WeightLayout:
    for name, array in named.items():
        device_of(array)  # refuses anything but an array
        check_float(f"weights[{name!r}]", array)
    empty = [name for name, array in named.items() if not math.prod(array.shape)]
    if empty:
        raise ValueError(f"weights[{empty[0]!r}] has no elements; leave it out")
    layout = WeightLayout({name: tuple(array.shape) for name, array in named.items()})
    vector = layout.flatten(named)
    layout.check_finite(vector, np.ones(layout.num_weights, bool), "measure finite weights")
    return layout


def _rows_of(
    gradients: Gradients | Callable[[Any], Gradients], weights: Array | Mapping[str, Array], layout: WeightLayout
) -> Callable[[str], Gradients | Callable[[Mapping[str, Array]], Gradients]]:
    """Return a function from the name of a layer to its rows, or to a function that draws them, as prune takes them."""
    if callable(gradients):
        draw = gradients

        def fresh(layer: Mapping[str, Array]) -> Gradients:
            return _in_rows(draw(as_given(dict(layer), weights)))

        return lambda name: fresh
    if isinstance(gradients, Mapping):
        if not isinstance(weights, Mapping):
            raise ValueError("gradients is a mapping but weights is one array; pass both in the same form")
        layout.check(gradients, "gradients", leading=next((tuple(rows.shape)[:1] for rows in gradients.values()), ()))
        by_layer = {name: _in_rows(rows) for name, rows in gradients.items()}
    else:
        device_of(gradients)
        rows = gradients if isinstance(weights, Mapping) else _in_rows(gradients)
        if tuple(rows.shape[1:]) != (layout.num_weights,):
            raise ValueError(
                f"gradients must have one row of {layout.num_weights} numbers per sample, "
                f"got shape {tuple(gradients.shape)}"
            )
        by_layer = {name: rows[:, start:stop] for name, (start, stop) in layout.segments.items()}
    for name, of_layer in by_layer.items():
        xp = array_namespace(of_layer)
        if not bool(xp.all(xp.isfinite(of_layer))):
            raise ValueError(f"the gradients of {name} contain NaN or Inf; leave these samples out")
    return by_layer.__getitem__


def _in_rows(gradients: Gradients) -> Any:
    if isinstance(gradients, Mapping):
        return gradients
    device_of(gradients)
    return in_rows(gradients) if gradients.shape else gradients


def _checked_loss(value: Any) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        # a library with automatic differentiation warns when a number is taken out of its graph
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"loss returned a {type(value).__name__}; it must return a number") from error


def _padded_with_inf(increases: Iterable[float], length: int) -> tuple[float, ...]:
    return tuple(islice(chain(increases, repeat(math.inf)), length))


@contextmanager
def _each_message_once() -> Iterator[None]:
    """Log each message once: messages about the gradient samples would recur at every sparsity of every layer."""
    logged: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_known = message in logged
        logged.add(message)
        return not is_known

    _logger.addFilter(is_new)
    try:
        yield
    finally:
        _logger.removeFilter(is_new)


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    terminal = console(stderr=True)
    if not shown or not (terminal.is_terminal or terminal.is_jupyter):
        yield lambda name: None
        return
    columns = (
        TextColumn("sensitivity"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, advance=1, description=plain_text(name))
