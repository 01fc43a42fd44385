import importlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

TRAINING = Path(__file__).parents[2] / "training"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of the folder that a person runs, as a module."""
    monkeypatch.syspath_prepend(TRAINING)
    return importlib.import_module


def module(script: Callable[[str], ModuleType], name: str, words: int, book: str = "b") -> object:
    text = " ".join(f"{name}{i}" for i in range(words))
    return script("books").Module(book=book, id=name, title=name.upper(), sections=[("h", "No"), ("p", text)])


def test_no_book_serves_two_purposes(script: Callable[[str], ModuleType]) -> None:
    books = script("books")
    every = [*books.TRAIN, *books.CHOOSE, *books.REPORT, *books.RESERVED]
    assert len(every) == len(set(every)) == 19
    assert books.DOMAIN in books.REPORT


def test_passages_are_even_and_begin_with_the_title(script: Callable[[str], ModuleType]) -> None:
    made = script("books").Module(book="b", id="m", title="T", sections=[("p", "a b c"), ("h", "no"), ("p", "d e f g")])
    assert made.passages(words=3) == ["T. a b c", "T. d e f g"]
    assert made.passages(words=100) == ["T. a b c d e f g"]
    assert script("books").Module(book="b", id="m", title="T", sections=[("h", "no")]).passages() == []


def test_names_do_not_depend_on_case_spaces_or_punctuation(script: Callable[[str], ModuleType]) -> None:
    key = script("books").key
    assert key("b", "What is  inflation?") == key("b", "what is inflation")
    assert key("b", "What is inflation?") != key("b", "What is deflation?") != key("c", "What is deflation?")


def test_headings_go_with_the_paragraph_below(script: Callable[[str], ModuleType]) -> None:
    first, second = "one " * 20, "two " * 20
    sections = [
        ("p", first),
        ("p", "more " * 20),
        ("h", "Cells"),
        ("p", second),
        ("h", "Review Questions"),
        ("p", first),
    ]
    made = script("books").Module(book="b", id="m", title="Life", sections=sections)
    found = [tuple(example) for example in script("prepare_data").headings(made)]
    assert found == [("Life", first), ("Life: Cells", second)]


def test_whole_sentences_while_they_fit(script: Callable[[str], ModuleType]) -> None:
    first_sentences = script("prepare_data").first_sentences
    assert first_sentences("One two. Three four! Five six?", 4) == "One two. Three four!"
    assert first_sentences("One two three.", 2) == "One two"
    assert script("prepare_data").count_words("(a) 2.176 Å; the beam is bent") == 3


def test_ranks_count_ties_against(script: Callable[[str], ModuleType]) -> None:
    scores = np.array([[3, 2, 1], [1, 1, 0], [0, 1, 2]], dtype=np.float32)
    relevant = np.array([[False, True, True], [True, False, False], [False, False, True]])
    assert script("metrics").ranks(scores, relevant).tolist() == [2, 2, 1]


def test_retrieval_by_hand(script: Callable[[str], ModuleType]) -> None:
    # chunks of modules 0, 0, 1, 2; the first question's module 1 is third of chunks, second of modules
    scores = np.array([[4, 3, 2, 1], [1, 1, 2, 9]], dtype=np.float32)
    found = script("metrics").retrieval(scores, np.array([0, 0, 1, 2]), np.array([1, 2]))
    assert found == {"R@1": 0.5, "R@10": 1.0, "nDCG@10": pytest.approx((1 / np.log2(3) + 1) / 2)}


def test_select_takes_whole_modules_asked_ones_first(script: Callable[[str], ModuleType]) -> None:
    modules = [module(script, f"m{i}", 300) for i in range(10)]  # 2 passages each
    select = script("measure").select
    kept = [made.id for made in select(modules, {"m0", "m1", "m2", "m3"}, limit=9)]
    assert len(kept) == 4 and sum(name in ("m0", "m1", "m2", "m3") for name in kept) == 3
    assert select(modules, set(), limit=0) == modules


def test_the_general_set_says_nothing_of_books_kept_out(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books, data = script("books"), tmp_path / "data"
    data.mkdir()
    kept_out, trained = books.DOMAIN, books.TRAIN[0]
    text = " ".join(f"Alpha beta gamma delta epsilon zeta {i}." for i in range(60))
    for name, rows in {
        "textbooks.jsonl.xz": [
            {"book": book, "id": "m", "title": title, "sections": [["p", f"{title} {text}"]]}
            for book, title in ((kept_out, "Secret"), (trained, "Open"))
        ],
        "instructions.jsonl.xz": [
            {"query": "Say it", "response": "These are four words"},
            {"query": "No", "response": "B"},
        ],
        "questions_dev.jsonl": [
            {"book": book, "module": "m", "question": f"{what} {i}?", "answer": f"{what} answer of many words"}
            for book, what in ((kept_out, "secret"), (trained, "open"))
            for i in range(20)
        ],
        "glossary_dev.jsonl": [
            {"book": kept_out, "module": "m", "term": "Shared term", "meaning": "a secret"},
            {"book": trained, "module": "m", "term": "shared term", "meaning": "another secret"},
            {"book": trained, "module": "m", "term": "open term", "meaning": "a meaning"},
        ],
    }.items():
        with lzma.open(data / name, "wt") if name.endswith(".xz") else (data / name).open("w") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    (data / "stsb_en_train.csv").write_text("A man sings.,A man is singing.,4.5\nHeld out.,Another,1.0\n")
    (data / "stsb_en_dev.csv").write_text("held out,x,1.0\n")

    script("prepare_data").main(["--data", str(data), "--out", str(tmp_path / "out")])
    rows = [json.loads(line) for line in (tmp_path / "out" / "general.jsonl").open()]
    assert {row["source"] for row in rows} == set(script("prepare_data").MIX)
    assert not any("secret" in json.dumps(row).lower() or "held out" in json.dumps(row).lower() for row in rows)
    assert "open term" in " ".join(row["query"] for row in rows)
    assert "| answers | 20 |" in capsys.readouterr().out

    queries = [json.loads(line)["query"] for line in (tmp_path / "out" / "domain_queries.jsonl").open()]
    test = json.loads((tmp_path / "out" / "domain_test.json").read_text())
    trained_on = {books.key(kept_out, query.split(": ", 1)[1]) for query in queries}
    assert test["book"] == kept_out and len(trained_on) + len(test["questions"]) == 20
    assert trained_on and test["questions"] and not trained_on & set(test["questions"])


def test_a_domains_response_is_question_and_answer(script: Callable[[str], ModuleType]) -> None:
    ask = script("prepare_data").ASK
    rows = [{"query": f"{ask} Why trade?", "response": "It pays."}, {"query": "Why?", "response": "", "error": "empty"}]
    found = list(script("prepare_data").answered(rows))
    assert found == [{"query": f"{ask} Why trade?", "response": "Why trade? It pays."}]


def test_terms_that_questions_name_are_their_own_response(script: Callable[[str], ModuleType]) -> None:
    prepare = script("prepare_data")
    questions = ["What is the opportunity cost of a free lunch?", "How does opportunity cost, or GDP, grow?"]
    rows = prepare.named_terms(questions)
    assert [row["response"] for row in rows] == ["opportunity cost", "free lunch", "does opportunity cost", "grow"]
    assert all(row["query"] == f"{prepare.ASK} {row['response']}" for row in rows)
    longer = "Why do heavy old wooden tables tax us?"
    assert [row["response"] for row in prepare.named_terms([longer])] == []
