"""Files that are whole or not there: every file of a run is written here.

A process that is killed while it writes leaves what was there before. The new content goes to a file beside the old
one, reaches the disk, and takes its name in one step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["PREVIOUS", "write_file"]

PREVIOUS = ".previous"
"""What is added to the name of a file for the one before it, where that is kept."""


def write_file(
    path: str | os.PathLike[str], write: bytes | Callable[[BinaryIO], object], *, keep_previous: bool = False
) -> None:
    """Write a file in one step: at any moment, its name stands for the old content or for the new one.

    Args:
        path: The file; its folder is made if missing.
        write: The content, or a function that writes it into an open binary file.
        keep_previous: Whether the old file is kept, as ``<path>.previous``.

    Raises:
        IsADirectoryError: If the path is that of a folder.
        OSError: If the file cannot be written. What was there before is untouched then, as it is if ``write`` raises.

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
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder; name a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.unfinished")  # beside it: names do not move from disk to disk
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
    """Keep a file under a second name, while its own goes on standing for it."""
    previous = target.with_name(target.name + PREVIOUS)
    linked = previous.with_name(f"{previous.name}.unfinished")
    linked.unlink(missing_ok=True)
    try:
        os.link(target, linked)
    except OSError:  # a disk without hard links: for a moment only the previous name is there
        os.replace(target, previous)
    else:
        os.replace(linked, previous)


def _sync_folder(folder: Path) -> None:
    # The new name is on the disk once its folder is. Windows opens no folders and needs none of this.
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
