"""Vectors against the paper's released code and against an independent implementation, on every architecture."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from echo_integrations.encoder import Encoder
from tests import reference
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
