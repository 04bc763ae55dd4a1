"""The contract: what the module of each backend of Keras provides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from mfac_core.backends import Array
from mfac_core.ranks import Ranks
from mfac_keras.backends.hooks import TrainingHooks

__all__ = ["Backend"]


class Backend(Protocol):
    """A module of this package.

    Attributes:
        Hooks: The hooks in the training step.
    """

    Hooks: type[TrainingHooks]

    def refuse_unsupported(self, model: Any) -> None:
        """Refuse ways of training in which masks or gradients would be wrong.

        Args:
            model: The model.

        Raises:
            NotImplementedError: If the model is trained in such a way.
        """

    def ranks(self, model: Any) -> Ranks:
        """Return the processes that train the model together, each of which has all of its weights.

        Args:
            model: The model; which weights a process has is known once it is built.

        Raises:
            NotImplementedError: If there are several processes and this is not supported.
        """

    def to_array(self, tensor: Any) -> Array:
        """Return a variable or tensor as an array for the core. Treat it as read-only.

        Args:
            tensor: A Keras variable or a tensor of the backend, of any float type.

        Returns:
            A NumPy array that shares the tensor's memory if possible, or a CuPy array on the tensor's GPU if CuPy is
            installed (see :func:`mfac_keras.conversion.gpu_array`): float64 for float64, otherwise float32.
        """

    def to_tensor(self, array: Array) -> Any:
        """Return an array in a form that can be assigned to a variable.

        Args:
            array: A NumPy or CuPy array.
        """

    def of_all_ranks(self, value: Any, variable: Any) -> Any:
        """Return a value, which is the same on each rank, in a form that each can assign without the others.

        Args:
            value: A value that can be assigned to the variable of a single process.
            variable: The variable.
        """

    def local_values(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which each rank can evaluate the model on batches of its own.

        Values that are assigned to variables in it are dropped at its end, if there are several ranks.

        Args:
            model: The model.
        """

    def loss_gradients(
        self,
        model: Any,
        variables: Sequence[Any],
        loss_of: Callable[..., Any],
        batches: Iterator[Any],
        scale: float,
    ) -> Iterator[list[Array | None]]:
        """Yield the gradients of a loss in inference mode, one per batch.

        Args:
            model: The model.
            variables: The variables to differentiate with respect to.
            loss_of: ``loss_of(x, y, sample_weight)``, a scalar tensor.
            batches: ``(x, y, sample_weight)`` each.
            scale: The loss is multiplied by it, and the gradients are divided by it.

        Yields:
            One array per variable, of its shape; ``None`` if the loss does not depend on it.
        """

    def loss_function(self, model: Any, loss_of: Callable[..., Any]) -> Callable[[Any], Any]:
        """Return a function that evaluates a loss in inference mode, compiled if the model is.

        Args:
            model: The model; the function reads its current values.
            loss_of: ``loss_of(x, y, sample_weight)``, a scalar tensor.

        Returns:
            A function from ``(x, y, sample_weight)`` to the loss.
        """

    def no_gradients(self) -> AbstractContextManager[None]:
        """Return a context in which nothing is recorded for gradients."""
