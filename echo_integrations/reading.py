"""Reading embeddings: soft prompts, what the frozen LM says to them, and the logit lens. Knows nothing of texts.

Source: BehnamGhader et al., "LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo_integrations.backbone import Backbone
from echo_integrations.config import EncodingError, InputError
from echo_integrations.device import is_out_of_memory
from echo_integrations.token_set import TokenSet

_LENS_POSITIONS = 256  # that the LM head is applied to at once: a position has as many logits as the vocabulary


class LensToken(NamedTuple):
    """A token that the LM head sees in a hidden state."""

    token: str
    """Its text, spaces included."""
    probability: float
    """Of it being the next token, 0 to 1."""


def soft_prompts(backbone: Backbone, token_set: TokenSet, states: Tensor) -> NDArray[np.float32]:
    """(B, N, H) hidden states of compression tokens -> (B, N, H) input vectors for `decode`."""
    with torch.inference_mode():
        result: NDArray[np.float32] = backbone.head(token_set).reconstruct(states).cpu().numpy()
    return result


def decode(
    backbone: Backbone,
    soft_prompts: NDArray[np.float32],
    max_new_tokens: int,
    token_budget: int | None,
    bar: Callable[[int, str], Any],
) -> list[str]:
    """Continue soft prompts greedily, in batches.

    Args:
        backbone: whose plain LM answers.
        soft_prompts: (n, N, H) or (N, H).
        max_new_tokens: bound on the tokens of an answer.
        token_budget: prompt and answer tokens in one batch; the backbone's own unless given.
        bar: makes a progress bar of a total and a description.

    Returns:
        One string a prompt.

    Raises:
        InputError: another shape, or no token to be said.
        EncodingError: one answer alone does not fit in memory.
    """
    prompts = soft_prompts[None] if soft_prompts.ndim == 2 else soft_prompts
    hidden = backbone.spec.checkpoint.hidden_size
    if prompts.ndim != 3 or prompts.shape[-1] != hidden:
        raise InputError(f"soft prompts of shape {soft_prompts.shape}: they are (n, N, {hidden}) for this backbone")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: allow at least one")
    budget = min(token_budget or backbone.token_budget, backbone.memory_limit)
    size = max(1, budget // (prompts.shape[1] + max_new_tokens))
    answers: list[str] = []
    with bar(len(prompts), "decode") as progress:
        while len(answers) < len(prompts):
            batch = torch.from_numpy(np.array(prompts[len(answers) : len(answers) + size], dtype=np.float32))
            try:
                ids = backbone.worker.call(partial(backbone.generate, batch, max_new_tokens))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise EncodingError(
                        f"one answer of {max_new_tokens} tokens does not fit into the memory of {backbone.device}: "
                        "lower max_new_tokens, or choose a smaller model or dtype"
                    ) from error
                size = max(1, min(size, len(batch)) // 2)
                continue
            answers += [backbone.spec.checkpoint.tokenizer.decode(row) for row in ids]
            progress.update(len(batch))
    return answers


def explain(backbone: Backbone, states: Tensor, top_k: int) -> list[list[list[LensToken]]]:
    """(B, N, H) hidden states of compression tokens -> for each row and position the likeliest next tokens."""
    rows, positions, _ = states.shape
    flat = states.flatten(0, 1)  # (B * N, H)
    tokenizer = backbone.spec.checkpoint.tokenizer
    lens: list[list[LensToken]] = []
    for start in range(0, len(flat), _LENS_POSITIONS):
        probabilities, ids = backbone.worker.call(
            partial(backbone.next_tokens, flat[start : start + _LENS_POSITIONS], top_k)
        )
        for row_probabilities, row_ids in zip(probabilities.tolist(), ids.tolist(), strict=True):
            spelled = [tokenizer.decode([token], skip_special_tokens=False) for token in row_ids]
            lens.append([LensToken(*pair) for pair in zip(spelled, row_probabilities, strict=True)])
    return [lens[row * positions : (row + 1) * positions] for row in range(rows)]
