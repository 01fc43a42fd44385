"""How an LLM answers queries: the backbone's own causal LM in batches, or a LangChain model. Knows nothing of files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from echo_integrations.backbone import GREEDY, Backbone, BackboneSpec, end_of_sequence
from echo_integrations.batching import plan
from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import EncodingError, InputError, ModelLoadError, TruncationWarning
from echo_integrations.device import is_out_of_memory
from echo_integrations.encoder import Encoder
from echo_integrations.registry import registry
from echo_integrations.resolve import resolve
from echo_integrations.tokenizer import TextTokenizer

Ids = NDArray[np.int32]
Answer = str | Exception

_TOKEN_BUDGET = 16_384  # on a CPU; generating reads all weights for every token, so more rows cost little
_PLACE = "\ue000\ue001\ue002"  # stands for the query in a chat template


@dataclass(frozen=True)
class Sampling:
    """How the backbone's own LM answers.

    Attributes:
        max_new_tokens: bound on the tokens of an answer.
        max_query_length: tokens of a query that are used, the chat template not counted.
        temperature: 0 takes the likeliest token; above it tokens are drawn.
        seed: of drawing; what is drawn for a query depends on nothing but seed, query and model.
    """

    max_new_tokens: int = 500
    max_query_length: int = 1024
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is impossible.

        Raises:
            InputError: a bound below 1, or a negative temperature.
        """
        for name in ("max_new_tokens", "max_query_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: allow at least one token")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: 0 is greedy, above it tokens are drawn")


class Answerer(Protocol):
    """Something that answers queries."""

    def identity(self) -> dict[str, Any]:
        """What tells it from others, as JSON has it; ``"model"`` is for people."""
        ...

    def answers(self, queries: Sequence[str]) -> Iterator[list[tuple[str, Answer]]]:
        """The queries in batches, each with its answer or what went wrong with it, in the order in which they end."""
        ...


class OwnLM:
    """The causal LM that an encoder's backbone is part of.

    Args:
        encoder: names the model; its token set, if it has one, plays no part.
        sampling: how to answer.
        token_budget: prompt and answer tokens in one batch; chosen for the device unless given.

    Raises:
        ModelLoadError: the model cannot be loaded, has no LM head, or its chat template cannot be used.
        InputError: there is no room for a query beside the answer.
    """

    def __init__(self, encoder: Encoder, sampling: Sampling, token_budget: int | None = None) -> None:
        self._sampling = sampling
        self._checkpoint, _ = resolve(encoder)
        self._prompts = Prompts(self._checkpoint, sampling)
        self._encoder = encoder  # counts as a user of the backbone for as long as it lives
        self._token_budget = token_budget or encoder.token_budget

    def identity(self) -> dict[str, Any]:
        """The weights and vocabulary, and all that an answer depends on."""
        return {"model": self._checkpoint.name, **self._checkpoint.identity(), **vars(self._sampling)}

    def answers(self, queries: Sequence[str]) -> Iterator[list[tuple[str, Answer]]]:
        """Answer in batches of similar length, the longest first; less at a time when memory runs out.

        Raises:
            EncodingError: one query alone does not fit in memory.
        """
        backbone = registry.acquire(BackboneSpec.of(self._encoder, self._checkpoint), self._encoder)
        if backbone.lm is None:
            raise ModelLoadError(
                f"the checkpoint in {self._checkpoint.folder} has no LM head, so it embeds but cannot answer: "
                "use the causal LM's own checkpoint, or a LangChain chat model"
            )
        prompts = self._prompts.ids(queries)
        sizes = [len(prompt) + self._sampling.max_new_tokens for prompt in prompts]
        budget = self._token_budget or max(backbone.token_budget, _TOKEN_BUDGET)
        batches = plan(sizes, budget)[::-1]
        while batches:
            batch = batches.pop()
            try:
                rows = self._generate(backbone, [prompts[i] for i in batch], [queries[i] for i in batch])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise EncodingError(
                        f"the query {queries[batch[0]][:60]!r} alone, {len(prompts[batch[0]])} tokens with its "
                        f"template, does not fit into the memory of {backbone.device} with {sizes[batch[0]]} in all: "
                        "lower max_new_tokens or max_query_length"
                    ) from error
                rows = None
            if rows is None:  # outside the except block, where the failed pass still holds its memory
                if backbone.device.type == "cuda":
                    torch.cuda.empty_cache()
                half = len(batch) // 2
                batches += [batch[half:], batch[:half]]
                continue
            yield [
                (queries[i], self._checkpoint.tokenizer.decode(row).strip()) for i, row in zip(batch, rows, strict=True)
            ]

    def _generate(self, backbone: Backbone, prompts: Sequence[Ids], queries: Sequence[str]) -> list[list[int]]:
        """New token ids for each prompt, without the end-of-sequence token; padded on the left meanwhile."""
        lm = backbone.lm
        end = end_of_sequence(lm, self._checkpoint.tokenizer.eos_id)
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), dtype=np.int64)  # (B, T)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            **GREEDY,
            max_new_tokens=self._sampling.max_new_tokens,
            eos_token_id=end or None,
            pad_token_id=end[0] if end else 0,
        )
        processors = LogitsProcessorList()
        if self._sampling.temperature:
            processors.append(Draw(self._sampling.temperature, self._sampling.seed, queries, backbone.device))
        out = backbone.worker.call(
            partial(
                torch.inference_mode()(lm.generate),
                input_ids=torch.from_numpy(ids).to(backbone.device),
                attention_mask=torch.from_numpy(mask).to(backbone.device),
                generation_config=config,
                logits_processor=processors,
            )
        )
        new = out[:, longest:].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in end), len(row))] for row in new]


class Prompts:
    """Queries as the model wants to be asked: in its chat template, thinking switched off, or as they are.

    A query is data: special tokens spelled in it are plain characters, and one that is too long is cut before it
    enters the template.
    """

    def __init__(self, checkpoint: Checkpoint, sampling: Sampling) -> None:
        self._tokenizer: TextTokenizer = checkpoint.tokenizer
        self._chat = _chat_template(checkpoint)
        if self._chat is None:
            self._before, self._after = self._tokenizer.prefix, self._tokenizer.literal("")[:0]
        else:
            before, found, after = self._render(_PLACE).partition(_PLACE)
            if not found or _PLACE in after:
                raise ModelLoadError(f"the chat template of {checkpoint.folder} does not hold a message exactly once")
            self._before, self._after = self._tokenizer.literal(before), self._tokenizer.literal(after)
        self.limit = sampling.max_query_length
        if checkpoint.positions is not None:
            around = len(self._before) + len(self._after)
            self.limit = min(self.limit, checkpoint.positions - sampling.max_new_tokens - around)
            if self.limit < 1:
                raise InputError(
                    f"max_new_tokens={sampling.max_new_tokens} and {around} tokens of template leave no room for a "
                    f"query among the {checkpoint.positions} positions of {checkpoint.name!r}: lower max_new_tokens"
                )

    def ids(self, queries: Sequence[str]) -> list[Ids]:
        """Token ids of each prompt; one `TruncationWarning` counts the queries that were cut."""
        bare = [query.strip() for query in queries]
        plain = self._tokenizer.plain(bare)
        cut = [query for query, ids in zip(bare, plain, strict=True) if len(ids) > self.limit]
        if cut:
            warnings.warn(
                f"{len(cut)} queries are longer than {self.limit} tokens and were cut, the first is {cut[0][:60]!r}",
                TruncationWarning,
                stacklevel=2,
            )
        return [self._whole(query, ids) for query, ids in zip(bare, plain, strict=True)]

    def _whole(self, query: str, plain: Ids) -> Ids:
        spelled = any(special for _, special in self._tokenizer.split_special(query))
        if self._chat is not None and not spelled and len(plain) <= self.limit:
            return self._tokenizer.literal(self._render(query))
        return np.concatenate([self._before, plain[: self.limit], self._after])

    def _render(self, query: str) -> str:
        text: str = self._chat.apply_chat_template(
            [{"role": "user", "content": query}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # Qwen3's word for it
            thinking=False,  # DeepSeek's and Granite's
        )
        return text


class Draw(LogitsProcessor):
    """Turns taking the likeliest token into drawing one at a temperature.

    Adding Gumbel noise to the logits and taking the largest draws from their softmax. Each row has a generator of its
    own, so what is drawn for a query does not depend on its batch, and no global state is touched.
    """

    def __init__(self, temperature: float, seed: int, queries: Sequence[str], device: torch.device) -> None:
        self._temperature = temperature
        self._generators = []
        for query in queries:
            digest = hashlib.sha256(f"{seed}\n{query}".encode()).digest()
            self._generators.append(torch.Generator(device).manual_seed(int.from_bytes(digest[:7])))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits -> (B, V)."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.log()


class LangChainLM:
    """A chat model, LLM or chain of LangChain: anything with ``batch`` that takes a string.

    Args:
        runnable: it.
        batch_size: queries that are asked, and answers that are written, together.
    """

    def __init__(self, runnable: Any, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: ask at least one query at a time")
        self._runnable = runnable
        self._batch_size = batch_size

    def identity(self) -> dict[str, Any]:
        """Its class, and the model and settings that LangChain's classes usually have."""
        kind = f"{type(self._runnable).__module__}.{type(self._runnable).__qualname__}"
        names = ("model_name", "model", "model_id", "deployment_name", "temperature", "max_tokens", "seed", "name")
        settings = {name: getattr(self._runnable, name, None) for name in names}
        plain = {name: value for name, value in settings.items() if isinstance(value, str | int | float)}
        return {"model": plain.get("model_name") or plain.get("model") or kind, "class": kind, "settings": plain}

    def answers(self, queries: Sequence[str]) -> Iterator[list[tuple[str, Answer]]]:
        """Ask in batches; an error for one query is that query's answer."""
        for start in range(0, len(queries), self._batch_size):
            batch = list(queries[start : start + self._batch_size])
            results = self._runnable.batch([query.strip() for query in batch], return_exceptions=True)
            yield [(query, _answer(result)) for query, result in zip(batch, results, strict=True)]


def _answer(result: Any) -> Answer:
    """The text of what a LangChain model returned."""
    if isinstance(result, Exception):
        return result
    text = result if isinstance(result, str) else getattr(result, "text", None)
    text = text() if callable(text) and not isinstance(text, str) else text
    if not isinstance(text, str):
        return InputError(f"the model returned a {type(result).__name__}, not text: end the chain in a StrOutputParser")
    return str(text).encode("utf-8", "replace").decode().strip()


def _chat_template(checkpoint: Checkpoint) -> Any:
    """A tokenizer for nothing but its chat template, or None where it has none."""
    hf = AutoTokenizer.from_pretrained(
        str(checkpoint.folder), trust_remote_code=checkpoint.trust_remote_code, local_files_only=True
    )
    return hf if hf.chat_template else None
