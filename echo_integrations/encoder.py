"""`Encoder`: from texts to vectors, in the caller's order.

The path of a text: `Call` lays it out by its recipe, ``forward.embed`` groups it with texts of similar length, runs the
model, pools the marked positions and applies a token set's maps, `Call` cuts, normalises and puts it in its place.
This module knows nothing of frameworks.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from echo_integrations import reading
from echo_integrations.backbone import Backbone, BackboneSpec
from echo_integrations.batching import windows
from echo_integrations.config import EncoderSettings, InputError, Mode, Role, canonical_json
from echo_integrations.pipeline import Call
from echo_integrations.reading import LensToken
from echo_integrations.recipe import Recipe, check_template, resolve_template
from echo_integrations.registry import registry
from echo_integrations.resolve import check_token_set, instruction_of, recipe_of, resolve
from echo_integrations.texts import checked
from echo_integrations.token_set import TokenSet

Vectors = NDArray[np.float32]
Positions = NDArray[np.int64]

_OPERATIONAL = {  # model_kwargs that do not change a vector
    *("device_map", "max_memory", "low_cpu_mem_usage", "offload_buffers", "offload_folder", "offload_state_dict"),
    *("tp_plan", "tp_size", "use_kernels", "allow_all_kernels"),
}


class Encoder(EncoderSettings):
    """Embeds texts with a causal LM; takes the arguments of `EncoderSettings`.

    Cheap to construct, picklable and safe to call from many threads: the model is loaded at the first call and
    shared by all encoders of the process that ask for the same one.

    Raises:
        pydantic.ValidationError: (a ValueError) an unknown or impossible argument.

    Example:
        >>> encoder = Encoder(model="echo-mini")
        >>> encoder.encode_document(["The valve is closed.", "Rain fell all night."]).shape
        (2, 256)

    Sources: Springer et al., "Repetition Improves Language Model Embeddings", arXiv 2402.15449; BehnamGhader et al.,
    "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
    """

    def model_post_init(self, context: Any) -> None:
        """Refuse what can be seen to be wrong without the Hub and without weights, before anything is indexed."""
        if self.mode == Mode.LLM2VEC_GEN:
            check_token_set(self)
            return
        for template, instruction in (
            (self.query_template, self.query_instruction),
            (self.document_template, self.document_instruction),
        ):
            check_template(resolve_template(template, self.mode, bos="", eos=""), instruction or "")

    @property
    def dimension(self) -> int:
        """Components of a vector; known without loading weights.

        Raises:
            InputError: ``truncate_dim`` is more than the model has.
            ModelLoadError: no such model.

        Example:
            >>> Encoder(model="echo-mini").dimension
            256
        """
        checkpoint, token_set = resolve(self)
        size = checkpoint.hidden_size if token_set is None else token_set.dimension
        if self.truncate_dim is not None and self.truncate_dim > size:
            raise InputError(f"truncate_dim={self.truncate_dim} is more than the {size} components there are")
        return self.truncate_dim or size

    @property
    def fingerprint(self) -> str:
        """Name of the vector space: 32 hexadecimal digits, the hash of `vector_space`.

        Encoders with equal fingerprints give interchangeable vectors, whatever their device and compute dtype.
        The document instruction counts in full; of the query instruction only whether there is one, because a
        query may be reworded over the same index: keep cached query vectors apart by instruction.

        Raises:
            ModelLoadError: no such model.

        Example:
            >>> Encoder(dtype="float32").fingerprint == Encoder(dtype="bfloat16").fingerprint
            True
            >>> Encoder(mode="echo").fingerprint == Encoder(mode="classical").fingerprint
            False
        """
        return hashlib.sha256(canonical_json(self.vector_space()).encode()).hexdigest()[:32]

    def vector_space(self) -> dict[str, Any]:
        """What defines the vectors, as JSON-able values; needs the model's files but loads no weights.

        Example:
            >>> Encoder(mode="classical").vector_space()["document_template"]
            '{%%text%%}'
        """
        checkpoint, token_set = resolve(self)
        query, document = (recipe_of(self, role, checkpoint, token_set) for role in (Role.QUERY, Role.DOCUMENT))
        if isinstance(query, Recipe) and isinstance(document, Recipe):
            layout = {
                "query_template": query.template,
                "document_template": document.template,
                "pooling": str(self.pooling),
            }
        else:
            layout = {"token_set": token_set.fingerprint if token_set else ""}
        return {
            "files": checkpoint.digest(),
            "model_kwargs": _without_compute_dtype(
                {name: value for name, value in self.model_kwargs.items() if name not in _OPERATIONAL}
            ),
            "mode": str(self.mode),
            **layout,
            "query_max_length": query.max_length,
            "query_instruction": bool(self.instruction(Role.QUERY)),
            "document_max_length": document.max_length,
            "document_instruction": self.instruction(Role.DOCUMENT),
            "normalize_embeddings": self.normalize_embeddings,
            "dimension": self.dimension,
        }

    def instruction(self, role: Role | str) -> str:
        """What stands before texts of a role: the setting, or in mode "llm2vec-gen" the token set's or the paper's.

        Example:
            >>> Encoder(mode="classical").instruction("query")
            ''
        """
        return instruction_of(self, Role(role))

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        role: Role | str = ...,
        instruction: str | None = ...,
        return_soft_prompts: Literal[False] = ...,
    ) -> Vectors: ...
    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        role: Role | str = ...,
        instruction: str | None = ...,
        return_soft_prompts: Literal[True],
    ) -> tuple[Vectors, Vectors]: ...
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        role: Role | str = Role.DOCUMENT,
        instruction: str | None = None,
        return_soft_prompts: bool = False,
    ) -> Vectors | tuple[Vectors, Vectors]:
        """Embed texts of either role, documents unless told otherwise.

        Args:
            texts: strings; one string alone gives one vector.
            role: ``"document"`` or ``"query"``.
            instruction: in place of the role's own; ``""`` for none.
            return_soft_prompts: whether to return, too, what `decode` reads (mode ``"llm2vec-gen"`` only).

        Returns:
            (n, D) float32 in the order of the texts, (D,) for one string; with soft prompts a pair of that and
            (n, N, H) float32, or (N, H).

        Raises:
            InputError, TruncationError, ModelLoadError, EncodingError: as `encode_document`.

        Example:
            >>> Encoder().encode(["A valve.", "A pump."]).shape
            (2, 256)
        """
        if return_soft_prompts:
            return self._encode_with_soft_prompts(texts, Role(role), instruction)
        return self._encode(texts, Role(role), instruction)

    def encode_document(self, texts: str | Iterable[str], instruction: str | None = None) -> Vectors:
        """Embed texts that are searched.

        Args:
            texts: strings; one string alone gives one vector.
            instruction: in place of ``document_instruction``; ``""`` for none.

        Returns:
            (n, D) float32 in the order of the texts; (D,) for one string.

        Raises:
            InputError: something that is no text, or an instruction for which the template has no place.
            TruncationError: a text that is too long, with ``on_truncate="error"``.
            ModelLoadError: the model cannot be loaded.
            EncodingError: the model gave NaN, or one text alone does not fit in memory.

        Example:
            >>> Encoder(mode="classical", truncate_dim=8).encode_document("A valve.").shape
            (8,)
        """
        return self._encode(texts, Role.DOCUMENT, instruction)

    def encode_query(self, texts: str | Iterable[str], instruction: str | None = None) -> Vectors:
        """Embed texts that ask; as `encode_document`, with the query template and ``query_instruction``.

        Example:
            >>> Encoder().encode_query(["how do I reset the pump?"]).shape
            (1, 256)
        """
        return self._encode(texts, Role.QUERY, instruction)

    async def aencode(
        self, texts: str | Iterable[str], *, role: Role | str = Role.DOCUMENT, instruction: str | None = None
    ) -> Vectors:
        """As `encode`, on any event loop, which stays free: calls that come at once share batches.

        A call that is cancelled gives up its place.

        Example:
            >>> import asyncio
            >>> async def ask(*questions):
            ...     return await asyncio.gather(*(Encoder().aencode(q, role="query") for q in questions))
            >>> len(asyncio.run(ask("how do I reset the pump?", "where is the valve?")))
            2
        """
        if isinstance(texts, str):
            vector: Vectors = (await self.aencode([texts], role=role, instruction=instruction))[0]
            return vector
        texts = list(checked(texts))
        call, size = await asyncio.to_thread(lambda: (Call(self, Role(role), instruction), self.dimension))
        result = np.empty((len(texts), size), dtype=np.float32)
        with self._bar(len(texts), "encode") as bar:
            async for batch in call.abatches(texts):
                result[batch.positions] = batch.vectors
                bar.update(len(batch.positions))
        return result

    async def aencode_document(self, texts: str | Iterable[str], instruction: str | None = None) -> Vectors:
        """As `encode_document`, on any event loop; see `aencode`."""
        return await self.aencode(texts, instruction=instruction)

    async def aencode_query(self, texts: str | Iterable[str], instruction: str | None = None) -> Vectors:
        """As `encode_query`, on any event loop; see `aencode`."""
        return await self.aencode(texts, role=Role.QUERY, instruction=instruction)

    def encode_iter(
        self,
        texts: Iterable[str],
        *,
        role: Role | str = Role.DOCUMENT,
        instruction: str | None = None,
        window_size: int = 8_192,
    ) -> Iterator[Vectors]:
        """Embed a stream of texts that need not fit in memory.

        Args:
            texts: any iterable of strings, consumed window by window.
            role: ``"document"`` or ``"query"``.
            instruction: in place of the role's own; ``""`` for none.
            window_size: texts that are sorted by length together, and rows of an array that is yielded.

        Yields:
            (window_size, D) float32, the last one shorter; one after the other they are in the texts' order.

        Example:
            >>> [len(rows) for rows in Encoder().encode_iter((f"line {i}" for i in range(5)), window_size=2)]
            [2, 2, 1]
        """
        if window_size < 1:
            raise InputError(f"window_size={window_size}: a window holds at least one text")
        done = 0
        for window in windows(checked(texts), window_size):
            result = np.empty((len(window), self.dimension), dtype=np.float32)
            for positions, vectors in self.encode_batches(window, role=role, instruction=instruction, first=done):
                result[positions - done] = vectors
            done += len(window)
            yield result

    def encode_batches(
        self, texts: Iterable[str], *, role: Role | str = Role.DOCUMENT, instruction: str | None = None, first: int = 0
    ) -> Iterator[tuple[Positions, Vectors]]:
        """Embed texts and hand over each batch as soon as it is done, in no particular order.

        Args:
            texts: any iterable of strings.
            role: ``"document"`` or ``"query"``.
            instruction: in place of the role's own; ``""`` for none.
            first: number of the first text, for positions and messages.

        Yields:
            (m,) positions of texts and their (m, D) vectors; every text comes exactly once.

        Example:
            >>> [(positions.tolist(), vectors.shape) for positions, vectors in Encoder().encode_batches(["a", "b"])]
            [([0, 1], (2, 256))]
        """
        for batch in Call(self, Role(role), instruction, first).batches(texts):
            yield batch.positions, batch.vectors

    def decode(
        self,
        texts: str | Iterable[str] | None = None,
        *,
        soft_prompts: Vectors | None = None,
        role: Role | str = Role.DOCUMENT,
        instruction: str | None = None,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """What embeddings say, in words: the frozen LM continues their soft prompts greedily.

        Args:
            texts: strings; or, in their place,
            soft_prompts: (n, N, H) or (N, H) that ``encode(..., return_soft_prompts=True)`` gave earlier.
            role: of the texts.
            instruction: in place of the role's own; ``""`` for none.
            max_new_tokens: bound on the tokens of an answer; it may end earlier by itself.

        Returns:
            One string a text, in order.

        Raises:
            InputError: not mode ``"llm2vec-gen"``, or soft prompts of another shape.
            ModelLoadError: the checkpoint has no LM head.

        Example:
            >>> encoder = Encoder(mode="llm2vec-gen")
            >>> answers = encoder.decode(["how do I reset the pump?"], role="query", max_new_tokens=16)
            >>> vectors, soft_prompts = encoder.encode(["how do I reset the pump?"], return_soft_prompts=True)
            >>> len(encoder.decode(soft_prompts=soft_prompts, max_new_tokens=16))
            1
        """
        if (texts is None) == (soft_prompts is None):
            raise InputError("decode takes either texts or soft_prompts=")
        backbone, _ = self._backbone_of_token_set("decode")
        backbone.causal_lm()
        if texts is not None:
            listed = [texts] if isinstance(texts, str) else texts
            soft_prompts = self._encode_with_soft_prompts(listed, Role(role), instruction)[1]
        return reading.decode(backbone, np.asarray(soft_prompts), max_new_tokens, self.token_budget, self._bar)

    def explain(
        self,
        texts: str | Iterable[str],
        *,
        top_k: int = 5,
        role: Role | str = Role.DOCUMENT,
        instruction: str | None = None,
    ) -> list[list[list[LensToken]]]:
        """The logit lens: what the LM head makes of the compression tokens' hidden states.

        Args:
            texts: strings.
            top_k: tokens a position.
            role: of the texts.
            instruction: in place of the role's own; ``""`` for none.

        Returns:
            For each text, for each of the N compression tokens, the likeliest next tokens, likeliest first.

        Raises:
            InputError: not mode ``"llm2vec-gen"``, or ``top_k`` below 1.
            ModelLoadError: the checkpoint has no LM head.

        Example:
            >>> lens = Encoder(mode="llm2vec-gen").explain("how do I reset the pump?", top_k=3)
            >>> len(lens), len(lens[0]), len(lens[0][0])
            (1, 10, 3)
        """
        if top_k < 1:
            raise InputError(f"top_k={top_k}: ask for at least one token")
        backbone, _ = self._backbone_of_token_set("explain")
        backbone.causal_lm()
        listed = list(checked([texts] if isinstance(texts, str) else texts))
        lens: list[list[list[LensToken]]] = [[]] * len(listed)
        for batch in Call(self, Role(role), instruction).batches(listed):
            assert batch.states is not None
            for position, tokens in zip(batch.positions, reading.explain(backbone, batch.states, top_k), strict=True):
                lens[position] = tokens
        return lens

    def unload(self) -> None:
        """Let go of the model; it leaves memory when no other encoder in use holds it, and comes back at need.

        Example:
            >>> encoder = Encoder()
            >>> vector = encoder.encode("a")
            >>> encoder.unload()
        """
        registry.release(self)

    def _encode(self, texts: str | Iterable[str], role: Role, instruction: str | None) -> Vectors:
        if isinstance(texts, str):
            vector: Vectors = self._encode([texts], role, instruction)[0]
            return vector
        texts = list(checked(texts))
        result = np.empty((len(texts), self.dimension), dtype=np.float32)
        with self._bar(len(texts), "encode") as bar:
            for positions, vectors in self.encode_batches(texts, role=role, instruction=instruction):
                result[positions] = vectors
                bar.update(len(positions))
        return result

    def _encode_with_soft_prompts(
        self, texts: str | Iterable[str], role: Role, instruction: str | None
    ) -> tuple[Vectors, Vectors]:
        """(n, D) vectors and (n, N, H) soft prompts."""
        if isinstance(texts, str):
            vectors, soft_prompts = self._encode_with_soft_prompts([texts], role, instruction)
            return vectors[0], soft_prompts[0]
        backbone, token_set = self._backbone_of_token_set("return_soft_prompts=True")
        texts = list(checked(texts))
        result = np.empty((len(texts), self.dimension), dtype=np.float32)
        soft = np.empty((len(texts), token_set.compression, token_set.hidden_size), dtype=np.float32)
        with self._bar(len(texts), "encode") as bar:
            for batch in Call(self, role, instruction).batches(texts):
                assert batch.states is not None
                result[batch.positions] = batch.vectors
                soft[batch.positions] = reading.soft_prompts(backbone, token_set, batch.states)
                bar.update(len(batch.positions))
        return result, soft

    def _bar(self, total: int, what: str) -> Any:
        """A progress bar as ``show_progress`` has it."""
        quiet = True if self.show_progress is False else None if self.show_progress is None else False
        return tqdm(total=total, desc=what, unit="text", disable=quiet, delay=2 if self.show_progress is None else 0)

    def _backbone_of_token_set(self, what: str) -> tuple[Backbone, TokenSet]:
        checkpoint, token_set = resolve(self)
        if token_set is None:
            raise InputError(f"{what} needs mode='llm2vec-gen', the mode is {str(self.mode)!r}")
        return registry.acquire(BackboneSpec.of(self, checkpoint, token_set), self), token_set


def _without_compute_dtype(value: Any) -> Any:
    """A value as JSON would have it, less what a quantisation's configuration says of compute dtypes."""
    plain = json.loads(canonical_json(value))
    if not isinstance(plain, dict):
        return plain
    return {name: _without_compute_dtype(inner) for name, inner in plain.items() if "compute_dtype" not in name}
