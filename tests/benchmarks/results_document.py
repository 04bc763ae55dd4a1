"""Write ``docs/results.md`` from the measurements."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import results_pictures
import results_sentences as say
from results_numbers import Results, mean_and_spread
from results_runs import ABLATION_SPARSITY, GRADUAL_LIVE, MAGNITUDE, OURS, PAPER, PAPER_ONE_PASS
from results_tasks import TASKS

from mfac_core.files import write_file
from mfac_core.recipe.recommended import RECOMMENDED

__all__ = ["text", "write"]

_CNN = "digits-cnn"
_METHODS = (MAGNITUDE, PAPER_ONE_PASS, PAPER, OURS)
_COSTLY = (0.5, 0.7, 0.95)
_ONE_SHOT, _TRAINING, _SETTINGS = "results-one-shot.png", "results-training.png", "results-settings.png"

Lines = Iterator[str]


def write(kept: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write the page and its figures into a folder, and return the files."""
    results = Results(kept)
    drawn = {
        _ONE_SHOT: lambda path: results_pictures.one_shot(results, _pictured(results), path),
        _TRAINING: lambda path: results_pictures.training(results, _CNN, path),
        _SETTINGS: lambda path: results_pictures.settings(results, _CNN, path),
    }
    files = [folder / name for name in drawn if name in _pictures(results)]
    for file in files:
        drawn[file.name](file)
    write_file(folder / "results.md", text(results).encode())
    return [folder / "results.md", *files]


def text(results: Results) -> str:
    """Return the page as Markdown, with a section for each group of runs that was measured."""
    pictures = _pictures(results)
    lines = [*_head(results), *_in_short(results), *_one_shot(results), *_patterns(results)]
    if _TRAINING in pictures:
        lines += [*_fine_tuning(results), *_gradual(results)]
    if _SETTINGS in pictures:
        lines += _settings(results)
    lines += _cost(results)
    if len(pictures) == 3 and "transformer" in results.tasks:
        lines += _starting_points(results)
    return "\n".join(lines).rstrip() + "\n"


def _pictures(results: Results) -> list[str]:
    needed = {_ONE_SHOT: (), _TRAINING: ("fine-tuning", "gradual"), _SETTINGS: ("damping", "scope, magnitude")}
    return [name for name, parts in needed.items() if all(results.choices(_CNN, "method", part=part) for part in parts)]


def _head(results: Results) -> Lines:
    seeds = sorted({results.seeds(task) for task in results.tasks})
    versions = results.fact(results.tasks[0], "versions")
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "# Results"
    yield ""
    yield (
        "Magnitude pruning and M-FAC on the same dense networks: mean ± standard deviation over "
        f"{say.join_names(seeds)} seeds, each with its own data split, initial weights and batch order. Your numbers "
        "will differ: another processor or another version of PyTorch rounds differently, and training amplifies the "
        "difference. The means should be reproduced within their spread."
    )
    yield ""
    yield (
        f"Made by `tests/benchmarks/results.py` (`make results`) with {made_with}, on "
        f"{say.join_names(results.facts('machine'))}. Measured at commit {say.join_names(results.facts('commit'))}."
    )
    yield ""
    yield from _table(
        ["task", "network", "prunable weights", "trained on", "tested on", "metric", "dense"],
        [
            [
                TASKS[task].title,
                TASKS[task].layers,
                f"{results.fact(task, 'weights'):,}",
                f"{results.fact(task, 'train'):,}",
                f"{results.fact(task, 'test'):,} {TASKS[task].unit}",
                results.metric(task).name,
                say.cell(results, task, results.dense(task)),
            ]
            for task in results.tasks
        ],
    )
    yield "The data sets are scikit-learn's; the text is Python's own help (`pydoc_data.topics`). The methods:"
    yield ""
    yield f"* **{MAGNITUDE}**: prunes the smallest weights of all layers."
    yield (
        f"* **{PAPER}**: as its authors ran it, with global scope, the independent update, damping 1e-5 and blocks of "
        "2000. The unpruned fraction shrinks by equal factors in 16 passes (sub-steps: `num_recomputations: 16`), each "
        f"with fresh gradients. **{PAPER_ONE_PASS}**: the same with a single Fisher."
    )
    yield (
        f"* **{OURS}**: global scope, joint update, `num_recomputations: auto`, `damp: auto`. All three draw "
        f"{RECOMMENDED['num_grads']} gradient samples per pass."
    )
    yield ""
    yield (
        "*Ahead*, *equal* and *behind* refer to differences on the same seed, positive if the first method is better: "
        "two methods are equal if the 95% confidence interval of the mean difference (Student's t over the seeds) "
        "contains zero. Among so many comparisons, a few are ahead or behind by chance."
    )
    yield ""


def _in_short(results: Results) -> Lines:
    yield "## In short"
    yield ""
    for head, lines in (
        ("Where M-FAC with the recommended settings helps:", say.where_it_helps(results)),
        ("Where it does not help, or no more than something cheaper:", say.where_it_does_not_help(results)),
    ):
        yield head
        yield ""
        yield from _bullets(lines)


def _one_shot(results: Results) -> Lines:
    yield "## One-shot, without fine-tuning"
    yield ""
    yield f"![Metric against remaining weights, one-shot, one curve per method]({_ONE_SHOT})"
    yield ""
    tested = (
        f"{TASKS[task].title}, {results.fact(task, 'test'):,} {TASKS[task].unit}, {results.seeds(task)} seeds"
        for task in _pictured(results)
    )
    yield (
        f"Tested on: {'; '.join(tested)}. Error bars: one standard deviation over seeds; points of the same sparsity "
        "are drawn side by side. Dotted: the dense network. For a loss, lower is better."
    )
    yield ""
    for task in results.tasks:
        yield f"### {TASKS[task].title}"
        yield ""
        metric = results.metric(task).name
        yield f"{metric[0].upper()}{metric[1:]}. Dense: {say.cell(results, task, results.dense(task))}."
        yield ""
        rows = []
        for sparsity in results.choices(task, "sparsity", part="one-shot"):
            where = {"part": "one-shot", "sparsity": sparsity}
            rows.append(
                [
                    f"one-shot, {sparsity:.0%}",
                    *(say.of(results, task, **where, method=method) for method in _METHODS),
                    _gain(results, task, **where),
                ]
            )
        yield from _table(["", *_METHODS, "recommended vs. magnitude"], rows)
        yield from _bullets(say.ahead_or_not(results, task, other) for other in (MAGNITUDE, PAPER))


def _patterns(results: Results) -> Lines:
    rows = [
        [
            TASKS[task].title,
            pattern,
            *(say.of(results, task, part="pattern", pattern=pattern, method=method) for method in (MAGNITUDE, OURS)),
            _gain(results, task, part="pattern", pattern=pattern),
        ]
        for task in results.tasks
        for pattern in results.choices(task, "pattern", part="pattern")
    ]
    if rows:
        yield "### N:M"
        yield ""
        yield (
            "Of every 4 inputs 2 (or 1) remain, in all layers whose number of inputs is divisible by 4; without "
            "fine-tuning."
        )
        yield ""
        yield from _table(["task", "pattern", MAGNITUDE, OURS, "recommended vs. magnitude"], rows)


def _fine_tuning(results: Results) -> Lines:
    yield "## One-shot, then fine-tuning"
    yield ""
    yield f"![Accuracy against epochs of fine-tuning, and against remaining weights of gradual runs]({_TRAINING})"
    yield ""
    yield _caption(results)
    yield ""
    yield (
        "Fine-tuning follows `recipes/digits_fine_tuning.yaml`, the same for all methods: the learning rate decays to "
        "zero over these epochs, from the value that is best for magnitude."
    )
    yield ""
    rows = []
    sparsities = results.choices(_CNN, "sparsity", part="fine-tuning")
    for sparsity in sparsities:
        for method in results.choices(_CNN, "method", part="fine-tuning"):
            where = {"part": "fine-tuning", "method": method, "sparsity": sparsity}
            for epochs in results.choices(_CNN, "epochs", **where):
                samples, _ = mean_and_spread(results.of(_CNN, "epochs_of_samples", **where, epochs=epochs))
                accuracy = say.of(results, _CNN, **where, epochs=epochs)
                what = f"one-shot, {sparsity:.0%}, {method} + {epochs} epochs"
                rows.append([what, accuracy, f"{samples:.0f}", f"{samples + epochs:.0f}"])
    yield from _table(["", "test accuracy", "gradient samples, in epochs", "samples and fine-tuning, in epochs"], rows)
    yield from _bullets(
        line(results, sparsity) for sparsity in sparsities for line in (say.short_training_line, say.long_training_line)
    )


def _gradual(results: Results) -> Lines:
    yield "## Gradual, while training"
    yield ""
    shortest, longest = (choose(results.choices(_CNN, "epochs", part="gradual")) for choose in (min, max))
    yield (
        f"The recipe is `recipes/digits_gradual.yaml` with other final sparsities: {shortest} epochs, with pruning "
        f"from the first to the sixth. *{GRADUAL_LIVE}* is the recipe as it is; *{OURS}* has the one-shot settings and "
        f"draws fresh samples at each pruning step. For magnitude with {longest} epochs, the schedule is stretched "
        "accordingly."
    )
    yield ""
    rows, samples = [], []
    for sparsity in results.choices(_CNN, "sparsity", part="gradual"):
        where = {"part": "gradual", "sparsity": sparsity}
        samples.append(mean_and_spread(results.of(_CNN, "epochs_of_samples", **where, method=OURS))[0])
        rows.append(
            [
                f"gradual, {sparsity:.0%}",
                say.of(results, _CNN, **where, method=MAGNITUDE, epochs=shortest),
                *(say.of(results, _CNN, **where, method=method) for method in (GRADUAL_LIVE, OURS)),
                say.of(results, _CNN, **where, method=MAGNITUDE, epochs=longest),
                f"{samples[-1]:.0f}",
            ]
        )
    heads = [MAGNITUDE, GRADUAL_LIVE, OURS, f"{MAGNITUDE}, {longest} epochs", "samples of recommended, in epochs"]
    yield from _table(["", *heads], rows)
    yield from _bullets(line for method in (GRADUAL_LIVE, OURS) for line in say.gradual_lines(results, method))


def _settings(results: Results) -> Lines:
    yield "## Settings, one at a time"
    yield ""
    yield f"![Accuracy against each setting, the others as recommended]({_SETTINGS})"
    yield ""
    yield (
        f"{_caption(results)} One-shot at {ABLATION_SPARSITY:.0%}, all other settings as recommended. The modifier's "
        "defaults are one pass with 64 samples, the independent update and damping 1e-5."
    )
    yield ""
    reference = results.of(_CNN, part="one-shot", method=OURS, sparsity=ABLATION_SPARSITY)
    others = {"one-shot", "pattern", "fine-tuning", "gradual"}
    rows = []
    for part in results.choices(_CNN, "part"):
        for method in results.choices(_CNN, "method", part=part) if part not in others else ():
            values = results.of(_CNN, part=part, method=method)
            compared = results.compared(_CNN, values, reference)
            seconds = results.seconds_in_epochs(_CNN, part=part, method=method)
            verdict = f"{compared.verdict} ({say.difference(results, _CNN, compared)})"
            rows.append([part, method, say.cell(results, _CNN, values), verdict, say.cost(seconds)])
    heads = ["setting", "value", "test accuracy", "vs. recommended", "seconds, in epochs of training"]
    yield from _table(heads, rows)
    yield from _bullets(say.settings_lines(results))


def _cost(results: Results) -> Lines:
    yield "## What it costs"
    yield ""
    yield (
        "Processor time of pruning, as a multiple of one epoch of dense training in the same process; in parentheses, "
        "the examples in the gradient samples, as passes over the training examples. Data sets as small as these are "
        "passed over many times; the number of samples does not grow with the data set."
    )
    yield ""
    methods = (PAPER_ONE_PASS, PAPER, OURS)
    rows = []
    for task in results.tasks:
        for sparsity in results.choices(task, "sparsity", part="one-shot"):
            if sparsity in _COSTLY:
                row = [TASKS[task].title, f"{sparsity:.0%}"]
                for method in methods:
                    where = {"part": "one-shot", "method": method, "sparsity": sparsity}
                    seconds = results.seconds_in_epochs(task, **where)
                    row.append(f"{say.cost(seconds)} ({say.cost(results.of(task, 'epochs_of_samples', **where))})")
                rows.append(row)
    yield from _table(["task", "sparsity", *methods], rows)
    yield "Magnitude needs no samples and next to no time."
    yield ""


def _starting_points(results: Results) -> Lines:
    yield "## Which settings do I start with"
    yield ""
    yield "These recommendations follow from the tables above. Larger networks were not measured here."
    yield ""
    samples = results.of(_CNN, "epochs_of_samples", part="one-shot", method=OURS, sparsity=ABLATION_SPARSITY)
    fewest_rows = say.enough_rows(results)
    keys = ", ".join(f"`{key}: {json.dumps(value).strip(chr(34))}`" for key, value in RECOMMENDED.items())
    recommended = f"one-shot with {keys}"
    yield from _table(
        ["model", "budget", "start with", "because"],
        [
            [
                "convolutional or fully connected",
                "no fine-tuning, or a few epochs",
                recommended,
                say.one_shot_line(results, _CNN, ABLATION_SPARSITY),
            ],
            [
                "the same",
                "little time for gradient samples",
                f"the same with `num_grads: {fewest_rows}`",
                f"{fewest_rows} samples are the fewest that are not behind; the number of passes matters more",
            ],
            [
                "the same",
                "labels, and time for many epochs",
                "gradual magnitude, global scope",
                f"the one-shot samples cost {say.cost(samples)} epochs here; "
                + " ".join(say.gradual_lines(results, OURS)),
            ],
            [
                "any of these, at low sparsity",
                "any",
                "magnitude, global scope",
                say.ahead_or_not(results, _CNN, MAGNITUDE),
            ],
            [
                "transformer",
                "no fine-tuning, or little",
                f"{recommended}; small batches for the samples",
                say.ahead_or_not(results, "transformer", MAGNITUDE),
            ],
            ["2:4 or 1:4", "no fine-tuning", f"{recommended}, with `mask_type`", "see [N:M](#nm)"],
            ["any", "any", "not per layer in one pass: write `global_sparsity: true`", say.scope_line(results)],
        ],
    )


def _gain(results: Results, task: str, **where: Any) -> str:
    ours, magnitude = (results.of(task, **where, method=method) for method in (OURS, MAGNITUDE))
    compared = results.compared(task, ours, magnitude)
    return f"{say.difference(results, task, compared)}, {compared.verdict}"


def _caption(results: Results) -> str:
    return (
        f"{TASKS[_CNN].title}, {results.fact(_CNN, 'test'):,} {TASKS[_CNN].unit}, {results.seeds(_CNN)} seeds. Error "
        "bars: one standard deviation over seeds. Dotted: the dense network."
    )


def _pictured(results: Results) -> list[str]:
    return [task for task in results.tasks if task != "transformer-long"]


def _bullets(lines: Iterator[str]) -> Lines:
    yield from (f"* {line}" for line in lines)
    yield ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
