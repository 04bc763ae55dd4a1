"""Export of a pruned model: masks as a file, and the formats of other tools.

Call these functions after ``manager.finalize()``. A pruned model is a dense model with zeros in it: no format makes it
faster or its file smaller, except :func:`to_semi_structured` on the GPUs that it names, and runtimes or compression
that make use of zeros.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from mfac_core.errors import DeviceError
from mfac_core.files import write_file
from mfac_torch.evaluation import training_flags_restored
from mfac_torch.selection import prunable_parameters, select_parameters, sparse_parameters
from mfac_torch.wrappers import unwrapped
from mfac_torch.zeros import HasMasks, Masks

__all__ = ["Masks", "export_onnx", "load_masks", "masks_of", "save_masks", "to_semi_structured", "to_torch_prune"]

_FORMAT = "mfac-masks-1"
_AMPERE = (8, 0)

_logger = logging.getLogger("mfac_torch")


def masks_of(model: nn.Module, params: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Return masks computed from the zeros of a pruned model.

    Args:
        model: The model.
        params: Which parameters, as in a recipe; ``None`` selects the parameters of ``__ALL_PRUNABLE__`` that contain a
            zero, and all others with at least two axes of which more than 10% are zero, but not everything. Name other
            parameters that were pruned, such as biases.

    Returns:
        The masks by parameter name, on the devices of the parameters; every weight that is zero counts as pruned.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.data = torch.tensor([[0.0, 3.0]])
        >>> masks_of(layer)
        {'weight': tensor([[False,  True]])}
    """
    if params is not None:
        parameters = select_parameters(model, params, frozen_too=True)
    else:
        found = prunable_parameters(model) | sparse_parameters(model)
        parameters = {name: parameter for name, parameter in unwrapped(model).named_parameters() if name in found}
    masks = {name: parameter.detach() != 0 for name, parameter in parameters.items()}
    return {name: mask for name, mask in masks.items() if params is not None or not bool(mask.all())}


def save_masks(source: HasMasks | nn.Module | Masks, path: str | os.PathLike[str]) -> None:
    """Save masks as a safetensors file: a boolean tensor per parameter, with the sparsity in the metadata.

    Args:
        source: A manager, masks, or a pruned model, whose masks :func:`masks_of` computes.
        path: The file to write.

    Raises:
        ValueError: If there are no masks.

    Example:
        >>> import tempfile
        >>> masks = {"weight": torch.tensor([[False, True]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(masks, f"{folder}/masks.safetensors")
        ...     load_masks(f"{folder}/masks.safetensors")
        {'weight': tensor([[False,  True]])}
    """
    from safetensors.torch import save

    masks = _masks_from(source)
    tensors = {name: mask.detach().to("cpu", torch.bool).contiguous() for name, mask in masks.items()}
    num_unpruned = sum(int(mask.sum()) for mask in tensors.values())
    sparsity = 1.0 - num_unpruned / sum(mask.numel() for mask in tensors.values())
    write_file(path, save(tensors, metadata={"format": _FORMAT, "sparsity": repr(sparsity)}))


def load_masks(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Load masks from a file that :func:`save_masks` wrote.

    Args:
        path: The file.

    Returns:
        The masks by parameter name, in host memory.

    Raises:
        ValueError: If the file is not a file of boolean masks, or is damaged.
        FileNotFoundError: If the file does not exist.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.data = torch.tensor([[0.0, 3.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_masks(layer, f"{folder}/masks.safetensors")
        ...     load_masks(f"{folder}/masks.safetensors")
        {'weight': tensor([[False,  True]])}
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            masks = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"{name} is not a file of masks, or is damaged ({error}); pass a file that save_masks() wrote"
        ) from error
    if found != _FORMAT:
        raise ValueError(
            f"{name} is not a file of masks: its format is {found!r} instead of {_FORMAT!r}; pass a file that "
            "save_masks() wrote"
        )
    for key, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} is broken: the mask of {key} is of {mask.dtype}, and masks are booleans")
    return masks


def to_torch_prune(model: nn.Module, masks: HasMasks | Masks) -> nn.Module:
    """Convert a model to the form of ``torch.nn.utils.prune``: ``weight_orig`` and ``weight_mask`` replace ``weight``.

    PyTorch itself then holds the masks while other tools train the model, and
    ``torch.nn.utils.prune.remove(module, "weight")`` makes it plain again. The model does not become faster: PyTorch
    multiplies by the mask before each evaluation.

    Args:
        model: The model, changed in place.
        masks: The masks, or the manager that holds them.

    Returns:
        The model itself.

    Raises:
        ValueError: If a mask does not fit the model, which then does not change.

    Example:
        >>> layer = to_torch_prune(nn.Linear(2, 1), {"weight": torch.tensor([[False, True]])})
        >>> sorted(layer.state_dict())
        ['bias', 'weight_mask', 'weight_orig']
    """
    checked = _masks_from(masks)
    owners = _owners(model)
    for name, mask in checked.items():
        shape = tuple(_parameter(model, name).shape)
        if tuple(mask.shape) != shape:
            raise ValueError(f"the mask of {name} has the shape {tuple(mask.shape)}, and the parameter has {shape}")
    masked = [
        (module, attribute, mask)
        for name, mask in checked.items()
        for module, attribute in owners[id(_parameter(model, name))]
    ]
    for module, attribute, mask in masked:
        parameter = getattr(module, attribute)
        prune.custom_from_mask(module, attribute, mask.to(parameter.device, parameter.dtype))
    return model


def to_semi_structured(model: nn.Module, params: Sequence[str] | None = None) -> nn.Module:
    """Compress 2:4 weights of ``Linear`` layers for the sparse tensor cores of NVIDIA GPUs.

    This needs a GPU of compute capability 8.0 (Ampere) or later and float16, bfloat16 or int8 weights; it halves the
    memory of these weights and speeds up large products at inference. Convolutions stay dense, because there are no
    kernels for them. Only the pattern 2:4 is supported.

    Args:
        model: The model, on its GPU and in its dtype for inference; changed in place.
        params: Names of weights, as in a recipe; ``None`` selects the weights of all ``Linear`` layers that contain a
            zero.

    Returns:
        The model itself.

    Raises:
        ValueError: If a weight does not belong to a ``Linear`` layer, does not have the 2:4 pattern, or has a shape or
            dtype without kernels. The model then does not change.
        DeviceError: If a weight is not on such a GPU. The model then does not change.

    Example:
        >>> model = to_semi_structured(model.half().cuda().eval())  # doctest: +SKIP
    """
    from torch.sparse import to_sparse_semi_structured

    owners = _owners(model)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    names = list(masks_of(model)) if params is None else list(select_parameters(model, params))
    weights = {name: _parameter(model, name) for name in names}
    if params is None:
        weights = {name: weight for name, weight in weights.items() if id(weight) in linear}
    if not weights:
        raise ValueError("no Linear layer of the model has a weight that is zero; prune it with mask_type 2:4 first")
    for name, weight in weights.items():
        if id(weight) not in linear:
            raise ValueError(f"{name} is not the weight of a Linear layer; 2:4 kernels exist only for these")
        _check_two_of_four(name, weight)
    for name, weight in weights.items():
        _check_sparse_units(name, weight)
    compressed = {name: _compressed(name, weight, to_sparse_semi_structured) for name, weight in weights.items()}
    for name, weight in weights.items():
        parameter = nn.Parameter(compressed[name], requires_grad=False)
        for module, attribute in owners[id(weight)]:
            setattr(module, attribute, parameter)
    return model


def export_onnx(model: nn.Module, args: tuple[Any, ...], path: str | os.PathLike[str], **options: Any) -> None:
    """Write a model as an ONNX file, with its zeros.

    The file is as large as that of the dense model, and common runtimes are no faster with it; runtimes that use
    unstructured sparsity find the zeros in the initializers. A warning names weights whose zeros are not in the file.

    Args:
        model: The model; it is exported in evaluation mode and does not change.
        args: Example inputs for ``model(*args)``.
        path: The file to write; weights of more than 2 GB go to files next to it.
        **options: Further arguments of ``torch.onnx.export``, such as ``dynamic_shapes`` or ``input_names``.

    Raises:
        ImportError: If ``onnx`` or ``onnxscript`` is missing.

    Example:
        >>> export_onnx(model, (torch.randn(1, 32),), "pruned.onnx")  # doctest: +SKIP
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'export_onnx needs onnx and onnxscript; install them with: pip install "mfac-core[onnx]"'
        ) from error
    with training_flags_restored(model):
        model.eval()
        program = torch.onnx.export(model, args, dynamo=True, **{"verbose": False, **options})
    assert program is not None  # torch returns a program with dynamo=True
    _warn_lost_zeros(model, program)
    program.save(path)


def _masks_from(source: HasMasks | nn.Module | Masks) -> Masks:
    if isinstance(source, nn.Module):
        masks: Masks = masks_of(source)
    elif isinstance(source, Mapping):
        masks = source
    else:
        masks = source.masks
    if not masks:
        raise ValueError("there are no masks: nothing was pruned yet, or the masks were released")
    return masks


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules and attributes of each parameter, by id; a tied parameter has several."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    return owners


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return unwrapped(model).get_parameter(name)
    except AttributeError as error:
        raise ValueError(f"the model has no parameter {name!r}; the masks belong to another model") from error


def _check_two_of_four(name: str, weight: torch.Tensor) -> None:
    rows, columns = weight.shape
    if columns % 4:
        raise ValueError(f"{name} has {columns} inputs, which is not a multiple of 4, so it cannot be 2:4")
    per_group = (weight.detach() != 0).reshape(rows, columns // 4, 4).sum(dim=2)
    if bool((per_group > 2).any()):
        row, group = (per_group > 2).nonzero()[0].tolist()
        raise ValueError(
            f"{name} is not 2:4: {int(per_group[row, group])} of the 4 weights [{row}, {4 * group}:{4 * group + 4}] "
            'are not zero; prune it with mask_type: "2:4", or list in params only layers that are'
        )


def _check_sparse_units(name: str, weight: torch.Tensor) -> None:
    needed = "2:4 kernels need an NVIDIA GPU of compute capability 8.0 (Ampere) or later"
    if weight.device.type != "cuda" or torch.version.cuda is None:
        raise DeviceError(f"{name} is on {weight.device}; {needed}. Move the model to one first")
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _AMPERE:
        raise DeviceError(
            f"{name} is on {weight.device}, of compute capability {capability[0]}.{capability[1]}; {needed}"
        )


def _compressed(name: str, weight: torch.Tensor, compress: Any) -> torch.Tensor:
    try:
        compressed: torch.Tensor = compress(weight.detach().contiguous())
    except RuntimeError as error:
        raise ValueError(f"{name} ({weight.dtype}, {tuple(weight.shape)}) cannot be stored as 2:4: {error}") from error
    return compressed


def _warn_lost_zeros(model: nn.Module, program: Any) -> None:
    values = program.model.graph.initializers
    zeros = {name: _zeros(value) for name, value in values.items()}
    for name, mask in masks_of(model).items():
        pruned = int((~mask).sum())
        # The exporter renames a weight that it transposes: any weight of the same size may be the one.
        same = [name] if name in zeros else [other for other in zeros if values[other].const_value.size == mask.numel()]
        found = max((zeros[other] for other in same), default=0)
        if found < pruned:
            _logger.warning(
                "%s has %d zeros, but the ONNX file has %d of them: the model does not use this weight directly, or "
                "the exporter folded it into another (optimize=False prevents that)",
                name,
                pruned,
                found,
            )


def _zeros(value: Any) -> int:
    array = value.const_value.numpy()
    return int(array.size - np.count_nonzero(array))
