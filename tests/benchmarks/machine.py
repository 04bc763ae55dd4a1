"""The machine and the commit of a published table."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

__all__ = ["YOURS_WILL_DIFFER", "commit", "processor"]

YOURS_WILL_DIFFER = (
    "Your numbers will differ, seconds more than ratios: both depend on the processor, its caches and its libraries."
)
"""Printed above every table of times."""


def commit() -> str:
    """Return the short hash of the current commit, with a plus if tracked files have changed."""
    return f"{_git('rev-parse', '--short', 'HEAD') or 'unknown'}{'+' if _git('status', '--porcelain', '-uno') else ''}"


def processor() -> str:
    """Return the name of the processor."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()
