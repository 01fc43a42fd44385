"""`Encoder`: from texts to vectors, in the caller's order.

The path of a text: ``Recipe.render`` lays it out, ``batching.plan`` groups it with texts of similar length,
``Backbone.hidden_states`` runs the model, ``pooling.pool`` takes the marked positions, `Encoder._finish` cuts and
normalises. This module knows nothing of frameworks.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from echo_integrations.backbone import Backbone, BackboneSpec, is_out_of_memory, registry
from echo_integrations.batching import distinct, plan, slices, windows
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import (
    EncoderSettings,
    EncodingError,
    InputError,
    OnTruncate,
    Role,
    TruncationError,
    TruncationWarning,
    canonical_json,
)
from echo_integrations.pooling import pool
from echo_integrations.recipe import Recipe, Rendered, check_template, resolve_template

Vectors = NDArray[np.float32]
Positions = NDArray[np.int64]

_WINDOW = 65_536  # texts that are sorted together, unless their characters come to more than
_WINDOW_CHARACTERS = 33_554_432
_SLICE_TEXTS = 4_096  # texts that are tokenised while the ones before them are in the model
_SLICE_CHARACTERS = 524_288
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

    Source: Springer et al., "Repetition Improves Language Model Embeddings", arXiv 2402.15449.
    """

    def model_post_init(self, context: Any) -> None:
        """Refuse a malformed template, or an instruction that has no place, before anything is indexed."""
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
        size = self._checkpoint().hidden_size
        if self.truncate_dim is not None and self.truncate_dim > size:
            raise InputError(f"truncate_dim={self.truncate_dim} is more than the {size} components of the model")
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
        query, document = self._recipe(Role.QUERY), self._recipe(Role.DOCUMENT)
        return {
            "files": self._checkpoint().digest(),
            "model_kwargs": _without_compute_dtype(
                {name: value for name, value in self.model_kwargs.items() if name not in _OPERATIONAL}
            ),
            "mode": str(self.mode),
            "query_template": query.template,
            "query_max_length": query.max_length,
            "query_instruction": bool(self.query_instruction),
            "document_template": document.template,
            "document_max_length": document.max_length,
            "document_instruction": self.document_instruction or "",
            "pooling": str(self.pooling),
            "normalize_embeddings": self.normalize_embeddings,
            "dimension": self.dimension,
        }

    def encode(self, texts: str | Iterable[str]) -> Vectors:
        """Embed documents: `encode_document` without a choice of instruction.

        Example:
            >>> Encoder().encode(["A valve.", "A pump."]).shape
            (2, 256)
        """
        return self.encode_document(texts)

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
        for window in windows(_checked(texts), window_size):
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
        role = Role(role)
        if instruction is None:
            instruction = (self.query_instruction if role is Role.QUERY else self.document_instruction) or ""
        instruction = next(_checked([instruction], "instruction"))
        recipe = self._recipe(role)
        report = _TruncationReport(self.on_truncate, self.max_length, recipe.max_length)
        report.check("the instruction", recipe.instruction_length(instruction))
        backbone = None
        for window in windows(_checked(texts, first=first), _WINDOW, weight=len, most=_WINDOW_CHARACTERS):
            places = {text: [first + i for i in indices] for text, indices in distinct(window).items()}
            first += len(window)
            for rendered, owners in _render_ahead(recipe, places, instruction):
                for item, indices in zip(rendered, owners, strict=True):
                    report.check(f"texts[{indices[0]}]", item.length)
                backbone = backbone or registry.acquire(BackboneSpec.of(self, self._checkpoint()), self)
                for batch, vectors in self._run(backbone, rendered, owners):
                    repeats = [len(owners[i]) for i in batch]
                    yield np.concatenate([owners[i] for i in batch]), np.repeat(vectors, repeats, axis=0)

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
        texts = list(_checked(texts))
        result = np.empty((len(texts), self.dimension), dtype=np.float32)
        quiet = True if self.show_progress is False else None if self.show_progress is None else False
        delay = 2 if self.show_progress is None else 0
        with tqdm(total=len(texts), desc="encode", unit="text", disable=quiet, delay=delay) as bar:
            for positions, vectors in self.encode_batches(texts, role=role, instruction=instruction):
                result[positions] = vectors
                bar.update(len(positions))
        return result

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint.find(self)

    def _recipe(self, role: Role) -> Recipe:
        setting = self.query_template if role is Role.QUERY else self.document_template
        checkpoint = self._checkpoint()
        tokenizer = checkpoint.tokenizer
        template = resolve_template(setting, self.mode, tokenizer.bos, tokenizer.eos)
        return Recipe(template, tokenizer, self.max_length, checkpoint.positions)

    def _run(
        self, backbone: Backbone, rendered: Sequence[Rendered], owners: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], Vectors]]:
        """Vectors of laid-out texts, batch by batch; when memory runs out, with half the budget."""
        budget = min(self.token_budget or backbone.token_budget, backbone.memory_limit)
        queue = deque(plan([len(r.ids) for r in rendered], budget))
        while queue:
            batch = queue.popleft()
            try:
                vectors = self._forward(backbone, [rendered[i] for i in batch])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                size = len(rendered[batch[0]].ids)
                if len(batch) == 1:
                    raise EncodingError(
                        f"texts[{owners[batch[0]][0]}] alone, {size} tokens with its template, does not fit into the "
                        f"memory of {backbone.device}: lower max_length, or choose a smaller model or dtype"
                    ) from error
                backbone.memory_limit = min(backbone.memory_limit, size * len(batch) // 2)
                vectors = None
            if vectors is None:  # outside the except block, where the failed pass still holds its memory
                if backbone.device.type == "cuda":
                    torch.cuda.empty_cache()
                left = [i for b in (batch, *queue) for i in b]
                batches = plan([len(rendered[i].ids) for i in left], backbone.memory_limit)
                queue = deque([left[i] for i in batch] for batch in batches)
                budget = backbone.memory_limit
                continue
            yield batch, self._finish(vectors, [owners[i][0] for i in batch])

    def _forward(self, backbone: Backbone, batch: Sequence[Rendered]) -> Vectors:
        """(B, H) pooled hidden states of one batch."""
        with backbone.lock, torch.inference_mode():
            hidden = backbone.hidden_states([r.ids for r in batch])  # (B, T, H)
            vectors: Vectors = pool(hidden, [r.spans for r in batch], self.pooling).cpu().numpy()
        return vectors

    def _finish(self, vectors: Vectors, owners: Sequence[int]) -> Vectors:
        """(B, D): cut, normalised, and free of anything that is no number."""
        vectors = vectors[:, : self.dimension]
        sizes = np.linalg.norm(vectors, axis=1)
        usable = np.isfinite(sizes) & (sizes > 0)
        if not usable.all():
            bad = int(np.argmin(usable))
            raise EncodingError(
                f"the model gave {'a zero vector' if sizes[bad] == 0 else 'NaN or infinity'} for texts[{owners[bad]}]: "
                "try dtype='float32'; if that does not help, the weights are damaged"
            )
        return vectors / sizes[:, None] if self.normalize_embeddings else vectors


def _without_compute_dtype(value: Any) -> Any:
    """A value as JSON would have it, less what a quantisation's configuration says of compute dtypes."""
    plain = json.loads(canonical_json(value))
    if not isinstance(plain, dict):
        return plain
    return {name: _without_compute_dtype(inner) for name, inner in plain.items() if "compute_dtype" not in name}


class _TruncationReport:
    """Says once a call that texts were cut, or refuses them."""

    def __init__(self, on_truncate: str, wanted: int, max_length: int) -> None:
        self._on_truncate = OnTruncate(on_truncate)
        self._max_length = max_length
        self._bound = f"max_length={max_length}" if wanted == max_length else f"the {max_length} that the model allows"
        self._remedy = "split it, raise max_length," if wanted == max_length else "split it"

    def check(self, item: str, length: int) -> None:
        if length <= self._max_length or self._on_truncate == OnTruncate.TRUNCATE:
            return
        what = f"{item} has {length} tokens, more than {self._bound}"
        if self._on_truncate == OnTruncate.ERROR:
            raise TruncationError(f"{what}: {self._remedy} or pass on_truncate='truncate'")
        warnings.warn(
            f"{what}: it was cut, and so is every longer text of this call; {self._remedy} "
            "or pass on_truncate='truncate' to cut without this warning",
            TruncationWarning,
            stacklevel=_callers_level(),
        )
        self._on_truncate = OnTruncate.TRUNCATE


def _callers_level() -> int:
    """The ``stacklevel`` that points at whoever called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith("echo_integrations"):
        level, frame = level + 1, frame.f_back
    return level


def _render_ahead(
    recipe: Recipe, places: Mapping[str, list[int]], instruction: str
) -> Iterator[tuple[list[Rendered], list[list[int]]]]:
    """Lay out texts slice by slice, the next slice in a thread while the caller works on the one before it."""
    runs = list(slices(places, _SLICE_CHARACTERS, _SLICE_TEXTS))
    if len(runs) == 1:
        yield recipe.render(runs[0], instruction), [places[text] for text in runs[0]]
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as ahead:
        coming = ahead.submit(recipe.render, runs[0], instruction)
        for run, following in zip(runs, [*runs[1:], None], strict=True):
            rendered = coming.result()
            if following is not None:
                coming = ahead.submit(recipe.render, following, instruction)
            yield rendered, [places[text] for text in run]


def _checked(texts: Iterable[Any], name: str = "texts", first: int = 0) -> Iterator[str]:
    """The texts, each seen to be one.

    Raises:
        InputError: something that is no text, with its index and what to do.
    """
    if isinstance(texts, str | bytes | bytearray | Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise InputError(f"{name} is {_kind(texts)}: pass a list of strings")
    return _each_checked(texts, name, first)


def _each_checked(texts: Iterable[Any], name: str, first: int) -> Iterator[str]:
    for index, text in enumerate(texts, start=first):
        item = name if name == "instruction" else f"{name}[{index}]"
        if not isinstance(text, str):
            raise InputError(f"{item} is {_kind(text)}, not a string: leave it out or convert it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{item} has a lone surrogate, {text[error.start]!r}, at character {error.start}: it is no valid text; "
                "replace it with text.encode('utf-8', 'replace').decode()"
            ) from error
        yield text


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
