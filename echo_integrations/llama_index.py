"""The encoder as LlamaIndex embedding classes, `EchoEmbedding` and `LLM2VecGenEmbedding`, and its LM as an LLM.

This module knows nothing of the other frameworks.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import ConfigDict, Field, field_serializer, model_validator

from echo_integrations.adapter import ECHO_MODES, TOKEN_SET_MODES, EncoderFields, cache_name, share_lm
from echo_integrations.config import EncoderSettings, InputError, Role
from echo_integrations.encoder import Encoder

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.base.llms.generic_utils import messages_to_prompt
    from llama_index.core.storage.kvstore.types import DEFAULT_COLLECTION, BaseKVStore
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('LlamaIndex is not installed: pip install "echo-integrations[llama-index]"') from error

if TYPE_CHECKING:
    from llama_index.llms.huggingface import HuggingFaceLLM

_COLLECTION = "embeddings"  # where LlamaIndex keeps every vector, keyed by nothing but the text
_role: ContextVar[Role] = ContextVar("role", default=Role.DOCUMENT)


@contextmanager
def _asking() -> Iterator[None]:
    """What is looked up in a cache meanwhile is a query."""
    token = _role.set(Role.QUERY)
    try:
        yield
    finally:
        _role.reset(token)


class _Embedding(EncoderFields, BaseEmbedding):
    """What both classes do."""

    model_config = ConfigDict(frozen=False)

    embed_batch_size: int = Field(default=256, gt=0, le=2048)
    """Texts that LlamaIndex hands over at a time. Its own default is 10; the encoder sorts the texts that it gets by
    length and sizes its batches by tokens (``token_budget``), which needs many texts and costs no memory."""

    @classmethod
    def class_name(cls) -> str:
        """The name in dumps and events."""
        return cls.__name__

    @functools.wraps(BaseEmbedding.get_query_embedding, assigned=())  # marks it as traced: one span a call, not two
    def get_query_embedding(self, query: str) -> list[float]:
        """Embed a question.

        Args:
            query: a string.

        Returns:
            ``dimension`` floats.

        Raises:
            InputError: not a string.
        """
        with _asking():
            return super().get_query_embedding(query)

    @functools.wraps(BaseEmbedding.aget_query_embedding, assigned=())
    async def aget_query_embedding(self, query: str) -> list[float]:
        """As `get_query_embedding`; calls that come at once share batches."""
        with _asking():
            return await super().aget_query_embedding(query)

    @functools.wraps(BaseEmbedding.get_text_embedding_batch, assigned=())
    def get_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[list[float]]:
        """Embed texts that are searched; one string alone is one text."""
        return super().get_text_embedding_batch(_listed(texts), show_progress, **kwargs)

    @functools.wraps(BaseEmbedding.aget_text_embedding_batch, assigned=())
    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[list[float]]:
        """As `get_text_embedding_batch`; batches that come at once share passes through the model."""
        return await super().aget_text_embedding_batch(_listed(texts), show_progress, **kwargs)

    def _get_query_embedding(self, query: str) -> list[float]:
        return cast("list[float]", self.encoder.encode_query([query])[0].tolist())

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return cast("list[list[float]]", self.encoder.encode_document(texts).tolist())  # (n, D)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return cast("list[float]", (await self.encoder.aencode_query([query]))[0].tolist())

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return cast("list[list[float]]", (await self.encoder.aencode_document(texts)).tolist())  # (n, D)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder" or name in EncoderSettings.setting_names():
            raise InputError(f"{name} cannot be changed after construction: make a new one with replace({name}=...)")
        if name == "embeddings_cache" and value is not None:
            value = _SeparatingStore(value, self.encoder)
        super().__setattr__(name, value)

    @model_validator(mode="after")
    def _separate_cache(self) -> Self:
        self.embeddings_cache = self.embeddings_cache  # __setattr__ wraps it
        return self

    @field_serializer("embeddings_cache")
    def _store_as_given(self, cache: Any) -> Any:
        return cache and cache.store

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments; of the live objects among them those that can be."""
        arguments = self._arguments()
        for name in arguments.keys() - EncoderSettings.model_fields.keys():
            try:
                pickle.dumps(arguments[name])
            except Exception as error:  # whatever the object's own __reduce__ raises
                logging.getLogger(__name__).warning("%s is not pickled with %s: %s", name, type(self).__name__, error)
                del arguments[name]
        return functools.partial(type(self), **arguments), ()


class EchoEmbedding(_Embedding):
    """Echo embeddings for LlamaIndex; takes the arguments of `EncoderSettings`, or ``encoder=`` a ready `Encoder`.

    It also takes those of ``BaseEmbedding``. Each batch is one call of the encoder; async calls that come at once
    share batches, and the event loop stays free. Only arguments are dumped and pickled, never the model: each worker
    of an ``IngestionPipeline`` loads its own (on a GPU use ``run``, because ``arun`` forks its workers on Linux). The
    token is pickled, but is in no dump, repr or event.

    One store may be the ``embeddings_cache`` of many models: it is wrapped in one that keeps vector spaces, queries
    and documents apart, in collections named ``embeddings_<fingerprint>_<role>_<hash of the instruction>``.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.
        InputError: a setting is changed after construction.

    Example:
        >>> embed_model = EchoEmbedding(model="echo-mini")
        >>> len(embed_model.get_query_embedding("how do I reset the pump?"))
        256

    Source: Springer et al., "Repetition Improves Language Model Embeddings", arXiv 2402.15449.
    """

    modes = ECHO_MODES
    class_of_other_modes = "LLM2VecGenEmbedding"


class LLM2VecGenEmbedding(_Embedding):
    """LLM2Vec-Gen embeddings for LlamaIndex: of what the model would answer to a text, not of the text.

    Takes the arguments of `EncoderSettings`, or ``encoder=`` a ready `Encoder`, and those of ``BaseEmbedding``: as the
    model a released checkpoint, or a backbone and ``token_set=`` a token set of your own. Where no instructions are
    given, the token set's are used or else the paper's, other ones for queries than for documents. Async methods,
    pickling and ``embeddings_cache`` as for `EchoEmbedding`.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.
        TokenSetError: a damaged token set.
        InputError: a setting is changed after construction.

    Example:
        >>> embed_model = LLM2VecGenEmbedding(model="echo-mini")
        >>> len(embed_model.get_query_embedding("how do I reset the pump?"))
        384

    Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
    """

    modes = TOKEN_SET_MODES
    class_of_other_modes = "EchoEmbedding"


def shared_llm(encoder: Encoder, **kwargs: Any) -> HuggingFaceLLM:
    """A LlamaIndex LLM over the *same* loaded weights as an encoder: one model embeds and answers.

    It has a tokenizer of its own. The weights stay in memory until the encoder is unloaded *and* this is gone. Passes
    through the model are not held back for each other: where memory is tight, do not embed while it answers.

    Args:
        encoder: of any mode; of an embedding class its ``encoder``.
        **kwargs: of ``HuggingFaceLLM``, such as ``max_new_tokens``, ``generate_kwargs`` or ``is_chat_model=True`` for
            a model with a chat template. Unlike there, ``context_window`` is the model's own unless given.

    Returns:
        The LLM, for ``Settings.llm`` or a query engine.

    Raises:
        InputError: a token set with LoRA, or an argument that would load another model.
        ModelLoadError: the checkpoint has no LM head, or cannot be loaded.

    Example:
        >>> llm = shared_llm(EchoEmbedding(model="echo-mini").encoder, max_new_tokens=8)
        >>> answer = llm.complete("The pump is").text
    """
    try:
        from llama_index.llms.huggingface import HuggingFaceLLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'llama-index-llms-huggingface is not installed: pip install "echo-integrations[llama-index-llm]"'
        ) from error

    fixed = {"model", "tokenizer", "model_name", "tokenizer_name", "device_map", "model_kwargs", "tokenizer_kwargs"}
    if taken := sorted(fixed & kwargs.keys()):
        raise InputError(f"{', '.join(taken)} cannot be chosen here: the model is the encoder's, as the encoder has it")

    def build(lm: Any, tokenizer: Any) -> HuggingFaceLLM:
        own: dict[str, Any] = {"model_name": lm.name_or_path, "tokenizer_name": lm.name_or_path}
        if positions := getattr(lm.config, "max_position_embeddings", None):
            own["context_window"] = positions
        if tokenizer.chat_template is None:  # without one its own way of laying out messages fails
            own["messages_to_prompt"] = messages_to_prompt
        return HuggingFaceLLM(model=lm, tokenizer=tokenizer, **{**own, **kwargs})

    return share_lm(encoder, build)


def _listed(texts: Any) -> list[str]:
    """LlamaIndex would cut a string into its characters."""
    return [texts] if isinstance(texts, str) else texts


class _SeparatingStore(BaseKVStore):
    """A store whose collection "embeddings" is another one for each vector space, role and instruction."""

    def __init__(self, store: Any, encoder: Encoder) -> None:
        self.store: BaseKVStore = store.store if isinstance(store, _SeparatingStore) else store
        self._encoder = encoder
        if not isinstance(self.store, BaseKVStore):
            raise TypeError(f"embeddings_cache is {type(store).__name__}: pass a BaseKVStore, such as SimpleKVStore")

    @functools.cached_property
    def _collections(self) -> dict[Role, str]:
        """Computed late, because fingerprint and instructions need files."""
        return {role: f"{_COLLECTION}_{cache_name(self._encoder, role)}" for role in Role}

    def _name(self, collection: str) -> str:
        return self._collections[_role.get()] if collection == _COLLECTION else collection

    async def _aname(self, collection: str) -> str:
        if "_collections" not in vars(self):
            await asyncio.to_thread(lambda: self._collections)
        return self._name(collection)

    def put(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        self.store.put(key, val, self._name(collection))

    async def aput(self, key: str, val: dict[str, Any], collection: str = DEFAULT_COLLECTION) -> None:
        await self.store.aput(key, val, await self._aname(collection))

    def get(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        return self.store.get(key, self._name(collection))

    async def aget(self, key: str, collection: str = DEFAULT_COLLECTION) -> dict[str, Any] | None:
        return await self.store.aget(key, await self._aname(collection))

    def get_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        return self.store.get_all(self._name(collection))

    async def aget_all(self, collection: str = DEFAULT_COLLECTION) -> dict[str, dict[str, Any]]:
        return await self.store.aget_all(await self._aname(collection))

    def delete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        return self.store.delete(key, self._name(collection))

    async def adelete(self, key: str, collection: str = DEFAULT_COLLECTION) -> bool:
        return await self.store.adelete(key, await self._aname(collection))
