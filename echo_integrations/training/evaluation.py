"""How good vectors are: retrieval over passages by exact search, and agreement with people's scores.

Works with every encoder that embeds queries and documents. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from echo_integrations.adapter import EncoderFields
from echo_integrations.batching import windows
from echo_integrations.config import EncodingError, InputError
from echo_integrations.files import FileError
from echo_integrations.training.data import read_rows

Vectors = NDArray[np.float32]

_DOCUMENTS = 8_192  # that are embedded, and then searched, together
_QUERIES = 1_024  # that search them together: 32 MiB of scores
_DEPTH = 10  # of nDCG and MRR


def evaluate(
    encoder: Any,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    ks: Sequence[int] = (1, 10),
) -> dict[str, float]:
    """Measure retrieval by cosine similarity.

    Args:
        encoder: has ``encode_query`` and ``encode_document`` (`Encoder`, a SentenceTransformer), or ``embed_query`` and
            ``embed_documents`` (LangChain).
        queries: texts by id; those without a relevant document count for nothing and are not embedded.
        corpus: texts by id.
        qrels: for a query's id the ids of documents and how relevant they are; 0 and less is not relevant.
        ks: depths of recall and hits.

    Returns:
        Means over the queries, 0 to 1: ``recall@k``, the share of a query's relevant documents among the first k;
        ``hit@k``, whether there is one; ``ndcg@10``, with the relevance itself as the gain; ``mrr@10``, one over
        the rank of the first relevant document. And ``queries``, how many were measured.

    Raises:
        InputError: an id of ``qrels`` that is nowhere, or nothing to measure.

    Example:
        >>> from echo_integrations import Encoder
        >>> corpus = {"a": "The pump restarts when the green button is held.", "b": "Rain fell all night."}
        >>> evaluate(Encoder(), {"1": "Rain fell all night."}, corpus, {"1": {"b": 1}})["recall@1"]
        1.0

    Source: the measures of trec_eval, as BEIR (Thakur et al., arXiv 2104.08663) uses them.
    """
    relevant = _relevant(queries, corpus, qrels)
    if not ks or min(ks) < 1:
        raise InputError(f"ks={tuple(ks)}: depths are 1 or more")
    ranked = retrieve(encoder, {name: queries[name] for name in relevant}, corpus, k=max(*ks, _DEPTH))
    measured = [_measure(ranked[name], gains, ks) for name, gains in relevant.items()]
    means = {name: float(np.mean([one[name] for one in measured])) for name in measured[0]}
    return {**means, "queries": len(measured)}


def retrieve(
    encoder: Any, queries: Mapping[str, str], corpus: Mapping[str, str], *, k: int = 10
) -> dict[str, list[str]]:
    """The documents nearest to each query by cosine, exactly; memory does not grow with the corpus.

    Args:
        encoder: as in `evaluate`.
        queries: texts by id.
        corpus: texts by id.
        k: documents for each query; fewer where the corpus is smaller.

    Returns:
        For each query's id the ids of documents, the nearest first; of equally near ones the corpus' order decides.

    Raises:
        InputError: ``encoder`` embeds nothing, or ``k`` is below 1.
        EncodingError: the encoder gave NaN, or arrays of another shape.

    Example:
        >>> from echo_integrations import Encoder
        >>> retrieve(Encoder(), {"1": "Rain fell."}, {"a": "Rain fell.", "b": "The pump restarts."}, k=1)
        {'1': ['a']}
    """
    if k < 1:
        raise InputError(f"k={k}: ask for at least one document")
    embed_queries, embed_documents = _embedders(encoder)
    if not queries or not corpus:
        return {name: [] for name in queries}
    vectors = _unit(embed_queries(list(queries.values())), len(queries))  # (Q, D)
    ids = list(corpus)
    best = np.empty((len(queries), 0), dtype=np.int64)  # (Q, k) indices of documents
    scores = np.empty((len(queries), 0), dtype=np.float32)  # (Q, k)
    first = 0
    for window in windows(corpus.values(), _DOCUMENTS):
        documents = _unit(embed_documents(window), len(window))  # (W, D)
        parts = [
            _merge(best[i : i + _QUERIES], scores[i : i + _QUERIES], vectors[i : i + _QUERIES] @ documents.T, first, k)
            for i in range(0, len(queries), _QUERIES)
        ]
        best, scores = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        first += len(window)
    return {name: [ids[index] for index in row] for name, row in zip(queries, best.tolist(), strict=True)}


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation; equal values share their mean rank.

    Args:
        a: (n,) numbers.
        b: (n,) numbers.

    Raises:
        InputError: other shapes, NaN, or values that are all equal.

    Example:
        >>> spearman([1, 2, 3], [10, 30, 20])
        0.5
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise InputError(f"arrays of shape {x.shape} and {y.shape}: give two lists of equally many numbers, 2 or more")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("there is NaN or infinity among the numbers: leave such pairs out")
    x, y = (ranks - ranks.mean() for ranks in map(_ranks, (x, y)))
    size = float(np.sqrt((x @ x) * (y @ y)))
    if not size:
        raise InputError("all numbers are equal: there is nothing to correlate")
    return float(x @ y) / size


def read_texts(path: str | PathLike[str]) -> dict[str, str]:
    """Texts by id from JSON lines of ``_id`` (or ``id``), ``text``, and optionally ``title``, which goes in front.

    Raises:
        FileError: a line that is not so, with its number, or an id that comes twice.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "corpus.jsonl"
        >>> _ = path.write_text('{"_id": "d1", "title": "Pumps", "text": "Hold the green button."}')
        >>> read_texts(path)
        {'d1': 'Pumps Hold the green button.'}
    """
    texts: dict[str, str] = {}
    for number, row in enumerate(read_rows(path, required=()), start=1):
        name, title, text = row.get("_id", row.get("id")), row.get("title") or "", row.get("text")
        if not isinstance(name, str | int) or not isinstance(text, str) or not isinstance(title, str):
            raise FileError(f"{path}, line {number}: write an _id and a text, and a title or none, all of them strings")
        if str(name) in texts:
            raise FileError(f"{path}, line {number}: the id {str(name)!r} comes twice")
        texts[str(name)] = f"{title} {text}".strip()
    return texts


def read_qrels(path: str | PathLike[str]) -> dict[str, dict[str, int]]:
    r"""Relevance by query and document from lines of query, document and a whole number, parted by tabs (BEIR's).

    Raises:
        FileError: a line that is not so, with its number.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "qrels.tsv"
        >>> _ = path.write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
        >>> read_qrels(path)
        {'q1': {'d1': 1}}
    """
    qrels: dict[str, dict[str, int]] = {}
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\n").split("\t")
            try:
                query, document, score = cells
                qrels.setdefault(query, {})[document] = int(score)
            except ValueError as error:
                if number == 1 and len(cells) == 3:  # a header
                    continue
                raise FileError(
                    f"{path}, line {number}: {line!r} is not a query's id, a document's id and a whole number with "
                    "tabs between them"
                ) from error
    return qrels


def _relevant(
    queries: Mapping[str, str], corpus: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """The documents that are relevant for each query that has any."""
    for query, documents in qrels.items():
        if query not in queries:
            raise InputError(f"the query {query!r} of the qrels is not among the queries: give the ones that belong")
        for document in documents:
            if document not in corpus:
                raise InputError(f"the document {document!r}, judged for query {query!r}, is not in the corpus")
    positive = {query: {d: gain for d, gain in qrels[query].items() if gain > 0} for query in queries if query in qrels}
    relevant = {query: gains for query, gains in positive.items() if gains}
    if not relevant:
        raise InputError("no query has a relevant document: there is nothing to measure")
    return relevant


def _measure(ranked: Sequence[str], gains: Mapping[str, int], ks: Sequence[int]) -> dict[str, float]:
    """The measures of one query."""
    found = np.array([gains.get(document, 0) for document in ranked])
    hits = found > 0
    ideal = np.array(sorted(gains.values(), reverse=True))
    ranks = np.flatnonzero(hits[:_DEPTH]) + 1
    return {
        **{f"recall@{k}": float(hits[:k].sum()) / len(gains) for k in ks},
        **{f"hit@{k}": float(hits[:k].any()) for k in ks},
        f"ndcg@{_DEPTH}": _discounted(found) / _discounted(ideal),
        f"mrr@{_DEPTH}": 1 / float(ranks[0]) if len(ranks) else 0.0,
    }


def _discounted(gains: NDArray[Any]) -> float:
    gains = gains[:_DEPTH]
    return float((gains / np.log2(np.arange(len(gains)) + 2)).sum())


def _embedders(encoder: Any) -> tuple[Callable[[list[str]], Any], Callable[[list[str]], Any]]:
    """How queries and documents are embedded."""
    if isinstance(encoder, EncoderFields):  # embeds many queries at once
        encoder = encoder.encoder
    if hasattr(encoder, "encode_query") and hasattr(encoder, "encode_document"):
        return encoder.encode_query, encoder.encode_document
    if hasattr(encoder, "embed_query") and hasattr(encoder, "embed_documents"):
        return lambda texts: [encoder.embed_query(text) for text in texts], encoder.embed_documents
    raise InputError(
        f"{type(encoder).__name__} is no encoder: it needs encode_query and encode_document, or LangChain's "
        "embed_query and embed_documents"
    )


def _unit(vectors: Any, count: int) -> Vectors:
    """(n, D) float32 rows of length 1; zeros stay zeros."""
    array = np.asarray(vectors, dtype=np.float32)
    if array.ndim != 2 or len(array) != count or not np.isfinite(array).all():
        raise EncodingError(f"the encoder gave an array of shape {array.shape}, or NaN in it, for {count} texts")
    sizes = np.linalg.norm(array, axis=1, keepdims=True)
    unit: Vectors = array / np.maximum(sizes, np.finfo(np.float32).tiny)
    return unit


def _merge(
    best: NDArray[np.int64], scores: Vectors, new: Vectors, first: int, k: int
) -> tuple[NDArray[np.int64], Vectors]:
    """(q, <= k) best documents and their scores, and (q, W) scores of the documents from ``first`` -> the best k."""
    depth = min(k, new.shape[1])
    floor = np.partition(new, -depth, axis=1)[:, -depth, None]  # (q, 1) the worst score that may count
    merged = np.empty((len(new), min(k, best.shape[1] + new.shape[1])), dtype=np.int64)
    kept = np.empty(merged.shape, dtype=np.float32)
    for row, candidates in enumerate(new >= floor):
        places = np.flatnonzero(candidates)
        all_places = np.concatenate([best[row], first + places])
        all_scores = np.concatenate([scores[row], new[row, places]])
        order = np.argsort(-all_scores, kind="stable")[: merged.shape[1]]  # earlier documents first among equals
        merged[row], kept[row] = all_places[order], all_scores[order]
    return merged, kept


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks
