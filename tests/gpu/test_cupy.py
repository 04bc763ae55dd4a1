"""The same kernels on CUDA devices through CuPy, against NumPy and the dense oracle."""

import numpy as np
import pytest

import mfac_core
from mfac_core.backends import resolve_device
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.window import GradientWindow
from mfac_core.session.layer_sensitivity import stacked_rows

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
    options = dict(sparsity=0.7, block_size=500, update=update, num_recomputations=1)
    host = mfac_core.prune(weights, gradients, **options)
    device = mfac_core.prune(cupy.asarray(weights), cupy.asarray(gradients), **options, devices=("cuda:0",))
    assert isinstance(device.weights, cupy.ndarray)
    assert isinstance(device.masks, cupy.ndarray)
    assert np.mean(cupy.asnumpy(device.masks) == host.masks) > 0.999
    same = cupy.asnumpy(device.masks) & host.masks
    np.testing.assert_allclose(cupy.asnumpy(device.weights)[same], host.weights[same], rtol=0.02, atol=1e-3)


def test_sensitivity_takes_cupy_arrays_and_stacks_rows_on_the_gpu():
    gradients, weights = problem(32, 600, np.float64)
    rows = stacked_rows(({"w": cupy.asarray(row)} for row in gradients), 40)
    options = {"sparsities": (0.3, 0.6, 0.9), "block_size": 200, "damping": 1e-2, "progress": False}

    def loss(layers):
        return float(abs(layers["w"]).sum())

    host = mfac_core.sensitivity({"w": weights}, loss, {"w": gradients}, **options)
    device = mfac_core.sensitivity({"w": cupy.asarray(weights)}, loss, rows, devices=("cuda:0",), **options)

    assert isinstance(rows["w"], cupy.ndarray)
    np.testing.assert_allclose(device.measured["w"], host.measured["w"], rtol=1e-6)
    np.testing.assert_allclose(device.predicted["w"], host.predicted["w"], rtol=1e-6)


@pytest.mark.parametrize("gradients_device", ["cpu", "cuda:0", "auto"])
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


@pytest.mark.parametrize(
    ("m", "d", "block_size"), [(300, 4000, 1000), (520, 1500, 700), (70, 4096, 64), (1024, 500, 50)]
)
@pytest.mark.parametrize("update", ["independent", "joint"])
@pytest.mark.parametrize("damping", [1e-3, "auto"])
def test_a_pruning_step_on_cuda_equals_one_on_the_cpu(m, d, block_size, damping, update):
    gradients, weights = problem(m, d)
    gradients = gradients * np.logspace(-1, 1, d, dtype=np.float32) if damping == "auto" else gradients
    options = dict(sparsity=0.6, block_size=block_size, damping=damping, update=update, num_recomputations=1)
    host = mfac_core.prune(weights, gradients, **options)
    device = mfac_core.prune(weights, gradients, **options, devices=("cuda:0",))
    assert np.mean(device.masks == host.masks) > 0.999
    same = device.masks & host.masks
    np.testing.assert_allclose(device.weights[same], host.weights[same], rtol=0.02, atol=2e-3)
    assert device.predicted_loss_increase == pytest.approx(host.predicted_loss_increase, rel=0.02)
    assert device.damping == pytest.approx(host.damping, rel=1e-5)


@pytest.mark.parametrize("place", ["cpu", "cuda:0"])
@pytest.mark.parametrize("retain", ["once", "never"])
def test_blocks_that_need_float64_get_it_on_cuda_with_the_window_on_either_side(place, retain):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 6 * 100)).astype(np.float32)
    rows[:, 100:200] = rows[:1, 100:200] + 1e-3 * rows[:, 100:200]
    devices = (resolve_device("cuda:0"),)
    window = GradientWindow(600, 40, block_size=100, device=place, consumers=devices if place == "cpu" else ())
    for row in rows:
        window.push(row)
    fisher = BlockwiseFisher(window, damping=1e-4, devices=devices, retain=retain)
    host = mfac_core.inverse_fisher(rows.astype(np.float64), block_size=100, damping=1e-4)
    np.testing.assert_allclose(cupy.asnumpy(fisher.diagonal()), host.diagonal(), rtol=1e-4)
    x = rng.standard_normal(600)
    wanted = host.apply(x)
    found = cupy.asnumpy(fisher.apply(cupy.asarray(x, dtype=cupy.float32)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_the_window_of_a_run_is_kept_on_the_gpu_when_it_fits():
    weights = {"w": np.ones((40, 50), np.float32)}
    settings = mfac_core.MFACSettings(final_sparsity=0.5, end_epoch=1, num_gradients=4, devices=("cuda:0",))
    pruner = mfac_core.MFACPruner(settings, weights, steps_per_epoch=4)
    row = cupy.ones((40, 50), cupy.float32)
    assert pruner.observe({"w": row})
    row[:] = cupy.nan  # the sample before was copied
    assert pruner.observe({"w": row})
    assert pruner.num_rows == 1
    assert pruner.refused_rows == 1
    (chunk,) = pruner._collector.window.chunks(pruner._collector.window.stored_groups[0])
    assert isinstance(chunk, cupy.ndarray)
    assert bool((chunk == 1).all())


@pytest.mark.parametrize(
    "settings",
    [
        mfac_core.MagnitudeSettings(final_sparsity=0.5, end_epoch=0, mask_type="2:4"),
        mfac_core.MagnitudeSettings(final_sparsity=0.7, end_epoch=0),
        mfac_core.ACDCSettings(compression_sparsity=0.7, end_epoch=0),
        mfac_core.ConstantSettings(),
    ],
)
def test_weights_on_cuda_are_pruned_there_to_the_same_masks(settings):
    _, weights = problem(1, 4000)
    weights[:300] = 0
    here, there = {"w": weights.reshape(40, 100)}, {"w": cupy.asarray(weights).reshape(40, 100)}
    host, device = (mfac_core.make_pruner(settings, each, steps_per_epoch=1).prune(each) for each in (here, there))
    assert isinstance(device.weights["w"], cupy.ndarray)
    np.testing.assert_array_equal(device.masks["w"], host.masks["w"])
    np.testing.assert_array_equal(cupy.asnumpy(device.weights["w"]), host.weights["w"])


def test_the_window_on_cuda_holds_the_same_rows():
    rng = np.random.default_rng(0)
    windows = [GradientWindow(70, 5, block_size=16, device=name) for name in ("cpu", "cuda:0")]
    for _ in range(8):
        row = rng.standard_normal(70).astype(np.float32)
        for window in windows:
            window.push(row)
    kept = rng.random(70) < 0.6
    windows = [window.rebuilt(kept, 7) for window in windows]
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
