"""The same kernels on CUDA devices through CuPy, against NumPy and the dense oracle."""

import numpy as np
import pytest

import mfac_core
from mfac_core.backends import resolve_device
from mfac_core.gradient_window import GradientWindow

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")


def problem(m, d, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, d)).astype(dtype), rng.standard_normal(d).astype(dtype)


@pytest.mark.parametrize(("m", "d", "block_size"), [(1, 7, 3), (16, 100, 30), (200, 300, 128), (64, 5000, None)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-9)])
def test_the_inverse_fisher_on_cuda_equals_the_one_on_the_cpu(m, d, block_size, dtype, tolerance):
    gradients, x = problem(m, d, dtype)
    cpu = mfac_core.inverse_fisher(gradients, block_size=block_size)
    gpu = mfac_core.inverse_fisher(gradients, block_size=block_size, devices=("cuda:0",))
    np.testing.assert_allclose(gpu.diagonal(), cpu.diagonal(), rtol=tolerance)
    scale = np.abs(cpu.apply(x)).max()
    np.testing.assert_allclose(gpu.apply(x), cpu.apply(x), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("update", ["independent", "joint"])
def test_prune_takes_and_gives_cupy_arrays(update):
    gradients, weights = problem(64, 3000)
    host = mfac_core.prune(weights, gradients, sparsity=0.7, block_size=500, update=update)
    device = mfac_core.prune(
        cupy.asarray(weights), cupy.asarray(gradients), sparsity=0.7, block_size=500, update=update, devices=("cuda:0",)
    )
    assert isinstance(device.weights, cupy.ndarray)
    assert isinstance(device.masks, cupy.ndarray)
    assert np.mean(cupy.asnumpy(device.masks) == host.masks) > 0.999
    same = cupy.asnumpy(device.masks) & host.masks
    np.testing.assert_allclose(cupy.asnumpy(device.weights)[same], host.weights[same], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("gradients_device", ["cpu", "cuda:0"])
def test_a_gradual_run_with_the_window_on_either_side(gradients_device):
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((40, 50)).astype(np.float32)}
    settings = mfac_core.MFACSettings(
        final_sparsity=0.8,
        initial_sparsity=0.4,
        start_epoch=1,
        end_epoch=3,
        num_gradients={0.0: 16, 0.5: 32},
        block_size=300,
        devices=("cuda:0",),
        gradients_device=gradients_device,
    )
    pruner = mfac_core.MFACPruner(settings, weights, steps_per_epoch=32)
    for step in range(96):
        if pruner.needs_gradients(step):
            assert pruner.observe({"w": cupy.asarray(rng.standard_normal((40, 50)), dtype=cupy.float32)})
        if pruner.is_due(step + 1):
            weights = pruner.prune(weights, step + 1).weights
    assert pruner.is_finished
    assert np.count_nonzero(weights["w"]) == 400
    assert np.isfinite(weights["w"]).all()


def test_the_window_on_cuda_holds_the_same_rows():
    rng = np.random.default_rng(0)
    windows = [GradientWindow(70, 5, block_size=16, device=name) for name in ("cpu", "cuda:0")]
    for _ in range(8):
        row = rng.standard_normal(70).astype(np.float32)
        for window in windows:
            window.push(row)
    kept = rng.random(70) < 0.6
    for window in windows:
        window.rebuild(kept, 7)
    np.testing.assert_array_equal(windows[0].to_rows(), windows[1].to_rows())


def test_a_block_that_cholesky_refuses_is_an_error_with_a_name():
    gradients = np.full((3, 8), 1e30)
    with pytest.raises(mfac_core.IllConditionedError):
        mfac_core.inverse_fisher(gradients, damping=1e-12, devices=("cuda:0",)).diagonal()


def test_arrays_of_torch_arrive_through_dlpack():
    torch = pytest.importorskip("torch")
    device = resolve_device("cuda:0")
    tensor = torch.arange(6.0, device="cuda").reshape(2, 3)
    array = device.asarray(tensor)
    assert array.data.ptr == tensor.data_ptr()
    np.testing.assert_array_equal(device.to_numpy(array), tensor.cpu().numpy())


def test_two_gpus_equal_one():
    if "cuda:1" not in resolve_device("cuda:0").backend.devices():
        pytest.skip("needs two CUDA devices")
    gradients, weights = problem(64, 9000)
    one = mfac_core.prune(weights, gradients, sparsity=0.5, block_size=1000, devices=("cuda:0",))
    two = mfac_core.prune(weights, gradients, sparsity=0.5, block_size=1000, devices=("cuda:0", "cuda:1"))
    np.testing.assert_array_equal(one.masks, two.masks)
