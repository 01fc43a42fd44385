import asyncio
import copy
import importlib
import json
import logging
import math
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import TextNode
from llama_index.core.storage.kvstore import SimpleKVStore
from llama_index.vector_stores.chroma import ChromaVectorStore
from numpy.typing import ArrayLike
from pydantic import ValidationError

from echo_integrations import Encoder, EncoderSettings, InputError, TruncationWarning
from echo_integrations.llama_index import EchoEmbedding, LLM2VecGenEmbedding
from tests.kinds import Kind

TEXTS = [
    "The valve is closed before the pump is opened.",
    "Rain fell on the hills all night.",
    "Grüße aus Köln \N{SNOWMAN}",
    "A goat ate the manual.",
    "",
    "Bread rises when the yeast is warm and the dough has rested for an hour or two.",
]
QUESTION = "Which valve is closed?"
SECRET = "hf_not_to_be_shown"


@pytest.fixture(params=[EchoEmbedding, LLM2VecGenEmbedding], ids=["echo", "tokens"])
def kind(request: pytest.FixtureRequest, mini_tokens: Path) -> Kind:
    return Kind.of(request.param, mini_tokens)


def assert_same(actual: ArrayLike, expected: ArrayLike) -> None:
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


class Events(BaseEventHandler):
    seen: list[BaseEvent] = []

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.seen.append(event)


@pytest.fixture
def events() -> Iterator[Events]:
    root, handler = get_dispatcher(), Events()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    root, handler = get_dispatcher(), SimpleSpanHandler()
    root.add_span_handler(handler)
    yield handler
    root.span_handlers.remove(handler)


def names(spans: list[Any]) -> list[str]:
    return sorted(span.id_.split("-")[0] for span in spans)


# --- vectors


def test_vectors_are_those_of_the_encoder(kind: Kind) -> None:
    model = kind.make()
    assert isinstance(model, BaseEmbedding)
    assert_same(model.get_text_embedding_batch(TEXTS), kind.encoder().encode_document(TEXTS))
    assert_same(model.get_text_embedding(TEXTS[0]), kind.encoder().encode_document(TEXTS[0]))
    assert_same(model.get_query_embedding(QUESTION), kind.encoder().encode_query(QUESTION))
    assert_same(
        model.get_agg_embedding_from_queries([QUESTION, TEXTS[1]]),
        kind.encoder().encode_query([QUESTION, TEXTS[1]]).astype(np.float64).mean(axis=0),
    )
    assert np.abs(np.subtract(model.get_query_embedding(TEXTS[0]), model.get_text_embedding(TEXTS[0]))).max() > 0.01


async def test_async_vectors_are_those_of_the_encoder(kind: Kind) -> None:
    model = kind.make()
    assert_same(await model.aget_text_embedding_batch(TEXTS), kind.encoder().encode_document(TEXTS))
    assert_same(await model.aget_text_embedding(TEXTS[0]), kind.encoder().encode_document(TEXTS[0]))
    assert_same(await model.aget_query_embedding(QUESTION), kind.encoder().encode_query(QUESTION))


async def test_vectors_are_lists_of_floats_and_nothing_gives_nothing(kind: Kind) -> None:
    model = kind.make()
    vectors = [*model.get_text_embedding_batch(TEXTS[:2]), model.get_query_embedding(QUESTION)]
    assert all(type(vector) is list and all(type(x) is float for x in vector) for vector in vectors)
    assert {len(vector) for vector in vectors} == {model.dimension} == {kind.dimension}
    assert model.get_text_embedding_batch([]) == await model.aget_text_embedding_batch([]) == []
    assert model._get_text_embeddings([]) == []


def test_nodes_keep_their_order_over_several_batches(kind: Kind) -> None:
    nodes = [TextNode(text=text) for text in TEXTS * 2]
    assert_same([n.embedding for n in kind.make(embed_batch_size=5)(nodes)], kind.encoder().encode_document(TEXTS * 2))


@pytest.mark.parametrize(("batch_size", "calls"), [(256, 1), (3, 2)])
async def test_a_batch_is_one_call_of_the_encoder(kind: Kind, batch_size: int, calls: int) -> None:
    """The encoder warns once a call that texts were cut."""
    model = kind.make(max_length=kind.short, embed_batch_size=batch_size)
    texts = [f"text number {i} is too long for it" for i in range(6)]
    for asynchronous in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if asynchronous:
                await model.aget_text_embedding_batch(texts)
            else:
                model.get_text_embedding_batch(texts)
        assert [w.category for w in caught].count(TruncationWarning) == calls


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    ("method", "argument"),
    [("aget_query_embedding", QUESTION), ("aget_text_embedding", TEXTS[0]), ("aget_text_embedding_batch", TEXTS)],
)
async def test_the_encoder_runs_beside_the_event_loop(kind: Kind, method: str, argument: Any, cache: bool) -> None:
    """A warning of the encoder is shown by the thread that it runs in."""
    threads = []
    model = kind.make(embeddings_cache=SimpleKVStore() if cache else None, max_length=kind.short)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *_: threads.append(threading.current_thread())
        await getattr(model, method)(argument)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_the_fingerprint_is_computed_beside_the_event_loop(kind: Kind) -> None:
    store = SimpleKVStore()
    task = asyncio.ensure_future(kind.make(embeddings_cache=store).aget_text_embedding(TEXTS[0]))
    await asyncio.sleep(0)  # one turn of the loop, after which the name of the collection is still awaited
    assert store.to_dict() == {}
    assert_same(await task, kind.encoder().encode_document(TEXTS[0]))


async def test_concurrent_calls(kind: Kind) -> None:
    model = kind.make(embed_batch_size=2, num_workers=2)
    documents, query = kind.encoder().encode_document(TEXTS), kind.encoder().encode_query(QUESTION)
    for vectors, vector in await asyncio.gather(
        *(asyncio.gather(model.aget_text_embedding_batch(TEXTS), model.aget_query_embedding(QUESTION)) for _ in "1234")
    ):
        assert_same(vectors, documents)
        assert_same(vector, query)


# --- bad input


@pytest.mark.parametrize("bad", [None, 3, b"bytes", "\ud800"])
async def test_bad_input_is_refused_and_not_tried_again(kind: Kind, bad: Any, spans: SimpleSpanHandler) -> None:
    model = kind.make()
    with pytest.raises(InputError, match=r"texts\[0\]"):
        model.get_query_embedding(bad)
    assert names(spans.dropped_spans) == [f"{kind.name}._get_query_embedding", f"{kind.name}.get_query_embedding"]
    for coroutine in (model.aget_query_embedding(bad), model.aget_text_embedding(bad)):
        with pytest.raises(InputError, match=r"texts\[0\]"):
            await coroutine
    with pytest.raises(InputError, match=r"texts\[0\]"):
        model.get_text_embedding(bad)
    with pytest.raises(InputError, match=r"texts\[1\]"):
        model.get_text_embedding_batch([TEXTS[0], bad])
    with pytest.raises(InputError, match=r"texts\[1\]"):
        await model.aget_text_embedding_batch([TEXTS[0], bad])


# --- arguments


def test_arguments(kind: Kind) -> None:
    model = kind.make(model="echo-mini", truncate_dim=8, num_workers=3)
    arguments = (model.model_name, model.mode, model.truncate_dim, model.num_workers, model.embed_batch_size)
    assert arguments == ("echo-mini", kind.mode, 8, 3, 256)
    assert kind.make(model_name="echo-mini").class_name() == kind.cls.class_name() == kind.name
    assert EncoderSettings.model_fields.keys() | BaseEmbedding.model_fields.keys() | {"encoder"} == set(
        kind.cls.model_fields
    )


def test_modes(kind: Kind) -> None:
    right = {"echo": "LLM2VecGenEmbedding", "llm2vec-gen": "EchoEmbedding"}[kind.mode]
    others = {"echo": ["llm2vec-gen"], "llm2vec-gen": ["echo", "classical"]}[kind.mode]
    for mode in others:
        for arguments in ({"mode": mode}, {"encoder": Encoder(mode=mode)}):
            with pytest.raises(ValidationError, match=f"{kind.name} is for mode .*, not '{mode}': use {right}"):
                kind.cls(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"modle": "echo-mini"}, {"model": "a", "model_name": "b"}, {"embed_batch_size": 0}, {"embed_batch_size": 2049}]
    + [{"mode": "twice"}, {"encoder": Encoder(), "mode": "echo"}],
)
def test_impossible_arguments_are_refused(kind: Kind, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.cls(**arguments)


async def test_one_string_is_one_text(kind: Kind) -> None:
    expected = kind.encoder().encode_document(["abc"])
    assert_same(kind.make().get_text_embedding_batch("abc"), expected)
    assert_same(await kind.make().aget_text_embedding_batch("abc"), expected)


def test_a_ready_encoder(kind: Kind) -> None:
    encoder = kind.encoder(truncate_dim=16, **kind.other)
    model = kind.cls(encoder=encoder, embed_batch_size=7)
    assert model.encoder is encoder
    assert (model.settings(), model.fingerprint, model.dimension) == (encoder.settings(), encoder.fingerprint, 16)
    assert_same(model.get_text_embedding_batch(TEXTS), encoder.encode_document(TEXTS))


@pytest.mark.parametrize("name", sorted(EncoderSettings.setting_names() | {"encoder"}))
def test_a_setting_cannot_be_changed_afterwards(kind: Kind, name: str) -> None:
    model = kind.make()
    with pytest.raises(InputError, match=rf"{name} cannot be changed.*replace\({name}="):
        setattr(model, name, getattr(model, name, "echo-mini"))


def test_the_rest_can_be_changed_afterwards(kind: Kind) -> None:
    model, manager = kind.make(), CallbackManager([])
    model.callback_manager, model.embed_batch_size, model.num_workers = manager, 10, 2
    assert model.callback_manager is manager
    assert (model.embed_batch_size, model.num_workers) == (10, 2)
    with pytest.raises(ValueError, match="no field"):
        model.no_such_field = 1


def test_replace_keeps_the_rest(kind: Kind) -> None:
    store, manager = SimpleKVStore(), CallbackManager([])
    model = kind.cls(encoder=kind.encoder(), embed_batch_size=7, embeddings_cache=store, callback_manager=manager)
    other = model.replace(model="echo-mini", **kind.other)
    assert (other.model_name, other.dtype, other.embed_batch_size) == ("echo-mini", "float32", 7)
    assert other.callback_manager is manager
    assert other.embeddings_cache.store is store
    assert_same(other.get_text_embedding(TEXTS[0]), kind.encoder(**kind.other).encode_document(TEXTS[0]))


def test_with_instruction(kind: Kind) -> None:
    store = SimpleKVStore()
    model = kind.make(embeddings_cache=store, embed_batch_size=7, query_instruction="Find it")
    other = model.with_instruction("Say it")
    assert (type(other), other.embed_batch_size, other.embeddings_cache.store) == (kind.cls, 7, store)
    for twin, instruction in ((model, "Find it"), (other, "Say it"), (model.with_instruction(""), "")):
        query = kind.encoder(query_instruction=instruction).encode_query(QUESTION)
        assert_same(twin.get_query_embedding(QUESTION), query)  # none is served another's from the cache
    documents = model.with_instruction(document="") if kind.mode == "llm2vec-gen" else model
    expected = kind.encoder(document_instruction="").encode_document(QUESTION)
    assert_same(documents.get_text_embedding(QUESTION), expected)
    with pytest.raises(ValidationError, match="has no place for it"):
        EchoEmbedding().with_instruction("Find it")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "echo_integrations.llama_index")
    monkeypatch.setitem(sys.modules, "llama_index.core.base.embeddings.base", None)  # type: ignore[arg-type]
    with pytest.raises(ModuleNotFoundError, match=r'pip install "echo-integrations\[llama-index\]"$'):
        importlib.import_module("echo_integrations.llama_index")


# --- dumps and pickles


@pytest.mark.parametrize("ready", [False, True])
def test_round_trips(kind: Kind, ready: bool) -> None:
    settings = {"query_instruction": "Find the passage", "max_length": 64}
    encoder = kind.encoder(**settings)
    model = kind.cls(embed_batch_size=7, **({"encoder": encoder} if ready else {**kind.settings, **settings}))
    assert_same(model.get_query_embedding(QUESTION), encoder.encode_query(QUESTION))  # the model is loaded now
    pickled = pickle.dumps(model)
    assert len(pickled) < 4096
    for twin in (
        kind.cls.from_dict(model.to_dict()),
        kind.cls.from_json(model.to_json()),
        pickle.loads(pickled),
        pickle.loads(pickle.dumps(pickle.loads(pickled))),
        copy.deepcopy(model),
        copy.copy(model),
    ):
        assert (twin.encoder.model_dump(), twin.embed_batch_size) == (encoder.model_dump(), 7)
        assert_same(twin.get_query_embedding(QUESTION), encoder.encode_query(QUESTION))
        assert_same(twin.get_text_embedding_batch(TEXTS), encoder.encode_document(TEXTS))
    assert model.to_dict()["class_name"] == json.loads(model.to_json())["class_name"] == kind.name
    assert kind.cls.from_dict(model.to_dict(), max_length=32).max_length == 32


@pytest.mark.parametrize("ready", [False, True])
def test_the_token_is_pickled_and_never_shown(
    kind: Kind, ready: bool, events: Events, spans: SimpleSpanHandler
) -> None:
    model = kind.cls(encoder=kind.encoder(token=SECRET)) if ready else kind.make(token=SECRET)
    model.embeddings_cache = SimpleKVStore()
    model.get_query_embedding(QUESTION)
    model.get_text_embedding_batch(TEXTS)
    shown = [repr(model), str(model), str(model.to_dict()), str(payload_of(model)), str(vars(model))]
    shown += [str(event.model_dump()) for event in events.seen] + [str(s.model_dump()) for s in spans.completed_spans]
    assert len(shown) > 8
    assert not [text for text in shown if SECRET in text]
    assert "token" not in model.to_dict()
    assert SECRET.encode() not in pickle.dumps(model.to_dict())
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert twin.token.get_secret_value() == SECRET


def test_what_cannot_be_pickled_stays_with_the_original(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    class Connected(SimpleKVStore):
        def __init__(self) -> None:
            super().__init__()
            self.connection = threading.Lock()

    store = Connected()
    model = kind.make(embeddings_cache=store, embed_batch_size=7)
    with caplog.at_level(logging.WARNING):
        twin = pickle.loads(pickle.dumps(model))
    assert "embeddings_cache is not pickled" in caplog.text
    assert (twin.embeddings_cache, twin.embed_batch_size) == (None, 7)
    assert model.embeddings_cache.store is store


@pytest.mark.parametrize(
    ("kind", "asynchronous"),
    [(LLM2VecGenEmbedding, False), (EchoEmbedding, True)],
    indirect=["kind"],
)
async def test_pipeline_workers_give_the_same_vectors(kind: Kind, asynchronous: bool) -> None:
    expected = kind.encoder(**kind.other).encode_document(TEXTS)  # and this process has run the model
    pipeline = IngestionPipeline(transformations=[kind.make(**kind.other)], disable_cache=True)
    nodes = [TextNode(text=text) for text in TEXTS]
    if asynchronous:
        result = await pipeline.arun(nodes=nodes, num_workers=2)
    else:
        result = pipeline.run(nodes=nodes, num_workers=2)
    assert [node.text for node in result] == TEXTS
    assert_same([node.embedding for node in result], expected)


def test_pipeline_cache_knows_the_settings(kind: Kind) -> None:
    first, second = kind.make(), kind.make(**kind.other)
    pipeline = IngestionPipeline(transformations=[first])
    for model in (first, second, first):
        pipeline.transformations = [model]
        result = pipeline.run(nodes=[TextNode(text=TEXTS[0], id_="1")])
        assert_same(result[0].embedding, model.encoder.encode_document(TEXTS[0]))
    assert len(pipeline.cache.cache.get_all(pipeline.cache.collection)) == 2


# --- instrumentation


def payload_of(model: Any) -> dict[str, Any]:
    """What LlamaIndex tells of a model in its events: ``to_payload`` since 0.14.23, ``to_dict`` before it."""
    return model.to_payload() if hasattr(model, "to_payload") else model.to_dict()


async def test_events(kind: Kind, events: Events, spans: SimpleSpanHandler) -> None:
    model = kind.make()
    payload = payload_of(model)
    told = {"class_name": kind.name, "model_name": "echo-mini", "embed_batch_size": 256}
    assert payload.items() >= told.items()
    vector = model.get_query_embedding(QUESTION)
    assert await model.aget_query_embedding(QUESTION) == pytest.approx(vector)
    starts = [event for event in events.seen if isinstance(event, EmbeddingStartEvent)]
    ends = [event for event in events.seen if isinstance(event, EmbeddingEndEvent)]
    assert [event.model_dict for event in starts] == [payload] * 2
    assert [(event.chunks, event.embeddings) for event in ends][0] == ([QUESTION], [vector])
    assert names(spans.completed_spans) == [
        f"{kind.name}._aget_query_embedding",
        f"{kind.name}._get_query_embedding",
        f"{kind.name}.aget_query_embedding",
        f"{kind.name}.get_query_embedding",
    ]


def test_callbacks(kind: Kind) -> None:
    handler = LlamaDebugHandler(print_trace_on_end=False)
    model = kind.make(embed_batch_size=4)
    model.callback_manager = CallbackManager([handler])
    model.get_text_embedding_batch(TEXTS)
    pairs = handler.get_event_pairs(CBEventType.EMBEDDING)
    assert [end.payload[EventPayload.CHUNKS] for _, end in pairs] == [TEXTS[:4], TEXTS[4:]]
    assert pairs[0][0].payload[EventPayload.SERIALIZED] == payload_of(model)


# --- embeddings_cache


def cached(store: SimpleKVStore) -> dict[str, dict[str, list[float]]]:
    """Collection -> text -> the vector in it."""
    return {
        name: {text: next(iter(value.values())) for text, value in entries.items()}
        for name, entries in store.to_dict().items()
    }


async def test_cached_vectors_of_roles_models_and_instructions_are_kept_apart(kind: Kind) -> None:
    store = SimpleKVStore()
    variants = [
        {},
        kind.other,
        {"query_instruction": "Find the passage"},
        {"query_instruction": "Find the passage that answers"},
    ]
    models = [kind.make(embeddings_cache=store, **variant) for variant in variants]
    encoders = [kind.encoder(**variant) for variant in variants]
    for _ in range(2):
        for model, encoder in zip(models, encoders, strict=True):
            query, document = encoder.encode_query(QUESTION), encoder.encode_document(QUESTION)
            assert_same(model.get_query_embedding(QUESTION), query)
            assert_same(model.get_text_embedding(QUESTION), document)
            assert_same(model.get_text_embedding_batch([TEXTS[0], QUESTION])[1], document)
            assert_same(await model.aget_query_embedding(QUESTION), query)
            assert_same(await model.aget_text_embedding(QUESTION), document)
            assert_same((await model.aget_text_embedding_batch([TEXTS[0], QUESTION]))[1], document)
    prints = [encoder.fingerprint for encoder in encoders]
    assert len(set(prints)) == {"echo": 3, "llm2vec-gen": 2}[kind.mode]  # instructions share one space
    kept = cached(store)
    counts = {"echo": [1, 1, 2, 2], "llm2vec-gen": [3, 1, 3, 3]}[kind.mode]  # the first has an instruction by default
    assert [sum(f"_{fingerprint}_query_" in name for name in kept) for fingerprint in prints] == counts
    assert [sum(f"_{fingerprint}_document_" in name for name in kept) for fingerprint in prints] == [1, 1, 1, 1]
    assert "embeddings" not in kept


async def test_cached_vectors_are_served(kind: Kind) -> None:
    store = SimpleKVStore()
    model = kind.make(embeddings_cache=store)
    model.get_query_embedding(QUESTION)
    model.get_text_embedding_batch(TEXTS)
    for name, entries in cached(store).items():  # vectors that no encoder would give
        for number, text in enumerate(sorted(entries)):
            store.put(text, {"id": [float("query" in name), float(number)]}, name)
    documents = [[0.0, float(sorted(TEXTS).index(text))] for text in TEXTS]
    loaded = SimpleKVStore.from_dict(json.loads(json.dumps(store.to_dict())))  # as from a file
    for twin in (model, kind.make(embeddings_cache=loaded), kind.make(embeddings_cache=model.embeddings_cache)):
        assert twin.get_query_embedding(QUESTION) == await twin.aget_query_embedding(QUESTION) == [1.0, 0.0]
        assert twin.get_text_embedding_batch(TEXTS) == await twin.aget_text_embedding_batch(TEXTS) == documents
        assert twin.get_text_embedding(TEXTS[0]) == await twin.aget_text_embedding(TEXTS[0]) == documents[0]
    assert_same(model.get_text_embedding(QUESTION), kind.encoder().encode_document(QUESTION))


async def test_the_role_is_that_of_each_call(kind: Kind) -> None:
    model = kind.make(embeddings_cache=SimpleKVStore())
    with pytest.raises(InputError):
        model.get_query_embedding(5)
    query, document, batch = await asyncio.gather(
        model.aget_query_embedding(QUESTION),
        model.aget_text_embedding(QUESTION),
        model.aget_text_embedding_batch([QUESTION]),
    )
    assert_same(query, kind.encoder().encode_query(QUESTION))
    assert_same([document, *batch], kind.encoder().encode_document([QUESTION] * 2))
    assert sorted(len(entries) for entries in cached(model.embeddings_cache.store).values()) == [1, 1]


def test_a_store_is_wrapped_once(kind: Kind) -> None:
    store = SimpleKVStore()
    model = kind.make(embeddings_cache=store)
    assert model.to_dict()["embeddings_cache"] is store
    twins = [
        kind.cls.from_dict(model.to_dict()),
        kind.cls.model_validate(model),
        kind.make(**kind.other, embeddings_cache=model.embeddings_cache),
        kind.make(),
    ]
    twins[-1].embeddings_cache = model.embeddings_cache
    assert [twin.embeddings_cache.store is store for twin in twins] == [True] * 4
    assert_same(model.get_text_embedding(TEXTS[0]), kind.encoder().encode_document(TEXTS[0]))
    for twin in [*twins, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]:
        assert type(twin.embeddings_cache.store) is SimpleKVStore
        assert_same(twin.get_text_embedding(TEXTS[0]), twin.encoder.encode_document(TEXTS[0]))
    twins[-1].embeddings_cache = None
    assert twins[-1].embeddings_cache is None


async def test_the_wrapped_store_is_a_whole_store(kind: Kind) -> None:
    class Empty(SimpleKVStore):
        def __len__(self) -> int:
            return 0

    store = Empty()
    cache = kind.make(embeddings_cache=store).embeddings_cache
    assert bool(cache) and not bool(store)  # LlamaIndex would take an empty store of such a class for none
    cache.put("a", {"x": [1.0]}, "embeddings")
    await cache.aput("b", {"x": [2.0]}, "embeddings")
    cache.put("c", {"x": [3.0]})
    assert cache.get_all("embeddings") == await cache.aget_all("embeddings") == {"a": {"x": [1.0]}, "b": {"x": [2.0]}}
    assert store.get_all() == {"c": {"x": [3.0]}}  # other collections are left alone
    assert cache.delete("a", "embeddings")
    assert await cache.adelete("b", "embeddings")
    assert cache.get("a", "embeddings") is await cache.aget("b", "embeddings") is None


def test_what_is_no_store_is_refused(kind: Kind) -> None:
    with pytest.raises(TypeError, match="BaseKVStore"):
        kind.make(embeddings_cache={})
    model = kind.make()
    with pytest.raises(TypeError, match="dict: pass a BaseKVStore"):
        model.embeddings_cache = {}


# --- retrieval


async def test_retrieval_from_chroma(kind: Kind) -> None:
    client, texts = chromadb.EphemeralClient(), [text for text in TEXTS if text]
    collection = client.get_or_create_collection("llama-index-test", configuration={"hnsw": {"space": "cosine"}})
    store = ChromaVectorStore(chroma_collection=collection)
    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(texts)]
    index = VectorStoreIndex(
        nodes, embed_model=kind.make(), storage_context=StorageContext.from_defaults(vector_store=store)
    )
    documents, query = kind.encoder().encode_document(texts), kind.encoder().encode_query(QUESTION)
    similarities = {str(i): float(documents[i] @ query) for i in range(len(texts))}
    best = sorted(similarities, key=lambda i: -similarities[i])[:3]
    retriever = VectorStoreIndex.from_vector_store(store, embed_model=kind.make()).as_retriever(similarity_top_k=3)
    for hits in (retriever.retrieve(QUESTION), await index.as_retriever(similarity_top_k=3).aretrieve(QUESTION)):
        assert [hit.node_id for hit in hits] == best
        for hit in hits:  # this store's score is exp(-distance)
            assert hit.score == pytest.approx(math.exp(similarities[hit.node_id] - 1), abs=1e-5)
    assert best[0] == "0" or kind.mode == "llm2vec-gen"  # whose tokens are random here
    client.delete_collection("llama-index-test")
