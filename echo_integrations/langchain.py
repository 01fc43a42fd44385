"""`EchoEmbeddings`: the encoder as a LangChain embedding class. Knows nothing of the other frameworks."""

from __future__ import annotations

from typing import cast

from echo_integrations.adapter import EncoderFields

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('LangChain is not installed: pip install "echo-integrations[langchain]"') from error


class EchoEmbeddings(EncoderFields, Embeddings):
    """Echo embeddings for LangChain; takes the arguments of `EncoderSettings`, or ``encoder=`` a ready `Encoder`.

    Sync and async (the async methods run in LangChain's executor threads, which is safe here).
    For ``CacheBackedEmbeddings`` pass ``namespace=embeddings.fingerprint``, and for cached queries a *separate*
    ``query_embedding_cache`` store, because queries and documents of the same text have different vectors; take a
    new query store when ``query_instruction`` changes.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.

    Example:
        >>> embeddings = EchoEmbeddings(model="echo-mini")
        >>> len(embeddings.embed_query("how do I reset the pump?"))
        256

    Source: Springer et al., "Repetition Improves Language Model Embeddings", arXiv 2402.15449.
    """

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
