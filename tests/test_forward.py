"""Many token sets and modes in one batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from echo_integrations.config import EncodingError, Role
from echo_integrations.encoder import Encoder
from echo_integrations.forward import Row, embed
from echo_integrations.registry import registry
from echo_integrations.resolve import recipe_of, resolve
from tests import tiny
from tests.conftest import backbone_of

TEXTS = ["the pump", "a valve leaked and nobody looked at the gauge", "rain", "water ran out of the pipe " * 3]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> list[Encoder]:
    """Sixteen token sets of different sizes and dimensions, echo and classical, all of one backbone."""
    model = tiny_model("llama")
    root = tmp_path_factory.mktemp("sets")
    plain = {"model": str(model), "dtype": "float32", "normalize_embeddings": False}
    sets = [
        tiny.token_set(model, root / str(i), thought=i % 4, compression=1 + i % 5, dimension=8 + i, seed=i)
        for i in range(16)
    ]
    gen = [Encoder(**plain, mode="llm2vec-gen", token_set=str(path), document_instruction="") for path in sets]
    return [*gen, Encoder(**plain), Encoder(**plain, mode="classical"), Encoder(**plain, pooling="last")]


def rows_of(encoder: Encoder, texts: list[str]) -> list[Row]:
    checkpoint, token_set = resolve(encoder)
    rendered = recipe_of(encoder, Role.DOCUMENT, checkpoint, token_set).render(texts)
    return [Row(r, text, token_set) for r, text in zip(rendered, texts, strict=True)]


@pytest.mark.parametrize("budget", [1_000_000, 120, 1])
def test_sixteen_token_sets_and_every_mode_in_one_batch(
    encoders: list[Encoder], budget: int, nothing_loaded: None
) -> None:
    alone = [encoder.encode(text) for text in TEXTS for encoder in encoders]
    rows = [row for text in TEXTS for encoder in encoders for row in rows_of(encoder, [text])]
    backbone = backbone_of(encoders[0])
    assert len(registry.loaded()) == 1
    passes: list[int] = []
    handle = backbone.model.register_forward_pre_hook(lambda *_: passes.append(1))
    together: list[np.ndarray] = [np.empty(0)] * len(rows)
    for done in embed(backbone, rows, budget):
        for row, vector in zip(done.rows, done.vectors, strict=True):
            assert len(together[row]) == 0  # every row once
            together[row] = vector
    handle.remove()
    assert len(passes) == {1_000_000: 1, 1: len(rows)}.get(budget, len(passes))
    assert {len(vector) for vector in together} == {*range(8, 24), 32}
    for ours, expected in zip(together, alone, strict=True):
        assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_states_come_with_token_sets_only(encoders: list[Encoder]) -> None:
    rows = [*rows_of(encoders[4], TEXTS[:1]), *rows_of(encoders[16], TEXTS[:1])]
    done = {len(batch.vectors[0]): batch for batch in embed(backbone_of(encoders[0]), rows)}
    states = done[12].states
    assert states is not None and states.shape == (1, 5, 32) and done[32].states is None
    head = backbone_of(encoders[4]).head(resolve(encoders[4])[1])  # type: ignore[arg-type]
    np.testing.assert_allclose(head.embed(states.mean(dim=1)).numpy(), done[12].vectors, atol=1e-6)


def test_both_maps_are_applied_once_a_text(encoders: list[Encoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the (b, H) mean and to nothing larger."""
    shapes: list[tuple[int, ...]] = []
    linear = torch.nn.functional.linear
    backbone = backbone_of(encoders[4])
    head = backbone.head(resolve(encoders[4])[1])  # type: ignore[arg-type]

    def spy(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if any(weight is mapped for mapped in head.maps.values()):
            shapes.append(tuple(inputs.shape))
        return linear(inputs, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    list(embed(backbone, rows_of(encoders[4], TEXTS)))
    assert shapes == [(4, 32), (4, 32)]


def test_a_row_that_does_not_fit_alone_is_named(encoders: list[Encoder]) -> None:
    backbone = backbone_of(encoders[0])

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = backbone.model.register_forward_pre_hook(no_memory)
    try:
        with pytest.raises(EncodingError, match="rain alone, [0-9]+ tokens with its template, does not fit"):
            list(embed(backbone, rows_of(encoders[3], ["rain"])))
    finally:
        handle.remove()
