from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from mfac_core.files import PREVIOUS, write_file


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_file(path, b"old")

    def breaks(file: BinaryIO) -> None:
        file.write(b"half of the new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, breaks, keep_previous=True)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"state": b"old"}


def test_a_folder_is_not_taken_for_the_file_before(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_file(folder / "state", b"old")
    with pytest.raises(IsADirectoryError, match="run' is a folder; give the path of a file"):
        write_file(folder, b"new", keep_previous=True)
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_the_one_before_is_kept_and_older_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state"
    for content in (b"1", b"2", b"3"):
        write_file(path, content, keep_previous=True)
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == {
        "state": b"3",
        f"state{PREVIOUS}": b"2",
    }


def test_a_disk_without_hard_links_keeps_the_one_before_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    test_the_one_before_is_kept_and_older_ones_are_not(tmp_path)


def test_a_link_goes_on_pointing_where_it_pointed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_the_content_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_file(tmp_path / "state", b"new")
    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("kills_at", range(1, 9))
def test_a_process_killed_at_any_call_leaves_a_whole_file(tmp_path: Path, kills_at: int) -> None:
    path = tmp_path / "state"
    write_file(path, b"old" * 1000)
    script = f"""
import os, signal, sys
calls = 0
def trace(name, args):
    global calls
    if name in {{"open", "os.rename", "os.link", "os.remove"}} and {str(tmp_path)!r} in str(args):
        calls += 1
        if calls == {kills_at}:
            os.kill(os.getpid(), signal.SIGKILL)
from mfac_core.files import write_file
sys.addaudithook(trace)
write_file({str(path)!r}, b"new" * 1000, keep_previous=True)
"""
    subprocess.run(
        [sys.executable, "-c", script], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert path.read_bytes() in {b"old" * 1000, b"new" * 1000}
