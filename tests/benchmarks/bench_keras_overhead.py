"""Measure the overhead of pruning in a training step in Keras on the CPU, relative to the plain step in the same run.

Run it from the root of the project: ``python tests/benchmarks/bench_keras_overhead.py [--write]``. Each backend that is
installed runs in a process of its own. With ``--write`` the table goes to ``docs/benchmarks-keras.md``. Needs
scikit-learn, which includes the digits.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import YOURS_WILL_DIFFER, commit, processor

OUTPUT = Path("docs/benchmarks-keras.md")
BACKENDS = ("tensorflow", "torch", "jax")
BATCH_SIZE = 128
ROUNDS, STEPS_PER_ROUND, WARM_UP = 40, 10, 4
STEPS = (ROUNDS + WARM_UP) * STEPS_PER_ROUND
SPARE = STEPS_PER_ROUND  # steps at the end of the epoch that never run, so that no pruning step is measured
# There is a single epoch. A window with as many rows as the epoch has steps is open from the start.
KEYS = {
    "closed": {"final_sparsity": 0.5, "start_epoch": 10, "end_epoch": 11, "num_grads": 64},
    "open": {"final_sparsity": 0.5, "start_epoch": 1, "end_epoch": 2, "num_grads": STEPS + SPARE},
}
MASKS = "pruning_modifiers:\n  - !MagnitudePruningModifier {final_sparsity: 0.8, start_epoch: 0.0, end_epoch: 0.0}\n"
MEANING = {
    "closed": "attached, no window open, nothing pruned yet",
    "open": "each step adds a row to the gradient window",
    "masks": "80% pruned: masks enforced, no window open",
}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "CUDA_VISIBLE_DEVICES": "",
}


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {OUTPUT}")
    parser.add_argument("--only", choices=BACKENDS, help="measure this backend alone and print its numbers")
    arguments = parser.parse_args()
    if arguments.only:
        os.environ.update(ONE_THREAD, KERAS_BACKEND=arguments.only)
        print(json.dumps({"seconds": measure(), "versions": _versions()}))
        return
    found = {name: _in_a_process(name) for name in BACKENDS if importlib.util.find_spec(name)}
    document = "\n".join(_lines(found)) + "\n"
    if arguments.write:
        OUTPUT.write_text(document, encoding="utf-8")
        print(f"written: {OUTPUT}")
    else:
        print(document)


def measure() -> dict[str, list[float]]:
    """Return the processor seconds per step in each round, for the plain step and for each variant.

    Each variant is its own ``fit`` in its own thread; only one of them runs at a time. They take turns in rotating
    order, so that other load on the machine affects all alike.
    """
    fits = {name: _Fit(name) for name in ("plain", *MEANING)}
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    order = list(fits)
    for number in range(ROUNDS + WARM_UP):
        order = order[1:] + order[:1]
        for name in order:
            begun = time.process_time()
            fits[name].make_steps()
            if number >= WARM_UP:
                seconds[name].append((time.process_time() - begun) / STEPS_PER_ROUND)
    for fit in fits.values():
        fit.end()
    return seconds


class _Fit:
    """A ``fit`` that runs a few steps on demand."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._made = 0
        self._is_over = False
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()  # until it has begun

    def make_steps(self) -> None:
        self._go.release()
        self._wait()

    def end(self) -> None:
        self._is_over = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._done.acquire()
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self._failed = error
            self._done.release()

    def _train(self) -> None:
        import keras

        from mfac_keras import MFACPruningCallback
        from mfac_keras.digits import load_digits, make_network

        digits = load_digits(0)
        chosen = np.arange((STEPS + SPARE) * BATCH_SIZE) % len(digits.train_labels)
        model = make_network(0)
        model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(True))
        callbacks: list[Any] = []
        if self._kind == "masks":
            callbacks = [MFACPruningCallback(MASKS, verbose=0)]
        elif self._kind != "plain":
            callbacks = [MFACPruningCallback(**KEYS[self._kind], verbose=0)]
        turns = keras.callbacks.LambdaCallback(
            on_train_begin=lambda logs: self._pause(model), on_train_batch_end=lambda batch, logs: self._count(model)
        )
        model.fit(
            digits.train_images[chosen],
            digits.train_labels[chosen],
            batch_size=BATCH_SIZE,
            shuffle=False,
            verbose=0,
            callbacks=[*callbacks, turns],
        )

    def _count(self, model: Any) -> None:
        self._made += 1
        if self._made % STEPS_PER_ROUND == 0:
            self._pause(model)

    def _pause(self, model: Any) -> None:
        self._done.release()
        self._go.acquire()
        model.stop_training = self._is_over


def _in_a_process(backend: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", backend]
    path = os.pathsep.join(each for each in sys.path if each)
    environment = {**os.environ, **ONE_THREAD, "KERAS_BACKEND": backend, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _versions() -> dict[str, str]:
    import keras

    backend = keras.backend.backend()
    return {"Keras": keras.__version__, backend: sys.modules[backend].__version__}


def _lines(found: dict[str, dict[str, Any]]) -> list[str]:
    versions = {name: version for each in found.values() for name, version in each["versions"].items()}
    lines = [
        "# Overhead in Keras",
        "",
        "Cost of a training step of `fit` with a recipe attached, relative to the same step without: data,",
        "forward, backward, SGD with momentum and callbacks, on the digits network (9,168 prunable weights)"
        f", batch {BATCH_SIZE}, float32, on the CPU.",
        f"All variants take turns in one run: {ROUNDS} rounds of {STEPS_PER_ROUND} steps each; the ratio of processor",
        "times is taken round by round. Made by `tests/benchmarks/bench_keras_overhead.py`.",
        "",
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}, NumPy {np.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} on {processor()}, "
        f"{len(os.sched_getaffinity(0))} cores, one thread. Measured on "
        f"{datetime.datetime.now(tz=datetime.UTC).date()} at commit {commit()}.",
        YOURS_WILL_DIFFER,
        "",
        "| backend | step | ratio: median | lower quartile | upper quartile | plain step, ms (median) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for backend, measured in found.items():
        plain = measured["seconds"]["plain"]
        for name, meaning in MEANING.items():
            ratios = [one / other for one, other in zip(measured["seconds"][name], plain, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            step = 1e3 * statistics.median(plain)
            lines.append(f"| {backend} | {meaning} | {middle:.3f} | {low:.3f} | {high:.3f} | {step:.2f} |")
    return lines


if __name__ == "__main__":
    main()
