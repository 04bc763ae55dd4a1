"""Test and measure a pruning step on an NVIDIA GPU, by CuPy and by PyTorch side by side, in at most eight minutes.

    python tests/benchmarks/bench_gpu.py

From the root of the project, with NumPy, PyTorch, CuPy and the packages of the extra `test-core` installed, or by
`make bench-gpu`, which installs them. It runs the tests in tests/gpu, measures, and writes docs/benchmarks-gpu.md row
by row. To check the script on a CPU, in seconds:

    python tests/benchmarks/bench_gpu.py --devices cpu torch:cpu --weights 200_000 --rows 64 256
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
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
from mfac_core.pruners.step import mfac_step  # noqa: E402

OUTPUT = ROOT / "docs" / "benchmarks-gpu.md"
BLOCK_SIZE = 2000
DAMPING = 1e-5
SPARSITY = 0.5
REPEATS = 3
LAYER = 10_000  # consecutive weights that share a scale
GIB = 2**30
HOST_RESERVE = 4 * GIB  # host memory that stays free beside a window
COLUMNS = (
    "m", "window", "GiB", "device", "step", "spread", "ratio", "diagonal", "mask", "update", "floor ratio", "memory",
    "float64", "differ",
)  # fmt: skip
LEGEND = f"""\
* *window*: where the gradients are, and their size in GiB; all devices of a row read the same window
* *step*: seconds, median of {REPEATS} after a warm-up, the devices taking turns; *spread*: longest minus shortest;
  *ratio*: step over that of the first device, median of the rounds
* *diagonal*, *mask*, *update*: seconds of these parts of a step
* *floor ratio*: step over the time of `2 m min(m, B) d` operations at the rate of the device's matrix product
* *memory*: peak memory of the step on the GPU, beyond the window, in GiB
* *float64*: share of the groups of blocks that float32 does not suffice for
* *differ*: weights whose mask differs from that of the first device"""


def main() -> None:
    """Run the tests, measure, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cupy:cuda:0", "torch:cuda:0"], help="%(default)s")
    parser.add_argument("--weights", type=int, default=25_500_000, help="number of weights (%(default)s: ResNet-50)")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024], help="gradient samples (%(default)s)")
    parser.add_argument("--seconds", type=float, default=480, help="nothing starts that would end later (%(default)s)")
    parser.add_argument("--output", type=Path, help=f"the document; {OUTPUT.relative_to(ROOT)} if a GPU is measured")
    arguments = parser.parse_args()
    try:
        devices = named_devices(arguments.devices)
    except mfac_core.MFACError as error:
        parser.error(f"{error}; this script measures an NVIDIA GPU, --devices names others")
    deadline = time.monotonic() + arguments.seconds
    report = Report(arguments.output or (OUTPUT if any(map(is_gpu, devices.values())) else None))
    report.add(*heading(devices, arguments.weights))
    report.add(outcome_of_tests(devices, deadline), "")
    rates = {name: product_rate(device) for name, device in devices.items()}
    report.add(*(f"Matrix product of {name}: {rate / 1e12:.3g} TFLOP/s in float32." for name, rate in rates.items()))
    report.add("", LEGEND, "", f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS))
    for place, m in itertools.product(("device", "host"), arguments.rows):
        shape = Shape(arguments.weights, m, place)
        refusal = no_time(shape, rates, deadline) or no_room(shape, devices)
        rows = [refusal] if refusal else guarded(lambda s=shape: measured(s, devices, rates))
        report.add(*(f"| {m} | {place} | {shape.num_bytes / GIB:.1f} | {row} |" for row in rows))
    report.add("", "## The same masks as on the CPU", "")
    small = arguments.weights // 100
    for m in arguments.rows:
        shape = Shape(small, m, "host")
        refusal = no_time(shape, rates, deadline)
        report.add(
            *(f"* m = {m}, d = {small:,}: {row}" for row in ([refusal] if refusal else differences(shape, devices)))
        )


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
    """The problem of one row."""

    d: int
    m: int
    place: str

    @property
    def num_bytes(self) -> int:
        return 4 * self.d * self.m

    @property
    def operations(self) -> float:
        return 2.0 * self.m * min(self.m, BLOCK_SIZE) * self.d


class Shared:
    """The gradients of a window as arrays of another library, in the same memory."""

    def __init__(self, window: GradientWindow, device: Device) -> None:
        self.stored_groups, self.num_weights = window.stored_groups, window.num_weights
        self.dtype, self.count = window.dtype, window.count
        self._window, self._device = window, device

    def chunks(self, group: Any) -> list[Array]:
        chunks = self._window.chunks(group)
        if self._window.device.is_host or self._window.device.backend is self._device.backend:
            return chunks
        if self._device.backend.name == "torch":
            import torch

            return [torch.from_dlpack(chunk) for chunk in chunks]
        return [self._device.asarray(chunk) for chunk in chunks]


def named_devices(names: list[str]) -> dict[str, Device]:
    """Return the devices by the names `LIBRARY:DEVICE`."""
    if find_spec("torch"):
        import mfac_torch  # noqa: F401  (registers PyTorch as an array library)
    devices = [resolve_device(name) for name in names]
    return {f"{device.backend.name}:{device.name}": device for device in devices}


def is_gpu(device: Device) -> bool:
    return device.name != "cpu"


def outcome_of_tests(devices: dict[str, Device], deadline: float) -> str:
    """Run the tests of GPUs in another process, and return a sentence about their outcome."""
    if not any(map(is_gpu, devices.values())):
        return "The tests in tests/gpu were not run: no device is a GPU."
    print("Running the tests in tests/gpu ...", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=line", "tests/gpu"]
    try:
        seconds = 0.4 * (deadline - time.monotonic())
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"`pytest -m gpu tests/gpu` was ended after {seconds:.0f} seconds."
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()[-1:] or ["no output"]
    failures = [f"\n* {line}" for line in lines if line.startswith(("FAILED", "ERROR"))]
    return f"`pytest -m gpu tests/gpu`: {lines[-1].strip('= ')}." + "".join(failures)


def product_rate(device: Device) -> float:
    """Return the rate of float32 matrix products in operations per second."""
    size = 8192 if is_gpu(device) else 1024
    a = device.asarray(np.random.default_rng(0).standard_normal((size, size), dtype=np.float32))
    with device.backend.on(device.name):
        return 2 * size**3 / min(timed(device, lambda: a @ a)[0] for _ in range(5))


def no_time(shape: Shape, rates: dict[str, float], deadline: float) -> str:
    """Return why a measurement would end too late, or an empty string: a step may take five times its floor."""
    needed = sum(5 * (REPEATS + 2) * shape.operations / rate for rate in rates.values()) + shape.num_bytes / 1e9
    left = deadline - time.monotonic()
    return "" if needed <= left else f"skipped: it may take {needed:.0f} seconds, {max(left, 0):.0f} are left"


def no_room(shape: Shape, devices: dict[str, Device]) -> str:
    """Return why a window does not fit, or an empty string."""
    device = next(iter(devices.values()))
    if shape.place == "device":
        free = device.backend.free_bytes(device.name)
        room = WORKING_GROUPS * device.backend.group_bytes(device.name, shape.num_bytes)
    else:
        free, room = psutil.virtual_memory().available, HOST_RESERVE
    if free is None or shape.num_bytes + room <= free:
        return ""
    return f"skipped: the window and the work need {(shape.num_bytes + room) / GIB:.1f} GiB, {free / GIB:.1f} are free"


def guarded(rows: Callable[[], list[str]]) -> list[str]:
    """Return rows, or the error in their place: it must not end the other measurements."""
    try:
        return rows()
    except Exception as error:
        message = str(error).partition("\n")[0].replace("|", "/")
        return [f"failed: {type(error).__name__}: {message[:200]}"]


def measured(shape: Shape, devices: dict[str, Device], rates: dict[str, float]) -> list[str]:
    """Return one row for each device."""
    window = filled_window(shape, list(devices.values()))
    weights = np.random.default_rng(1).standard_normal(shape.d, dtype=np.float32)
    runs = {name: Run(device, Shared(window, device), device.asarray(weights)) for name, device in devices.items()}
    masks, memory = {}, {}
    for name, run in runs.items():
        masks[name], memory[name] = run.first_step()
    rounds = [{name: timed(run.device, run.step)[0] for name, run in runs.items()} for _ in range(REPEATS)]
    first = next(iter(runs))
    rows = []
    for name, run in runs.items():
        steps = [seconds[name] for seconds in rounds]
        step = statistics.median(steps)
        parts, float64 = run.parts()
        ratio = statistics.median(seconds[name] / seconds[first] for seconds in rounds)
        cells = [
            name, f"{step:.3g}", f"{max(steps) - min(steps):.2g}", f"{ratio:.2f}",
            *(f"{parts[part]:.3g}" for part in ("diagonal", "mask", "update")),
            f"{step * rates[name] / shape.operations:.1f}", memory[name], f"{float64:.0%}",
            f"{np.count_nonzero(masks[name] != masks[first]):,}",
        ]  # fmt: skip
        rows.append(" | ".join(cells))
    return rows


class Run:
    """The pruning step of one window on one device."""

    def __init__(self, device: Device, source: Shared, weights: Array) -> None:
        self.device = device
        self._source = source
        self._weights = weights

    def step(self) -> Array:
        """Prune, and return which weights are pruned."""
        outcome = mfac_step(
            self._weights, self._source, self._select, damping=DAMPING, update="independent", devices=self.device
        )
        return outcome.newly_pruned

    def first_step(self) -> tuple[np.ndarray, str]:
        """Warm up; return which weights are pruned, and the peak memory on a GPU in GiB."""
        gc.collect()
        with self.device.backend.on(self.device.name):
            peak = _peak_memory(self.device)
            pruned = self.device.to_numpy(self.step())
            return pruned, f"{peak() / GIB:.2f}" if is_gpu(self.device) else ""

    def parts(self) -> tuple[dict[str, float], float]:
        """Return the seconds of each part of a step, and the share of groups in float64."""
        seconds = {}
        device, weights = self.device, self._weights
        with device.backend.on(device.name):
            fisher = BlockwiseFisher(self._source, damping=DAMPING, devices=device)
            seconds["diagonal"], diagonal = timed(device, fisher.diagonal)
            saliencies = saliency(weights, diagonal)
            seconds["mask"], pruned = timed(device, lambda: self._select(saliencies))
            seconds["update"], _ = timed(device, lambda: independent_update(fisher, weights, pruned, diagonal))
        return seconds, statistics.mean(each is not False for each in fisher._in_float64)

    def _select(self, saliencies: Array) -> Array:
        return least_salient(saliencies, round(SPARSITY * self._source.num_weights))


def filled_window(shape: Shape, devices: list[Device]) -> GradientWindow:
    """Return a full window of gradients like those of networks, drawn on the first device.

    Scales spread over decades: those of layers over three, those of the columns of a layer over another two. The
    samples differ in size by a lognormal factor and share a mean of half the standard deviation.
    """
    device = devices[0]
    on_host = shape.place == "host"
    gpus = [each for each in devices if is_gpu(each)]
    window = GradientWindow(
        shape.d, shape.m, block_size=BLOCK_SIZE, device="cpu" if on_host else device, consumers=gpus if on_host else ()
    )
    rng = np.random.default_rng(0)
    layers = np.repeat(10 ** rng.uniform(-3, 0, -(-shape.d // LAYER)), LAYER)[: shape.d]
    scales = device.asarray((layers * 10 ** rng.normal(0, 0.5, shape.d)).astype(np.float32))
    mean = device.asarray(0.5 * rng.standard_normal(shape.d, dtype=np.float32))
    with device.backend.on(device.name):
        for normal in itertools.islice(_normal_numbers(device, shape.d), shape.m):
            row = float(rng.lognormal()) * scales * (mean + normal)
            window.push(device.backend.fetch(row)() if on_host else row)
    return window


def differences(shape: Shape, devices: dict[str, Device]) -> list[str]:
    """Return how many masks of each device differ from those of NumPy on the CPU."""

    def rows() -> list[str]:
        window = filled_window(shape, list(devices.values()))
        weights = np.random.default_rng(1).standard_normal(shape.d, dtype=np.float32)
        all_devices = {"cpu": resolve_device("cpu")} | devices
        runs = {
            name: Run(device, Shared(window, device), device.asarray(weights)) for name, device in all_devices.items()
        }
        masks = {name: run.first_step()[0] for name, run in runs.items()}
        counts = (f"{np.count_nonzero(masks[name] != masks['cpu']):,} differ on {name}" for name in devices)
        return [", ".join(counts)]

    return guarded(rows)


def timed(device: Device, function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, and its result."""
    device.backend.synchronize(device.name)
    started = time.perf_counter()
    result = function()
    device.backend.synchronize(device.name)
    return time.perf_counter() - started, result


def heading(devices: dict[str, Device], d: int) -> list[str]:
    """Return the lines above the numbers."""
    versions = ", ".join(
        f"{name} {found}" for name in ("torch", "cupy-cuda12x", "cupy-cuda13x") if (found := _version(name))
    )
    machine = f"{psutil.cpu_count()} cores and {psutil.virtual_memory().total / GIB:.0f} GiB of host memory"
    return [
        "# Benchmarks on a GPU",
        "",
        f"One pruning step over d = {d:,} weights in blocks of {BLOCK_SIZE}: inverse diagonal, saliency, mask,",
        "independent update, new weights. float32; gradients whose scales spread over decades; half of the weights are",
        f"pruned; damping {DAMPING:g}.",
        "",
        f"Made by `{shlex.join(['tests/benchmarks/bench_gpu.py', *sys.argv[1:]])}` on {_gpu_name(devices)}, {machine}; "
        f"mfac-core {mfac_core.__version__}, NumPy {np.__version__}, {versions}, Python {platform.python_version()}, "
        f"{platform.system()}. Measured at commit {commit()}.",
        YOURS_WILL_DIFFER,
        "",
    ]


def _normal_numbers(device: Device, count: int) -> Iterator[Array]:
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


def _peak_memory(device: Device) -> Callable[[], int]:
    """Return a function that gives the bytes on a GPU since now: the peak beyond what is in use already."""
    if device.backend.name == "cupy":
        import cupy

        pool = cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        return lambda: pool.total_bytes() - before
    if device.backend.name == "torch" and device.name.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - before
    return lambda: 0


def _gpu_name(devices: dict[str, Device]) -> str:
    if not any(map(is_gpu, devices.values())):
        return "the CPU, which checks the script and measures nothing"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "a GPU that nvidia-smi does not name"
    return f"{lines[0]} (of {len(lines)} GPUs)"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
