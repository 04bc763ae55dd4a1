"""A device without float64: float32 stays there, and a group that needs float64 is computed on the host."""

from __future__ import annotations

import array_api_strict as xp
import numpy as np
import pytest
from array_api_strict._array_object import Array

import mfac_core
from mfac_core.fisher import blockwise, kernels
from mfac_core.fisher.matrix import GradientMatrix
from mfac_core.pruners.step import mfac_step
from tests.core.strict_backend import StrictBackend, strict_devices

M, B, BLOCKS = 12, 30, 4


@pytest.fixture
def device(monkeypatch):
    """Return a device on which every float64 array is refused."""
    original = Array._new.__func__

    def refusing(cls, x, device=None):
        if np.asarray(x).dtype == np.float64 and device is not None and device != xp.Device("CPU_DEVICE"):
            raise TypeError("this device has no float64")
        return original(cls, x, device)

    monkeypatch.setattr(Array, "_new", classmethod(refusing))
    narrow = kernels.Kernels(wide_dtype=lambda x: xp.float32)
    monkeypatch.setitem(kernels._LIBRARIES, "array_api_strict", lambda: narrow)
    kernels._load.cache_clear()
    yield strict_devices(2, StrictBackend(group_bytes=1))[1]
    kernels._load.cache_clear()


def rows_of(needing):
    """Return gradients of which some blocks need float64."""
    rows = np.random.default_rng(0).standard_normal((M, BLOCKS * B)).astype(np.float32)
    for block in needing:
        columns = slice(block * B, (block + 1) * B)
        rows[:, columns] = 10 * rows[:1, columns] + 1e-2 * rows[:, columns]
    return rows


def step(devices, rows, value, update):
    weights = np.random.default_rng(1).standard_normal(rows.shape[1]).astype(np.float32)
    source = GradientMatrix([rows], block_size=B)

    def select(saliencies):
        values = np.asarray(saliencies) if isinstance(saliencies, np.ndarray) else devices.to_numpy(saliencies)
        chosen = values < np.median(values)
        return chosen if isinstance(saliencies, np.ndarray) else devices.asarray(chosen)

    return mfac_step(weights, source, select, damping=value, update=update, devices=devices)


def test_the_device_refuses_float64(device):
    with pytest.raises(TypeError, match="no float64"):
        device.zeros((2,), np.float64)


@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("value", [1e-4, "auto"])
@pytest.mark.parametrize("needing", [(), (1,), (0, 3)])
def test_a_pruning_step_equals_that_on_the_host(device, needing, value, update, caplog):
    rows = rows_of(needing)
    with caplog.at_level("INFO", logger="mfac_core"):
        found = step(device, rows, value, update)
    wanted = step(strict_devices(1)[0], rows.astype(np.float64), value, update)
    assert (found.newly_pruned == wanted.newly_pruned).mean() > 0.98
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=0, atol=5e-3 * np.abs(wanted.weights).max())
    assert found.predicted_loss_increase == pytest.approx(wanted.predicted_loss_increase, rel=1e-3)
    said = [record for record in caplog.records if "has no float64" in record.message]
    if update == "independent":  # the joint update asks for more digits
        assert len(said) == bool(needing and value != "auto")


def test_only_groups_that_need_float64_are_computed_on_the_host(device, monkeypatch):
    seen = []
    original = blockwise.evaluate

    def spying(chunks, *arguments):
        seen.append(type(chunks[0]))
        return original(chunks, *arguments)

    monkeypatch.setattr(blockwise, "evaluate", spying)
    step(device, rows_of((1,)), 1e-4, "independent")
    assert seen.count(np.ndarray) == 1 and seen.count(Array) == BLOCKS


@pytest.mark.parametrize("rtol", [1e-3, 1e-5])
def test_the_diagonal_keeps_its_promise(device, rtol):
    rows = rows_of((1, 2))
    found = mfac_core.inverse_fisher(rows, block_size=B, damping=1e-4, devices=device, rtol=rtol).diagonal()
    wanted = mfac_core.inverse_fisher(rows.astype(np.float64), block_size=B, damping=1e-4).diagonal()
    np.testing.assert_allclose(found, wanted, rtol=rtol)


def test_damping_auto_is_measured_on_the_host_if_float32_cannot_hold_the_squares(device):
    rows = 1e-22 * rows_of(())
    found = mfac_core.inverse_fisher(rows, block_size=B, damping="auto", devices=device)._fisher.damping_range
    assert found == pytest.approx(mfac_core.inverse_fisher(rows, block_size=B, damping="auto")._fisher.damping_range)
