"""Warnings about weights that a selection leaves out, or includes, against expectation."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from mfac_core.weight_names import ALL, ALL_PRUNABLE, PATTERN, ModelNames, excluded_names, join_names, matching_names
from mfac_core.weight_names.model import layer_of

__all__ = ["is_adapter", "selection_warnings", "warn_once"]

_STACKED_AXES = 3
_MILLION = 1_000_000


def is_adapter(name: str) -> bool:
    """Return whether a name is one that weights of low-rank adapters usually have.

    Example:
        >>> is_adapter("query.lora_B.default.weight")
        True
    """
    return "lora" in name.lower()


def warn_once(logger: logging.Logger, warnings: Sequence[str], logged: set[str] | None = None) -> None:
    """Log the warnings that are not in ``logged``, and add them to it; ``None`` logs all."""
    for warning in warnings:
        if logged is None or warning not in logged:
            logger.warning("%s", warning)
        if logged is not None:
            logged.add(warning)


def selection_warnings(
    params: Sequence[str],
    exclude: Sequence[str],
    model: ModelNames,
    selected: Mapping[str, Sequence[str]],
    *,
    prunes: bool = True,
) -> list[str]:
    """Return warnings about the weights that keywords, patterns and names of layers select.

    Weights that are selected by their own names, or that ``exclude`` removes, raise no warning.

    Args:
        params: The entries of ``params``.
        exclude: The entries of ``exclude``.
        model: The names of the model.
        selected: The result of :func:`mfac_core.weight_names.selected_names` for them.
        prunes: Whether weights are pruned; otherwise zeros are only counted or kept.

    Returns:
        One line per warning.

    Example:
        >>> shapes = {"fc.weight": (3, 2), "fc.bias": (3,), "old.weight": (2, 2)}
        >>> model = ModelNames(shapes=shapes, prunable=["fc.weight", "old.weight"], frozen=["old.weight"])
        >>> for warning in selection_warnings(["__ALL_PRUNABLE__"], [], model, {"fc.weight": ["__ALL_PRUNABLE__"]}):
        ...     print(warning.partition(";")[0])
        4 of 10 weights of Linear and convolution layers are not in scope: 4 frozen (requires_grad is False: old.weight)
    """
    by_group = [name for name, entries in selected.items() if not any(entry in model.shapes for entry in entries)]
    return [
        *(_rarely_pruned(by_group, selected, model) if prunes else ()),
        *(_others_computed_from(selected, model) if prunes else ()),
        *_left_out(params, exclude, model, selected),
        *(_adapters(by_group, model) if prunes else ()),
    ]


def _rarely_pruned(names: Sequence[str], selected: Mapping[str, Sequence[str]], model: ModelNames) -> list[str]:
    caught = [name for name in names if model.is_rarely_pruned(name)]
    if not caught:
        return []
    entries = dict.fromkeys(entry for name in caught for entry in selected[name])
    return [
        f"params {', '.join(map(repr, entries))} selects normalization weights, biases or scales too: "
        f"{join_names(caught, at_most=10)}. Pruning them saves nothing and harms the model; name layers to select "
        f"their weights alone, write {ALL_PRUNABLE}, or list them in exclude"
    ]


def _others_computed_from(names: Collection[str], model: ModelNames) -> list[str]:
    """Return a warning about weights in scope from which a layer computes a weight that need not keep their zeros."""
    layers = [layer_of(name) for name, computed in model.computed.items() if not computed.keeps_zeros]
    within = tuple(f"{layer}{sign}" if layer else "" for layer in layers for sign in "./")
    sources = [name for name in names if name.startswith(within) and not model.is_rarely_pruned(name)]
    if not sources:
        return []
    return [
        f"other weights are computed from {join_names(sources)} and are not necessarily zero where these are, so the "
        "reported sparsity is not that of the layers; remove the computation before pruning"
    ]


def _left_out(
    params: Sequence[str], exclude: Sequence[str], model: ModelNames, selected: Mapping[str, Sequence[str]]
) -> list[str]:
    groups = [entry for entry in params if entry not in model.shapes]
    excluded = excluded_names(exclude, model)
    expected: dict[str, None] = {}
    for entry in groups:
        expected |= dict.fromkeys(map(model.first, _expected(entry, model)))
    wanted = [name for name in expected if name not in excluded]
    left = [name for name in wanted if name not in selected]
    others = [] if ALL_PRUNABLE not in groups else _most_of_the_model({*expected, *excluded}, model, selected)
    sentences = []
    if left:
        of_what = f"of {model.prunable_layers}"
        if any(map(_is_pattern, groups)):
            of_what = f"that params {list(params)} selects"
        reasons = _by_reason(left, model)
        sentences.append(
            f"{_count(left, model)} of {_count(wanted, model)} weights {of_what} are not in scope: {', '.join(reasons)}"
        )
    if others:
        sentences.append(
            f"{_count(others, model)} weights of layers of other kinds are not in scope ({join_names(others)})"
        )
    if not sentences:
        return []
    return [
        f"{'; '.join(sentences)}; the reported sparsity counts the {_count(list(selected), model)} weights in scope "
        "alone. List in exclude what is left dense on purpose"
    ]


def _by_reason(left: Sequence[str], model: ModelNames) -> list[str]:
    frozen = set(map(model.first, model.frozen))
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name in left:
        by_reason.setdefault(_reason(name, model, frozen), []).append(name)
    return [
        f"{_count(names, model)} {why} ({f'{how}: ' if how else ''}{join_names(names, at_most=3)})"
        for (why, how), names in by_reason.items()
    ]


def _expected(entry: str, model: ModelNames) -> list[str]:
    """Return the weights that one expects a keyword, a pattern or the name of a layer to select."""
    if _is_pattern(entry):
        return [name for name in matching_names(entry, model, strict=False) if not model.is_rarely_pruned(name)]
    inside: Collection[str] = model.shapes if entry == ALL_PRUNABLE else model.layers.get(entry, ())
    computed = list(model.computed) if entry == ALL_PRUNABLE else model.computed_in(entry)
    return [name for name in inside if _is_like_prunable(name, model)] + computed


def _most_of_the_model(known: Collection[str], model: ModelNames, selected: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the trained weights of layers of other kinds if they are more than those in scope, else nothing."""
    known = {*known, *selected, *map(model.first, model.frozen)}
    others = [
        name
        for name in dict.fromkeys(map(model.first, model.shapes))
        if not (name in known or model.is_rarely_pruned(name) or _is_source_of_another(name, model))
    ]
    return others if sum(map(model.weights, others)) > sum(map(model.weights, selected)) else []


def _is_source_of_another(name: str, model: ModelNames) -> bool:
    """Return whether a layer computes its weight from this one; the computed weight is counted in its place."""
    return name.startswith(tuple(layer_of(each) + sign for each in model.computed for sign in "./"))


def _is_like_prunable(name: str, model: ModelNames) -> bool:
    if name in model.prunable or name in model.packed:
        return True
    is_stacked = model.num_axes(name) >= _STACKED_AXES and not model.is_rarely_pruned(name)
    return is_stacked and not _is_source_of_another(name, model)


def _is_pattern(entry: str) -> bool:
    return entry == ALL or entry.startswith(PATTERN)


def _reason(name: str, model: ModelNames, frozen: Collection[str]) -> tuple[str, str]:
    if name in model.computed:
        return "reparametrized", model.computed[name].by
    if name in frozen:
        return "frozen", model.frozen_because
    if name in model.packed:
        return "packed", model.packed[name]
    return "in arrays of three or more axes that belong to no such layer", ""


def _count(names: Sequence[str], model: ModelNames) -> str:
    number = sum(map(model.weights, names))
    if number < _MILLION:
        return f"{number:,}"
    return f"{number / _MILLION:,.{0 if number >= 100 * _MILLION else 1}f} M"


def _adapters(names: Sequence[str], model: ModelNames) -> list[str]:
    """Return a warning about low-rank adapters in scope whose products are added to frozen weights."""
    frozen = [name for name in model.frozen if name in model.prunable]
    found = set(filter(is_adapter, names)) if frozen else set()
    for base in frozen:
        found |= _factors_of(base, frozen, names, model)
    if not found:
        return []
    adapters = [name for name in names if name in found]
    return [
        f"low-rank adapters are pruned, but the frozen weights that they are added to are not: {join_names(adapters)}. "
        "Merged weights are as dense as before; merge first and prune the result, or list the adapters in exclude"
    ]


def _factors_of(base: str, frozen: Sequence[str], names: Sequence[str], model: ModelNames) -> set[str]:
    """Return two matrices in scope whose product has the shape of the only frozen matrix in the same layer."""
    if len(model.shapes[base]) != 2:
        return set()
    high, wide = model.shapes[base]
    owner = layer_of(base)
    for layer in filter(None, (owner, layer_of(owner))):
        within = (f"{layer}.", f"{layer}/")
        if [each for each in frozen if each.startswith(within)] != [base]:
            continue
        inside = [name for name in names if name.startswith(within)]
        for left in inside:
            for right in inside:
                first, second = model.shapes[left], model.shapes[right]
                if (first[:1], second[1:], first[1:]) == ((high,), (wide,), second[:1]) and first[1] < min(high, wide):
                    return {left, right}
    return set()
