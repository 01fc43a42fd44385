"""Write training data for echo-mini from textbooks and instructions: rows of query, response and source.

    python training/prepare_data.py --data FOLDER --out FOLDER

general.jsonl           queries with responses; nothing of the books that are kept for choosing and reporting
domain_queries.jsonl    half of the questions of one left-out book, and nothing else: no answers, no passages, no labels
domain_test.json        the other half, by name, for `measure.py --questions`
domain.jsonl            with --answers, what a domain's tokens are trained on: each of its queries, whose response is
                        the question and the model's answer; the terms that the queries name, each its own response;
                        and glossary rows of the general set, so that what that taught is kept

The answers come from the model: `echo-embed respond domain_queries.jsonl --model echo-mini --out answers.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from books import (
    CHOOSE,
    DOMAIN,
    REPORT,
    RESERVED,
    TRAIN,
    Module,
    is_training_half,
    key,
    read_modules,
    read_pairs,
    read_rows,
    write_rows,
)

from echo_integrations.config import DEFAULT_INSTRUCTIONS, Role

ASK = DEFAULT_INSTRUCTIONS[Role.QUERY]
SUMMARIZE = DEFAULT_INSTRUCTIONS[Role.DOCUMENT]
RESEMBLE = "Generate text that is semantically similar to this text:"

# The mix: rows of each source, at most; sized for two CPU cores. Two kinds of row teach two sides of retrieval. A
# *question* has its answer as the response; the vector of a *text* shall be the teacher's vector of that text, so that
# it is its own response.
MIX = {
    "answers": 1_000,  # review questions -> their answers; few books print them
    "questions": 2_200,  # review questions -> themselves: few have answers, and a teacher knows what they are about
    "glossary": 6_000,  # terms -> meanings
    "headings": 2_000,  # title and heading -> the first paragraph below
    "instructions": 2_500,  # prompts of many tasks -> answers
    "passages": 1_500,  # passages of textbooks -> themselves
    "meanings": 2_000,  # glossary meanings -> themselves: short documents
    "sentences": 4_000,  # single sentences, of STS training pairs and textbooks -> themselves
}
# What stands before a question: the query instruction that the encoder puts there, in this share, or nothing.
ASKED = {"answers": 0.9, "questions": 0.9, "glossary": 0.8, "headings": 0.7, "instructions": 0.3}
# What stands before a text: an instruction, in this share, or nothing.
INSTRUCTED = {"passages": (SUMMARIZE, 0.9), "meanings": (SUMMARIZE, 0.9), "sentences": (RESEMBLE, 0.7)}

MIN_ANSWER = 4  # words that an answer has at least; a letter or a number says nothing to a teacher
MAX_QUERY = 120  # words; longer instructions are left out
MAX_RESPONSE = 60  # words; longer responses end at a sentence
PASSAGE = 100  # words of a passage to train on
KEPT_GENERAL = 1_500  # glossary rows of the general set among a domain's
TERM_WORDS = 3  # words of a term that a query names, at most
PER_PASSAGE = 2  # rows from one passage of the instructions, whose templates repeat it
BOILERPLATE = re.compile(
    r"summary|review|questions|exercises|problems|key (terms|concepts)|link to learning|glossary", re.I
)


class Example(NamedTuple):
    """A query and its response, before instructions."""

    query: str
    response: str


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files and print what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="BOOK", help="further books to keep out")
    parser.add_argument("--domain", default=DOMAIN, metavar="BOOK")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="what the model answered to domain_queries.jsonl")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    known = {*TRAIN, *CHOOSE, *REPORT, *RESERVED}
    if unknown := {args.domain, *args.leave_out} - known:
        parser.error(f"no book is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    args.out.mkdir(parents=True, exist_ok=True)

    books = [book for book in TRAIN if book not in (args.domain, *args.leave_out)]
    rows = general_set(args.data, books, args.seed)
    write_rows(args.out / "general.jsonl", rows)
    train, test = domain_questions(args.data, args.domain)
    write_rows(args.out / "domain_queries.jsonl", ({"query": f"{ASK} {question}"} for question in train))
    names = {"book": args.domain, "questions": [key(args.domain, question) for question in test]}
    if args.answers:
        kept = [row for row in rows if row["source"] in ("glossary", "meanings")][:KEPT_GENERAL]
        asked = list(read_rows(args.answers))
        write_rows(args.out / "domain.jsonl", [*answered(asked), *named_terms(train), *kept])
    (args.out / "domain_test.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")

    print(
        f"{len(books)} books: {', '.join(books)}\n\n| source | rows | with instruction | words of query | of response |"
    )
    print("|---|---|---|---|---|")
    for source in (*MIX, "all"):
        of = [row for row in rows if source in (row["source"], "all")]
        told = sum(row["query"].startswith((ASK, SUMMARIZE, RESEMBLE)) for row in of) / max(1, len(of))
        words = [sum(len(row[side].split()) for row in of) / max(1, len(of)) for side in ("query", "response")]
        print(f"| {source} | {len(of)} | {told:.0%} | {words[0]:.0f} | {words[1]:.0f} |")
    print(f"\n{args.domain}: {len(train)} queries to train on, {len(test)} to test")


def answered(rows: Sequence[dict[str, str]]) -> Iterator[dict[str, str]]:
    """A weak model's answer says little, so the question stands before it in what the teacher embeds."""
    for row in rows:
        if not row.get("error"):
            question = row["query"].removeprefix(ASK).strip()
            yield {"query": row["query"], "response": f"{question} {row['response']}"}


def named_terms(questions: Sequence[str]) -> list[dict[str, str]]:
    """What questions name, each its own response: runs of a few words between stop words and punctuation."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # type: ignore[import-untyped]

    terms: dict[str, None] = {}  # in the order in which they are met
    for question in questions:
        words: list[str] = []
        for word in [*re.findall(r"[^\W\d_][\w'’-]*|[^\s\w]", question.casefold()), "."]:
            if word[0].isalpha() and word not in ENGLISH_STOP_WORDS:
                words.append(word)
                continue
            if 1 <= len(words) <= TERM_WORDS and len(term := " ".join(words)) > 3:
                terms[term] = None
            words = []
    return [{"query": f"{ASK} {term}", "response": term} for term in terms]


def general_set(data: Path, books: Collection[str], seed: int) -> list[dict[str, str]]:
    """Rows of every source in `MIX`, shuffled; none asks what a book outside of these asks or defines."""
    chance = random.Random(seed)
    questions, glossary = list(read_rows(data / "questions_dev.jsonl")), list(read_rows(data / "glossary_dev.jsonl"))
    kept_out = {key(row["question"]) for row in questions if row["book"] not in books}
    kept_out |= {key(row["term"]) for row in glossary if row["book"] not in books}
    kept_out |= {key(text) for *pair, _ in read_pairs(data / "stsb_en_dev.csv") for text in pair}
    meanings = [Example(row["term"], row["meaning"]) for row in glossary if row["book"] in books]
    meanings = [example for example in meanings if key(example.query) not in kept_out]
    modules = read_modules(data, books)
    passages = [passage for module in modules for passage in module.passages(PASSAGE)]
    sentences = [text for *pair, _ in read_pairs(data / "stsb_en_train.csv") for text in pair]
    sentences += [
        sentence for passage in chance.sample(passages, min(6_000, len(passages))) if (sentence := middle(passage))
    ]
    found = {
        "answers": [
            Example(row["question"], row["answer"])
            for row in questions
            if row["book"] in books and count_words(row["answer"]) >= MIN_ANSWER
        ],
        "questions": [Example(row["question"], row["question"]) for row in questions if row["book"] in books],
        "glossary": meanings,
        "headings": [example for module in modules for example in headings(module)],
        "instructions": instructions(data, chance),
        "passages": [Example(text, text) for text in passages],
        "meanings": [Example(meaning, meaning) for _, meaning in meanings],
        "sentences": [Example(text, text) for text in sentences],
    }
    rows: list[dict[str, str]] = []
    seen: set[str] = set()
    for source, examples in found.items():
        chance.shuffle(examples)
        taken = 0
        for query, response in examples:
            response = first_sentences(response, MAX_RESPONSE) if query != response else response
            name = key(source, query)
            if taken == MIX[source] or name in seen or key(query) in kept_out or not response:
                continue
            seen.add(name)
            taken += 1
            instruction, share = INSTRUCTED[source] if source in INSTRUCTED else (ASK, ASKED[source])
            query = f"{instruction} {query.strip()}" if chance.random() < share else query.strip()
            rows.append({"query": query, "response": response.strip(), "source": source})
    chance.shuffle(rows)
    return rows


def headings(module: Module) -> Iterator[Example]:
    """Title and heading with the paragraph right below; the title alone with the module's first paragraph."""
    above: str | None = ""
    for kind, text in module.sections:
        if kind == "h":
            above = None if BOILERPLATE.search(text) else text
        elif above is not None and len(text.split()) >= 20:
            yield Example(f"{module.title}: {above}" if above else module.title, text)
            above = None


def instructions(data: Path, chance: random.Random) -> list[Example]:
    """Instructions with answers of some length, few for each passage.

    Templates repeat a passage under other words, so that it is known by its longest line's end.
    """
    rows = list(read_rows(data / "instructions.jsonl.xz"))
    chance.shuffle(rows)
    uses: Counter[str] = Counter()
    kept = []
    for row in rows:
        query, response = row["query"].strip(), row["response"].strip()
        if count_words(response) < MIN_ANSWER or len(query.split()) > MAX_QUERY:
            continue
        longest = max(query.splitlines(), key=len, default="")
        names = {key(longest[-80:]), key(response)}
        if any(uses[name] >= PER_PASSAGE for name in names):
            continue
        uses.update(names)
        kept.append(Example(query, response))
    return kept


def count_words(text: str) -> int:
    """How many words of three letters or more; numbers and option letters do not count."""
    return len(re.findall(r"[^\W\d_]{3,}", text))


def first_sentences(text: str, words: int) -> str:
    """As many whole sentences as fit into so many words; of a longer first sentence its first words."""
    taken: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        if len(taken) + len(sentence.split()) > words:
            break
        taken += sentence.split()
    return " ".join(taken or text.split()[:words])


def middle(passage: str) -> str:
    """A whole sentence of 6 to 40 words from within a passage; "" where there is none."""
    whole = [s for s in re.split(r"(?<=[.!?])\s+", passage)[2:-1] if 6 <= len(s.split()) <= 40]
    return whole[len(whole) // 2] if whole else ""


def domain_questions(data: Path, book: str) -> tuple[Sequence[str], Sequence[str]]:
    """The questions of a book, each once, in two halves: to train on and to test."""
    asked = {
        key(book, row["question"]): row["question"].strip()
        for row in read_rows(data / "questions_dev.jsonl")
        if row["book"] == book
    }
    train = [question for question in asked.values() if is_training_half(book, question)]
    return train, [question for question in asked.values() if not is_training_half(book, question)]


if __name__ == "__main__":
    main()
