"""Reading rows, the store of finished vectors, and writing results: no model is needed for any of it."""

from __future__ import annotations

import datetime
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_integrations.files import FileError, PartialStore, Source, write_result

DIMENSION = 3
HEADER = {"format": "test", "input": "abc", "dimension": DIMENSION}
RECORD = 8 + 4 * DIMENSION


def source(tmp_path: Path, name: str, content: bytes, field: str = "text", output: str = "npy") -> Source:
    path = tmp_path / name
    path.write_bytes(content)
    return Source(name, path.open("rb"), path.suffix[1:], field, output)


def table(path: Path, **columns: Any) -> bytes:
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)


def written(tmp_path: Path, rows: Source, name: str) -> Path:
    out = tmp_path / name
    with PartialStore(tmp_path / f"{name}.partial", HEADER, rows.count) as store:
        order = np.random.default_rng(1).permutation(rows.count)
        store.append(order, vectors(rows.count)[order])
        write_result(out, rows, store)
    assert sorted(p.name for p in tmp_path.glob(f"{name}*")) == [name]
    return out


# Reading


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\n\r\n\nb", ["a", "", "", "b"]),
        (b"a\rb\x0bc\x0cd\x1ce\xc2\x85f\xe2\x80\xa8g\n", ["a\rb\x0bc\x0cd\x1ce\x85f\u2028g"]),
        (b"a\r\r\nb\r", ["a\r", "b\r"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb", ["a", "\ufeffb"]),
        ("  grün \t\n😀".encode(), ["  grün \t", "😀"]),
    ],
)
def test_lines(tmp_path: Path, content: bytes, texts: list[str]) -> None:
    rows = source(tmp_path, "x.txt", content)
    assert list(rows.texts()) == texts
    assert list(rows.texts()) == texts  # again: every pass reads anew
    assert rows.count == len(texts)
    assert list(rows.rows()) == [{"text": text} for text in texts]


def test_json_lines(tmp_path: Path) -> None:
    rows = source(tmp_path, "x.jsonl", b'\xef\xbb\xbf{"body": "a\\u2028b", "n": 1}\r\n{"n": [2], "body": ""}', "body")
    assert list(rows.texts()) == ["a\u2028b", ""]
    assert list(rows.rows()) == [{"body": "a\u2028b", "n": 1}, {"n": [2], "body": ""}]


def test_parquet_types_of_text(tmp_path: Path) -> None:
    content = table(
        tmp_path / "t",
        plain=pa.array(["a", "b", "a"]),
        large=pa.array(["a", "b", "a"], pa.large_string()),
        coded=pa.array(["a", "b", "a"]).dictionary_encode(),
    )
    for field in ("plain", "large", "coded"):
        assert list(source(tmp_path, "x.parquet", content, field).texts()) == ["a", "b", "a"]


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"a\nb\n\xff\n", r"x\.txt, line 3: bad UTF-8 .*'\\udcff'.* character 0: convert"),
        ("x.jsonl", GOOD + b'{"text": "\xe9"}\n', r"x\.jsonl, line 2: bad UTF-8"),
        ("x.jsonl", GOOD + b'{"text": "b", "other": "\xe9"}\n', r"line 2: bad UTF-8"),
        ("x.jsonl", GOOD + b'{"text": "a\\ud800"}\n', r"line 2: .*lone surrogate, '\\ud800', at character 1"),
        ("x.jsonl", GOOD + b"{text: 1}\n", r"line 2: no JSON \(.*\): correct it"),
        ("x.jsonl", GOOD + b"\n" + GOOD, r"line 2: no JSON"),
        ("x.jsonl", GOOD + b"[" * 100_000, r"line 2: no JSON"),
        ("x.jsonl", GOOD + b'["text"]\n', r"line 2: no JSON object: write \{\"text\": \.\.\.\}"),
        ("x.jsonl", GOOD + b'{"body": "a", "id": 3}\n', r"line 2: no field 'text': choose with --field \(body, id\)"),
        ("x.jsonl", GOOD + b"{}\n", r"line 2: no field 'text': .*there is none"),
        ("x.jsonl", GOOD + b'{"text": 5}\n', r"line 2: field 'text' is int, not a string: leave"),
        ("x.jsonl", GOOD + b'{"text": null}\n', r"line 2: field 'text' is null"),
        ("x.parquet", b"hello", r"x\.parquet is no whole parquet file"),
        ("x.parquet", b"", r"x\.parquet is no whole parquet file"),
    ],
)
def test_bad_rows(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(FileError, match=message):
        source(tmp_path, name, content)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    content = table(tmp_path / "t", words=["a", None, "b"], number=[1, 2, 3])
    with pytest.raises(FileError, match=r"no field 'text': choose with --field \(words, number\)"):
        source(tmp_path, "x.parquet", content)
    with pytest.raises(FileError, match=r"x\.parquet, row 2: field 'words' is null"):
        source(tmp_path, "x.parquet", content, "words")
    with pytest.raises(FileError, match=r"row 1: field 'number' is int"):
        source(tmp_path, "x.parquet", content, "number")
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])
    with pytest.raises(FileError, match=r"row 2: .*utf-8"):
        source(tmp_path, "x.parquet", table(tmp_path / "t", text=broken))


@pytest.mark.parametrize("output", ["jsonl", "parquet"])
def test_embedding_is_taken(tmp_path: Path, output: str) -> None:
    line = b'{"text": "a", "embedding": [1]}\n'
    with pytest.raises(FileError, match="line 2: there is a field 'embedding' already"):
        source(tmp_path, "x.jsonl", GOOD + line, output=output)
    assert source(tmp_path, "x.jsonl", line, output="npy").count == 1
    with pytest.raises(FileError, match="there is a field 'embedding' already"):
        source(tmp_path, "x.parquet", table(tmp_path / "t", text=["a"], embedding=[1]), output=output)


@pytest.mark.parametrize(
    "bad", ['{"text": "a", "n": "x"}', '{"text": "a", "n": 1e99, "m": {}}', '{"text": "a", "n": 99999999999999999999}']
)
def test_what_no_table_can_hold(tmp_path: Path, bad: str) -> None:
    content = f'{{"text": "a", "n": 1}}\n{bad}\n'.encode()
    with pytest.raises(FileError, match=r"lines 1 to 2: no table can hold them .*: write \.jsonl"):
        source(tmp_path, "x.jsonl", content, output="parquet")
    assert source(tmp_path, "x.jsonl", content, output="jsonl").count == 2


def test_changed_input(tmp_path: Path) -> None:
    rows = source(tmp_path, "x.txt", b"a\nb\n")
    with (tmp_path / "x.txt").open("ab") as file:
        file.write(b"c\n")
    with pytest.raises(FileError, match="changed while it was being read"):
        rows.texts()


# The store


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_truncation_leaves_whole_records(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 12), label="rows")
    order = np.array(data.draw(st.permutations(range(count)), label="order"), dtype=np.int64)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3), label="batches"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "partial")
        with pytest.raises(KeyboardInterrupt), PartialStore(path, HEADER, count + 1) as store:
            for rows in np.split(order, cuts):
                store.append(rows, vectors(count)[rows])
            start = path.stat().st_size - count * RECORD
            content = path.read_bytes()
            raise KeyboardInterrupt
        length = data.draw(st.integers(0, len(content)), label="bytes left")
        path.write_bytes(content[:length])
        kept = max(0, (length - start) // RECORD)
        with PartialStore(path, HEADER, count + 1) as store:
            assert store.done == kept
            assert path.stat().st_size == start + kept * RECORD
            assert np.flatnonzero(~store.missing).tolist() == sorted(order[:kept].tolist())
            todo = np.flatnonzero(store.missing)
            everything = np.vstack([vectors(count), np.ones((1, DIMENSION), np.float32)])
            store.append(todo, everything[todo])
            assert store.done == count + 1
            np.testing.assert_array_equal(list(store.vectors()), everything)


def interrupted(path: Path, rows: int, header: dict[str, Any] = HEADER) -> None:
    """Leave a store of five rows with the first ``rows`` in it."""
    with pytest.raises(KeyboardInterrupt) as caught, PartialStore(path, header, 5) as store:
        store.append(np.arange(rows), vectors(rows))
        raise KeyboardInterrupt
    notes = [f"{rows} of 5 rows are safe in {path}: run the same command again"] if rows else []
    assert getattr(caught.value, "__notes__", []) == notes


def test_store_without_rows_is_removed(tmp_path: Path) -> None:
    interrupted(tmp_path / "p", 0)
    assert not (tmp_path / "p").exists()


def test_store_that_is_done_is_removed(tmp_path: Path) -> None:
    with PartialStore(tmp_path / "p", HEADER, 5) as store:
        assert (tmp_path / "p").exists()
        assert store.missing.all()
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("row", [0, -3, 6])
def test_records_that_are_none(tmp_path: Path, row: int) -> None:
    interrupted(tmp_path / "p", 3)
    content = bytearray((tmp_path / "p").read_bytes())
    content[-RECORD:] = np.int64(row).tobytes() + bytes(RECORD - 8)
    (tmp_path / "p").write_bytes(content)
    with PartialStore(tmp_path / "p", HEADER, 5) as store:
        assert store.done == 2
        assert np.flatnonzero(store.missing).tolist() == [2, 3, 4]


def test_header_mismatch(tmp_path: Path) -> None:
    interrupted(tmp_path / "p", 3)
    before = (tmp_path / "p").read_bytes()
    with pytest.raises(FileError, match="is of another run, input: 'abc', now 'xyz': delete it, or pass --overwrite"):
        PartialStore(tmp_path / "p", HEADER | {"input": "xyz"}, 5)
    with pytest.raises(FileError, match="dimension: 3, now 4"):
        PartialStore(tmp_path / "p", HEADER | {"dimension": 4}, 5)
    assert (tmp_path / "p").read_bytes() == before
    with PartialStore(tmp_path / "p", HEADER, 5, overwrite=True) as store:
        assert store.done == 3  # the same run goes on, --overwrite or not
        store.path = tmp_path / "nothing"
    with PartialStore(tmp_path / "p", HEADER | {"input": "xyz"}, 5, overwrite=True) as store:
        assert store.done == 0


@pytest.mark.parametrize("content", [b"somebody's\n", b"x" * 100_000, b"[1]\n", b"\xff\n"])
def test_file_of_somebody_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(FileError, match="was not written by this command: delete it, or pass --overwrite"):
        PartialStore(tmp_path / "p", HEADER, 5)
    assert (tmp_path / "p").read_bytes() == content


def test_long_header(tmp_path: Path) -> None:
    header = HEADER | {"instruction": "x" * 200_000}
    interrupted(tmp_path / "p", 3, header)
    with PartialStore(tmp_path / "p", header, 5) as store:
        assert store.done == 3


def test_store_in_use(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with PartialStore(tmp_path / "p", HEADER, 5), pytest.raises(FileError, match="is being written by another run"):
        PartialStore(tmp_path / "p", HEADER, 5)


def test_store_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"none/p cannot be written \(No such file or directory\)"):
        PartialStore(tmp_path / "none" / "p", HEADER, 5)


# Writing


@pytest.mark.parametrize("count", [0, 1, 9_000])
def test_npy_is_what_numpy_saves(tmp_path: Path, count: int) -> None:
    rows = source(tmp_path, "x.txt", b"a\n" * count)
    expected = io.BytesIO()
    np.save(expected, vectors(count))
    assert written(tmp_path, rows, "out.npy").read_bytes() == expected.getvalue()


@pytest.mark.parametrize("count", [0, 1, 9_000])
def test_parquet_of_lines(tmp_path: Path, count: int) -> None:
    rows = source(tmp_path, "x.txt", b"".join(b"%d\n" % i for i in range(count)), output="parquet")
    result = pq.read_table(written(tmp_path, rows, "out.parquet"))
    assert result.schema.field("embedding").type == pa.list_(pa.float32(), DIMENSION)
    assert result["text"].to_pylist() == [str(i) for i in range(count)]
    flat = result["embedding"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(flat.reshape(-1, DIMENSION), vectors(count))


def test_parquet_of_json_lines_of_many_shapes(tmp_path: Path) -> None:
    lines = [{"text": "a", "n": 1}] * 5_000 + [{"text": "b", "n": 0.5, "tags": ["x"], "in": {"k": None}}]
    content = "\n".join(map(json.dumps, lines)).encode()
    rows = source(tmp_path, "x.jsonl", content, output="parquet")
    result = pq.read_table(written(tmp_path, rows, "out.parquet")).to_pylist()
    assert len(result) == 5_001
    assert {k: v for k, v in result[0].items() if k != "embedding"} == {"text": "a", "n": 1, "tags": None, "in": None}
    assert {k: v for k, v in result[-1].items() if k != "embedding"} == lines[-1]


def test_number_that_loses_its_last_digits(tmp_path: Path) -> None:
    lines = [{"text": "a", "n": 2**60 + 1}] * 4_096 + [{"text": "b", "n": 0.5}]
    rows = source(tmp_path, "x.jsonl", "\n".join(map(json.dumps, lines)).encode(), output="parquet")
    with pytest.raises(FileError, match=r"out\.parquet cannot be written \(Integer value .* is outside of the range"):
        written(tmp_path, rows, "out.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet.partial", "x.jsonl"]


def test_parquet_keeps_its_columns(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([1, None, 3], pa.int16()),
        "when": pa.array([1, 2, 3], pa.timestamp("ns", "UTC")),
        "text": pa.array(["a", "b", "a"]).dictionary_encode(),
        "tags": pa.array([[1], [], None], pa.list_(pa.uint8())),
    }
    before = pa.table(columns).replace_schema_metadata({"who": "me"})
    pq.write_table(before, tmp_path / "t")
    rows = source(tmp_path, "x.parquet", (tmp_path / "t").read_bytes(), output="parquet")
    result = pq.read_table(written(tmp_path, rows, "out.parquet"))
    assert result.drop_columns("embedding").equals(before)
    assert result.schema.metadata[b"who"] == b"me"
    np.testing.assert_array_equal(result["embedding"].to_pylist(), vectors(3))


def test_json_of_parquet(tmp_path: Path) -> None:
    when = datetime.date(2024, 5, 17)
    content = table(tmp_path / "t", text=["a", "b"], when=[when, None])
    out = written(tmp_path, source(tmp_path, "x.parquet", content, output="jsonl"), "out.jsonl")
    result = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["text"], row["when"]) for row in result] == [("a", "2024-05-17"), ("b", None)]
    np.testing.assert_array_equal(np.float32([row["embedding"] for row in result]), vectors(2))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text(), st.dictionaries(st.text().filter(lambda k: k != "embedding"), JSON)), max_size=5),
    st.booleans(),
)
def test_json_lines_keep_their_fields(rows: list[tuple[str, dict[str, Any]]], ascii_only: bool) -> None:
    lines = [{**fields, "text": text} for text, fields in rows]
    content = "".join(json.dumps(line, ensure_ascii=ascii_only) + "\n" for line in lines).encode()
    with tempfile.TemporaryDirectory() as folder:
        out = written(Path(folder), source(Path(folder), "x.jsonl", content, output="jsonl"), "out.jsonl")
        result = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert [row.pop("embedding") for row in result] == vectors(len(lines)).tolist()
    assert result == lines


def test_surrogates_beside_the_text_survive(tmp_path: Path) -> None:
    line = b'{"text": "a", "other": "\\ud800"}'
    out = written(tmp_path, source(tmp_path, "x.jsonl", line, output="jsonl"), "out.jsonl")
    assert json.loads(out.read_bytes())["other"] == "\ud800"


def test_result_replaces_at_once(tmp_path: Path) -> None:
    """What cannot be written leaves the file that was there, and nothing else."""
    rows = source(tmp_path, "x.txt", b"a\n")
    (tmp_path / "out.npy").mkdir()
    with pytest.raises(FileError, match=r"out\.npy cannot be written"):
        written(tmp_path, rows, "out.npy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npy", "out.npy.partial", "x.txt"]
