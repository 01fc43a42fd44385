"""A file that only grows and outlives its process, whatever ends it. Knows nothing of what it holds."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from echo_integrations.files import FileError, writing

if sys.platform != "win32":
    import fcntl

_SYNC_SECONDS = 5.0


class Journal(AbstractContextManager["Journal"]):
    """A file that one process at a time appends to.

    Args:
        path: made if it is not there.
        wait: whether to wait for another process that has it open, or to refuse.

    Attributes:
        path: where it is.
        size: bytes that it holds.

    Raises:
        FileError: it cannot be written, or another process is writing it.

    Example:
        >>> import tempfile
        >>> with Journal(Path(tempfile.mkdtemp()) / "log") as journal:
        ...     journal.append(b"one line")
        ...     journal.size
        8
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self.path = path
        self._synced = time.monotonic()
        with ExitStack() as stack, writing(path):
            self._file = stack.enter_context(path.open("a+b"))
            self._lock(wait)
            self.size = self._file.seek(0, os.SEEK_END)
            stack.pop_all()

    def _lock(self, wait: bool) -> None:
        """Not every file system can tell whether somebody else is writing."""
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise FileError(f"{self.path} is being written by another run: wait for its end") from error

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Close it; what was appended stays."""
        with suppress(OSError), self._file:  # an error in writing was raised when it happened
            os.fsync(self._file.fileno())

    def append(self, data: bytes, *, sync: bool = False) -> None:
        """Add bytes at the end: seen by others at once, on the disk now with ``sync``, else within some seconds."""
        with writing(self.path):
            self._file.write(data)
            self._file.flush()
            if sync or time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self.size += len(data)

    def truncate(self, size: int) -> None:
        """Cut off what stands behind the first ``size`` bytes."""
        with writing(self.path):
            self._file.truncate(size)
        self.size = size


def write_atomically(path: Path, content: str) -> None:
    """Write a small file as a whole or not at all.

    Raises:
        FileError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
