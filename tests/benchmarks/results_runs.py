"""The runs of each task of ``results.py``, and how each is executed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from results_tasks import TASKS, Batches, Bench
from torch import nn

import mfac_core
from mfac_core.demo.runs import FINE_TUNING, recipe_path
from mfac_core.recipe import load_recipe, settings_from_keys
from mfac_core.recipe.recommended import RECOMMENDED
from mfac_core.settings.pruning import GradualSettings, MagnitudeSettings, MFACSettings
from mfac_torch.manager import ScheduledModifierManager
from mfac_torch.modifier import modifier_for
from mfac_torch.selection import select_parameters

__all__ = [
    "ABLATION_SPARSITY",
    "DEFAULTS_SCOPE",
    "GRADUAL_LIVE",
    "MAGNITUDE",
    "OURS",
    "PAPER",
    "PAPER_ONE_PASS",
    "Run",
    "Scale",
    "do",
    "runs_of",
]

MAGNITUDE = "magnitude"
PAPER_ONE_PASS = "M-FAC as in the paper, one pass"
PAPER = "M-FAC as in the paper, 16 passes"
OURS = "M-FAC, recommended"
GRADUAL_LIVE = "M-FAC, gradients of training"
"""Names of the methods, in tables and figures."""

ABLATION_SPARSITY = 0.95
DEFAULTS_SCOPE = "scope, one pass with the modifier's defaults"
_NAMES = ("scope", "update", "num_recomputations", "recomputation_spacing", "damping", "block_size")
_WRITTEN = settings_from_keys("MFACPruningModifier", {**RECOMMENDED, "final_sparsity": 0.5, "end_epoch": 0.0})
_RECOMMENDED: dict[str, Any] = {name: getattr(_WRITTEN, name) for name in _NAMES}
_RECOMMENDED["num_gradients"] = RECOMMENDED["num_grads"]
_AS_IN_THE_PAPER: dict[str, Any] = {
    "scope": "global",
    "update": "independent",
    "num_recomputations": 16,
    "recomputation_spacing": "geometric",
    "damping": 1e-5,
    "block_size": 2000,
    "num_gradients": _RECOMMENDED["num_gradients"],
}
_METHODS: dict[str, dict[str, Any] | None] = {
    MAGNITUDE: None,
    PAPER_ONE_PASS: _AS_IN_THE_PAPER | {"num_recomputations": 1},
    PAPER: _AS_IN_THE_PAPER,
    OURS: _RECOMMENDED,
}
_PATTERNS = {"2:4": 0.5, "1:4": 0.75}
_FINE_TUNING_EPOCHS = {MAGNITUDE: (2, 20, 50), PAPER: (2,), OURS: (2, 20)}


@dataclass(frozen=True)
class Scale:
    """The extent of the measurements.

    Args:
        sparsities: Sparsities of the one-shot runs.
        gradual: Sparsities of the gradual runs.
        fine_tuned: Sparsities of the runs with fine-tuning.
        share_of_rows: Fraction of the gradient samples to draw.
        longest_training: Maximum number of epochs of training after pruning.
        dense_epochs: Epochs of the dense training; ``None`` for those of the task.
        ablations: Whether to vary each setting.
    """

    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
    gradual: Sequence[float] = (0.9, 0.96, 0.98)
    fine_tuned: Sequence[float] = (0.95, 0.97)
    share_of_rows: float = 1.0
    longest_training: int = 1000
    dense_epochs: int | None = None
    ablations: bool = True


@dataclass(frozen=True)
class Run:
    """One pruning of one network.

    Args:
        part: Section of the page: ``one-shot``, ``pattern``, ``fine-tuning``, ``gradual`` or the name of an ablation.
        method: Name of the method, or the value of the setting that the ablation varies.
        sparsity: Pruned fraction.
        settings: Keywords of :class:`MFACSettings`; ``None`` for magnitude.
        epochs: Epochs of training after pruning, or during it.
        gradients: ``fresh`` batches for each sub-step, the same ones ``repeated``, or the rows of the first sub-step
            (``stale``).
        loss_scale: Factor of the loss whose gradients are sampled.
        pattern: Mask type.
        scope: Scope of magnitude pruning.
    """

    part: str
    method: str
    sparsity: float
    settings: Mapping[str, Any] | None = field(default=None, compare=False)
    epochs: int = 0
    gradients: str = "fresh"
    loss_scale: float = 1.0
    pattern: str = "unstructured"
    scope: str = "global"

    @property
    def key(self) -> str:
        """An identifier among all runs of its task and seed."""
        return f"{self.part} | {self.method} | {self.sparsity:g} | {self.epochs} epochs | {self.pattern}"

    @property
    def work(self) -> str:
        """An identifier of the computation, which two runs under different names may share."""
        settings = sorted(self.settings.items()) if self.settings else self.scope
        kind = self.part if self.part == "gradual" else ""
        return f"{kind} {self.sparsity} {settings} {self.epochs} {self.gradients} {self.loss_scale} {self.pattern}"

    @property
    def names(self) -> dict[str, Any]:
        """The properties by which results are selected."""
        return {name: getattr(self, name) for name in ("part", "method", "sparsity", "epochs", "pattern")}


def runs_of(task: str, scale: Scale) -> dict[str, list[Run]]:
    """Return the runs of a task, in groups that can run in parallel."""
    sparsities = scale.sparsities
    if task.startswith("transformer"):
        sparsities = [each for each in sparsities if each <= 0.95]
    one_shot = [
        Run("one-shot", method, sparsity, settings) for sparsity in sparsities for method, settings in _METHODS.items()
    ]
    if task == "transformer-long":
        return {"one-shot": [run for run in one_shot if run.sparsity == 0.7]}
    groups = {"one-shot": one_shot}
    if not TASKS[task].is_table:
        one_shot += [
            Run("pattern", method, sparsity, _METHODS[method], pattern=pattern)
            for pattern, sparsity in _PATTERNS.items()
            for method in (MAGNITUDE, OURS)
        ]
    if task == "digits-cnn":
        groups["trained"] = [*_fine_tuned(scale), *_gradual(scale)]
        if scale.ablations:
            groups["ablations"] = list(_ablations())
    return groups


def do(run: Run, bench: Bench, scale: Scale) -> dict[str, Any]:
    """Execute one run, and return its measurements."""
    started = time.process_time()
    model = bench.copy()
    batches = Batches(bench.data, bench.task.sample_batch_size, bench.seed, repeated=run.gradients == "repeated")
    if run.part == "gradual":
        sparsity = _prune_gradually(run, bench, model, batches, scale)
    elif run.gradients == "stale":
        sparsity = _prune_by_stale_rows(run, bench, model, batches, scale)
    else:
        manager = _manager(_settings(run, bench, scale))
        manager.apply(model, grad_sampler=bench.sampler(batches, loss_scale=run.loss_scale))
        sparsity = manager.sparsity
    seconds = time.process_time() - started
    if run.epochs and run.part != "gradual":
        epochs = min(run.epochs, scale.longest_training)
        recipe = load_recipe(recipe_path(FINE_TUNING), {"epochs": epochs})
        holding = ScheduledModifierManager([modifier_for(each) for each in recipe.modifiers])
        bench.train(model, epochs, lambda model, optimizer: holding.modify(model, optimizer, bench.steps_per_epoch))
        holding.finalize(model)
        sparsity = holding.sparsity
    return run.names | {
        "value": bench.measure(model),
        "reached": sparsity,
        "seconds": seconds,
        "epochs_of_samples": batches.drawn / len(bench.data.train_inputs),
    }


def _fine_tuned(scale: Scale) -> Iterator[Run]:
    for sparsity in scale.fine_tuned:
        for method, all_epochs in _FINE_TUNING_EPOCHS.items():
            for epochs in all_epochs:
                yield Run("fine-tuning", method, sparsity, _METHODS[method], epochs=epochs)


def _gradual(scale: Scale) -> Iterator[Run]:
    recipe = load_recipe(recipe_path("digits_gradual.yaml"))
    (written,) = (each for each in recipe.modifiers if isinstance(each, MFACSettings))
    live = {each.name: getattr(written, each.name) for each in dataclasses.fields(MFACSettings)}
    epochs = round(recipe.max_epochs)
    schedule = {each.name: live[each.name] for each in dataclasses.fields(GradualSettings)}
    for sparsity in scale.gradual:
        yield Run("gradual", MAGNITUDE, sparsity, schedule, epochs=epochs)
        yield Run("gradual", GRADUAL_LIVE, sparsity, live, epochs=epochs)
        yield Run("gradual", OURS, sparsity, schedule | _RECOMMENDED, epochs=epochs)
        twice = {name: 2 * schedule[name] for name in ("start_epoch", "end_epoch")}
        yield Run("gradual", MAGNITUDE, sparsity, schedule | twice, epochs=2 * epochs)


def _ablations() -> Iterator[Run]:
    def run(part: str, method: str, **changes: Any) -> Run:
        of_run = {name: changes.pop(name) for name in ("gradients", "loss_scale") if name in changes}
        return Run(part, method, ABLATION_SPARSITY, _RECOMMENDED | changes, **of_run)

    for rows in (16, 32, 64, 128, 256, 512):
        yield run("gradient samples m", f"{rows}", num_gradients=rows)
    for spacing in ("geometric", "linear"):
        for passes in (1, 2, 4, 8, 16, 32):
            yield run(f"passes k, {spacing}", f"{passes}", num_recomputations=passes, recomputation_spacing=spacing)
    yield run("passes k, geometric", "auto")
    for gradients, label in (
        ("fresh", "other batches for each pass"),
        ("repeated", "the same batches, gradients recomputed"),
        ("stale", "the rows of the first pass"),
    ):
        yield run("gradients", label, num_recomputations=16, gradients=gradients)
    for size in (1, 50, 500, 2000, None):
        yield run("block size B", "all" if size is None else f"{size}", block_size=size)
    for damping in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, "auto"):
        yield run("damping", f"{damping}", damping=damping)
    for damping in (1e-5, 1e-7, "auto"):
        yield run("damping, loss times 1e-4", f"{damping}", damping=damping, loss_scale=1e-4)
    for update in ("joint", "independent"):
        yield run("update", update, update=update)
    for scope in ("global", "layer"):
        yield run("scope, M-FAC", scope, scope=scope)
        yield run(DEFAULTS_SCOPE, scope, **_ONE_PASS, scope=scope)
        yield Run("scope, magnitude", scope, ABLATION_SPARSITY, scope=scope)


_ONE_PASS = {"num_recomputations": 1, "update": "independent", "damping": 1e-5, "num_gradients": 64}


def _settings(run: Run, bench: Bench, scale: Scale) -> GradualSettings:
    once: dict[str, Any] = {"final_sparsity": run.sparsity, "end_epoch": 0.0, "mask_type": run.pattern}
    if run.pattern != "unstructured":
        once["exclude"] = bench.task.narrow
    if run.settings is None:
        return MagnitudeSettings(**once, scope=run.scope)
    return MFACSettings(**once | _scaled(run.settings, scale))


def _scaled(settings: Mapping[str, Any], scale: Scale) -> dict[str, Any]:
    rows = settings["num_gradients"]
    if not isinstance(rows, int):
        return dict(settings)
    return settings | {"num_gradients": max(2, math.ceil(rows * scale.share_of_rows))}


def _prune_gradually(run: Run, bench: Bench, model: nn.Module, batches: Batches, scale: Scale) -> float:
    assert run.settings is not None
    at = {"final_sparsity": run.sparsity, "initial_sparsity": min(run.settings["initial_sparsity"], run.sparsity)}
    if run.method == MAGNITUDE:
        settings: GradualSettings = MagnitudeSettings(**run.settings | at)
    else:
        settings = MFACSettings(**_scaled(run.settings, scale) | at)
    manager = _manager(settings)
    sampler = bench.sampler(batches) if run.method == OURS else None
    epochs = min(run.epochs, scale.longest_training)
    bench.train(
        model,
        epochs,
        lambda model, optimizer: manager.modify(model, optimizer, bench.steps_per_epoch, grad_sampler=sampler),
    )
    manager.finalize(model)
    return manager.sparsity


def _prune_by_stale_rows(run: Run, bench: Bench, model: nn.Module, batches: Batches, scale: Scale) -> float:
    """Prune by one set of rows, which the core restricts to the weights that each pass has left."""
    assert run.settings is not None
    settings = _scaled(run.settings, scale)
    parameters = select_parameters(model, "__ALL_PRUNABLE__")
    rows = list(bench.sampler(batches).gradients(model, parameters, settings.pop("num_gradients")))
    result = mfac_core.prune(
        {name: parameter.detach().numpy() for name, parameter in parameters.items()},
        {name: torch.stack([row[name] for row in rows]).numpy() for name in parameters},
        sparsity=run.sparsity,
        **settings,
    )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(result.weights[name]))
    return result.sparsity


def _manager(settings: Any) -> ScheduledModifierManager:
    return ScheduledModifierManager([modifier_for(settings)])
