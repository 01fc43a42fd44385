"""What training reads: queries, and queries with responses, line by line. Knows nothing of models."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import lzma
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from echo_integrations.config import InputError
from echo_integrations.files import FileError

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]

_OPENERS: dict[str, Callable[[Path, Literal["rb"]], Any]] = {".xz": lzma.open, ".gz": gzip.open}


class DataWarning(UserWarning):
    """Rows of a file were left out; the message counts them by what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Example:
    """A query, the response whose meaning its embedding shall have, and responses that it shall be far from."""

    query: str
    response: str
    negatives: tuple[str, ...] = ()


class _BadRow(Exception):
    """What kind of fault a row has, and the sentence about it."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def read_rows(
    path: str | PathLike[str], *, required: Sequence[str] = ("query",), on_error: OnError = "raise"
) -> Iterator[dict[str, Any]]:
    """Read JSON objects, one a line, or the lines of a text file as queries.

    Args:
        path: ``.jsonl``, or ``.txt`` with one query a line; either may end in ``.xz`` or ``.gz``, too.
        required: fields that must be strings with more than white space in them.
        on_error: ``"raise"`` at the first bad line, or ``"skip"`` bad lines and count them in one `DataWarning`.

    Yields:
        All fields of each row. Rows with an ``error`` field, as `echo_integrations.training.respond` writes them
        where there is no answer, are always left out and counted, unless no ``response`` is required.

    Raises:
        FileError: a bad line, with its number, or a damaged file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "queries.txt"
        >>> _ = path.write_text("how do I reset the pump?")
        >>> list(read_rows(path))
        [{'query': 'how do I reset the pump?'}]
    """
    path = Path(path)
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error={on_error!r} is neither 'raise' nor 'skip'")
    left_out: Counter[str] = Counter()
    first: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = _row(line, path, required)
        except _BadRow as bad:
            if on_error == "raise" and bad.kind != "without an answer":
                raise FileError(f"{path}, line {number}: {bad}") from bad.__cause__
            left_out[bad.kind] += 1
            first.setdefault(bad.kind, number)
            continue
        yield row
    if left_out:
        counts = ", ".join(f"{count} {kind} (first: line {first[kind]})" for kind, count in left_out.items())
        warnings.warn(f"{path}: rows were left out: {counts}", DataWarning, stacklevel=3)


def read_queries(path: str | PathLike[str], *, on_error: OnError = "raise") -> list[str]:
    """The queries of a file that `read_rows` reads, in order, repetitions included.

    Raises:
        FileError: a bad line, with its number, or a damaged file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "queries.jsonl"
        >>> _ = path.write_text('{"query": "how do I reset the pump?", "id": 7}')
        >>> read_queries(path)
        ['how do I reset the pump?']
    """
    return [row["query"] for row in read_rows(path, on_error=on_error)]


def read_examples(path: str | PathLike[str], *, on_error: OnError = "raise") -> list[Example]:
    """The examples of a ``.jsonl`` file, plain or packed (``.xz``, ``.gz``), in order.

    Fields: ``query``, ``response``, optionally ``negatives``, a list of strings; others are ignored. Of rows with the
    same query and response the first is kept, and the number of the others logged.

    Args:
        path: the file.
        on_error: ``"raise"`` at the first bad line, or ``"skip"`` bad lines and count them in one `DataWarning`.

    Raises:
        FileError: a bad line, with its number, a damaged file, or one without a single example.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "responses.jsonl"
        >>> _ = path.write_text('{"query": "how do I reset the pump?", "response": "Hold the green button."}')
        >>> read_examples(path)
        [Example(query='how do I reset the pump?', response='Hold the green button.', negatives=())]
    """
    examples: dict[tuple[str, str], Example] = {}
    count = 0
    for row in read_rows(path, required=("query", "response"), on_error=on_error):
        count += 1
        example = Example(row["query"], row["response"], tuple(row.get("negatives") or ()))
        examples.setdefault((example.query, example.response), example)
    if not examples:
        raise FileError(f"{path} holds no example: write rows with the fields query and response")
    if repeated := count - len(examples):
        logger.warning("%s: %d of %d rows repeat a query and its response: they count once", path, repeated, count)
    return list(examples.values())


def split(examples: Sequence[Example], validation: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Part examples into those for training and those for validation, each in the order of the whole.

    A query, white space around it aside, never stands on both sides. Which ones are held out depends on their words
    and the seed alone, not on their order, so data that grow keep most of their validation part.

    Args:
        examples: all of them.
        validation: how many to hold out; fewer are where the responses of one query would exceed it.
        seed: another one holds out others.

    Raises:
        InputError: nothing would be left to train on, or to validate with.

    Example:
        >>> train, held_out = split([Example(str(i), "a") for i in range(5)], validation=2, seed=0)
        >>> len(train), len(held_out)
        (3, 2)
    """
    if not 0 <= validation < len(examples):
        raise InputError(f"validation={validation} of {len(examples)} examples: hold out at least 0 and fewer than all")
    sizes = Counter(example.query.strip() for example in examples)
    held_out: set[str] = set()
    room = validation
    for query in sorted(sizes, key=lambda query: hashlib.sha256(f"{seed}\n{query}".encode()).digest()):
        if sizes[query] <= room:
            held_out.add(query)
            room -= sizes[query]
    if validation and not held_out:
        raise InputError(f"validation={validation}: every query has more responses than that: hold out more")
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[example.query.strip() in held_out].append(example)
    return sides


def data_hash(examples: Iterable[Example]) -> str:
    """32 hexadecimal digits that name these examples in this order.

    Example:
        >>> data_hash([Example("a", "b")]) == data_hash([Example("ab", "")])
        False
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.query, example.response, *example.negatives]).encode() + b"\n")
    return digest.hexdigest()[:32]


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked, without a byte order mark."""
    if _kind(path) not in (".jsonl", ".txt"):
        raise FileError(f"{path}: its name must end in .jsonl or .txt, and may end in .xz or .gz after that")
    with _OPENERS.get(path.suffix.lower(), Path.open)(path, "rb") as file:
        try:
            for number, line in enumerate(file):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise FileError(f"{path} cannot be unpacked ({error}): it is damaged or incomplete, get it anew") from error


def _kind(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return name.suffix.lower()


def _row(line: bytes, path: Path, required: Sequence[str]) -> dict[str, Any]:
    if _kind(path) == ".txt":
        try:
            row: dict[str, Any] = {"query": line.decode().rstrip("\r\n")}
        except UnicodeDecodeError as error:
            raise _BadRow("not UTF-8", f"no UTF-8 ({error}): convert the file") from error
    else:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadRow("malformed", f"no JSON ({error}): correct it or delete the line") from error
        if not isinstance(value, dict):
            raise _BadRow("malformed", f"no JSON object: write {{{json.dumps(next(iter(required), 'text'))}: ...}}")
        row = value
    if row.get("error") and "response" in required:
        raise _BadRow("without an answer", f"no response ({row['error']})")
    for name in required:
        _check_text(row, name)
    if "response" in required and row.get("negatives") is not None:
        _check_negatives(row["negatives"])
    return row


def _check_text(row: Mapping[str, Any], name: str) -> None:
    if name not in row:
        there = ", ".join(row) or "there is none"
        raise _BadRow(f"without {name}", f"no field {name!r} ({there}): add it or delete the line")
    if not isinstance(row[name], str):
        kind = "null" if row[name] is None else type(row[name]).__name__
        raise _BadRow(f"without {name}", f"field {name!r} is {kind}, not a string: convert it or delete the line")
    if not row[name].strip():
        raise _BadRow(f"with an empty {name}", f"field {name!r} is empty: fill it or delete the line")
    _check_unicode(row[name], name)


def _check_negatives(negatives: Any) -> None:
    if not isinstance(negatives, list) or not all(isinstance(text, str) and text.strip() for text in negatives):
        raise _BadRow("with bad negatives", "field 'negatives' is no list of texts: correct or remove it")
    for text in negatives:
        _check_unicode(text, "negatives")


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"field {name!r} has a lone surrogate, {text[error.start]!r}, at character {error.start}"
        raise _BadRow("malformed", f"{what}: replace it") from error
