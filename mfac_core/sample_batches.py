"""The batches that gradient samples come from, begun anew whenever they have run out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from mfac_core.weight_names import listed

__all__ = ["BatchSource", "batches_to_sample", "zero_in_all_samples"]

BatchSource = Iterable[Any] | Callable[..., Iterable[Any]]
"""Batches, or a function that makes them."""

_logger = logging.getLogger("mfac_core")


def batches_to_sample(source: BatchSource, count: int, options: Mapping[str, object] | None = None) -> Iterator[Any]:
    """Yield batches, as many as are asked for.

    When the batches have run out, they are begun anew, and a function is called anew; an iterator, which cannot begin
    anew, yields what it had, with a warning.

    Args:
        source: The batches, or a function that makes them.
        count: How many to yield.
        options: What the recipe gives as ``grad_sampler_kwargs``. A function gets them by name where it has these
            arguments, otherwise as one dictionary.

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
        opened = _opened(source, options or {})
        if not isinstance(opened, Iterable):
            raise TypeError(
                f"the function that makes the batches to sample gradients from returned a {type(opened).__name__}; it "
                "must return an iterable of batches, such as a data loader"
            )
        for batch in opened:
            yield batch
            drawn += 1
            if drawn == count:
                return
        if drawn == before:
            if drawn == 0:
                raise ValueError(
                    f"what to sample gradients from (a {type(source).__name__}) yields no batch; a used-up generator "
                    "must be passed as a callable that makes a new one"
                )
            _logger.warning("the data ended after %d of %d gradient samples and cannot be started again", drawn, count)
            return
        if before == 0:
            _logger.info("the data ended after %d of %d gradient samples; starting them again", drawn, count)


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
        f"the gradient is zero in every gradient sample for {listed(names)}, so that M-FAC prunes them as if they had "
        "no effect; exclude what the loss does not use. A part that is used in training mode only needs samples in "
        "that mode, and a reentrant checkpoint needs an input that requires a gradient"
    ]


def _opened(source: BatchSource, options: Mapping[str, object]) -> Iterable[Any]:
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
