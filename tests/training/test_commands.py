"""``echo-embed respond``, ``train`` and ``evaluate`` from the outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from echo_integrations import Encoder
from echo_integrations.cli import main
from echo_integrations.training.evaluation import evaluate
from echo_integrations.training.responses import respond

Tiny = Callable[[str], Path]
FLOAT32 = ["--dtype", "float32"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose time with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# respond


def test_respond(tmp_path: Path, tiny_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "q.jsonl", [{"query": "water", "id": 1}, {"query": "the pump"}, {"query": "water"}])
    out = tmp_path / "out.jsonl"
    arguments = ["respond", str(source), "--out", str(out), "--model", str(tiny_model("llama")), *FLOAT32]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{out}: 2 rows, 2 of them new, 0 unanswered" in said.err

    again = tmp_path / "again.jsonl"
    llm = Encoder(model=str(tiny_model("llama")), dtype="float32")
    respond([{"query": "water", "id": 1}, "the pump"], again, llm=llm, max_new_tokens=4)
    assert rows_of(out) == rows_of(again)

    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    assert "2 rows, 0 of them new" in capsys.readouterr().err
    assert main([*arguments, "--max-new-tokens", "5"]) == 1
    assert "cannot be continued: max_new_tokens was 4 and is now 5" in capsys.readouterr().err
    assert rows_of(out) == rows_of(again)


def test_respond_in_shards_and_by_drawing(tmp_path: Path, tiny_model: Tiny) -> None:
    source = tmp_path / "q.txt"
    source.write_text("".join(f"the pump {i}\n" for i in range(12)))
    common = ["--model", str(tiny_model("llama")), *FLOAT32, "--max-new-tokens", "3", "--temperature", "0.7"]
    outs = [tmp_path / f"{shard}.jsonl" for shard in range(2)]
    for shard, out in enumerate(outs):
        more = ["--seed", "5", "--num-shards", "2", "--shard", str(shard), "--token-budget", "30"]
        assert main(["respond", str(source), "--out", str(out), *common, *more]) == 0
    whole = tmp_path / "whole.jsonl"
    assert main(["respond", str(source), "--out", str(whole), *common, "--seed", "5"]) == 0
    parts = [row for out in outs for row in rows_of(out)]
    assert all(map(rows_of, outs))
    assert sorted(parts, key=str) == sorted(rows_of(whole), key=str)


def test_respond_to_bad_lines(tmp_path: Path, tiny_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"query": "water"}\n{oops\n{"text": "rain"}\n')
    arguments = [
        "respond",
        str(source),
        "--out",
        str(out),
        "--model",
        str(tiny_model("llama")),
        "--max-new-tokens",
        "2",
    ]
    assert main(arguments) == 1
    assert f"{source}, line 2: no JSON" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--on-error", "skip"]) == 0
    said = capsys.readouterr().err
    assert f"echo-embed: {source}: rows were left out: 1 malformed (first: line 2), 1 without query" in said
    assert [row["query"] for row in rows_of(out)] == ["water"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.txt"], "--out x.txt must end in .jsonl"),
        (["--out", "x.jsonl", "--pooling", "last"], "unrecognized arguments: --pooling last"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_wrong_usage_of_respond(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["respond", "q.jsonl", *arguments])
    assert message in capsys.readouterr().err


# evaluate


TOPICS = ["The valve is closed.", "Rain fell all night.", "A pump restarts after a power failure.", "Soil is dry."]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    write(tmp_path / "q.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(TOPICS)])
    write(tmp_path / "c.jsonl", [{"_id": f"d{i}", "title": text, "text": "and more"} for i, text in enumerate(TOPICS)])
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(f"{i}\td{i}\t1\n" for i in range(4))
    (tmp_path / "r.tsv").write_text(qrels)
    names = [("--queries", "q.jsonl"), ("--corpus", "c.jsonl"), ("--qrels", "r.tsv")]
    return [part for flag, name in names for part in (flag, str(tmp_path / name))]


def expected(encoder: Encoder, ks: tuple[int, ...]) -> dict[str, float]:
    queries = {str(i): text for i, text in enumerate(TOPICS)}
    corpus = {f"d{i}": f"{text} and more" for i, text in enumerate(TOPICS)}
    return evaluate(encoder, queries, corpus, {str(i): {f"d{i}": 1} for i in range(4)}, ks=ks)


def test_evaluate(files: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *files, "--json", "--ks", "1", "3", "--mode", "classical", *FLOAT32]) == 0
    classical = Encoder(mode="classical", dtype="float32")
    assert json.loads(capsys.readouterr().out) == expected(classical, (1, 3))

    assert main(["evaluate", "echo-mini", *files, *FLOAT32]) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    found = expected(Encoder(dtype="float32"), (1, 10))
    assert lines == {name: "4" if name == "queries" else f"{value:.4f}" for name, value in found.items()}


def test_evaluate_a_token_set(files: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tokens = str(data / "qwen3" / "base"), str(data / "qwen3" / "llm2vec_gen")
    assert main(["evaluate", tokens, *files, "--json", "--model", base, *FLOAT32]) == 0
    encoder = Encoder(mode="llm2vec-gen", model=base, token_set=tokens, dtype="float32")
    assert json.loads(capsys.readouterr().out) == expected(encoder, (1, 10))
    with pytest.raises(SystemExit):
        main(["evaluate", tokens, *files, "--token-set", "other"])
    with pytest.raises(SystemExit):
        main(["evaluate", "echo-mini", *files, "--model", "echo-mini"])


def test_evaluate_says_what_is_wrong(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(files[5]).write_text("0\td9\t1\n")
    assert main(["evaluate", *files]) == 1
    assert "echo-embed: the document 'd9', judged for query '0', is not in the corpus" in capsys.readouterr().err
    Path(files[3]).unlink()
    assert main(["evaluate", *files]) == 1
    assert "c.jsonl: No such file or directory" in capsys.readouterr().err


# train


def test_train_then_evaluate(tmp_path: Path, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, tokens = tmp_path / "recipe.yaml", tmp_path / "tokens"
    recipe.write_text("model: echo-mini\nmax_steps: 50\nbatch_size: 2\nvalidation_examples: 0\ndtype: float32\n")
    rows = [{"query": f"what about {text}", "response": text} for text in TOPICS]
    examples = write(tmp_path / "x.jsonl", [*rows, {"query": "empty", "response": "", "error": "the answer is empty"}])
    arguments = [
        "train",
        str(recipe),
        "--data",
        str(examples),
        "--out",
        str(tokens),
        "--teacher",
        "classical:echo-mini",
    ]
    assert main([*arguments, "--set", "max_steps=2", "--set", "thought_tokens=1", "--set", "compression_tokens=2"]) == 0
    said = capsys.readouterr().err
    assert "1 without an answer (first: line 5)" in said
    assert f"{tokens}: a token set of 3 tokens and 256 components" in said
    assert main(["evaluate", str(tokens), *files, "--json", *FLOAT32]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == expected(Encoder(mode="llm2vec-gen", token_set=tokens, dtype="float32"), (1, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max_stepz=2", "max_stepz: Extra inputs are not permitted"),
        ("max_steps", "--set max_steps: write NAME=VALUE"),
        ("lora.r=0", "lora: r: Input should be greater than or equal to 1"),
        ("max_steps={", "--set max_steps={: the value is no YAML"),
    ],
)
def test_train_with_wrong_settings(
    tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: echo-mini\n")
    arguments = ["train", str(recipe), "--data", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--set", change]) == 1
    assert message in capsys.readouterr().err


def test_help_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("respond", "train", "evaluate"))
    for name in ("respond", "train", "evaluate"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert "default:" in capsys.readouterr().out
