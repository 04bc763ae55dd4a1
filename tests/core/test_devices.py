from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

import mfac_core
from mfac_core.backends import Backend, Device, base, numpy_backend, resolve_devices
from mfac_core.backends.numpy_backend import NumpyBackend
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.obs import independent_update, joint_update
from mfac_core.fisher.window import GradientWindow
from tests import reference
from tests.core.strict_backend import NAMES, StrictBackend, strict_devices

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
COUNTS = pytest.mark.parametrize("count", [1, 2, 3])
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-11}


def make_gradients(m=6, d=50, dtype=np.float64) -> np.ndarray:
    return np.random.default_rng(m).standard_normal((m, d)).astype(dtype)


@DTYPES
@COUNTS
@pytest.mark.parametrize(
    "m, d, block_size", [(6, 50, 8), (20, 50, 8), (6, 50, None), (80, 50, None), (3, 5, 1), (90, 400, 130)]
)
def test_virtual_devices_equal_the_cpu(m, d, block_size, count, dtype):
    gradients, x = make_gradients(m, d, dtype), np.linspace(-1, 2, d).astype(dtype)
    here = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=1e-2)
    there = mfac_core.inverse_fisher(gradients, block_size=block_size, damping=1e-2, devices=strict_devices(count))
    assert isinstance(there.diagonal(), np.ndarray) and there.diagonal().dtype == dtype
    np.testing.assert_allclose(there.diagonal(), here.diagonal(), rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(
        there.apply(x), here.apply(x), rtol=0, atol=TOLERANCE[dtype] * np.abs(here.apply(x)).max()
    )


@DTYPES
def test_a_block_that_needs_float64_equals_the_cpu(dtype):
    gradients = make_gradients(6, 40, dtype)
    gradients[:, [3, 4, 20]] *= 1e4
    here = mfac_core.inverse_fisher(gradients, block_size=10, damping=1e-4).diagonal()
    there = mfac_core.inverse_fisher(gradients, block_size=10, damping=1e-4, devices=strict_devices(2)).diagonal()
    np.testing.assert_allclose(there, here, rtol=1e-4 if dtype is np.float32 else 1e-6)
    exact = np.diag(reference.exact_inverse(gradients, 1e-4, 10))
    np.testing.assert_allclose(there, exact, rtol=1e-4 if dtype is np.float32 else 1e-6)


@DTYPES
@COUNTS
@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("m, block_size", [(6, 8), (20, 8), (6, None)])
def test_pruning_on_virtual_devices_equals_the_cpu(m, block_size, update, count, dtype):
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((5, 7)).astype(dtype), "b": rng.standard_normal(15).astype(dtype)}
    masks = {"a": rng.random((5, 7)) > 0.2, "b": np.ones(15, bool)}
    options = dict(sparsity=0.6, masks=masks, block_size=block_size, damping=1e-2, update=update, scope="global")
    here = mfac_core.prune(weights, make_gradients(m, 50, dtype), **options)
    there = mfac_core.prune(weights, make_gradients(m, 50, dtype), **options, devices=strict_devices(count))
    for name in weights:
        np.testing.assert_array_equal(there.masks[name], here.masks[name])
        assert there.weights[name].dtype == dtype
        np.testing.assert_allclose(there.weights[name], here.weights[name], rtol=0, atol=4 * TOLERANCE[dtype])
    assert there.predicted_loss_increase == pytest.approx(here.predicted_loss_increase, rel=100 * TOLERANCE[dtype])


@COUNTS
def test_blocks_are_assigned_to_all_devices(count):
    backend = StrictBackend()
    gradients = make_gradients(4, 60)
    mfac_core.inverse_fisher(gradients, block_size=5, damping=1e-2, devices=strict_devices(count, backend)).diagonal()
    blocks = {
        name: [shape for device, shape in backend.uploads if device == name and len(shape) == 3] for name in NAMES
    }
    assert {name: len(shapes) for name, shapes in blocks.items() if shapes} == dict.fromkeys(NAMES[:count], 12 // count)
    assert all(shape == (1, 4, 5) for shapes in blocks.values() for shape in shapes)


@pytest.mark.parametrize("update", ["independent", "joint"])
def test_every_device_works_in_a_pruning_step_and_only_with_blocks(update):
    backend = StrictBackend()
    gradients = make_gradients(4, 60)
    mfac_core.prune(
        np.arange(1.0, 61.0), gradients, sparsity=0.99, block_size=5, damping=1e-2, update=update,
        num_recomputations=1, devices=strict_devices(3, backend),
    )  # fmt: skip
    blocks = [(device, shape) for device, shape in backend.uploads if len(shape) == 3]
    assert {device for device, _ in blocks} == set(NAMES)
    assert {shape for _, shape in blocks} == {(1, 4, 5)}
    assert max(int(np.prod(shape)) for _, shape in backend.uploads) <= 60  # nothing larger than a vector of weights


def test_cpu_and_virtual_devices_work_together():
    gradients = make_gradients(4, 60)
    backend = StrictBackend(speeds=dict.fromkeys(NAMES, NumpyBackend().speed("cpu")))
    mixed = (*resolve_devices("cpu"), *strict_devices(2, backend))
    here = mfac_core.inverse_fisher(gradients, block_size=5, damping=1e-2).diagonal()
    there = mfac_core.inverse_fisher(gradients, block_size=5, damping=1e-2, devices=mixed).diagonal()
    np.testing.assert_allclose(there, here, rtol=1e-12)
    assert len(backend.uploads) == 8


def test_a_window_on_a_virtual_device_is_pruned_there_and_elsewhere():
    rows, weights = make_gradients(6, 40, np.float32), np.linspace(1, 2, 40, dtype=np.float32)
    pruned = np.arange(40) % 3 == 0
    inverse = reference.dense_inverse(rows, 1e-2, 8)
    backend = StrictBackend()
    for devices in (strict_devices(1, backend), strict_devices(3, backend)):
        window = GradientWindow(40, 6, block_size=8, device=Device(backend, "device1"))
        for row in rows:
            window.push(row)
        fisher = BlockwiseFisher(window, damping=1e-2, devices=devices)
        home, back = fisher.home.asarray, backend.to_numpy
        diagonal = fisher.diagonal()
        np.testing.assert_allclose(back(diagonal), np.diag(inverse), rtol=1e-4)
        independent = back(independent_update(fisher, home(weights), home(pruned), diagonal)[0])
        joint = back(joint_update(fisher, home(weights), home(pruned))[0])
        expected = reference.independent_update(weights, inverse, pruned)
        np.testing.assert_allclose(independent, expected, rtol=0, atol=1e-4 * np.max(np.abs(expected)))
        expected = reference.joint_update(weights, inverse, pruned)
        np.testing.assert_allclose(joint, expected, rtol=0, atol=1e-4 * np.max(np.abs(expected)))


def test_a_device_without_room_for_one_block_is_refused_by_name():
    with pytest.raises(mfac_core.MemoryBudgetError, match="CPU_DEVICE"):
        mfac_core.inverse_fisher(
            make_gradients(), block_size=8, devices=strict_devices(1, StrictBackend(100))
        ).diagonal()


def test_rows_that_are_not_finite_are_refused_on_virtual_devices():
    gradients = make_gradients(6, 50)
    gradients[3, 44] = np.nan
    with pytest.raises(ValueError, match=r"(?s)row.*\b3\b"):
        mfac_core.inverse_fisher(gradients, block_size=8, devices=strict_devices(3)).diagonal()


def test_a_failure_on_one_device_reaches_the_caller():
    class Failing(StrictBackend):
        def asarray(self, x, device, dtype=None):
            if device == "device1":
                raise RuntimeError("device1 fell off the bus")
            return super().asarray(x, device, dtype)

    with pytest.raises(RuntimeError, match="fell off"):
        mfac_core.inverse_fisher(make_gradients(), block_size=5, devices=strict_devices(3, Failing())).diagonal()


def test_a_device_named_twice_is_refused():
    with pytest.raises(mfac_core.DeviceError, match="twice"):
        mfac_core.inverse_fisher(make_gradients(), devices=("cpu", "cpu")).diagonal()


CONTRACT = {name: member for name, member in vars(Backend).items() if inspect.isfunction(member) and name[0] != "_"}


def test_the_contract_is_not_empty():
    assert {"asarray", "devices", "to_numpy", "free_bytes"} <= set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("implementation", [NumpyBackend, StrictBackend])
def test_each_backend_has_the_contracts_methods_with_their_arguments(implementation, name):
    wanted, found = inspect.signature(CONTRACT[name]), inspect.signature(getattr(implementation, name))
    assert list(found.parameters) == list(wanted.parameters)
    assert [p.default for p in found.parameters.values()] == [p.default for p in wanted.parameters.values()]
    assert isinstance(implementation.name, str)


def test_the_cupy_backend_has_the_contracts_methods_with_their_arguments():
    # Read as text: importing it needs CuPy.
    source = Path(base.__file__).with_name("cupy_backend.py").read_text(encoding="utf-8")
    (cupy,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "CupyBackend")
    methods = {node.name: node.args for node in cupy.body if isinstance(node, ast.FunctionDef)}
    names = [target.id for node in cupy.body if isinstance(node, ast.Assign) for target in node.targets]
    assert "name" in names
    for name, member in CONTRACT.items():
        parameters = inspect.signature(member).parameters
        assert [argument.arg for argument in methods[name].args] == list(parameters)
        defaults = [p.default for p in parameters.values() if p.default is not inspect.Parameter.empty]
        assert [ast.literal_eval(default) for default in methods[name].defaults] == defaults


@pytest.mark.parametrize(
    "system, group, free", [(500, 300, 300), (200, 300, 200), (200, None, 200), (None, None, None)]
)
def test_free_host_memory_is_what_the_system_and_the_control_group_both_have(system, group, free, monkeypatch):
    monkeypatch.setattr(numpy_backend, "_system_free_bytes", lambda: system)
    monkeypatch.setattr(numpy_backend, "_control_group_free_bytes", lambda: group)
    assert NumpyBackend().free_bytes("cpu") == free


@pytest.mark.parametrize("limit, used, free", [("1000\n", "300\n", 700), ("1000", "1300", 0), ("max", "300", None)])
def test_a_control_group_has_its_limit_less_what_is_used(limit, used, free, monkeypatch, tmp_path):
    monkeypatch.setattr(numpy_backend, "Path", lambda _: tmp_path)
    assert numpy_backend._control_group_free_bytes() is None
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    assert numpy_backend._control_group_free_bytes() == free


def test_groups_in_host_memory_stay_small_however_much_there_is(monkeypatch):
    monkeypatch.setattr(numpy_backend, "_cores", lambda: 4)
    sizes = [NumpyBackend().group_bytes("cpu", total) for total in (0, 1600, 2**50)]
    assert sizes == [1, 100, numpy_backend.GROUP_BYTES]


def test_a_device_may_load_groups_ahead_of_the_one_that_is_worked_on():
    class Eager(StrictBackend):
        def stream(self, device, loaders):
            yield from list(super().stream(device, loaders))

    gradients = make_gradients(4, 60)
    here = mfac_core.inverse_fisher(gradients, block_size=5, damping=1e-2).diagonal()
    there = mfac_core.inverse_fisher(gradients, block_size=5, damping=1e-2, devices=strict_devices(2, Eager()))
    np.testing.assert_allclose(there.diagonal(), here, rtol=1e-12)
