"""From hidden states to one vector a text. Pure torch; knows nothing of models or templates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from echo_integrations.device import send

Spans = Sequence[tuple[int, int]]


def pool(hidden: Tensor, spans: Sequence[Spans]) -> Tensor:
    """Average the marked positions of each row.

    Args:
        hidden: (B, T, H) hidden states of any floating dtype.
        spans: for each row, half-open ranges of positions; together they hold at least one position.

    Returns:
        (B, H) in float32.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> pool(hidden, [[(0, 2)]]).item(), pool(hidden, [[(1, 2)]]).item()
        (2.0, 3.0)
    """
    if all(len(row) == 1 and row[0][1] - row[0][0] == 1 for row in spans):
        places = send(torch.tensor([row[0][0] for row in spans]), hidden.device)  # (B,)
        return hidden[torch.arange(len(spans), device=hidden.device), places].float()
    mask = torch.zeros(hidden.shape[:2], dtype=torch.float32)  # (B, T)
    for weights, row in zip(mask, spans, strict=True):
        for start, stop in row:
            weights[start:stop] = 1.0
    mask = send(mask / mask.sum(dim=1, keepdim=True), hidden.device)
    kept = hidden.float().masked_fill(mask.unsqueeze(-1) == 0, 0.0)  # infinity in the padding times 0 would be NaN
    return torch.einsum("bt,bth->bh", mask, kept)
