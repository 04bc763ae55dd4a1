"""Each member of the CuPy backend on a GPU; slow kernels in the queue bring out what is not ordered."""

import itertools
import logging

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")
cupy_backend = pytest.importorskip("mfac_core.backends.cupy_backend")

GPU = "cuda:0"
MILLISECONDS = 2_000_000  # cycles, more or less
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

SPIN = r"""
extern "C" __global__ void spin(long long cycles)
{
    const long long start = clock64();
    while (clock64() - start < cycles) { }
}
"""


@pytest.fixture
def backend():
    return cupy_backend.CupyBackend()


def spin(milliseconds):
    """Keep the current stream busy."""
    cupy.RawKernel(SPIN, "spin")((1,), (1,), (milliseconds * MILLISECONDS,))


def numbers(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


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

# views of a given shape, of new arrays of random numbers; ``make`` takes a shape
READ_IN_PLACE = {
    "contiguous": lambda make, n, p, q: make((n, p, q)),
    "part": lambda make, n, p, q: make((n + 2, p + 3, q + 5))[1:-1, 2:-1, 3:-2],
    "transposed": lambda make, n, p, q: make((n, q, p)).transpose(0, 2, 1),
    "transposed part": lambda make, n, p, q: make((n + 2, q + 5, p + 3))[1:-1, 3:-2, 2:-1].transpose(0, 2, 1),
    "rows first": lambda make, n, p, q: make((p, n, q)).transpose(1, 0, 2),
    "columns first": lambda make, n, p, q: make((q, n, p)).transpose(1, 2, 0),
    "every other matrix": lambda make, n, p, q: make((2 * n, p, q))[::2],
    "one for all": lambda make, n, p, q: cupy.broadcast_to(make((1, p, q)), (n, p, q)),
}
COPIED = {
    "every other number": lambda make, n, p, q: make((n, 2 * p, 2 * q))[:, ::2, ::2],
    "rows backwards": lambda make, n, p, q: make((n, p, q))[:, ::-1],
    "matrices backwards": lambda make, n, p, q: make((n, p, q))[::-1],
}


def laid_out(layout, shape, dtype, seed=0):
    return (READ_IN_PLACE | COPIED)[layout](lambda s: cupy.asarray(numbers(s, dtype, seed)), *shape)


def assert_is_product(product, a, b, tolerance):
    a, b = cupy.asnumpy(a).astype(np.longdouble), cupy.asnumpy(b).astype(np.longdouble)
    assert isinstance(product, cupy.ndarray)
    assert product.flags.c_contiguous
    assert product.shape == (a @ b).shape
    assert np.all(np.abs(cupy.asnumpy(product) - a @ b) <= tolerance * (np.abs(a) @ np.abs(b)))


def positive_definite(count, size, seed=0):
    x = numbers((count, size, 2 * size), np.float64, seed)
    return x @ x.transpose(0, 2, 1) / size


def lower_triangles(matrices, layout="contiguous"):
    """Return the matrices on the GPU, NaN above the diagonal."""
    upper = np.triu(np.ones(matrices.shape[1:], bool), 1)
    x = laid_out(layout, matrices.shape, matrices.dtype)
    x[...] = cupy.asarray(np.where(upper, matrices.dtype.type(np.nan), matrices))
    return x


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


def test_a_view_of_page_locked_memory_is_known_as_such(backend):
    host = backend.host_zeros((4, 1000), np.float32)
    assert cupy_backend._is_page_locked(host[2:])
    assert not cupy_backend._is_page_locked(np.zeros(1000))


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


def test_memory_is_grown_while_the_smaller_one_is_in_use(backend):
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


# kernels


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (4, 0, 3), (0, 5, 3), (3, 5, 0), (2, 3, 31), (3, 1024, 33), (1, 777, 2000), (70_000, 3, 2), (2, 64, 7)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-7), (np.float64, 1e-14)])
@pytest.mark.parametrize("layout", ["contiguous", "rows first", "columns first", "every other", "backwards"])
def test_column_sums_of_squares(shape, dtype, tolerance, layout):
    count, rows, columns = shape
    x = cupy.asarray(numbers(shape, dtype))
    if layout == "rows first":
        x = cupy.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2)
    elif layout == "columns first":
        x = cupy.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)
    elif layout == "every other":
        x = cupy.repeat(x, 2, axis=2)[:, :, ::2]
    elif layout == "backwards":
        x = x[:, ::-1]
    sums = cupy_backend.column_sums_of_squares(x)
    assert isinstance(sums, cupy.ndarray)
    assert sums.shape == (count, columns)
    assert sums.dtype == dtype
    expected = np.square(cupy.asnumpy(x).astype(np.longdouble)).sum(axis=1)
    np.testing.assert_allclose(cupy.asnumpy(sums), expected.astype(np.float64), rtol=tolerance)


def test_column_sums_of_squares_keep_what_is_not_finite():
    x = cupy.ones((2, 40, 3), np.float32)
    x[0, 7, 1] = np.nan
    x[1, 39, 2] = np.inf
    sums = cupy.asnumpy(cupy_backend.column_sums_of_squares(x))
    assert np.isnan(sums[0, 1])
    assert np.isinf(sums[1, 2])
    np.testing.assert_array_equal(sums[0, [0, 2]], 40)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saliency(dtype):
    weights, diagonal = numbers(1000, dtype), np.abs(numbers(1000, dtype, seed=1)) + dtype(0.1)
    result = cupy_backend.saliency(cupy.asarray(weights), cupy.asarray(diagonal))
    assert result.dtype == dtype
    np.testing.assert_allclose(cupy.asnumpy(result), weights * weights / (2 * diagonal), rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "rows", "inner", "columns"),
    [
        (1, 1, 1, 1),
        (3, 5, 7, 4),
        (2, 1, 6, 3),
        (3, 4, 1, 5),
        (2, 6, 5, 1),
        (1, 9, 8, 7),
        (4, 1, 3, 1),
        (2, 40, 300, 64),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-6), (np.float64, 1e-14)])
def test_matmul(count, rows, inner, columns, dtype, tolerance):
    for left, right in itertools.product(READ_IN_PLACE | COPIED, repeat=2):
        a = laid_out(left, (count, rows, inner), dtype, seed=1)
        b = laid_out(right, (count, inner, columns), dtype, seed=2)
        before = cupy.asnumpy(a), cupy.asnumpy(b)
        product = cupy_backend.matmul(a, b)
        assert product.dtype == dtype
        assert_is_product(product, a, b, tolerance)
        np.testing.assert_array_equal(cupy.asnumpy(a), before[0])
        np.testing.assert_array_equal(cupy.asnumpy(b), before[1])


def test_matmul_copies_no_operand_that_cublas_can_read(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an operand may have been copied")

    monkeypatch.setattr(cupy, "ascontiguousarray", refuse)
    monkeypatch.setattr(cupy, "matmul", refuse)
    for shape in [(3, 5, 5), (1, 5, 5), (3, 1, 1), (1, 1, 1)]:
        for left, right in itertools.product(READ_IN_PLACE, repeat=2):
            a, b = laid_out(left, shape, np.float32, seed=1), laid_out(right, shape, np.float32, seed=2)
            assert_is_product(cupy_backend.matmul(a, b), a, b, 2e-6)


@pytest.mark.parametrize("columns", [1, 3])
def test_matmul_of_very_many_matrices(columns):
    a = laid_out("transposed", (70_000, 4, 5), np.float32, seed=1)
    b = laid_out("part", (70_000, 5, columns), np.float32, seed=2)
    assert_is_product(cupy_backend.matmul(a, b), a, b, 2e-6)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (numbers((3, 4)), numbers((4, 2))),
        (numbers((3, 4, 5)), numbers((5, 2))),
        (numbers((1, 4, 5)), numbers((3, 5, 2))),
        (numbers((3, 4, 5)), numbers((3, 5, 2), np.float64)),
        (np.arange(8).reshape(2, 2, 2), np.arange(8).reshape(2, 2, 2)),
        (numbers((3, 4, 0)), numbers((3, 0, 2))),
        (numbers((0, 4, 5)), numbers((0, 5, 2))),
        (numbers((3, 0, 5)), numbers((3, 5, 2))),
        (numbers((3, 4, 5)), numbers((3, 5, 0))),
    ],
)
def test_matmul_leaves_other_operands_to_cupy(a, b):
    product = cupy_backend.matmul(cupy.asarray(a), cupy.asarray(b))
    assert product.dtype == (a @ b).dtype
    assert product.shape == (a @ b).shape
    np.testing.assert_allclose(cupy.asnumpy(product), a @ b, rtol=1e-4, atol=1e-5)


def test_matmul_refuses_what_does_not_fit():
    with pytest.raises(ValueError):
        cupy_backend.matmul(cupy.ones((2, 3, 4), np.float32), cupy.ones((2, 3, 4), np.float32))


@pytest.mark.parametrize("size", range(1, 33))
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_inverse_factor(size, dtype, tolerance):
    matrices = positive_definite(6, size).astype(dtype)
    for layout in [layout for layout in READ_IN_PLACE | COPIED if layout != "one for all"]:
        x = lower_triangles(matrices, layout)
        before = cupy.asnumpy(x)
        inverse, diagonal = cupy_backend.inverse_factor(x, 0.25)
        factor = np.linalg.cholesky(matrices.astype(np.float64) + 0.25 * np.eye(size))
        expected = np.linalg.inv(factor)
        assert inverse.dtype == diagonal.dtype == dtype
        assert inverse.flags.c_contiguous
        assert diagonal.shape == (6, size)
        np.testing.assert_allclose(cupy.asnumpy(inverse), expected, rtol=0, atol=tolerance * np.abs(expected).max())
        np.testing.assert_allclose(
            cupy.asnumpy(diagonal), np.diagonal(factor, axis1=1, axis2=2), rtol=tolerance * np.linalg.cond(factor).max()
        )
        assert not np.triu(cupy.asnumpy(inverse), 1).any()
        np.testing.assert_array_equal(cupy.asnumpy(x), before)


@pytest.mark.parametrize("shape", [(6,), (6, 1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_inverse_factor_with_a_shift_for_each_matrix(shape, dtype, tolerance):
    matrices, shifts = positive_definite(6, 20).astype(dtype), np.linspace(0.25, 3, 6).astype(dtype)
    inverse, diagonal = cupy_backend.inverse_factor(lower_triangles(matrices), cupy.asarray(shifts).reshape(shape))
    for i in range(6):
        alone, pivots = cupy_backend.inverse_factor(lower_triangles(matrices[i : i + 1]), float(shifts[i]))
        np.testing.assert_allclose(cupy.asnumpy(inverse[i]), cupy.asnumpy(alone[0]), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(cupy.asnumpy(diagonal[i]), cupy.asnumpy(pivots[0]), rtol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fault", [-1.0, 0.0, np.nan, np.inf, -np.inf])
def test_a_matrix_without_a_factor_gives_nan_and_spoils_no_other(size, dtype, fault):
    good = positive_definite(size, size) + 0.25 * np.eye(size)
    bad = good.copy()
    bad[np.arange(size), np.arange(size), np.arange(size)] = fault  # in row i of matrix i
    both = np.stack([good, bad], axis=1).reshape(-1, size, size).astype(dtype)
    inverse, diagonal = (cupy.asnumpy(x) for x in cupy_backend.inverse_factor(lower_triangles(both), 0.0))
    below = np.tril(np.ones((size, size), bool))
    assert np.isfinite(inverse[::2]).all()
    assert np.isfinite(diagonal[::2]).all()
    for i in range(size):
        np.testing.assert_array_equal(inverse[2 * i + 1, :i], inverse[2 * i, :i])
        np.testing.assert_array_equal(diagonal[2 * i + 1, :i], diagonal[2 * i, :i])
        assert np.isnan(diagonal[2 * i + 1, i:]).all()
        assert np.isnan(inverse[2 * i + 1, i:][below[i:]]).all()
        assert not inverse[2 * i + 1, i:][~below[i:]].any()


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, 1e30])
def test_a_fault_beside_the_diagonal_is_seen_in_its_row(fault):
    matrices = positive_definite(3, 20).astype(np.float32)
    matrices[1, 12, 5] = fault
    inverse, diagonal = (cupy.asnumpy(x) for x in cupy_backend.inverse_factor(lower_triangles(matrices), 0.5))
    assert np.isfinite(inverse[[0, 2]]).all()
    assert np.isfinite(inverse[1, :12]).all()
    assert np.isnan(diagonal[1, 12:]).all()
    assert np.isnan(inverse[1, 12:, :13]).all()


def test_inverse_factor_of_very_many_matrices():
    matrices = positive_definite(500, 20).astype(np.float32)
    few, few_diagonals = cupy_backend.inverse_factor(cupy.asarray(matrices), 0.5)
    many, many_diagonals = cupy_backend.inverse_factor(cupy.asarray(np.tile(matrices, (200, 1, 1))), 0.5)
    assert bool((many.reshape(200, *few.shape) == few).all())
    assert bool((many_diagonals.reshape(200, *few_diagonals.shape) == few_diagonals).all())


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0)])
def test_inverse_factor_of_nothing(shape):
    inverse, diagonal = cupy_backend.inverse_factor(cupy.zeros(shape, np.float32), 1.0)
    assert inverse.shape == shape
    assert diagonal.shape == shape[:2]


def test_inverse_factor_refuses_large_matrices():
    with pytest.raises(ValueError, match="33 rows"):
        cupy_backend.inverse_factor(cupy.zeros((1, 33, 33), np.float32), 1.0)


def test_matmul_and_inverse_factor_wait_for_the_work_of_the_current_stream():
    a, b = numbers((3, 64, 48)), numbers((3, 48, 40))
    matrices = positive_definite(3, 32).astype(np.float32)
    x, y, z = cupy.asarray(a), cupy.asarray(b), cupy.asarray(matrices)
    x += 0  # compiles or loads all that is used below: none of it may wait for that
    z *= 1
    spin(0)
    cupy_backend.matmul(x, y)
    cupy_backend.inverse_factor(z, 1.0)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as work:
        spin(50)
        x += 1
        z *= 2
        product = cupy_backend.matmul(x, y)
        inverse, _ = cupy_backend.inverse_factor(z, 1.0)
        work.synchronize()
    np.testing.assert_allclose(cupy.asnumpy(product), (a + 1) @ b, rtol=0, atol=1e-3)
    expected = np.linalg.inv(np.linalg.cholesky(2 * matrices.astype(np.float64) + np.eye(32)))
    np.testing.assert_allclose(cupy.asnumpy(inverse), expected, rtol=0, atol=1e-4)


def test_kernels_run_where_their_arrays_are(backend):
    if "cuda:1" not in backend.devices():
        pytest.skip("needs two CUDA devices")
    with cupy.cuda.Device(1):
        x = cupy.ones((2, 10, 3), np.float32)
    sums = cupy_backend.column_sums_of_squares(x)
    assert sums.device.id == 1
    np.testing.assert_array_equal(backend.to_numpy(sums), np.full((2, 3), 10))
    assert cupy_backend.saliency(x, x).device.id == 1
    product = cupy_backend.matmul(x.transpose(0, 2, 1), x)
    assert product.device.id == 1
    np.testing.assert_array_equal(backend.to_numpy(product), np.full((2, 3, 3), 10))
    inverse, diagonal = cupy_backend.inverse_factor(product, 6.0)
    assert inverse.device.id == diagonal.device.id == 1
    np.testing.assert_array_equal(backend.to_numpy(diagonal)[:, 0], 4)
