import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pydantic
import pytest
import safetensors.torch
from chromadb.errors import NotFoundError
from chromadb.utils.embedding_functions import known_embedding_functions

import echo_integrations
from echo_integrations import Encoder, FingerprintMismatchError, InputError, ModelLoadError
from echo_integrations.chroma import EchoEmbeddingFunction, LLM2VecGenEmbeddingFunction, open_collection
from echo_integrations.registry import registry
from echo_integrations.token_set import TokenSet
from tests import tiny
from tests.kinds import Kind

TEXTS = [
    "The valve is closed before the pump is started.",
    "Rain fell all night and the river rose.",
    "The orchestra tuned its instruments.",
    "Bread rises because yeast makes gas.",
]
QUESTIONS = ["when must the valve be closed?", "why does bread rise?"]
ECHO_MINI = Path(echo_integrations.__file__).parent / "assets" / "echo-mini"


@pytest.fixture
def client() -> Any:
    client = chromadb.EphemeralClient()
    for collection in client.list_collections():  # all ephemeral clients of a process share one database
        client.delete_collection(collection.name)
    return client


@pytest.fixture(params=[EchoEmbeddingFunction, LLM2VecGenEmbeddingFunction], ids=["echo", "tokens"])
def kind(request: pytest.FixtureRequest, mini_tokens: Path) -> Kind:
    return Kind.of(request.param, mini_tokens)


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ECHO_MINI, tmp_path / "model"))


def fill(collection: Any) -> Any:
    collection.add(ids=[str(i) for i in range(len(TEXTS))], documents=TEXTS)
    return collection


def alter_weights(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.01
    safetensors.torch.save_file(tensors, folder / "altered", metadata={"format": "pt"})
    (folder / "altered").replace(folder / "model.safetensors")


# What the function gives


def test_numbers_are_the_encoders(kind: Kind) -> None:
    encoder, function = kind.encoder(), kind.make(model="echo-mini")
    documents, queries = function(TEXTS), function.embed_query(TEXTS)
    for vectors in (documents, queries):
        assert isinstance(vectors, list)
        assert all(vector.dtype == np.float32 and vector.shape == (kind.dimension,) for vector in vectors)
    np.testing.assert_array_equal(np.stack(documents), encoder.encode_document(TEXTS))
    np.testing.assert_array_equal(np.stack(queries), encoder.encode_query(TEXTS))
    assert function.dimension == kind.dimension


def test_queries_and_documents_have_their_own_templates_and_instructions(mini_tokens: Path) -> None:
    function = EchoEmbeddingFunction(
        query_template="fine-tuned-query",
        document_template="fine-tuned-document",
        query_instruction="Find the passage that answers",
    )
    assert not np.allclose(function(TEXTS), function.embed_query(TEXTS), atol=0.05)
    function = LLM2VecGenEmbeddingFunction(token_set=mini_tokens)
    assert not np.allclose(function(TEXTS), function.embed_query(TEXTS), atol=0.05)


def test_one_string_is_one_text(kind: Kind) -> None:
    function = kind.make()
    np.testing.assert_array_equal(function(TEXTS[0]), function(TEXTS[:1]))
    np.testing.assert_array_equal(function.embed_query(TEXTS[0]), function.embed_query(TEXTS[:1]))


def test_no_texts(kind: Kind) -> None:
    function = kind.make()
    assert function.embed_query([]) == []
    with pytest.raises(ValueError, match="non-empty"):  # Chroma's own refusal
        function([])


@pytest.mark.parametrize("bad", [["good", None], [1], {"a": "b"}, None])
def test_what_is_no_text_is_refused(kind: Kind, bad: Any) -> None:
    function = kind.make()
    with pytest.raises(InputError):
        function(bad)
    with pytest.raises(InputError):
        function.embed_query(bad)


def test_arguments(kind: Kind) -> None:
    encoder = kind.encoder(**kind.other)
    assert kind.cls(encoder=encoder).encoder is encoder
    assert kind.make(**kind.other).fingerprint == encoder.fingerprint != kind.make().fingerprint
    with pytest.raises(ValueError, match="encoder= was given together with max_length"):
        kind.cls(encoder=encoder, max_length=3)
    with pytest.raises(pydantic.ValidationError, match="batch_size"):
        kind.make(batch_size=3)


def test_modes(kind: Kind) -> None:
    right = {"echo": "LLM2VecGenEmbeddingFunction", "llm2vec-gen": "EchoEmbeddingFunction"}[kind.mode]
    others = {"echo": ["llm2vec-gen"], "llm2vec-gen": ["echo", "classical"]}[kind.mode]
    for mode in others:
        for arguments in ({"mode": mode}, {"encoder": Encoder(mode=mode)}):
            with pytest.raises(ValueError, match=f"{kind.name} is for mode .*, not '{mode}': use {right}"):
                kind.cls(**arguments)
        with pytest.raises(ValueError, match=f"use {right}"):
            kind.cls.validate_config({**kind.make().get_config(), "mode": mode})


def test_missing_files_fail_in_the_constructor(client: Any, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="nowhere"):
        open_collection(client, "notes", EchoEmbeddingFunction(model=nowhere))
    with pytest.raises(ModelLoadError, match="nowhere"):
        open_collection(client, "notes", LLM2VecGenEmbeddingFunction(token_set=nowhere))
    assert client.list_collections() == []


def test_constructor_loads_no_weights(kind: Kind, model_copy: Path) -> None:
    kind.make(model=str(model_copy))
    assert not any(spec.checkpoint.folder == model_copy.resolve() for spec in registry.loaded())


def test_pickled_copy_gives_the_same(kind: Kind) -> None:
    function = kind.make()
    again = pickle.loads(pickle.dumps(function))
    np.testing.assert_array_equal(again(TEXTS[:1]), function(TEXTS[:1]))
    assert again.get_config() == function.get_config()


def test_with_instruction(kind: Kind) -> None:
    function = kind.make().with_instruction("Find the passage:")
    assert type(function) is kind.cls
    encoder = kind.encoder(query_instruction="Find the passage:")
    np.testing.assert_array_equal(np.stack(function.embed_query(TEXTS)), encoder.encode_query(TEXTS))
    np.testing.assert_array_equal(np.stack(function(TEXTS)), encoder.encode_document(TEXTS))
    assert function.get_config()["query_instruction"] == "Find the passage:"
    with pytest.raises(ValueError, match="has no place for it"):
        EchoEmbeddingFunction().with_instruction("Find the passage:")


# What Chroma records


def test_chroma_knows_the_function(kind: Kind) -> None:
    function = kind.make()
    assert function.is_legacy() is False
    assert known_embedding_functions[function.name()] is kind.cls
    assert (
        function.name() == {"echo": "echo_integrations_echo", "llm2vec-gen": "echo_integrations_llm2vec_gen"}[kind.mode]
    )
    assert function.default_space() == "cosine"
    assert set(function.supported_spaces()) == {"cosine", "l2", "ip"}


def test_only_what_defines_the_space_is_recorded(client: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"query_instruction": "q", "query_template": "{%%prompt%% %%text%%}", "truncate_dim": 8}
    function = EchoEmbeddingFunction(
        token="hf_secret",
        device="cpu",
        dtype="float32",
        trust_remote_code=True,
        cache_folder=str(tmp_path),
        token_budget=777,
        on_truncate="error",
        show_progress=False,
        model_kwargs={"low_cpu_mem_usage": True},
        **settings,
    )
    record = open_collection(client, "notes", function).configuration_json["embedding_function"]
    assert (record["type"], record["name"]) == ("known", "echo_integrations_echo")
    assert record["config"] == function.get_config()
    assert record["config"] == {
        "model_name": "echo-mini",
        "revision": None,
        "adapter": None,
        "mode": "echo",
        "document_template": None,
        "document_instruction": None,
        "pooling": "mean",
        "max_length": 512,
        "normalize_embeddings": True,
        "model_kwargs": {},
        "fingerprint": function.fingerprint,
        **settings,
    }
    assert "secret" not in json.dumps(record)


def test_what_is_recorded_of_a_token_set(client: Any, mini_tokens: Path) -> None:
    function = LLM2VecGenEmbeddingFunction(token_set=mini_tokens, dtype="float32", max_length=64)
    record = open_collection(client, "notes", function).configuration_json["embedding_function"]
    assert (record["type"], record["name"]) == ("known", "echo_integrations_llm2vec_gen")
    assert record["config"] == {
        "model_name": "echo-mini",  # which the set names
        "revision": None,
        "adapter": None,
        "mode": "llm2vec-gen",
        "token_set": str(mini_tokens.resolve()),
        "token_set_revision": None,
        "query_template": None,
        "document_template": None,
        "query_instruction": "Generate a passage that best answers this question:",
        "document_instruction": "Summarize the following passage:",
        "pooling": "mean",
        "max_length": 64,
        "normalize_embeddings": True,
        "truncate_dim": None,
        "model_kwargs": {},
        "fingerprint": function.fingerprint,
    }


def test_a_backbone_that_the_set_names_is_recorded(tmp_path: Path, model_copy: Path) -> None:
    tokens = tiny.token_set(model_copy, tmp_path / "tokens")
    function = LLM2VecGenEmbeddingFunction(token_set=tokens, dtype="float32")
    assert function.get_config()["model_name"] == str(model_copy.resolve())
    again = LLM2VecGenEmbeddingFunction.build_from_config(function.get_config())
    np.testing.assert_allclose(again(TEXTS), function(TEXTS), atol=0.02)  # the rebuilt one chooses its own dtype


def test_a_released_checkpoint_is_recorded_as_the_model(tmp_path: Path, mini_tokens: Path) -> None:
    TokenSet.load(mini_tokens).export_released(tmp_path / "released")
    function = LLM2VecGenEmbeddingFunction(model=str(tmp_path / "released"), dtype="float32")
    config = function.get_config()
    assert (config["model_name"], config["token_set"]) == (str((tmp_path / "released").resolve()), None)
    assert LLM2VecGenEmbeddingFunction.build_from_config(config).fingerprint == function.fingerprint
    same = LLM2VecGenEmbeddingFunction(token_set=mini_tokens, dtype="float32")
    np.testing.assert_allclose(function(TEXTS), same(TEXTS), atol=1e-6)


def test_the_instructions_that_were_used_are_recorded(tmp_path: Path) -> None:
    """The set's own, at the time; a set with the same tensors and others later changes nothing."""
    own = {"query": "What answers this?", "document": "What is this about?"}
    tokens = tiny.token_set("echo-mini", tmp_path / "tokens", instructions=own)
    function = LLM2VecGenEmbeddingFunction(token_set=tokens, dtype="float32")
    documents, queries = function(TEXTS), function.embed_query(TEXTS)
    encoder = Encoder(mode="llm2vec-gen", token_set=str(tokens), dtype="float32")
    np.testing.assert_array_equal(np.stack(documents), encoder.encode(TEXTS, instruction=own["document"]))
    shutil.rmtree(tokens)
    tiny.token_set("echo-mini", tokens)
    again = LLM2VecGenEmbeddingFunction.build_from_config(function.get_config())
    np.testing.assert_allclose(again(TEXTS), documents, atol=0.02)
    np.testing.assert_allclose(again.embed_query(TEXTS), queries, atol=0.02)


def test_quantization_is_recorded_as_json() -> None:
    from transformers import BitsAndBytesConfig

    function = EchoEmbeddingFunction(model_kwargs={"quantization_config": BitsAndBytesConfig(load_in_8bit=True)})
    config = json.loads(json.dumps(function.get_config()))
    assert config["model_kwargs"]["quantization_config"]["load_in_8bit"] is True
    again = EchoEmbeddingFunction.build_from_config(config)
    assert again.fingerprint == function.fingerprint == config["fingerprint"]


def test_local_folder_is_recorded_by_its_absolute_path(model_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_copy.parent)
    config = EchoEmbeddingFunction(model="model").get_config()
    assert config["model_name"] == str(model_copy.resolve())
    monkeypatch.chdir("/")
    assert EchoEmbeddingFunction.build_from_config(config).fingerprint == config["fingerprint"]


def test_local_token_set_is_recorded_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tiny.token_set("echo-mini", tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    config = LLM2VecGenEmbeddingFunction(token_set="tokens").get_config()
    assert config["token_set"] == str(tokens.resolve())
    monkeypatch.chdir("/")
    assert LLM2VecGenEmbeddingFunction.build_from_config(config).fingerprint == config["fingerprint"]


# What Chroma rebuilds


def test_rebuilt_function_reads_no_tokens_and_names_them_when_they_are_gone(client: Any, tmp_path: Path) -> None:
    tokens = tiny.token_set("echo-mini", tmp_path / "tokens")
    fill(open_collection(client, "notes", LLM2VecGenEmbeddingFunction(token_set=tokens)))
    shutil.rmtree(tokens)
    function = client.get_collection("notes").configuration["embedding_function"]
    assert type(function) is LLM2VecGenEmbeddingFunction
    with pytest.raises(ModelLoadError, match=f"there is no folder '{tokens}'"):
        function(TEXTS)
    with pytest.raises(ModelLoadError, match=f"there is no folder '{tokens}'"):
        client.get_collection("notes").query(query_texts=QUESTIONS)


def test_changed_tokens_are_noticed_at_the_first_call(client: Any, tmp_path: Path) -> None:
    tokens = tiny.token_set("echo-mini", tmp_path / "tokens")
    made = LLM2VecGenEmbeddingFunction(token_set=tokens)
    fill(open_collection(client, "notes", made))
    recorded = made.fingerprint
    tiny.token_set("echo-mini", tokens, seed=1)
    for act in (
        lambda: client.get_collection("notes").query(query_texts=QUESTIONS),
        lambda: open_collection(client, "notes", LLM2VecGenEmbeddingFunction(token_set=tokens)),
    ):
        with pytest.raises(
            FingerprintMismatchError, match="no setting differs, but the files of the model do"
        ) as caught:
            act()
        assert recorded in str(caught.value)


def test_rebuilt_function_reads_no_files_and_keeps_its_record(kind: Kind, model_copy: Path) -> None:
    config = kind.make(model=str(model_copy)).get_config()
    shutil.rmtree(model_copy)
    function = kind.cls.build_from_config(config)
    assert function.get_config() == config
    assert function.is_legacy() is False
    with pytest.raises(ModelLoadError, match="model"):
        function(TEXTS)


def test_record_cannot_be_changed_from_outside() -> None:
    function = EchoEmbeddingFunction()
    function.get_config()["model_kwargs"]["x"] = 1
    assert function.get_config()["model_kwargs"] == {}


@pytest.mark.parametrize("key", ["trust_remote_code", "device", "of_a_future_version"])
def test_unknown_entry_fails_at_the_first_call(kind: Kind, key: str) -> None:
    config = {**kind.make().get_config(), key: True}
    function = kind.cls.build_from_config(config)
    assert function.get_config() == config
    assert function.is_legacy() is False
    for call, argument in ((function, TEXTS), (function.embed_query, TEXTS), (function.validate_config, config)):
        with pytest.raises(InputError, match=key):
            call(argument)


def test_database_cannot_name_arguments_that_run_code() -> None:
    config = {**EchoEmbeddingFunction().get_config(), "model_kwargs": {"weights_only": False, "code_revision": "x"}}
    function = EchoEmbeddingFunction.build_from_config(config)
    with pytest.raises(InputError, match=r"code_revision, weights_only.*open_collection"):
        function.embed_query(TEXTS)


def test_changed_weights_are_noticed_at_the_first_call(client: Any, model_copy: Path) -> None:
    made = EchoEmbeddingFunction(model=str(model_copy))
    fill(open_collection(client, "notes", made))
    recorded = made.fingerprint
    fitting = EchoEmbeddingFunction.build_from_config(made.get_config())
    assert len(fitting(TEXTS[:1])) == 1
    alter_weights(model_copy)

    collection = client.get_collection("notes")
    own = Encoder(model=str(model_copy)).fingerprint
    for act in (
        lambda: collection.query(query_texts=QUESTIONS),
        lambda: collection.add(ids=["new"], documents=["new"]),
        lambda: open_collection(client, "notes", EchoEmbeddingFunction(model=str(model_copy))),
    ):
        with pytest.raises(FingerprintMismatchError, match="no setting differs") as caught:
            act()
        assert recorded in str(caught.value)
        assert own in str(caught.value)
        assert own != recorded


def test_queries_share_one_model(client: Any, kind: Kind) -> None:
    fill(open_collection(client, "notes", kind.make()))
    collection = client.get_collection("notes")
    functions = [collection.configuration["embedding_function"] for _ in range(2)]
    assert functions[0] is not functions[1]
    before = {id(registry._backbones[spec]) for spec in registry.loaded()}
    for _ in range(5):
        collection.query(query_texts=QUESTIONS)
    assert {id(registry._backbones[spec]) for spec in registry.loaded()} == before


def test_unload_and_back(kind: Kind, model_copy: Path) -> None:
    function = kind.make(model=str(model_copy))
    before = function(TEXTS[:1])
    assert any(spec.checkpoint.folder == model_copy.resolve() for spec in registry.loaded())
    function.unload()
    assert not any(spec.checkpoint.folder == model_copy.resolve() for spec in registry.loaded())
    np.testing.assert_array_equal(function(TEXTS[:1]), before)
    function.unload()


def test_another_process_finds_the_function_again(kind: Kind, tmp_path: Path) -> None:
    client = chromadb.PersistentClient(tmp_path / "db")
    settings = {name: value for name, value in kind.settings.items() if name != "dtype"}  # which is not recorded
    collection = fill(open_collection(client, "notes", kind.cls(**settings)))
    here = collection.query(query_texts=QUESTIONS, n_results=3, include=["distances"])
    del client  # closes it, in every version of Chroma
    script = """
import json, sys, chromadb, echo_integrations.chroma
collection = chromadb.PersistentClient(sys.argv[1]).get_collection("notes")
function = collection.configuration["embedding_function"]
found = collection.query(query_texts=json.loads(sys.argv[2]), n_results=3, include=["distances"])
print(json.dumps([type(function).__name__, function.get_config(), found["ids"], found["distances"]]))
"""
    arguments = [sys.executable, "-c", script, str(tmp_path / "db"), json.dumps(QUESTIONS)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr
    name, config, ids, distances = json.loads(done.stdout.splitlines()[-1])
    assert name == kind.name
    assert config == collection.configuration_json["embedding_function"]["config"]
    assert ids == here["ids"]
    np.testing.assert_allclose(distances, here["distances"], atol=1e-5)


# open_collection


@pytest.mark.parametrize("wrong", [Encoder(), "echo-mini", None])
def test_what_is_no_function_is_refused(client: Any, wrong: Any) -> None:
    with pytest.raises(InputError, match="pass an EchoEmbeddingFunction or an LLM2VecGenEmbeddingFunction"):
        open_collection(client, "notes", wrong)


def test_repr_and_errors_carry_its_name(mini_tokens: Path) -> None:
    shown = f"(model_name='echo-mini', token_set='{mini_tokens}', mode='llm2vec-gen', fingerprint='"
    assert repr(LLM2VecGenEmbeddingFunction(token_set=mini_tokens)).startswith(f"LLM2VecGenEmbeddingFunction{shown}")
    with pytest.raises(ValueError, match="for LLM2VecGenEmbeddingFunction"):
        LLM2VecGenEmbeddingFunction(batch_size=3)
    assert repr(EchoEmbeddingFunction(mode="classical")).startswith(
        "EchoEmbeddingFunction(model_name='echo-mini', mode='classical', fingerprint='"
    )
    with pytest.raises(ValueError, match="for EchoEmbeddingFunction"):
        EchoEmbeddingFunction(batch_size=3)


def test_open_collection_creates_and_reopens(client: Any) -> None:
    configuration = {"hnsw": {"ef_search": 50}}
    made = open_collection(client, "notes", EchoEmbeddingFunction(), metadata={"a": 1}, configuration=configuration)
    assert made.configuration_json["hnsw"]["space"] == "cosine"
    assert made.configuration_json["hnsw"]["ef_search"] == 50
    assert "embedding_function" not in configuration
    fill(made)
    again = open_collection(client, "notes", EchoEmbeddingFunction(), metadata={"a": 2})
    assert again.id == made.id
    assert again.metadata == {"a": 1}
    assert again.count() == len(TEXTS)
    assert again.query(query_texts=QUESTIONS, n_results=1)["ids"] == [["0"], ["3"]]


@pytest.mark.parametrize("space", ["l2", "ip"])
def test_other_distances(client: Any, space: str) -> None:
    open_collection(client, "notes", EchoEmbeddingFunction(), configuration={"hnsw": {"space": space}})
    assert client.get_collection("notes").configuration_json["hnsw"]["space"] == space


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mode", "classical"),
        ("document_template", "{%%text%%} {%%text%%}"),
        ("max_length", 64),
        ("pooling", "last"),
        ("truncate_dim", 64),
    ],
)
def test_open_collection_refuses_another_space(client: Any, setting: str, value: Any) -> None:
    function, other = EchoEmbeddingFunction(), EchoEmbeddingFunction(**{setting: value})
    fill(open_collection(client, "notes", function))
    with pytest.raises(FingerprintMismatchError) as caught:
        open_collection(client, "notes", other)
    message = str(caught.value)
    assert "'notes'" in message
    assert function.fingerprint in message
    assert other.fingerprint in message
    assert f"they differ in {setting} ({function.get_config()[setting]!r} there, {value!r} here);" in message
    assert client.get_collection("notes").configuration_json["embedding_function"]["config"] == function.get_config()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("document_instruction", "Say what it says:"), ("max_length", 64), ("truncate_dim", 8), ("query_instruction", "")],
)
def test_open_collection_refuses_another_space_of_a_token_set(
    client: Any, mini_tokens: Path, setting: str, value: Any
) -> None:
    function = LLM2VecGenEmbeddingFunction(token_set=mini_tokens)
    fill(open_collection(client, "notes", function))
    with pytest.raises(FingerprintMismatchError, match=rf"they differ in {setting} \(.* there, {value!r} here\);"):
        open_collection(client, "notes", LLM2VecGenEmbeddingFunction(token_set=mini_tokens, **{setting: value}))


def test_one_kind_is_refused_on_the_others_collection(client: Any, mini_tokens: Path) -> None:
    functions = [EchoEmbeddingFunction(), LLM2VecGenEmbeddingFunction(token_set=mini_tokens)]
    for function, other in (functions, functions[::-1]):
        open_collection(client, function.name(), function)
        with pytest.raises(FingerprintMismatchError, match=f"records the embedding function '{function.name()}'"):
            open_collection(client, function.name(), other)
        assert open_collection(client, function.name(), function).count() == 0


def test_another_token_set_is_refused_and_its_place_is_free(client: Any, mini_tokens: Path, tmp_path: Path) -> None:
    function = LLM2VecGenEmbeddingFunction(token_set=mini_tokens)
    open_collection(client, "notes", function)
    copy = LLM2VecGenEmbeddingFunction(token_set=shutil.copytree(mini_tokens, tmp_path / "copy"))
    assert open_collection(client, "notes", copy).name == "notes"
    function.validate_config_update(function.get_config(), copy.get_config())
    other = LLM2VecGenEmbeddingFunction(token_set=tiny.token_set("echo-mini", tmp_path / "other", seed=1))
    with pytest.raises(FingerprintMismatchError, match=r"they differ in token_set \("):
        open_collection(client, "notes", other)


def test_device_dtype_and_place_may_differ(client: Any, model_copy: Path) -> None:
    open_collection(client, "notes", EchoEmbeddingFunction())
    function = EchoEmbeddingFunction(model=str(model_copy), device="cpu", dtype="float32", query_template="zero-shot")
    collection = fill(open_collection(client, "notes", function))
    assert collection.query(query_texts=QUESTIONS, n_results=1)["ids"] == [["0"], ["3"]]
    assert any(s.dtype == "float32" and s.checkpoint.folder == model_copy.resolve() for s in registry.loaded())


def test_rewording_a_query_instruction_keeps_the_space(client: Any) -> None:
    template = "{!%%prompt%% }{%%text%%}"
    open_collection(client, "notes", EchoEmbeddingFunction(query_template=template, query_instruction="Find:"))
    open_collection(client, "notes", EchoEmbeddingFunction(query_template=template, query_instruction="Search:"))
    with pytest.raises(FingerprintMismatchError, match="query_instruction"):
        open_collection(client, "notes", EchoEmbeddingFunction(query_template=template))


@pytest.mark.parametrize("embedding_function", [None, known_embedding_functions["default"]()])
def test_open_collection_refuses_other_functions_collections(client: Any, embedding_function: Any) -> None:
    client.create_collection("notes", embedding_function=embedding_function)
    what = "no embedding function" if embedding_function is None else "the embedding function 'default'"
    with pytest.raises(FingerprintMismatchError, match=f"records {what}.*embed the texts again"):
        open_collection(client, "notes", EchoEmbeddingFunction())


def test_collection_of_langchain_is_refused(client: Any) -> None:
    from langchain_chroma import Chroma

    from echo_integrations.langchain import EchoEmbeddings

    Chroma("notes", EchoEmbeddings(), client=client).add_texts(TEXTS[:1])
    with pytest.raises(FingerprintMismatchError, match="langchain-chroma"):
        open_collection(client, "notes", EchoEmbeddingFunction())


def test_two_that_create_at_once_get_one_collection(client: Any) -> None:
    opened: list[Any] = []
    threads = [
        threading.Thread(target=lambda: opened.append(open_collection(client, "notes", EchoEmbeddingFunction())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    assert len({collection.id for collection in opened}) == 1


def test_bad_name_is_refused_by_chroma(client: Any) -> None:
    with pytest.raises(Exception, match="name"):
        open_collection(client, "!", EchoEmbeddingFunction())
    with pytest.raises(NotFoundError):
        client.get_collection("!")


# Changes of the record


def test_config_updates(model_copy: Path) -> None:
    function = EchoEmbeddingFunction()
    config = function.get_config()
    function.validate_config(config)
    function.validate_config_update(config, config)
    function.validate_config_update(config, EchoEmbeddingFunction(model=str(model_copy)).get_config())
    for change in ({"mode": "classical"}, {"max_length": 3}, {"pooling": "last"}, {"fingerprint": "0" * 32}):
        with pytest.raises(FingerprintMismatchError, match=next(iter(change))):
            function.validate_config_update(config, {**config, **change})


def test_impossible_configs_are_refused() -> None:
    config = EchoEmbeddingFunction().get_config()
    with pytest.raises(ValueError, match="mode"):
        EchoEmbeddingFunction.validate_config({**config, "mode": "triple"})
    with pytest.raises(InputError, match="fingerprint"):
        EchoEmbeddingFunction.validate_config({"model_name": "echo-mini"})
