"""The CuPy backend and kernels on stand-ins for CuPy; queues that are late or eager bring out what is not ordered."""

import contextlib
import importlib.util
import itertools
import logging
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mfac_core.backends import base
from mfac_core.fisher import kernels as fisher_kernels

GPU = "cuda:0"
KINDS = ("pageable", "strided", "pinned", "pinned and strided", "on the other GPU")


def loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cupy(monkeypatch):
    stand_in = loaded("cupy", Path(__file__).with_name("cupy_stand_in.py"))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setitem(sys.modules, "cupyx", stand_in.cupyx)
    return stand_in


@pytest.fixture
def module(cupy):
    return loaded("cupy_backend_on_the_cpu", Path(base.__file__).with_name("cupy_backend.py"))


@pytest.fixture
def backend(module):
    return module.CupyBackend()


def numbers(count):
    return [
        np.random.default_rng(i).standard_normal((3, 20 + 10 * (i // 3 % 2))).astype(np.float32) for i in range(count)
    ]


def source(cupy, backend, kind, value):
    if kind == "on the other GPU":
        with cupy.Device(1):
            x = cupy.asarray(np.zeros_like(value))
            cupy.current_stream().put(lambda: np.copyto(x.memory, value))  # work that is late, too
            return x
    padded = np.concatenate([value, value], axis=1) if "strided" in kind else value
    array = backend.host_zeros(padded.shape, padded.dtype) if "pinned" in kind else np.empty_like(padded)
    array[...] = padded
    assert cupy.is_pinned(array) == ("pinned" in kind)
    return array[:, : value.shape[1]]


def read_later(cupy, x):
    """Queue work that reads an array, and return the list that will hold what it finds."""
    found = []
    cupy.current_stream().put(lambda memory=x.memory: found.append(memory.copy()))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("work", ["late", "late, on a stream of its own", "early"])
def test_work_reads_every_item_as_it_was_loaded(cupy, backend, kind, work):
    values = numbers(9)
    cupy.current_stream().eager = work == "early"
    with cupy.Stream() if "own" in work else cupy.current_stream():
        found = [
            read_later(cupy, x)
            for (x,) in backend.stream(GPU, ((lambda v=v: [source(cupy, backend, kind, v)]) for v in values))
        ]
    for (x,), value in zip(found, values, strict=True):
        np.testing.assert_array_equal(x, value)


def test_the_host_may_write_to_the_sources_of_an_item_when_the_next_but_one_is_loaded(cupy, backend):
    hosts = [backend.host_zeros((3, 20), np.float32) for _ in range(2)]

    def load(i):
        hosts[i % 2][...] = i
        return [hosts[i % 2]]

    found = [read_later(cupy, x) for (x,) in backend.stream(GPU, [lambda i=i: load(i) for i in range(8)])]
    assert [float(x.max()) for (x,) in found] == [float(x.min()) for (x,) in found] == list(range(8))


def test_arrays_that_are_there_are_yielded_themselves_and_the_next_load_is_called_first(cupy, backend):
    here, called = cupy.asarray(np.ones(3)), []

    def load(i):
        called.append(i)
        return [here, numbers(1)[0]]

    items = []
    for i, item in enumerate(backend.stream(GPU, (lambda i=i: load(i) for i in range(4)))):
        assert item[0] is here
        assert called == list(range(min(i + 2, 4)))
        assert all(each == [] for each in items)
        items.append(item)
    assert i == 3


def test_two_items_take_memory_at_a_time_and_none_once_the_stream_has_ended(cupy, backend):
    addresses = set()
    for item in backend.stream(GPU, [lambda: [numbers(1)[0]]] * 6):
        addresses.add(item[0].memory.ctypes.data)
    assert len(addresses) == 2
    assert not any(blocks for (stream, _), blocks in cupy._free.items() if stream is not cupy.current_stream())


@pytest.mark.parametrize("how", ["close", "error in a load", "error in the work"])
def test_a_stream_that_ends_early_has_finished_its_copies_and_the_work(cupy, backend, how):
    found, values = [], numbers(6)

    def load(i):
        if how == "error in a load" and i == 3:
            raise KeyError(i)
        return [source(cupy, backend, "pinned", values[i])]

    stream = backend.stream(GPU, [lambda i=i: load(i) for i in range(6)])
    with contextlib.suppress(KeyError):
        for i, (x,) in enumerate(stream):
            found.append(read_later(cupy, x))
            if i == 1 and how == "error in the work":
                raise KeyError(i)
            if i == 1 and how == "close":
                stream.close()
    stream.close()
    assert len(found) == 2
    for (x,), value in zip(found, values, strict=False):
        np.testing.assert_array_equal(x, value)
    assert not any(each.queue for each in cupy.Stream.made)
    assert cupy.Device().id == 0


def test_only_what_has_gaps_is_gathered_first(cupy, module, backend, monkeypatch):
    gathered = []
    empty_pinned = module.cupyx.empty_pinned
    monkeypatch.setattr(
        module.cupyx, "empty_pinned", lambda shape, dtype: gathered.append(shape) or empty_pinned(shape, dtype)
    )
    loads = [lambda kind=kind: [source(cupy, backend, kind, numbers(1)[0])] for kind in KINDS]
    assert len(list(backend.stream(GPU, loads))) == len(KINDS)
    assert len(gathered) == 2


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_host_zeros_are_zeros_in_page_locked_memory(cupy, backend, shape):
    host = backend.host_zeros(shape, np.float32)
    assert (host.shape, host.dtype) == (shape, np.float32)
    assert not host.any()
    assert cupy.is_pinned(host)


def test_fetch_copies_behind_the_queued_work_and_does_not_wait_for_it(cupy, backend):
    x = cupy.asarray(np.zeros((3, 4), np.float32))
    cupy.current_stream().put(lambda: x.memory.fill(3))
    wait = backend.fetch(x)
    cupy.current_stream().put(lambda: x.memory.fill(4))
    assert not (x.memory == 3).any()
    host = wait()
    assert cupy.is_pinned(host)
    np.testing.assert_array_equal(host, np.full((3, 4), 3))
    assert wait() is host


def test_fetch_keeps_the_array_until_the_copy_is_done(cupy, backend):
    x = cupy.asarray(np.zeros(3))
    alive = weakref.ref(x)
    wait = backend.fetch(x)
    del x
    assert alive() is not None
    wait()
    assert alive() is None


def test_copies_that_nobody_waits_for_do_not_land_in_memory_of_others(cupy, backend):
    backend.fetch(cupy.asarray(np.full((3, 4), 5.0)))
    memory = cupy.cupyx.empty_pinned((3, 4), np.float64)
    memory.fill(7)
    cupy.current_stream().synchronize()
    assert (memory == 7).all()


def test_where_cuda_refuses_page_locked_memory_there_is_ordinary_memory_and_one_warning(
    cupy, module, backend, monkeypatch, caplog
):
    def refuse(*_):
        raise cupy.runtime.CUDARuntimeError("out of memory")

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", refuse)
    monkeypatch.setattr(module.cupyx, "empty_pinned", refuse)
    monkeypatch.setattr(module, "_refusals", itertools.count())
    with caplog.at_level(logging.WARNING, "mfac_core"):
        host = backend.host_zeros((3, 2), np.float32)
        assert not host.any()
        np.testing.assert_array_equal(backend.fetch(cupy.asarray(np.arange(5)))(), np.arange(5))
        values = numbers(5)
        loads = [lambda v=v: [source(cupy, backend, "strided", v)] for v in values]
        found = [read_later(cupy, x) for (x,) in backend.stream(GPU, loads)]
    for (x,), value in zip(found, values, strict=True):
        np.testing.assert_array_equal(x, value)
    assert len(caplog.records) == 1


def test_arrays_go_to_the_named_gpu_and_back(cupy, backend):
    value = numbers(1)[0]
    x = backend.asarray(value, "cuda:1")
    assert backend.device_of(x) == "cuda:1"
    np.testing.assert_array_equal(backend.to_numpy(x), value)
    assert backend.device_of(backend.asarray(x, GPU)) == GPU
    assert backend.asarray(x, "cuda:1") is x
    assert backend.devices() == (GPU, "cuda:1")


def test_the_cholesky_factors_are_checked_and_their_inverses_are_contiguous(monkeypatch):
    settings = []

    def solve_triangular(a, b, trans, lower):  # returns columns next to each other in memory, as CuPy does
        assert (trans, lower) == ("T", True)
        return np.ascontiguousarray(np.linalg.solve(a.transpose(0, 2, 1), b).transpose(0, 2, 1)).transpose(0, 2, 1)

    monkeypatch.setitem(sys.modules, "cupy", np)
    errstate = lambda **setting: contextlib.nullcontext(settings.append(setting))  # noqa: E731
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(errstate=errstate))
    monkeypatch.setitem(sys.modules, "cupyx.scipy", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupyx.scipy.linalg", SimpleNamespace(solve_triangular=solve_triangular))
    kernels = loaded("cupy_kernels_on_the_cpu", Path(fisher_kernels.__file__).with_name("cupy_kernels.py"))
    x = np.random.default_rng(0).standard_normal((3, 20, 30))
    matrices, shifts = x @ x.transpose(0, 2, 1), np.array([0.5, 1.0, 2.0])[:, None, None]

    inverse, diagonal = kernels.SmallFactors()(np.tril(matrices), shifts)

    factors = np.linalg.cholesky(matrices + shifts * np.eye(20))
    np.testing.assert_allclose(inverse @ factors, np.broadcast_to(np.eye(20), (3, 20, 20)), atol=1e-12)
    np.testing.assert_allclose(diagonal, np.diagonal(factors, axis1=1, axis2=2))
    assert inverse.flags.c_contiguous
    assert settings == [{"linalg": "raise"}]
