"""Files that grow at their end only, by one process at a time."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from echo_integrations.files import FileError
from echo_integrations.training.journal import Journal, write_atomically


def test_it_grows_and_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Journal(path) as journal:
        journal.append(b"abc")
        assert path.read_bytes() == b"abc"  # others see it at once
    with Journal(path) as journal:
        assert journal.size == 3
        journal.truncate(1)
        journal.append(b"xyz", sync=True)
        assert journal.size == 4
    assert path.read_bytes() == b"axyz"


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path, order = tmp_path / "log", []

    def second() -> None:
        with Journal(path, wait=True) as journal:
            order.append("second")
            journal.append(b"2")

    with Journal(path) as journal:
        with pytest.raises(FileError, match="log is being written by another run: wait for its end"):
            Journal(path)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
        journal.append(b"1")
    thread.join()
    assert order == ["first", "second"]
    assert path.read_bytes() == b"12"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere/log cannot be written \(No such file or directory\)"):
        Journal(tmp_path / "nowhere" / "log")
    with pytest.raises(FileError, match="nowhere/x cannot be written"):
        write_atomically(tmp_path / "nowhere" / "x", "text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_says_so() -> None:
    with pytest.raises(FileError, match=r"/dev/full cannot be written \(No space left on device\): free space there"):
        with Journal(Path("/dev/full")) as journal:
            journal.append(b"x")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, "one")
    write_atomically(path, "zwö")
    assert path.read_text(encoding="utf-8") == "zwö"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
