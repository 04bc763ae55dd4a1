"""Gradual pruning as a state machine: observe gradients, ask whether a pruning step is due, prune."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mfac_core.backends import Array, Device, array_namespace, device_of, resolve_devices
from mfac_core.gradient_window import GradientWindow
from mfac_core.masks import newly_pruned
from mfac_core.planning import WINDOW_ITEMSIZE, check_memory, choose_window_device, peak_window
from mfac_core.pruning_step import PruneResult, Selection, magnitude_step, mfac_step
from mfac_core.schedule import PlannedStep, num_gradients_at, pruning_schedule
from mfac_core.settings import GradualSettings, MagnitudeSettings, MFACSettings
from mfac_core.weight_layout import WeightLayout

__all__ = ["MFACPruner", "MagnitudePruner", "Pruner", "make_pruner"]

_logger = logging.getLogger("mfac_core")

Vector = npt.NDArray[Any]


def make_pruner(
    settings: GradualSettings,
    weights: Mapping[str, Array],
    *,
    steps_per_epoch: int,
    masks: Mapping[str, Array] | None = None,
    live_gradients: bool = True,
) -> MFACPruner | MagnitudePruner:
    """Return the pruner for these settings.

    Args:
        settings: ``MFACSettings`` or ``MagnitudeSettings``.
        weights: Name and array of each weight in scope, in order; only names and shapes are kept.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True); ``None`` means all.
        live_gradients: Whether gradients arrive while training; False when they are sampled at each pruning step.

    Returns:
        The pruner.

    Raises:
        TypeError: If the settings are of neither kind.
    """
    if isinstance(settings, MFACSettings):
        return MFACPruner(
            settings, weights, steps_per_epoch=steps_per_epoch, masks=masks, live_gradients=live_gradients
        )
    if isinstance(settings, MagnitudeSettings):
        return MagnitudePruner(settings, weights, steps_per_epoch=steps_per_epoch, masks=masks)
    raise TypeError(f"settings must be MFACSettings or MagnitudeSettings, got {type(settings).__name__}")


class Pruner(ABC):
    """What all pruners share: the schedule, the masks, and the progress through both.

    ``step`` always counts completed optimizer steps.

    Args:
        settings: What to prune and when.
        weights: Name and array of each weight in scope, in order; only names and shapes are kept.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.

    Raises:
        ValueError: If there are no weights, or the masks do not fit them.
    """

    def __init__(
        self,
        settings: GradualSettings,
        weights: Mapping[str, Array],
        *,
        steps_per_epoch: int,
        masks: Mapping[str, Array] | None = None,
    ) -> None:
        self.settings = settings
        self.schedule: tuple[PlannedStep, ...] = pruning_schedule(settings, steps_per_epoch)
        self.layout = WeightLayout({name: tuple(array.shape) for name, array in weights.items()})
        if masks is None:
            self._kept = np.ones(self.layout.num_weights, bool)
        else:
            self.layout.check(masks, "masks")
            self._kept = self.layout.flatten(masks).astype(bool)
        self._done = 0

    @property
    def masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Name and mask of each weight; True keeps. Copies."""
        return self.layout.unflatten(self._kept.copy())

    @property
    def sparsity(self) -> float:
        """Pruned fraction of all weights in scope."""
        return int(np.count_nonzero(~self._kept)) / self.layout.num_weights

    @property
    def is_finished(self) -> bool:
        """Whether the last pruning step is done."""
        return self._done == len(self.schedule)

    @property
    def next_step(self) -> PlannedStep | None:
        """The next pruning step, or ``None`` when all are done."""
        return None if self.is_finished else self.schedule[self._done]

    def needs_gradients(self, step: int) -> bool:
        """Return whether the gradient that arrives after ``step`` completed optimizer steps is wanted.

        Args:
            step: Completed optimizer steps.

        Returns:
            False: this pruner uses no gradients.
        """
        return False

    def observe(self, gradients: Mapping[str, Array]) -> bool:
        """Refuse gradients.

        Args:
            gradients: Name and array of each gradient.

        Raises:
            TypeError: Always; ask :meth:`needs_gradients` first.
        """
        raise TypeError(f"{type(self).__name__} uses no gradients; ask needs_gradients(step) before observe")

    def is_due(self, step: int) -> bool:
        """Return whether a pruning step is due.

        Args:
            step: Completed optimizer steps.

        Returns:
            True from the planned step on until :meth:`prune` has done it.
        """
        return self._latest(step) >= self._done

    def prune(self, weights: Mapping[str, Array], step: int | None = None) -> PruneResult:
        """Do the pruning step that is due.

        Args:
            weights: Name and array of each weight in scope. Not modified.
            step: Completed optimizer steps: the latest pruning step planned up to here is done, and earlier ones
                are passed over. ``None`` does the next one of the schedule.

        Returns:
            The new weights, on the devices of ``weights``, and the new masks, in host memory.

        Raises:
            ValueError: If all pruning steps are done, none is planned up to ``step``, or the weights do not fit or
                hold NaN or Inf.
        """
        if self.is_finished:
            raise ValueError("all pruning steps of the schedule are done; ask is_due(step) before prune")
        latest = self._done if step is None else self._latest(step)
        if latest < self._done:
            raise ValueError(
                f"no pruning step is due at step {step}; the next is at step {self.schedule[self._done].step}"
            )
        self.layout.check(weights, "weights")
        planned = self.schedule[latest]
        vector = self.layout.flatten(weights)
        self.layout.check_finite(vector, self._kept)

        def select(saliencies: Array) -> Array:
            return newly_pruned(saliencies, self._kept, planned.sparsity, self.layout.segments, self.settings.scope)

        updated, chosen, increase = self._prune_unpruned(vector[self._kept], select)
        self._kept[self._kept] = ~chosen
        self._done = latest + 1
        new_vector = np.zeros_like(vector)
        new_vector[self._kept] = updated[~chosen]
        return PruneResult(
            weights={
                name: device_of(weights[name]).asarray(array)
                for name, array in self.layout.unflatten_like(new_vector, weights).items()
            },
            masks=self.masks,
            sparsity=self.sparsity,
            predicted_loss_increase=increase,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: arrays and plain numbers only."""
        return {
            "method": type(self).__name__,
            "schedule": self._planned(),
            "pruning_steps_done": self._done,
            "masks": self.masks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a pruner with the same settings and weights.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: If masks or schedule do not fit; nothing is changed then.
        """
        missing = {"method", "schedule", "pruning_steps_done", "masks"} - set(state)
        if missing:
            raise ValueError(f"this is not the state of a pruner: it lacks {', '.join(sorted(missing))}")
        self.layout.check(state["masks"], "masks")
        done = int(state["pruning_steps_done"])
        same_schedule = np.array_equal(np.asarray(state["schedule"]), self._planned())
        if state["method"] != type(self).__name__ or not same_schedule or not 0 <= done <= len(self.schedule):
            raise ValueError(
                "the state was saved with another method or schedule of pruning; "
                "resume with the recipe and steps_per_epoch that it was saved with"
            )
        self._kept = self.layout.flatten(state["masks"]).astype(bool)
        self._done = done

    def _planned(self) -> Vector:
        return np.array([(planned.step, planned.sparsity) for planned in self.schedule])

    def _latest(self, step: int) -> int:
        """Return the index of the latest pruning step planned up to ``step``; -1 when there is none."""
        return sum(planned.step <= step for planned in self.schedule) - 1

    @abstractmethod
    def _prune_unpruned(self, weights: Vector, select: Selection) -> tuple[Vector, npt.NDArray[np.bool_], float | None]:
        """Return the updated unpruned weights, which are newly pruned, and the predicted loss increase."""


class MagnitudePruner(Pruner):
    """Gradual pruning by magnitude; for its arguments and methods see :class:`Pruner`.

    Example:
        >>> settings = MagnitudeSettings(final_sparsity=0.5, end_epoch=1)
        >>> pruner = MagnitudePruner(settings, {"w": np.zeros(4)}, steps_per_epoch=10)
        >>> result = pruner.prune({"w": np.array([1.0, -4.0, 3.0, 2.0])}, step=10)
        >>> result.weights["w"].tolist()
        [0.0, -4.0, 3.0, 0.0]
    """

    def _prune_unpruned(self, weights: Vector, select: Selection) -> tuple[Vector, npt.NDArray[np.bool_], float | None]:
        return *magnitude_step(weights, select), None


class MFACPruner(Pruner):
    """Gradual pruning by M-FAC.

    Args:
        settings: What to prune, when and how.
        weights: Name and array of each weight in scope, in order; only names and shapes are kept.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.
        live_gradients: Whether gradients arrive while training. When they are sampled at each pruning step instead,
            pass False: then a pruning step is due at its step whether or not rows are there, and
            :meth:`needs_gradients` is always False.

    Raises:
        ValueError: If there are no weights, or the masks do not fit them.
        DeviceError: If a listed device does not exist.
        MemoryBudgetError: If the largest gradient window of the run would not fit.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> weights = {"w": rng.standard_normal(10).astype(np.float32)}
        >>> settings = MFACSettings(final_sparsity=0.5, end_epoch=1, num_gradients=8)
        >>> pruner = MFACPruner(settings, weights, steps_per_epoch=8)
        >>> for step in range(8):
        ...     if pruner.needs_gradients(step):
        ...         stored = pruner.observe({"w": rng.standard_normal(10).astype(np.float32)})
        ...     if pruner.is_due(step + 1):
        ...         weights = pruner.prune(weights, step + 1).weights
        >>> int(np.count_nonzero(weights["w"]))
        5
    """

    settings: MFACSettings

    def __init__(
        self,
        settings: MFACSettings,
        weights: Mapping[str, Array],
        *,
        steps_per_epoch: int,
        masks: Mapping[str, Array] | None = None,
        live_gradients: bool = True,
    ) -> None:
        super().__init__(settings, weights, steps_per_epoch=steps_per_epoch, masks=masks)
        self._devices = resolve_devices(settings.devices)
        rows, columns = peak_window(settings, self.layout.num_weights, self.schedule)
        self._window_device = choose_window_device(
            settings.gradients_device, self._devices, rows * columns * WINDOW_ITEMSIZE
        )
        self._live = live_gradients
        self._window: GradientWindow | None = None
        # gives the sample that was observed last, once its copy has arrived
        self._arriving: Callable[[], Array] | None = None
        self._unpruned: tuple[Device, dict[str, Array]] | None = None
        # a pruning step fell due before there was any row: it waits until the first window is full
        self._waits = False
        self._told: set[str] = set()
        self.refused_rows = 0
        check_memory(settings, self._window_device, self.layout.num_weights, self.schedule)

    @property
    def num_gradients(self) -> int:
        """Rows that the window keeps now, by the sparsity reached in the schedule."""
        reached = self.schedule[self._done - 1].sparsity if self._done else 0.0
        return num_gradients_at(self.settings.num_gradients, reached)

    @property
    def num_rows(self) -> int:
        """Rows that the window holds now."""
        self._store_arriving()
        return 0 if self._window is None else self._window.count

    def needs_gradients(self, step: int) -> bool:
        """Return whether the gradient that arrives after ``step`` completed optimizer steps is wanted.

        Args:
            step: Completed optimizer steps.

        Returns:
            True in the last :attr:`num_gradients` steps before the next pruning step, and while one waits for rows.
        """
        if self.is_finished or not self._live:
            return False
        self._note_waiting(step)
        return step >= self.schedule[self._done].step - self.num_gradients

    def observe(self, gradients: Mapping[str, Array]) -> bool:
        """Store one gradient sample in the window.

        A sample on a GPU is copied asynchronously, and looked at when the next one comes or the window is needed.

        Args:
            gradients: Name and array of the gradient of each weight in scope, unscaled; NumPy or CuPy. Copied.

        Returns:
            False for a sample with NaN or Inf: it is refused and counted in ``refused_rows``. A sample on a GPU may be
            refused later.

        Raises:
            ValueError: If names or shapes do not fit the weights.
        """
        self.layout.check(gradients, "gradients")
        self._store_arriving()
        device = device_of(gradients[self.layout.names[0]])
        if self._unpruned is None or self._unpruned[0] != device:
            self._unpruned = device, self.layout.unpruned(self._kept, device)
        with device.backend.on(device.name):
            row = device.asarray(self.layout.gather(gradients, self._unpruned[1]), np.float32)
            if device.backend.name == "numpy":
                return self._store(row)
            if device.backend is self._window_device.backend:
                xp = array_namespace(row)
                finite = device.backend.fetch(xp.all(xp.isfinite(row)))
                self._arriving = lambda: row if bool(finite()) else None
            else:
                self._arriving = device.backend.fetch(row)
        return True

    def forget_gradients(self) -> None:
        """Empty the window, before fresh samples are taken."""
        self._arriving = None
        if self._window is not None:
            self._window.clear()

    def is_due(self, step: int) -> bool:
        """Return whether a pruning step is due.

        With live gradients a pruning step that falls due before there is any row waits until the window is full, or
        the next pruning step falls due.

        Args:
            step: Completed optimizer steps.

        Returns:
            True from then on until :meth:`prune` has done it.
        """
        if not super().is_due(step):
            return False
        if not self._live:
            return True
        self._note_waiting(step)
        if not self.num_rows:
            return False
        full = self._window is not None and self._window.is_full
        return full or not self._waits or self.schedule[self._latest(step)].step == step

    def prune(self, weights: Mapping[str, Array], step: int | None = None) -> PruneResult:
        """Do the pruning step that is due, and drop the pruned columns of the window.

        Args:
            weights: As in :meth:`Pruner.prune`.
            step: As in :meth:`Pruner.prune`.

        Returns:
            As in :meth:`Pruner.prune`.

        Raises:
            ValueError: As in :meth:`Pruner.prune`, or if there is no gradient sample.
            IllConditionedError: If a block of the Fisher cannot be inverted accurately.
        """
        kept_before = self._kept.copy()
        result = super().prune(weights, step)
        self._waits = False
        self._unpruned = None
        if self.is_finished:
            self._window = None
        elif self._window is not None:
            self._window.rebuild(self._kept[kept_before], self.num_gradients)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, the gradient window included: arrays and plain numbers only."""
        self._store_arriving()
        window = None if self._window is None else self._window.state_dict()
        return {**super().state_dict(), "waits": self._waits, "refused_rows": self.refused_rows, "window": window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a pruner with the same settings and weights.

        Args:
            state: What :meth:`state_dict` returned. Its ``window`` may be left out; rows are then collected anew.

        Raises:
            ValueError: If masks, schedule or window do not fit; nothing is changed then.
        """
        before = (self._kept, self._done)
        super().load_state_dict(state)
        window = None
        if state.get("window") is not None:
            window = self._new_window(int(np.count_nonzero(self._kept)))
            try:
                window.load_state_dict(state["window"])
            except ValueError:
                self._kept, self._done = before
                raise
        self._window = window
        self._arriving = None
        self._unpruned = None
        self._waits = bool(state.get("waits", False))
        self.refused_rows = int(state.get("refused_rows", 0))

    def _prune_unpruned(self, weights: Vector, select: Selection) -> tuple[Vector, npt.NDArray[np.bool_], float | None]:
        self._store_arriving()
        if self._window is None or not self._window.count:
            raise ValueError(
                "there are no gradient samples to prune with; observe at least one before prune "
                f"({self.refused_rows} were refused for NaN or Inf)"
            )
        if not self._window.is_full:
            cure = "start later, prune less often, or lower" if self._live else "sample more, or lower"
            self._tell_once(
                "partial",
                f"a pruning step uses {self._window.count} gradient samples where {self._window.num_gradients} are "
                f"wanted; {cure} num_gradients (num_grads in a recipe)",
            )
        return mfac_step(
            weights,
            self._window,
            select,
            damping=self.settings.damping,
            update=self.settings.update,
            devices=self._devices,
        )

    def _store_arriving(self) -> None:
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            self._store(arriving())

    def _store(self, row: Array | None) -> bool:
        if row is None or (isinstance(row, np.ndarray) and not np.isfinite(row).all()):
            self.refused_rows += 1
            self._tell_once("refused", "a gradient sample holds NaN or Inf: it is left out of the window and counted")
            return False
        if self._window is None:
            self._window = self._new_window(int(row.shape[0]))
        self._window.push(row)
        return True

    def _new_window(self, num_weights: int) -> GradientWindow:
        return GradientWindow(
            num_weights,
            self.num_gradients,
            block_size=self.settings.block_size,
            device=self._window_device,
            feeds=[device for device in self._devices if device.backend.name != "numpy"],
        )

    def _note_waiting(self, step: int) -> None:
        if not self._waits and self._latest(step) >= self._done and not self.num_rows:
            self._waits = True
            self._tell_once(
                "waits",
                f"the pruning step at step {self.schedule[self._done].step} falls due before there is any gradient "
                "sample: it waits until the window is full or the next pruning step falls due",
            )

    def _tell_once(self, about: str, message: str) -> None:
        if about not in self._told:
            self._told.add(about)
            _logger.warning(message)
