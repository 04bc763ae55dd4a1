"""Gradual pruning by M-FAC: gradients are observed while training goes on."""

from __future__ import annotations

import logging
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mfac_core.backends import Array, Device, array_namespace, check_float, device_of, resolve_devices
from mfac_core.fisher.window import GradientWindow
from mfac_core.fisher.window_checks import window_warnings
from mfac_core.masks.sparsity import attained_sparsity
from mfac_core.pruners.base import Mask, Progress, Vector
from mfac_core.pruners.gradual import GradualPruner, PrunedUnpruned
from mfac_core.pruners.memory import MasksToCome, check_memory, choose_window_device, window_bytes
from mfac_core.pruners.step import Selection, magnitude_step, mfac_step
from mfac_core.schedules.pruning import ScheduledStep, num_gradients_at
from mfac_core.schedules.substeps import Sparsity, num_substeps, substep_due, substep_sparsity
from mfac_core.settings.pruning import MFACSettings
from mfac_core.state_checks import check_keys, checked_flag, checked_integer

__all__ = ["MFACPruner"]

_logger = logging.getLogger("mfac_core")


@dataclass(frozen=True)
class MFACProgress(Progress):
    """How far an M-FAC pruner has come.

    Args (beside those of :class:`Progress`):
        parts_done: Parts of the next pruning step that are done.
        parts: In how many parts the pruning step with the index ``next_pruning`` is done.
        waits: Whether a pruning step fell due before there was any row: it waits until the first window is full.
        waiting: Index of the pruning step that waits; in a resumed run ``None`` until it is asked for what is due.
        window: The gradient samples of the unpruned weights; ``None`` before there is any.
        next_pruning: Index of the next pruning step that asks for more zeros than there are masked; the number of all
            where none does. Those before it draw on no gradients.
    """

    parts_done: int = 0
    parts: int = 1
    waits: bool = False
    waiting: int | None = None
    window: GradientWindow | None = None
    next_pruning: int = 0


class MFACPruner(GradualPruner):
    """Gradual pruning by M-FAC.

    With ``num_recomputations`` a pruning step is done in as many parts, one by each call of :meth:`prune`, each by a
    Fisher of its own over what remains, and by gradients of its own. Sampled ones are forgotten with each part and to
    be drawn anew: :meth:`is_due` stays True until the last part is done. With live gradients the parts come one window
    of rows after the other, so that the last is due at the step of the schedule, see
    :func:`mfac_core.schedules.substeps.substep_due`; where there are too few steps for that, they share rows, which is
    logged once.

    A pruning step that asks for no more zeros than there are, such as the first at sparsity 0, neither waits for
    gradients nor moves weights.

    Args:
        settings: What to prune, when and how.
        weights: Name and array of each weight in scope, in order; not kept. Where the settings name ``auto`` as their
            device, blocks are computed on the device of the first of them.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.
        live_gradients: Whether gradients arrive while training. When they are sampled at each pruning step instead,
            pass False: then a pruning step is due at its step whether or not rows are there, and
            :meth:`needs_gradients` is always False.
        axes: As in :class:`GradualPruner`.

    Raises:
        TypeError: If ``weights`` is no mapping from name to array.
        ValueError: If there are no weights, or masks or axes do not fit them.
        SettingError: If the mask type does not fit the shape of an array.
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
        ...     while pruner.is_due(step + 1):
        ...         weights = pruner.prune(weights, step + 1).weights
        >>> int(np.count_nonzero(weights["w"]))
        5
    """

    settings: MFACSettings
    _progress: MFACProgress

    def __init__(
        self,
        settings: MFACSettings,
        weights: Mapping[str, Array],
        *,
        steps_per_epoch: int,
        masks: Mapping[str, Array] | None = None,
        live_gradients: bool = True,
        axes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(settings, weights, steps_per_epoch=steps_per_epoch, masks=masks, axes=axes)
        where_weights_are = device_of(weights[self.layout.names[0]])
        self._devices = (where_weights_are,) if settings.devices == ("auto",) else resolve_devices(settings.devices)
        run = (self.layout.num_weights, self.schedule, self.masks_to_come())
        self._window_device = choose_window_device(
            settings.gradients_device, self._devices, window_bytes(settings, *run, live_gradients=live_gradients)
        )
        self._live = live_gradients
        # gives the sample that was observed last, once its copy has arrived
        self._arriving: Callable[[], Array] | None = None
        # for which device and which unpruned weights, and how they are gathered there
        self._unpruned: tuple[Device, Mask, dict[str, Array]] | None = None
        self._progress = self._progress_at(self._kept, 0)
        self._logged: set[str] = set()
        self._refused_rows = 0
        check_memory(settings, self._window_device, *run, live_gradients=live_gradients)

    @property
    def num_gradients(self) -> int:
        """Rows that the window keeps now: those of the next pruning step that draws on them."""
        return self._num_gradients_of(self._progress)

    @property
    def is_inside_step(self) -> bool:
        """Whether a part of the next pruning step is done."""
        return self._progress.parts_done > 0

    @property
    def num_rows(self) -> int:
        """Gradient samples that the window holds now."""
        self._store_arriving()
        return 0 if self._window is None else self._window.count

    @property
    def refused_rows(self) -> int:
        """Gradient samples that were left out because they held NaN or Inf."""
        return self._refused_rows

    def masks_to_come(self) -> MasksToCome:
        """Return what the schedule makes of the masks, as :mod:`mfac_core.pruners.memory` counts bytes by it.

        Returns:
            The sparsity of each pruning step, and what becomes of one.
        """
        sparsities = [self._sparsity_at(index) for index in range(len(self.schedule))]
        return sparsities, attained_sparsity(self.layout.segments, self.settings.scope, self._patterns)

    def needs_gradients(self, step: int) -> bool:
        """Return whether the gradient that arrives after ``step`` completed optimizer steps is wanted.

        Args:
            step: Completed optimizer steps.

        Returns:
            True in the last :attr:`num_gradients` steps before the next pruning step that draws on them, and while one
            waits for rows.
        """
        if self._progress.next_pruning == len(self.schedule) or not self._live:
            return False
        self._note_waiting(step)
        return step >= self._next_part_step - self.num_gradients

    def uses_gradients(self, step: int) -> bool:
        """Return whether the pruning step that is due draws on gradient samples.

        Args:
            step: Completed optimizer steps.

        Returns:
            False where none is due, or the one that is due asks for no more zeros than there are.
        """
        index = self._latest(step)
        if index < self._progress.next_pruning:
            return False
        if step > 0 or index > 0 or self._measured is None:
            return True
        # the zeros that were measured are there until the first optimizer step; a single pruning step is the last, too
        return len(self.schedule) == 1 and self._sparsity_at(index) != self._measured

    def observe(self, gradients: Mapping[str, Array]) -> bool:
        """Store one gradient sample in the window.

        A sample on a GPU is copied asynchronously, and looked at when the next one comes or the window is needed.

        Args:
            gradients: Name and array of the gradient of each weight, unscaled; NumPy or CuPy, float32 or float64.
                Copied. Those of weights that are not in scope may be left out.

        Returns:
            False for a sample with NaN or Inf: it is refused and counted in ``refused_rows``. A sample on a GPU may be
            refused later.

        Raises:
            ValueError: If names or shapes do not fit the weights, or an array has another dtype.
        """
        gradients = self._in_scope(gradients)
        self.layout.check(gradients, "gradients")
        for name, array in gradients.items():
            check_float(f"gradients[{name!r}]", array)
        self._store_arriving()
        device = device_of(gradients[self.layout.names[0]])
        unpruned = self._unpruned_on(device)
        if device.is_host:
            with np.errstate(over="ignore"):  # what float32 cannot hold is refused as Inf
                return self._store(
                    [part.astype(np.float32, copy=False) for part in self.layout.gather_each(gradients, unpruned)]
                )
        with device.backend.on(device.name):
            row = device.asarray(self.layout.gather(gradients, unpruned), np.float32)
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
        """Return whether a pruning step, or a further part of one, is due.

        With live gradients a pruning step that needs rows and falls due before there is any waits until the window is
        full, or the next pruning step falls due.

        Args:
            step: Completed optimizer steps.

        Returns:
            True from then on until :meth:`prune` has done it, in all its parts.
        """
        if not super().is_due(step):
            return False
        if not self._live or not self.uses_gradients(step):
            return True
        self._note_waiting(step)
        if not self.num_rows:
            return False
        if not self._progress.waits or (self._window is not None and self._window.is_full):
            return True
        latest, waiting = self._latest(step), self._progress.waiting
        if waiting is None:
            waiting = latest
            self._progress = replace(self._progress, waiting=latest)
        return latest > waiting or self.schedule[latest].step == step

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs: arrays and plain numbers only.

        Its ``window`` may be left out of what is loaded, or be ``None``; rows are then collected anew.
        """
        self._store_arriving()
        return {
            **super().state_dict(),
            "parts_done": self._progress.parts_done,
            "parts": self._progress.parts if self._progress.parts_done else 0,
            "waits": self._progress.waits,
            "refused_rows": self._refused_rows,
            "window": None if self._window is None else self._window.state_dict(),
        }

    def _take(self, state: Mapping[str, Any]) -> None:
        super()._take(state)
        check_keys("an M-FAC pruner", state, ("parts_done", "waits", "refused_rows"))
        wanted = self.settings.num_recomputations
        parts_done = checked_integer("parts_done", state["parts_done"], at_least=-sys.maxsize)
        as_before = wanted if parts_done and wanted != "auto" else 0  # in states of older releases
        parts = checked_integer("parts", state.get("parts", as_before))
        fits = 0 < parts_done < parts and wanted in ("auto", parts) if parts_done else parts == 0
        if not fits or (parts_done and self.is_finished):
            raise ValueError(
                f"the state is {parts_done} of {parts} parts into a pruning step, and num_recomputations is {wanted}, "
                f"with {len(self.schedule) - self._done} pruning steps to do; resume with the recipe that it was saved "
                "with"
            )
        waits = checked_flag("waits", state["waits"])
        self._progress = replace(
            self._progress_at(self._kept, self._done, parts_done, parts if parts_done else None), waits=waits
        )
        self._refused_rows = checked_integer("refused_rows", state["refused_rows"])
        self._arriving = None
        if state.get("window") is not None:
            num_weights = int(np.count_nonzero(self._kept))
            ahead, done = self._progress.next_pruning - self._done, int(state["pruning_steps_done"])
            saved = replace(self._progress, done=done, next_pruning=done + ahead)
            rows = self._num_gradients_of(saved, self._schedule_of(state))
            window = self._new_window(num_weights, rows)
            window.load_state_dict(state["window"])
            if rows != self.num_gradients:  # with other steps per epoch another threshold may be reached
                window = window.rebuilt(np.ones(num_weights, bool), self.num_gradients)
            self._progress = replace(self._progress, window=window)

    def _sparsity_wanted(self, index: int, zeros: Mask) -> Sparsity:
        return substep_sparsity(
            self._sparsity_of(zeros),
            self._sparsity_at(index),
            self._parts_of(index) - self._parts_done_of(index),
            self.settings.recomputation_spacing,
        )

    def _after(self, kept: Mask, index: int) -> MFACProgress:
        parts_done, parts = self._parts_done_of(index) + 1, self._parts_of(index)
        if parts_done < parts and not self._is_reached(~kept, index):
            after = self._progress_at(kept, index, parts_done, parts)
        else:
            after = self._progress_at(kept, index + 1)
        window, stay = self._window, kept[self._kept]
        if window is None or after.next_pruning == len(self.schedule) or not self._live:
            return after
        rows = self._num_gradients_of(after)
        if rows != window.num_gradients or not stay.all():
            window = window.rebuilt(stay, rows)
        return replace(after, window=window)

    def _progress_at(self, kept: Mask, done: int, parts_done: int = 0, parts: int | None = None) -> MFACProgress:
        """Return the progress once pruning steps, and parts of the next, are done, without a window."""
        left = range(done, len(self.schedule))
        # sparsity never falls; most often the very next one prunes
        asks = bool(left) and not self._is_reached(~kept, done)
        ahead = 0 if asks else bisect_left(left, True, key=lambda index: not self._is_reached(~kept, index))
        upcoming = done + ahead
        if parts is None:
            parts = self._parts_needed(kept, upcoming) if upcoming < len(self.schedule) else 1
        return MFACProgress(kept, done, parts_done, parts, next_pruning=upcoming)

    def _parts_needed(self, kept: Mask, index: int) -> int:
        """Return in how many parts the pruning step with this index is done, if it begins with these weights."""
        return num_substeps(self._sparsity_of(~kept), self._sparsity_at(index), self.settings.num_recomputations)

    def _num_gradients_of(self, progress: MFACProgress, schedule: Sequence[ScheduledStep] | None = None) -> int:
        """Return the rows of a window at a place in a schedule: the own one, or another."""
        scheduled = self.schedule if schedule is None else schedule
        upcoming = progress.next_pruning if progress.next_pruning < len(scheduled) else progress.done
        reached = scheduled[upcoming - 1].sparsity if upcoming else 0.0
        return num_gradients_at(self.settings.num_gradients, reached)

    def _parts_done_of(self, index: int) -> int:
        """Return how many parts of a pruning step are done: none of one that passes others over."""
        return self._progress.parts_done if index == self._done else 0

    def _parts_of(self, index: int) -> int:
        """Return in how many parts a pruning step is done."""
        return self._progress.parts if index == self._progress.next_pruning else self._parts_needed(self._kept, index)

    @property
    def _next_part_step(self) -> int:
        """The optimizer step at which the next part that draws on gradients is due."""
        upcoming = self._progress.next_pruning
        scheduled = self.schedule[upcoming].step
        if not self._live:
            return scheduled
        before = self.schedule[upcoming - 1].step if upcoming else None
        return substep_due(scheduled, before, self._parts_done_of(upcoming), self._progress.parts, self.num_gradients)

    def _latest(self, step: int) -> int:
        latest = super()._latest(step)
        is_next = latest + 1 == self._done == self._progress.next_pruning < len(self.schedule)
        return self._done if is_next and step >= self._next_part_step else latest

    def _prune_unpruned(self, weights: Vector, select: Selection, index: int) -> PrunedUnpruned:
        self._store_arriving()
        zeros = ~self._kept
        zeros[self._kept] = weights == 0
        if self._is_reached(zeros, index):  # none go but those, and nothing has to make up for them
            return *magnitude_step(weights, select), 0.0, None
        if self._window is None or not self._window.count:
            if self.refused_rows:
                raise ValueError(
                    f"there are no gradient samples to prune with: all {self.refused_rows} held NaN or Inf and were "
                    "refused; look for NaN in the data, the weights and the loss"
                )
            raise ValueError("there are no gradient samples to prune with; observe at least one before prune")
        if self._live and self._parts_done_of(index) and self._window.num_fresh < self._window.count:
            self._warn_once(
                "stale",
                f"part {self._parts_done_of(index) + 1} of a pruning step uses {self._window.count} gradient samples, "
                f"and {self._window.num_fresh} of them have arrived since the part before: the others are those of the "
                "weights before it; prune less often, start later, or lower num_recomputations or num_gradients "
                "(num_grads in a recipe), or use a gradient sampler",
            )
        if not self._window.is_full:
            cure = "start later, prune less often, or lower" if self._live else "sample more, or lower"
            self._warn_once(
                "partial",
                f"a pruning step uses {self._window.count} gradient samples where {self._window.num_gradients} are "
                f"wanted; {cure} num_gradients (num_grads in a recipe)",
            )
        if "window" not in self._logged:
            for warning in window_warnings(self._window, damping=self.settings.damping):
                self._logged.add("window")
                _logger.warning(warning)
        return mfac_step(
            weights,
            self._window,
            select,
            damping=self.settings.damping,
            update=self.settings.update,
            devices=self._devices,
        )

    @property
    def _window(self) -> GradientWindow | None:
        return self._progress.window

    def _unpruned_on(self, device: Device) -> dict[str, Array]:
        """Return which entries of gradients on a device are stored."""
        if self._unpruned is None or self._unpruned[0] != device or self._unpruned[1] is not self._kept:
            self._unpruned = device, self._kept, self.layout.unpruned(self._kept, device)
        return self._unpruned[2]

    def _store_arriving(self) -> None:
        if self._arriving is not None:
            row = self._arriving()
            self._store(None if row is None else [row])
            self._arriving = None

    def _store(self, parts: list[Array] | None) -> bool:
        # looked at before any is written: in a full window they take the place of the oldest sample
        if parts is None or not all(_is_finite(part) for part in parts if isinstance(part, np.ndarray)):
            self._refused_rows += 1
            self._warn_once("refused", "a gradient sample holds NaN or Inf: it is left out of the window and counted")
            return False
        window = self._window
        if window is not None:
            window.push(*parts)
        else:  # not kept without a row
            window = self._new_window(sum(int(part.shape[0]) for part in parts), self.num_gradients)
            window.push(*parts)
            self._progress = replace(self._progress, window=window)
        return True

    def _new_window(self, num_weights: int, num_gradients: int) -> GradientWindow:
        return GradientWindow(
            num_weights,
            num_gradients,
            block_size=self.settings.block_size,
            device=self._window_device,
            feeds=[device for device in self._devices if not device.is_host],
        )

    def _note_waiting(self, step: int) -> None:
        if self.uses_gradients(step) and not self.num_rows:
            latest = self._latest(step)
            self._progress = replace(self._progress, waits=True, waiting=latest)
            self._warn_once(
                "waits",
                f"the pruning step at step {self.schedule[latest].step} falls due before there is any gradient "
                "sample: it waits until the window is full or the next pruning step falls due",
            )

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._logged:
            self._logged.add(about)
            _logger.warning(message)


def _is_finite(values: Vector) -> bool:
    with np.errstate(all="ignore"):
        # one fast pass: NaN and Inf never vanish in a sum of squares; that the sum overflows says nothing
        return bool(np.isfinite(np.dot(values, values))) or bool(np.isfinite(values).all())
