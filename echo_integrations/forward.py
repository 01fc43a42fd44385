"""Laid-out texts through the model: batches by token budget, forward, pooling, heads; less at a time when memory ends.

One batch may mix modes and token sets: a row knows its own. This module knows nothing of texts and templates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo_integrations.backbone import Backbone
from echo_integrations.batching import plan
from echo_integrations.config import EncodingError
from echo_integrations.device import is_out_of_memory
from echo_integrations.pooling import pool
from echo_integrations.recipe import Rendered
from echo_integrations.token_set import TokenSet

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One laid-out text.

    Attributes:
        rendered: token ids and the positions that are pooled.
        name: what errors call it.
        token_set: whose trained vectors follow the ids and whose maps follow the pooling, or None.
    """

    rendered: Rendered
    name: str
    token_set: TokenSet | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """What a batch gave, for the rows of one token set or of none.

    Attributes:
        rows: (b,) indices of the rows.
        vectors: (b, D) their vectors, in float32.
        states: (b, N, H) hidden states of their compression tokens, on the backbone's device; None without a token set.
    """

    rows: list[int]
    vectors: Vectors
    states: Tensor | None


def embed(backbone: Backbone, rows: Sequence[Row], token_budget: int | None = None) -> Iterator[Embedded]:
    """Embed rows, batch by batch, the longest first.

    Args:
        backbone: runs them.
        rows: in any mix of modes and token sets.
        token_budget: positions in one forward pass, padding included; the backbone's own unless given.

    Yields:
        The token sets of each batch, one after the other; every row stands in exactly one.

    Raises:
        EncodingError: a row alone does not fit in memory.
    """
    sizes = [row.rendered.size for row in rows]
    queue = deque(plan(sizes, min(token_budget or backbone.token_budget, backbone.memory_limit)))
    while queue:
        batch = queue.popleft()
        try:
            done = _forward(backbone, rows, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = sizes[batch[0]]
            if len(batch) == 1:
                raise EncodingError(
                    f"{rows[batch[0]].name} alone, {size} tokens with its template, does not fit into the memory of "
                    f"{backbone.device}: lower max_length, or choose a smaller model or dtype"
                ) from error
            backbone.memory_limit = min(backbone.memory_limit, size * len(batch) // 2)
            done = None
        if done is None:  # outside the except block, where the failed pass still holds its memory
            if backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            left = [i for b in (batch, *queue) for i in b]
            queue = deque([left[i] for i in b] for b in plan([sizes[i] for i in left], backbone.memory_limit))
            continue
        yield from done


def _forward(backbone: Backbone, rows: Sequence[Row], batch: Sequence[int]) -> list[Embedded]:
    """One pass through the model."""
    owners: dict[TokenSet | None, list[int]] = {}  # token set -> rows of the batch
    for place, row in enumerate(batch):
        owners.setdefault(rows[row].token_set, []).append(place)
    with backbone.lock, torch.inference_mode():
        rendered = [rows[row].rendered for row in batch]
        hidden = backbone.hidden_states([r.ids for r in rendered], [rows[row].token_set for row in batch])  # (B, T, H)
        done = []
        for token_set, places in owners.items():
            part = hidden if len(places) == len(batch) else hidden[places]  # (b, T, H)
            states = None
            if token_set is None:
                vectors = pool(part, [rendered[place].spans for place in places])  # (b, H)
            else:
                starts = torch.tensor([rendered[place].spans[0][0] for place in places], device=part.device)
                read = starts[:, None] + torch.arange(token_set.compression, device=part.device)  # (b, N)
                states = part[torch.arange(len(places), device=part.device)[:, None], read]  # (b, N, H)
                vectors = backbone.head(token_set).embed(states.float().mean(dim=1))  # (b, D)
            done.append(Embedded([batch[place] for place in places], vectors.cpu().numpy(), states))
    return done
