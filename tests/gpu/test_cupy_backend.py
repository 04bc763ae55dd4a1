"""Each member of the CuPy backend on a GPU; slow kernels in the queue bring out what is not ordered."""

import itertools
import logging

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")
cupy_backend = pytest.importorskip("mfac_core.backends.cupy_backend")

from tests.gpu.work import numbers, spin  # noqa: E402

GPU = "cuda:0"
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


@pytest.fixture
def backend():
    return cupy_backend.CupyBackend()


def is_page_locked(x):
    return cupy.cuda.runtime.pointerGetAttributes(x.ctypes.data).type == cupy.cuda.runtime.memoryTypeHost


def pinned(backend, x):
    host = backend.host_zeros(x.shape, x.dtype)
    host[...] = x
    return host


def sources(kind, count, backend):
    """Return arrays of one kind and what they hold."""
    values = [numbers((3, 40 + 30 * (i % 4), 50), np.float32 if i % 2 else np.float64, seed=i) for i in range(count)]
    if kind == "pageable":
        arrays = [x.copy() for x in values]
    elif kind == "strided":
        arrays = [np.concatenate([x, x], axis=1)[:, : x.shape[1]] for x in values]
    elif kind == "pinned":
        arrays = [pinned(backend, x) for x in values]
    elif kind == "pinned and strided":
        arrays = [pinned(backend, np.concatenate([x, x], axis=1))[:, : x.shape[1]] for x in values]
    else:
        arrays = [cupy.asarray(x) for x in values]
    return arrays, values


def copied_behind_slow_work(backend, loads, milliseconds=10):
    """Return copies of what a stream yields, one array per load, each queued behind a kernel that takes its time."""
    copies = []
    for (x,) in backend.stream(GPU, loads):
        spin(milliseconds)
        copies.append(x.copy())
    return copies


def assert_all_equal(arrays, values):
    for array, value in zip(arrays, values, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(array), value)


KINDS = ["pageable", "strided", "pinned", "pinned and strided", "cuda"]

# host memory


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_host_zeros_are_zeros_in_page_locked_memory(backend, shape, dtype):
    host = backend.host_zeros(shape, dtype)
    assert host.shape == shape
    assert host.dtype == dtype
    assert host.flags.writeable
    assert not host.any()
    assert host.size == 0 or is_page_locked(host)


def test_where_cuda_refuses_there_is_ordinary_memory_and_one_warning(backend, monkeypatch, caplog):
    def refuse(size, flags=0):
        raise cupy.cuda.runtime.CUDARuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", refuse)
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", refuse)
    monkeypatch.setattr(cupy_backend, "_refusals", itertools.count())
    strided = numbers((4, 6, 5))[:, :3]
    with caplog.at_level(logging.WARNING, "mfac_core"):
        for _ in range(2):
            host = backend.host_zeros((3, 2), np.float32)
            assert not host.any()
            assert not is_page_locked(host)
            np.testing.assert_array_equal(backend.fetch(cupy.arange(5))(), np.arange(5))
            for (x,) in backend.stream(GPU, [lambda: [strided]] * 3):
                np.testing.assert_array_equal(cupy.asnumpy(x), strided)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cudaErrorMemoryAllocation" in caplog.text


# numbers of a device


def test_the_speed_is_plausible_and_the_same_at_every_call(backend):
    speed = backend.speed(GPU)
    assert isinstance(speed, float)
    assert 1e11 < speed < 1e16
    assert backend.speed(GPU) == speed


def test_a_group_is_a_small_part_of_the_memory_and_of_the_work(backend):
    total = cupy.cuda.Device(0).mem_info[1]
    plenty = backend.group_bytes(GPU, 2**50)
    assert isinstance(plenty, int)
    assert 64 * 2**20 <= plenty <= max(64 * 2**20, min(2 * 2**30, total // 16))
    assert backend.group_bytes(GPU, 2**50) == plenty
    assert backend.group_bytes(GPU, 4 * 2**26) == 2**26
    assert backend.group_bytes(GPU, 10) == 2**26


# stream


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_stream_yields_the_arrays_of_each_load(backend, kind, count):
    arrays, values = sources(kind, count, backend)
    seen = 0
    for (x,), value in zip(backend.stream(GPU, [lambda x=x: [x] for x in arrays]), values, strict=True):
        assert isinstance(x, cupy.ndarray)
        assert x.device.id == 0
        assert x.dtype == value.dtype
        np.testing.assert_array_equal(cupy.asnumpy(x), value)
        seen += 1
    assert seen == count


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_overwritten_while_slow_work_is_queued(backend, kind):
    arrays, values = sources(kind, 9, backend)
    assert_all_equal(copied_behind_slow_work(backend, [lambda x=x: [x] for x in arrays], milliseconds=20), values)


def test_the_work_may_be_on_a_stream_of_its_own(backend):
    arrays, values = sources("strided", 6, backend)
    with cupy.cuda.Stream(non_blocking=True) as work:
        copies = copied_behind_slow_work(backend, [lambda x=x: [x] for x in arrays], milliseconds=20)
        work.synchronize()
    assert_all_equal(copies, values)


def test_large_copies_out_of_gathered_memory_are_done_before_it_is_used_again(backend):
    wide = numbers((4, 2000, 2000))
    results = []
    for (x,) in backend.stream(GPU, [lambda i=i: [wide[:, :, i : i + 1990]] for i in range(8)]):
        results.append(x[:, ::97, ::89].copy())
    for i, result in enumerate(results):
        np.testing.assert_array_equal(cupy.asnumpy(result), wide[:, ::97, i : i + 1990 : 89])


def test_a_load_may_give_several_arrays_and_those_on_the_gpu_are_yielded_themselves(backend):
    here = cupy.arange(12.0).reshape(3, 4)
    host = numbers((2, 3, 5)), numbers((7,), np.float64), numbers((0, 4)), pinned(backend, numbers((6, 2)))
    for arrays in backend.stream(GPU, [lambda: [host[0], here.T, *host[1:]], list, lambda: [here]] * 2):
        if len(arrays) > 1:
            assert arrays[1].data.ptr == here.data.ptr
            for x, value in zip([arrays[0], *arrays[2:]], host, strict=True):
                assert x.dtype == value.dtype
                np.testing.assert_array_equal(cupy.asnumpy(x), value)
        elif arrays:
            assert arrays[0] is here


def test_the_list_of_an_item_is_emptied_when_the_next_is_requested(backend):
    here = cupy.arange(3)
    items = []
    for i, item in enumerate(backend.stream(GPU, [lambda: [numbers((40, 50)), here]] * 4)):
        assert [len(each) for each in items] == [0] * i
        items.append(item)


def test_items_of_growing_size_take_new_memory_while_the_smaller_one_is_in_use(backend):
    values = [numbers((1 << min(i, 12), 64), seed=i) for i in range(16)]
    assert_all_equal(copied_behind_slow_work(backend, [lambda x=x: [x] for x in values]), values)


def test_a_source_may_be_dropped_once_it_is_loaded(backend):
    loads = [lambda i=i: [pinned(backend, numbers((500, 1000), seed=i))] for i in range(6)]
    assert_all_equal(copied_behind_slow_work(backend, loads), [numbers((500, 1000), seed=i) for i in range(6)])


def test_memory_that_earlier_and_later_work_uses_is_left_alone(backend):
    value = numbers((1000, 1000))
    cupy.get_default_memory_pool().free_all_blocks()
    earlier = cupy.full((1000, 1000), 7, np.float32)
    spin(50)
    kept = earlier + 0
    del earlier  # the pool may give this memory to the stream, although the addition has not run yet
    for (x,) in backend.stream(GPU, [lambda: [value]] * 3):
        del x
    later = [cupy.full((1000, 1000), i, np.float32) for i in range(4)]
    assert bool((kept == 7).all())
    assert all(bool((x == i).all()) for i, x in enumerate(later))


def test_the_next_load_is_called_before_an_item_is_yielded(backend):
    called = []

    def load(i):
        called.append(i)
        return [numbers((10, 10))]

    stream = backend.stream(GPU, (lambda i=i: load(i) for i in range(4)))
    assert called == []
    for i, _ in enumerate(stream):
        assert called == list(range(min(i + 2, 4)))


@pytest.mark.parametrize("how", ["close", "error in a load", "error in the work"])
def test_a_stream_that_ends_early_leaves_the_gpu_in_order(backend, how):
    def load(i):
        if how == "error in a load" and i == 3:
            raise KeyError(i)
        return [numbers((500, 1000), seed=i)]

    stream = backend.stream(GPU, [lambda i=i: load(i) for i in range(6)])
    try:
        for i, (x,) in enumerate(stream):
            spin(10)
            if i == 1 and how == "close":
                stream.close()
            if i == 1 and how == "error in the work":
                raise KeyError(i)
            del x
    except KeyError:
        stream.close()
    assert cupy.cuda.Device().id == 0
    fresh = [cupy.full((500, 1000), i, np.float32) for i in range(4)]
    assert all(bool((x == i).all()) for i, x in enumerate(fresh))


def test_several_streams_at_once_do_not_disturb_each_other(backend):
    first, second = [numbers((50, 60), seed=i) for i in range(5)], [numbers((70, 80), seed=9 + i) for i in range(5)]
    both = zip(
        backend.stream(GPU, [lambda x=x: [x] for x in first]),
        backend.stream(GPU, [lambda x=x: [x] for x in second]),
        strict=True,
    )
    for i, ((x,), (y,)) in enumerate(both):
        np.testing.assert_array_equal(cupy.asnumpy(x), first[i])
        np.testing.assert_array_equal(cupy.asnumpy(y), second[i])


def test_arrays_of_another_gpu_arrive_after_the_work_that_makes_them(backend):
    if "cuda:1" not in backend.devices():
        pytest.skip("needs two CUDA devices")
    values = [numbers((300, 400), seed=i) for i in range(6)]

    def load(i):
        with cupy.cuda.Device(1):
            x = cupy.asarray(values[i])
            spin(20)
            x += 1
            return [x, x.T]

    copies = []
    for x, transposed in backend.stream(GPU, [lambda i=i: load(i) for i in range(6)]):
        assert x.device.id == transposed.device.id == 0
        spin(20)
        copies.append((x.copy(), transposed.copy()))
    for (x, transposed), value in zip(copies, values, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(x), value + 1)
        np.testing.assert_array_equal(cupy.asnumpy(transposed), (value + 1).T)


# fetch


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (30, 40)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.int64])
def test_fetch_brings_an_array_to_page_locked_memory(backend, shape, dtype):
    value = (10 * numbers(shape, np.float64)).astype(dtype)
    wait = backend.fetch(cupy.asarray(value))
    host = wait()
    assert isinstance(host, np.ndarray)
    assert host.dtype == dtype
    np.testing.assert_array_equal(host, value)
    assert wait() is host
    assert host.size == 0 or is_page_locked(host)


def test_fetch_comes_after_the_queued_work_and_does_not_wait_for_it(backend):
    x = cupy.zeros((200, 300), np.float32)
    x += 0  # compiles the kernels: nothing below waits for the compiler
    spin(0)
    backend.fetch(x.T)()
    spin(200)
    x += 3
    wait = backend.fetch(x.T)
    assert not cupy.cuda.get_current_stream().done
    x += 1  # queued behind the copy
    del x
    np.testing.assert_array_equal(wait(), np.full((300, 200), 3, np.float32))


def test_copies_that_nobody_waits_for_do_not_land_in_memory_of_others(backend):
    for _ in range(20):
        x = cupy.full((1000, 1000), 5, np.float32)
        spin(5)
        backend.fetch(x)
        wait = backend.fetch(cupy.zeros((1000, 1000), np.float32))
        assert not wait().any()


def test_fetch_gives_numpy_arrays_at_once(backend):
    x = numbers((3, 4))
    assert backend.fetch(x)() is x
