"""What a published table says of where it was measured."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

__all__ = ["YOURS_WILL_DIFFER", "commit", "processor"]

YOURS_WILL_DIFFER = (
    "Your digits will differ, seconds more than ratios: both depend on the processor, its caches and its libraries."
)
"""What stands beside every table of times."""


def commit() -> str:
    """The commit that is checked out, short; with a plus where files of it are changed."""
    return f"{_git('rev-parse', '--short', 'HEAD') or 'unknown'}{'+' if _git('status', '--porcelain', '-uno') else ''}"


def processor() -> str:
    """The name of the processor."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return done.stdout.strip()
