"""The sentences of ``docs/results.md``: each is generated from the numbers, whichever way they fall."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from results_numbers import Comparison, Results, mean_and_spread
from results_runs import ABLATION_SPARSITY, DEFAULTS_SCOPE, GRADUAL_LIVE, MAGNITUDE, OURS, PAPER
from results_tasks import TASKS

__all__ = [
    "ahead_or_not",
    "cell",
    "cost",
    "difference",
    "enough_rows",
    "gradual_lines",
    "join_names",
    "long_training_line",
    "loss_line",
    "of",
    "one_shot_line",
    "percents",
    "scope_line",
    "settings_lines",
    "short_training_line",
    "where_it_does_not_help",
    "where_it_helps",
]

_CNN = "digits-cnn"
_LOSS_SPARSITY = 0.7
_WORDS = {"ahead": "ahead of", "equal": "equal to", "behind": "behind"}


def where_it_helps(results: Results) -> Iterator[str]:
    """Yield sentences on comparisons in which M-FAC is ahead of magnitude."""
    for task, sparsities in ((_CNN, (0.95, 0.97)), ("digits-mlp", (0.95, 0.97))):
        for sparsity in sparsities:
            if _measured(results, task, sparsity) and _one_shot(results, task, MAGNITUDE, sparsity).verdict == "ahead":
                yield one_shot_line(results, task, sparsity)
    if _helps(results, "transformer"):
        yield loss_line(results, "transformer")
    for sparsity in _fine_tuned(results):
        if _tuned(results, sparsity, (OURS, 2), (MAGNITUDE, 2)).verdict == "ahead":
            yield short_training_line(results, sparsity)


def where_it_does_not_help(results: Results) -> Iterator[str]:
    """Yield sentences on comparisons in which it is not."""
    for task in results.tasks:
        found = _by_verdict(results, task, MAGNITUDE)
        verdicts = [
            f"{_WORDS[each]} magnitude at {percents(found[each])}" for each in ("equal", "behind") if each in found
        ]
        if verdicts:
            yield (
                f"{TASKS[task].title}, one-shot: {'; '.join(verdicts)}. Magnitude needs no gradients: choose it there."
            )
        worse = _by_verdict(results, task, PAPER).get("behind")
        if worse:
            yield f"{TASKS[task].title}, one-shot: the recommended settings are behind *{PAPER}* at {percents(worse)}."
    if _measured(results, "transformer", _LOSS_SPARSITY) and not _helps(results, "transformer"):
        yield loss_line(results, "transformer")
    if _measured(results, "transformer-long", _LOSS_SPARSITY):
        yield loss_line(results, "transformer-long") + _of_the_longer_training(results)
    for sparsity in _fine_tuned(results):
        if _tuned(results, sparsity, (OURS, 2), (MAGNITUDE, 2)).verdict != "ahead":
            yield short_training_line(results, sparsity)
        yield long_training_line(results, sparsity)
    for method in (GRADUAL_LIVE, OURS):
        yield from gradual_lines(results, method)
    if results.choices(_CNN, "method", part=DEFAULTS_SCOPE):
        yield scope_line(results)


def one_shot_line(results: Results, task: str, sparsity: float) -> str:
    """Return how far below the dense network one-shot pruning is."""
    losses = []
    for method in (OURS, MAGNITUDE):
        pruned = results.of(task, part="one-shot", method=method, sparsity=sparsity)
        losses.append(difference(results, task, results.compared(task, results.dense(task), pruned), sign=""))
    points = results.metric(task).points
    return (
        f"{TASKS[task].title}, one-shot at {sparsity:.0%}, without fine-tuning: {losses[0]} {points} below the dense "
        f"network; magnitude is {losses[1]} {points} below."
    )


def loss_line(results: Results, task: str) -> str:
    """Return by how much the loss of a text model increases."""
    rise = {}
    for method in (OURS, MAGNITUDE, PAPER):
        pruned = results.of(task, part="one-shot", method=method, sparsity=_LOSS_SPARSITY)
        rise[method] = results.compared(task, results.dense(task), pruned).mean
    return (
        f"{TASKS[task].title}, one-shot at {_LOSS_SPARSITY:.0%}: the loss increases by {rise[OURS]:.2f} nats, "
        f"{rise[OURS] / rise[MAGNITUDE]:.0%} of the {rise[MAGNITUDE]:.2f} of magnitude; as in the paper, by "
        f"{rise[PAPER]:.2f}."
    )


def short_training_line(results: Results, sparsity: float) -> str:
    """Compare after two epochs of fine-tuning."""
    same, more = (_tuned(results, sparsity, (OURS, 2), (MAGNITUDE, epochs)) for epochs in (2, 20))
    two = "magnitude with two epochs"
    return (
        f"One-shot at {sparsity:.0%} and two epochs of fine-tuning: {_against(results, same, two)}, "
        f"and {_against(results, more, 'magnitude with twenty')}."
    )


def long_training_line(results: Results, sparsity: float) -> str:
    """Compare after longer fine-tuning."""
    both = _tuned(results, sparsity, (OURS, 20), (MAGNITUDE, 20))
    most = _tuned(results, sparsity, (OURS, 2), (MAGNITUDE, 50))
    samples, _ = mean_and_spread(results.of(_CNN, "epochs_of_samples", part="one-shot", method=OURS, sparsity=sparsity))
    return (
        f"One-shot at {sparsity:.0%} and twenty epochs of both: {_against(results, both, 'magnitude')}. The gradient "
        f"samples cost {samples:.0f} epochs of training on so small a data set; with two epochs after them, M-FAC is "
        f"{_against(results, most, 'magnitude with fifty')}."
    )


def gradual_lines(results: Results, method: str) -> Iterator[str]:
    """Compare gradual M-FAC with gradual magnitude pruning."""
    for epochs in results.choices(_CNN, "epochs", part="gradual", method=MAGNITUDE):
        verdicts = []
        for sparsity in results.choices(_CNN, "sparsity", part="gradual"):
            first = results.of(_CNN, part="gradual", method=method, sparsity=sparsity)
            second = results.of(_CNN, part="gradual", method=MAGNITUDE, sparsity=sparsity, epochs=epochs)
            compared = results.compared(_CNN, first, second)
            verdicts.append(f"{compared.verdict} at {sparsity:.0%} ({difference(results, _CNN, compared)})")
        yield f"Gradual, *{method}* vs. magnitude with {epochs} epochs: {', '.join(verdicts)}."


def scope_line(results: Results) -> str:
    """Return the cost of a scope that is limited to each layer."""

    def reached(part: str, scope: str) -> str:
        return of(results, _CNN, part=part, method=scope)

    per_layer = results.of(_CNN, part=DEFAULTS_SCOPE, method="layer")
    magnitude = results.of(_CNN, part="scope, magnitude", method="global")
    compared = results.compared(_CNN, per_layer, magnitude)
    return (
        f"Scope at {ABLATION_SPARSITY:.0%}: with all other settings as recommended, "
        f"{reached('scope, M-FAC', 'global')} globally, {reached('scope, M-FAC', 'layer')} per layer. The modifier's "
        f"own defaults, per layer in one pass, reach {reached(DEFAULTS_SCOPE, 'layer')}: {_WORDS[compared.verdict]} "
        f"global magnitude ({reached('scope, magnitude', 'global')})."
    )


def settings_lines(results: Results) -> Iterator[str]:
    """Yield which values of each setting are as good as the recommended one."""
    reference = results.of(_CNN, part="one-shot", method=OURS, sparsity=ABLATION_SPARSITY)
    for name, part in (
        ("Gradient samples m", "gradient samples m"),
        ("Passes k, geometric", "passes k, geometric"),
        ("Passes k, linear", "passes k, linear"),
        ("Gradients of passes 2 to 16", "gradients"),
        ("Block size", "block size B"),
        ("Damping", "damping"),
        ("Damping where the loss is 10,000 times smaller", "damping, loss times 1e-4"),
        ("Update", "update"),
    ):
        found: dict[str, list[str]] = {}
        for method in results.choices(_CNN, "method", part=part):
            compared = results.compared(_CNN, results.of(_CNN, part=part, method=method), reference)
            found.setdefault(compared.verdict, []).append(method)
        verdicts = [f"{each}: {join_names(found[each])}" for each in ("ahead", "equal", "behind") if each in found]
        yield f"{name}, vs. the recommended settings: {'; '.join(verdicts)}."
    yield scope_line(results)


def ahead_or_not(results: Results, task: str, other: str) -> str:
    """Return at which sparsities the recommended one-shot settings are ahead of another method, equal or behind."""
    found = _by_verdict(results, task, other)
    verdicts = [f"{each} at {percents(found[each])}" for each in ("ahead", "equal", "behind") if each in found]
    return f"*{OURS}* vs. *{other}*: {'; '.join(verdicts)}."


def enough_rows(results: Results) -> int:
    """Return the fewest gradient samples from which on no number is behind the recommended settings."""
    reference = results.of(_CNN, part="one-shot", method=OURS, sparsity=ABLATION_SPARSITY)
    enough = 256
    for rows in sorted(
        (int(each) for each in results.choices(_CNN, "method", part="gradient samples m")), reverse=True
    ):
        values = results.of(_CNN, part="gradient samples m", method=f"{rows}")
        if results.compared(_CNN, values, reference).verdict == "behind":
            break
        enough = min(enough, rows)
    return enough


def cell(results: Results, task: str, values: Mapping[int, float]) -> str:
    """Return mean and standard deviation over seeds, or an empty string if nothing was measured."""
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:{_form(results, task)}} ± {spread:{_form(results, task)}}"


def of(results: Results, task: str, **where: Any) -> str:
    """Return mean and standard deviation of the runs with these properties."""
    return cell(results, task, results.of(task, **where))


def difference(results: Results, task: str, compared: Comparison, *, sign: str = "+") -> str:
    """Return mean and standard deviation of a difference; positive is better."""
    return f"{compared.mean:{sign}{_form(results, task)}} ± {compared.spread:{_form(results, task)}}"


def cost(values: Mapping[int, float]) -> str:
    """Return the mean of a ratio to two digits."""
    mean, _ = mean_and_spread(values)
    return f"{mean:.0f}" if mean >= 10 else f"{mean:.2g}"


def percents(sparsities: Sequence[float]) -> str:
    """Return sparsities as part of a sentence."""
    return join_names([f"{sparsity:.0%}" for sparsity in sparsities])


def join_names(values: Sequence[Any]) -> str:
    """Return names as part of a sentence."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _of_the_longer_training(results: Results) -> str:
    shares = []
    for task in ("transformer", "transformer-long"):
        rise = []
        for method in (OURS, MAGNITUDE):
            pruned = results.of(task, part="one-shot", method=method, sparsity=_LOSS_SPARSITY)
            if not pruned:
                return ""
            rise.append(results.compared(task, results.dense(task), pruned).mean)
        shares.append(rise[0] / rise[1])
    if shares[1] <= shares[0]:
        return ""
    return " The better a network uses its weights, the less can be compensated for."


def _against(results: Results, compared: Comparison, other: str) -> str:
    return f"{_WORDS[compared.verdict]} {other} ({difference(results, _CNN, compared)} points)"


def _by_verdict(results: Results, task: str, other: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for sparsity in results.choices(task, "sparsity", part="one-shot"):
        found.setdefault(_one_shot(results, task, other, sparsity).verdict, []).append(sparsity)
    return found


def _one_shot(results: Results, task: str, other: str, sparsity: float) -> Comparison:
    first, second = (results.of(task, part="one-shot", method=method, sparsity=sparsity) for method in (OURS, other))
    return results.compared(task, first, second)


def _tuned(results: Results, sparsity: float, first: tuple[str, int], second: tuple[str, int]) -> Comparison:
    values = [
        results.of(_CNN, part="fine-tuning", method=method, sparsity=sparsity, epochs=epochs)
        for method, epochs in (first, second)
    ]
    return results.compared(_CNN, *values)


def _fine_tuned(results: Results) -> list[float]:
    return results.choices(_CNN, "sparsity", part="fine-tuning")


def _measured(results: Results, task: str, sparsity: float) -> bool:
    return bool(results.of(task, part="one-shot", method=OURS, sparsity=sparsity))


def _helps(results: Results, task: str) -> bool:
    is_measured = _measured(results, task, _LOSS_SPARSITY)
    return is_measured and _one_shot(results, task, MAGNITUDE, _LOSS_SPARSITY).verdict == "ahead"


def _form(results: Results, task: str) -> str:
    return ".3f" if results.metric(task).lower_is_better else ".1f"
