"""Gradual pruning by M-FAC: gradients are observed during training."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mfac_core.backends import Array, array_library, device_of, resolve_devices
from mfac_core.fisher.window import GradientWindow
from mfac_core.fisher.window_checks import window_warnings
from mfac_core.masks.layout import Mask
from mfac_core.masks.sparsity import attained_sparsity, sparsity_of_zeros
from mfac_core.pruners.base import Progress
from mfac_core.pruners.collection import GradientCollector
from mfac_core.pruners.fence import check_alike
from mfac_core.pruners.gradual import GradualPruner
from mfac_core.pruners.memory import MasksToCome, WindowMemory, choose_window_device
from mfac_core.pruners.step import Selection, UnprunedOutcome, magnitude_step, mfac_step
from mfac_core.ranks.agreement import together
from mfac_core.ranks.base import Ranks
from mfac_core.ranks.distribution import Distribution
from mfac_core.ranks.shards import Shards
from mfac_core.schedules.pruning import num_gradients_at
from mfac_core.schedules.substeps import Sparsity, num_substeps, substep_due, substep_sparsity
from mfac_core.settings.pruning import MFACSettings
from mfac_core.state_checks import check_keys, checked_flag, checked_integer

__all__ = ["MFACPruner"]


@dataclass(frozen=True, kw_only=True)
class MFACProgress(Progress):
    """The progress of an M-FAC pruner.

    Args:
        mask: As in :class:`Progress`.
        schedule: As in :class:`Progress`.
        initial_sparsity: As in :class:`Progress`.
        done: As in :class:`Progress`.
        next_pruning: Index of the next pruning step that needs new zeros, or the number of all pruning steps. Those
            before it use no gradients.
        substeps: Number of sub-steps of that pruning step.
        substeps_done: Sub-steps of the next pruning step that are done.
        is_waiting: Whether a pruning step fell due before there was any gradient sample: it waits for a full window.
        waiting_index: Index of the pruning step that waits; after a resume ``None`` until a step is asked about.
        collector: The gradient samples of the unpruned weights.
    """

    next_pruning: int = 0
    substeps: int = 1
    substeps_done: int = 0
    is_waiting: bool = False
    waiting_index: int | None = None
    collector: GradientCollector


class MFACPruner(GradualPruner):
    """Gradual pruning by M-FAC.

    With ``num_recomputations`` a pruning step is split into sub-steps, one per call of :meth:`prune`. Each has a Fisher
    of its own over the remaining weights, from gradients of its own: :meth:`is_due` stays True until the last sub-step
    is done. Samples that are drawn at each pruning step are discarded after each sub-step and must be drawn
    again. With live gradients the sub-steps are one window of rows apart, and the last is due at the scheduled step
    (:func:`mfac_core.schedules.substeps.substep_due`); if there are too few steps for that, they share rows, which is
    logged once.

    A pruning step that needs no new zeros, such as the first at sparsity 0, neither waits for
    gradients nor moves weights.

    Args:
        settings: What to prune, when and how.
        weights: Name and array of each weight, in order; not stored. Those that ``params`` of the settings names are in
            scope. If the settings name ``auto`` as their device, blocks are computed on the device of the first.
        steps_per_epoch: Optimizer steps per epoch.
        masks: Which weights are unpruned at the start (True), by name; ``None`` means all.
        live_gradients: Whether gradients arrive while training. Pass False when they are sampled at each pruning step:
            then a pruning step is due at its step whether or not there are rows, and :meth:`needs_gradients` is always
            False.
        axes: Name and permutation of axes into the order (output, kernel..., input) for the arrays whose layout is not
            PyTorch's (output, input, kernel...).
        library: The library whose devices plain names of the settings mean, as
            :func:`mfac_core.backends.array_library` names it; ``None`` means that of the weights.
        ranks: As in :class:`Pruner`. Each rank stores the columns of its blocks, and computes these.
        shards: As in :class:`Pruner`.

    Raises:
        TypeError: If ``weights`` is not a mapping from name to array.
        ValueError: If there are no weights, or masks, axes or shards do not fit them.
        SettingError: If an entry of ``params`` names none of the weights, the mask type does not fit the shape of an
            array, or ``final_sparsity`` is a mapping.
        NotImplementedError: If a group of weights that the mask type prunes together is on several ranks.
        DeviceError: If a listed device does not exist.
        MemoryBudgetError: If the largest gradient window of the run would not fit.

    Example:
        >>> import numpy as np
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
        library: str | None = None,
        ranks: Ranks | None = None,
        shards: Shards | None = None,
    ) -> None:
        super().__init__(
            settings, weights, steps_per_epoch=steps_per_epoch, masks=masks, axes=axes, ranks=ranks, shards=shards
        )
        first = weights[self.layout.names[0]]
        library = library or array_library(first)
        names = (device_of(first).name,) if settings.devices == ("auto",) else settings.devices
        self._devices = resolve_devices(names, library)
        self._live = live_gradients
        memory = self._memory()
        window_device = choose_window_device(settings.gradients_device, self._devices, memory.bytes_at_once(), library)
        self._logged: set[str] = set()
        collector = GradientCollector(
            self._here,
            self._distribution_of(self._mask),
            num_gradients=0,  # set with the next pruning step
            block_size=settings.block_size,
            device=window_device,
            row_format=memory.row_format,
            consumers=[device for device in self._devices if not device.is_host],
            home=device_of(first),
            warn_once=self._warn_once,
        )
        self._progress = self._with_next_pruning(
            MFACProgress(self._mask, self.schedule, self._progress.initial_sparsity, collector=collector)
        )
        self._check_memory(memory)

    @property
    def num_gradients(self) -> int:
        """Maximum number of rows in the window, for the next pruning step that uses them."""
        return self._collector.num_gradients

    @property
    def is_inside_step(self) -> bool:
        """Whether some sub-steps of the next pruning step are done."""
        return self._progress.substeps_done > 0

    def substep(self, step: int) -> tuple[int, int]:
        """Return which sub-step of a pruning step is due, counted from 1, and how many sub-steps there are.

        Args:
            step: Completed optimizer steps, at which a pruning step is due.

        Returns:
            Both numbers.
        """
        index = self._latest(step)
        return self._substeps_done_of(index) + 1, self._substeps_of(index)

    @property
    def num_rows(self) -> int:
        """Gradient samples in the window now."""
        return self._collector.count

    @property
    def refused_rows(self) -> int:
        """Gradient samples that were left out because they contained NaN or Inf."""
        return self._collector.refused_rows

    def masks_to_come(self) -> MasksToCome:
        """Return the mask sizes that the schedule leads to; :mod:`mfac_core.pruners.memory` counts bytes from them.

        Returns:
            The sparsity of each pruning step, and a function that gives the mask size for a sparsity.
        """
        sparsities = [self._sparsity_at(self._progress, index) for index in range(len(self.schedule))]
        return sparsities, attained_sparsity(self._rule)

    def needs_gradients(self, step: int) -> bool:
        """Return whether the pruner needs the gradient that arrives after ``step`` completed optimizer steps.

        Args:
            step: Completed optimizer steps.

        Returns:
            True in the last :attr:`num_gradients` steps before the next pruning step that uses them, and while one
            waits for rows.
        """
        if self._progress.next_pruning == len(self.schedule) or not self._live:
            return False
        self._note_waiting(step)
        return step >= self._next_substep_due - self.num_gradients

    def uses_gradients(self, step: int) -> bool:
        """Return whether the pruning step that is due uses gradient samples.

        Args:
            step: Completed optimizer steps.

        Returns:
            False if none is due, or the one that is due needs no new zeros.
        """
        index = self._latest(step)
        if index < self._progress.next_pruning:
            return False
        measured = self._progress.initial_sparsity
        if step > 0 or index > 0 or measured is None:
            return True
        # at step 0 the existing zeros reach the initial sparsity, unless the first pruning step is also the last
        return len(self.schedule) == 1 and self._sparsity_at(self._progress, index) != measured

    def observe(self, gradients: Mapping[str, Array]) -> bool:
        """Store one gradient sample in the window.

        A sample on a GPU is copied asynchronously, and checked when the next one arrives or the window is needed.

        Args:
            gradients: Name and array of the gradient of each weight, unscaled; float32 or float64. Copied. Those of
                weights that are not in scope may be left out.

        Returns:
            False for a sample with NaN or Inf: it is refused and counted in ``refused_rows``. A sample on a GPU may be
            refused later.

        Raises:
            ValueError: If names or shapes do not fit the weights, or an array has another dtype.
        """
        return self._collector.observe(self._in_scope(gradients))

    def observe_samples(self, gradients: Mapping[str, Array] | None) -> int:
        """Store the gradient samples that ranks have drawn, each one of its own: collective.

        Args:
            gradients: As in :meth:`observe`, the sample of this rank; ``None`` if it has drawn none. Ranks with shards
                all give their part of the same sample.

        Returns:
            How many samples all ranks have given: each is stored once in all, in the order of ranks, or refused.

        Raises:
            ValueError: As in :meth:`observe`.
            RankError: If another rank has failed.
        """
        return self._collector.observe_samples(None if gradients is None else self._in_scope(gradients))

    @property
    def num_samples_here(self) -> int:
        """Gradient samples that this rank draws to fill the window: its share, or all if each is drawn together."""
        return self.share_of(self.num_gradients)

    def share_of(self, count: int) -> int:
        """Return how many of the batches that all ranks draw together this rank draws.

        Args:
            count: How many all draw.

        Returns:
            Its share; all of them if the weights are in shards, because the ranks then compute with each together.
        """
        return count if self._is_sharded else len(range(self.ranks.rank, count, self.ranks.size))

    def forget_gradients(self) -> None:
        """Empty the window, before fresh samples are drawn."""
        self._collector.forget()

    def is_due(self, step: int) -> bool:
        """Return whether a pruning step, or a further sub-step of one, is due.

        With live gradients a pruning step that needs rows and falls due before there are any waits until the window is
        full, or the next pruning step falls due.

        Args:
            step: Completed optimizer steps.

        Returns:
            True until :meth:`prune` has run it, with all its sub-steps.
        """
        if not super().is_due(step):
            return False
        if not self._live or not self.uses_gradients(step):
            return True
        self._note_waiting(step)
        if not self.num_rows:
            return False
        window = self._collector.window
        if not self._progress.is_waiting or (window is not None and window.is_full):
            return True
        latest, waiting = self._latest(step), self._progress.waiting_index
        if waiting is None:
            waiting = latest
            self._progress = replace(self._progress, waiting_index=latest)
        return latest > waiting or self.schedule[latest].step == step

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as arrays and numbers only.

        Its ``window`` may be left out when the state is loaded, or be ``None``; rows are then collected again. Of
        several ranks, each returns the columns of the window that it stores.

        Returns:
            The state, to be passed to :meth:`load_state_dict`.
        """
        progress, collector = self._progress, self._collector
        return {
            **super().state_dict(),
            "parts_done": progress.substeps_done,
            "parts": progress.substeps if progress.substeps_done else 0,
            "waits": progress.is_waiting,
            "refused_rows": collector.refused_rows,
            "window": collector.state_dict(),
        }

    def _parsed(self, state: Mapping[str, Any]) -> MFACProgress:
        parsed = super()._parsed(state)
        check_keys("an M-FAC pruner", state, ("parts_done", "waits", "refused_rows"))
        wanted = self.settings.num_recomputations
        substeps_done = checked_integer("parts_done", state["parts_done"], at_least=-sys.maxsize)
        as_before = wanted if substeps_done and wanted != "auto" else 0  # states of older releases have no "parts"
        substeps = checked_integer("parts", state.get("parts", as_before))
        fits = 0 < substeps_done < substeps and wanted in ("auto", substeps) if substeps_done else substeps == 0
        num_left = len(parsed.schedule) - parsed.done
        if not fits or (substeps_done and not num_left):
            raise ValueError(
                f"the state is {substeps_done} of {substeps} sub-steps into a pruning step, and num_recomputations is "
                f"{wanted}, with {num_left} pruning steps to do; resume with the recipe that it was saved with"
            )
        is_waiting = checked_flag("waits", state["waits"])
        refused_rows = checked_integer("refused_rows", state["refused_rows"])
        progress = self._with_next_pruning(
            MFACProgress(
                parsed.mask,
                parsed.schedule,
                parsed.initial_sparsity,
                parsed.done,
                substeps_done=substeps_done,
                is_waiting=is_waiting,
                collector=replace(self._collector, refused_rows=refused_rows),
            ),
            substeps=substeps or None,
        )
        if state.get("window") is not None:
            # with other steps per epoch, another threshold of num_gradients may have been reached then
            schedule = self._schedule_at(self._saved_steps_per_epoch(state), parsed.initial_sparsity)
            done = int(state["pruning_steps_done"])
            next_pruning = done + progress.next_pruning - progress.done
            saved = replace(progress, schedule=schedule, done=done, next_pruning=next_pruning)
            windows = state["window"]
            windows = windows if isinstance(windows, list | tuple) and windows else [windows]
            progress.collector.load_window(windows, self._num_gradients_of(saved))
        elif self.ranks.size > 1:
            progress.collector.load_window([], progress.collector.num_gradients)
        return progress

    def _target_sparsity(self, zeros: Mask, index: int) -> Sparsity:
        return substep_sparsity(
            sparsity_of_zeros(zeros, self._rule),
            self._sparsity_at(self._progress, index),
            self._substeps_of(index) - self._substeps_done_of(index),
            self.settings.recomputation_spacing,
        )

    def _after(self, mask: Mask, index: int) -> MFACProgress:
        substeps_done, substeps = self._substeps_done_of(index) + 1, self._substeps_of(index)
        is_inside = substeps_done < substeps and not self._is_reached(~mask, self._progress, index)
        after = MFACProgress(
            mask,
            self.schedule,
            self._progress.initial_sparsity,
            index if is_inside else index + 1,
            substeps_done=substeps_done if is_inside else 0,
            collector=self._collector,
        )
        return self._with_next_pruning(after, substeps=substeps if is_inside else None, keeps_rows=self._live)

    def _with_next_pruning(
        self, progress: MFACProgress, *, substeps: int | None = None, keeps_rows: bool = False
    ) -> MFACProgress:
        """Return progress with its next pruning step filled in, and a collector for the gradient samples of that step.

        ``substeps`` is given if the pruning step has begun. ``keeps_rows`` says whether stored rows stay in the window;
        they are dropped if no further pruning step uses gradients.
        """
        mask, done, num_steps = progress.mask, progress.done, len(progress.schedule)

        def needs_new_zeros(index: int) -> bool:
            return not self._is_reached(~mask, progress, index)

        # sparsity never decreases, so bisection finds the step; usually it is the next one
        next_pruning = done
        if done < num_steps and not needs_new_zeros(done):
            next_pruning += bisect_left(range(done, num_steps), True, key=needs_new_zeros)
        if substeps is None:
            substeps = self._substeps_needed(progress, next_pruning) if next_pruning < num_steps else 1
        progress = replace(progress, next_pruning=next_pruning, substeps=substeps)
        collector = progress.collector.following(
            self._distribution_of(mask),
            self._num_gradients_of(progress),
            keeps_rows=keeps_rows and next_pruning < num_steps,
        )
        return replace(progress, collector=collector)

    def _substeps_needed(self, progress: Progress, index: int) -> int:
        """Return the number of sub-steps of the pruning step with this index, when it starts from this mask."""
        wanted = self._sparsity_at(progress, index)
        return num_substeps(sparsity_of_zeros(~progress.mask, self._rule), wanted, self.settings.num_recomputations)

    def _num_gradients_of(self, progress: MFACProgress) -> int:
        """Return the rows of the window before the next pruning step, or before any further one."""
        num_steps = len(progress.schedule)
        upcoming = progress.next_pruning if progress.next_pruning < num_steps else progress.done
        reached = progress.schedule[upcoming - 1].sparsity if upcoming else 0.0
        return num_gradients_at(self.settings.num_gradients, reached)

    def _substeps_done_of(self, index: int) -> int:
        """Return how many sub-steps of a pruning step are done: none if it skips others."""
        return self._progress.substeps_done if index == self._done else 0

    def _substeps_of(self, index: int) -> int:
        """Return the number of sub-steps of a pruning step that starts from the current mask."""
        progress = self._progress
        return progress.substeps if index == progress.next_pruning else self._substeps_needed(progress, index)

    @property
    def _next_substep_due(self) -> int:
        """The optimizer step at which the next sub-step that uses gradients is due."""
        upcoming = self._progress.next_pruning
        scheduled = self.schedule[upcoming].step
        if not self._live:
            return scheduled
        before = self.schedule[upcoming - 1].step if upcoming else None
        done, substeps = self._substeps_done_of(upcoming), self._progress.substeps
        return substep_due(scheduled, before, done, substeps, self.num_gradients)

    def _latest(self, step: int) -> int:
        # the next pruning step already counts when its first sub-step is due, which is before its scheduled step
        latest = super()._latest(step)
        is_next = latest + 1 == self._done == self._progress.next_pruning < len(self.schedule)
        return self._done if is_next and step >= self._next_substep_due else latest

    def _prune_unpruned(self, weights: Array, zeros: Mask, select: Selection, index: int) -> UnprunedOutcome:
        self._collector.store_arriving()
        if self._is_reached(zeros, self._progress, index):  # only zeros are pruned, and nothing has to compensate
            return magnitude_step(weights, select)._replace(predicted_loss_increase=0.0)
        window = self._collector.window
        if window is None or not window.count:
            if self.refused_rows:
                raise ValueError(
                    f"there are no gradient samples to prune with: all {self.refused_rows} contained NaN or Inf and "
                    "were refused; look for NaN in the data, the weights and the loss"
                )
            raise ValueError("there are no gradient samples to prune with; call observe() at least once before prune()")
        self._warn_of_window(window, self._substeps_done_of(index))
        return mfac_step(
            weights,
            window,
            select,
            damping=self.settings.damping,
            update=self.settings.update,
            devices=self._devices,
            ranks=self.ranks,
        )

    def _warn_of_window(self, window: GradientWindow, substeps_done: int) -> None:
        """Warn about rows that are too few, outdated or uninformative."""
        if self._live and substeps_done and window.num_fresh < window.count:
            self._warn_once(
                "stale",
                f"sub-step {substeps_done + 1} of a pruning step uses {window.count} gradient samples, of which only "
                f"{window.num_fresh} have arrived since the previous sub-step: the others are gradients at the "
                "weights before it; prune less often, start later, or lower num_recomputations or num_gradients "
                "(num_grads in a recipe), or use a gradient sampler",
            )
        if not window.is_full:
            cure = "start later, prune less often, or lower" if self._live else "sample more, or lower"
            self._warn_once(
                "partial",
                f"a pruning step uses {window.count} gradient samples instead of {window.num_gradients}; {cure} "
                "num_gradients (num_grads in a recipe)",
            )
        if "window" not in self._logged:
            for warning in window_warnings(window, damping=self.settings.damping, ranks=self.ranks):
                self._logged.add("window")
                self._logger.warning(warning)

    def _memory(self) -> WindowMemory:
        return WindowMemory(
            self.settings,
            self.layout.num_weights,
            self.schedule,
            self.masks_to_come(),
            live_gradients=self._live,
            rank=self.ranks.rank,
            num_ranks=self.ranks.size,
        )

    def _check_memory(self, memory: WindowMemory) -> None:
        self.needed_bytes = memory.check(self._collector.device)
        self.window_bytes = memory.peak_bytes()

    def _distributed(self, mask: Mask) -> Distribution:
        return Distribution(self.ranks, self.shards, mask, block_size=self.settings.block_size)

    def _meet(self) -> None:
        is_measured = self._zeros_here is None
        super()._meet()
        if not is_measured:
            self._progress = self._with_next_pruning(self._progress)
            with together(self.ranks, "the check of memory"):
                self._check_memory(self._memory())
        self._collector.settle()
        if not self._is_sharded:
            check_alike(self.ranks, "gradients", self._collector.entries)

    def _compared(self, step: int) -> dict[str, int | str]:
        progress, collector = self._progress, self._collector
        collector.store_arriving()
        is_loaded = collector.loaded is not None
        device = collector.device
        return {
            **super()._compared(step),
            "the sub-steps that are done": progress.substeps_done,
            "whether a pruning step waits": int(progress.is_waiting),
            "whether a state is loaded": int(is_loaded),
            "gradient samples": 0 if is_loaded else collector.count,
            "refused gradient samples": collector.refused_rows,
            "the device of the gradient window": "host memory" if device.is_host else device.backend.name,
        }

    @property
    def _collector(self) -> GradientCollector:
        return self._progress.collector

    def _note_waiting(self, step: int) -> None:
        if self.uses_gradients(step) and not self.num_rows:
            latest = self._latest(step)
            self._progress = replace(self._progress, is_waiting=True, waiting_index=latest)
            self._warn_once(
                "waits",
                f"the pruning step at step {self.schedule[latest].step} falls due before there is any gradient "
                "sample: it waits until the window is full or the next pruning step falls due",
            )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._logged:
            self._logged.add(subject)
            self._logger.warning(message)
