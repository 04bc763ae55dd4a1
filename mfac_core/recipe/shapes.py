"""Names and shapes of a model's parameters, from a file, and what ``params`` and ``exclude`` select of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence

from mfac_core.left_out import selection_warnings
from mfac_core.weight_names import ALL_PRUNABLE, join_names, names_of_shapes, selected_names

__all__ = ["match_shapes", "parse_shapes", "read_shapes"]

_MAX_HEADER_BYTES = 100_000_000
_MAX_AXIS_LENGTH = 2**63 - 1
# Layers store these in addition to their parameters; they are never pruned.
_BUFFERS = frozenset(
    {
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "moving_mean",
        "moving_variance",
        "position_ids",
        "token_type_ids",
        "inv_freq",
    }
)
_FLOATS = ("F", "BF", "C")
_OF_A_LAYER = re.compile(r"(weight|(depthwise_|pointwise_)?kernel)(:0)?")
_EMBEDDING = re.compile(r"embed|(^|[._/])(wte|wpe|emb)([._/]|$)|lookup_table", re.IGNORECASE)


def read_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of a model's parameters.

    Args:
        path: A JSON file that maps names to shapes, such as ``{"fc.weight": [10, 84]}``, or a ``.safetensors`` file, of
            which only the header is read.

    Returns:
        Name of each parameter -> its shape; without buffers, such as the running statistics of normalization.

    Raises:
        ValueError: If the file contains anything else.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        size = int.from_bytes(file.read(8), "little") if name.endswith(".safetensors") else None
        if size is not None and size > _MAX_HEADER_BYTES:
            raise ValueError(f"{name}: this is not a safetensors file")
        content = file.read() if size is None else file.read(size)
    return parse_shapes(content, name, is_safetensors=size is not None)


def parse_shapes(content: bytes, source: str, *, is_safetensors: bool = False) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's parameters from JSON: a mapping, or the header of a safetensors file.

    Example:
        >>> parse_shapes(b'{"fc.weight": [10, 84]}', "model.json")
        {'fc.weight': (10, 84)}
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: this is neither JSON nor a safetensors file ({error})") from error
    if not isinstance(found, Mapping):
        raise ValueError(f'{source}: this must map names to shapes, such as {{"fc.weight": [10, 84]}}')
    if is_safetensors:
        entries = {key: entry for key, entry in found.items() if key != "__metadata__"}
        found = {key: entry.get("shape") if isinstance(entry, Mapping) else entry for key, entry in entries.items()}
        found = {key: shape for key, shape in found.items() if not _is_shape(shape) or _is_float(entries[key])}
    for key, shape in found.items():
        if not _is_shape(shape):
            raise ValueError(f"{source}: {key}: {shape!r} is not a shape; write a list of lengths, such as [10, 84]")
    return {key: tuple(shape) for key, shape in found.items() if _last_part(key) not in _BUFFERS}


def match_shapes(
    params: Sequence[str], exclude: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, int], list[str]]:
    """Return the parameters that ``params`` selects and ``exclude`` does not remove, and warnings about them.

    Layers are not known here, so ``__ALL_PRUNABLE__`` means every parameter of two or more dimensions.

    Args:
        params: Exact names, names of layers, ``re:`` patterns, ``__ALL__`` or ``__ALL_PRUNABLE__``.
        exclude: Entries of the same form.
        shapes: Name of each parameter -> its shape.

    Returns:
        Name of each selected parameter -> number of its weights, in the order of ``shapes``; one line per warning.

    Raises:
        SettingError: If a pattern is not a regular expression, entries match nothing, or nothing is left.

    Example:
        >>> match_shapes(["fc"], [], {"fc.weight": (10, 84), "fc.bias": (10,), "conv.weight": (6, 3, 5, 5)})
        ({'fc.weight': 840}, [])
    """
    model = names_of_shapes(shapes)
    selected = selected_names(params, exclude, model)
    warnings = selection_warnings(params, exclude, model, selected)
    uncertain = [
        name for name, entries in selected.items() if ALL_PRUNABLE in entries and not _looks_like_a_layer(name)
    ]
    if uncertain:
        warnings.append(
            f"{ALL_PRUNABLE} counts {join_names(uncertain)} here, by the number of dimensions, but in a model it means "
            "only the weights of linear and convolution layers, so less may be pruned than this plan shows; "
            "embeddings, recurrent weights and the like are pruned only if params names them"
        )
    return {name: model.weights(name) for name in selected}, warnings


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(length) is int and 0 <= length <= _MAX_AXIS_LENGTH for length in shape)


def _is_float(entry: object) -> bool:
    return not isinstance(entry, Mapping) or str(entry.get("dtype", "F32")).startswith(_FLOATS)


def _last_part(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _looks_like_a_layer(name: str) -> bool:
    return _OF_A_LAYER.fullmatch(_last_part(name)) is not None and _EMBEDDING.search(name) is None
