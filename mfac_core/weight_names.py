"""Names of weights: which of them ``params`` and ``exclude`` mean, and how to write many on one line."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from mfac_core.errors import SettingError

__all__ = [
    "ALL",
    "ALL_PRUNABLE",
    "PATTERN",
    "Computed",
    "ModelNames",
    "excluded_names",
    "layers_of_names",
    "join_names",
    "matching_names",
    "names_of_shapes",
    "selected_names",
]

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"
PATTERN = "re:"

_GLOB_SIGNS = re.compile(r"[*?]|\[[^\]]+\]")
_PATTERN_SIGNS = re.compile(r"[*?+|()^$\[\]\\]")


@dataclass(frozen=True)
class Computed:
    """A weight of a layer that is no parameter, because the layer computes it from others.

    Args:
        by: What computes it, such as ``weight_norm``; empty where that is not known.
        shape: Its shape.
        keeps_zeros: Whether it is zero where what it is computed from is.
    """

    by: str
    shape: tuple[int, ...]
    keeps_zeros: bool = True


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """What has to be known of the weights of a model to read ``params`` and ``exclude``.

    Args:
        shapes: Every name of every weight -> its shape, in the order of the model.
        prunable: Names of the weights that ``__ALL_PRUNABLE__`` means, frozen ones too.
        layers: Name of each layer -> names of the weights in it, at any depth.
        normalization: Names of the weights of normalization layers.
        frozen: Names of the weights that are left out because they are not trained.
        packed: Names of weights that are like the prunable ones, and that ``__ALL_PRUNABLE__`` leaves out -> why.
        computed: Name that the weight of a prunable layer would have -> why it has none.
        first_names: Further name of a weight that has several -> its first one.
        kind: What a name names, for messages.
        frozen_because: How one sees that a weight is frozen, for messages.
        prunable_layers: Which layers the prunable weights belong to, for messages.

    Example:
        >>> names = ModelNames(shapes={"fc.weight": (2, 3)}, prunable=["fc.weight"], layers={"fc": ["fc.weight"]})
        >>> names.weights("fc.weight")
        6
    """

    shapes: Mapping[str, tuple[int, ...]]
    prunable: Collection[str] = ()
    layers: Mapping[str, Collection[str]] = field(default_factory=dict)
    normalization: Collection[str] = ()
    frozen: Collection[str] = ()
    packed: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Computed] = field(default_factory=dict)
    first_names: Mapping[str, str] = field(default_factory=dict)
    kind: str = "parameter"
    frozen_because: str = "requires_grad is False"
    prunable_layers: str = "Linear and convolution layers"

    def first(self, name: str) -> str:
        """Return the first name of a weight.

        Args:
            name: One of its names.

        Returns:
            The name that stands for the weight.
        """
        return self.first_names.get(name, name)

    def weights(self, name: str) -> int:
        """Return how many weights a name stands for.

        Args:
            name: The name of a weight, or of a computed one.

        Returns:
            Their number.
        """
        return math.prod(self.shapes[name] if name in self.shapes else self.computed[name].shape)

    def is_rarely_pruned(self, name: str) -> bool:
        """Return whether a weight is of the kind that harms a model when it is pruned, and saves nothing.

        Args:
            name: The name of a weight.

        Returns:
            Whether it belongs to a normalization layer, is a bias, or has one axis only, as scales have; never for what
            ``__ALL_PRUNABLE__`` means.
        """
        if name in self.prunable:
            return False
        own = re.split("[./]", name.partition("#")[0])[-1]
        is_bias = own == "bias" or own.startswith("bias_") or own.endswith("_bias")
        return name in self.normalization or is_bias or self.num_axes(name) < 2  # noqa: PLR2004

    def num_axes(self, name: str) -> int:
        """Return how many axes of a weight have more than one entry.

        Args:
            name: The name of a weight.

        Returns:
            Their number.
        """
        return sum(extent > 1 for extent in self.shapes[name])


def names_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ModelNames:
    """Return the names of a model of which only the shapes are known.

    Args:
        shapes: Name of each weight -> its shape.

    Returns:
        The names: all weights of two or more axes are prunable, and what stands before a dot or a slash is a layer.

    Example:
        >>> names_of_shapes({"body.fc.weight": (2, 3)}).layers
        {'body': ['body.fc.weight'], 'body.fc': ['body.fc.weight']}
    """
    prunable = [name for name, shape in shapes.items() if len(shape) > 1]
    return ModelNames(shapes=shapes, prunable=prunable, layers=layers_of_names(shapes))


def layers_of_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Return what stands before each dot or slash of names, as the names of layers.

    Args:
        names: Names of weights.

    Returns:
        Name of each layer -> names of the weights in it.

    Example:
        >>> layers_of_names(["body/fc/kernel"])
        {'body': ['body/fc/kernel'], 'body/fc': ['body/fc/kernel']}
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        for sign in re.finditer("[./]", name):
            layers.setdefault(name[: sign.start()], []).append(name)
    return layers


def selected_names(params: Sequence[str], exclude: Sequence[str], model: ModelNames) -> dict[str, list[str]]:
    """Return the weights that ``params`` selects and ``exclude`` does not take out.

    Args:
        params: Entries, each as in :func:`matching_names`.
        exclude: Entries of the same form; the name of a layer means all that is in it.
        model: The names of the model.

    Returns:
        The first name of each weight, in the order of the model -> the entries of ``params`` that select it.

    Raises:
        SettingError: If an entry matches nothing, a weight that is selected by its own name is frozen, or nothing is
            left.

    Example:
        >>> names = names_of_shapes({"conv.weight": (2, 3), "fc.weight": (4, 2), "fc.bias": (4,)})
        >>> selected_names(["__ALL_PRUNABLE__"], ["fc"], names)
        {'conv.weight': ['__ALL_PRUNABLE__']}
    """
    selected: dict[str, list[str]] = {}
    for entry, names in _matches("params", params, model):
        for name in dict.fromkeys(map(model.first, names)):
            selected.setdefault(name, []).append(entry)
    excluded = excluded_names(exclude, model)
    wanted = [name for name in dict.fromkeys(map(model.first, model.shapes)) if name in selected]
    left = [name for name in wanted if name not in excluded]
    frozen = set(map(model.first, model.frozen))
    _refuse_frozen_by_name([name for name in left if name in frozen], selected, model)
    chosen = [name for name in left if name not in frozen]
    if not chosen:
        if not left:
            all_of_it = f"every {model.kind} that params {list(params)} selects"
            raise SettingError("exclude", f"{list(exclude)} leaves nothing to prune: it takes out {all_of_it}")
        others = f", but for what exclude {list(exclude)} takes out" if len(left) < len(wanted) else ""
        raise SettingError(
            "params",
            f"{list(params)} leaves nothing to prune: every {model.kind} that it selects is frozen "
            f"({model.frozen_because}){others}",
        )
    return {name: selected[name] for name in chosen}


def excluded_names(exclude: Sequence[str], model: ModelNames) -> set[str]:
    """Return the weights that ``exclude`` means.

    Args:
        exclude: Entries, each as in :func:`matching_names`; the name of a layer means all that is in it.
        model: The names of the model.

    Returns:
        The first name of each weight, and the names of computed ones.

    Raises:
        SettingError: If an entry matches nothing.
    """
    return {model.first(name) for _, names in _matches("exclude", exclude, model) for name in names}


def matching_names(
    entry: str, model: ModelNames, *, setting: str = "params", whole_layers: bool = False, strict: bool = True
) -> list[str]:
    """Return the names that one entry of ``params`` or ``exclude`` matches.

    Args:
        entry: An exact name; the exact name of a layer, for its prunable weights; ``re:`` and a pattern, matched from
            the start of the name (``re.match``); ``__ALL__``; or ``__ALL_PRUNABLE__``.
        model: The names of the model.
        setting: The setting that the entry stands in, for the message. What ``exclude`` matches includes computed
            weights, and layers as a whole.
        whole_layers: Whether a layer's name means all that is in it.
        strict: Whether matching nothing is an error.

    Returns:
        The names, in the order of the model.

    Raises:
        SettingError: If a pattern is not a regular expression, or the entry matches nothing, and ``strict``.

    Example:
        >>> model = names_of_shapes({"conv1.weight": (2, 3), "fc.weight": (4, 2), "fc.bias": (4,)})
        >>> matching_names("re:conv", model), matching_names("fc", model)
        (['conv1.weight'], ['fc.weight'])
    """
    takes_out = setting == "exclude"
    every = [*model.shapes, *(model.computed if takes_out else ())]
    if entry == ALL:
        found = every
    elif entry == ALL_PRUNABLE:
        found = [name for name in every if name in model.prunable or name in model.computed]
    elif entry.startswith(PATTERN):
        pattern = _compiled(entry, setting)
        found = [name for name in every if pattern.match(name)]
    elif entry in every:
        found = [entry]
    else:
        inside = set(model.layers.get(entry, ()))
        if takes_out:
            inside |= {name for name in model.computed if name.startswith((f"{entry}.", f"{entry}/"))}
        elif not whole_layers:
            inside &= set(model.prunable)
        found = [name for name in every if name in inside]
    if not found and strict:
        raise SettingError(setting, _why_nothing(entry, model, is_whole=whole_layers or takes_out))
    return found


def join_names(names: Iterable[str], at_most: int = 5) -> str:
    """Return names for one line.

    Args:
        names: Names.
        at_most: How many to write out.

    Returns:
        The names with commas between, and how many more there are.

    Example:
        >>> join_names(["a", "b", "c", "d"], at_most=2)
        'a, b and 2 more'
    """
    every = list(names)
    more = f" and {len(every) - at_most} more" if len(every) > at_most else ""
    return ", ".join(every[:at_most]) + more


def _matches(setting: str, entries: Sequence[str], model: ModelNames) -> list[tuple[str, list[str]]]:
    """Return each entry with the names that it matches.

    Raises:
        SettingError: If some match nothing; the message names them all.
    """
    found, wrong = [], []
    for entry in dict.fromkeys(entries):
        try:
            found.append((entry, matching_names(entry, model, setting=setting)))
        except SettingError as error:
            wrong.append(error.message)
    if wrong:
        raise SettingError(setting, "; ".join(wrong))
    return found


def _refuse_frozen_by_name(frozen: Sequence[str], selected: Mapping[str, Sequence[str]], model: ModelNames) -> None:
    by_name = [name for name in frozen if any(entry in model.shapes for entry in selected[name])]
    if by_name:
        names, is_, it = (repr(by_name[0]), "is", "it") if len(by_name) == 1 else (join_names(by_name), "are", "them")
        raise SettingError(
            "params", f"{names} {is_} frozen ({model.frozen_because}); unfreeze {it}, or take {it} out of params"
        )


def _compiled(entry: str, setting: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix(PATTERN))
    except re.error as error:
        raise SettingError(setting, f"{entry!r} is not a regular expression: {error}") from error


def _why_nothing(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    """Return why an entry matches nothing, and what to write instead."""
    if entry in model.layers:
        inside = () if is_whole else model.layers[entry]
        usual = [name for name in inside if not model.is_rarely_pruned(name)]
        held = f"; it holds {join_names(usual)}, which you can write by name" if usual else ""
        if inside and not usual:
            held = (
                f"; it holds {join_names(inside)}, and to prune normalization weights, biases or scales harms the model"
            )
        return f"{entry!r} is a layer without weights of {model.prunable_layers}{_computed_inside(entry, model)}{held}"
    if entry in model.computed:
        return f"{entry!r} is no {model.kind}{_computed_inside(entry, model)}"
    return f"{entry!r} matches no {model.kind} of the model; {_suggestion(entry, model, is_whole=is_whole)}"


def _computed_inside(entry: str, model: ModelNames) -> str:
    by = {
        computed.by
        for name, computed in model.computed.items()
        if name == entry or name.startswith((f"{entry}.", f"{entry}/"))
    }
    if not by:
        return ""
    how = f" ({', '.join(sorted(by))})" if any(by) else ""
    return f", because its weight is computed from other {model.kind}s{how}; take that off before pruning"


def _suggestion(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    if entry not in (ALL, ALL_PRUNABLE) and f"__{entry.strip('_').upper()}__" in (ALL, ALL_PRUNABLE):
        return f"write {ALL_PRUNABLE} for the weights of all {model.prunable_layers}, or {ALL} for everything"
    if entry == ALL_PRUNABLE and model.shapes:
        own = f" ({', '.join(sorted(model.computed))})" if model.computed else ""
        is_computed = f"the weights of all its layers are computed from other {model.kind}s{own}"
        has_none = f"it has no {model.prunable_layers}, so name in params what is to be pruned"
        return is_computed if model.computed else has_none
    if not model.shapes:
        return f"the model has no {model.kind}s"
    return _as_pattern(entry, model, is_whole=is_whole) or _nearest(entry, model, is_whole=is_whole)


def _as_pattern(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    """Return how to write as a pattern what was written as one of another kind; empty where it was not."""
    text = entry.removeprefix(PATTERN)
    is_glob = bool(_GLOB_SIGNS.search(text)) and any(fnmatch.fnmatchcase(name, text) for name in model.shapes)
    if is_glob and not text.strip("*./"):
        everything = PATTERN + ".*"
        return f"write {ALL_PRUNABLE} for the weights of all {model.prunable_layers}, or {everything!r} for everything"
    if entry.startswith(PATTERN):
        meant = _of_glob(text) if is_glob else f".*{text}"
        why = "in a regular expression .* is any text" if is_glob else "a pattern is matched from the start of the name"
    elif is_glob:
        meant, why = _of_glob(text), "a pattern is a regular expression and begins with re:"
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


def _of_glob(text: str) -> str:
    parts = re.split(r"(\*|\?|\[[^\]]+\])", text)
    meant = {"*": ".*", "?": "."}
    sets = [part.replace("[!", "[^", 1) if part.startswith("[") else re.escape(part) for part in parts]
    written = [meant.get(part, each) for part, each in zip(parts, sets, strict=True)]
    return "".join(written).replace(r"\.", "[.]") + "$"


def _nearest(entry: str, model: ModelNames, *, is_whole: bool) -> str:
    """Return the nearest names: of what one prunes, unless the entry stands where anything is meant."""
    text = entry.removeprefix(PATTERN).rstrip("./")
    usual = [name for name in model.shapes if is_whole or name in model.prunable]
    others = [name for name in model.shapes if name not in usual and not model.is_rarely_pruned(name)]
    names = get_close_matches(text, usual, n=3) or get_close_matches(text, others, n=3)
    names = names or get_close_matches(text, usual or others, n=3, cutoff=0.0)
    layers = [
        name for name, inside in model.layers.items() if is_whole or any(each in model.prunable for each in inside)
    ]
    near = get_close_matches(text, layers, n=2)
    said = [
        *([f"the nearest names are {', '.join(names)}"] if names else []),
        *([f"the nearest layers are {', '.join(near)}"] if near else []),
    ]
    return "; ".join(said) or f"none of the {model.kind}s of the model is one to prune"
