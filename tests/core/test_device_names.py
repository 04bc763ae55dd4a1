"""Devices by name: whose device a plain name means, and what is said of one that does not exist."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mfac_core import DeviceError, MFACPruner, MFACSettings, make_pruner
from mfac_core.backends import Device, device_of, lookup, register, resolve_device, resolve_devices
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.pruners.memory import choose_window_device
from mfac_core.session.live_pruning import LivePruning
from tests.core.strict_backend import StrictBackend


class Library(NumpyBackend):
    """A library whose devices have these names; its arrays never matter."""

    def __init__(self, name, *devices):
        self.name = name
        self._devices = devices

    def devices(self):
        return self._devices


CUPY = Library("cupy", "cuda:0", "cuda:1")
TENSORS = Library("tensors", "cpu", "cuda:0", "mps")
OTHERS = Library("others", "npu:0", "npu:1")


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that sets what is installed on this machine."""

    def has(*, cupy=False, registered=()):
        monkeypatch.setattr(lookup, "_has_cupy", lambda: cupy)
        monkeypatch.setattr(lookup, "_cupy_backend", lambda: CUPY)
        monkeypatch.setattr(lookup, "_registered", {backend.name: backend for backend in registered})

    has()
    return has


@pytest.mark.parametrize(
    "name, library, found",
    [
        ("cpu", None, "numpy:cpu"),
        ("cpu", "tensors", "numpy:cpu"),
        ("tensors:cpu", None, "tensors:cpu"),
        ("numpy:cpu", "tensors", "numpy:cpu"),
        ("cuda:0", None, "cupy:cuda:0"),
        ("cuda:0", "numpy", "cupy:cuda:0"),
        ("cuda:0", "tensors", "tensors:cuda:0"),
        ("cuda", "tensors", "tensors:cuda:0"),
        ("cuda", None, "cupy:cuda:0"),
        ("cuda:1", "tensors", "cupy:cuda:1"),
        ("cupy:cuda:0", "tensors", "cupy:cuda:0"),
        ("tensors:cuda:0", "numpy", "tensors:cuda:0"),
        ("tensors:cuda", "numpy", "tensors:cuda:0"),
        ("mps", None, "tensors:mps"),
        ("npu:1", "tensors", "others:npu:1"),
        ("npu", "no library", "others:npu:0"),
    ],
)
def test_a_name_means_a_device_of_the_library_of_the_weights_first(machine, name, library, found):
    machine(cupy=True, registered=[TENSORS, OTHERS])
    device = resolve_device(name, library)
    assert f"{device.backend.name}:{device.name}" == found
    assert resolve_devices([name], library) == (device,)
    assert resolve_device(device, "numpy") is device


@pytest.mark.parametrize("names", [["cuda:0", "cupy:cuda:0"], ["tensors:cuda:0", "cupy:cuda"], ["cpu", "tensors:cpu"]])
def test_a_device_may_be_named_once_whatever_the_library(machine, names):
    machine(cupy=True, registered=[TENSORS])
    with pytest.raises(DeviceError, match="names a device twice") as caught:
        resolve_devices(names)
    assert str(names) in str(caught.value)


@pytest.mark.parametrize(
    "name, cupy, registered, message",
    [
        # neither
        (
            "cuda:0",
            False,
            [],
            r"'cuda:0' does not exist here; the devices are cpu; NumPy arrays .* need CuPy on a GPU: pip",
        ),
        ("cuda", False, [], r"'cuda' does not exist here; the devices are cpu; .* need CuPy on a GPU: pip install"),
        (
            "cupy:cuda:0",
            False,
            [],
            r"'cupy:cuda:0' needs cupy, which is not installed; .* pip install .*mfac-core\[cuda",
        ),
        ("tensors:cuda:0", False, [], r"'tensors:cuda:0' does not exist here; the devices are cpu$"),
        ("mps", False, [], r"'mps' does not exist here; the devices are cpu$"),
        ("", False, [], r"'' does not exist here; the devices are cpu$"),
        # tensors without CuPy
        ("cuda:1", False, [TENSORS], r"devices are cpu, tensors:cpu, tensors:cuda:0, tensors:mps; NumPy arrays"),
        ("tensors:cuda:1", False, [TENSORS], r"the devices are tensors:cpu, tensors:cuda:0, tensors:mps$"),
        ("cupy:cuda:0", False, [TENSORS], r"needs cupy, which is not installed"),
        # CuPy without tensors
        ("cuda:2", True, [], r"'cuda:2' does not exist here; the devices are cpu, cupy:cuda:0, cupy:cuda:1$"),
        ("cupy:cuda:2", True, [], r"'cupy:cuda:2' does not exist here; the devices are cupy:cuda:0, cupy:cuda:1$"),
    ],
)
def test_a_device_that_does_not_exist_is_refused_with_those_that_do(machine, name, cupy, registered, message):
    machine(cupy=cupy, registered=registered)
    with pytest.raises(DeviceError, match=message):
        resolve_device(name)


def test_the_library_of_the_weights_is_listed_once_and_cupy_is_no_cure_for_it(machine):
    machine(registered=[TENSORS])
    with pytest.raises(DeviceError, match="devices are tensors:cpu, tensors:cuda:0, tensors:mps, cpu$"):
        resolve_device("cuda:7", "tensors")


def test_tensors_find_their_gpu_without_cupy(machine):
    machine(registered=[TENSORS])
    assert resolve_device("cuda:0", "tensors").backend is TENSORS
    assert resolve_device("cuda:0").backend is TENSORS


def test_the_backends_of_numpy_and_cupy_are_built_in():
    for name in ("numpy", "cupy"):
        with pytest.raises(ValueError, match=f"the backend for {name} arrays is built in"):
            register(Library(name))


def test_a_second_backend_for_a_library_replaces_the_first(machine):
    for backend in (Library("tensors", "old:0"), Library("tensors", "new:0")):
        register(backend)
        assert resolve_device(backend.devices()[0]).backend is backend
    with pytest.raises(DeviceError, match=r"the devices are cpu, tensors:new:0$"):
        resolve_device("old:0")


# --- packages that register a backend when they are imported


@pytest.fixture
def installed(machine, monkeypatch):
    """Returns a function that installs a package with an entry point for a library; ``load`` imports it."""

    def install(library, load):
        entry = SimpleNamespace(name=library, load=load)
        monkeypatch.setattr(lookup, "entry_points", lambda group, name=library: [entry] if name == library else [])
        lookup._import_package_for.cache_clear()

    yield install
    lookup._import_package_for.cache_clear()


def test_a_library_that_is_named_or_whose_array_arrives_is_imported(installed):
    imported = []

    def load():
        imported.append(None)
        register(StrictBackend())

    x = pytest.importorskip("array_api_strict").zeros(2)
    installed("array_api_strict", load)
    assert device_of(x).name == "CPU_DEVICE"
    assert resolve_device("array_api_strict:device1").name == "device1"
    assert len(imported) == 1


def test_plain_names_import_nothing_unless_all_are_asked_for(installed):
    installed("tensors", lambda: register(TENSORS))
    with pytest.raises(DeviceError, match="the devices are cpu;"):
        resolve_device("cuda:0")
    lookup.load_backends()
    assert resolve_device("cuda:0").backend is TENSORS


def test_a_library_that_is_not_installed_is_named(installed):
    def load():
        raise ModuleNotFoundError("No module named 'tensors'", name="tensors")

    installed("tensors", load)
    lookup.load_backends()
    with pytest.raises(
        DeviceError, match="'tensors:cuda:0' needs tensors, which is not installed; pip install tensors"
    ):
        resolve_device("tensors:cuda:0")


def test_a_package_that_cannot_be_imported_for_another_reason_says_so(installed):
    def load():
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

    installed("tensors", load)
    with pytest.raises(ModuleNotFoundError, match="safetensors"):
        resolve_device("tensors:cuda:0")


@pytest.mark.parametrize(
    "x, message",
    [
        ([1.0], "builtins.list is not an array; convert it first, such as with numpy.asarray"),
        ({"a": np.zeros(2)}, "builtins.dict is not an array"),
        (3.0, "builtins.float is not an array"),
        (None, "NoneType is not an array"),
    ],
)
def test_what_is_not_an_array_has_no_device(x, message):
    with pytest.raises(TypeError, match=message):
        device_of(x)


def test_an_array_of_a_library_without_a_backend_is_refused_by_name(machine):
    x = pytest.importorskip("array_api_strict").zeros(2)
    with pytest.raises(TypeError, match="is an array of array_api_strict, for which no backend is registered; convert"):
        device_of(x)


# --- the library of the weights in a run

WEIGHTS = {"w": np.ones(10, np.float32)}
SETTINGS = MFACSettings(final_sparsity=0.5, end_epoch=1, num_gradients=4, devices=("cuda:0",))


def test_a_pruner_takes_the_devices_of_the_library_that_it_is_told(machine):
    machine(cupy=True, registered=[TENSORS])
    for library, backend in [(None, CUPY), ("numpy", CUPY), ("tensors", TENSORS)]:
        for pruner in (
            MFACPruner(SETTINGS, WEIGHTS, steps_per_epoch=1, library=library),
            make_pruner(SETTINGS, WEIGHTS, steps_per_epoch=1, library=library),
        ):
            assert pruner._devices == (Device(backend, "cuda:0"),)


def test_the_window_is_on_a_device_of_the_same_library(machine):
    machine(cupy=True, registered=[TENSORS])
    assert choose_window_device("cuda:0", (), 1, "tensors").backend is TENSORS
    assert choose_window_device("cuda:0", (), 1).backend is CUPY
    assert choose_window_device("cpu", (), 1, "tensors").is_host


@pytest.mark.parametrize("library, backend", [(None, CUPY), ("tensors", TENSORS)])
def test_a_framework_names_its_library(machine, library, backend):
    machine(cupy=True, registered=[TENSORS])

    class Pruning(LivePruning):
        def weights(self):
            return WEIGHTS

        def write(self, weights): ...

        def snapshot(self, undo): ...

    Pruning.library = library
    pruning = Pruning(SETTINGS, {"w": 10}, steps_per_epoch=1)
    assert pruning._pruner._devices == (Device(backend, "cuda:0"),)
