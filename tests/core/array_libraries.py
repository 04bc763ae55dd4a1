"""The array libraries that the same tests run on, each with a device on which it works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mfac_core.backends import Array, Device, array_library, device_of, lookup, resolve_device
from mfac_core.backends.numpy_backend import NumpyBackend
from tests.core.strict_backend import NAMES as STRICT_NAMES
from tests.core.strict_backend import StrictBackend

NAMES = (
    "numpy:cpu",
    "array_api_strict:device1",
    "torch:cpu",
    pytest.param("cupy:cuda:0", marks=pytest.mark.gpu("cupy")),
    pytest.param("torch:cuda:0", marks=pytest.mark.gpu("torch")),
)


@dataclass(frozen=True)
class ArrayLibrary:
    """An array library on one of its devices.

    Args:
        device: The device.
    """

    device: Device

    @property
    def name(self) -> str:
        return self.device.backend.name

    @property
    def spelling(self) -> str:
        """The name of the device that means it, whatever the library of the weights."""
        return f"{self.name}:{self.device.name}"

    def array(self, x: Any) -> Array:
        """Return numbers as an array of their own on the device."""
        return self.device.asarray(np.array(x))

    def arrays(self, named: Mapping[str, Any]) -> dict[str, Array]:
        return {name: self.array(x) for name, x in named.items()}

    def numpy(self, x: Array) -> np.ndarray:
        """Return the numbers of an array, which must be on the device."""
        assert array_library(x) == self.name
        assert device_of(x) == self.device
        return np.array(self.device.to_numpy(x))


def array_library_named(name: str, monkeypatch: pytest.MonkeyPatch) -> ArrayLibrary:
    """Return the library and the device with this name; skip the test if it is not installed here."""
    first = name.partition(":")[0]
    if first == "torch":
        pytest.importorskip("torch")
        pytest.importorskip("mfac_torch")
    if first == "array_api_strict":
        speeds = dict.fromkeys(STRICT_NAMES, NumpyBackend().speed("cpu"))
        backend = StrictBackend(free_bytes=2**30, group_bytes=500, speeds=speeds)
        monkeypatch.setattr(lookup, "_registered", {**lookup._registered, backend.name: backend})
    return ArrayLibrary(resolve_device(name))
