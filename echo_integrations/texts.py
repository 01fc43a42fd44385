"""Texts on their way in: seen to be texts, and a word about those that are cut.

This module knows nothing of models.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from echo_integrations.config import InputError, OnTruncate, TruncationError, TruncationWarning
from echo_integrations.recipe import Recipe, TokenRecipe


def checked(texts: Iterable[Any], name: str = "texts", first: int = 0) -> Iterator[str]:
    """The texts, each seen to be one.

    Raises:
        InputError: something that is no text, with its index and what to do.
    """
    if isinstance(texts, str | bytes | bytearray | Mapping | set | frozenset) or not isinstance(texts, Iterable):
        raise InputError(f"{name} is {_kind(texts)}: pass a list of strings")
    return _each_checked(texts, name, first)


def _each_checked(texts: Iterable[Any], name: str, first: int) -> Iterator[str]:
    for index, text in enumerate(texts, start=first):
        item = name if name == "instruction" else f"{name}[{index}]"
        if not isinstance(text, str):
            raise InputError(f"{item} is {_kind(text)}, not a string: leave it out or convert it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{item} has a lone surrogate, {text[error.start]!r}, at character {error.start}: it is no valid text; "
                "replace it with text.encode('utf-8', 'replace').decode()"
            ) from error
        yield text


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


class TruncationReport:
    """Says once a call that texts were cut, or refuses them."""

    def __init__(self, on_truncate: str, recipe: Recipe | TokenRecipe) -> None:
        self._on_truncate = OnTruncate(on_truncate)
        self._max_length = recipe.max_length
        self._bound = recipe.bound
        self._remedy = "split it" if recipe.clamped else "split it, raise max_length,"

    def check(self, item: str, length: int) -> None:
        """Note the length of a text or instruction before it is cut.

        Raises:
            TruncationError: too long, and ``on_truncate`` is ``"error"``.
        """
        if length <= self._max_length or self._on_truncate == OnTruncate.TRUNCATE:
            return
        what = f"{item} has {length} tokens, more than {self._bound}"
        if self._on_truncate == OnTruncate.ERROR:
            raise TruncationError(f"{what}: {self._remedy} or pass on_truncate='truncate'")
        warnings.warn(
            f"{what}: it was cut, and so is every longer text of this call; {self._remedy} "
            "or pass on_truncate='truncate' to cut without this warning",
            TruncationWarning,
            stacklevel=_callers_level(),
        )
        self._on_truncate = OnTruncate.TRUNCATE


def _callers_level() -> int:
    """The ``stacklevel`` that points at whoever called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith("echo_integrations"):
        level, frame = level + 1, frame.f_back
    return level
