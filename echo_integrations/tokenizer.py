"""A tokenizer whose state is never touched after loading, hence safe to share between threads.

Fast tokenizers keep truncation, padding and special-token handling as mutable settings of one shared object;
changing them per call corrupts results silently when threads meet. Here every setting is made once.

This module knows nothing of templates and models.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from transformers import AutoTokenizer

from echo_integrations.config import ModelLoadError

Ids = NDArray[np.int32]

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "tekken.json", "*.tiktoken")  # without any, one is made up


class TextTokenizer:
    """Token ids of template text and of users' text.

    Args:
        hf: a tokenizer that nobody else uses.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._lock = threading.Lock()
        self.bos: str = hf.bos_token or ""
        self.eos: str = hf.eos_token or ""
        self.eos_id: int | None = hf.eos_token_id
        self.prefix: Ids = _prefix(hf)
        anchors = (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id, 0)
        self.anchor_id: int = next(i for i in anchors if i is not None)
        specials = sorted(hf.all_special_tokens, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, specials))) if specials else None
        backend = getattr(hf, "backend_tokenizer", None)
        self._literal = backend if isinstance(backend, tokenizers.Tokenizer) else None
        if self._literal is not None:
            self._literal.no_padding()
            self._literal.no_truncation()
            self._plain = tokenizers.Tokenizer.from_str(self._literal.to_str())
            self._plain.encode_special_tokens = True

    @classmethod
    def load(cls, folder: Path, trust_remote_code: bool = False) -> TextTokenizer:
        """Load the tokenizer of a model folder.

        Raises:
            ModelLoadError: there is none, or it cannot be read.
        """
        if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
            raise ModelLoadError(f"{folder} has no tokenizer (tokenizer.json or alike): was its download finished?")
        try:
            hf = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
        except Exception as error:  # whatever the tokenizer's own code raises
            raise ModelLoadError(
                f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {error}); "
                "check that its files (tokenizer.json, tokenizer_config.json) were downloaded whole"
            ) from error
        return cls(hf)

    def literal(self, text: str) -> Ids:
        """Token ids of template text: special tokens are recognised."""
        if self._literal is not None:
            return _array(self._literal.encode(text, add_special_tokens=False).ids)
        return self._slow(text, split_special_tokens=False)

    def plain(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of users' texts: special tokens are plain characters."""
        if self._literal is not None:
            return [_array(e.ids) for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [self._slow(text, split_special_tokens=True) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        with self._lock:
            return str(self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def vocabulary(self) -> dict[str, int]:
        """Every token's spelling, added ones included, and its id."""
        with self._lock:
            return dict(self._hf.get_vocab())

    def split_special(self, text: str) -> list[tuple[str, bool]]:
        """Template text cut at its special tokens: (piece, whether it is one)."""
        pieces: list[tuple[str, bool]] = []
        at = 0
        for match in self._specials.finditer(text) if self._specials else ():
            pieces += [(text[at : match.start()], False), (match[0], True)]
            at = match.end()
        return [piece for piece in [*pieces, (text[at:], False)] if piece[0]]

    def _slow(self, text: str, split_special_tokens: bool) -> Ids:
        """Tokenizers written in Python keep state between calls, so one call at a time."""
        with self._lock:
            encoded = self._hf(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
        return _array(encoded["input_ids"])


def _prefix(hf: Any) -> Ids:
    """What a tokenizer puts in front of a text by itself: usually BOS or nothing."""
    bare = hf("a", add_special_tokens=False)["input_ids"]
    full = hf("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return _array(full[:start])


def _array(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int32)
