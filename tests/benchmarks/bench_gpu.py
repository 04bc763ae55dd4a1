"""Measure a whole pruning step on one GPU against the limits of that GPU and against the textbook recursion.

Run it from the root of the project: ``python tests/benchmarks/bench_gpu.py [--write PATH]``. It needs CuPy, and PyTorch
with CUDA for the textbook recursion. With ``--write`` the output also goes to a Markdown file, row by row.
``--profile`` shows instead where the time of one shape goes. ``--device cpu`` runs everything on NumPy with tiny
shapes, to check this script without a GPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import operator
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import YOURS_WILL_DIFFER, commit

import mfac_core
from mfac_core.backends import Array, resolve_device
from mfac_core.fisher.blockwise import BlockwiseFisher
from mfac_core.fisher.factors import evaluate, fisher_quadratic
from mfac_core.fisher.kernels import matmul
from mfac_core.fisher.obs import saliency
from mfac_core.fisher.triangular import cholesky
from mfac_core.fisher.window import GradientWindow
from mfac_core.masks.selection import least_salient
from mfac_core.pruners.memory import WORKING_GROUPS
from mfac_core.pruners.step import mfac_step

SHAPES = ([25_500_000, 85_000_000], [1024, 256, 64], 2000)  # d (ResNet-50, the encoder of BERT-base), m, B
TINY_SHAPES = ([20_050], [64, 16], 100)  # on the CPU
PLACES = ("device", "host")
SPARSITY = 0.5
DAMPING = 1e-5
GIB = 2**30
HOST_RESERVE = 4 * GIB  # host memory to leave free next to a window, for the weights and other processes
TEXTBOOK_BYTES = GIB  # largest input of the textbook variants; they need three times as much in addition
TEXTBOOK_SECONDS = 0.5  # a variant that takes this long is not tried on four times as many blocks
COLUMNS = (
    "d", "m", "B", "window", "GiB", "push", "step", "spread", "diagonal", "floor", "limit", "share", "textbook",
    "memory",
)  # fmt: skip
LEGEND = """\
* *window*: where the gradients are stored, and the size of the window in GiB; *push*: time to store one gradient sample
  of the device there, with nothing else running, in ms (median)
* *step*: seconds, median of the repeats after one warm-up; *spread*: longest minus shortest
* *diagonal*: time of the inverse diagonal alone, in seconds (median)
* *floor*: seconds of `2 m min(m, B) d` operations at the rate of the matrix product
* *limit*: the largest of the floor, reading the window twice from device memory and, for a window in host memory,
  copying it twice to the device; *share*: limit over step
* *textbook*: time of the diagonal with the faster textbook variant of the paper's recursion, over ours
  (`tests/benchmarks/textbook.py` on the same device; measured on some blocks in device memory and scaled to `d`)
* *memory*: peak device memory of the step beyond the window, in GiB
"""


def main() -> None:
    """Measure every shape, and print and write each row as soon as it is complete."""
    started = time.perf_counter()
    # the libraries read these at start-up: float32 matrix products must not be rounded to TF32
    os.environ.update(NVIDIA_TF32_OVERRIDE="0", CUPY_TF32="0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, nargs="+", help="numbers of weights")
    parser.add_argument("--m", type=int, nargs="+", help="numbers of gradients, in the order of the rows")
    parser.add_argument("--block-size", type=int, help="weights per block")
    parser.add_argument("--window", choices=PLACES, help="measure only windows there")
    parser.add_argument("--repeat", type=int, default=3, help="number of repeats for the median (%(default)s)")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no row is started (%(default)s)")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to check this script (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="profile the first shape that fits")
    parser.add_argument("--write", type=Path, metavar="PATH", help="also write the output to this file")
    arguments = parser.parse_args()
    machine = Machine(arguments.device)
    sizes, rows, width = SHAPES if machine.is_gpu else TINY_SHAPES
    places = PLACES if arguments.window is None else (arguments.window,)
    shapes = [
        Shape(d, m, arguments.block_size or width, place)
        for d, place, m in itertools.product(arguments.d or sizes, places, arguments.m or rows)
    ]
    report = Report(arguments.write)
    with machine.device.backend.on(machine.device.name):
        report.add(*_heading(machine, arguments.repeat))
        if arguments.profile:
            _profile_first(machine, shapes, arguments.repeat, report)
        else:
            _measure_all(machine, shapes, arguments.repeat, started + arguments.budget, report)


class Report:
    """The output so far, and the file that it is written to."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[str] = []

    def add(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self._lines += lines
        if self._path:
            self._path.write_text("\n".join(self._lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Shape:
    """The problem that one row measures."""

    d: int
    m: int
    block_size: int
    place: str

    @property
    def num_bytes(self) -> int:
        return 4 * self.d * self.m

    def __str__(self) -> str:
        return f"d = {self.d:,}, m = {self.m}, B = {self.block_size}, window on the {self.place}"


@dataclass(frozen=True)
class Rates:
    """Rates of the device per second: operations of a float32 product, bytes of its memory, bytes from the host.

    The rate of its memory is that of reading, or of reading and writing, whichever is faster.
    """

    product: float
    memory: float
    transfer: float

    def limits(self, shape: Shape) -> dict[str, float]:
        """Return lower bounds on the seconds of a step, by the limiting resource."""
        operations = 2 * shape.m * min(shape.m, shape.block_size) * shape.d
        limits = {"compute": operations / self.product, "device memory": 2 * shape.num_bytes / self.memory}
        if shape.place == "host":
            limits["host to device"] = 2 * shape.num_bytes / self.transfer
        return limits


@dataclass(frozen=True)
class Measurement:
    """The seconds and bytes of one row; ``textbook`` has the name of the variant and the seconds of its diagonal."""

    place: str
    push: float
    steps: list[float]
    diagonal: float
    textbook: tuple[str, float]
    memory: int


class Machine:
    """The measured device, and the differences between a GPU and the CPU."""

    def __init__(self, name: str) -> None:
        self.device = resolve_device(name)
        self.is_gpu = not self.device.is_host
        if self.is_gpu:
            import cupy

            self.xp: Any = cupy
        else:
            self.xp = np
        # sizes of the product and of the copies
        self.product_size, self.copied_bytes = (8192, GIB) if self.is_gpu else (512, 16 * 2**20)
        with self.device.backend.on(self.device.name):
            self._rng = self.xp.random.default_rng(0)

    def normal(self, shape: int | tuple[int, ...]) -> Array:
        return self._rng.standard_normal(shape, dtype=np.float32)

    def synchronize(self) -> None:
        if self.is_gpu:
            self.xp.cuda.Device().synchronize()

    def timed(self, function: Callable[..., Any], *arguments: Any) -> float:
        self.synchronize()
        started = time.perf_counter()
        function(*arguments)
        self.synchronize()
        return time.perf_counter() - started

    def best(self, function: Callable[[], Any]) -> float:
        return min(self.timed(function) for _ in range(10))

    def median(
        self, repeat: int, function: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]] = tuple
    ) -> float:
        """Return the median seconds of ``function(*prepare())`` after one warm-up, not counting ``prepare``."""
        function(*prepare())
        return statistics.median(self.timed(function, *prepare()) for _ in range(repeat))

    def free_memory(self) -> None:
        """Release all unused memory, including that of PyTorch."""
        gc.collect()
        if self.is_gpu:
            self.xp.get_default_memory_pool().free_all_blocks()
            self.xp.get_default_pinned_memory_pool().free_all_blocks()
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()

    def taken_bytes(self) -> int:
        """Return the peak size of CuPy's pool since :meth:`free_memory`."""
        return self.xp.get_default_memory_pool().total_bytes() if self.is_gpu else 0

    def is_page_locked(self, x: Array) -> bool:
        if not self.is_gpu:
            return False
        runtime = self.xp.cuda.runtime
        return runtime.pointerGetAttributes(x.ctypes.data).type == runtime.memoryTypeHost

    def rates(self) -> Rates:
        """Measure the rates of the device."""
        xp = self.xp
        size, num_bytes = self.product_size, self.copied_bytes
        a, b = self.normal((size, size)), self.normal((size, size))
        out = xp.empty_like(a)
        product = 2 * size**3 / self.best(lambda: xp.matmul(a, b, out=out))
        source, target = self.normal(num_bytes // 4), xp.empty(num_bytes // 4, np.float32)
        read = num_bytes / self.best(source.sum)
        copied = 2 * num_bytes / self.best(lambda: xp.copyto(target, source))
        host = self.device.backend.host_zeros(source.shape, source.dtype)
        host.fill(1)
        copy = target.set if self.is_gpu else lambda x: np.copyto(target, x)
        transfer = num_bytes / self.best(lambda: copy(host))
        return Rates(product, max(read, copied), transfer)

    def description(self) -> str:
        """Return a description of the machine and the versions of the software."""
        host = f"{psutil.cpu_count()} cores and {psutil.virtual_memory().total / GIB:.0f} GiB of host memory"
        versions = f"mfac-core {mfac_core.__version__}, NumPy {np.__version__}"
        if find_spec("torch"):
            versions += f", PyTorch {version('torch')}"
        versions += f", Python {platform.python_version()}, {platform.system()}"
        if not self.is_gpu:
            return f"the CPU, with NumPy in place of CuPy: {host}; {versions}"
        runtime = self.xp.cuda.runtime
        name = runtime.getDeviceProperties(self.xp.cuda.Device().id)["name"].decode()
        memory = runtime.memGetInfo()[1] / GIB
        cuda = (
            f"CUDA {_dotted(runtime.runtimeGetVersion())} (driver {_driver()}: {_dotted(runtime.driverGetVersion())})"
        )
        return f"{name}, {memory:.1f} GiB, {host}; {cuda}, CuPy {self.xp.__version__}, {versions}"


def _heading(machine: Machine, repeat: int) -> list[str]:
    command = shlex.join(["tests/benchmarks/bench_gpu.py", *sys.argv[1:]])
    return [
        "# Benchmarks on a GPU",
        "",
        "One pruning step: inverse diagonal, saliency, mask, independent update, new weights. float32, standard normal",
        "gradients and weights, half of the weights pruned.",
        "",
        f"Made by `{command}` with {repeat} repeats on {machine.description()}, at commit {commit()}.",
        YOURS_WILL_DIFFER,
        "",
    ]


def _measure_all(machine: Machine, shapes: list[Shape], repeat: int, deadline: float, report: Report) -> None:
    rates = machine.rates()
    size = f"{machine.product_size} x {machine.product_size} float32 matrix product"
    report.add(
        f"Measured in the same run: {size} {rates.product / 1e12:.3g} TFLOP/s (no TF32), device memory "
        f"{rates.memory / 1e9:.4g} GB/s, copies from page-locked host memory {rates.transfer / 1e9:.3g} GB/s.",
        "",
        LEGEND,
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
    )
    textbook: dict[tuple[int, int], tuple[str, float]] = {}
    for done, shape in enumerate(shapes):
        if time.perf_counter() > deadline:
            left_out = "; ".join(map(str, shapes[done:]))
            report.add("", f"Skipped for lack of time: {left_out}.")
            return
        try:
            machine.free_memory()
            refusal = _no_room(machine, shape)
            row = _row(shape, rates, refusal or _measure(machine, shape, repeat, textbook))
        except Exception as error:  # a failure must not end the other rows
            row = _row(shape, rates, _named(error))
        report.add(row)


def _no_room(machine: Machine, shape: Shape) -> str:
    """Return why the window of a shape does not fit, or an empty string."""
    if shape.place == "device":
        device = machine.device
        room = WORKING_GROUPS * device.backend.group_bytes(device.name, shape.num_bytes)
    else:
        device = resolve_device("cpu")
        room = HOST_RESERVE
    free = device.backend.free_bytes(device.name)
    if free is None or shape.num_bytes + room <= free:
        return ""
    return f"does not fit: {shape.num_bytes:,} bytes and {room:,} of working memory, {free:,} are free"


def _measure(
    machine: Machine, shape: Shape, repeat: int, textbook: dict[tuple[int, int], tuple[str, float]]
) -> Measurement:
    """Return the measurements of one shape; ``textbook`` caches the faster textbook variant by ``m`` and ``B``."""
    window, push = _filled_window(machine, shape)
    weights = machine.device.to_numpy(machine.normal(shape.d))
    machine.free_memory()
    before = machine.taken_bytes()
    _step(machine, window, weights)
    memory = machine.taken_bytes() - before
    steps = [machine.timed(_step, machine, window, weights) for _ in range(repeat)]
    diagonal = machine.median(repeat, lambda: _fisher(machine, window).diagonal())
    machine.free_memory()
    key = (shape.m, shape.block_size)
    failed = ""
    if key not in textbook:
        try:
            textbook[key] = _textbook(machine, window)
        except Exception as error:  # such as a PyTorch without CUDA; the rest of the row is still useful
            failed = _named(error)
    name, per_weight = textbook.get(key, (failed, float("nan")))
    chunks = [chunk for group in window.stored_groups for chunk in window.chunks(group)]
    is_pinned = shape.place == "host" and all(map(machine.is_page_locked, chunks))
    place = "pinned host" if is_pinned else shape.place
    return Measurement(place, push, steps, diagonal, (name, per_weight * shape.d), memory)


def _filled_window(machine: Machine, shape: Shape) -> tuple[GradientWindow, float]:
    """Return a full window, and the median seconds to store one gradient sample from the device."""
    device = machine.device
    if shape.place == "device":
        window = GradientWindow(shape.d, shape.m, block_size=shape.block_size, device=device)
        store = window.push
    else:
        window = GradientWindow(shape.d, shape.m, block_size=shape.block_size, device="cpu", consumers=[device])

        def store(row: Array) -> None:
            window.push(device.backend.fetch(row)())

    return window, statistics.median(machine.timed(store, machine.normal(shape.d)) for _ in range(shape.m))


def _step(machine: Machine, window: GradientWindow, weights: Array) -> None:
    mfac_step(
        weights,
        window,
        lambda saliencies: least_salient(saliencies, round(len(weights) * SPARSITY)),
        damping=DAMPING,
        update="independent",
        devices=machine.device,
    )


def _fisher(machine: Machine, window: GradientWindow) -> BlockwiseFisher:
    return BlockwiseFisher(window, damping=DAMPING, devices=machine.device)


def _textbook(machine: Machine, window: GradientWindow) -> tuple[str, float]:
    """Return the name and the seconds per weight of the faster textbook variant on the device."""
    import textbook
    import torch

    torch.set_float32_matmul_precision("highest")
    group = window.stored_groups[0]
    count = max(1, min(group.count, TEXTBOOK_BYTES // (4 * window.count * group.width)))
    chunks = [machine.device.asarray(chunk[:count, :, :]) for chunk in window.chunks(group)]
    blocks = torch.from_dlpack(machine.xp.concatenate(chunks, axis=-1) if len(chunks) > 1 else chunks[0])
    functions = (textbook.batched_torch, textbook.single_block_torch)
    seconds = {function.__name__: _seconds_per_block(machine, function, blocks) for function in functions}
    name = min(seconds, key=seconds.__getitem__)
    return name.replace("_", " "), seconds[name] / group.width


def _seconds_per_block(machine: Machine, function: Callable[[Any, float], Any], blocks: Any) -> float:
    """Return the fewest seconds per block, on as many blocks as :data:`TEXTBOOK_SECONDS` allows."""
    function(blocks[:1], DAMPING)
    best, count = float("inf"), 1
    while True:
        seconds = min(machine.timed(function, blocks[:count], DAMPING) for _ in range(2))
        best = min(best, seconds / count)
        if count == len(blocks) or seconds > TEXTBOOK_SECONDS:
            return best
        count = min(4 * count, len(blocks))


def _row(shape: Shape, rates: Rates, measured: Measurement | str) -> str:
    """Return a row of the table, with measurements or the reason why there are none."""
    cells = [f"{shape.d:,}", shape.m, shape.block_size]
    if isinstance(measured, str):
        cells += [shape.place, f"{shape.num_bytes / GIB:.1f}", "", measured]
    else:
        step = statistics.median(measured.steps)
        limits = rates.limits(shape)
        limit = max(limits, key=limits.__getitem__)
        name, textbook = measured.textbook
        cells += [
            measured.place, f"{shape.num_bytes / GIB:.1f}", f"{1e3 * measured.push:.3g}", f"{step:.3g}",
            f"{max(measured.steps) - min(measured.steps):.2g}", f"{measured.diagonal:.3g}", f"{limits['compute']:.3g}",
            f"{limits[limit]:.3g} ({limit})", f"{limits[limit] / step:.2f}",
            f"{textbook / measured.diagonal:.3g} ({name})", f"{measured.memory / GIB:.2f}",
        ]  # fmt: skip
    cells += [""] * (len(COLUMNS) - len(cells))
    return f"| {' | '.join(map(str, cells))} |"


def _named(error: Exception) -> str:
    message = str(error).partition("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {message}"[:200]


def _profile_first(machine: Machine, shapes: list[Shape], repeat: int, report: Report) -> None:
    for shape in shapes:
        if shape.m >= shape.block_size:
            report.add(f"No profile of {shape}: its blocks are not wider than there are gradients.", "")
        elif refusal := _no_room(machine, shape):
            report.add(f"No profile of {shape}: {refusal}.", "")
        else:
            report.add(*_profile(machine, shape, repeat))
            return


def _profile(machine: Machine, shape: Shape, repeat: int) -> list[str]:
    """Return a table of the parts of one step: measured on the first group of blocks, and scaled to all."""
    window, _ = _filled_window(machine, shape)
    groups = _fisher(machine, window).groups
    group = groups[0]
    chunks = [machine.device.asarray(chunk) for chunk in window.chunks(group)]
    x = machine.normal((group.count, group.width))
    gram = _gram(chunks)
    factor, _ = evaluate(chunks, DAMPING)
    lower = cholesky(gram.copy(), shape.m * DAMPING)
    weights, saliencies = machine.normal(shape.d), machine.normal(shape.d)
    ones = machine.xp.ones_like(weights)
    host_weights = machine.device.to_numpy(weights)
    columns = group.count * group.width
    num_bytes = 4 * shape.m * columns
    product = 2 * shape.m**2 * columns

    def median(function: Callable[..., Any], prepare: Callable[[], tuple[Any, ...]] = tuple) -> float:
        return machine.median(repeat, function, prepare)

    scale = shape.d / columns
    rows = [
        # what, seconds on the group, how many groups there are, operations and bytes of the group
        ("Gram product", median(lambda: _gram(chunks)), scale, product, 0),
        (
            "Cholesky",
            median(lambda matrices: cholesky(matrices, shape.m * DAMPING), lambda: (gram.copy(),)),
            scale,
            group.count * shape.m**3 / 3,
            0,
        ),
        ("column sums", median(lambda: [lower.column_sums(chunk) for chunk in chunks]), scale, product / 2, 0),
        ("all of `evaluate`: these three", median(lambda: evaluate(chunks, DAMPING)), scale, 0, 0),
        ("apply", median(lambda: factor.apply(chunks, x[..., None])), scale, 0, 2 * num_bytes),
        ("predicted loss increase", median(lambda: fisher_quadratic(chunks, x, DAMPING)), scale, 0, num_bytes),
        ("saliency", median(lambda: saliency(weights, ones)), 1, 0, 12 * shape.d),
        ("selection", median(lambda: least_salient(saliencies, round(shape.d * SPARSITY))), 1, 0, 4 * shape.d),
        ("diagonal pass", median(lambda: _fisher(machine, window).diagonal()), 1, 0, 0),
        ("whole step", median(lambda: _step(machine, window, host_weights)), 1, 0, 0),
    ]
    whole = rows[-1][1]
    precise = "all" if factor.in_float64 is True else "none" if factor.in_float64 is False else "some"
    return [
        f"{shape}: {group.count} blocks in the first of {len(groups)} groups, {precise} of them in float64; median of "
        f"{repeat} after a warm-up, in seconds. Operations are counted as needed, not as executed.",
        "",
        "| part | one group | all | of the step | TFLOP/s | GB/s |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {f'{seconds:.3g}' if count != 1 else ''} | {seconds * count:.3g} | "
            f"{seconds * count / whole:.0%} | {f'{operations / seconds / 1e12:.3g}' if operations else ''} | "
            f"{f'{moved / seconds / 1e9:.4g}' if moved else ''} |"
            for name, seconds, count, operations, moved in rows
        ),
        "",
    ]


def _gram(chunks: Iterable[Array]) -> Array:
    return reduce(operator.iadd, (matmul(chunk, chunk.transpose(0, 2, 1)) for chunk in chunks))


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "of unknown version"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0].strip()


def _dotted(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


if __name__ == "__main__":
    main()
