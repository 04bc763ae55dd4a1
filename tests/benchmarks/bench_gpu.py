"""Test and measure a pruning step on an NVIDIA GPU, with CuPy and PyTorch side by side, in at most eight minutes.

    python tests/benchmarks/bench_gpu.py

It needs PyTorch, CuPy and the packages of the extra `test-core`; `make bench-gpu` installs them. It runs the GPU tests,
measures, and writes docs/benchmarks-gpu.md row by row. To check the script without a GPU:

    python tests/benchmarks/bench_gpu.py --devices cpu torch:cpu --weights 200_000 --rows 64 256
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import logging
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]  # a checkout need not be installed

from machine import YOURS_WILL_DIFFER, commit  # noqa: E402

import mfac_core  # noqa: E402
from mfac_core.backends import Array, Device, resolve_device  # noqa: E402
from mfac_core.fisher.blockwise import BlockwiseFisher  # noqa: E402
from mfac_core.fisher.obs import independent_update, saliency  # noqa: E402
from mfac_core.fisher.window import GradientWindow  # noqa: E402
from mfac_core.masks.selection import least_salient  # noqa: E402
from mfac_core.pruners.memory import WORKING_GROUPS  # noqa: E402
from mfac_core.pruners.step import RTOL, mfac_step  # noqa: E402

OUTPUT = ROOT / "docs" / "benchmarks-gpu.md"
BLOCK_SIZE = 2000
DAMPING = 1e-5
SPARSITY = 0.5
REPEATS = 3
LAYER = 10_000  # consecutive weights that share a scale
GIB = 2**30
HOST_RESERVE = 4 * GIB  # host memory that stays free beside a window
COLUMNS = (
    "d", "m", "window", "GiB", "device", "step", "spread", "ratio", "diagonal", "mask", "update", "floor ratio",
    "memory", "float64", "differ",
)  # fmt: skip
LEGEND = f"""\
* *window*: where the gradients are, and their size in GiB; the devices of a row read the same window
* *step*: seconds, median of {REPEATS} rounds (fewer if time runs out) after a warm-up, the devices in turn; *spread*:
  longest minus shortest; *ratio*: step over that of the first device, median of the rounds
* *diagonal*, *mask*, *update*: seconds of these parts of a step
* *floor ratio*: step over the time of `2 m min(m, B) d` operations at the rate of the device's matrix product
* *memory*: peak memory of the step on the GPU, beyond the window, in GiB
* *float64*: share of the groups of blocks for which float32 does not suffice
* *differ*: weights that are pruned by this device or the first, but not by both"""


def main() -> None:
    """Run the tests, measure, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cupy:cuda:0", "torch:cuda:0"], help="%(default)s")
    parser.add_argument("--weights", type=int, default=25_500_000, help="as many as ResNet-50 has: %(default)s")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024], help="gradient samples: %(default)s")
    parser.add_argument("--seconds", type=float, default=480, help="what may take longer is skipped: %(default)s")
    parser.add_argument("--output", type=Path, help=f"the document; {OUTPUT.relative_to(ROOT)} if a GPU is measured")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    if find_spec("torch"):
        import mfac_torch  # noqa: F401  (makes PyTorch's devices known)
    try:
        devices = [resolve_device(name) for name in arguments.devices]
    except mfac_core.DeviceError as error:
        parser.error(f"{error}; this script measures an NVIDIA GPU, or what --devices names")
    has_gpu = any(map(is_gpu, devices))
    report = Report(arguments.output or (OUTPUT if has_gpu else None))
    report.add(*heading(devices))
    report.add(outcome_of_tests(deadline) if has_gpu else "The GPU tests are not run without a GPU.", "")
    rates = {label(device): product_rate(device) for device in {resolve_device("cpu"): None, **dict.fromkeys(devices)}}
    report.add(*(f"* matrix product of {each}: {rate / 1e12:.3g} TFLOP/s in float32" for each, rate in rates.items()))
    report.add(LEGEND, "", f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS))
    shapes = [Shape(arguments.weights, m, place) for place in ("device", "host") for m in arguments.rows]
    # the masks of all devices beside those of the CPU, on a hundredth of the weights
    small = [Shape(arguments.weights // 100, m, "host") for m in arguments.rows]
    with logged_warnings() as warnings:
        for shape in small + shapes:
            measured = list(dict.fromkeys([resolve_device("cpu"), *devices])) if shape in small else devices
            start = f"| {shape.d:,} | {shape.m} | {shape.place} | {shape.num_bytes / GIB:.1f} | "
            report.add(*(f"{start}{row} |" for row in rows_of(shape, measured, rates, deadline)))
    report.add("", f"Warnings while measuring: {'; '.join(warnings) or 'none'}.")


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect the warnings that are logged, such as that page-locked memory is refused."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("mfac_core", "mfac_torch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class Report:
    """The document, printed and written as it grows."""

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
    """A problem: the number of weights, that of gradient samples, and where the window is."""

    d: int
    m: int
    place: str

    @property
    def num_bytes(self) -> int:
        return 4 * self.d * self.m

    @property
    def operations(self) -> float:
        return 2.0 * self.m * min(self.m, BLOCK_SIZE) * self.d


def is_gpu(device: Device) -> bool:
    return device.name != "cpu"


def label(device: Device) -> str:
    return f"{device.backend.name}:{device.name}"


def outcome_of_tests(deadline: float) -> str:
    """Run the GPU tests in another process, and return their outcome."""
    print("Running the GPU tests ...", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=line", "tests/core", "tests/gpu"]
    seconds = 0.4 * (deadline - time.monotonic())
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"`pytest -m gpu tests/core tests/gpu` was ended after {seconds:.0f} seconds."
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    failures = [f"\n* {line}" for line in lines if line.startswith(("FAILED", "ERROR"))]
    return f"`pytest -m gpu tests/core tests/gpu`: {lines[-1].strip('= ')}." + "".join(failures)


def product_rate(device: Device) -> float:
    """Return the rate of float32 matrix products in operations per second."""
    size = 8192 if is_gpu(device) else 1024
    a = device.asarray(np.random.default_rng(0).standard_normal((size, size), dtype=np.float32))
    with device.backend.on(device.name):
        return 2 * size**3 / min(timed(device, lambda: a @ a)[0] for _ in range(5))


def rows_of(shape: Shape, devices: list[Device], rates: dict[str, float], deadline: float) -> list[str]:
    """Return a row for each device, or a single one that says why the shape was skipped or what failed."""
    # a step may take five times its floor
    needed = sum(5 * (REPEATS + 2) * shape.operations / rates[label(each)] for each in devices) + shape.num_bytes / 1e9
    left = deadline - time.monotonic()
    if needed > left:
        return [f"skipped: it may take {needed:.0f} seconds, and {left:.0f} are left"]
    release_memory()
    if shape.place == "host":
        free, room = psutil.virtual_memory().available, HOST_RESERVE
    else:
        free = devices[0].backend.free_bytes(devices[0].name) or sys.maxsize
        room = WORKING_GROUPS * devices[0].backend.group_bytes(devices[0].name, shape.num_bytes)
    if shape.num_bytes + room > free:
        return [f"skipped: it needs {(shape.num_bytes + room) / GIB:.1f} GiB, and {free / GIB:.1f} are free"]
    try:
        return measure(shape, devices, rates, deadline)
    except Exception as error:  # must not end the other measurements
        message = str(error).partition("\n")[0].replace("|", "/")
        return [f"failed: {type(error).__name__}: {message[:200]}"]


def measure(shape: Shape, devices: list[Device], rates: dict[str, float], deadline: float) -> list[str]:
    window = filled_window(shape, devices)
    weights = np.random.default_rng(1).standard_normal(shape.d, dtype=np.float32)
    runs = [Run(device, seen_by(device, window), device.asarray(weights)) for device in devices]
    first_steps = [run.first_step() for run in runs]
    rounds: list[list[float]] = []
    while not rounds or (len(rounds) < REPEATS and time.monotonic() < deadline):
        rounds.append([timed(run.device, run.step)[0] for run in runs])
    rows = []
    for i, run in enumerate(runs):
        steps = [seconds[i] for seconds in rounds]
        step = statistics.median(steps)
        pruned, memory = first_steps[i]
        parts, float64 = run.parts()
        cells = [
            label(run.device), f"{step:.3g}", f"{max(steps) - min(steps):.2g}",
            f"{statistics.median(seconds[i] / seconds[0] for seconds in rounds):.2f}",
            *(f"{seconds:.3g}" for seconds in parts), f"{step * rates[label(run.device)] / shape.operations:.1f}",
            memory, f"{float64:.0%}", f"{np.count_nonzero(pruned != first_steps[0][0]):,}",
        ]  # fmt: skip
        rows.append(" | ".join(cells))
    return rows


class Run:
    """The pruning step of one window on one device."""

    def __init__(self, device: Device, window: GradientWindow, weights: Array) -> None:
        self.device = device
        self._window = window
        self._weights = weights

    def step(self) -> Array:
        """Return which weights are pruned."""
        options = {"damping": DAMPING, "update": "independent", "devices": self.device}
        return mfac_step(self._weights, self._window, self._select, **options).newly_pruned

    def first_step(self) -> tuple[np.ndarray, str]:
        """Return which weights are pruned, in host memory, and the peak memory on a GPU in GiB."""
        with self.device.backend.on(self.device.name):
            peak = peak_memory(self.device)
            pruned = self.device.to_numpy(self.step())
            return pruned, f"{peak() / GIB:.2f}" if is_gpu(self.device) else ""

    def parts(self) -> tuple[list[float], float]:
        """Return the seconds of the diagonal, the mask and the update, and the share of groups in float64."""
        device, weights = self.device, self._weights
        with device.backend.on(device.name):
            fisher = BlockwiseFisher(self._window, damping=DAMPING, devices=device, rtol=RTOL)
            of_diagonal, diagonal = timed(device, fisher.diagonal)
            saliencies = saliency(weights, diagonal)
            of_mask, pruned = timed(device, lambda: self._select(saliencies))
            of_update, _ = timed(device, lambda: independent_update(fisher, weights, pruned, diagonal))
        return [of_diagonal, of_mask, of_update], fisher.float64_share

    def _select(self, saliencies: Array) -> Array:
        return least_salient(saliencies, round(SPARSITY * self._window.num_weights))


def timed(device: Device, function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    device.backend.synchronize(device.name)
    started = time.perf_counter()
    result = function()
    device.backend.synchronize(device.name)
    return time.perf_counter() - started, result


def filled_window(shape: Shape, devices: list[Device]) -> GradientWindow:
    """Return a full window of gradients like those of networks, drawn on the last device.

    Scales spread over decades: those of layers over three, those of the columns of a layer over another two. The
    samples differ in size by a lognormal factor and share a mean of half the standard deviation.
    """
    source, target = devices[-1], resolve_device("cpu") if shape.place == "host" else devices[0]
    consumers = [device for device in devices if is_gpu(device)] if shape.place == "host" else []
    window = GradientWindow(shape.d, shape.m, block_size=BLOCK_SIZE, device=target, consumers=consumers)
    rng = np.random.default_rng(0)
    layers = np.repeat(10 ** rng.uniform(-3, 0, -(-shape.d // LAYER)), LAYER)[: shape.d]
    scales = source.asarray((layers * 10 ** rng.normal(0, 0.5, shape.d)).astype(np.float32))
    mean = source.asarray(0.5 * rng.standard_normal(shape.d, dtype=np.float32))
    with source.backend.on(source.name):
        for normal in itertools.islice(normal_numbers(source, shape.d), shape.m):
            row = source.backend.fetch(float(rng.lognormal()) * scales * (mean + normal))()
            window.push(row)
    return window


def normal_numbers(device: Device, count: int) -> Iterator[Array]:
    if device.backend.name == "torch":
        import torch

        generator = torch.Generator(device.name).manual_seed(0)
        while True:
            yield torch.randn(count, generator=generator, device=device.name)
    library: Any = np
    if device.backend.name == "cupy":
        import cupy as library
    rng = library.random.default_rng(0)
    while True:
        yield rng.standard_normal(count, dtype=np.float32)


def seen_by(device: Device, window: GradientWindow) -> GradientWindow:
    """Return a window whose rows are arrays of the device's library, in the same memory."""
    if window.device.is_host or window.device.backend is device.backend:
        return window
    convert = device.asarray
    if device.backend.name == "torch":
        from torch import from_dlpack as convert
    seen = copy.copy(window)
    seen._storage = [[convert(chunk) for chunk in chunks] for chunks in window._storage]
    return seen


def release_memory() -> None:
    """Give all unused memory back, so that both libraries can take it."""
    gc.collect()
    if "cupy" in sys.modules and sys.modules["cupy"].cuda.is_available():
        sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
        sys.modules["cupy"].get_default_pinned_memory_pool().free_all_blocks()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def peak_memory(device: Device) -> Callable[[], int]:
    """Return a function that gives the most bytes in use on a GPU since now, beyond those in use already."""
    release_memory()
    if device.backend.name == "cupy":
        import cupy

        pool = cupy.get_default_memory_pool()
        before = pool.total_bytes()
        return lambda: pool.total_bytes() - before
    if device.name.startswith("cuda"):
        from torch import cuda

        cuda.reset_peak_memory_stats(device.name)
        before = cuda.memory_allocated(device.name)
        return lambda: cuda.max_memory_allocated(device.name) - before
    return lambda: 0


def heading(devices: list[Device]) -> list[str]:
    """Return the lines above the numbers."""
    versions = [f"{name} {sys.modules[name].__version__}" for name in ("numpy", "torch", "cupy") if name in sys.modules]
    machine = f"{psutil.cpu_count()} cores and {psutil.virtual_memory().total / GIB:.0f} GiB of host memory"
    return [
        "# Benchmarks on a GPU",
        "",
        "One pruning step: inverse diagonal, saliency, mask, independent update, new weights. float32,",
        f"B = {BLOCK_SIZE}, damping {DAMPING:g}, gradients whose scales spread over decades; {SPARSITY:.0%} of the",
        "weights are pruned.",
        "",
        f"Made by `{shlex.join(['tests/benchmarks/bench_gpu.py', *sys.argv[1:]])}` on {gpu_name(devices)}, {machine}; "
        f"mfac-core {mfac_core.__version__}, {', '.join(versions)}, Python {platform.python_version()}, "
        f"{platform.system()}. Measured at commit {commit()}.",
        YOURS_WILL_DIFFER,
        "",
    ]


def gpu_name(devices: list[Device]) -> str:
    if not any(map(is_gpu, devices)):
        return "the CPU alone, to check the script"
    if shutil.which("nvidia-smi") is None:
        return "a GPU that nvidia-smi does not name"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    gpus = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return f"{len(gpus)} GPU(s): {'; '.join(dict.fromkeys(gpus))} (memory, driver)"


if __name__ == "__main__":
    main()
