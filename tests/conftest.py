from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, and nothing about the code.
timeless = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("local", timeless)
settings.register_profile("ci", timeless, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# What a terminal shows is not for the settings of the one who runs the tests to decide.
for name in ("CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH"):
    os.environ.pop(name, None)
os.environ |= {"COLUMNS": "80", "TERM": "xterm"}

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # What torch.compile has kept of an earlier run may be code for another processor, or for another setting of it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="mfac-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("gpu"):
        missing = _missing_for_gpu(*marker.args)
        if missing:
            pytest.skip(missing)


@cache
def _missing_for_gpu(library: str = "cupy") -> str:
    try:
        count = _num_gpus_of[library]()
    except ImportError as error:
        return f"needs {library}, which cannot be imported: {error}"
    except RuntimeError as error:
        return f"needs a CUDA device: {error}"
    return "" if count else f"needs a CUDA device, and {library} finds none"


def _num_gpus_of_cupy() -> int:
    import cupy

    return cupy.cuda.runtime.getDeviceCount()


def _num_gpus_of_torch() -> int:
    import torch

    return torch.cuda.device_count()


_num_gpus_of = {"cupy": _num_gpus_of_cupy, "torch": _num_gpus_of_torch}
