"""Held-out examples while a run goes on: cosine to the teacher, recall, and what embeddings say in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from echo_integrations.training.batches import Examples
from echo_integrations.training.model import Student

_SHOWN = 256  # queries and responses in a matrix for the report
_BATCH = 64
_NEW_TOKENS = 48  # of a decoded sample


class Validation:
    """Measures a student on examples that it does not train on.

    Args:
        student: as it is when it is measured.
        examples: held out.
        samples: how many embeddings are read back.

    Attributes:
        samples: rows of ``step``, ``query``, ``response`` and ``decoded``, of every measurement.
    """

    def __init__(self, student: Student, examples: Examples, samples: int) -> None:
        self._student, self._examples, self._shown = student, examples, samples
        self.samples: list[dict[str, Any]] = []

    def __call__(self, step: int) -> dict[str, float]:
        """Mean cosine to the teacher, recall@1 of the own response among all, and the reconstruction loss a token."""
        training = self._student.training
        self._student.eval()
        try:
            return self._measure(step)
        finally:
            self._student.train(training)

    @torch.no_grad()
    def cosines(self) -> NDArray[np.float32]:
        """(n, n) cosines of the first held-out queries with their responses, as student and teacher embed them."""
        indices = list(range(min(_SHOWN, len(self._examples))))
        parts = [self._embed(indices[i : i + _BATCH])[0] for i in range(0, len(indices), _BATCH)]
        scores = normalize(torch.cat(parts), dim=1) @ normalize(self._examples.targets(indices), dim=1).T
        result: NDArray[np.float32] = scores.numpy()
        return result

    @torch.no_grad()
    def _measure(self, step: int) -> dict[str, float]:
        vectors, said, labels = [], 0.0, 0
        for start in range(0, len(self._examples), _BATCH):
            indices = list(range(start, min(start + _BATCH, len(self._examples))))
            embeddings, states = self._embed(indices)
            batch = self._examples.batch(indices, extras=False)
            said += float(self._student.say(self._student.soft_prompts(states), batch.responses))
            labels += batch.labels
            vectors.append(embeddings)
            if start == 0 and self._shown:
                self._read(step, indices[: self._shown], states[: self._shown])
        cosine, recall = agreement(torch.cat(vectors), self._examples.targets(range(len(self._examples))))
        return {
            "validation_cosine": cosine,
            "validation_recall_at_1": recall,
            "validation_reconstruction": said / labels,
        }

    def _embed(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """(B, D) embeddings on the CPU, and (B, N, H) states."""
        states = self._student.states(self._examples.batch(indices, extras=False).queries)
        return self._student.embed(states).cpu(), states

    def _read(self, step: int, indices: list[int], states: Tensor) -> None:
        decoded = self._student.read(states, _NEW_TOKENS)
        for index, words in zip(indices, decoded, strict=True):
            example = self._examples.texts[index]
            self.samples.append({"step": step, "query": example.query, "response": example.response, "decoded": words})


def agreement(queries: Tensor, responses: Tensor) -> tuple[float, float]:
    """Mean cosine of each query with its own response, and the share of queries to which no other is closer.

    Args:
        queries: (n, D), float32.
        responses: (n, D), float32; the i-th belongs to the i-th query.

    Example:
        >>> agreement(torch.eye(2), torch.tensor([[2.0, 0.0], [3.0, 0.0]]))
        (0.5, 1.0)
        >>> agreement(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))[1]
        0.5
    """
    queries, responses = normalize(queries, dim=1), normalize(responses, dim=1)
    own = (queries * responses).sum(dim=1)  # (n,)
    hits = 0
    for start in range(0, len(queries), 1024):
        best = (queries[start : start + 1024] @ responses.T).amax(dim=1)
        hits += int((own[start : start + 1024] >= best - 1e-6).sum())  # equal responses count as one
    return float(own.mean()), hits / len(queries)
