import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_classic.storage import LocalFileStore
from langchain_core.embeddings import Embeddings
from langchain_core.stores import InMemoryByteStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError

from echo_integrations.config import InputError
from echo_integrations.encoder import Encoder
from echo_integrations.langchain import EchoEmbeddings, LLM2VecGenEmbeddings, cached
from echo_integrations.registry import registry
from tests.kinds import Kind


class TestEchoUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EchoEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "echo-mini"}


class TestEchoIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EchoEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "echo-mini"}


class WithTokens:
    """The standard tests ask for parameters where no fixture is at hand."""

    @pytest.fixture(autouse=True)
    def _take_tokens(self, mini_tokens: Path) -> None:
        self.tokens = mini_tokens

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return LLM2VecGenEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "echo-mini", "token_set": self.tokens}


class TestTokensUnit(WithTokens, EmbeddingsUnitTests):
    pass


class TestTokensIntegration(WithTokens, EmbeddingsIntegrationTests):
    pass


TEXTS = ["the pump stopped", "a valve leaked", "rain"]


@pytest.fixture(params=[EchoEmbeddings, LLM2VecGenEmbeddings], ids=["echo", "tokens"])
def kind(request: pytest.FixtureRequest, mini_tokens: Path) -> Kind:
    return Kind.of(request.param, mini_tokens)


@pytest.fixture
def embeddings(kind: Kind) -> Any:
    return kind.make()


def test_vectors_are_the_encoders(kind: Kind, embeddings: Any) -> None:
    encoder = kind.encoder()
    documents = embeddings.embed_documents(TEXTS)
    np.testing.assert_array_equal(documents, encoder.encode_document(TEXTS))
    query = embeddings.embed_query("rain")
    np.testing.assert_array_equal(query, encoder.encode_query("rain"))
    assert np.abs(np.array(query) - documents[2]).max() > 0.01  # queries are not documents
    assert type(documents) is list and type(documents[0]) is list and type(documents[0][0]) is float


async def test_async_gives_the_same(embeddings: Any) -> None:
    assert await embeddings.aembed_documents(TEXTS) == embeddings.embed_documents(TEXTS)
    assert await embeddings.aembed_query("rain") == embeddings.embed_query("rain")


def test_empty_and_single(embeddings: Any) -> None:
    assert embeddings.embed_documents([]) == []
    assert embeddings.embed_documents("rain") == [embeddings.embed_documents(["rain"])[0]]  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, 3, b"x", ["a"]])
def test_a_query_that_is_no_text_is_refused(embeddings: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"texts\[0\] is"):
        embeddings.embed_query(bad)


def test_a_document_that_is_no_text_is_refused(embeddings: Any) -> None:
    with pytest.raises(ValueError, match=r"texts\[1\] is None"):
        embeddings.embed_documents(["a", None])  # type: ignore[list-item]


def test_newlines_are_kept(embeddings: Any) -> None:
    assert embeddings.embed_query("a\nb") != embeddings.embed_query("a b")


def test_a_ready_encoder_is_truly_used(kind: Kind, nothing_loaded: None) -> None:
    encoder = kind.encoder(max_length=64)
    expected = encoder.encode(["rain"])
    embeddings = kind.cls(encoder=encoder)
    assert embeddings.encoder is encoder
    assert (embeddings.mode, embeddings.max_length) == (kind.mode, 64)  # its settings are this object's
    np.testing.assert_array_equal(embeddings.embed_documents(["rain"]), expected)
    assert len(registry.loaded()) == 1


@pytest.mark.parametrize("own", [{"mode": "echo"}, {"model": "echo-mini"}, {"model_name": "x"}, {"token_budget": 5}])
def test_an_encoder_with_settings_beside_it_is_refused(kind: Kind, own: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"encoder= was given together with {next(iter(own))}"):
        kind.cls(encoder=kind.encoder(), **own)


def test_modes(kind: Kind) -> None:
    assert kind.make().mode == kind.mode
    own = {"echo": ["echo", "classical"], "llm2vec-gen": ["llm2vec-gen"]}[kind.mode]
    right = {"echo": "LLM2VecGenEmbeddings", "llm2vec-gen": "EchoEmbeddings"}[kind.mode]
    for mode in ("echo", "classical", "llm2vec-gen"):
        if mode in own:
            assert kind.make(mode=mode).encoder.mode == mode
            continue
        message = f"{kind.name} is for mode '{own[0]}'.*, not '{mode}': use {right}"
        with pytest.raises(ValidationError, match=message):
            kind.cls(mode=mode)
        with pytest.raises(ValidationError, match=message):
            kind.cls(encoder=Encoder(mode=mode))
    with pytest.raises(ValidationError, match="'twice' is not one of"):
        kind.cls(mode="twice")


def test_a_token_set_names_its_class(mini_tokens: Path) -> None:
    with pytest.raises(ValidationError, match="not 'llm2vec-gen': use LLM2VecGenEmbeddings"):
        EchoEmbeddings(token_set=str(mini_tokens))
    with pytest.raises(ValidationError, match="query_template cannot be chosen in mode 'llm2vec-gen'"):
        LLM2VecGenEmbeddings(token_set=mini_tokens, query_template="classical")


def test_a_token_set_brings_its_backbone_or_is_given_one(mini_tokens: Path) -> None:
    vectors = [
        LLM2VecGenEmbeddings(dtype="float32", **names).embed_query("rain")
        for names in ({"token_set": mini_tokens}, {"model": "echo-mini", "token_set": str(mini_tokens)})
    ]
    assert vectors[0] == vectors[1] and len(vectors[0]) == 24


def test_a_bad_template_is_refused_at_once_and_briefly() -> None:
    with pytest.raises(ValidationError, match="position 0: no braces") as caught:
        EchoEmbeddings(query_template="say it")
    assert str(caught.value).count("validation error") == 1


def test_unknown_and_frozen(kind: Kind, embeddings: Any) -> None:
    with pytest.raises(ValidationError, match="modle"):
        kind.cls(modle="x")
    with pytest.raises(ValidationError, match="encoder is a str, not an Encoder: for a model's name pass model="):
        kind.cls(encoder="echo-mini")
    with pytest.raises(ValidationError, match="frozen"):
        embeddings.max_length = 5


def test_replace_and_pickle(kind: Kind, embeddings: Any) -> None:
    assert pickle.loads(pickle.dumps(embeddings)).embed_query("rain") == embeddings.embed_query("rain")
    other = embeddings.replace(query_instruction="Find it:")
    assert other.embed_query("rain") != embeddings.embed_query("rain")
    assert kind.cls(encoder=kind.encoder()).replace(truncate_dim=8).dimension == 8
    copy = embeddings.model_copy(update={"query_instruction": "Find it:"})
    assert copy.embed_query("rain") == other.embed_query("rain")  # the encoder behind follows


@pytest.mark.parametrize("ready", [False, True])
def test_with_instruction(kind: Kind, ready: bool, nothing_loaded: None) -> None:
    template = {"document_template": "{!%%prompt%% }{%%text%%}"} if kind.mode == "echo" else {}
    settings = {**template, "query_instruction": "Find it:", "document_instruction": "Keep it:"}
    embeddings = kind.cls(encoder=kind.encoder(**settings)) if ready else kind.make(**settings)
    expected = {
        (query, document): kind.encoder(**{**settings, "query_instruction": query, "document_instruction": document})
        for query, document in (("Say it:", "Keep it:"), ("Find it:", ""), ("", "Sum it up:"))
    }
    for query, document, key in (
        ("Say it:", None, ("Say it:", "Keep it:")),
        (None, "", ("Find it:", "")),
        ("", "Sum it up:", ("", "Sum it up:")),
    ):
        other = embeddings.with_instruction(query, document=document)
        assert type(other) is kind.cls
        np.testing.assert_array_equal(other.embed_query("rain"), expected[key].encode_query("rain"))
        np.testing.assert_array_equal(other.embed_documents(["rain"]), expected[key].encode_document(["rain"]))
    assert embeddings.with_instruction().settings() == embeddings.settings()
    assert embeddings.query_instruction == "Find it:"  # the original is as it was
    assert len(registry.loaded()) == 1


def test_no_instruction_without_a_place_for_it() -> None:
    with pytest.raises(ValidationError, match="has no place for it"):
        EchoEmbeddings().with_instruction("Find it:")
    assert EchoEmbeddings().with_instruction("").query_instruction == ""


def test_instructions_are_the_papers_unless_given(mini_tokens: Path) -> None:
    embeddings = LLM2VecGenEmbeddings(dtype="float32", token_set=mini_tokens)
    given = embeddings.with_instruction(
        "Generate a passage that best answers this question:", document="Summarize the following passage:"
    )
    assert given.embed_query("rain") == embeddings.embed_query("rain")
    assert given.embed_documents(["rain"]) == embeddings.embed_documents(["rain"])
    bare = embeddings.with_instruction("", document="")
    assert bare.embed_query("Summarize the following passage: rain") == embeddings.embed_documents(["rain"])[0]
    assert bare.embed_query("rain") == bare.embed_documents(["rain"])[0] != embeddings.embed_query("rain")


def test_fingerprint_dimension_unload(kind: Kind, embeddings: Any, nothing_loaded: None) -> None:
    dimension = {"echo": 256, "llm2vec-gen": 24}[kind.mode]
    assert (embeddings.fingerprint, embeddings.dimension) == (kind.encoder().fingerprint, dimension)
    embeddings.embed_query("rain")
    embeddings.unload()
    assert registry.loaded() == []


def test_one_cache_serves_many_models_roles_and_instructions(mini_tokens: Path) -> None:
    store = InMemoryByteStore()
    tokens = LLM2VecGenEmbeddings(token_set=mini_tokens)
    asked = tokens.with_instruction(query="Find the law:")
    for embeddings in (EchoEmbeddings(), EchoEmbeddings(mode="classical"), tokens, tokens.replace(truncate_dim=8)):
        behind = cached(embeddings, store)
        for _ in range(2):  # computed, then served
            assert behind.embed_documents(["rain", "a valve"]) == embeddings.embed_documents(["rain", "a valve"])
            assert behind.embed_query("rain") == embeddings.embed_query("rain")
    assert len(list(store.yield_keys())) == 4 * 3
    assert cached(asked, store).embed_query("rain") != cached(tokens, store).embed_query("rain")
    assert len(list(store.yield_keys())) == 4 * 3 + 1
    assert cached(asked, store).embed_documents(["rain"]) == cached(tokens, store).embed_documents(["rain"])
    assert len(list(store.yield_keys())) == 4 * 3 + 1  # the query instruction does not touch documents


async def test_what_is_cached_is_not_computed_again(mini: Callable[..., Encoder], tmp_path: Path) -> None:
    store = LocalFileStore(tmp_path)
    behind = cached(EchoEmbeddings(), store)
    vectors = await behind.aembed_documents(["rain", "snow"]), await behind.aembed_query("rain")
    name = next(key for key in store.yield_keys() if "_query_" in key)
    store.mset([(name, b"[0.5, 0.25]")])
    assert await behind.aembed_query("rain") == [0.5, 0.25]
    assert (await behind.aembed_documents(["snow"]))[0] == vectors[0][1]
    with pytest.raises(InputError, match="embeddings is a Encoder: pass EchoEmbeddings"):
        cached(mini(), store)  # type: ignore[arg-type]


def test_a_chroma_store_finds_what_is_nearest(embeddings: Any) -> None:
    store = Chroma.from_texts(
        TEXTS, embeddings, collection_name=uuid.uuid4().hex, collection_configuration={"hnsw": {"space": "cosine"}}
    )
    found = store.similarity_search_with_score("the pump stopped working", k=3)
    vectors = np.array(embeddings.embed_documents(TEXTS)) @ np.array(embeddings.embed_query("the pump stopped working"))
    expected = np.argsort(-vectors)
    assert [document.page_content for document, _ in found] == [TEXTS[i] for i in expected]
    np.testing.assert_allclose([score for _, score in found], 1 - vectors[expected], atol=1e-5)
