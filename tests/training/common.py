"""A teacher that can be checked by hand, and data of a few words."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from echo_integrations.training.data import Example
from tests.tiny import WORDS


@dataclass(frozen=True)
class Letters:
    """Counts the first letters of the alphabet in a text."""

    dimension: int = 6
    name: str = "letters"

    @property
    def fingerprint(self) -> str:
        return f"letters-{self.dimension}"

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        alphabet = "etaoinshrdlu"[: self.dimension]
        return np.array([[1 + text.count(letter) for letter in alphabet] for text in texts], dtype=np.float32)


def examples(count: int, negatives: int = 0) -> list[Example]:
    """Pairs of different lengths."""
    rows = []
    for i in range(count):
        words = [WORDS[(i * 7 + k * 3) % len(WORDS)] for k in range(2 + i % 9)]
        others = tuple(f"not {WORDS[(i + k) % len(WORDS)]} {i}" for k in range(negatives))
        rows.append(Example(f"{' '.join(words)} {i}?", f"the {words[0]} {' '.join(words[::-1])} {i}", others))
    return rows
