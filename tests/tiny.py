"""Tiny random-weight models of every architecture, built offline, each with a tokenizer of its family's kind."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from echo_integrations.checkpoint import Checkpoint
from echo_integrations.config import EncoderSettings
from echo_integrations.token_set import TokenSet

WORDS = (
    "the pump valve was closed and water ran out of a pipe while nobody looked at filter pressure gauge "
    "controller resets after power fails open lamp tank borehole rain garden soil river stone music bank"
).split()
CORPUS = [" ".join(pair) + ". Größe café 東京" for pair in itertools.permutations(WORDS, 2)]


def byte_level(specials: list[str]) -> Tokenizer:
    """GPT-2's kind: bytes, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(specials: list[str]) -> Tokenizer:
    """Llama's kind: a marked space in front of every piece, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*specials, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    whole = Tokenizer(models.BPE(tokenizer.get_vocab(), merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer, whole.decoder = tokenizer.normalizer, tokenizer.decoder
    whole.add_special_tokens(specials)  # bytes stay ordinary tokens
    return whole


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """A tokenizer that puts BOS in front by itself, as Llama's does."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}

# name -> (tokenizer, its special tokens, configuration)
ARCHITECTURES: dict[str, tuple[Callable[[list[str]], Tokenizer], dict[str, str], dict[str, Any]]] = {
    "llama": (sentencepiece, _LLAMA_TOKENS, {**_SHAPE, "tie_word_embeddings": False}),
    "mistral": (sentencepiece, _LLAMA_TOKENS, {**_SHAPE, "sliding_window": 8}),
    "qwen2": (byte_level, _CHATML, {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": (byte_level, _CHATML, {**_SHAPE, "tie_word_embeddings": True}),
    "gemma2": (
        sentencepiece,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        {**_SHAPE, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    "gemma3_text": (
        sentencepiece,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        {**_SHAPE, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    "phi3": (
        sentencepiece,
        {**_LLAMA_TOKENS, "pad_token": "<|endoftext|>"},
        {**_SHAPE, "pad_token_id": 0, "sliding_window": 8},
    ),
    "gpt2": (byte_level, _END_OF_TEXT, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": (byte_level, _END_OF_TEXT, {**_SHAPE, "rotary_pct": 0.25}),
}


def build(name: str, folder: Path, **changes: Any) -> Path:
    """Write a random model of an architecture with its tokenizer into ``folder``."""
    train, tokens, shape = ARCHITECTURES[name]
    tokenizer = train(list(dict.fromkeys(tokens.values())))
    if train is sentencepiece:
        tokenizer = with_bos(tokenizer, tokens["bos_token"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    config = CONFIG_MAPPING[name](
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=0,
        eos_token_id=0,
        **{**shape, **changes},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases are constants in a new model
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def token_set(
    model_folder: Path | str,
    folder: Path,
    *,
    thought: int = 3,
    compression: int = 2,
    dimension: int = 24,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Write a random token set of a model (a folder or "echo-mini") into ``folder``; ``fields`` are more of its own."""
    checkpoint = Checkpoint.find(EncoderSettings(model=str(model_folder)))
    hidden = checkpoint.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    tokens = TokenSet(
        rows=random(thought + compression, hidden, scale=_embedding_scale(checkpoint.folder / "model.safetensors")),
        maps={
            "reconstruction.weight": random(hidden, hidden, scale=hidden**-0.5),
            "reconstruction.bias": random(hidden, scale=0.1),
            "alignment.weight": random(dimension, hidden, scale=hidden**-0.5),
            "alignment.bias": random(dimension, scale=0.1),
        },
        compression=compression,
        backbone=str(model_folder),
        **{"backbone_identity": checkpoint.identity(), **fields},
    )
    tokens.save(folder)
    return folder


def _embedding_scale(weights: Path) -> float:
    """Standard deviation of a model's token embeddings."""
    names = ("embed_tokens.weight", "embed_in.weight", "wte.weight")
    with safe_open(weights, framework="pt") as file:
        name = next(key for key in file.keys() if key.endswith(names))
        return float(file.get_tensor(name).float().std())
