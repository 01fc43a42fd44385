"""Keys and values of tokens that many texts begin with: computed once, seen by every row of a batch.

Knows nothing of texts and of how a model is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ATTENTION = {"full_attention", "sliding_attention"}


def can_share(config: Any) -> bool:
    """Whether keys and values are all that a model knows of earlier tokens, each layer having its own."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds <= _ATTENTION and not getattr(config, "num_kv_shared_layers", None)


class Prefix(DynamicCache):
    """A key-value cache that gives each row the prefix in front of its own keys and values, and keeps none of those.

    Unlike transformers' own it can be used again and again, and by batches of any size; each layer's copy for the
    batch lives no longer than the layer's turn.

    Args:
        keys: for each layer (1, heads, P, d).
        values: the same.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self.layers = [_PrefixLayer(*pair) for pair in zip(keys, values, strict=True)]

    @classmethod
    def of(cls, model: Any, ids: Tensor) -> Prefix:
        """What a model makes of (1, P) token ids."""
        cache = DynamicCache()  # of the plain kind also where attention slides: masks see to that
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        return cls([layer.keys for layer in layers], [layer.values for layer in layers])


class _PrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(B, heads, T, d) -> (B, heads, P + T, d)."""
        keys, values = (
            torch.cat([before.expand(len(own), -1, -1, -1), own], dim=-2)  # type: ignore[union-attr]
            for before, own in ((self.keys, key_states), (self.values, value_states))
        )
        return keys, values
