"""Gradient samples from a data loader, outside the training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import nn

from mfac_core.sample_batches import BatchSource, batches_to_sample

__all__ = ["GradSampler"]

LossFunction = Callable[[Any, Any], torch.Tensor]

_logger = logging.getLogger("mfac_torch")


class GradSampler:
    """Draws gradient samples: the gradients of a loss, one per batch of a data loader.

    The model is evaluated in eval mode and is left as it was: the training flag of each module, ``.grad`` and
    normalization statistics do not change.

    Args:
        data_loader_or_builder: Batches, each ``(inputs, targets)`` for ``model(inputs)`` or ``(args, kwargs, target)``
            for ``model(*args, **kwargs)``; or a callable that returns an iterator of such batches. It is called anew
            for each drawing, and when its batches have run out. What a recipe gives as ``grad_sampler_kwargs`` is
            passed to it: by name where it has these arguments, otherwise as one dictionary.
            Tensors in host memory are moved to the device of the model.
        loss_fn: ``loss_fn(output, target)``, a scalar tensor; ``output`` is what the model returned, or the first entry
            of a tuple that the function does not take.
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

    def __init__(self, data_loader_or_builder: BatchSource, loss_fn: LossFunction, *, progress: bool = False) -> None:
        batches_last = not callable(loss_fn) and isinstance(loss_fn, Iterable) and not isinstance(loss_fn, str)
        if isinstance(data_loader_or_builder, nn.Module) or (callable(data_loader_or_builder) and batches_last):
            raise TypeError(
                f"data_loader_or_builder is a {type(data_loader_or_builder).__name__} and loss_fn a "
                f"{type(loss_fn).__name__}; the batches come first: write GradSampler(data_loader, loss_fn)"
            )
        if not callable(data_loader_or_builder) and not isinstance(data_loader_or_builder, Iterable):
            raise TypeError(
                f"data_loader_or_builder is a {type(data_loader_or_builder).__name__}; pass an iterable of batches, "
                "such as a DataLoader, or a callable that returns one"
            )
        if not callable(loss_fn):
            raise TypeError(f"loss_fn is a {type(loss_fn).__name__}; pass a callable loss_fn(output, target)")
        self._source = data_loader_or_builder
        self._loss_fn = loss_fn
        self._progress = progress
        self._takes_first_entry = False

    @classmethod
    def of(cls, sampler: GradSampler | Mapping[str, Any]) -> Self | GradSampler:
        """Return a sampler from a sampler or from the older dictionary form.

        Args:
            sampler: A :class:`GradSampler`, or ``{"data_loader_builder": ..., "loss_function": ...}``; ``loss_fn`` is
                taken for ``loss_function`` too.

        Returns:
            The sampler itself, or one made from the dictionary.

        Raises:
            TypeError: If it is neither; the message names what is wrong.
        """
        if isinstance(sampler, GradSampler):
            return sampler
        if not isinstance(sampler, Mapping):
            raise TypeError(f"grad_sampler is a {type(sampler).__name__}; pass GradSampler(data_loader, loss_fn)")
        named = {"loss_function" if key == "loss_fn" else key: value for key, value in sampler.items()}
        if set(named) != {"data_loader_builder", "loss_function"}:
            raise TypeError(
                f"grad_sampler has the keys {sorted(sampler)}; as a dictionary it has the keys data_loader_builder "
                "and loss_function"
            )
        return cls(named["data_loader_builder"], named["loss_function"])

    def gradients(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        count: int,
        options: Mapping[str, object] | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield gradient samples.

        When the data end early they are started again; an iterator, which cannot be, yields what it had.

        Args:
            model: The model to evaluate, unwrapped.
            parameters: The parameters to differentiate by, by name.
            count: How many samples to draw.
            options: Passed to the callable that makes the batches.

        Yields:
            The gradient of one batch's loss by parameter name, each of its parameter's shape; zeros for a parameter
            that the loss does not depend on.

        Raises:
            ValueError: If there is no batch at all, a batch has another form, or the loss is not a scalar that depends
                on the parameters.
            TypeError: If the batches do not come from a callable that takes the options.
        """
        batches = batches_to_sample(self._source, count, options)
        with _progress_bar(count) if self._progress else nullcontext(_no_advance) as advance:
            for batch in batches:
                yield self._gradient(model, parameters, batch)
                advance()

    def _gradient(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Any
    ) -> dict[str, torch.Tensor]:
        args, kwargs, target = _to_device(_call_of(batch), _device_of(model))
        with _evaluating(model), _trained(parameters.values()), torch.enable_grad():
            loss = self._loss(model(*args, **kwargs), target)
            _check_loss(loss)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                f"the loss of the GradSampler depends on none of the weights to prune: {', '.join(parameters)}"
            )
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }

    def _loss(self, output: Any, target: Any) -> Any:
        if self._takes_first_entry:
            return self._loss_fn(output[0], target)
        try:
            return self._loss_fn(output, target)
        except (TypeError, AttributeError) as error:
            if type(output) is not tuple:
                raise
            try:
                loss = self._loss_fn(output[0], target)
            except Exception:
                raise error from None
            self._takes_first_entry = True
            _logger.info("loss_fn of the GradSampler does not take the tuple that the model returns: it gets its first")
            return loss


def _call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    if isinstance(batch, tuple | list):
        if len(batch) == 3 and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping):
            return tuple(batch[0]), dict(batch[1]), batch[2]
        if len(batch) == 2:
            return (batch[0],), {}, batch[1]
    raise ValueError(
        f"the data loader of the GradSampler yields {_described(batch)}; "
        "each batch must be (inputs, targets) or ([args...], {kwargs...}, target)"
    )


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"a {type(value).__name__}"


def _device_of(model: nn.Module) -> torch.device:
    return next(parameter.device for parameter in model.parameters())


def _to_device(value: Any, device: torch.device) -> Any:
    # What the user has placed on another device already stays there.
    if isinstance(value, torch.Tensor):
        return value.to(device) if value.device.type == "cpu" else value
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(_to_device(item, device) for item in value)
    return value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _trained(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor):
        raise ValueError(f"loss_fn of the GradSampler returned a {type(loss).__name__}; it must return a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn of the GradSampler returned a tensor of shape {tuple(loss.shape)}; it must return a scalar, "
            "such as the mean over the batch"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss of the GradSampler does not depend on the model's parameters; check model and loss_fn"
        )


@contextmanager
def _progress_bar(count: int) -> Iterator[Callable[[], None]]:
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("gradient samples", total=count)
        yield lambda: bar.advance(task)


def _no_advance() -> None:
    pass
