"""The batches that gradient samples come from: drawn from a source that is restarted whenever it is exhausted."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, ClassVar

import numpy as np

from mfac_core.errors import SettingError
from mfac_core.left_out import warn_once
from mfac_core.ranks.agreement import gathered, named_ranks, together
from mfac_core.ranks.base import Alone, Ranks
from mfac_core.ranks.logs import logger_of
from mfac_core.settings.checks import is_integer
from mfac_core.weight_names import join_names

__all__ = [
    "BatchSource",
    "HeldOut",
    "Sampler",
    "batches_of_one_pass",
    "batches_to_sample",
    "in_step",
    "mean_loss",
    "zero_in_all_samples",
]

BatchSource = Iterable[Any] | Callable[..., Iterable[Any]]
"""Batches, or a function that makes them."""

_MAX_WITHOUT_LENGTH = 1000
"""Batches of one pass over data that may have no end."""

_logger = logging.getLogger("mfac_core")


@dataclass
class HeldOut:
    """Batches drawn after those of the gradient samples, to measure the loss on.

    Args:
        wanted: How many to draw.
        batches: The batches drawn so far.
        are_new: Whether they continue the only pass over the data, so that none of them has given a gradient sample.
    """

    wanted: int
    batches: list[Any] = field(default_factory=list)
    are_new: bool = True


class Sampler:
    """Draws batches; base class of the adapters' samplers, which compute gradients and losses of them.

    Args:
        source: The batches, or a function that makes them.
    """

    _logger: ClassVar[logging.Logger] = logging.getLogger("mfac_core")

    def __init__(self, source: BatchSource) -> None:
        self._source = source
        self._logged: set[str] = set()

    def batches(self, count: int, options: Mapping[str, object] | None = None) -> list[Any]:
        """Draw batches as for gradient samples.

        A source that runs out is restarted; an iterator, which cannot be restarted, yields its remaining batches.

        Args:
            count: How many batches to draw.
            options: Passed to the callable that makes the batches.

        Returns:
            The batches, as the source yields them.

        Raises:
            TypeError: If there are options and the batches do not come from a callable that takes them.
            ValueError: If there is no batch at all.
        """
        return list(batches_to_sample(self._source, count, options))

    def one_pass(self, at_most: int | None = None, options: Mapping[str, object] | None = None) -> Iterator[Any]:
        """Return the batches of one pass over the data.

        Args:
            at_most: The maximum number of batches; ``None`` for all, or the first 1,000 of data without a length.
            options: Passed to the callable that makes the batches.

        Returns:
            The batches one by one, as the source yields them; errors are raised as by :meth:`batches`.
        """
        return batches_of_one_pass(self._source, at_most, options)

    def _without_gaps(
        self,
        samples: Iterable[Sequence[Any]],
        names: Sequence[str],
        count: int,
        zeros: Callable[[int], Any],
        *,
        ranks: Ranks | None = None,
        sharded: bool = False,
    ) -> Iterator[list[Any]]:
        """Yield samples, a gradient per name, with ``zeros(index)`` for ``None``; warn about gradients that stay zero.

        Of sharded weights, each of the ranks has a part of each sample; otherwise the first warns about its own.

        Raises:
            ValueError: If a sample has no gradient at all.
        """
        ranks, zero = ranks or Alone(), list(range(len(names)))
        for number, gradients in enumerate(samples, start=1):
            if all(gradient is None for gradient in gradients):
                raise ValueError(
                    f"the loss of the sampled batches depends on none of the weights to prune: {', '.join(names)}"
                )
            zero = [index for index in zero if gradients[index] is None or not gradients[index].any()]
            if number == count:  # before the last sample is yielded: the caller may not ask for another
                if sharded:
                    is_nonzero = ranks.sum(np.array([index not in zero for index in range(len(names))], np.int64))
                    zero = np.flatnonzero(is_nonzero == 0).tolist()
                warning = zero_in_all_samples([names[index] for index in zero], len(names))
                warn_once(logger_of(ranks, self._logger), warning, self._logged)
            yield [zeros(index) if gradient is None else gradient for index, gradient in enumerate(gradients)]


def batches_to_sample(
    source: BatchSource,
    count: int,
    options: Mapping[str, object] | None = None,
    held_out: HeldOut | None = None,
    *,
    ranks: Ranks | None = None,
) -> Iterator[Any]:
    """Yield ``count`` batches; a source that runs out is restarted.

    A function is then called again; an iterator, which cannot be restarted, yields the batches it has left, with a
    warning. It is an error if the source yields no batch at all, or if a function does not take the options.

    Of several ranks, each reads its own source and takes every ``size``-th batch from its rank on: whether all read the
    same data or each its own part, no batch is taken twice in one pass. In the next pass a rank begins one batch later,
    so that in ``size`` passes it takes all that it reads.

    Args:
        source: The batches, or a function that makes them.
        count: How many to yield: of several ranks, the share of this one.
        options: ``grad_sampler_kwargs`` of the recipe. A function gets them by name if it has these arguments,
            otherwise as one dictionary.
        held_out: Filled once all batches are yielded and one more is asked for; not from an iterator, whose batches are
            all needed for gradient samples.
        ranks: The processes that draw samples; ``None`` for a single one.

    Example:
        >>> list(batches_to_sample(["first", "second"], 3))
        ['first', 'second', 'first']
    """
    ranks = ranks or Alone()
    taken = 0
    for number in itertools.count():
        if number == 1:
            of_rank = "" if ranks.size == 1 else " on each rank"
            message = "the data ended after %d of %d gradient samples%s and are restarted"
            logger_of(ranks, _logger).info(message, taken, count, of_rank)
        passed = _pass(source, options or {}, ranks, number)
        if passed is None and number == 0:
            raise ValueError(_no_batch(source))
        if passed is None and ranks.size > 1:
            raise ValueError(
                f"the data ended after {taken} of {count} gradient samples on rank {ranks.rank} and cannot be "
                "restarted; instead of an iterator, pass a data loader, or a function that returns a new iterator"
            )
        if passed is None:
            _logger.warning("the data ended after %d of %d gradient samples and cannot be restarted", taken, count)
            return
        for batch in islice(passed, count - taken):
            taken += 1
            yield batch
        if taken == count:
            if held_out is not None and not isinstance(source, Iterator):
                held_out.are_new = number == 0
                further = (_pass(source, options or {}, ranks, number + each) for each in range(1, ranks.size + 1))
                _hold_out(held_out, passed, further)
            return


def in_step(batches: Iterable[Any], ranks: Ranks) -> Iterator[Any]:
    """Yield batches that all ranks use together: the same number on each, or an error on all.

    Args:
        batches: The batches of this rank.
        ranks: The processes.

    Raises:
        ValueError: If the batches end earlier on some ranks than on others.

    Example:
        >>> from mfac_core.ranks import Alone
        >>> list(in_step(["first", "second"], Alone()))
        ['first', 'second']
    """
    if ranks.size == 1:
        yield from batches
        return
    reading, end = iter(batches), object()
    for number in itertools.count():
        with together(ranks, "reading a batch"):
            batch = next(reading, end)
        ended = [rank for rank, (has_ended,) in enumerate(gathered(ranks, [int(batch is end)])) if has_ended]
        if len(ended) == ranks.size:
            return
        if ended:
            raise ValueError(
                f"the data ended after {number} batches on {named_ranks(ended)}, and the other ranks have more; give "
                "each rank the same number of batches, such as by a DistributedSampler"
            )
        yield batch


def batches_of_one_pass(
    source: BatchSource,
    at_most: int | None = None,
    options: Mapping[str, object] | None = None,
) -> Iterator[Any]:
    """Yield the batches of one pass over the data, at most ``at_most``; or the first 1,000 of data without a length.

    Example:
        >>> list(batches_of_one_pass(["first", "second"])), list(batches_of_one_pass(["first", "second"], 1))
        (['first', 'second'], ['first'])
    """
    if at_most is not None and (not is_integer(at_most) or at_most < 1):
        raise SettingError(
            "num_batches", f"{at_most!r} must be a positive integer, or None for all batches of one pass over the data"
        )
    opened = _opened(source, options or {})
    limit = _MAX_WITHOUT_LENGTH if at_most is None and not _has_length(opened) else at_most
    drawn = 0
    for batch in islice(opened, limit):
        yield batch
        drawn += 1
    if not drawn:
        raise ValueError(_no_batch(source))
    if at_most is None and drawn == limit:
        _logger.info("the data have no length: the first %d batches count as one pass", drawn)


def mean_loss(losses: Iterable[float]) -> float:
    """Return the mean of the losses of batches; it is an error if there is no batch."""
    values = list(losses)
    if not values:
        raise ValueError("there is no batch to evaluate the loss on; pass at least one")
    return math.fsum(values) / len(values)


def zero_in_all_samples(names: Collection[str], num_weights: int) -> list[str]:
    """Return the warning about weights whose gradient is zero in every sample.

    Empty if there are no such weights; if all ``num_weights`` are, the gradient window warns instead.
    """
    if not names or len(names) == num_weights:
        return []
    return [
        f"the gradient is zero in every gradient sample for {join_names(names)}, so M-FAC prunes them as if they "
        "had no effect; exclude weights that the loss does not use. A module that is used in training mode only "
        "needs samples in that mode, and a reentrant checkpoint needs an input that requires a gradient"
    ]


def _pass(source: BatchSource, options: Mapping[str, object], ranks: Ranks, number: int) -> Iterator[Any] | None:
    """Return the batches of this rank in a pass over the data; ``None`` if there are no data at all."""
    batches = iter(_opened(source, options))
    first = list(islice(batches, 1))
    if not first:
        return None
    return islice(chain(first, batches), (ranks.rank + number) % ranks.size, None, ranks.size)


def _hold_out(held_out: HeldOut, batches: Iterator[Any], further: Iterator[Iterator[Any] | None]) -> None:
    held_out.batches.extend(islice(batches, held_out.wanted))
    while len(held_out.batches) < held_out.wanted and (restarted := next(further, None)) is not None:
        held_out.are_new = False
        held_out.batches.extend(islice(restarted, held_out.wanted - len(held_out.batches)))


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
        f"the source of batches (a {type(source).__name__}) yields no batch; instead of a generator that is exhausted, "
        "pass a callable that returns a new one"
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
