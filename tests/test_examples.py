"""The examples' data and shape, and the code blocks of the README. The examples themselves are run by ``make demo``."""

import json
import re
from pathlib import Path

import pytest

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


def test_the_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert "green button" in capsys.readouterr().out
