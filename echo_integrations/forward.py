"""Laid-out texts through the model: batches by token budget, forward, pooling, heads; less at a time when memory ends.

One batch may mix modes and token sets, and texts of many callers: a row knows its own. This module knows nothing of
texts and templates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo_integrations.backbone import Backbone
from echo_integrations.batching import plan
from echo_integrations.config import EncodingError
from echo_integrations.device import Arriving, is_out_of_memory, send
from echo_integrations.pooling import pool
from echo_integrations.recipe import Rendered
from echo_integrations.token_set import TokenSet

Vectors = NDArray[np.float32]

_LEAST_SHARED = 8  # tokens that rows begin with; fewer are computed with each row
_LEAST_SAVED = 0.15  # of a batch's tokens


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
        states: (b, N, H) hidden states of their compression tokens, on the backbone's device; None without a token set.
    """

    rows: list[int]
    states: Tensor | None
    _arriving: Arriving
    _places: list[int] | None = None

    @property
    def vectors(self) -> Vectors:
        """(b, D) their vectors, in float32; waits for the device."""
        vectors = self._arriving.numpy()
        return vectors if self._places is None else vectors[self._places]

    def of(self, places: list[int], rows: list[int]) -> Embedded:
        """The rows at some places, under other indices; where those are all, nothing is copied."""
        if len(places) == len(self.rows):
            return replace(self, rows=rows)
        return Embedded(rows, None if self.states is None else self.states[places], self._arriving, places)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Rows that a caller wants together: some of all that it has, by their indices."""

    backbone: Backbone
    rows: Sequence[Row]
    indices: list[int]
    token_budget: int
    threads: int


def submit(backbone: Backbone, rows: Sequence[Row], token_budget: int | None = None) -> list[Future[list[Embedded]]]:
    """Have rows embedded on the backbone's thread, batch by batch, the longest first.

    What others ask for meanwhile shares batches with them, whatever its modes and token sets.

    Args:
        backbone: runs them.
        rows: in any mix of modes and token sets.
        token_budget: positions in one forward pass, padding included; the backbone's own unless given.

    Returns:
        A future for each batch; every row stands in exactly one. They raise what `embed` raises.
    """
    budget = token_budget or backbone.token_budget
    sizes = [row.rendered.size for row in rows]
    threads = torch.get_num_threads()
    return [
        backbone.worker.submit(
            _Job(backbone, rows, batch, budget, threads), sizes[batch[0]] * len(batch), budget, _embed_jobs
        )
        for batch in plan(sizes, budget)
    ]


def embed(backbone: Backbone, rows: Sequence[Row], token_budget: int | None = None) -> Iterator[Embedded]:
    """Embed rows on this thread, batch by batch, the longest first.

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


def _embed_jobs(jobs: Sequence[_Job]) -> Iterator[tuple[int, list[Embedded]]]:
    """Embed the rows of many callers, and hand each its own."""
    first = jobs[0]
    if torch.get_num_threads() != first.threads:  # a thread does not follow what is set on another one
        torch.set_num_threads(first.threads)
    rows = [job.rows[index] for job in jobs for index in job.indices]
    owners = [(number, index) for number, job in enumerate(jobs) for index in job.indices]
    parts: list[list[Embedded]] = [[] for _ in jobs]
    missing = [len(job.indices) for job in jobs]
    for done in embed(first.backbone, rows, min(job.token_budget for job in jobs)):
        places: dict[int, list[int]] = {}
        for place, row in enumerate(done.rows):
            places.setdefault(owners[row][0], []).append(place)
        for number, own in places.items():
            parts[number].append(done.of(own, [owners[done.rows[place]][1] for place in own]))
            missing[number] -= len(own)
            if not missing[number]:
                yield number, parts[number]


def _forward(backbone: Backbone, rows: Sequence[Row], batch: Sequence[int]) -> list[Embedded]:
    """One pass through the model; a device has at most two to do, so that what comes meanwhile is gathered."""
    owners: dict[TokenSet | None, list[int]] = {}  # token set -> rows of the batch
    for place, row in enumerate(batch):
        owners.setdefault(rows[row].token_set, []).append(place)
    with torch.inference_mode():
        rendered = [rows[row].rendered for row in batch]
        shared = _shared(rendered) if backbone.shares_prefixes else 0
        hidden = backbone.hidden_states(  # (B, T, H), T without the shared positions
            [r.ids for r in rendered], [rows[row].token_set for row in batch], shared
        )
        spans = [[(start - shared, stop - shared) for start, stop in r.spans] for r in rendered]
        done = []
        for token_set, places in owners.items():
            alone = len(places) == len(batch)
            part = hidden if alone else hidden[send(torch.tensor(places), hidden.device)]  # (b, T, H)
            states = None
            if token_set is None:
                vectors = pool(part, [spans[place] for place in places])  # (b, H)
            else:
                starts = send(torch.tensor([spans[place][0][0] for place in places]), part.device)
                read = starts[:, None] + torch.arange(token_set.compression, device=part.device)  # (b, N)
                states = part[torch.arange(len(places), device=part.device)[:, None], read]  # (b, N, H)
                vectors = backbone.head(token_set).embed(states.float().mean(dim=1))  # (b, D)
            done.append(Embedded([batch[place] for place in places], states, Arriving(vectors)))
    before, backbone.under_way = backbone.under_way, done[-1]._arriving
    if before is not None:
        before.numpy()
    return done


def _shared(rendered: Sequence[Rendered]) -> int:
    """How many tokens that all rows begin with are worth taking from memory; 0 for none.

    It depends on the rows alone, not on what is in memory, so that the same call gives the same numbers.
    """
    first, least = rendered[0].ids, min(r.head for r in rendered)
    for row in rendered[1:]:
        differ = np.flatnonzero(row.ids[:least] != first[:least])
        least = int(differ[0]) if len(differ) else least
    saved = least * len(rendered) / sum(r.size for r in rendered)
    return least if least >= _LEAST_SHARED and saved >= _LEAST_SAVED else 0
