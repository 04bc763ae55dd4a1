"""Random numbers for the GPU tests, and a kernel that takes its time."""

import numpy as np

MILLISECONDS = 2_000_000  # cycles, more or less

SPIN = r"""
extern "C" __global__ void spin(long long cycles)
{
    const long long start = clock64();
    while (clock64() - start < cycles) { }
}
"""


def spin(milliseconds):
    """Keep the current stream busy."""
    import cupy  # here, as this module is imported where CuPy is not installed, too

    cupy.RawKernel(SPIN, "spin")((1,), (1,), (milliseconds * MILLISECONDS,))


def numbers(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
