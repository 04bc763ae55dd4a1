"""Why an entry of ``params`` or ``exclude`` matches nothing, and what to write instead."""

from __future__ import annotations

import fnmatch
import re
from difflib import get_close_matches

from mfac_core.weight_names.model import ALL, ALL_PRUNABLE, PATTERN, ModelNames, join_names

__all__ = ["why_nothing_matches"]

_GLOB_SIGNS = re.compile(r"[*?]|\[[^\]]+\]")
_PATTERN_SIGNS = re.compile(r"[*?+|()^$\[\]\\]")


def why_nothing_matches(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    """Return why an entry matches nothing, and what to write instead.

    Without ``is_whole`` the name of a layer means its prunable weights alone, and only weights that one prunes are
    suggested.
    """
    if entry in model.layers:
        inside = () if is_whole else model.layers[entry]
        usual = [name for name in inside if not model.is_rarely_pruned(name)]
        held = f"; it has {join_names(usual)}, which you can write by name" if usual else ""
        if inside and not usual:
            held = f"; it has {join_names(inside)}: pruning normalization weights, biases or scales harms the model"
        return f"{entry!r} is a layer without weights of {model.prunable_layers}{_computed_inside(entry, model)}{held}"
    if entry in model.computed:
        return f"{entry!r} is not a {model.kind}{_computed_inside(entry, model)}"
    return f"{entry!r} matches no {model.kind} of the model; {_suggestion(entry, model, is_whole=is_whole)}"


def _computed_inside(entry: str, model: ModelNames) -> str:
    names = [entry] if entry in model.computed else model.computed_in(entry)
    if not names:
        return ""
    by = sorted({model.computed[name].by for name in names})
    how = f" ({', '.join(by)})" if any(by) else ""
    return f", because its weight is computed from other {model.kind}s{how}; remove the computation before pruning"


def _suggestion(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    if entry not in (ALL, ALL_PRUNABLE) and f"__{entry.strip('_').upper()}__" in (ALL, ALL_PRUNABLE):
        return f"write {ALL_PRUNABLE} for the weights of all {model.prunable_layers}, or {ALL} for everything"
    if entry == ALL_PRUNABLE and model.shapes:
        if model.computed:
            names = ", ".join(sorted(model.computed))
            return f"the weights of all its layers are computed from other {model.kind}s ({names})"
        return f"it has no {model.prunable_layers}, so list in params what to prune"
    if not model.shapes:
        return f"the model has no {model.kind}s"
    return _as_pattern(entry, model, is_whole=is_whole) or _nearest(entry, model, is_whole=is_whole)


def _as_pattern(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    """Return the pattern that an entry of another form means, such as a glob; empty if it means none."""
    text = entry.removeprefix(PATTERN)
    is_glob = bool(_GLOB_SIGNS.search(text)) and any(fnmatch.fnmatchcase(name, text) for name in model.shapes)
    if is_glob and not text.strip("*./"):
        everything = PATTERN + ".*"
        return f"write {ALL_PRUNABLE} for the weights of all {model.prunable_layers}, or {everything!r} for everything"
    if entry.startswith(PATTERN):
        meant = _regex_of_glob(text) if is_glob else f".*{text}"
        why = "in a regular expression .* is any text" if is_glob else "a pattern is matched from the start of the name"
    elif is_glob:
        meant, why = _regex_of_glob(text), "a pattern is a regular expression and begins with re:"
    elif _PATTERN_SIGNS.search(text):
        meant, why = text, "a pattern begins with re:"
    else:
        return ""
    try:
        caught = [name for name in model.shapes if re.match(meant, name)]
    except re.error:
        return ""
    harmed = [] if is_whole else [name for name in caught if model.is_rarely_pruned(name)]
    if len(harmed) == len(caught):
        return ""
    write = f"{why}, so write {PATTERN + meant!r}"
    layer = text.rstrip("*?./")
    if harmed and layer in model.layers:
        return f"write {layer!r} for the weights of that layer without normalization and biases ({write} for all)"
    if harmed and model.prunable and set(model.prunable) <= set(caught):
        return f"write {ALL_PRUNABLE} for the weights of all {model.prunable_layers} ({write}, and exclude, for others)"
    return f"{write}, and exclude for {join_names(harmed)}" if harmed else write


def _regex_of_glob(text: str) -> str:
    signs = {"*": ".*", "?": "."}
    written = [
        part.replace("[!", "[^", 1) if part.startswith("[") else signs.get(part, re.escape(part))
        for part in re.split(r"(\*|\?|\[[^\]]+\])", text)
    ]
    return "".join(written).replace(r"\.", "[.]") + "$"


def _nearest(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    """Return the nearest names of weights that one prunes; of all weights if ``is_whole``."""
    text = entry.removeprefix(PATTERN).rstrip("./")
    usual = [name for name in model.shapes if is_whole or name in model.prunable]
    others = [name for name in model.shapes if name not in usual and not model.is_rarely_pruned(name)]
    names = get_close_matches(text, usual, n=3) or get_close_matches(text, others, n=3)
    names = names or get_close_matches(text, usual or others, n=3, cutoff=0.0)
    layers = [
        name for name, inside in model.layers.items() if is_whole or any(each in model.prunable for each in inside)
    ]
    near = get_close_matches(text, layers, n=2)
    hints = [
        *([f"the nearest names are {', '.join(names)}"] if names else []),
        *([f"the nearest layers are {', '.join(near)}"] if near else []),
    ]
    return "; ".join(hints) or f"the model has no prunable {model.kind}"
