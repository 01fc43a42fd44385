"""The loss terms of LLM2Vec-Gen. Pure torch; knows nothing of models or texts.

Sums, not means, where a batch may be taken in parts: the caller divides by what the whole batch has.

Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

_LOGITS = 1 << 25  # numbers of logits that are held at once: a position has as many as the vocabulary


def alignment(embeddings: Tensor, teacher: Tensor) -> Tensor:
    """Mean square error over the dimensions, summed over the batch.

    Args:
        embeddings: (B, D).
        teacher: (B, D).

    Example:
        >>> alignment(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).item()
        2.5
    """
    return (embeddings.float() - teacher.float()).square().mean(dim=1).sum()


def margin(embeddings: Tensor, negatives: Tensor, threshold: float) -> Tensor:
    """How far embeddings fall short of a distance to each other and to negatives: mean of max(0, t^2 - d^2), times B.

    Args:
        embeddings: (B, D).
        negatives: (K, D).
        threshold: t.

    Example:
        >>> margin(torch.tensor([[0.0], [1.0]]), torch.tensor([[9.0]]), threshold=2.0).item()
        3.0
    """
    others = torch.cat([embeddings, negatives]).float()  # (B + K, D)
    squares = (embeddings.float()[:, None] - others[None]).square().sum(dim=2)  # (B, B + K)
    short = (threshold**2 - squares).relu()
    short = short.masked_fill(torch.eye(*short.shape, dtype=torch.bool, device=short.device), 0.0)
    return short.sum() / max(1, len(others) - 1)


def contrastive(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE by cosine, summed over the batch.

    Args:
        queries: (B, D).
        positives: (B, D), the i-th of which belongs to the i-th query.
        negatives: (K, D).
        temperature: cosines are divided by it.

    Example:
        >>> one = torch.tensor([[1.0, 0.0]])
        >>> round(contrastive(one, one, torch.tensor([[0.0, 1.0]]), temperature=1.0).item(), 4)  # log(1 + 1/e)
        0.3133
    """
    candidates = torch.cat([positives, negatives]).float()  # (B + K, D)
    logits = normalize(queries.float(), dim=1) @ normalize(candidates, dim=1).T / temperature
    return cross_entropy(logits, torch.arange(len(queries), device=queries.device), reduction="sum")


def head_loss(
    states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of a frozen LM head, a few positions at a time, so that the logits are never held at once.

    Args:
        states: (n, H) hidden states of the positions that have a label.
        labels: (n,) the tokens that follow them.
        head: (m, H) -> (m, V) logits; has no trained parameters.
        gradient: whether to compute that, too.

    Returns:
        The sum over the positions, and its gradient (n, H).

    Example:
        >>> loss, gradient = head_loss(torch.zeros(1, 2), torch.tensor([1]), lambda states: states)
        >>> round(loss.item(), 4), gradient.tolist()
        (0.6931, [[0.5, -0.5]])
    """
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    step = max(1, _LOGITS // head(states[:1].detach()).shape[-1])
    for start in range(0, len(states), step):
        part = states[start : start + step].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            loss = cross_entropy(head(part).float(), labels[start : start + step], reduction="sum")
        losses.append(loss.detach())
        if gradient:
            gradients += torch.autograd.grad(loss, part)
    return torch.stack(losses).sum(), torch.cat(gradients) if gradient else None


class Known(torch.autograd.Function):
    """A loss whose gradient was computed with it: the graph of a frozen model is gone before the next part runs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, compute: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]) -> Tensor:
        """The loss of ``compute(inputs, whether its gradient is wanted)``."""
        loss, gradient = compute(inputs.detach(), ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        """What was computed, times what comes from behind."""
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None
