"""Files that are complete or do not exist: every file of a run is written here.

A process that is killed while it writes leaves the old file untouched. The new content goes to a file next to the old
one, reaches the disk, and takes its name in one step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["PREVIOUS", "write_file"]

PREVIOUS = ".previous"
"""Suffix of the previous version of a file, if one is kept."""


def write_file(
    path: str | os.PathLike[str], write: bytes | Callable[[BinaryIO], object], *, keep_previous: bool = False
) -> None:
    """Write a file in one step: at any moment its name refers to the old content or to the new.

    Args:
        path: The file; its folder is created if missing.
        write: The content, or a function that writes it to an open binary file.
        keep_previous: Whether to keep the old file as ``<path>.previous``.

    Raises:
        IsADirectoryError: If the path is that of a folder.
        OSError: If the file cannot be written. The old file is untouched then, as it is if ``write`` raises.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/a.txt", b"first")
        ...     write_file(f"{folder}/a.txt", b"second", keep_previous=True)
        ...     Path(f"{folder}/a.txt").read_text(), Path(f"{folder}/a.txt.previous").read_text()
        ('second', 'first')
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder; give the path of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")  # in the same folder: renaming needs one disk
    try:
        with open(unfinished, "wb") as file:
            if isinstance(write, bytes):
                file.write(write)
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and target.exists():
            _keep(target)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _keep(target: Path) -> None:
    """Give a file a second name, while its own still refers to it."""
    previous = target.with_name(target.name + PREVIOUS)
    linked = previous.with_name(f"{previous.name}.unfinished")
    linked.unlink(missing_ok=True)
    try:
        os.link(target, linked)
    except OSError:  # a disk without hard links: for a moment only the previous name exists
        os.replace(target, previous)
    else:
        os.replace(linked, previous)


def _sync_folder(folder: Path) -> None:
    # A new name reaches the disk with its folder. Windows cannot open folders, and does not need this.
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(opened)
    except OSError:
        pass
    finally:
        os.close(opened)
