"""From hidden states to one vector a text. Pure torch; knows nothing of models or templates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from echo_integrations.config import Pooling

Spans = Sequence[tuple[int, int]]


def pool(hidden: Tensor, spans: Sequence[Spans], pooling: Pooling | str) -> Tensor:
    """Pool the marked positions of each row.

    Args:
        hidden: (B, T, H) hidden states of any floating dtype.
        spans: for each row, half-open ranges of positions; together they hold at least one position.
        pooling: mean of the positions, or the last of them.

    Returns:
        (B, H) in float32.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> pool(hidden, [[(0, 2)]], Pooling.MEAN).item(), pool(hidden, [[(0, 2)]], Pooling.LAST).item()
        (2.0, 3.0)
    """
    if pooling == Pooling.LAST:
        last = torch.tensor([row[-1][1] - 1 for row in spans], device=hidden.device)  # (B,)
        return hidden[torch.arange(len(spans), device=hidden.device), last].float()
    mask = torch.zeros(hidden.shape[:2], dtype=torch.float32)  # (B, T)
    for weights, row in zip(mask, spans, strict=True):
        for start, stop in row:
            weights[start:stop] = 1.0
    mask = (mask / mask.sum(dim=1, keepdim=True)).to(hidden.device)
    kept = hidden.float().masked_fill(mask.unsqueeze(-1) == 0, 0.0)  # infinity in the padding times 0 would be NaN
    return torch.einsum("bt,bth->bh", mask, kept)
