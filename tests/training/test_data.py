"""Reading queries and examples, and what is wrong with lines that are not."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import warnings
from pathlib import Path

import pytest

from echo_integrations.config import InputError
from echo_integrations.files import FileError
from echo_integrations.training.data import (
    DataWarning,
    Example,
    data_hash,
    read_examples,
    read_queries,
    read_rows,
    split,
)

GOOD = b'{"query": "q", "response": "r"}\n'


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_fields_order_and_unicode(tmp_path: Path) -> None:
    lines = [
        {"query": "grün\u2028?", "response": " r1 ", "id": 7},
        {"query": "q2", "response": "r2", "negatives": ["n1", "n2"]},
        {"query": "q3", "response": "r3", "negatives": None},
    ]
    content = b"\xef\xbb\xbf" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    assert read_examples(write(tmp_path / "x.jsonl", content)) == [
        Example("grün\u2028?", " r1 "),
        Example("q2", "r2", ("n1", "n2")),
        Example("q3", "r3"),
    ]


@pytest.mark.parametrize(("name", "pack"), [("x.jsonl.xz", lzma.compress), ("x.JSONL.GZ", gzip.compress)])
def test_packed_files(tmp_path: Path, name: str, pack: object) -> None:
    packed = pack(GOOD * 5_000)  # type: ignore[operator]
    assert read_examples(write(tmp_path / name, packed)) == [Example("q", "r")]
    with pytest.raises(FileError, match=rf"{name} cannot be unpacked .* damaged or incomplete"):
        read_examples(write(tmp_path / name, packed[: len(packed) // 2]))


def test_another_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"x\.csv: its name must end in \.jsonl or \.txt"):
        read_examples(write(tmp_path / "x.csv", GOOD))


BAD = [
    (b"{query: 1}\n", r"line 2: no JSON \(", "1 malformed (first: line 2)"),
    (b"\n", r"line 2: no JSON \(", "1 malformed (first: line 2)"),
    (b'["q"]\n', r'line 2: no JSON object: write \{"query"', "1 malformed (first: line 2)"),
    (b"[" * 100_000 + b"\n", r"line 2: no JSON \(", "1 malformed (first: line 2)"),
    (b'{"query": "\xe9", "response": "r"}\n', r"line 2: no JSON \(.*utf-8", "1 malformed (first: line 2)"),
    (b'{"query": "\\ud800", "response": "r"}\n', r"line 2: .*'query' has a lone surrogate.*character 0", "1 malformed"),
    (b'{"response": "r"}\n', r"line 2: no field 'query' \(response\)", "1 without query (first: line 2)"),
    (b"{}\n", r"line 2: no field 'query' \(there is none\)", "1 without query (first: line 2)"),
    (b'{"query": "q", "response": null}\n', r"line 2: field 'response' is null", "1 without response (first: line 2)"),
    (b'{"query": 5, "response": "r"}\n', r"line 2: field 'query' is int", "1 without query (first: line 2)"),
    (b'{"query": " \\n", "response": "r"}\n', r"line 2: field 'query' is empty", "1 with an empty query"),
    (b'{"query": "q", "response": ""}\n', r"line 2: field 'response' is empty", "1 with an empty response"),
    (b'{"query": "q", "response": "r", "negatives": "n"}\n', r"line 2: field 'negatives'", "1 with bad negatives"),
    (b'{"query": "q", "response": "r", "negatives": [""]}\n', r"line 2: field 'negatives'", "1 with bad negatives"),
]


@pytest.mark.parametrize(("line", "message", "count"), BAD)
def test_a_bad_line_is_an_error_with_its_number_or_left_out_by_choice(
    tmp_path: Path, line: bytes, message: str, count: str
) -> None:
    path = write(tmp_path / "x.jsonl", GOOD + line + b'{"query": "q2", "response": "r"}\n')
    with pytest.raises(FileError, match=rf"x\.jsonl, {message}"):
        read_examples(path)
    with pytest.warns(DataWarning) as caught:
        assert read_examples(path, on_error="skip") == [Example("q", "r"), Example("q2", "r")]
    assert len(caught) == 1
    assert count in str(caught[0].message)
    assert caught[0].filename == __file__


def test_one_warning_counts_by_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b"x\n" + GOOD + b"y\n" + b'{"query": ""}\n')
    with pytest.warns(DataWarning, match=r"2 malformed \(first: line 1\), 1 with an empty query \(first: line 4\)"):
        read_examples(path, on_error="skip")


def test_rows_without_an_answer_are_never_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", GOOD + b'{"query": "q2", "response": "", "error": "the answer is empty"}\n')
    with pytest.warns(DataWarning, match=r"1 without an answer \(first: line 2\)"):
        assert read_examples(path) == [Example("q", "r")]
    assert read_queries(path) == ["q", "q2"]


def test_duplicates_count_once_and_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = b'{"query": "q", "response": "another"}\n'
    path = write(tmp_path / "x.jsonl", GOOD + other + GOOD + GOOD)
    with caplog.at_level(logging.WARNING):
        assert read_examples(path) == [Example("q", "r"), Example("q", "another")]
    assert "2 of 4 rows repeat a query and its response" in caplog.text


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no example"):
        read_examples(write(tmp_path / "x.jsonl", b""))
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="on_error='stop'"):
        read_examples(tmp_path / "x.jsonl", on_error="stop")  # type: ignore[arg-type]


def test_queries_of_text_files(tmp_path: Path) -> None:
    assert read_queries(write(tmp_path / "q.txt", b"\xef\xbb\xbfone \r\ntwo\none \n")) == ["one ", "two", "one "]
    with pytest.raises(FileError, match=r"q\.txt, line 2: field 'query' is empty"):
        read_queries(write(tmp_path / "q.txt", b"one\n\ntwo\n"))
    with pytest.raises(FileError, match=r"q\.txt, line 2: no UTF-8"):
        read_queries(write(tmp_path / "q.txt", b"one\n\xff\n"))
    with pytest.warns(DataWarning, match="1 with an empty query .*, 1 not UTF-8"):
        assert read_queries(write(tmp_path / "q.txt", b"one\n\n\xff\n"), on_error="skip") == ["one"]


def test_rows_keep_their_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", b'{"id": 1, "query": "q", "more": [2]}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_rows(path)) == [{"id": 1, "query": "q", "more": [2]}]


# Splitting


EXAMPLES = [Example(f"q{i % 40}", f"r{i}") for i in range(60)]  # 20 queries with two responses, 20 with one


def test_split_parts_by_query() -> None:
    train, held_out = split(EXAMPLES, 15, seed=1)
    assert len(held_out) == 15
    assert sorted(train + held_out, key=EXAMPLES.index) == EXAMPLES
    assert train == sorted(train, key=EXAMPLES.index)
    assert not {e.query for e in train} & {e.query for e in held_out}
    assert (train, held_out) == split(EXAMPLES, 15, seed=1)
    assert held_out != split(EXAMPLES, 15, seed=2)[1]
    assert set(held_out) == set(split(EXAMPLES[::-1], 15, seed=1)[1])
    assert split(EXAMPLES, 0, seed=1) == (EXAMPLES, [])


def test_white_space_does_not_make_another_query() -> None:
    for seed in range(20):
        train, held_out = split([Example("q", "a"), Example(" q\n", "b"), Example("other", "c")], 2, seed)
        assert {e.query.strip() for e in train}.isdisjoint({e.query.strip() for e in held_out})


def test_impossible_splits() -> None:
    for validation in (-1, 60, 61):
        with pytest.raises(InputError, match=rf"validation={validation} of 60 examples"):
            split(EXAMPLES, validation, seed=0)
    with pytest.raises(InputError, match="every query has more responses"):
        split([Example("q", "a"), Example("q", "b")], 1, seed=0)


def test_hash_names_the_data() -> None:
    one = [Example("a", "b", ("c",)), Example("d", "e")]
    others = [one[::-1], one[:1], [Example("a", "b"), one[1]], [Example("a", "b", ("c", "")), one[1]], []]
    assert len({data_hash(one), *map(data_hash, others)}) == 6
    assert data_hash(iter(one)) == data_hash(one)
    assert len(data_hash(one)) == 32
