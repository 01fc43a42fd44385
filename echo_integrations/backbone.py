"""The model itself: loaded once per process, shared by everyone who asks for the same one, and run.

The only module that runs a model. It knows nothing of texts, templates or vector spaces.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel
from transformers.utils import logging

from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import EncoderSettings, EncodingError, ModelLoadError, canonical_json

Ids = NDArray[np.int32]

_CPU_TOKEN_BUDGET = 2048
_GPU_TOKEN_BUDGET = 32768


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

    @staticmethod
    def of(settings: EncoderSettings, checkpoint: Checkpoint) -> BackboneSpec:
        """The backbone that settings ask for, with device and dtype decided."""
        device = choose_device(settings.device)
        return BackboneSpec(
            checkpoint=checkpoint,
            signature=checkpoint.signature,
            device=str(device),
            dtype=str(choose_dtype(settings.dtype, device)).removeprefix("torch."),
            attn_implementation=settings.attn_implementation,
            model_kwargs_key=canonical_json(settings.model_kwargs),
            model_kwargs=settings.model_kwargs,
        )


class Backbone:
    """A loaded decoder-only model without its LM head.

    Attributes:
        spec: what it was loaded for.
        device: where its inputs go.
        token_budget: tokens in one forward pass that suit the device.
        memory_limit: tokens that one forward pass may hold; lowered for good when memory runs out.
        lock: held by whoever runs it, so that concurrent calls never add up their memory.
    """

    def __init__(self, spec: BackboneSpec, model: Any) -> None:
        self.spec = spec
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.token_budget = _CPU_TOKEN_BUDGET if self.device.type == "cpu" else _GPU_TOKEN_BUDGET
        self.memory_limit = sys.maxsize
        self.lock = threading.Lock()
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]

    def hidden_states(self, rows: Sequence[Ids]) -> Tensor:
        """Run the model on token ids.

        Rows are padded on the right and no mask is passed: attention is causal, so no position sees the padding
        behind it, and a row's hidden states do not depend on its neighbours.

        Args:
            rows: for each text its (T_i,) token ids.

        Returns:
            (B, T, H) last hidden states, after the final norm; rows shorter than T end in meaningless ones.
        """
        ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)  # (B, T)
        for row, row_ids in zip(ids, rows, strict=True):
            row[: len(row_ids)] = row_ids
        if ids.max() >= self._vocabulary:
            raise EncodingError(
                f"the tokenizer of {self.spec.checkpoint.name!r} gave token {ids.max()}, its model has only "
                f"{self._vocabulary} embedding rows: the two do not belong together"
            )
        hidden: Tensor = self.model(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False).last_hidden_state
        return hidden


class Registry:
    """The backbones of this process, each with the objects that use it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start with nothing loaded and nobody waiting."""
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one load at a time: transformers changes global state meanwhile
        self._backbones: dict[BackboneSpec, Backbone] = {}
        self._users: dict[BackboneSpec, weakref.WeakValueDictionary[int, Any]] = {}

    def acquire(self, spec: BackboneSpec, user: object) -> Backbone:
        """The backbone for a spec, loaded at the first request; ``user`` is counted until it releases or dies."""
        if backbone := self._join(spec, user):
            return backbone
        with self._loading:
            if backbone := self._join(spec, user):
                return backbone
            backbone = load(spec)
            with self._lock:
                self._backbones[spec] = backbone
                self._users[spec] = weakref.WeakValueDictionary({id(user): user})
            return backbone

    def _join(self, spec: BackboneSpec, user: object) -> Backbone | None:
        with self._lock:
            if spec in self._backbones:
                self._users[spec][id(user)] = user
            return self._backbones.get(spec)

    def release(self, user: object) -> None:
        """Count ``user`` out everywhere; a backbone's last user to go frees its memory.

        A user that is garbage-collected is counted out as well, but frees nothing: Chroma builds its embedding
        functions anew for every query, and the model must outlive them. A pass under way ends first.
        """
        with self._lock:
            for spec, users in list(self._users.items()):
                if users.pop(id(user), None) is not None and not users:
                    del self._backbones[spec], self._users[spec]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def loaded(self) -> list[BackboneSpec]:
        """What is in memory now."""
        return list(self._backbones)


registry = Registry()
_threads_lost = False


def _start_afresh_after_fork() -> None:
    """A forked child owns none of its parent's locks, threads or GPU contexts: it loads anew when asked."""
    global _threads_lost
    _threads_lost = True
    registry.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_after_fork)


def load(spec: BackboneSpec) -> Backbone:
    """Load a model, merge its adapter, and check that it can serve: whole, and causal.

    Raises:
        ModelLoadError: it cannot be loaded, weights are missing, or it is not a causal LM.
    """
    if _threads_lost:
        torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here; waiting for them never ends
    config = spec.checkpoint.config
    kwargs: dict[str, Any] = {"device_map": {"": spec.device}, **spec.model_kwargs}
    if spec.attn_implementation is not None:
        kwargs["attn_implementation"] = spec.attn_implementation
    try:
        with _quiet_transformers():
            model, report = AutoModel.from_pretrained(
                str(spec.checkpoint.folder),
                dtype=getattr(torch, spec.dtype),
                trust_remote_code=spec.checkpoint.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **kwargs,
            )
    except Exception as error:  # whatever a model's own code, safetensors or the GPU driver raises
        raise ModelLoadError(
            f"the model in {spec.checkpoint.folder} cannot be loaded on {spec.device} "
            f"({type(error).__name__}: {error}); unless that says what to do, "
            "check that the weights were downloaded whole" + _advice_after_fork()
        ) from error
    model.eval().requires_grad_(False)
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
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelLoadError(
            f"the weights in {spec.checkpoint.folder} lack {len(missing)} of the model's tensors "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): they are incomplete or another model's"
        )
    if spec.checkpoint.adapter is not None:
        model = _merge_adapter(model, spec)
    return Backbone(spec, model)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No report that the LM head was left out, and a progress bar only where somebody is looking."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


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


def _merge_adapter(model: Any, spec: BackboneSpec) -> Any:
    """Merge a PEFT adapter that was trained on the bare model or on the one with an LM head."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    folder = str(spec.checkpoint.adapter)
    try:
        config = PeftConfig.from_pretrained(folder)
        config.task_type = None  # the wrappers for tasks ask for an LM head
        config.inference_mode = True
        weights = load_peft_weights(folder, device=str(model.get_input_embeddings().weight.device))
        # an adapter of the model with a head calls the bare model by its name: base_model.model.<name>.layers...
        inner = f"base_model.model.{model.base_model_prefix}."
        weights = {key.replace(inner, "base_model.model.", 1): value for key, value in weights.items()}
        wrapped = PeftModel(model, config)
        result: Any = set_peft_model_state_dict(wrapped, weights)
        lacking = [key for key in result.missing_keys if wrapped.base_model.prefix in key]
        if misfits := [*result.unexpected_keys, *lacking]:
            raise ValueError(f"its tensors do not fit: {', '.join(sorted(misfits)[:3])}")
        merged = wrapped.merge_and_unload()
    except Exception as error:  # PEFT's errors have no common base
        raise ModelLoadError(
            f"the adapter in {folder} cannot be merged into {spec.checkpoint.name!r} "
            f"({type(error).__name__}: {error}); check that it was trained on that model"
        ) from error
    merged.eval().requires_grad_(False)
    return merged


def choose_device(device: str | None) -> torch.device:
    """The device that a setting means.

    Raises:
        ModelLoadError: there is no such device here.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelLoadError(
            f"device {device!r} cannot be used here ({error}): name another, or leave device out for the best one"
            + _advice_after_fork()
        ) from error


def _advice_after_fork() -> str:
    return "; a forked process cannot use the GPU of its parent: start workers with 'spawn'" if _threads_lost else ""


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting means: ``auto`` is bfloat16 where the hardware multiplies it, else float32.

    Example:
        >>> choose_dtype("float16", torch.device("cpu"))
        torch.float16
    """
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if device.type == "cpu":
        fast = cpu_multiplies_bfloat16()
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.bfloat16 if fast else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has AMX-BF16 or AVX512-BF16."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(probe() for probe in probes if probe is not None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "out of memory", "not enough memory")
    )
