"""Files of texts and vectors: reading rows, keeping vectors on their way, writing results.

Rows pass through in windows, so files may be larger than memory. This module knows nothing of models.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from echo_integrations.batching import windows
from echo_integrations.config import EchoIntegrationsError

if sys.platform != "win32":
    import fcntl

_ROWS = 4_096  # that are read or written together
_SYNC_SECONDS = 5.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileError(EchoIntegrationsError):
    """A file cannot be read, written or continued; the message says which, and what to do."""


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Say in place of an `OSError`, or of a value that a format has no place for, what could not be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        todo = ": free space there" if getattr(error, "errno", None) in _DISK_FULL else ""
        raise FileError(f"{what} cannot be written ({getattr(error, 'strerror', None) or error}){todo}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise FileError('parquet needs pyarrow:\npip install "echo-integrations[parquet]"') from error
    return pyarrow


class Source:
    """A seekable file of texts with the fields beside them, checked once and then read anew in every pass.

    ``kind`` is ``"txt"``, ``"jsonl"`` or ``"parquet"``; ``output``, which the rows must fit into, may be ``"npy"`` too.
    """

    def __init__(self, name: str, file: io.BufferedIOBase, kind: str, field: str, output: str) -> None:
        self._name, self._file, self._kind, self._field, self._output = name, file, kind, field, output
        self._state: tuple[int, int] | None = None
        self.sha256 = hashlib.file_digest(self._rewound(), "sha256").hexdigest()
        self.count = 0
        self.schema: Any = _pyarrow().schema([(field, "string")]) if output == "parquet" else None  # of all fields
        if kind == "parquet":
            self.schema = self._parquet().schema_arrow
            list(self._each([self.schema.names], self._check_names, "schema"))
            self.count = sum(1 for _ in self.texts())
            return
        for chunk in windows(self.rows(), _ROWS):
            if output == "parquet":
                self._widen_schema(chunk)
            self.count += len(chunk)

    def texts(self) -> Iterator[str]:
        """The texts, in order."""
        if self._kind != "parquet":
            return (row[self._field] for row in self.rows())
        batches = self._parquet().iter_batches(_ROWS, columns=[self._field])
        cells = (cell for batch in batches for cell in batch.column(self._field))
        return self._each(cells, lambda cell: self._text(cell.as_py()), "row")

    def rows(self) -> Iterator[dict[str, Any]]:
        """All fields of each row."""
        if self._kind == "parquet":
            return (row for batch in self.batches() for row in batch.to_pylist())
        file = self._rewound()
        file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)
        return self._each(file, self._row, "line")

    def batches(self) -> Iterator[Any]:
        """All fields as Arrow record batches."""
        if self._kind == "parquet":
            yield from self._parquet().iter_batches(_ROWS)
            return
        pa = _pyarrow()
        for chunk in windows(self.rows(), _ROWS):
            yield pa.RecordBatch.from_struct_array(pa.array(chunk, type=pa.struct(list(self.schema))))

    def _each(self, items: Iterable[Any], read: Callable[[Any], Any], unit: str) -> Iterator[Any]:
        """What ``read`` makes of each item; where it cannot, the message says where that is."""
        for number, item in enumerate(items, start=1):
            try:
                result = read(item)
            except ValueError as error:
                raise FileError(f"{self._name}, {unit} {number}: {error}") from error
            yield result

    def _row(self, line: bytes) -> dict[str, Any]:
        text = self._text(line.decode(errors="surrogateescape"))
        if self._kind == "txt":  # only \n and \r\n end a line
            return {self._field: text[:-1].removesuffix("\r") if text.endswith("\n") else text}
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON ({error}): correct it or delete the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"no JSON object: write {{{json.dumps(self._field)}: ...}}")
        self._check_names(row)
        self._text(row[self._field])
        return row

    def _check_names(self, names: Iterable[str]) -> None:
        names = list(names)
        if names.count(self._field) != 1:
            raise ValueError(f"no field {self._field!r}: choose with --field ({', '.join(names) or 'there is none'})")
        if self._output != "npy" and "embedding" in names:
            raise ValueError("there is a field 'embedding' already: rename it, or write .npy")

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise ValueError(f"field {self._field!r} is {kind}, not a string: leave the row out or convert it")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"bad UTF-8 or a lone surrogate, {value[error.start]!r}, at character {error.start}"
            raise ValueError(f"{what}: convert or replace it") from error
        return value

    def _widen_schema(self, chunk: list[dict[str, Any]]) -> None:
        pa = _pyarrow()
        try:
            found = pa.schema(list(pa.array(chunk).type))
            self.schema = pa.unify_schemas([self.schema, found], promote_options="permissive")
            pa.parquet.ParquetWriter(io.BytesIO(), self.schema).close()
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            lines = f"lines {self.count + 1} to {self.count + len(chunk)}"
            raise FileError(f"{self._name}, {lines}: no table can hold them ({error}): write .jsonl") from error

    def _parquet(self) -> Any:
        pa = _pyarrow()
        try:
            return pa.parquet.ParquetFile(self._rewound())
        except pa.ArrowException as error:
            raise FileError(f"{self._name} is no whole parquet file ({error}): make it anew") from error

    def _rewound(self) -> io.BufferedIOBase:
        stat = os.fstat(self._file.fileno())
        before, self._state = self._state, (stat.st_size, stat.st_mtime_ns)
        if before not in (None, self._state):
            raise FileError(f"{self._name} was changed while it was being read: run the command again")
        self._file.seek(0)
        return self._file


class PartialStore(AbstractContextManager["PartialStore"]):
    """Vectors that are done, in an append-only file that outlives its process, whatever ends it.

    A line of JSON says what the vectors belong to. Records follow in the order in which they were appended: the
    row, counted from 1 so that a block of zeros is none, and its vector. What is not whole at the end is dropped.
    There will be ``count`` rows. A file whose header differs is refused, or replaced with ``overwrite``.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], count: int, *, overwrite: bool = False) -> None:
        self.path = path
        self.dimension: int = header["dimension"]
        self._record = np.dtype([("row", "<i8"), ("vector", "<f4", (self.dimension,))])
        self._places = np.full(count, -1, dtype=np.int64)  # of rows among the records
        self._synced = time.monotonic()
        line = json.dumps(header).encode() + b"\n"
        self._start = len(line)
        with ExitStack() as stack, writing(path):
            self._file = stack.enter_context(path.open("a+b"))
            self._lock()
            self._file.seek(0)
            found = self._file.readline(65_536 + len(line))
            if found != line:
                if not overwrite and not line.startswith(found):
                    raise FileError(f"{path} {_difference(found, header)}: delete it, or pass --overwrite")
                self._file.truncate(0)
                self._file.write(line)
            self._recover()
            stack.pop_all()

    def _lock(self) -> None:
        """Refuse a file that another run is writing; not every file system can tell."""
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    raise FileError(f"{self.path} is being written by another run: wait for its end") from error

    def _recover(self) -> None:
        """Take in the whole records and cut off what follows them."""
        self.done = (self._file.seek(0, os.SEEK_END) - self._start) // self._record.itemsize
        rows = self._records()["row"] - 1
        good = (rows >= 0) & (rows < len(self._places))
        self.done = self.done if good.all() else int(np.argmin(good))
        self._places[rows[: self.done]] = np.arange(self.done)
        self._file.truncate(self._start + self.done * self._record.itemsize)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell an error how many rows the file keeps; without an error, or without rows, the file goes."""
        with suppress(OSError), self._file:
            os.fsync(self._file.fileno())
        if error is None or not self.done:
            self.path.unlink(missing_ok=True)
        else:
            error.add_note(
                f"{self.done} of {len(self._places)} rows are safe in {self.path}: run the same command again"
            )

    @property
    def missing(self) -> NDArray[np.bool_]:
        """(count,) whether a row's vector is still to come."""
        return self._places < 0

    def append(self, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Add the (m, D) vectors of (m,) missing rows."""
        records = np.empty(len(rows), dtype=self._record)
        records["row"], records["vector"] = rows + 1, vectors
        with writing(self.path):
            self._file.write(records.tobytes())
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self._places[rows] = np.arange(self.done, self.done + len(rows))
        self.done += len(rows)

    def vectors(self) -> Iterator[NDArray[np.float32]]:
        """(D,) vectors in the order of the rows, of which none may be missing."""
        for start in range(0, len(self._places), _ROWS):
            yield from self._records()["vector"][self._places[start : start + _ROWS]]

    def _records(self) -> NDArray[Any]:
        return np.memmap(self.path, self._record, mode="r", offset=self._start, shape=(self.done,))


def _difference(found: bytes, header: Mapping[str, Any]) -> str:
    with suppress(ValueError, TypeError):
        theirs = dict(json.loads(found))
        keys = [key for key in header if theirs.get(key) != header[key]]
        return "is of another run, " + ", ".join(f"{key}: {theirs.get(key)!r}, now {header[key]!r}" for key in keys)
    return "was not written by this command"


def write_result(out: Path, source: Source, store: PartialStore) -> None:
    """Write all rows to a temporary file beside ``out`` and move it into place."""
    temporary = out.with_name(out.name + ".tmp")
    write = {".npy": _write_npy, ".parquet": _write_parquet, ".jsonl": _write_jsonl}[out.suffix.lower()]
    try:
        with writing(out):
            with temporary.open("wb") as file:
                write(file, source, store)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_npy(file: BinaryIO, source: Source, store: PartialStore) -> None:
    shape = (source.count, store.dimension)
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    file.writelines(vector.tobytes() for vector in store.vectors())


def _write_jsonl(file: BinaryIO, source: Source, store: PartialStore) -> None:
    for row, vector in zip(source.rows(), store.vectors(), strict=True):
        file.write(json.dumps(_plain({**row, "embedding": vector.tolist()}), default=str).encode() + b"\n")


def _plain(value: Any) -> Any:
    """What JSON can say of a value: null for NaN and infinity, as databases have it; bytes are refused."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        raise FileError("a column holds bytes, which JSON has no word for: write .parquet or .npy")
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _write_parquet(file: BinaryIO, source: Source, store: PartialStore) -> None:
    pa = _pyarrow()
    embedding = pa.field("embedding", pa.list_(pa.float32(), store.dimension))
    vectors = store.vectors()
    with pa.parquet.ParquetWriter(file, source.schema.append(embedding)) as writer:
        for batch in source.batches():
            column = pa.array(list(islice(vectors, len(batch))), type=embedding.type)
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, column], schema=writer.schema))
