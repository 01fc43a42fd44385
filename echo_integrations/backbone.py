"""The model itself, loaded and run.

The only module that runs a model. It knows nothing of texts, templates or vector spaces.
"""

from __future__ import annotations

import logging
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import EncoderSettings, EncodingError, ModelLoadError, TokenSetError, canonical_json
from echo_integrations.device import Arriving, advice_after_fork, choose_device, choose_dtype, is_forked, send
from echo_integrations.prefix import Prefix, can_share
from echo_integrations.token_set import TokenSet
from echo_integrations.worker import Worker

logger = logging.getLogger(__name__)

Ids = NDArray[np.int32]

_CPU_TOKEN_BUDGET = 2048
_GPU_TOKEN_BUDGET = 32768
_PREFIXES = 8  # that are kept
# said in full, because what is left out would be taken from the model's own generation settings
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
GREEDY |= {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass(frozen=True)
class BackboneSpec:
    """What makes two requests for a backbone the same: files (by size and time), placement and precision."""

    checkpoint: Checkpoint
    signature: tuple[tuple[str, int, int], ...]
    device: str
    dtype: str
    attn_implementation: str | None
    model_kwargs_key: str
    model_kwargs: Mapping[str, Any] = field(compare=False)
    compile: bool = False
    adapted_by: str | None = None
    token_set: TokenSet | None = field(default=None, compare=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @staticmethod
    def of(settings: EncoderSettings, checkpoint: Checkpoint, token_set: TokenSet | None = None) -> BackboneSpec:
        """The backbone that settings ask for, with device and dtype decided.

        A token set changes the backbone only if it has an adapter of its own (LoRA); all others share one.
        """
        adapted = token_set is not None and token_set.lora_config is not None
        device = choose_device(settings.device)
        return BackboneSpec(
            checkpoint=checkpoint,
            signature=checkpoint.signature,
            device=str(device),
            dtype=str(choose_dtype(settings.dtype, device)).removeprefix("torch."),
            attn_implementation=settings.attn_implementation,
            model_kwargs_key=canonical_json(settings.model_kwargs),
            model_kwargs=settings.model_kwargs,
            compile=settings.compile,
            adapted_by=token_set.fingerprint if adapted and token_set else None,
            token_set=token_set if adapted else None,
        )


@dataclass(frozen=True, eq=False)
class Head:
    """A token set on a backbone's device.

    Attributes:
        rows: (M, H) what stands in for the embeddings of the trained tokens, in the model's dtype.
        maps: the two linear maps in float32, by their names in `TokenSet`.
    """

    rows: Tensor
    maps: Mapping[str, Tensor]

    def reconstruct(self, states: Tensor) -> Tensor:
        """(..., H) hidden states of compression tokens -> (..., H) soft prompt vectors."""
        return torch.nn.functional.linear(
            states.float(), self.maps["reconstruction.weight"], self.maps["reconstruction.bias"]
        )

    def embed(self, pooled: Tensor) -> Tensor:
        """(B, H) means over the compression tokens -> (B, D); both maps are linear, so each is applied once."""
        return torch.nn.functional.linear(
            self.reconstruct(pooled), self.maps["alignment.weight"], self.maps["alignment.bias"]
        )


class Backbone:
    """A loaded causal LM: its base model embeds, and the same weights answer.

    Attributes:
        spec: what it was loaded for.
        model: the base model, which gives hidden states; with the adapter of a token set, if the spec has one.
        lm: the causal LM around it, or None where the checkpoint has no LM head.
        device: where its inputs go.
        token_budget: tokens in one forward pass that suit the device.
        memory_limit: tokens that one forward pass may hold; lowered for good when memory runs out.
        worker: the thread that runs it, so that concurrent calls share batches and never add up their memory.
        under_way: vectors of the last pass, which the device may still be at work on.
        shares_prefixes: whether `hidden_states` can take tokens that all rows begin with from memory.
    """

    def __init__(self, spec: BackboneSpec, model: Any, lm: Any = None) -> None:
        self.spec = spec
        self.model = model
        self.lm = lm
        self._run = _compiled(model) if spec.compile else model
        self._embedding = model.get_input_embeddings()
        self.device: torch.device = self._embedding.weight.device
        self.token_budget = _CPU_TOKEN_BUDGET if self.device.type == "cpu" else _GPU_TOKEN_BUDGET
        self.memory_limit = sys.maxsize
        self.worker = Worker("forward")
        self.under_way: Arriving | None = None
        self.shares_prefixes = can_share(spec.checkpoint.config) and not spec.checkpoint.trust_remote_code
        self._prefixes: OrderedDict[bytes, Prefix] = OrderedDict()
        self._vocabulary: int = self._embedding.weight.shape[0]
        self._heads: weakref.WeakKeyDictionary[TokenSet, Head] = weakref.WeakKeyDictionary()

    def hidden_states(
        self, rows: Sequence[Ids], token_sets: Sequence[TokenSet | None] | None = None, shared: int = 0
    ) -> Tensor:
        """Run the model on token ids, each row followed by the trained vectors of its token set, if it has one.

        Rows are padded on the right and no mask is passed: attention is causal, so no position sees the padding
        behind it, and a row's hidden states do not depend on its neighbours or on their token sets.

        Args:
            rows: for each text its (T_i,) token ids.
            token_sets: for each text its token set or None; None for none at all.
            shared: how many tokens all rows begin with that need not be computed for each; their hidden states are
                not returned, and their keys and values are kept for the next batch.

        Returns:
            (B, T - shared, H) last hidden states, after the final norm; rows shorter than T end in meaningless ones.
        """
        token_sets = token_sets or [None] * len(rows)
        heads = [None if tokens is None else self.head(tokens) for tokens in token_sets]
        cache = self._prefix(rows[0][:shared]) if shared else None
        rows = [ids[shared:] for ids in rows]
        sizes = [len(ids) + (0 if head is None else len(head.rows)) for ids, head in zip(rows, heads, strict=True)]
        ids = np.zeros((len(rows), max(sizes)), dtype=np.int64)  # (B, T - shared)
        for row, row_ids in zip(ids, rows, strict=True):
            row[: len(row_ids)] = row_ids
        input_ids = self._on_device(ids)
        inputs: dict[str, Tensor] = {"input_ids": input_ids}
        if used := {head for head in heads if head is not None}:
            embeddings = self._embedding(input_ids)  # (B, T - shared, H)
            for head in used:
                owners = [row for row, own in enumerate(heads) if own is head]
                starts = send(torch.tensor([len(rows[row]) for row in owners]), self.device)
                places = starts[:, None] + torch.arange(len(head.rows), device=self.device)  # (b, M)
                embeddings[send(torch.tensor(owners), self.device)[:, None], places] = head.rows
            inputs = {"inputs_embeds": embeddings}
        hidden: Tensor = self._run(**inputs, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        return hidden

    def _prefix(self, ids: Ids) -> Prefix:
        """Keys and values of tokens that texts begin with; those of the last few are kept."""
        key = ids.tobytes()
        prefix = self._prefixes.pop(key, None) or Prefix.of(self.model, self._on_device(ids[None].astype(np.int64)))
        self._prefixes[key] = prefix
        if len(self._prefixes) > _PREFIXES:
            self._prefixes.popitem(last=False)
        return prefix

    def _on_device(self, ids: NDArray[np.int64]) -> Tensor:
        """Token ids, each seen to have an embedding."""
        if ids.max() >= self._vocabulary:
            raise EncodingError(
                f"the tokenizer of {self.spec.checkpoint.name!r} gave token {ids.max()}, its model has only "
                f"{self._vocabulary} embedding rows: the two do not belong together"
            )
        return send(torch.from_numpy(ids), self.device)

    def head(self, token_set: TokenSet) -> Head:
        """A token set's tensors on this backbone's device; copied there once, while somebody holds the set."""
        head = self._heads.get(token_set)
        if head is None:
            weight = self._embedding.weight
            if token_set.hidden_size != weight.shape[1]:
                raise TokenSetError(f"rows of {token_set.hidden_size} components among embeddings of {weight.shape[1]}")
            rows = token_set.rows.to(self.device) * getattr(self._embedding, "embed_scale", 1.0)  # Gemma 3 scales them
            head = Head(
                rows.to(self.spec.torch_dtype), {k: v.to(self.device).float() for k, v in token_set.maps.items()}
            )
            self._heads[token_set] = head
        return head

    def causal_lm(self) -> Any:
        """The causal LM, whose base model `model` is.

        Raises:
            ModelLoadError: the checkpoint has no LM head.
        """
        if self.lm is None:
            raise ModelLoadError(
                f"the checkpoint in {self.spec.checkpoint.folder} has no LM head, so it embeds but cannot answer: "
                "use the causal LM's own checkpoint"
            )
        return self.lm

    @torch.inference_mode()
    def generate(self, soft_prompts: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Continue soft prompts greedily with the plain LM, all at once, with a key-value cache.

        Args:
            soft_prompts: (B, N, H) input vectors.
            max_new_tokens: bound on the tokens of an answer.

        Returns:
            For each prompt its new token ids, without the end-of-sequence token that ended it.

        Raises:
            ModelLoadError: the checkpoint has no LM head.
        """
        lm = self.causal_lm()
        end = end_of_sequence(lm, self.spec.checkpoint.tokenizer.eos_id)
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            **GREEDY,
            max_new_tokens=max_new_tokens,
            eos_token_id=end or None,
            pad_token_id=end[0] if end else 0,
        )
        prompts = soft_prompts.to(self.device, self.spec.torch_dtype)
        mask = torch.ones(prompts.shape[:2], dtype=torch.long, device=self.device)
        with self._plain_lm():
            out = lm.generate(inputs_embeds=prompts, attention_mask=mask, generation_config=config)
        answers = []
        for row in out.tolist():
            stop = next((i for i, token in enumerate(row) if token in end), len(row))
            answers.append(row[:stop])
        return answers

    @torch.inference_mode()
    def next_tokens(self, states: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The LM head on hidden states: (..., H) -> (..., K) probabilities and token ids, the likeliest first.

        Raises:
            ModelLoadError: the checkpoint has no LM head.
        """
        probabilities = self.logits(states.to(self.spec.torch_dtype)).softmax(dim=-1)  # (..., V)
        top: tuple[Tensor, Tensor] = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
        return top

    def logits(self, states: Tensor) -> Tensor:
        """The LM head as the model applies it, scaled and capped: (..., H) hidden states -> (..., V) in float32.

        Raises:
            ModelLoadError: the checkpoint has no LM head.
        """
        logits: Tensor = self.causal_lm().get_output_embeddings()(states).float()
        config = self.spec.checkpoint.config
        scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
        if scale != 1:
            logits = logits * scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits

    @contextmanager
    def _plain_lm(self) -> Iterator[None]:
        """Meanwhile a token set's adapter is out of the way."""
        with self.model.disable_adapter() if self.spec.token_set is not None else nullcontext():
            yield


def load(spec: BackboneSpec) -> Backbone:
    """Load a model, add its adapters, and check that it can serve: whole, and causal.

    It is loaded as a causal LM; a checkpoint that was saved without its LM head, or a model of a kind that has none,
    still embeds.

    Raises:
        ModelLoadError: it cannot be loaded, weights are missing, or it is not a causal LM.
    """
    if is_forked():
        torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here; waiting for them never ends
    config = spec.checkpoint.config
    kwargs: dict[str, Any] = {"device_map": {"": spec.device}, **spec.model_kwargs}
    if spec.attn_implementation is not None:
        kwargs["attn_implementation"] = spec.attn_implementation
    try:
        with _quiet_transformers():
            lm, report = _auto_class(config).from_pretrained(
                str(spec.checkpoint.folder),
                dtype=spec.torch_dtype,
                trust_remote_code=spec.checkpoint.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **kwargs,
            )
    except Exception as error:  # whatever a model's own code, safetensors or the GPU driver raises
        raise ModelLoadError(
            f"the model in {spec.checkpoint.folder} cannot be loaded on {spec.device} "
            f"({type(error).__name__}: {error}); unless that says what to do, "
            "check that the weights were downloaded whole" + advice_after_fork()
        ) from error
    lm.eval().requires_grad_(False)
    model = lm.base_model
    hidden = _probe(model)  # (2, 4, H)
    if not hidden.isfinite().all():
        raise ModelLoadError(
            f"the model in {spec.checkpoint.folder} gives NaN or infinity in {spec.dtype}: its weights are damaged, "
            "or the dtype is too narrow (try 'float32')"
        )
    if hidden.shape[-1] != spec.checkpoint.hidden_size:
        raise ModelLoadError(
            f"the model in {spec.checkpoint.folder} ({config.model_type}) gives hidden states of {hidden.shape[-1]} "
            f"components where its configuration says {spec.checkpoint.hidden_size}: such models are not supported"
        )
    if not _is_causal(hidden, spec.dtype):
        raise ModelLoadError(
            f"the model in {spec.checkpoint.folder} ({config.model_type}) is not a causal LM: its tokens see "
            "later ones; choose a decoder-only model such as Qwen3, Llama or Mistral"
        )
    head = _parameter_names(lm) - {f"{lm.base_model_prefix}.{name}" for name in _parameter_names(model)}
    missing = sorted(set(report["missing_keys"]) - head)
    if missing:
        raise ModelLoadError(
            f"the weights in {spec.checkpoint.folder} lack {len(missing)} of the model's tensors "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): they are incomplete or another model's"
        )
    if spec.checkpoint.adapter is not None:
        _merge_adapter(model, spec)
    if spec.token_set is not None:
        model = _adapt(model, spec.token_set)
    answers = lm is not model and lm.get_output_embeddings() is not None and not report["missing_keys"]
    return Backbone(spec, model, lm if answers else None)


def _auto_class(config: Any) -> Any:
    """A causal LM's, or that of bare models where the configuration is of a kind without LM head."""
    own_code = getattr(config, "auto_map", None)
    known = "AutoModelForCausalLM" in own_code if own_code else type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModel


def _parameter_names(model: Any) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No report that the LM head was left out, and a progress bar only where somebody is looking."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _probe(model: Any) -> Tensor:
    """(2, 4, H) hidden states of two rows that differ in their last token only."""
    embeddings = model.get_input_embeddings().weight
    first, second = 1, embeddings.shape[0] // 2
    ids = torch.tensor([[first, second, first, first], [first, second, first, second]], device=embeddings.device)
    with torch.inference_mode():
        hidden: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state.float()
    return hidden


def _is_causal(probe: Tensor, dtype: str) -> bool:
    """Whether changing the last token left the hidden states before it alone."""
    before = probe[:, :3]  # (2, 3, H)
    tolerance = 1e-4 if dtype == "float32" else 0.02
    return bool((before[0] - before[1]).abs().max() <= tolerance * before.abs().max())


def _merge_adapter(model: Any, spec: BackboneSpec) -> None:
    """Merge a PEFT adapter that was trained on the bare model or on the one with an LM head."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    folder = str(spec.checkpoint.adapter)
    try:
        config = PeftConfig.from_pretrained(folder)
        weights = load_peft_weights(folder, device=str(model.get_input_embeddings().weight.device))
        _add_adapter(model, config, weights).merge_and_unload()
    except Exception as error:  # PEFT's errors have no common base
        raise ModelLoadError(
            f"the adapter in {folder} cannot be merged into {spec.checkpoint.name!r} "
            f"({type(error).__name__}: {error}); check that it was trained on that model"
        ) from error
    model.eval().requires_grad_(False)


def _adapt(model: Any, token_set: TokenSet) -> Any:
    """Add the LoRA adapter of a token set; it is not merged, so that the plain LM stays at hand."""
    from peft import LoraConfig

    try:
        wrapped = _add_adapter(model, LoraConfig(**(token_set.lora_config or {})), dict(token_set.lora))
    except Exception as error:  # PEFT's errors have no common base
        raise TokenSetError(
            f"the LoRA adapter of the token set does not fit its backbone ({type(error).__name__}: {error}); "
            "check that it was trained on that model"
        ) from error
    return wrapped.eval().requires_grad_(False)


def _add_adapter(model: Any, config: Any, weights: dict[str, Tensor]) -> Any:
    """Wrap a bare model in a PEFT adapter, every tensor of which must find its place."""
    from peft import PeftModel, set_peft_model_state_dict

    config.task_type = None  # the wrappers for tasks ask for an LM head
    config.inference_mode = True
    # an adapter of the model with a head calls the bare model by its name: base_model.model.<name>.layers...
    inner = f"base_model.model.{model.base_model_prefix}."
    weights = {key.replace(inner, "base_model.model.", 1): value for key, value in weights.items()}
    wrapped = PeftModel(model, config)
    result: Any = set_peft_model_state_dict(wrapped, weights)
    lacking = [key for key in result.missing_keys if wrapped.base_model.prefix in key]
    if misfits := [*result.unexpected_keys, *lacking]:
        raise ValueError(f"its tensors do not fit: {', '.join(sorted(misfits)[:3])}")
    return wrapped


def _compiled(model: Any) -> Callable[..., Any]:
    """The model by way of torch.compile, for batches of any shape; says how long that takes."""
    run: Any = torch.compile(model, dynamic=True)
    begun = False

    def first_says(**inputs: Any) -> Any:
        nonlocal begun
        if begun:
            return run(**inputs)
        begun = True
        logger.warning("compile=True: the first pass compiles the model, which may take minutes")
        start = time.perf_counter()
        output = run(**inputs)
        logger.warning("compile=True: compiled in %.0f s", time.perf_counter() - start)
        return output

    return first_says


def end_of_sequence(lm: Any, eos_id: int | None) -> list[int]:
    """Every token that ends an answer: those of the model's generation settings, and the tokenizer's."""
    ids = lm.generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return ids + ([eos_id] if eos_id is not None and eos_id not in ids else [])
