"""Names of the weights of a model, and which of them ``params`` and ``exclude`` of a recipe mean."""

from mfac_core.weight_names.matching import excluded_names, matching_names, names_in_layers, selected_names
from mfac_core.weight_names.model import (
    ALL,
    ALL_PRUNABLE,
    PATTERN,
    Computed,
    ModelNames,
    join_names,
    layers_of_names,
    names_of_shapes,
)

__all__ = [
    "ALL",
    "ALL_PRUNABLE",
    "PATTERN",
    "Computed",
    "ModelNames",
    "excluded_names",
    "join_names",
    "layers_of_names",
    "matching_names",
    "names_in_layers",
    "names_of_shapes",
    "selected_names",
]
