"""Tokens that all rows begin with, taken from memory: the numbers stay the same in every architecture."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from echo_integrations.encoder import Encoder
from echo_integrations.prefix import Prefix, can_share
from tests import tiny
from tests.conftest import backbone_of

RNG = np.random.default_rng(0)
HEAD = RNG.integers(5, 90, 20).astype(np.int32)


def rows_after(head: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate([head, RNG.integers(5, 90, n).astype(np.int32)]) for n in (3, 1, 11, 6)]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("attention", [None, "eager"])
def test_hidden_states_are_those_of_the_whole_row(
    name: str, attention: str | None, tiny_model: Callable[[str], Path]
) -> None:
    backbone = backbone_of(Encoder(model=str(tiny_model(name)), dtype="float32", attn_implementation=attention))
    assert backbone.shares_prefixes
    rows = rows_after(HEAD)
    with torch.inference_mode():
        whole = backbone.hidden_states(rows)
        for shared in (20, 12, 20, 1):  # computed, computed, remembered, computed
            rest = backbone.hidden_states(rows, shared=shared)
            assert rest.shape[1] == whole.shape[1] - shared
            for row, ids in enumerate(rows):
                expected = whole[row, shared : len(ids)]
                got = rest[row, : len(ids) - shared]
                assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_prefix_goes_through_the_model_once_and_the_last_few_are_kept(tiny_model: Callable[[str], Path]) -> None:
    backbone = backbone_of(Encoder(model=str(tiny_model("qwen3")), dtype="float32"))
    shapes: list[tuple[int, ...]] = []
    handle = backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    heads = [HEAD + 1 + i for i in range(9)]
    with torch.inference_mode():
        for head in (heads[0], heads[0], *heads[1:], heads[8], heads[0]):
            backbone.hidden_states(rows_after(head), shared=20)
    handle.remove()
    computed = [number for number, shape in enumerate(shapes) if shape == (1, 20)]
    assert len(shapes) == 12 + 10 and len(computed) == 10  # the first was forgotten when the ninth came
    assert backbone._prefixes and len(backbone._prefixes) == 8


def test_a_prefix_is_used_by_batches_of_any_size_and_keeps_nothing_of_them() -> None:
    keys, values = [torch.randn(1, 2, 5, 4)], [torch.randn(1, 2, 5, 4)]
    prefix = Prefix(keys, values)
    for rows, tokens in ((3, 2), (1, 7)):
        own = torch.randn(rows, 2, tokens, 4)
        seen, _ = prefix.update(own, own, 0)
        assert seen.shape == (rows, 2, 5 + tokens, 4)
        assert torch.equal(seen[rows - 1, :, :5], keys[0][0]) and torch.equal(seen[:, :, 5:], own)
        assert prefix.get_seq_length() == 5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, True),
        ({"layer_types": ["full_attention", "sliding_attention"], "num_kv_shared_layers": 0}, True),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"layer_types": ["full_attention"], "num_kv_shared_layers": 4}, False),
    ],
)
def test_models_that_know_more_than_keys_and_values_are_left_alone(config: dict[str, object], expected: bool) -> None:
    assert can_share(SimpleNamespace(**config)) is expected
