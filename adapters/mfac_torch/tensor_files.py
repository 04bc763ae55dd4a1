"""Files of tensors: written completely or not at all, verified on writing and on reading."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import torch

from mfac_core.files import write_file

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(path: str | os.PathLike[str], content: Any, *, keep_previous: bool = False) -> None:
    """Write tensors and plain values in one step, for ``torch.load(weights_only=True)``.

    An exception leaves an existing file untouched.

    Args:
        path: The file.
        content: What to write.
        keep_previous: Whether to keep the old file, as ``<path>.previous``.

    Raises:
        TypeError: If the content has anything else in it.
        OSError: If the file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
            file.flush()
            torch.load(file.name, map_location="meta", mmap=True, weights_only=True)  # reads no tensor's values
        except Exception as error:
            if isinstance(error, OSError | MemoryError):
                raise
            raise TypeError(
                f"{os.fspath(path)} is not written, because it could not be read again: "
                f"{_unreadable(content) or _first_line(error)}; save tensors and plain values only, such as the "
                "state_dict() of an object instead of the object"
            ) from error

    write_file(path, write, keep_previous=keep_previous)


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """Read a file of :func:`write_tensors` into host memory, after verifying its checksums.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()  # torch.load does not verify checksums
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | MemoryError):
            raise
        raise ValueError(f"{os.fspath(path)} is damaged and cannot be read: {_first_line(error)}") from error


def _unreadable(content: Any, *place: str) -> str:
    """Return a clause that names the first entry that torch.load would refuse, and its type; empty if there is none."""
    if type(content) in {dict, OrderedDict, list, tuple}:
        entries = content.items() if isinstance(content, dict) else enumerate(content)
        return next(filter(None, (_unreadable(value, *place, str(key)) for key, value in entries)), "")
    if type(content) is torch.Tensor:
        return ""
    file = io.BytesIO()
    try:
        torch.save(content, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return f"{'.'.join(place) or 'it'} is a {type(content).__name__}"
    return ""


def _first_line(error: Exception) -> str:
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:  # the rest of torch's message explains how to read a file that cannot be trusted
        return f"it holds an object of {refused[1]}"
    return next(iter(str(error).splitlines()), type(error).__name__)
