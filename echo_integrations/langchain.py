"""The encoder as LangChain embedding classes, `EchoEmbeddings` and `LLM2VecGenEmbeddings`, and its LM as an LLM.

This module knows nothing of the other frameworks.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

from echo_integrations.adapter import ECHO_MODES, TOKEN_SET_MODES, EncoderFields, cache_name, share_lm
from echo_integrations.config import InputError, Role
from echo_integrations.encoder import Encoder

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('LangChain is not installed: pip install "echo-integrations[langchain]"') from error

if TYPE_CHECKING:
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_core.stores import ByteStore
    from langchain_huggingface import HuggingFacePipeline


class _Embeddings(EncoderFields, Embeddings):
    """What both classes do."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts that are searched.

        Args:
            texts: strings.

        Returns:
            One vector of ``dimension`` floats a text, in order; ``[]`` for ``[]``.

        Raises:
            InputError: an item that is no text; the message gives its index.
        """
        texts = [texts] if isinstance(texts, str) else texts
        return cast("list[list[float]]", self.encoder.encode_document(texts).tolist())

    def embed_query(self, text: str) -> list[float]:
        """Embed a question.

        Args:
            text: a string.

        Returns:
            ``dimension`` floats.

        Raises:
            InputError: not a string.
        """
        return cast("list[float]", self.encoder.encode_query([text])[0].tolist())

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """As `embed_documents`; calls that come at once share batches, and one that is cancelled gives up its place."""
        texts = [texts] if isinstance(texts, str) else texts
        return cast("list[list[float]]", (await self.encoder.aencode_document(texts)).tolist())

    async def aembed_query(self, text: str) -> list[float]:
        """As `embed_query`; calls that come at once share batches, and one that is cancelled gives up its place."""
        return cast("list[float]", (await self.encoder.aencode_query([text]))[0].tolist())


class EchoEmbeddings(_Embeddings):
    """Echo embeddings for LangChain; takes the arguments of `EncoderSettings`, or ``encoder=`` a ready `Encoder`.

    Sync and async: calls that come at once, from threads or tasks, share batches. `cached` puts a cache in front.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.

    Example:
        >>> embeddings = EchoEmbeddings(model="echo-mini")
        >>> len(embeddings.embed_query("how do I reset the pump?"))
        256

    Source: Springer et al., "Repetition Improves Language Model Embeddings", arXiv 2402.15449.
    """

    modes = ECHO_MODES
    class_of_other_modes = "LLM2VecGenEmbeddings"


class LLM2VecGenEmbeddings(_Embeddings):
    """LLM2Vec-Gen embeddings for LangChain: of what the model would answer to a text, not of the text.

    Takes the arguments of `EncoderSettings`, or ``encoder=`` a ready `Encoder`: as the model a released checkpoint, or
    a backbone and ``token_set=`` a token set of your own. Where no instructions are given, the token set's are used or
    else the paper's, other ones for queries than for documents. Async methods and caches as for `EchoEmbeddings`.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.
        TokenSetError: a damaged token set.

    Example:
        >>> embeddings = LLM2VecGenEmbeddings(model="echo-mini")
        >>> len(embeddings.embed_query("how do I reset the pump?"))
        384

    Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
    """

    modes = TOKEN_SET_MODES
    class_of_other_modes = "EchoEmbeddings"


def cached(embeddings: _Embeddings, store: ByteStore, *, batch_size: int | None = None) -> CacheBackedEmbeddings:
    """Embeddings behind a cache of documents *and* queries that many models, roles and instructions may share.

    Keys are ``<fingerprint>_<role>_<hash of the instruction>_<hash of the text>``: whatever would change a vector
    changes its key.

    Args:
        embeddings: what answers where the store does not.
        store: any ``ByteStore``, such as ``LocalFileStore`` or ``RedisStore``.
        batch_size: documents that are embedded between two writes; all of them unless given.

    Returns:
        LangChain's own ``CacheBackedEmbeddings``; it takes ``pip install langchain-classic``.

    Raises:
        InputError: not an embedding class of this module.
        ModelLoadError: no such model.

    Example:
        >>> from langchain_core.stores import InMemoryByteStore
        >>> store = InMemoryByteStore()
        >>> embeddings = cached(EchoEmbeddings(model="echo-mini"), store)
        >>> embeddings.embed_query("pump") == embeddings.embed_query("pump"), len(list(store.yield_keys()))
        (True, 1)
    """
    if not isinstance(embeddings, _Embeddings):
        raise InputError(f"embeddings is a {type(embeddings).__name__}: pass EchoEmbeddings or LLM2VecGenEmbeddings")
    try:
        from langchain_classic.embeddings import CacheBackedEmbeddings
        from langchain_classic.storage import EncoderBackedStore
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("langchain-classic is not installed: pip install langchain-classic") from error

    def of(role: Role) -> EncoderBackedStore[str, list[float]]:
        name = cache_name(embeddings.encoder, role)
        return EncoderBackedStore(
            store,
            key_encoder=lambda text: f"{name}_{hashlib.sha256(text.encode()).hexdigest()}",
            value_serializer=lambda vector: json.dumps(vector).encode(),
            value_deserializer=json.loads,
        )

    documents, queries = of(Role.DOCUMENT), of(Role.QUERY)
    return CacheBackedEmbeddings(embeddings, documents, batch_size=batch_size, query_embedding_store=queries)


def shared_llm(encoder: Encoder, **pipeline_kwargs: Any) -> HuggingFacePipeline:
    """A LangChain LLM over the *same* loaded weights as an encoder: one model embeds and answers.

    It has a tokenizer of its own, because pipelines change padding. The weights stay in memory until the encoder is
    unloaded *and* this is gone. Passes through the model are not held back for each other: where memory is tight, do
    not embed while it answers.

    Args:
        encoder: of any mode; of an embedding class its ``encoder``.
        **pipeline_kwargs: of transformers' text-generation pipeline, such as ``max_new_tokens``, ``do_sample`` or
            ``batch_size``. Unlike there, ``return_full_text`` is False unless given: an answer leaves out its prompt.

    Returns:
        The LLM; ``langchain_huggingface.ChatHuggingFace(llm=...)`` makes a chat model of it.

    Raises:
        InputError: a token set with LoRA, or an argument that would load or move the model.
        ModelLoadError: the checkpoint has no LM head, or cannot be loaded.

    Example:
        >>> llm = shared_llm(EchoEmbeddings(model="echo-mini").encoder, max_new_tokens=8)
        >>> answer = llm.invoke("The pump is")
    """
    try:
        from langchain_huggingface import HuggingFacePipeline
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'langchain-huggingface is not installed: pip install "echo-integrations[langchain-llm]"'
        ) from error
    from transformers import pipeline

    fixed = {"model", "tokenizer", "task", "device", "device_map", "dtype", "torch_dtype", "model_kwargs", "config"}
    if taken := sorted(fixed & pipeline_kwargs.keys()):
        raise InputError(f"{', '.join(taken)} cannot be chosen here: the model is the encoder's, as the encoder has it")

    def build(lm: Any, tokenizer: Any) -> HuggingFacePipeline:
        device = None if hasattr(lm, "hf_device_map") else -1  # where it is
        arguments = {"return_full_text": False, **pipeline_kwargs}
        generator: Any = pipeline("text-generation", model=lm, tokenizer=tokenizer, device=device, **arguments)
        batching = {"batch_size": pipeline_kwargs["batch_size"]} if "batch_size" in pipeline_kwargs else {}
        return HuggingFacePipeline(pipeline=generator, pipeline_kwargs=pipeline_kwargs, **batching)

    return share_lm(encoder, build)
