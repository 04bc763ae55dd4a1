"""Products in full precision, whatever the training loop has allowed."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch

__all__ = ["full_precision"]


class _FullPrecision:
    """A context without TF32 or bfloat16 products; torch has one setting for all threads, which the last restores."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore = _forbid_rounding()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._restore is not None:
                self._restore()


full_precision = _FullPrecision()
"""The context, shared by all threads."""


def _forbid_rounding() -> Callable[[], None] | None:
    """Forbid products of float32 in TF32 or bfloat16; return a function that allows them again, None if nothing did."""
    # torch 2.9 added a second interface to this setting; once that was used, the first cannot read the setting
    settings: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    precisions = [(each, each.fp32_precision) for each in settings if hasattr(each, "fp32_precision")]
    rounded = [(each, precision) for each, precision in precisions if precision in {"tf32", "bf16"}]
    if precisions and not rounded:
        return None
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = "highest"
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(before)
    for each, _ in rounded:
        each.fp32_precision = "ieee"

    def allow() -> None:
        for each, precision in rounded:
            each.fp32_precision = precision

    return allow
