"""The batches that gradient samples come from, begun anew whenever they have run out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mfac_core.errors import SettingError
from mfac_core.settings.checks import is_integer
from mfac_core.weight_names import join_names

__all__ = ["BatchSource", "HeldOut", "batches_of_one_pass", "batches_to_sample", "zero_in_all_samples"]

BatchSource = Iterable[Any] | Callable[..., Iterable[Any]]
"""Batches, or a function that makes them."""

_MOST_WITHOUT_LENGTH = 1000
"""Batches of one pass over data that may have no end."""

_logger = logging.getLogger("mfac_core")


@dataclass
class HeldOut:
    """Batches that are drawn after those of the gradient samples.

    Args:
        wanted: How many.
        batches: Those that were drawn.
        are_new: Whether they come from the one pass that the gradient samples come from, so that none of them gave one.
    """

    wanted: int
    batches: list[Any] = field(default_factory=list)
    are_new: bool = True


def batches_to_sample(
    source: BatchSource, count: int, options: Mapping[str, object] | None = None, held_out: HeldOut | None = None
) -> Iterator[Any]:
    """Yield batches, as many as are asked for.

    When the batches have run out, they are begun anew, and a function is called anew; an iterator, which cannot begin
    anew, yields what it had, with a warning.

    Batches to hold out follow, as far as there are any. An iterator gives none: what it has are gradient samples.

    Args:
        source: The batches, or a function that makes them.
        count: How many to yield.
        options: What the recipe gives as ``grad_sampler_kwargs``. A function gets them by name where it has these
            arguments, otherwise as one dictionary.
        held_out: Takes further batches, once all are yielded and one more is asked for.

    Yields:
        The batches.

    Raises:
        TypeError: If there are options and the source does not take them, or none and it needs some, or if the function
            returns no batches.
        ValueError: If the source yields no batch at all.

    Example:
        >>> list(batches_to_sample(["first", "second"], 3))
        ['first', 'second', 'first']
    """
    drawn = 0
    while drawn < count:
        before = drawn
        batches = iter(_opened(source, options or {}))
        for batch in batches:
            yield batch
            drawn += 1
            if drawn == count:
                if held_out is not None and not isinstance(source, Iterator):
                    held_out.are_new = before == 0
                    _hold_out(held_out, batches, lambda: _opened(source, options or {}))
                return
        if drawn == before:
            if drawn == 0:
                raise ValueError(_no_batch(source))
            _logger.warning("the data ended after %d of %d gradient samples and cannot be started again", drawn, count)
            return
        if before == 0:
            _logger.info("the data ended after %d of %d gradient samples; starting them again", drawn, count)


def batches_of_one_pass(
    source: BatchSource, at_most: int | None = None, options: Mapping[str, object] | None = None
) -> Iterator[Any]:
    """Yield the batches of one pass over the data.

    Args:
        source: The batches, or a function that makes them.
        at_most: How many to yield at most; ``None`` for all, of data without a length the first 1,000.
        options: As in :func:`batches_to_sample`.

    Yields:
        The batches.

    Raises:
        SettingError: If ``at_most`` is not a positive integer.
        TypeError: As in :func:`batches_to_sample`.
        ValueError: If the source yields no batch at all.

    Example:
        >>> list(batches_of_one_pass(["first", "second"])), list(batches_of_one_pass(["first", "second"], 1))
        (['first', 'second'], ['first'])
    """
    if at_most is not None and (not is_integer(at_most) or at_most < 1):
        raise SettingError(
            "num_batches", f"{at_most!r} must be a positive integer, or None for all batches of one pass over the data"
        )
    opened = _opened(source, options or {})
    most = _MOST_WITHOUT_LENGTH if at_most is None and not _has_length(opened) else at_most
    drawn = 0
    for batch in islice(opened, most):
        yield batch
        drawn += 1
    if not drawn:
        raise ValueError(_no_batch(source))
    if at_most is None and drawn == most:
        _logger.info("the data have no length: one pass over them is taken to end after %d batches", drawn)


def zero_in_all_samples(names: Collection[str], num_weights: int) -> list[str]:
    """Return the warning about weights whose gradient is zero in every sample.

    Args:
        names: The names of the weights.
        num_weights: How many have a gradient; where it is zero for all of them, the gradient window is spoken of.

    Returns:
        One sentence, or none where there are no such weights.
    """
    if not names or len(names) == num_weights:
        return []
    return [
        f"the gradient is zero in every gradient sample for {join_names(names)}, so that M-FAC prunes them as if "
        "they had "
        "no effect; exclude what the loss does not use. A part that is used in training mode only needs samples in "
        "that mode, and a reentrant checkpoint needs an input that requires a gradient"
    ]


def _hold_out(held_out: HeldOut, batches: Iterator[Any], begun_anew: Callable[[], Iterable[Any]]) -> None:
    held_out.batches.extend(islice(batches, held_out.wanted))
    lacking = held_out.wanted - len(held_out.batches)
    if lacking:
        held_out.are_new = False
        held_out.batches.extend(islice(begun_anew(), lacking))


def _opened(source: BatchSource, options: Mapping[str, object]) -> Iterable[Any]:
    opened = _called(source, options)
    if not isinstance(opened, Iterable):
        raise TypeError(
            f"the function that makes the batches returned a {type(opened).__name__}; it must return an iterable of "
            "batches, such as a data loader"
        )
    return opened


def _no_batch(source: BatchSource) -> str:
    return (
        f"the source of batches (a {type(source).__name__}) yields no batch; a used-up generator must be passed as a "
        "callable that makes a new one"
    )


def _has_length(batches: Iterable[Any]) -> bool:
    try:
        return isinstance(batches, Sized) and len(batches) >= 0
    except TypeError:  # of a loader over data that have none
        return False


def _called(source: BatchSource, options: Mapping[str, object]) -> Any:
    if not isinstance(source, Iterable):
        signature = inspect.signature(source)
        if _takes(signature, **options):
            return source(**options)
        if _takes(signature, options):  # one dictionary, which may be None: what SparseML passes
            return source(dict(options) or None)
    elif not options:
        return source
    if not options:
        raise TypeError(
            f"the batches to sample gradients from come from {source!r}, which cannot be called without arguments; "
            "pass a function without arguments that makes the batches, and the loss function after it"
        )
    raise TypeError(
        f"the recipe gives grad_sampler_kwargs {dict(options)}, and the batches to sample gradients from come from a "
        f"{type(source).__name__} that takes none of these; pass a function of them that makes the batches"
    )


def _takes(signature: inspect.Signature, /, *args: object, **kwargs: object) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True
