"""How good a ranking is: pure functions of scores. Knows nothing of books or systems."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]


def ranks(scores: Scores, relevant: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(queries,) the place of each query's best relevant document, from 1; ties with others count against it.

    Args:
        scores: (queries, documents).
        relevant: (queries, documents); at least one a query.
    """
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    ahead: NDArray[np.int64] = (~(scores < best) & ~relevant).sum(axis=1)  # NaN is ahead, too
    return ahead + 1


def best_of_each(scores: Scores, owners: NDArray[np.int64]) -> Scores:
    """(queries, owners): the best score among the documents of each owner, which are numbered from 0."""
    best = np.full((len(scores), int(owners.max()) + 1), -np.inf, dtype=np.float32)
    for owner in range(best.shape[1]):
        best[:, owner] = scores[:, owners == owner].max(axis=1)
    return best


def retrieval(scores: Scores, owners: NDArray[np.int64], wanted: NDArray[np.int64]) -> dict[str, float]:
    """R@1 and R@10 over chunks, nDCG@10 over modules.

    Args:
        scores: (questions, chunks).
        owners: (chunks,) the module of each.
        wanted: (questions,) the module of each.
    """
    chunk = ranks(scores, owners[None, :] == wanted[:, None])
    modules = best_of_each(scores, owners)
    module = ranks(modules, np.arange(modules.shape[1])[None, :] == wanted[:, None])
    gain = np.where(module <= 10, 1 / np.log2(module + 1), 0.0)
    return {"R@1": float((chunk <= 1).mean()), "R@10": float((chunk <= 10).mean()), "nDCG@10": float(gain.mean())}
