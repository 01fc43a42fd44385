"""The examples' data and shape, those that need a token set, and the code blocks of the README."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from echo_integrations.token_set import TokenSet

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()]


def test_every_question_has_a_passage_of_its_own() -> None:
    passages, questions = rows("corpus.jsonl"), rows("questions.jsonl")
    ids = [passage["id"] for passage in passages]
    assert len(passages) >= 60 and len(set(ids)) == len(ids) and len({p["text"] for p in passages}) == len(ids)
    assert len(questions) == 40 and len({question["passage"] for question in questions}) == 40
    assert {question["passage"] for question in questions} <= set(ids)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 70


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """An example's ``main``, as from the command line."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    module.main()


def test_one_backbone_rag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--folder", str(tmp_path), "--max-new-tokens", "8"]
    outputs = []
    for _ in range(2):  # the second time finds its passages indexed
        run("one_backbone_rag", monkeypatch, *arguments)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    titles = {row["title"] for row in rows("corpus.jsonl")}
    found = re.findall(r"(?m)^ +-?\d\.\d{3}  (.*?): ", outputs[0])
    assert len(found) == 2 and set(found) <= titles
    assert re.search(r"(?m)^answer    \S", outputs[0])
    assert "One copy of 8 M parameters" in outputs[0] and "echo-mini, which knows little" in outputs[0]


def test_read_embeddings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("read_embeddings", monkeypatch, "--max-new-tokens", "4")
    out = capsys.readouterr().out
    found = re.findall(r"(?m)^ +(-?\d\.\d{3})  (.*?): .*\n   reads  ", out)
    assert len(found) == 3 and {title for _, title in found} <= {row["title"] for row in rows("corpus.jsonl")}
    assert [score for score, _ in found] == sorted((score for score, _ in found), key=float, reverse=True)
    assert len(re.findall(r"(?m)^ +[12]  '", out)) == 2  # compression positions


def test_train_domain_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The whole way in a few steps; the queries to train on are none of those to test with."""
    test = {row["question"] for row in rows("questions.jsonl")}
    queries = [row["query"] for row in rows("domain_queries.jsonl")]
    assert len(set(queries)) == len(queries) >= 200 and not test & set(queries)
    few = "".join(json.dumps({"query": query}) + "\n" for query in queries[:60])
    for name in ("corpus", "questions"):
        shutil.copy(EXAMPLES / "data" / f"{name}.jsonl", tmp_path)
    (tmp_path / "domain_queries.jsonl").write_text(few, encoding="utf-8")
    run("train_domain_tokens", monkeypatch, "--steps", "2", "--data", str(tmp_path), "--out", str(tmp_path / "tokens"))
    out = capsys.readouterr().out
    assert re.findall(r"(?m)^(\w+) +recall@1 +\d+\.\d%  recall@3 +\d+\.\d%", out) == ["before", "after"]
    assert (tmp_path / "tokens" / "report" / "index.html").is_file()
    assert TokenSet.load(tmp_path / "tokens").training["steps"] == 2


def test_the_code_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mini_tokens: Path, tmp_path: Path
) -> None:
    """With models from here in place of those on the Hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mini_tokens, "tokens/legal")
    TokenSet.load(mini_tokens).export_released("released")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        here = block.replace("Qwen/Qwen3-0.6B", "echo-mini").replace("McGill-NLP/LLM2Vec-Gen-Qwen3-8B", "./released")
        exec(compile(here, "README.md", "exec"), names)
    assert "green button" in capsys.readouterr().out
