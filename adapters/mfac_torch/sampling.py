"""Gradient samples from a data loader, outside the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn

from mfac_core.ranks import Alone, Ranks
from mfac_core.sample_batches import BatchSource, HeldOut, Sampler, batches_to_sample, in_step, mean_loss
from mfac_torch.batches import (
    check_loss,
    check_model_takes,
    check_scalar,
    described,
    loss_in_output,
    model_arguments,
    to_device_of,
)
from mfac_torch.evaluation import (
    check_not_reentrant,
    has_distributed_hooks,
    in_mode,
    requiring_gradients,
    without_gradients,
)
from mfac_torch.sharded import is_sharded, local, reshard

__all__ = ["GradSampler", "SamplerArgument", "sampler_of"]

LossFunction = Callable[[Any, Any], torch.Tensor]

_Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""The arguments of the model by position and by name, and the target."""


class GradSampler(Sampler):
    """Draws gradient samples: the gradients of a loss, one per batch of a data loader.

    Sampling leaves the training flags of the modules, ``.grad`` and normalization statistics unchanged.

    Args:
        data_loader_or_builder: Batches, each ``(inputs, targets)`` for ``model(inputs)``, ``(args, kwargs, target)``
            for ``model(*args, **kwargs)``, or a mapping for ``model(**batch)``, whose ``labels`` are the target of
            ``loss_fn``; or a callable that returns an iterator of such batches. The callable is called each time that
            samples are drawn, and again when its batches run out; ``grad_sampler_kwargs`` of a recipe are passed to it
            by name if it has these arguments, otherwise as one dictionary.
            Tensors in host memory are moved to the device of the model.
        loss_fn: ``loss_fn(output, target)``, a scalar tensor; ``output`` is the output of the model, or its first entry
            if the function does not take a tuple. ``None`` uses the loss that the model itself returns when it is
            called with the whole batch: a scalar tensor, ``output.loss``, the first entry of a tuple, or the sum of a
            dictionary of losses.
        training: Whether the model is evaluated in training mode, for models that return losses in that mode only;
            normalization statistics are restored after each sample. In a model that is in training mode already,
            modules that are not (a frozen normalization layer) stay in evaluation mode.
        progress: Whether to show a progress bar while sampling.

    Raises:
        TypeError: If the batches are neither iterable nor callable, or ``loss_fn`` is not callable.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), batch_size=2)
        >>> sampler = GradSampler(loader, nn.functional.mse_loss)
        >>> model = nn.Linear(4, 1)
        >>> [row["weight"].shape for row in sampler.gradients(model, {"weight": model.weight}, count=2)]
        [torch.Size([1, 4]), torch.Size([1, 4])]
    """

    _logger = logging.getLogger("mfac_torch")

    def __init__(
        self,
        data_loader_or_builder: BatchSource,
        loss_fn: LossFunction | None = None,
        *,
        training: bool = False,
        progress: bool = False,
    ) -> None:
        batches_last = not callable(loss_fn) and isinstance(loss_fn, Iterable) and not isinstance(loss_fn, str)
        if isinstance(data_loader_or_builder, nn.Module) or (callable(data_loader_or_builder) and batches_last):
            raise TypeError(
                f"data_loader_or_builder is a {type(data_loader_or_builder).__name__} and loss_fn a "
                f"{type(loss_fn).__name__}; the batches come first: write GradSampler(data_loader, loss_fn)"
            )
        if isinstance(data_loader_or_builder, torch.Tensor | str | Mapping) or not (
            callable(data_loader_or_builder) or isinstance(data_loader_or_builder, Iterable)
        ):
            raise TypeError(
                f"data_loader_or_builder is a {type(data_loader_or_builder).__name__}; pass an iterable of batches, "
                "such as a DataLoader, or a callable that returns one"
            )
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(
                f"loss_fn is a {type(loss_fn).__name__}; pass a callable loss_fn(output, target), or None if the model "
                "returns its loss"
            )
        if isinstance(loss_fn, type):
            raise TypeError(f"loss_fn is the class {loss_fn.__name__}; pass an instance: {loss_fn.__name__}()")
        super().__init__(data_loader_or_builder)
        self._loss_fn = loss_fn
        self._training = training
        self._progress = progress
        self._takes_first_entry = False

    @classmethod
    def of(cls, sampler: SamplerArgument) -> Self | GradSampler:
        """Return a sampler from a sampler or from the older dictionary form.

        Args:
            sampler: A :class:`GradSampler`, or ``{"data_loader_builder": ..., "loss_function": ...}``. The second key
                may be called ``loss_fn``, and is optional if the model returns its loss.

        Returns:
            The sampler itself, or one built from the dictionary.

        Raises:
            TypeError: If it is neither.
        """
        if isinstance(sampler, GradSampler):
            return sampler
        if not isinstance(sampler, Mapping):
            raise TypeError(f"grad_sampler is a {type(sampler).__name__}; pass GradSampler(data_loader, loss_fn)")
        named = {"loss_function" if key == "loss_fn" else key: value for key, value in sampler.items()}
        if set(named) | {"loss_function"} != {"data_loader_builder", "loss_function"}:
            raise TypeError(
                f"grad_sampler has the keys {sorted(sampler)}; as a dictionary it has the keys data_loader_builder "
                "and loss_function"
            )
        return cls(named["data_loader_builder"], named.get("loss_function"))

    def gradients(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        count: int,
        options: Mapping[str, object] | None = None,
        *,
        held_out: HeldOut | None = None,
        ranks: Ranks | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield gradient samples, drawn from batches as :meth:`batches` draws them.

        Over several processes each has the loader that it trains with, whether that is sharded or not, and takes every
        ``size``-th batch of it from its rank on, so that none is taken twice.

        Args:
            model: The model to evaluate, unwrapped.
            parameters: The parameters to differentiate with respect to, by name.
            count: How many samples this process draws.
            options: Passed to the callable that makes the batches.
            held_out: Filled with the batches that follow, once all samples are drawn.
            ranks: The processes that draw samples, ``None`` for a single one: each has samples of its own. Those of
                sharded parameters (``fully_shard``) draw each sample together, as the mean over a batch of each, and
                have their parts of it.

        Yields:
            The gradient of one batch's loss by parameter name, each of its parameter's shape; zeros for a parameter
            that the loss does not depend on. Of sharded parameters, what this process has.

        Raises:
            ValueError: If there is no batch at all, a batch has an unsupported form, the loss is not a scalar that
                depends on the parameters, or inference mode is on.
            NotImplementedError: If ``torch.distributed`` is initialized and the model has a reentrant checkpoint.
            TypeError: If there are options and the batches do not come from a callable that takes them, or the model
                does not take the batches.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "the GradSampler cannot compute gradients under torch.inference_mode(); call it outside, or under "
                "torch.no_grad()"
            )
        ranks, tensors = ranks or Alone(), list(parameters.values())
        sharded = any(map(is_sharded, tensors))
        reshard(model)  # an evaluation may have left full parameters, whose gradients would not be those of the shards
        batches = batches_to_sample(self._source, count, options, held_out, ranks=ranks)
        # looked into before the ranks run the model together: a batch of another form is then an error on all of them
        calls: Iterator[_Call] = (self._call_of(model, batch) for batch in batches)
        if sharded:
            calls = in_step(calls, ranks)
        samples = (self._gradient(model, tensors, call, is_first=not number) for number, call in enumerate(calls))
        rows = self._without_gaps(
            samples,
            list(parameters),
            count,
            lambda index: torch.zeros_like(local(tensors[index])),
            ranks=ranks,
            sharded=sharded,
        )
        with _progress_bar(count) if self._progress and ranks.rank == 0 else nullcontext(_no_advance) as advance:
            for row in rows:
                yield dict(zip(parameters, row, strict=True))
                advance()

    def loss(self, model: nn.Module, batches: Iterable[Any]) -> float:
        """Return the mean loss of batches, in the mode of the gradient samples, without gradients in the model.

        Args:
            model: The model to evaluate, unwrapped.
            batches: Batches in a form that the data loader may yield; all have the same weight.

        Returns:
            The mean of the losses.

        Raises:
            ValueError: If there is no batch, one has an unsupported form, or the loss is not a scalar.
            TypeError: If the model does not take the batches.

        Example:
            >>> sampler = GradSampler([(torch.ones(2, 1), torch.zeros(2, 1))], nn.functional.mse_loss)
            >>> sampler.loss(nn.PReLU(), sampler.batches(1))
            1.0
        """
        losses = []
        # gradients are on, because a loss may differentiate too, such as with respect to an input
        with in_mode(model, training=self._training), torch.enable_grad():
            for batch in batches:
                args, kwargs, target = self._call_of(model, batch)
                loss = self._loss_of(model(*args, **kwargs), target)
                check_scalar(loss)
                losses.append(float(loss.detach()))
        reshard(model)  # an optimizer that steps before the next backward pass would leave full parameters as they are
        return mean_loss(losses)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on one batch in its current mode, without gradients.

        Args:
            model: The model to run, unwrapped.
            batch: A batch in a form that the data loader may yield.

        Returns:
            The output of the model.

        Raises:
            ValueError: If the batch has an unsupported form.
            TypeError: If the model does not take it.
        """
        args, kwargs, _ = self._call_of(model, batch)
        with torch.no_grad():
            output = model(*args, **kwargs)
        reshard(model)
        return output

    def _call_of(self, model: nn.Module, batch: Any) -> _Call:
        args, kwargs, target = model_arguments(to_device_of(model, batch), with_target=self._loss_fn is not None)
        check_model_takes(model, args, kwargs, has_loss=self._loss_fn is not None)
        return args, kwargs, target

    def _gradient(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], call: _Call, *, is_first: bool
    ) -> list[torch.Tensor | None]:
        args, kwargs, target = call
        leaves = [*model.parameters(), *(self._loss_fn.parameters() if isinstance(self._loss_fn, nn.Module) else ())]
        with (
            in_mode(model, training=self._training),
            requiring_gradients(parameters),
            without_gradients(leaves, keep=parameters),
            torch.enable_grad(),
        ):
            loss = self._loss_of(model(*args, **kwargs), target)
            check_loss(loss)
            if has_distributed_hooks(parameters):
                if is_first:
                    check_not_reentrant(loss)
                return list(torch.autograd.grad(loss, parameters, allow_unused=True))
            # Not torch.autograd.grad: it misses what a reentrant checkpoint evaluates again in its own backward pass,
            # and all sharded parameters.
            loss.backward()
            return [None if each.grad is None else local(each.grad) for each in parameters]

    def _loss_of(self, output: Any, target: Any) -> Any:
        if self._loss_fn is None:
            return loss_in_output(output)
        if self._takes_first_entry:
            return self._loss_fn(output[0], target)
        try:
            return self._loss_fn(output, target)
        except (TypeError, AttributeError) as error:
            if type(output) is not tuple:
                if not isinstance(output, torch.Tensor):
                    error.add_note(
                        f"The GradSampler called loss_fn(output, target), where output is {described(output)} that "
                        "the model returned; let loss_fn take that."
                    )
                raise
            try:
                loss = self._loss_fn(output[0], target)
            except Exception:
                raise error from None
            self._takes_first_entry = True
            self._logger.info(
                "loss_fn of the GradSampler does not take the tuple that the model returns; it gets the first entry"
            )
            return loss


SamplerArgument = GradSampler | Mapping[str, Any]
"""A sampler, or the older dictionary form that :meth:`GradSampler.of` takes."""


def sampler_of(loader: Any, loss_fn: Any = None) -> GradSampler:
    """Return a sampler of batches, or the sampler itself, which brings its own loss."""
    if not isinstance(loader, GradSampler):
        return GradSampler(loader, loss_fn)
    if loss_fn is not None:
        raise TypeError("the GradSampler has its own loss; leave loss_fn out, or pass its batches instead of it")
    return loader


@contextmanager
def _progress_bar(count: int) -> Iterator[Callable[[], None]]:
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("gradient samples", total=count)
        yield lambda: bar.advance(task)


def _no_advance() -> None:
    pass
