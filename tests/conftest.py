from __future__ import annotations

import os
from functools import cache

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (missing := _missing_for_gpu()):
        pytest.skip(missing)


@cache
def _missing_for_gpu() -> str:
    try:
        import cupy
    except ImportError as error:
        return f"needs CuPy, which cannot be imported: {error}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"needs a CUDA device: {error}"
    return "" if count else "needs a CUDA device, and CuPy finds none"
