"""Measures against numbers worked out by hand, and search against sorting everything."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.embeddings import Embeddings

from echo_integrations import Encoder
from echo_integrations.config import EncodingError, InputError
from echo_integrations.files import FileError
from echo_integrations.langchain import EchoEmbeddings
from echo_integrations.training import evaluation
from echo_integrations.training.evaluation import evaluate, read_qrels, read_texts, retrieve, spearman


class Angles:
    """Embeds a number as a direction, in degrees, so that the nearest number is the nearest text."""

    def encode_query(self, texts: list[str]) -> np.ndarray:
        angles = np.radians([float(text) for text in texts])
        return 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    encode_document = encode_query


class LangChainAngles(Embeddings):
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return Angles().encode_document(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


CORPUS = {f"d{i}": str(10 * i) for i in range(12)}  # 0 to 110 degrees
QUERIES = {"a": "1", "b": "52", "c": "101", "unjudged": "7"}


@pytest.mark.parametrize("encoder", [Angles(), LangChainAngles()])
def test_measures_by_hand(encoder: Any) -> None:
    qrels = {
        "a": {"d0": 1, "d3": 1, "d5": 0},  # ranks 1 and 4: d0 d1 d2 d3 ...
        "b": {"d4": 2, "d6": 1, "d9": -1},  # d5(2) d6(8) d4(12) d7(18) ...: ranks 3 and 2
        "c": {"d0": 1},  # the farthest but one document is rank 11: d0 is 101 away, d1 91
    }
    got = evaluate(encoder, QUERIES, CORPUS, qrels, ks=(1, 2, 3, 12))
    a = (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    b = (1 / math.log2(3) + 2 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert got == pytest.approx(
        {
            "recall@1": (0.5 + 0 + 0) / 3,
            "recall@2": (0.5 + 0.5 + 0) / 3,
            "recall@3": (0.5 + 1 + 0) / 3,
            "recall@12": 1.0,
            "hit@1": 1 / 3,
            "hit@2": 2 / 3,
            "hit@3": 2 / 3,
            "hit@12": 1.0,
            "ndcg@10": (a + b + 0) / 3,
            "mrr@10": (1 + 1 / 2 + 0) / 3,
            "queries": 3,
        }
    )


def test_what_cannot_be_measured() -> None:
    with pytest.raises(InputError, match="query 'x' of the qrels is not among the queries"):
        evaluate(Angles(), QUERIES, CORPUS, {"x": {"d0": 1}})
    with pytest.raises(InputError, match="document 'd99', judged for query 'a'"):
        evaluate(Angles(), QUERIES, CORPUS, {"a": {"d99": 1}})
    with pytest.raises(InputError, match="no query has a relevant document"):
        evaluate(Angles(), QUERIES, CORPUS, {"a": {"d0": 0}})
    with pytest.raises(InputError, match=r"ks=\(0,\)"):
        evaluate(Angles(), QUERIES, CORPUS, {"a": {"d0": 1}}, ks=(0,))
    with pytest.raises(InputError, match="list is no encoder"):
        evaluate([], QUERIES, CORPUS, {"a": {"d0": 1}})


@pytest.mark.parametrize(("documents", "queries"), [(8_192, 1_024), (7, 3), (1, 1)])
def test_search_is_exact_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, documents: int, queries: int) -> None:
    monkeypatch.setattr(evaluation, "_DOCUMENTS", documents)
    monkeypatch.setattr(evaluation, "_QUERIES", queries)
    generator = np.random.default_rng(0)
    vectors = generator.integers(-2, 3, (60, 3)).astype(np.float32)  # few values: many ties, and zero vectors
    sought = generator.integers(-2, 3, (20, 3)).astype(np.float32)

    class Table:
        def encode_query(self, texts: list[str]) -> np.ndarray:
            return sought[[int(text) for text in texts]]

        def encode_document(self, texts: list[str]) -> np.ndarray:
            return vectors[[int(text) for text in texts]]

    def unit(v: np.ndarray) -> np.ndarray:
        return v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9)

    cosines = unit(sought) @ unit(vectors).T
    for k in (1, 5, 60, 100):
        ranked = retrieve(Table(), {f"q{i}": str(i) for i in range(20)}, {f"d{i}": str(i) for i in range(60)}, k=k)
        for row in range(20):
            places = [int(name[1:]) for name in ranked[f"q{row}"]]
            assert len(set(places)) == len(places) == min(k, 60)
            np.testing.assert_allclose(cosines[row, places], np.sort(cosines[row])[::-1][:k], atol=1e-6)


def test_equally_near_documents_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_DOCUMENTS", 4)
    corpus = {f"d{i}": "0" for i in range(10)} | {"near": "45"}
    assert retrieve(Angles(), {"q": "45"}, corpus, k=4) == {"q": ["near", "d0", "d1", "d2"]}


def test_nothing_to_search() -> None:
    assert retrieve(Angles(), {}, CORPUS) == {}
    assert retrieve(Angles(), QUERIES, {}) == {name: [] for name in QUERIES}
    with pytest.raises(InputError, match="k=0"):
        retrieve(Angles(), QUERIES, CORPUS, k=0)


def test_vectors_that_are_none() -> None:
    with pytest.raises(EncodingError, match="or NaN in it"):
        retrieve(Angles(), {"q": "nan"}, CORPUS)


def test_this_packages_encoders_agree(mini: Callable[..., Encoder]) -> None:
    texts = {str(i): text for i, text in enumerate(["The valve is closed.", "Rain fell.", "A pump restarts.", "Soil."])}
    encoder = mini()
    expected = np.argsort(
        -(encoder.encode_query(list(texts.values())) @ encoder.encode_document(list(texts.values())).T)
    )
    ranked = {query: [str(place) for place in row] for query, row in zip(texts, expected, strict=True)}
    assert retrieve(encoder, texts, texts) == ranked
    assert retrieve(EchoEmbeddings(encoder=encoder), texts, texts) == ranked


# Spearman


def test_spearman_by_hand() -> None:
    # no ties: 1 - 6 * sum(d^2) / (n (n^2 - 1)); ranks 1 2 3 4 5 and 2 1 4 3 5: d^2 = 4
    assert spearman([10, 20, 30, 40, 50], [0.2, 0.1, 0.4, 0.3, 9]) == pytest.approx(1 - 6 * 4 / 120)
    # ties: ranks 1 2.5 2.5 4 and 1 3 2 4; covariance 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1, 2, 3], "equally many numbers"),
        ([1], [1], "2 or more"),
        ([[1, 2]], [[1, 2]], "shape"),
        ([1, math.nan], [1, 2], "NaN"),
        ([1, 1], [1, 2], "all numbers are equal"),
    ],
)
def test_spearman_of_nothing(a: Any, b: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spearman(a, b)


# Files


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"_id": "1", "text": "t"}\n{"id": 2, "title": "T", "text": "t"}\n{"_id": "3", "title": "", "text": ""}\n'
    )
    assert read_texts(path) == {"1": "t", "2": "T t", "3": ""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "t"}', r"line 2: write an _id and a text"),
        ('{"_id": "2"}', r"line 2: write an _id and a text"),
        ('{"_id": "2", "text": "t", "title": 5}', r"line 2: write an _id and a text"),
        ('{"id": 1, "text": "t"}', r"line 2: the id '1' comes twice"),
        ("{", r"line 2: no JSON"),
    ],
)
def test_bad_texts(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"_id": "1", "text": "t"}\n' + line + "\n")
    with pytest.raises(FileError, match=message):
        read_texts(path)


def test_qrels(tmp_path: Path) -> None:
    path = tmp_path / "qrels.tsv"
    rows = "a\td 1\t1\r\na\td2\t0\nb\td1\t2"
    for header in ("", "query-id\tcorpus-id\tscore\n"):
        path.write_text(header + rows, newline="")
        assert read_qrels(path) == {"a": {"d 1": 1, "d2": 0}, "b": {"d1": 2}}
    for bad in ("a\td1", "a\td1\tyes", "a 0 d1 1", ""):
        path.write_text(f"a\td1\t1\n{bad}\n")
        with pytest.raises(FileError, match=r"qrels\.tsv, line 2: .*tabs"):
            read_qrels(path)
