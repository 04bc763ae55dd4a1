"""Pruning inside a training step: hold masks, tap gradients. Each backend implements this in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mfac_keras.optimizers import average_of, innermost, optimizer_state, trained_by

__all__ = ["Apply", "TrainingHooks"]

Apply = Callable[..., Any]


class TrainingHooks(ABC):
    """Hooks in the compiled training step of one model.

    They replace methods of the model and optimizer instances from :meth:`attach` to :meth:`detach`, and detach by
    themselves when a training step raises or another ``fit`` begins. Around each update of an innermost optimizer they
    zero gradients, and then weights, by the masks. While gradients are wanted they tap those that the outermost
    optimizer receives.

    A backend implements the abstract methods. Those marked "inside the step" are traced when the step is compiled.

    Args:
        model: The model, built.
        optimizer: The optimizer that trains the variables, built.
        variables: The variables in scope, in order.
        axes: Permutation of the axes of each variable in which its gradient is tapped.
        metrics: Returns metrics to add to those of an epoch.
    """

    _tapped_method = "apply"
    """The method of the outermost optimizer that each training step calls with its gradients."""

    _end_of_data: tuple[type[BaseException], ...] = (StopIteration,)
    """The exceptions by which a train function signals the end of its data."""

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        variables: Sequence[Any],
        axes: Sequence[tuple[int, ...]],
        *,
        metrics: Callable[[], Mapping[str, float]],
    ) -> None:
        self._model = model
        self._model_optimizer = model.optimizer
        self._optimizer = optimizer
        self._variables = list(variables)
        self._axes = list(axes)
        self._sizes = [int(np.prod(variable.shape)) for variable in variables]
        self._index = {id(variable): index for index, variable in enumerate(variables)}
        self._updated = [False] * len(self._variables)
        self._metrics = metrics
        self._frozen: frozenset[int] = frozenset()
        self._tapping = False
        self._found_gradients = False
        self._hooked: list[tuple[Any, str]] = []
        # One train function that taps and one that does not: gradients that are not needed cost nothing, and switching
        # between the two compiles nothing.
        self._train_functions: dict[bool, Callable[..., Any]] = {}

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._hooked)

    @property
    def is_followed(self) -> bool:
        """Whether the model still has the optimizer that it had when the hooks were made."""
        return self._model.optimizer is self._model_optimizer

    @property
    def updated(self) -> list[Any]:
        """The variables in scope that training steps have passed to the optimizer so far."""
        return [each for each, updated in zip(self._variables, self._updated, strict=True) if updated]

    def attach(self) -> None:
        """Put the hooks in place.

        Raises:
            RuntimeError: If another callback prunes with this optimizer.
        """
        if any("apply" in vars(leaf) for leaf in innermost(self._optimizer)):
            raise RuntimeError(
                f"another callback prunes what {self._optimizer.name} trains; put the modifiers of both into one recipe"
            )
        self._prepare()
        for leaf in innermost(self._optimizer):
            self._hook(leaf, "apply", self._masking(leaf, leaf.apply))
        self._hook(self._optimizer, self._tapped_method, self._tapped(getattr(self._optimizer, self._tapped_method)))
        self._hook(self._model, "make_train_function", self._another_fit)
        # Every callback sees the metrics added here, wherever it is in the list.
        self._hook(self._model, "_get_metrics_result_or_logs", self._adding(self._model._get_metrics_result_or_logs))
        self._set_train_function()

    def detach(self) -> None:
        """Remove the hooks: model and optimizer are as before, and compile their training step again."""
        for owner, name in reversed(self._hooked):
            vars(owner).pop(name, None)
        if self._hooked:
            self._model.train_function = None
        self._hooked = []
        self._train_functions = {}

    def tap(self, on: bool) -> None:
        """Start or stop tapping the gradients of the next steps."""
        if on != self._tapping:
            self._tapping = on
            self._set_train_function()

    def freeze(self, variables: Iterable[Any]) -> None:
        """Leave variables and their optimizer state unchanged from now on; those of an earlier call train again."""
        frozen = frozenset(map(id, variables))
        if frozen != self._frozen:
            self._frozen = frozen
            self.recompile()

    def is_frozen(self, variable: Any) -> bool:
        """Return whether :meth:`freeze` leaves a variable unchanged."""
        return id(variable) in self._frozen

    def recompile(self) -> None:
        """Compile the training step again, because a constant in it has changed."""
        self._train_functions = {}
        self._set_train_function()

    def not_followed(self, what: str, *, cure: str = "") -> RuntimeError:
        """Return the error for a training step that does not pass something to the optimizer that is followed."""
        return RuntimeError(
            f"the training step of {self._model.name} does not pass {what} to {self._optimizer.name}: call apply or "
            "apply_gradients of this optimizer in train_step, or pass the optimizer that it uses as "
            f"optimizer=...{cure}"
        )

    def rows(self) -> list[list[Any]]:
        """Return the gradients that were tapped since the last call.

        Returns:
            For each training step its unscaled gradients, one flat array per variable in scope, permuted.

        Raises:
            RuntimeError: If no gradient arrived in a step.
        """
        if not self._tapping:
            return []
        ends = np.cumsum(self._sizes)
        rows = [
            [row[end - size : end] for size, end in zip(self._sizes, ends, strict=True)] for row in self._stored_rows()
        ]
        if not self._found_gradients:
            raise self.not_followed("its gradients", cure=", or take gradients from a dataset with sampler=...")
        return rows

    def hold(self, masks: Sequence[npt.NDArray[np.bool_] | None]) -> None:
        """Hold masks from now on, and zero the optimizer state of pruned weights.

        Args:
            masks: One for each variable in scope, True keeps; ``None`` for a variable without a mask.
        """
        for index, (variable, mask) in enumerate(zip(self._variables, masks, strict=True)):
            self._set_mask(index, mask)
            if mask is None:
                continue
            for leaf in innermost(self._optimizer):
                for slot in optimizer_state(leaf, variable):
                    slot.assign(slot * keras.ops.convert_to_tensor(mask, dtype=slot.dtype))

    def sync(self) -> None:
        """Make sure that the variables have their current values."""

    # what each backend does its own way

    @abstractmethod
    def _prepare(self) -> None:
        """Make masks of ones."""

    def _make_train_function(self) -> Callable[..., Any]:
        """Return a train function for Keras, which taps gradients if ``_tapping`` is set."""
        type(self._model).make_train_function(self._model, force=True)
        function: Callable[..., Any] = self._model.train_function
        return function

    @abstractmethod
    def _store(self, gradients: list[Any]) -> None:
        """Store the gradients of a step, one per variable in scope; inside the step."""

    @abstractmethod
    def _stored_rows(self) -> list[Any]:
        """Return what was stored since the last call: one flat array per step."""

    @abstractmethod
    def _set_mask(self, index: int, mask: npt.NDArray[np.bool_] | None) -> None:
        """Set the mask of a variable."""

    @abstractmethod
    def _mask_of(self, index: int) -> Any:
        """Return the mask of a variable, or ``None``; inside the step."""

    @abstractmethod
    def _masked(self, gradient: Any, mask: Any) -> Any:
        """Return a gradient with zeros where its variable is pruned; inside the step."""

    @abstractmethod
    def _mask_variable(self, variable: Any, mask: Any) -> None:
        """Set a variable to zero where it is pruned; inside the step."""

    # the hooks themselves

    def _hook(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        object.__setattr__(owner, name, function)
        if (owner, name) not in self._hooked:
            self._hooked.append((owner, name))

    def _set_train_function(self) -> None:
        if self._tapping not in self._train_functions:
            self._train_functions[self._tapping] = self._guarded(self._make_train_function())
        self._model.train_function = self._train_functions[self._tapping]

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def train_function(*args: Any) -> Any:
            try:
                return function(*args)
            except self._end_of_data:
                raise
            except BaseException:
                self.detach()
                raise

        return train_function

    def _masking(self, leaf: Any, apply: Apply) -> Apply:
        def masked_apply(grads: Any, trainable_variables: Any = None) -> Any:
            variables = trained_by(leaf) if trainable_variables is None else list(trainable_variables)
            self._note_updated(variables)
            if self._frozen:
                pairs = zip(grads, variables, strict=True)
                trained = [(gradient, variable) for gradient, variable in pairs if id(variable) not in self._frozen]
                grads, variables = [gradient for gradient, _ in trained], [variable for _, variable in trained]
                trainable_variables = variables
            masks = [self._mask_for(variable) for variable in variables]
            gradients = [
                gradient if gradient is None or mask is None else self._masked(gradient, mask)
                for gradient, mask in zip(grads, masks, strict=True)
            ]
            result = apply(gradients, trainable_variables)
            for variable, mask in zip(variables, masks, strict=True):
                if mask is None:
                    continue
                self._mask_variable(variable, mask)
                average = average_of(leaf, variable)
                if average is not None:
                    self._mask_variable(average, mask)
            return result

        return masked_apply

    def _note_updated(self, variables: Iterable[Any]) -> None:
        for variable in variables:
            index = self._index.get(id(variable))
            if index is not None:
                self._updated[index] = True

    def _mask_for(self, variable: Any) -> Any:
        index = self._index.get(id(variable))
        return None if index is None else self._mask_of(index)

    def _tapped(self, apply: Apply) -> Apply:
        def tapped_apply(grads: Any, trainable_variables: Any = None) -> Any:
            if self._tapping:
                variables = trained_by(self._optimizer) if trainable_variables is None else trainable_variables
                self._tap_gradients(list(grads), list(variables))
            return apply(grads, trainable_variables)

        return tapped_apply

    def _tap_gradients(self, gradients: list[Any], variables: list[Any]) -> None:
        found = {id(variable): gradient for variable, gradient in zip(variables, gradients, strict=True)}
        if any(found.get(key) is not None for key in self._index):
            self._found_gradients = True
            self._store([found.get(id(variable)) for variable in self._variables])

    def _unscaled(self, row: Any) -> Any:
        """Return gradients without the factor that the loss is multiplied by for mixed precision; inside the step."""
        scale = self._optimizer.scale_loss(1.0)
        return row if isinstance(scale, float) and scale == 1.0 else row / keras.ops.cast(scale, "float32")

    def _adding(self, metrics: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda logs: {**metrics(logs), **self._metrics()}

    def _another_fit(self, *args: Any, **kwargs: Any) -> Any:
        # Keras makes a train function when a fit begins, before anything else: the run of these hooks is over.
        self.detach()
        return self._model.make_train_function(*args, **kwargs)
