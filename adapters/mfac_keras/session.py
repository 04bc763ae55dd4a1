"""One training run: what happens between the training steps of one model."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.masks.zero_count import ZeroCount, count_zeros
from mfac_core.pruners.fingerprint import fingerprint
from mfac_core.state_checks import check_keys, checked_integer, refuse
from mfac_core.weight_names import join_names
from mfac_keras.backends import current_backend
from mfac_keras.backends.hooks import TrainingHooks
from mfac_keras.live_pruning import LivePruning, combined_masks, prune_if_due, variables_in_scope
from mfac_keras.training_changes import TrainingChanges

__all__ = ["TrainingSession", "check_state"]

_logger = logging.getLogger("mfac_keras")


class TrainingSession:
    """Runs the modifiers of a recipe while Keras trains.

    Args:
        prunings: The pruning modifiers at work.
        changes: What else changes in training.
        hooks: What runs inside the training step.
        trained: The variables that the hooks are for, in order: those in scope that the optimizer trains.
        steps_per_epoch: Training steps per epoch.
        steps_per_execution: Training steps between two calls of :meth:`advance`.
        step: Completed training steps so far.
    """

    def __init__(
        self,
        prunings: Sequence[LivePruning],
        changes: TrainingChanges,
        hooks: TrainingHooks,
        trained: Mapping[str, Any],
        *,
        steps_per_epoch: int,
        steps_per_execution: int,
        step: int,
    ) -> None:
        self.prunings = tuple(prunings)
        self.steps_per_epoch = steps_per_epoch
        self.step = step
        self._changes = changes
        self._steps_per_execution = steps_per_execution
        self._hooks = hooks
        self._variables = variables_in_scope(prunings)
        self._trained = trained
        self._taps = False
        self._fingerprints: dict[str, str] | None = None
        self._has_advanced = False
        self._checksums: dict[str, int] = {}  # of variables that no training step has given to the optimizer so far
        self._untouched: dict[str, int] = {}  # checksums of what is to be pruned, until it is known who trains it
        self._logged: tuple[dict[str, int], str] = ({}, "")
        self._sparsity: float | None = None

    @property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The masks held now by path, True keeps."""
        return combined_masks(self.prunings)

    @property
    def sparsity(self) -> float:
        """Fraction of all weights in scope that the masks prune; :meth:`zeros` says what the weights are."""
        if self._sparsity is None:  # asked for at every step
            weights = sum(int(np.prod(variable.shape)) for variable in self._variables.values())
            pruned = sum(int(np.count_nonzero(~mask)) for mask in self.masks.values())
            self._sparsity = pruned / weights if weights else 0.0
        return self._sparsity

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the last step, where the recipe sets it."""
        return self._changes.learning_rate

    def zeros(self) -> ZeroCount:
        """Count the zeros of pruned weights.

        Returns:
            What the weights are now, whoever has written them.
        """
        self._hooks.sync()
        to_array = current_backend().to_array
        return count_zeros({name: to_array(each) for name, each in self._variables.items()}, self.masks)

    def warn_of_regrown(self, cause_and_cure: str) -> None:
        """Warn of pruned weights that are not zero; of the same ones once.

        Args:
            cause_and_cure: What the warning says of them.
        """
        count = self.zeros()
        before, self._logged = self._logged, (dict(count.regrown), cause_and_cure)
        if count.regrown and self._logged != before:
            _logger.warning("%s. %s", count.difference(), cause_and_cure)

    def check_followed(self) -> None:
        """Check that nothing in scope is trained without the optimizer that is followed: its masks would not hold.

        Raises:
            RuntimeError: If something is. The hooks are gone then.
        """
        now = self._checksums_of_the_unfollowed()
        moved = [name for name, checksum in now.items() if checksum != self._checksums.get(name, checksum)]
        if moved:
            self.detach()
            raise self._hooks.not_followed(f"the gradients of {join_names(moved)}")

    def warn_of_untrained(self) -> None:
        """Warn once of what is to be pruned and was not changed by training, though other weights were."""
        before, self._untouched = (self._untouched, {}) if self._has_advanced else ({}, self._untouched)
        if not before:
            return
        self._hooks.sync()
        untrained = [name for name, checksum in before.items() if self._checksum(name) == checksum]
        if untrained and len(untrained) < len(before):
            _logger.warning(
                "training has not changed %s so far, and the recipe prunes it all the same, without training to make "
                "up for it. Where nothing trains it, as the teacher in a distillation, take it out of params, or set "
                "trainable = False on its layer before compile",
                join_names(untrained),
            )

    def begin(self) -> None:
        """Attach to the training step, and do what is due before the next one."""
        self._hooks.attach()
        self._hold_masks()
        self._do_what_is_due()
        self._checksums = self._checksums_of_the_unfollowed()
        self._untouched = {
            name: self._checksum(name)
            for pruning in self.prunings
            if not (pruning.only_holds or pruning.is_finished)
            for name, variable in pruning.variables.items()
            if not self._hooks.is_frozen(variable)
        }

    def advance(self, step: int) -> None:
        """Take the gradients of the training steps that were made, and do what is due after them.

        Args:
            step: Completed training steps now.

        Raises:
            RuntimeError: If something has taken the hooks away, or the optimizer is not the one that trains.
        """
        if not self._hooks.is_attached:
            raise RuntimeError(
                "the hooks of pruning were taken out of the training step during fit, by a call of "
                "model.make_train_function, train_on_batch or compile in another callback; pruned weights would grow "
                "back. Take that call out"
            )
        if not self._hooks.is_followed:
            raise RuntimeError(
                "model.optimizer was replaced during fit, by another callback, and this one does not follow the new "
                "optimizer; pruned weights would grow back. Change the optimizer between two fits, and go on with "
                "initial_epoch=..."
            )
        if self._taps:
            for done, row in enumerate(self._hooks.rows()):
                gradients = {id(variable): array for variable, array in zip(self._trained.values(), row, strict=True)}
                for pruning in self.prunings:
                    pruning.observe(self.step + done, gradients)
        self.step = step
        if not self._has_advanced:
            self._has_advanced = True
            self.check_followed()
        self._do_what_is_due()

    def detach(self) -> None:
        """Leave model and optimizer as they were."""
        self._hooks.detach()

    def sign(self) -> None:
        """Note which weights the state belongs to: those that the model has now, until training goes on."""
        self._fingerprints = self._fingerprints_now()

    def state_dict(self, *, window: bool = True) -> dict[str, Any]:
        """Return the progress: plain values, the state of each pruning modifier, and which weights it belongs to.

        Args:
            window: Whether the gradient windows belong to it.

        Returns:
            The state.
        """
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "fingerprints": self._fingerprints,
            "changes": self._changes.state_dict(),
            "prunings": [pruning.state_dict(window=window) for pruning in self.prunings],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; call it before :meth:`begin`. No weight is changed.

        Steps may have had another batch size: pruning goes on by epochs. Variables may have come into scope or left it.

        Args:
            state: What :meth:`state_dict` returned in a run with the same recipe and model.

        Raises:
            ValueError: If the state does not belong to this run; nothing is changed then.
        """
        check_state(state)
        if len(state["prunings"]) != len(self.prunings):
            raise ValueError(
                f"the state holds {len(state['prunings'])} pruning modifiers, this recipe has {len(self.prunings)}; "
                "resume with the recipe that the state was saved with"
            )
        adoptions = [
            pruning.adopt({"steps_per_epoch": state["steps_per_epoch"], **saved})
            for pruning, saved in zip(self.prunings, state["prunings"], strict=True)
        ]
        self._changes.check_state(state["changes"])
        for pruning, adoption in zip(self.prunings, adoptions, strict=True):
            pruning.load_state_dict(adoption.state)
        self._changes.load_state_dict(state["changes"])
        self._sparsity = None
        if state["steps_per_epoch"] != self.steps_per_epoch:
            _logger.warning(
                "the state was saved with %d steps per epoch and this run has %d: pruning goes on by epochs, with the "
                "masks of the state",
                state["steps_per_epoch"],
                self.steps_per_epoch,
            )
        for difference in filter(None, (adoption.difference() for adoption in adoptions)):
            _logger.warning("%s", difference)

    def resume_without_state(self, why: str) -> None:
        """Go on in the middle of a schedule of which only the weights are known.

        Args:
            why: What the warning says of the state that is lacking.
        """
        if any([pruning.take_zeros_as_masks(self.step) for pruning in self.prunings]):
            self._sparsity = None
            _logger.warning(
                "training goes on at step %d and %s: every weight in scope that is exactly zero is taken as pruned "
                "(sparsity %.4f), and the gradient window begins empty",
                self.step,
                why,
                self.sparsity,
            )

    def has_weights_of(self, state: Mapping[str, Any]) -> bool:
        """Return whether a state was saved with the very weights that the model has now.

        Args:
            state: What :meth:`state_dict` returned.

        Returns:
            Whether all variables that both have in scope, and there are some, have the same bits.
        """
        if self._fingerprints is None:
            self.sign()
        names, now = self._own_names(state), self._fingerprints or {}
        saved = {names.get(name, name): each for name, each in (state.get("fingerprints") or {}).items()}
        common = now.keys() & saved.keys()
        return bool(common) and all(now[name] == saved[name] for name in common)

    def has_masks_of(self, state: Mapping[str, Any]) -> bool:
        """Return whether the masks of a state are exactly the zeros of the weights that the model has now.

        Args:
            state: What :meth:`state_dict` returned.

        Returns:
            Whether they are, for all variables that both have in scope, and there are some.
        """
        names = self._own_names(state)
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for saved in state["prunings"]:
            for name, mask in saved["masks"].items():
                own = names[name]
                masks[own] = masks[own] & mask if own in masks else mask
        forms = {name: form for pruning in self.prunings for name, form in pruning.forms.items()}
        common = masks.keys() & self._variables.keys()
        return bool(common) and all(
            np.array_equal(masks[name], forms[name].of(self._variables[name].numpy() != 0)) for name in common
        )

    def _do_what_is_due(self) -> None:
        self._fingerprints = None
        if any(pruning.needs_pruning(self.step) for pruning in self.prunings):
            self._hooks.sync()
            self.check_followed()
            self.warn_of_untrained()
            self._sparsity = None
            prune_if_due(self.prunings, self.step, self._hooks.state_to_reset)
            self._hold_masks()
            self._checksums = self._checksums_of_the_unfollowed()
        self._taps = self._wants_gradients()
        self._hooks.tap(self._taps)
        self._changes.make(self.step)

    def _wants_gradients(self) -> bool:
        steps = range(self.step, self.step + self._steps_per_execution)
        return any(pruning.needs_gradients(step) for step in steps for pruning in self.prunings)

    def _own_names(self, state: Mapping[str, Any]) -> dict[str, str]:
        names: dict[str, str] = {}
        for pruning, saved in zip(self.prunings, state["prunings"], strict=False):
            names |= pruning.own_names(saved)
        return names

    def _fingerprints_now(self) -> dict[str, str]:
        self._hooks.sync()
        to_array = current_backend().to_array
        return {name: fingerprint(to_array(variable)) for name, variable in self._variables.items()}

    def _hold_masks(self) -> None:
        self._sparsity = None
        masks = self.masks
        self._hooks.hold([masks.get(name) for name in self._trained])

    def _checksums_of_the_unfollowed(self) -> dict[str, int]:
        followed = set(map(id, self._hooks.updated))
        names = [name for name, each in self._variables.items() if each.trainable and id(each) not in followed]
        if names:
            self._hooks.sync()
        return {name: self._checksum(name) for name in names}

    def _checksum(self, name: str) -> int:
        return zlib.crc32(self._variables[name].numpy().tobytes())


def check_state(state: Any) -> None:
    """Refuse what is not the state of a run, whatever the run.

    Args:
        state: What :meth:`TrainingSession.state_dict` returned, or anything else.

    Raises:
        ValueError: If it is something else.
    """
    check_keys("a run", state, ("step", "steps_per_epoch", "changes", "prunings"))
    checked_integer("step", state["step"])
    checked_integer("steps_per_epoch", state["steps_per_epoch"], at_least=1)
    for key in ("fingerprints", "changes"):
        if not isinstance(state.get(key, {}), Mapping | None):
            refuse(key, state[key], "a mapping")
    if not isinstance(state["prunings"], list):
        refuse("prunings", state["prunings"], "a list of states of pruners")
    for pruning in state["prunings"]:
        check_keys("a pruner", pruning, ("masks",))
        masks = pruning["masks"]
        if not isinstance(masks, Mapping) or not all(isinstance(mask, np.ndarray) for mask in masks.values()):
            refuse("masks", masks, "a mapping from name to array")
