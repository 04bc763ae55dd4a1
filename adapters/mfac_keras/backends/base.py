"""What pruning does inside a training step: hold masks, and tap gradients. The same for each backend of Keras."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from mfac_keras.optimizers import average_of, innermost, optimizer_state, trained_by

__all__ = ["TrainingHooks"]

Apply = Callable[..., Any]


class TrainingHooks(ABC):
    """Hooks in the compiled training step of one model.

    They hang on the instances of model and optimizer, from :meth:`attach` to :meth:`detach`, and detach by themselves
    when a training step raises or another ``fit`` begins. Around each update of an innermost optimizer, gradients and
    then weights are zeroed by the masks. What the outermost optimizer is given is tapped where it is wanted.

    Args:
        model: The model, built.
        optimizer: The optimizer that trains the variables, built.
        variables: The variables in scope, in order.
        axes: Permutation of the axes of each variable in which its gradient is tapped.
        metrics: What to add to the metrics of an epoch when it ends, by name.
    """

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
        self._optimizer = optimizer
        self._variables = list(variables)
        self._axes = list(axes)
        self._sizes = [int(np.prod(variable.shape)) for variable in variables]
        self._place = {id(variable): place for place, variable in enumerate(variables)}
        self._metrics = metrics
        self._frozen: frozenset[int] = frozenset()
        self._tapping = False
        self._met_apply = False
        self._of_model = model.optimizer
        self._updated = [False] * len(self._variables)
        self._hooked: list[tuple[Any, str]] = []

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._hooked)

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
        # What is added here every callback sees, wherever it stands in the list.
        self._hook(self._model, "_get_metrics_result_or_logs", self._adding(self._model._get_metrics_result_or_logs))
        self._model.train_function = self._train_function()

    def detach(self) -> None:
        """Take the hooks away: model and optimizer are as they were, and compile their training step anew."""
        for owner, name in reversed(self._hooked):
            vars(owner).pop(name, None)
        if self._hooked:
            self._model.train_function = None
        self._hooked = []

    def tap(self, on: bool) -> None:
        """Say whether the gradients of the next steps are wanted.

        Args:
            on: Whether they are.
        """
        if on != self._tapping:
            self._tapping = on
            self._model.train_function = self._train_function()

    def freeze(self, variables: Iterable[Any]) -> None:
        """Say which variables are not trained from now on: neither they nor what optimizers remember of them changes.

        Args:
            variables: Variables that the optimizer trains; those of an earlier call are trained again.
        """
        frozen = frozenset(map(id, variables))
        if frozen != self._frozen:
            self._frozen = frozen
            self.recompile()

    def is_frozen(self, variable: Any) -> bool:
        """Return whether :meth:`freeze` keeps a variable as it is.

        Args:
            variable: A variable that the optimizer trains.

        Returns:
            Whether it does.
        """
        return id(variable) in self._frozen

    def recompile(self) -> None:
        """Compile the training step anew, because something that is a constant in it has changed."""
        self._drop_compiled()
        self._model.train_function = self._train_function()

    @property
    def is_followed(self) -> bool:
        """Whether the model has the optimizer that it had when the hooks were made."""
        return self._model.optimizer is self._of_model

    @property
    def updated(self) -> list[Any]:
        """The variables in scope that training steps have given to the optimizer so far."""
        return [each for each, updated in zip(self._variables, self._updated, strict=True) if updated]

    def not_followed(self, what: str, *, more: str = "") -> RuntimeError:
        """Return the error of a training step that does not use the optimizer that is followed.

        Args:
            what: What it does not give to the optimizer.
            more: Another cure.

        Returns:
            The error, to be raised.
        """
        return RuntimeError(
            f"the training step of {self._model.name} does not give {what} to {self._optimizer.name}: call apply or "
            "apply_gradients of this optimizer in train_step, or pass the optimizer that it uses as "
            f"optimizer=...{more}"
        )

    def rows(self) -> list[list[Any]]:
        """Return the gradients that were tapped since the last call.

        Returns:
            For each training step its unscaled gradients, one flat array per variable in scope, permuted.

        Raises:
            RuntimeError: If a step was made in which no gradient arrived.
        """
        rows = [self._split(row) for row in self._taken()] if self._tapping else []
        if self._tapping and not self._met_apply:
            raise self.not_followed("its gradients", more=", or take gradients from a dataset with sampler=...")
        return rows

    def hold(self, masks: Sequence[npt.NDArray[np.bool_] | None]) -> None:
        """Hold masks from now on; what optimizers remember of pruned entries is set to zero.

        Args:
            masks: One for each variable in scope, True keeps; ``None`` for a variable that is free.
        """
        for place, (variable, mask) in enumerate(zip(self._variables, masks, strict=True)):
            self._set_mask(place, mask)
            if mask is None:
                continue
            for leaf in innermost(self._optimizer):
                for slot in optimizer_state(leaf, variable):
                    slot.assign(slot * keras.ops.convert_to_tensor(mask, dtype=slot.dtype))

    def slots_of(self, variables: Iterable[Any]) -> Iterator[Any]:
        """Yield what optimizers remember of variables, except for moving averages of the variables themselves.

        Args:
            variables: Variables in scope.

        Yields:
            Optimizer variables of the shapes of these.
        """
        for variable in variables:
            for leaf in innermost(self._optimizer):
                average = average_of(leaf, variable)
                for slot in optimizer_state(leaf, variable):
                    if slot is not average:
                        yield slot

    def sync(self) -> None:  # noqa: B027
        """Make sure that the variables have their current values."""

    # what a backend has to do its own way

    _tapped_method = "apply"
    """The method of the outermost optimizer that each training step calls with its gradients."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make the masks, all of them ones."""

    @abstractmethod
    def _train_function(self) -> Callable[..., Any]:
        """Return the function that ``fit`` calls for each execution: the tapping one while gradients are wanted."""

    @abstractmethod
    def _drop_compiled(self) -> None:
        """Forget the compiled steps."""

    @abstractmethod
    def _store(self, gradients: list[Any]) -> None:
        """Keep the gradients of a step, one per variable in scope; runs inside the compiled step."""

    @abstractmethod
    def _taken(self) -> list[Any]:
        """Return what was kept since the last call: one flat array per step."""

    @abstractmethod
    def _set_mask(self, place: int, mask: npt.NDArray[np.bool_] | None) -> None:
        """Take a mask for the variable at a place."""

    @abstractmethod
    def _mask_of(self, place: int) -> Any:
        """Return the mask to multiply by inside the step, or ``None`` where there is none."""

    @abstractmethod
    def _masked(self, gradient: Any, mask: Any) -> Any:
        """Return a gradient with zeros where its variable is pruned; runs inside the step."""

    @abstractmethod
    def _mask_variable(self, variable: Any, mask: Any) -> None:
        """Set a variable to zero where it is pruned; runs inside the step."""

    # the hooks themselves

    def _hook(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        object.__setattr__(owner, name, function)
        if (owner, name) not in self._hooked:
            self._hooked.append((owner, name))

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
            place = self._place.get(id(variable))
            if place is not None:
                self._updated[place] = True

    def _mask_for(self, variable: Any) -> Any:
        place = self._place.get(id(variable))
        return None if place is None else self._mask_of(place)

    def _tapped(self, apply: Apply) -> Apply:
        def tapped_apply(grads: Any, trainable_variables: Any = None) -> Any:
            if self._tapping:
                variables = self._optimizer_variables() if trainable_variables is None else trainable_variables
                self._tap_gradients(list(grads), list(variables))
            return apply(grads, trainable_variables)

        return tapped_apply

    def _tap_gradients(self, gradients: list[Any], variables: list[Any]) -> None:
        found = {id(variable): gradient for variable, gradient in zip(variables, gradients, strict=True)}
        if any(found.get(key) is not None for key in self._place):
            self._met_apply = True
            self._store([found.get(id(variable)) for variable in self._variables])

    def _optimizer_variables(self) -> list[Any]:
        return trained_by(self._optimizer)

    def _adding(self, metrics: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda logs: {**metrics(logs), **self._metrics()}

    def _another_fit(self, *args: Any, **kwargs: Any) -> Any:
        # Only a fit makes train functions, and it does so before anything else: this run is over, in whatever way.
        self.detach()
        return self._model.make_train_function(*args, **kwargs)

    def _split(self, flat: Any) -> list[Any]:
        ends = np.cumsum(self._sizes)
        return [flat[end - size : end] for size, end in zip(self._sizes, ends, strict=True)]
