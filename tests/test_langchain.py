import pickle
from typing import Any

import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_classic.embeddings import CacheBackedEmbeddings
from langchain_core.embeddings import Embeddings
from langchain_core.stores import InMemoryByteStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError

from echo_integrations.backbone import registry
from echo_integrations.encoder import Encoder
from echo_integrations.langchain import EchoEmbeddings


class TestStandardUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EchoEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "echo-mini"}


class TestStandardIntegration(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EchoEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "echo-mini"}


TEXTS = ["the pump stopped", "a valve leaked", "rain"]


@pytest.fixture
def embeddings() -> EchoEmbeddings:
    return EchoEmbeddings(dtype="float32", query_template="classical")


def test_vectors_are_the_encoders(embeddings: EchoEmbeddings) -> None:
    encoder = Encoder(dtype="float32", query_template="classical")
    documents = embeddings.embed_documents(TEXTS)
    np.testing.assert_array_equal(documents, encoder.encode_document(TEXTS))
    query = embeddings.embed_query("rain")
    np.testing.assert_array_equal(query, encoder.encode_query("rain"))
    assert np.abs(np.array(query) - documents[2]).max() > 0.01  # queries are not documents
    assert type(documents) is list and type(documents[0]) is list and type(documents[0][0]) is float


async def test_async_gives_the_same(embeddings: EchoEmbeddings) -> None:
    assert await embeddings.aembed_documents(TEXTS) == embeddings.embed_documents(TEXTS)
    assert await embeddings.aembed_query("rain") == embeddings.embed_query("rain")


def test_empty_and_single(embeddings: EchoEmbeddings) -> None:
    assert embeddings.embed_documents([]) == []
    assert embeddings.embed_documents("rain") == [embeddings.embed_documents(["rain"])[0]]  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, 3, b"x", ["a"]])
def test_a_query_that_is_no_text_is_refused(embeddings: EchoEmbeddings, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"texts\[0\] is"):
        embeddings.embed_query(bad)


def test_a_document_that_is_no_text_is_refused(embeddings: EchoEmbeddings) -> None:
    with pytest.raises(ValueError, match=r"texts\[1\] is None"):
        embeddings.embed_documents(["a", None])  # type: ignore[list-item]


def test_newlines_are_kept(embeddings: EchoEmbeddings) -> None:
    assert embeddings.embed_query("a\nb") != embeddings.embed_query("a b")


def test_a_ready_encoder_is_truly_used(nothing_loaded: None) -> None:
    encoder = Encoder(dtype="float32", mode="classical")
    expected = encoder.encode(["rain"])
    embeddings = EchoEmbeddings(encoder=encoder)
    assert embeddings.encoder is encoder
    assert (embeddings.mode, embeddings.dtype) == ("classical", "float32")  # its settings are this object's
    np.testing.assert_array_equal(embeddings.embed_documents(["rain"]), expected)
    assert len(registry.loaded()) == 1


@pytest.mark.parametrize("own", [{"mode": "echo"}, {"model": "echo-mini"}, {"model_name": "x"}, {"token_budget": 5}])
def test_an_encoder_with_settings_beside_it_is_refused(own: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"encoder= was given together with {next(iter(own))}"):
        EchoEmbeddings(encoder=Encoder(), **own)


def test_a_bad_template_is_refused_at_once_and_briefly() -> None:
    with pytest.raises(ValidationError, match="position 0: no braces") as caught:
        EchoEmbeddings(query_template="say it")
    assert str(caught.value).count("validation error") == 1


def test_unknown_and_frozen(embeddings: EchoEmbeddings) -> None:
    with pytest.raises(ValidationError, match="modle"):
        EchoEmbeddings(modle="x")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="encoder is a str, not an Encoder: for a model's name pass model="):
        EchoEmbeddings(encoder="echo-mini")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        embeddings.max_length = 5


def test_replace_and_pickle(embeddings: EchoEmbeddings) -> None:
    assert pickle.loads(pickle.dumps(embeddings)).embed_query("rain") == embeddings.embed_query("rain")
    other = embeddings.replace(query_template=None)
    assert other.embed_query("rain") != embeddings.embed_query("rain")
    assert EchoEmbeddings(encoder=Encoder(mode="classical")).replace(mode="echo").mode == "echo"
    copy = embeddings.model_copy(update={"query_template": None})
    assert copy.embed_query("rain") == other.embed_query("rain")  # the encoder behind follows


def test_fingerprint_dimension_unload(embeddings: EchoEmbeddings, nothing_loaded: None) -> None:
    assert (embeddings.fingerprint, embeddings.dimension) == (
        Encoder(query_template="classical").fingerprint,
        256,
    )
    embeddings.embed_query("rain")
    embeddings.unload()
    assert registry.loaded() == []


def test_cache_backed_embeddings_keep_spaces_apart() -> None:
    store = InMemoryByteStore()
    vectors = []
    for mode in ("echo", "classical"):
        embeddings = EchoEmbeddings(mode=mode)
        cached = CacheBackedEmbeddings.from_bytes_store(
            embeddings, store, namespace=embeddings.fingerprint, key_encoder="sha256"
        )
        vectors.append(cached.embed_documents(["rain"]))
    assert vectors[0] != vectors[1]


def test_a_chroma_store_finds_what_is_nearest(embeddings: EchoEmbeddings) -> None:
    store = Chroma.from_texts(
        TEXTS, embeddings, collection_name="nearest", collection_configuration={"hnsw": {"space": "cosine"}}
    )
    found = store.similarity_search_with_score("the pump stopped working", k=3)
    vectors = np.array(embeddings.embed_documents(TEXTS)) @ np.array(embeddings.embed_query("the pump stopped working"))
    expected = np.argsort(-vectors)
    assert [document.page_content for document, _ in found] == [TEXTS[i] for i in expected]
    np.testing.assert_allclose([score for _, score in found], 1 - vectors[expected], atol=1e-5)
