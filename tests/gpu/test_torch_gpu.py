"""PyTorch on a CUDA device; slow kernels in the queue bring out what is not ordered."""

import itertools
import logging
import threading

import numpy as np
import pytest

import mfac_core
from mfac_core.backends import device_of, resolve_device
from mfac_core.fisher import kernels
from tests.gpu.work import MILLISECONDS, numbers

pytestmark = pytest.mark.gpu("torch")

torch = pytest.importorskip("torch")
mfac_torch = pytest.importorskip("mfac_torch")

from mfac_torch import array_backend  # noqa: E402

GPU = "cuda:0"
STEPS_PER_EPOCH = 5
KINDS = ["pageable", "strided", "pinned", "pinned and strided", "cuda"]


@pytest.fixture
def backend():
    return array_backend.TorchBackend()


def spin(milliseconds):
    torch.cuda._sleep(milliseconds * MILLISECONDS)


def sources(kind, count, backend):
    """Return arrays of one kind and what they hold."""
    values = [numbers((3, 40 + 30 * (i % 4), 50), np.float32 if i % 2 else np.float64, seed=i) for i in range(count)]
    arrays = []
    for x in values:
        doubled = np.concatenate([x, x], axis=1)
        host = backend.host_zeros(doubled.shape, x.dtype) if "pinned" in kind else np.empty_like(doubled)
        host[...] = doubled
        whole = backend.host_zeros(x.shape, x.dtype) if kind == "pinned" else np.empty_like(x)
        whole[...] = x
        arrays.append(
            torch.from_numpy(x).to(GPU) if kind == "cuda" else host[:, : x.shape[1]] if "strided" in kind else whole
        )
    return arrays, values


def copied_behind_slow_work(backend, loads, milliseconds=10):
    """Return copies of what a stream yields, one array per load, each queued behind a kernel that takes its time."""
    copies = []
    for (x,) in backend.stream(GPU, loads):
        assert backend.device_of(x) == GPU
        spin(milliseconds)
        copies.append(x.clone())
    return copies


def assert_all_equal(tensors, values):
    for tensor, value in zip(tensors, values, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), value)


# --- arrays


def test_devices_are_those_of_torch(backend):
    assert backend.devices() == ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))
    assert resolve_device("torch:cuda") == resolve_device("cuda:0", "torch") == device_of(torch.zeros(1, device=GPU))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.int32])
def test_arrays_go_to_the_gpu_and_back(backend, dtype):
    x = numbers((4, 5)).astype(dtype)
    for each in (x, x.T, x[::-1], torch.from_numpy(x.copy())):
        there = backend.asarray(each, GPU)
        assert backend.device_of(there) == GPU
        np.testing.assert_array_equal(backend.to_numpy(there), np.asarray(each))
    assert backend.asarray(there, GPU).data_ptr() == there.data_ptr()
    assert not backend.zeros((2, 3), GPU, dtype).any()


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_host_zeros_are_zeros_in_page_locked_memory(backend, shape):
    host = backend.host_zeros(shape, np.float32)
    assert host.shape == shape
    assert not host.any()
    assert host.size == 0 or torch.from_numpy(host).is_pinned()


def test_a_view_of_page_locked_memory_is_known_as_such(backend):
    assert torch.from_numpy(backend.host_zeros((4, 1000), np.float32)[2:]).is_pinned()


def test_where_page_locked_memory_is_refused_there_is_ordinary_memory_and_one_warning(backend, monkeypatch, caplog):
    empty = torch.empty

    def refuse(*args, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory")
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(array_backend, "_refusals", itertools.count())
    arrays, values = sources("strided", 4, backend)
    with caplog.at_level(logging.WARNING, "mfac_torch"):
        assert not backend.host_zeros((3, 2), np.float32).any()
        np.testing.assert_array_equal(backend.fetch(torch.arange(5, device=GPU))(), np.arange(5))
        assert_all_equal(copied_behind_slow_work(backend, [lambda x=x: [x] for x in arrays]), values)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_is_fetched_is_what_was_there_then(backend):
    x = torch.zeros(1000, device=GPU)
    spin(20)
    x += 1
    wait = backend.fetch(x)
    x += 1
    np.testing.assert_array_equal(wait(), np.ones(1000))


# --- the stream


@pytest.mark.parametrize("on_side_stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_items_hold_what_was_loaded(backend, kind, on_side_stream):
    arrays, values = sources(kind, 12, backend)
    with torch.cuda.stream(torch.cuda.Stream() if on_side_stream else torch.cuda.current_stream()):
        copies = copied_behind_slow_work(backend, [lambda x=x: [x] for x in arrays])
        for x in arrays:
            x[...] = -1  # the caller may, once the stream has ended
        assert_all_equal(copies, values)


def test_one_host_buffer_may_serve_all_loads_if_it_is_not_page_locked(backend):
    buffer = np.empty((300, 1000), np.float32)

    def load(value):
        buffer[...] = value
        return [buffer]

    copies = copied_behind_slow_work(backend, [lambda value=value: load(value) for value in range(8)])
    assert_all_equal(copies, [np.full((300, 1000), value) for value in range(8)])


def test_two_items_at_a_time_take_memory(backend):
    host = backend.host_zeros((4, 1024, 1024), np.float32)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in backend.stream(GPU, [lambda: [host]] * 8):
        spin(5)
    assert torch.cuda.max_memory_allocated() - before <= 2 * host.nbytes


def test_work_of_other_streams_and_threads_is_waited_for(backend):
    x = torch.zeros(1000, device=GPU)

    def write():
        with torch.cuda.stream(torch.cuda.Stream()):
            spin(50)
            x.add_(1)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert_all_equal(copied_behind_slow_work(backend, [lambda: [x]]), [np.ones(1000)])


# --- numbers of a device


def test_speed_and_memory_are_plausible(backend):
    assert 1e11 < backend.speed(GPU) == backend.speed(GPU) < 1e16
    total = torch.cuda.get_device_properties(0).total_memory
    assert 64 * 2**20 <= backend.group_bytes(GPU, 2**50) <= total / 16
    before = backend.free_bytes(GPU)
    assert 0 < before <= total
    x = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    assert before - backend.free_bytes(GPU) > 2**27
    del x  # torch keeps the memory, which is free for pruning
    assert abs(before - backend.free_bytes(GPU)) < 2**26


def test_products_are_exact_where_training_allows_tf32(backend):
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("the GPU has no TF32")
    a = torch.rand(512, 512, device=GPU)
    exact = a.double() @ a.double()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = a @ a
        with backend.on(GPU):
            product = a @ a
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ((product - exact) / exact).abs().max() < 1e-5
    assert ((rounded - exact) / exact).abs().max() > 1e-5


# --- kernels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 7, 33, 128])
def test_small_factors_are_those_of_numpy(backend, size, dtype):
    x = numbers((5, size, 2 * size), np.float64)
    matrices = (x @ x.swapaxes(1, 2) / size).astype(dtype)
    there = backend.asarray(matrices, GPU)
    shift = backend.asarray(np.arange(1.0, 6.0).reshape(5, 1, 1), GPU, dtype)
    inverse, diagonal = kernels.small_factors(there)(there, shift)
    lower = np.linalg.cholesky(matrices.astype(np.float64) + np.arange(1.0, 6.0)[:, None, None] * np.eye(size))
    tolerance = 1e-4 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(backend.to_numpy(inverse), np.linalg.inv(lower), atol=tolerance)
    np.testing.assert_allclose(backend.to_numpy(diagonal), np.diagonal(lower, axis1=1, axis2=2), rtol=tolerance)


def test_matrices_that_are_not_positive_definite_give_nan_and_leave_the_others_alone(backend):
    matrices = torch.eye(3, device=GPU).repeat(3, 1, 1)
    matrices[1, 2, 2] = -1.0
    inverse, diagonal = kernels.small_factors(matrices)(matrices, 0.0)
    assert torch.isnan(diagonal[1]).any()
    assert torch.isnan(inverse[1]).any()
    assert torch.equal(inverse[[0, 2]], torch.eye(3, device=GPU).repeat(2, 1, 1))


def test_the_kth_smallest_is_found(backend):
    x = backend.asarray(numbers(10_000), GPU)
    for k in (0, 17, 9_999):
        assert float(kernels.kth_smallest(x, k)) == float(np.sort(numbers(10_000))[k])


# --- pruning


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize(("m", "block_size"), [(64, 500), (300, 100), (700, 3000)])
def test_tensors_are_pruned_on_their_gpu_as_arrays_on_the_cpu(m, block_size, update):
    weights, gradients = numbers(3000), numbers((m, 3000), seed=1) * numbers(3000, seed=2) ** 3
    options = {"sparsity": 0.7, "block_size": block_size, "update": update, "damping": 1e-3, "num_recomputations": 1}
    expected = mfac_core.prune(weights, gradients, **options)
    found = mfac_core.prune(
        torch.from_numpy(weights).to(GPU), torch.from_numpy(gradients).to(GPU), **options, devices=[GPU]
    )
    assert found.weights.device == torch.device(GPU)
    np.testing.assert_array_equal(found.masks.cpu().numpy(), expected.masks)
    np.testing.assert_allclose(
        found.weights.cpu().numpy(), expected.weights, atol=1e-2 * np.abs(expected.weights).max()
    )


def trained(place, **keys):
    """Return the masks and the weights of a small network after a gradual run; trained in float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 10)).double()
    batches = [(torch.randn(16, 20).double(), torch.randn(16, 10).double()) for _ in range(STEPS_PER_EPOCH)]
    model = model.to(place)
    settings = {
        "params": "__ALL_PRUNABLE__", "init_sparsity": 0.2, "final_sparsity": 0.8, "start_epoch": 1.0, "end_epoch": 4.0,
        "update_frequency": 1.0, "num_grads": 8, "fisher_block_size": 64, "damp": "auto", "update": "joint",
    }  # fmt: skip
    manager = mfac_torch.ScheduledModifierManager([mfac_torch.MFACPruningModifier(**settings | keys)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = manager.modify(model, optimizer, STEPS_PER_EPOCH)
    for step in range(4 * STEPS_PER_EPOCH):
        inputs, targets = (x.to(place) for x in batches[step % STEPS_PER_EPOCH])
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    pruning = manager._session.prunings[0]
    return {name: mask.cpu() for name, mask in manager.masks.items()}, model.cpu().state_dict(), pruning


@pytest.mark.parametrize("on_side_stream", [False, True])
@pytest.mark.parametrize(
    ("place", "keys"),
    [
        (GPU, {}),
        (GPU, {"grads_device": "cpu"}),
        (GPU, {"available_gpus": ["torch:cuda:0"]}),
        ("cpu", {"available_gpus": [GPU]}),
    ],
)
def test_a_run_on_the_gpu_ends_with_the_masks_of_one_on_the_cpu(place, keys, on_side_stream):
    masks, weights, pruning = trained("cpu")
    assert pruning.devices == ("cpu",)
    with torch.cuda.stream(torch.cuda.Stream() if on_side_stream else torch.cuda.current_stream()):
        found_masks, found_weights, found = trained(place, **keys)
    assert [str(device) for device in found._pruner._devices] == [GPU]
    for name, mask in masks.items():
        assert torch.equal(found_masks[name], mask)
        torch.testing.assert_close(found_weights[name], weights[name], rtol=1e-2, atol=1e-3)


def test_one_shot_pruning_of_a_model_in_half_precision_on_its_gpu():
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 32).half().to(GPU)
    batches = [(torch.randn(8, 64).half(), torch.randn(8, 32).half()) for _ in range(16)]
    with torch.autocast("cuda"):
        masks = mfac_torch.prune_one_shot(model, batches, torch.nn.functional.mse_loss, sparsity=0.75, num_grads=16)
    assert model.weight.dtype == torch.float16
    assert int((model.weight == 0).sum()) >= 0.75 * model.weight.numel()
    assert masks["weight"].device == torch.device(GPU)
