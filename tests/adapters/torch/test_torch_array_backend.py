"""Each member of torch's backend: on the CPU, and with streams on a stand-in for a GPU."""

import inspect
import itertools
import logging
import threading

import numpy as np
import pytest
import torch
from torch import nn

from mfac_core.backends import Backend
from mfac_torch import array_backend
from mfac_torch.array_backend import TorchBackend
from mfac_torch.array_kernels import KERNELS
from tests.adapters.torch.stream_stand_in import GPU, BackendOfStreams, Streams

CPU = "cpu"


@pytest.fixture
def backend():
    return TorchBackend()


def test_the_backend_keeps_to_the_contract(backend):
    members = [name for name, member in vars(Backend).items() if callable(member) and not name.startswith("_")]
    assert len(members) == 14
    for name in members:
        expected, found = (inspect.signature(getattr(each, name)) for each in (Backend, TorchBackend))
        assert list(found.parameters) == list(expected.parameters), name


def test_devices_have_the_names_of_torch(backend, monkeypatch):
    def machine(kind, count):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        return backend.devices()

    assert machine("cuda", 0) == ("cpu",)
    assert machine("cuda", 2) == ("cpu", "cuda:0", "cuda:1")  # of NVIDIA and of AMD
    assert machine("xpu", 1) == ("cpu", "xpu:0")
    assert machine("mps", 1) == ("cpu", "mps")
    of = {name: backend.device_of(type("T", (), {"device": torch.device(name)})) for name in ("cuda:1", "mps:0", "cpu")}
    assert of == {"cuda:1": "cuda:1", "mps:0": "mps", "cpu": "cpu"}


def test_apples_gpus_have_no_float64():
    of = {name: KERNELS.wide_dtype(type("T", (), {"device": torch.device(name)})) for name in ("cpu", "cuda:0", "mps")}
    assert of == {"cpu": torch.float64, "cuda:0": torch.float64, "mps": torch.float32}


# --- arrays


def test_numpy_arrays_share_their_memory_if_a_tensor_can(backend):
    x = np.arange(6.0).reshape(2, 3)
    tensor = backend.asarray(x, CPU)
    assert np.shares_memory(tensor.numpy(), x)
    assert np.shares_memory(backend.to_numpy(tensor), x)
    read_only = x.copy()
    read_only.flags.writeable = False
    for other in (read_only, x[:, ::-1], x.T, np.float64(3.0), np.zeros((0, 2))):
        np.testing.assert_array_equal(backend.asarray(other, CPU).numpy(), other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.int32, np.int64])
def test_dtypes_are_named_as_in_numpy(backend, dtype):
    x = backend.asarray(np.array([0, 1, 2]), CPU, dtype)
    of_torch = torch.from_numpy(np.zeros(0, dtype)).dtype
    assert x.dtype == of_torch
    assert backend.zeros((2,), CPU, dtype).dtype == of_torch
    assert backend.asarray(torch.arange(3), CPU, dtype).dtype == of_torch
    assert backend.host_zeros((2, 3), dtype).dtype == dtype
    assert backend.to_numpy(x).dtype == dtype


def test_tensors_of_the_device_are_taken_as_they_are_without_their_graph(backend):
    weight = nn.Parameter(torch.ones(3))
    tensor = backend.asarray(weight, CPU)
    assert tensor.data_ptr() == weight.data_ptr()
    assert not tensor.requires_grad
    np.testing.assert_array_equal(backend.to_numpy(weight * 2), [2, 2, 2])
    np.testing.assert_array_equal(backend.fetch(weight * 2)(), [2, 2, 2])
    (items,) = backend.stream(CPU, [lambda: [weight, np.ones(2)]])
    assert items[0].data_ptr() == weight.data_ptr()
    assert not items[0].requires_grad


# --- what the training loop has set


def test_work_is_done_without_graph_half_precision_or_inference_tensors(backend):
    a = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        with backend.on(CPU):
            product = a @ a
            zeros = backend.zeros((2,), CPU, np.float32)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert product.dtype == torch.float32
    assert not product.requires_grad
    product += 1
    zeros += 1


OLD = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high", "highest")


def by_module(name):
    module = getattr(torch.backends, name).matmul
    return lambda: module.fp32_precision, lambda value: setattr(module, "fp32_precision", value)


@pytest.mark.parametrize("interface", ["old", "cuda", "mkldnn"])
def test_products_are_not_rounded_while_any_thread_works_and_then_as_before(backend, interface):
    if interface != "old" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("from torch 2.9 on")
    get, put, rounded, exact = OLD if interface == "old" else (*by_module(interface), "tf32", "ieee")
    inside, leave = threading.Event(), threading.Event()

    def work():
        with backend.on(CPU):
            inside.set()
            leave.wait(10)

    try:
        put(rounded)
        worker = threading.Thread(target=work)
        with backend.on(CPU):
            assert get() == exact
            worker.start()
            inside.wait(10)
        assert get() == exact
        leave.set()
        worker.join()
        assert get() == rounded
    finally:
        if interface != "old":
            put("none")
        torch.set_float32_matmul_precision("highest")


def test_nothing_is_set_where_products_are_exact(backend, monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(torch, "set_float32_matmul_precision", refuse)
    with backend.on(CPU):
        pass


# --- numbers of a device


def test_groups_are_a_little_smaller_than_a_power_of_two(backend, monkeypatch):
    for gibibytes in (4, 24, 80, 141):
        monkeypatch.setattr(TorchBackend, "_memory", lambda self, device, memory=gibibytes * 2**30: memory)
        plenty = backend.group_bytes(CPU, 2**50)
        assert plenty & (plenty - 1) == 0
        assert gibibytes * 2**30 / 32 < plenty or plenty == 2 * 2**30
        assert plenty <= gibibytes * 2**30 / 16
        assert backend.group_bytes(CPU, 2**29) == 2**27
        assert backend.group_bytes(CPU, 1) == 64 * 2**20


def test_speed_and_free_memory_are_plausible(backend):
    assert 1e9 < backend.speed(CPU) == backend.speed(CPU) < 1e14
    assert backend.free_bytes(CPU) > 2**20
    backend.synchronize(CPU)


# --- streams


@pytest.fixture(params=[False, True], ids=["late", "early"])
def streams(request, monkeypatch):
    streams = Streams(eager=request.param)
    monkeypatch.setattr(array_backend, "_with_streams", lambda device: streams if device == GPU else None)
    with streams:
        yield streams


KINDS = ["pageable", "strided", "pinned", "pinned and strided"]


def sources(kind, count, backend):
    """Return NumPy arrays of one kind, and copies."""
    values = [np.random.default_rng(i).standard_normal((3, 4 + i % 2, 5)) for i in range(count)]
    arrays = []
    for x in values:
        doubled = np.concatenate([x, x], axis=1)
        host = backend.host_zeros(doubled.shape, x.dtype) if "pinned" in kind else np.empty_like(doubled)
        host[...] = doubled
        arrays.append(host[:, : x.shape[1]] if "strided" in kind else host[:1])
    return arrays, [x.copy() for x in arrays]


def worked_on(streams, backend, loads, *, stop_after=None, at_once=False):
    """Return a function that runs the queued work on a stream's items, if it was not, and returns copies."""
    results = []
    items = backend.stream(GPU, loads)
    for index, (x,) in enumerate(items):
        assert streams.is_here(x)
        streams.put(lambda raw: results.append(raw.clone().numpy()), x)
        del x
        if at_once:
            streams.current_stream().synchronize()
        if index == stop_after:
            items.close()
            break

    def finish():
        streams.current_stream().synchronize()
        return results

    return finish


@pytest.mark.parametrize("stop_after", [None, 2])
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_items_hold_what_was_loaded_whenever_the_work_on_them_is_done(streams, kind, at_once, stop_after):
    backend = BackendOfStreams(streams)
    arrays, values = sources(kind, 7, backend)
    finish = worked_on(streams, backend, [lambda x=x: [x] for x in arrays], stop_after=stop_after, at_once=at_once)
    for x in arrays:
        x[...] = -1.0  # the caller may, once the stream has ended
    results = finish()
    assert len(results) == (7 if stop_after is None else 3)
    for result, value in zip(results, values, strict=False):
        np.testing.assert_array_equal(result, value)


def test_two_items_at_a_time_take_memory(streams):
    backend = BackendOfStreams(streams)
    worked_on(streams, backend, [lambda: [np.zeros((4, 5))]] * 9)
    assert len(streams.blocks) == 2
    assert streams.most_pinned <= 3  # one of them may be about to be freed


def test_tensors_that_are_on_the_gpu_are_yielded_themselves(streams):
    backend = BackendOfStreams(streams)
    here = torch.empty((2,), dtype=torch.float32, device=GPU)
    here_too, copied = next(backend.stream(GPU, [lambda: [here, np.ones(2)]]))
    assert here_too is here
    assert streams.is_here(copied)


def test_what_is_fetched_is_what_was_there_then(streams):
    backend = BackendOfStreams(streams)
    x = torch.empty((3,), dtype=torch.float32, device=GPU)
    streams.put(lambda raw: raw.copy_(torch.tensor([1.0, 2.0, 3.0])), x)
    wait = backend.fetch(x)
    streams.put(lambda raw: raw.zero_(), x)
    assert wait().tolist() == [1, 2, 3]


def test_where_page_locked_memory_is_refused_there_is_ordinary_memory_and_one_warning(monkeypatch, caplog):
    streams = Streams(pins=False)
    monkeypatch.setattr(array_backend, "_with_streams", lambda device: streams if device == GPU else None)
    monkeypatch.setattr(array_backend, "_refusals", itertools.count())
    backend = BackendOfStreams(streams)
    with streams, caplog.at_level(logging.WARNING, "mfac_torch"):
        for _ in range(2):
            assert not backend.host_zeros((3, 2), np.float32).any()
            arrays, values = sources("strided", 4, backend)
            results = worked_on(streams, backend, [lambda x=x: [x] for x in arrays])()
            for result, value in zip(results, values, strict=True):
                np.testing.assert_array_equal(result, value)
    assert [record.message for record in caplog.records] == [
        "page-locked host memory is refused (CUDA error: out of memory): ordinary memory is used, and copies to and "
        "from the GPU are slower"
    ]
