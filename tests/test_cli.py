"""``echo-embed`` from the outside: files in, files out, and everything that may go wrong between."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from echo_integrations import Encoder
from echo_integrations.cli import main
from echo_integrations.config import EncoderSettings

DIMENSION = 256
RECORD = np.dtype([("row", "<i8"), ("vector", "<f4", (DIMENSION,))])
FLOAT32 = ["--dtype", "float32"]
# A batch of its own for every text: its vector then does not depend, in its last bits, on what else is missing.
ONE_BY_ONE = ["--token-budget", "1", "--mode", "classical"]
TEXTS = ["The valve is closed.", "", "Rain fell all night, and nobody had closed the windows.", "grün", "", "\u2028"]
MANY = [f"Text {i} is about valve {i % 7}." for i in range(80)] + ["twice", "twice"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So that this process and those that it starts add up numbers in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(dtype="float32")


def write(path: Path, texts: list[str]) -> Path:
    """Texts in a file, with a field beside them where there can be one."""
    if path.suffix == ".txt":
        path.write_bytes("\n".join(texts).encode() + b"\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    else:
        pq.write_table(pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())}), path)
    return path


def read(path: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The vectors of a result and the fields beside them."""
    if path.suffix == ".npy":
        return np.load(path), []
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pq.read_table(path).to_pylist()
    return np.array([row.pop("embedding") for row in rows], dtype=np.float32).reshape(-1, DIMENSION), rows


def encode(source: Path | str, out: Path, *more: str) -> int:
    return main(["encode", str(source), "--out", str(out), *FLOAT32, *more])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What comes out


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", ["out.npy", "out.jsonl", "out.parquet", "OUT.NPY"])
def test_formats(tmp_path: Path, encoder: Encoder, suffix: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / f"in{suffix}", TEXTS)
    assert encode(source, tmp_path / out) == 0
    (tmp_path / out).rename(result := tmp_path / out.lower())
    vectors, fields = read(result)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, encoder.encode_document(TEXTS))
    if result.suffix != ".npy":
        assert [row["text"] for row in fields] == TEXTS
        assert [row.get("id") for row in fields] == ([None] * 6 if suffix == ".txt" else list(range(6)))
    assert names(tmp_path) == sorted([source.name, result.name])
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{tmp_path / out}: 6 rows of 256 components; 6 encoded in " in said.err
    assert "texts/s)" in said.err
    assert "%|" not in said.err  # no progress bar where there is no terminal


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", ["out.npy", "out.jsonl", "out.parquet"])
def test_empty_file(tmp_path: Path, suffix: str, out: str) -> None:
    source = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        write(source, [])
    else:
        source.touch()
    assert encode(source, tmp_path / out) == 0
    vectors, fields = read(tmp_path / out)
    assert vectors.shape == (0, DIMENSION)
    assert fields == []
    if out == "out.parquet":
        schema = pq.read_schema(tmp_path / out)
        assert schema.field("embedding").type == pa.list_(pa.float32(), DIMENSION)
        assert schema.field("text").type == pa.string()


def test_role_instruction_and_settings(tmp_path: Path) -> None:
    source = write(tmp_path / "in.txt", TEXTS)
    template = "{!%%prompt%%: %%text%%} {%%text%%}"
    flags = ["--query-template", template, "--query-instruction", "find it", "--truncate-dim", "8", "--no-normalize"]
    same = Encoder(
        dtype="float32",
        query_template=template,
        query_instruction="find it",
        truncate_dim=8,
        normalize_embeddings=False,
    )
    for role, instruction, expected in [
        ("query", None, same.encode_query(TEXTS)),
        ("query", "look", same.encode_query(TEXTS, instruction="look")),
        ("query", "", same.encode_query(TEXTS, instruction="")),
        ("document", None, same.encode_document(TEXTS)),
    ]:
        more = [] if instruction is None else ["--instruction", instruction]
        assert encode(source, tmp_path / "o.npy", "--overwrite", "--role", role, *more, *flags) == 0
        np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)


def test_instruction_without_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.txt", TEXTS)
    assert encode(source, tmp_path / "o.npy", "--instruction", "find it") == 1
    assert "an instruction ('find it') was given but the template" in capsys.readouterr().err
    assert names(tmp_path) == ["in.txt"]


def test_field(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": 1, "body": "a valve"}\n')
    assert encode(tmp_path / "in.jsonl", tmp_path / "o.npy", "--field", "body") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), encoder.encode_document(["a valve"]))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_standard_input(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    content = write(tmp_path / f"in{suffix}", TEXTS).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    more = [] if suffix == ".txt" else ["--format", suffix[1:]]
    assert encode("-", tmp_path / "o.jsonl", *more) == 0
    vectors, fields = read(tmp_path / "o.jsonl")
    assert [row["text"] for row in fields] == TEXTS
    np.testing.assert_array_equal(vectors, encoder.encode_document(TEXTS))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipe(tmp_path: Path, encoder: Encoder) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a\nb\n",))
    writer.start()
    assert encode(tmp_path / "pipe", tmp_path / "o.npy", "--format", "txt") == 0
    writer.join()
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), encoder.encode_document(["a", "b"]))


def test_progress_bar_and_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.txt", ["short", "word " * 50])
    assert encode(source, tmp_path / "o.npy", "--progress", "--max-length", "20") == 0
    said = capsys.readouterr().err
    assert "2/2" in said
    assert "echo-embed: row 2 has" in said
    assert "more than max_length=20" in said


# Going on


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """As if the disk were full: no file grows beyond ``size``; writing more gives EFBIG."""
    resource = pytest.importorskip("resource")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def records(partial: Path) -> tuple[bytes, np.ndarray]:
    """Header and whole records of a store."""
    header, _, rest = partial.read_bytes().partition(b"\n")
    return header + b"\n", np.frombuffer(rest[: len(rest) // RECORD.itemsize * RECORD.itemsize], RECORD)


def wait_for(partial: Path, rows: int, running: Callable[[], bool]) -> None:
    while not partial.exists() or partial.stat().st_size < 1_000 + rows * RECORD.itemsize:
        assert running(), "it ended before it could be stopped"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert encode(write(folder / "in.jsonl", MANY), folder / "o.npy", *ONE_BY_ONE) == 0
    return (folder / "o.npy").read_bytes()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run that was killed with SIGKILL left behind."""
    folder = tmp_path_factory.mktemp("killed")
    source, out = write(folder / "in.jsonl", MANY), folder / "o.npy"
    command = [
        sys.executable,
        "-m",
        "echo_integrations",
        "encode",
        str(source),
        "--out",
        str(out),
        *FLOAT32,
        *ONE_BY_ONE,
    ]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(folder / "o.npy.partial", 10, lambda: process.poll() is None)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert names(folder) == ["in.jsonl", "o.npy.partial"]
    assert 10 <= len(records(folder / "o.npy.partial")[1]) < len(MANY)
    return (folder / "o.npy.partial").read_bytes()


@pytest.mark.parametrize("torn", [0, 1, 700])
def test_killed_run_goes_on(
    tmp_path: Path, killed: bytes, uninterrupted: bytes, torn: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source, partial = write(tmp_path / "in.jsonl", MANY), tmp_path / "o.npy.partial"
    partial.write_bytes(killed[: len(killed) - torn])
    kept = len(records(partial)[1])
    assert encode(source, tmp_path / "o.npy", *ONE_BY_ONE, "--progress") == 0
    assert (tmp_path / "o.npy").read_bytes() == uninterrupted
    assert names(tmp_path) == ["in.jsonl", "o.npy"]
    said = capsys.readouterr().err
    assert f"{kept}/{len(MANY)} [00:00" in said  # where the bar starts
    assert f"; {len(MANY) - kept} encoded in" in said


def test_rows_that_are_there_are_not_computed_again(tmp_path: Path, killed: bytes, uninterrupted: bytes) -> None:
    source, partial = write(tmp_path / "in.jsonl", MANY), tmp_path / "o.npy.partial"
    partial.write_bytes(killed)
    header, kept = records(partial)
    kept = kept.copy()
    kept["vector"] = 7
    partial.write_bytes(header + kept.tobytes())
    assert encode(source, tmp_path / "o.npy", *ONE_BY_ONE) == 0
    expected = np.load(io.BytesIO(uninterrupted))
    expected[kept["row"] - 1] = 7
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--role", "query"], "role: 'document', now 'query'"),
        (["--document-template", "zero-shot-sentence"], "fingerprint: '"),
        (["--truncate-dim", "8"], "dimension: 256, now 8"),
        (["--field", "other"], "texts: 'jsonl text', now 'jsonl other'"),
        (["--format", "txt"], "texts: 'jsonl text', now 'txt text'"),
        (["input"], "input: '"),
    ],
)
def test_other_run_is_refused(
    tmp_path: Path, killed: bytes, more: list[str], difference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = MANY[:-1] if more == ["input"] else MANY
    source, partial = tmp_path / "in.jsonl", tmp_path / "o.npy.partial"
    write(source, texts)
    if more == ["--field", "other"]:
        source.write_text(source.read_text().replace('"id": ', '"other": "", "id": '))
    partial.write_bytes(killed)
    assert encode(source, tmp_path / "o.npy", *ONE_BY_ONE, *(m for m in more if m != "input")) == 1
    said = capsys.readouterr().err
    assert f"{partial} is of another run, " in said
    assert difference in said
    assert "delete it, or pass --overwrite" in said
    assert partial.read_bytes() == killed


def test_overwrite(tmp_path: Path, killed: bytes, encoder: Encoder, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.txt", TEXTS), tmp_path / "o.npy"
    out.write_bytes(b"old")
    assert encode(source, out) == 1
    assert "o.npy exists already: choose another name or pass --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    (tmp_path / "o.npy.partial").write_bytes(killed)
    assert encode(source, out, "--overwrite") == 0
    np.testing.assert_array_equal(np.load(out), encoder.encode_document(TEXTS))
    assert names(tmp_path) == ["in.txt", "o.npy"]


def test_full_disk(tmp_path: Path, uninterrupted: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "in.jsonl", MANY), tmp_path / "o.npy"
    with limited_file_size(20_000):
        assert encode(source, out, *ONE_BY_ONE) == 1
    partial = tmp_path / "o.npy.partial"
    said = capsys.readouterr().err
    assert f"echo-embed: {partial} cannot be written (File too large): free space there\n" in said
    header, kept = records(partial)
    assert len(kept) == (20_000 - len(header)) // RECORD.itemsize
    assert f"\n{len(kept)} of {len(MANY)} rows are safe in {partial}: run the same command again\n" in said
    assert names(tmp_path) == ["in.jsonl", "o.npy.partial"]
    assert encode(source, out, *ONE_BY_ONE) == 0
    assert out.read_bytes() == uninterrupted


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_full_disk_at_the_end(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    padding = np.random.default_rng(0).bytes(60_000).hex()  # so that the result is larger than the store
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a", "padding": padding}) + "\n")
    out = tmp_path / f"o{suffix}"
    with limited_file_size(30_000):
        assert encode(tmp_path / "in.jsonl", out) == 1
    said = capsys.readouterr().err
    assert f"{out} cannot be written (File too large): free space there\n1 of 1 rows are safe in {out}.partial" in said
    assert names(tmp_path) == ["in.jsonl", f"o{suffix}.partial"]
    assert encode(tmp_path / "in.jsonl", out) == 0
    assert read(out)[1] == [{"text": "a", "padding": padding}]
    assert "1 rows of 256 components; 0 encoded" in capsys.readouterr().err


def test_full_disk_for_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n" * 50_000)))
    with limited_file_size(30_000):
        assert encode("-", tmp_path / "o.npy") == 1
    assert "a copy of the input in " in (said := capsys.readouterr().err)
    assert "cannot be written (File too large): free space there" in said
    assert names(tmp_path) == []


def test_interrupt(tmp_path: Path, uninterrupted: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, partial = write(tmp_path / "in.jsonl", MANY), tmp_path / "o.npy", tmp_path / "o.npy.partial"

    def press() -> None:
        wait_for(partial, 10, lambda: not out.exists())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        presser = threading.Thread(target=press)
        presser.start()
        assert encode(source, out, *ONE_BY_ONE) == 130
        presser.join()
    finally:
        signal.signal(signal.SIGINT, before)
    kept = len(records(partial)[1])
    said = capsys.readouterr().err
    assert "echo-embed: interrupted\n" in said
    assert f"of {len(MANY)} rows are safe in {partial}: run the same command again" in said
    assert names(tmp_path) == ["in.jsonl", "o.npy.partial"]
    assert encode(source, out, *ONE_BY_ONE) == 0
    assert f"; {len(MANY) - kept} encoded in" in capsys.readouterr().err
    assert out.read_bytes() == uninterrupted


def test_error_of_the_encoder_names_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows count from 1 and in the file, also where some were there already and are not encoded again."""
    source = write(tmp_path / "in.txt", ["word " * 60, "c d", "word " * 50])
    more = [*ONE_BY_ONE, "--max-length", "20", "--on-truncate"]
    assert encode(source, tmp_path / "o.npy", *more, "error") == 1
    assert "echo-embed: row 1 has" in capsys.readouterr().err
    assert names(tmp_path) == ["in.txt"]
    with limited_file_size(1_800):
        assert encode(source, tmp_path / "o.npy", *more, "truncate") == 1
    assert "1 of 3 rows are safe" in capsys.readouterr().err
    assert encode(source, tmp_path / "o.npy", *more, "error") == 1
    said = capsys.readouterr().err
    assert "echo-embed: row 3 has" in said
    assert "1 of 3 rows are safe" in said
    assert encode(source, tmp_path / "o.npy", *more, "warn") == 0
    assert "echo-embed: row 3 has" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"a\n\xff\n", "in.txt, line 2: bad UTF-8"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "a"\n', "in.jsonl, line 2: no JSON"),
        (
            "in.jsonl",
            b'{"text": "a"}\n{"body": "a"}\n',
            "in.jsonl, line 2: no field 'text': choose with --field (body)",
        ),
        ("in.jsonl", b'{"text": "a"}\n{"text": 3}\n', "in.jsonl, line 2: field 'text' is int, not a string"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "\\udc00"}\n', "in.jsonl, line 2: bad UTF-8 or a lone surrogate"),
        ("in.parquet", b"a", "in.parquet is no whole parquet file"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert encode(tmp_path / name, tmp_path / "o.npy") == 1
    assert f"echo-embed: {tmp_path / message}" in capsys.readouterr().err
    assert names(tmp_path) == [name]


def test_bad_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS)
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "folder.txt").mkdir()
    for given, out, message in [
        (tmp_path / "none.txt", tmp_path / "o.npy", "none.txt: No such file or directory"),
        (tmp_path / "folder.txt", tmp_path / "o.npy", "folder.txt: Is a directory"),
        (source, tmp_path / "none" / "o.npy", "there is no folder"),
        (source, tmp_path / "folder.npy", "folder.npy is a folder: choose another name"),
        (source, source, "in.jsonl is the input: choose another name"),
    ]:
        assert encode(given, out, "--overwrite") == 1
        assert message in capsys.readouterr().err
    assert names(tmp_path) == ["folder.npy", "folder.txt", "in.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["encode"], "INPUT"),
        (["encode", "in.csv", "--out", "o.npy"], "in.csv does not end in .txt, .jsonl, .parquet: say what it is"),
        (["encode", "in.txt", "--out", "o.csv"], "--out o.csv must end in .npy, .parquet, .jsonl"),
        (["encode", "in.txt", "--out", "o.npy", "--role", "both"], "invalid choice: 'both'"),
        (["encode", "in.txt", "--out", "o.npy", "--max-length", "many"], "invalid int value: 'many'"),
        (["encode", "in.txt", "--out", "o.npy", "--token", "x"], "unrecognized arguments: --token"),
        (["info", "--mode", "twice"], "invalid choice: 'twice'"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--max-length", "0"], "max_length: Input should be greater than or equal to 1"),
        (["--dtype", "int8"], "dtype: 'int8' is not one of"),
        (["--model", "./none"], "there is no folder './none'"),
        (["--truncate-dim", "999"], "truncate_dim=999 is more than the 256 components"),
        (["--document-template", "{%%txt%%}"], "unknown variable %%txt%%"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode(write(tmp_path / "in.txt", TEXTS), tmp_path / "o.npy", *settings) == 1
    assert message in capsys.readouterr().err
    assert main(["info", *settings]) == 1
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["in.txt"]


@pytest.mark.parametrize(("given", "out"), [("in.txt", "o.parquet"), ("in.parquet", "o.npy")])
def test_without_pyarrow(
    tmp_path: Path, given: str, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / given, TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert encode(source, tmp_path / out) == 1
    assert 'pip install "echo-integrations[parquet]"' in capsys.readouterr().err.splitlines()


# What is shown


@pytest.mark.parametrize("command", ["encode", "info"])
def test_help_lists_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for name in set(EncoderSettings.model_fields) - {"token", "model_kwargs", "show_progress", "normalize_embeddings"}:
        assert f"--{name.replace('_', '-')} " in said.replace("\n", " \n")
    assert "--no-normalize " in said
    assert "--model " in said
    assert "HF_TOKEN" in said
    assert "hf auth login" in said
    assert "%%prompt%%" in said
    for absent in ("--token ", "--show-progress", "``"):
        assert absent not in said


def test_help_is_quick() -> None:
    code = (
        "import sys\nfrom echo_integrations.cli import main\ntry: main(['encode', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'transformers', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_info_as_a_module(encoder: Encoder) -> None:
    command = [sys.executable, "-m", "echo_integrations", "info", *FLOAT32, "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert facts == {
        "model": "echo-mini",
        "mode": "echo",
        "dimension": "256",
        "fingerprint": encoder.fingerprint,
        "device": "cpu",
        "dtype": "float32",
        "query_template": encoder.vector_space()["query_template"],
        "query_max_length": "512",
        "document_template": encoder.vector_space()["document_template"],
        "document_max_length": "512",
        "pooling": "mean",
        "normalize_embeddings": "True",
    }


def test_info_with_settings(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--query-template", "fine-tuned-query", "--max-length", "100000", "--pooling", "last", *FLOAT32]
    same = Encoder(query_template="fine-tuned-query", max_length=100_000, pooling="last")
    assert main(["info", "--json", *settings]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fingerprint"] == same.fingerprint
    assert facts["query_template"] == same.vector_space()["query_template"]
    assert facts["document_max_length"] == same.vector_space()["document_max_length"] < 100_000
    assert main(["info", *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(facts)  # a template with line breaks stands on one line
    assert f"query_template        {json.dumps(facts['query_template'])}" in lines


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip().count(".") == 2


# --- reading embeddings


@pytest.fixture(scope="module")
def gen(mini_tokens: Path) -> Encoder:
    return Encoder(dtype="float32", mode="llm2vec-gen", token_set=mini_tokens)


def test_decode_prints_a_table(gen: Encoder, mini_tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["decode", "reset the pump?", "rain", "--max-new-tokens", "6", "--token-set", str(mini_tokens)]
    assert main([*arguments, *FLOAT32]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = gen.decode(["reset the pump?", "rain"], role="query", max_new_tokens=6)
    assert lines[0].split() == ["text", "decoded"] and set(lines[1]) == {"-", " "}
    for line, text, answer in zip(lines[2:], ["reset the pump?", "rain"], expected, strict=True):
        assert line.startswith(text) and line.endswith(" ".join(answer.split()))


def test_decode_as_json_of_documents_from_standard_input(
    gen: Encoder, mini_tokens: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("rain\nsnow\n"))
    arguments = ["decode", "-", "--json", "--role", "document", "--instruction", "", "--max-new-tokens", "6"]
    assert main([*arguments, "--token-set", str(mini_tokens), *FLOAT32]) == 0
    expected = gen.decode(["rain", "snow"], instruction="", max_new_tokens=6)
    rows = json.loads(capsys.readouterr().out)
    assert rows == [{"text": t, "decoded": a} for t, a in zip(["rain", "snow"], expected, strict=True)]


def test_explain_prints_the_lens(gen: Encoder, mini_tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "rain", "--top-k", "2", "--token-set", str(mini_tokens), *FLOAT32]
    lens = gen.explain(["rain"], role="query", top_k=2)[0]
    assert main(arguments) == 0
    title, head, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "rain" and head.split() == ["token", "1", "2"] and len(rows) == 2
    for row, tokens in zip(rows, lens, strict=True):
        for token, probability in tokens:
            assert " ".join(f"{token!r} {probability:.0%}".split()) in row
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]
    assert found["text"] == "rain" and found["tokens"][1][0]["token"] == lens[1][0].token


def test_what_cannot_be_read_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "rain", "--mode", "echo"]) == 1
    assert "decode needs mode='llm2vec-gen', the mode is 'echo'" in capsys.readouterr().err
    assert main(["explain", "rain", "--token-set", "./nowhere"]) == 1
    assert "there is no folder './nowhere'" in capsys.readouterr().err


def test_encode_and_info_know_token_sets(
    gen: Encoder, mini_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--mode", "llm2vec-gen", "--token-set", str(mini_tokens)]
    source = write(tmp_path / "in.txt", ["rain", "snow"])
    assert encode(source, tmp_path / "out.npy", *settings) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), gen.encode(["rain", "snow"]), atol=2e-6)
    assert main(["info", "--json", *settings]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["fingerprint"], facts["dimension"], facts["model"]) == (gen.fingerprint, 24, "echo-mini")
    assert facts["document_instruction"] == "Summarize the following passage:" and "pooling" not in facts
