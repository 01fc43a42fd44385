"""Vectors against the papers' released code and against an independent implementation, on every architecture."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from echo_integrations.config import EncodingError
from echo_integrations.encoder import Encoder
from echo_integrations.resolve import resolve
from echo_integrations.token_set import TokenSet
from tests import reference, tiny
from tests.tiny import ARCHITECTURES

TEXTS = ["The pump was closed.", "hi", "東京 café — 🙂 x", "  two  spaces ", "the valve " * 30, "line\nline\ttab"]


@pytest.mark.parametrize("backbone", ["qwen3", "llama"])
@pytest.mark.parametrize("template", ["zeroshot", "query", "document", "classical"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("max_length", [40, 300])
def test_the_released_codes_vectors(backbone: str, template: str, pooling: str, max_length: int, data: Path) -> None:
    texts = json.loads((data / "texts.json").read_text())
    templates = json.loads((data / backbone / "templates.json").read_text())
    expected = np.load(data / backbone / "echo.npz")[f"{template}|{pooling}|{max_length}"]
    encoder = Encoder(
        model=str(data / backbone / "base"),
        dtype="float32",
        query_template=templates[template],
        pooling=pooling,
        max_length=max_length,
        normalize_embeddings=False,
        on_truncate="truncate",
    )
    vectors = encoder.encode_query(texts["texts"], instruction=texts["prompt"] if template == "query" else None)
    assert np.abs(vectors - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("backbone", "preset", "released"),
    [
        (backbone, preset, released)
        for backbone in ("qwen3", "llama")
        for preset, released in {
            "fine-tuned-query": "query",
            "fine-tuned-document": "document",
            "zero-shot-sentence": "zeroshot",
            "classical": "classical",
        }.items()
    ],
)
def test_presets_are_the_released_templates(backbone: str, preset: str, released: str, data: Path) -> None:
    templates = json.loads((data / backbone / "templates.json").read_text())
    encoder = Encoder(model=str(data / backbone / "base"), query_template=preset)
    assert encoder.vector_space()["query_template"] == templates[released]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_every_architecture_equals_the_plain_method(
    architecture: str, pooling: str, tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model(architecture)
    encoder = Encoder(
        model=str(folder),
        dtype="float32",
        pooling=pooling,
        max_length=20,
        on_truncate="truncate",
        normalize_embeddings=False,
    )
    space = encoder.vector_space()
    template, max_length = space["document_template"], space["document_max_length"]
    expected = reference.embed(folder, template, TEXTS, pooling, max_length)
    vectors = encoder.encode(TEXTS)
    assert np.abs(vectors - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(vectors - vectors[0])[1:].max() > 0.01  # they do differ


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gpt2"])
def test_eager_attention_gives_the_same(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    """Without an attention mask of ours, causality and sliding windows are the model's own in every implementation."""
    settings = {"model": str(tiny_model(architecture)), "dtype": "float32", "max_length": 20, "on_truncate": "truncate"}
    eager = Encoder(**settings, attn_implementation="eager").encode(TEXTS)
    sdpa = Encoder(**settings, attn_implementation="sdpa").encode(TEXTS)
    np.testing.assert_allclose(eager, sdpa, atol=2e-6)


def test_absolute_positions_clamp_max_length(tiny_model: Callable[[str], Path]) -> None:
    encoder = Encoder(model=str(tiny_model("gpt2")), on_truncate="truncate")
    recipe_length = encoder.vector_space()["document_max_length"]
    assert recipe_length == 6  # 64 positions less 51 tokens of the prompt, for two copies
    assert np.isfinite(encoder.encode(["the valve " * 200])).all()


# --- LLM2Vec-Gen


def gen(model: Path, token_set: Path, **settings: Any) -> Encoder:
    plain = {"dtype": "float32", "normalize_embeddings": False, "on_truncate": "truncate"}
    own = {"model": str(model), "token_set": str(token_set), "mode": "llm2vec-gen", "document_instruction": ""}
    return Encoder(**{**plain, **own, **settings})


@pytest.mark.parametrize("backbone", ["qwen3", "llama"])
@pytest.mark.parametrize("max_length", [64, 512])
def test_the_released_codes_llm2vec_gen_vectors(backbone: str, max_length: int, data: Path) -> None:
    texts = json.loads((data / "texts.json").read_text())["texts"]
    expected = np.load(data / backbone / "gen.npz")
    encoder = gen(data / backbone / "base", data / backbone / "llm2vec_gen", max_length=max_length)
    vectors, soft_prompts = encoder.encode(texts, return_soft_prompts=True)
    for ours, name in ((vectors, "emb"), (soft_prompts, "recon")):
        theirs = expected[f"{name}|{max_length}"]
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_equals_plain_llm2vec_gen(
    architecture: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Learned positions, scaled embeddings, sliding windows, BOS or none, a pad token or none."""
    folder = tiny_model(architecture)
    tokens = tiny.token_set(folder, tmp_path / "set", thought=4, compression=3)
    expected, soft = reference.embed_gen(folder, tokens, TEXTS, compression=3, max_length=20)
    vectors, soft_prompts = gen(folder, tokens, max_length=20).encode(TEXTS, return_soft_prompts=True)
    assert np.abs(vectors - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(soft_prompts - soft).max() <= 1e-5 * np.abs(soft).max()
    assert np.abs(vectors - vectors[0])[1:].max() > 0.01  # they do differ


def test_scaled_embeddings_scale_the_trained_rows_too(tmp_path: Path) -> None:
    """Gemma 3 scales in its embedding module: a row stands for a row of the matrix, so it is scaled like one."""
    folder = tiny.build("gemma3_text", tmp_path / "model")
    matrix = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tokens = tiny.token_set(folder, tmp_path / "set", thought=1, compression=1)
    ids = AutoTokenizer.from_pretrained(folder)("the pump")["input_ids"]
    rows = matrix[[7, 9]].clone()  # rows that the model has, so that plain ids say the same
    dataclasses.replace(TokenSet.load(tokens), rows=rows).save(tokens)
    tensors = load_file(tokens / "tokens.safetensors")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[*ids, 7, 9]])).last_hidden_state[0, -1].numpy()
    weight, bias = (tensors[f"reconstruction.{part}"].numpy() for part in ("weight", "bias"))
    _, soft_prompts = gen(folder, tokens).encode(["the pump"], return_soft_prompts=True)
    expected = weight @ hidden + bias
    assert np.abs(soft_prompts[0, 0] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_matrix_of_more_rows_than_the_tokenizer_has_ids_or_fewer(data: Path, tmp_path: Path) -> None:
    """Qwen pads its matrix; added tokens may lie beyond it, which matters only to a text that spells them."""
    encoder = gen(data / "qwen3" / "base", data / "qwen3" / "llm2vec_gen")
    assert resolve(encoder)[0].config.vocab_size > len(resolve(encoder)[0].tokenizer.vocabulary())
    folder = Path(shutil.copytree(data / "qwen3" / "base", tmp_path / "added"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"beyond{i}" for i in range(100)])  # ids 2048 to 2147, the matrix has 2112 rows
    tokenizer.save_pretrained(folder)
    tokens = tiny.token_set(folder, tmp_path / "set")
    beyond = gen(folder, tokens)
    assert np.isfinite(beyond.encode(["A valve.", "beyond0"])).all()
    with pytest.raises(EncodingError, match="gave token 2147, its model has only 2112 embedding rows"):
        beyond.encode(["beyond99"])
