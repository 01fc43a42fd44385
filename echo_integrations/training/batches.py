"""Examples as token ids, and the order in which a run sees them. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from echo_integrations.config import InputError
from echo_integrations.recipe import TokenRecipe
from echo_integrations.tokenizer import TextTokenizer
from echo_integrations.training.config import TrainingConfig
from echo_integrations.training.data import Example
from echo_integrations.training.model import Batch
from echo_integrations.training.teacher import TeacherVectors

Ids = NDArray[np.int32]


class Examples:
    """Tokenised examples with their teacher's vectors, taken by index.

    Query = white space cut off, the instruction before it, the tokens behind it (not among the ids). Response = white
    space cut off, what the tokenizer puts in front, end of sequence behind it, then cut.

    Args:
        examples: as they were read.
        tokenizer: the backbone's.
        positions: that the backbone has, None for no bound.
        teacher: has or computes the vectors.
        config: lengths, instruction, and which loss terms need what.

    Raises:
        InputError: an example without a response.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: TextTokenizer,
        positions: int | None,
        teacher: TeacherVectors,
        config: TrainingConfig,
    ) -> None:
        self.texts = list(examples)
        empty = next((i for i, example in enumerate(examples) if not example.response.strip()), None)
        if empty is not None:
            raise InputError(f"examples[{empty}] ({examples[empty].query[:60]!r}) has no response: leave it out")
        self._teacher, self._scale = teacher, 1.0
        recipe = TokenRecipe(tokenizer, config.tokens, config.compression_tokens, config.max_query_length, positions)
        self._queries = _laid_out(recipe, [example.query.strip() for example in examples], config.training_instruction)
        room = (positions or config.max_response_length) - config.compression_tokens
        limit = min(config.max_response_length, room) if positions else config.max_response_length
        end = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=np.int32)
        said = tokenizer.plain([example.response.strip() for example in examples])
        self._responses = [np.concatenate([tokenizer.prefix, ids, end])[:limit] for ids in said]
        self._repeats: list[Ids] = []
        self._negatives: list[list[Ids]] = [[] for _ in examples]
        if config.repeat_weight or config.contrastive_weight or config.margin_weight:
            self._repeats = _laid_out(recipe, [e.response.strip() for e in examples], config.repeat_prompt)
            flat = [negative.strip() for example in examples for negative in example.negatives]
            ids = iter(_laid_out(recipe, flat, config.repeat_prompt))
            self._negatives = [[next(ids) for _ in example.negatives] for example in examples]
        teacher.add([e.response.strip() for e in examples] + [n.strip() for e in examples for n in e.negatives])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> int:
        return index

    def scale_targets(self, factor: float) -> None:
        """Multiply the teacher's vectors by a factor from now on."""
        self._scale = factor

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """(n, D) the teacher's vectors of responses."""
        return self._vectors([self.texts[i].response.strip() for i in indices])

    def batch(self, indices: Sequence[int], *, extras: bool = True) -> Batch:
        """Examples by index; ``extras``: with the second student inputs, where a loss term needs them."""
        negatives = [(i, n) for i in indices for n in range(len(self._negatives[i]))] if extras else []
        texts = [self.texts[i].negatives[n].strip() for i, n in negatives]
        return Batch(
            indices=list(indices),
            queries=[self._queries[i] for i in indices],
            responses=[self._responses[i] for i in indices],
            targets=self.targets(indices),
            repeats=[self._repeats[i] for i in indices] if self._repeats and extras else [],
            negatives=[self._negatives[i][n] for i, n in negatives],
            negative_targets=self._vectors(texts) if texts else None,
        )

    def _vectors(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(self._teacher[texts]) * self._scale


class Order:
    """Which examples each part of each step takes; the same whatever the number of processes and parts.

    All examples in a random order, then all again in another one, and so on, cut into batches of ``size``; of each,
    a process takes every ``processes``-th part.

    Args:
        examples: how many there are.
        size: examples of one step, over all processes and parts.
        steps: how many steps.
        seed: of the order.
        parts: that each process takes one after the other.
        processes: how many there are.
        rank: which one this is.

    Example:
        >>> [sorted(a + b) for a, b in zip(*(Order(4, 4, 2, 0, processes=2, rank=rank) for rank in (0, 1)))]
        [[0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(
        self, examples: int, size: int, steps: int, seed: int, *, parts: int = 1, processes: int = 1, rank: int = 0
    ) -> None:
        self._examples, self._size, self._steps, self._seed = examples, size, steps, seed
        self._parts, self._processes, self._rank = parts, processes, rank

    def __len__(self) -> int:
        return self._steps * self._parts

    def __iter__(self) -> Iterator[list[int]]:
        share = self._size // (self._parts * self._processes)
        for step in range(self._steps):
            batch = [self._at(step * self._size + i) for i in range(self._size)]
            for part in range(self._parts):
                start = (part * self._processes + self._rank) * share
                yield batch[start : start + share]

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, self._examples)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self._examples)
        return int(self._permutation[index])


def _laid_out(recipe: TokenRecipe, texts: Sequence[str], instruction: str) -> list[Ids]:
    return [rendered.ids for rendered in recipe.render(texts, instruction)]
