r"""Recipes: from a text to token ids and the positions that are pooled.

A `TokenRecipe` puts trained tokens after a text (LLM2Vec-Gen), a `Recipe` fills a template. The template syntax is
that of the echo paper's released code:

* text outside braces is literal, and never pooled;
* ``{...}`` is pooled, ``{!...}`` is not;
* ``%%text%%`` and ``%%prompt%%`` (the instruction) inside braces are replaced.

Every piece is tokenised on its own, without automatic BOS or EOS, and a piece with a variable in it is cut to
``max_length`` tokens, so that both copies of a text are cut alike; literal pieces are never cut.
Special tokens such as ``</s>`` are special only where the *template* spells them. In a text or an instruction
they are plain characters, and so are braces, ``%%text%%`` and ``!``. What a tokenizer still recognises in texts
are its added tokens that are *not* special, such as Qwen3's ``<think>``.

This module knows nothing of models and batches.

Sources: Springer et al., "Repetition Improves Language Model Embeddings", arXiv 2402.15449; BehnamGhader et al.,
"LLM2Vec-Gen: Generative Embeddings from Large Language Models", arXiv 2603.10913.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from echo_integrations.config import InputError, Mode, Pooling, TemplateError

PRESETS: dict[str, str] = {
    "zero-shot": "<bos>Rewrite the following paragraph: {!%%text%%}. The rewritten paragraph: {%%text%%}",
    "zero-shot-sentence": "<bos>Rewrite the sentence: {!%%text%%}, rewritten sentence: {%%text%%}",
    "fine-tuned-query": "<bos>Instruct:{!%%prompt%%,}\nQuery:{!%%text%%}\nQuery again:{%%text%%}{<eos>}",
    "fine-tuned-document": "<bos>Document:{!%%text%%}\nDocument again:{%%text%%}{<eos>}",
    "classical": "<bos>{%%text%%}",
}
"""Templates by name. ``<bos>`` and ``<eos>`` stand for the backbone's own tokens, or for nothing where it has none.

``zero-shot`` is the prompt that the author confirmed, ``zero-shot-sentence`` the paper's other one, the
``fine-tuned`` pair is what the released echo checkpoints were trained on, ``classical`` is the one-copy baseline.
"""

DEFAULT_PRESET: dict[Mode, str] = {Mode.ECHO: "zero-shot", Mode.CLASSICAL: "classical"}

_VARIABLE = re.compile(r"%%(\w+)%%")
_VARIABLES = ("text", "prompt")

Ids = NDArray[np.int32]


class Tokenizer(Protocol):
    """What a recipe asks of a tokenizer; nothing here adds BOS or EOS, cuts or pads."""

    @property
    def bos(self) -> str:
        """Spelling of the BOS token, or ``""``."""

    @property
    def eos(self) -> str:
        """Spelling of the EOS token, or ``""``."""

    @property
    def prefix(self) -> Ids:
        """Token ids that the tokenizer itself puts in front of a text, such as BOS; often none."""

    @property
    def anchor_id(self) -> int:
        """The token that stands where there would be none at all: BOS, else EOS."""

    def literal(self, text: str) -> Ids:
        """Token ids of template text: special tokens are recognised."""

    def plain(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of users' texts: special tokens are plain characters."""

    def split_special(self, text: str) -> list[tuple[str, bool]]:
        """Template text cut at its special tokens: (piece, whether it is one)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of a template: ``parts`` are literals at even places and variable names at odd ones."""

    parts: tuple[str, ...]
    pooled: bool

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables in it, in order."""
        return self.parts[1::2]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text laid out for the model.

    Attributes:
        ids: (T,) token ids.
        spans: half-open ranges of positions whose hidden states are averaged, in order; never empty.
        length: tokens of the longest piece with the text in it *before* it was cut.
        tail: trained vectors that follow the ids.
        head: how many tokens at the beginning are the same whatever the text, none of them pooled.
    """

    ids: Ids
    spans: tuple[tuple[int, int], ...]
    length: int
    tail: int = 0
    head: int = 0

    @property
    def size(self) -> int:
        """Positions that it takes."""
        return len(self.ids) + self.tail


@lru_cache(maxsize=256)
def parse_template(template: str) -> tuple[Piece, ...]:
    """Split a template into its pieces.

    Args:
        template: a template in the released syntax (see the module's text).

    Raises:
        TemplateError: no braces, unbalanced or empty braces, an unknown variable, a variable outside braces,
            no ``%%text%%``, or nothing pooled; with the position of the fault.

    Example:
        >>> [piece.pooled for piece in parse_template("Say {!%%text%%} again: {%%text%%}")]
        [False, False, False, True]
    """

    def fault(position: int, what: str) -> TemplateError:
        return TemplateError(f"template {template!r}, position {position}: {what}")

    pieces: list[Piece] = []
    start = 0
    for match in re.finditer(r"[{}]", template):
        at = match.start()
        if at < start:
            continue  # inside the braces just read
        if match[0] == "}":
            raise fault(at, "'}' without '{' before it")
        end = next((m.start() for m in re.finditer(r"[{}]", template) if m.start() > at), None)
        if end is None:
            raise fault(at, "'{' without '}' after it")
        if template[end] == "{":
            raise fault(end, "'{' inside braces")
        literal, inside = template[start:at], template[at + 1 : end]
        if outside := _VARIABLE.search(literal):
            raise fault(start + outside.start(), f"{outside[0]} stands outside braces: write {{{outside[0]}}}")
        if literal:
            pieces.append(Piece((literal,), pooled=False))
        content = inside.removeprefix("!")
        if not content:
            raise fault(at, "empty braces")
        offset = end - len(content)
        for variable in _VARIABLE.finditer(content):
            if variable[1] not in _VARIABLES:
                known = " and ".join(f"%%{name}%%" for name in _VARIABLES)
                raise fault(offset + variable.start(), f"unknown variable {variable[0]}: there are {known}")
        pieces.append(Piece(tuple(_VARIABLE.split(content)), pooled=content == inside))
        start = end + 1
    if not pieces:
        names = ", ".join(PRESETS)
        raise fault(0, f"no braces, and not the name of a preset ({names}): write {{%%text%%}} for the text")
    if outside := _VARIABLE.search(template, start):
        raise fault(outside.start(), f"{outside[0]} stands outside braces: write {{{outside[0]}}}")
    if start < len(template):
        pieces.append(Piece((template[start:],), pooled=False))
    if not any("text" in piece.variables for piece in pieces):
        raise fault(0, "no {%%text%%} in it")
    if not any(piece.pooled for piece in pieces):
        raise fault(0, "nothing is pooled: leave the '!' out of one pair of braces")
    return tuple(pieces)


def check_template(template: str, instruction: str = "") -> None:
    """See that a template is well-formed and has a place for an instruction, if there is one.

    Raises:
        TemplateError: it is malformed.
        InputError: an instruction for a template that has no place for it.

    Example:
        >>> check_template("{!%%prompt%% }{%%text%%}", "Find the answer:")
    """
    pieces = parse_template(template)
    if instruction and not any("prompt" in piece.variables for piece in pieces):
        raise InputError(
            f"an instruction ({instruction!r}) was given but the template {template!r} has no place for it: "
            "write {!%%prompt%%} into the template where it should stand, for example '{!%%prompt%% }' at its beginning"
        )


def resolve_template(template: str | None, mode: Mode | str, bos: str, eos: str) -> str:
    """The template that a setting means: presets by name, None for the mode's own, anything else as it is.

    Args:
        template: preset name, template, or None.
        mode: whose default None means.
        bos: the backbone's BOS token, ``""`` for none.
        eos: the backbone's EOS token, ``""`` for none.

    Example:
        >>> resolve_template(None, Mode.CLASSICAL, bos="<s>", eos="</s>")
        '<s>{%%text%%}'
    """
    chosen = DEFAULT_PRESET[Mode(mode)] if template is None else template
    if chosen not in PRESETS:
        return chosen
    return PRESETS[chosen].replace("<bos>", bos).replace("{<eos>}", f"{{{eos}}}" if eos else "")


class Recipe:
    """A template made ready for one tokenizer; immutable, hence safe to share between threads.

    Args:
        template: a template (not a preset's name).
        tokenizer: the backbone's.
        max_length: tokens kept of every piece with a variable in it.
        positions: positions that the backbone has, None for no bound; ``max_length`` is clamped so that every
            variable piece can reach it.
        pooling: mean over all pooled positions, or the last of them.

    Attributes:
        max_length: after clamping.
        bound: the same in words.
        clamped: whether the backbone's positions made it smaller.

    Raises:
        TemplateError: a malformed template, or one whose literals alone fill all positions.
    """

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        max_length: int,
        positions: int | None = None,
        pooling: Pooling | str = Pooling.MEAN,
    ) -> None:
        self.template = template
        self._pooling = pooling
        self._tokenizer = tokenizer
        self._pieces = parse_template(template)
        self._literals = {p.parts[0]: tokenizer.literal(p.parts[0]) for p in self._pieces if not p.variables}
        self.max_length = max_length
        self.bound = f"max_length={max_length}"
        if positions is not None:
            fixed = sum(len(self._literals[p.parts[0]]) for p in self._pieces if not p.variables)
            room = (positions - fixed) // sum(bool(p.variables) for p in self._pieces)
            if room < 1:
                raise TemplateError(
                    f"template {template!r} has {fixed} tokens of its own, the backbone has {positions} positions"
                )
            self.max_length = min(max_length, room)
        self.clamped = self.max_length < max_length
        if self.clamped:
            self.bound = f"the {self.max_length} that the model allows"

    def render(self, texts: Sequence[str], instruction: str = "") -> list[Rendered]:
        """Lay out texts.

        Args:
            texts: any strings without lone surrogates.
            instruction: fills ``%%prompt%%``.

        Returns:
            One `Rendered` a text, in order.

        Raises:
            InputError: an instruction for a template that has no place for it.
        """
        check_template(self.template, instruction)
        pieces = {piece.parts: self._fill(piece.parts, texts, instruction) for piece in self._pieces}
        return [self._lay_out([pieces[piece.parts][row] for piece in self._pieces]) for row in range(len(texts))]

    def instruction_length(self, instruction: str) -> int:
        """Tokens of the longest piece with the instruction but no text in it, before it is cut.

        Raises:
            InputError: an instruction for a template that has no place for it.
        """
        check_template(self.template, instruction)
        pieces = [piece.parts for piece in self._pieces if set(piece.variables) == {"prompt"}]
        return max((len(self._tokenise(parts, "", instruction)) for parts in pieces), default=0)

    def _fill(self, parts: tuple[str, ...], texts: Sequence[str], instruction: str) -> Sequence[Ids]:
        """Token ids of one piece for every text, uncut."""
        variables = parts[1::2]
        if not variables:
            return [self._literals[parts[0]]] * len(texts)
        if "text" not in variables:
            return [self._tokenise(parts, "", instruction)] * len(texts)
        if all(not special for part in parts[::2] for _, special in self._tokenizer.split_special(part)):
            return self._tokenizer.plain([_substitute(parts, text, instruction) for text in texts])
        return [self._tokenise(parts, text, instruction) for text in texts]

    def _tokenise(self, parts: tuple[str, ...], text: str, instruction: str) -> Ids:
        """Token ids of one piece for one text, where its literals may hold special tokens."""
        runs: list[tuple[str, bool]] = []
        for place, part in enumerate(parts):
            values = [(text if part == "text" else instruction, False)]
            for value, special in self._tokenizer.split_special(part) if place % 2 == 0 else values:
                if special or not runs or runs[-1][1]:
                    runs.append((value, special))
                else:
                    runs[-1] = (runs[-1][0] + value, False)
        ids = [self._tokenizer.literal(s) if special else self._tokenizer.plain([s])[0] for s, special in runs]
        return np.concatenate(ids)

    def _lay_out(self, pieces: list[Ids]) -> Rendered:
        """Cut the pieces, join them and mark what is pooled."""
        ids: list[Ids] = []
        spans: list[tuple[int, int]] = []
        at = length = before = 0
        head: int | None = None
        for piece, piece_ids in zip(self._pieces, pieces, strict=True):
            if "text" in piece.variables:
                length = max(length, len(piece_ids))
            if piece.variables:
                piece_ids = piece_ids[: self.max_length]
            if head is None and ("text" in piece.variables or piece.pooled):
                head = at
            if piece.pooled:
                before = at
                if len(piece_ids):
                    spans.append((at, at + len(piece_ids)))
            ids.append(piece_ids)
            at += len(piece_ids)
        if not spans:  # an empty text: pool the token before its place, or one put there
            if before == 0:
                ids.insert(0, np.array([self._tokenizer.anchor_id], dtype=np.int32))
                before = 1
            spans.append((before - 1, before))
        if self._pooling == Pooling.LAST:
            spans = [(spans[-1][1] - 1, spans[-1][1])]
        return Rendered(np.concatenate(ids), tuple(spans), length, head=min(head or 0, spans[0][0]))


class TokenRecipe:
    """A text, and trained tokens after it, of which the last are read; immutable, hence safe to share.

    The tokenizer's own prefix (BOS), the instruction and the text are tokenised as one and cut to what
    ``max_length`` leaves beside the trained tokens, which always survive.

    Args:
        tokenizer: the backbone's.
        tokens: trained tokens, thought and compression.
        compression: how many of them are read, the last ones.
        max_length: positions for everything together.
        positions: positions that the backbone has, None for no bound; ``max_length`` is clamped to them.

    Attributes:
        max_length: tokens of prefix, instruction and text that are kept.
        bound: the same in words.
        clamped: whether the backbone's positions made it smaller.

    Raises:
        InputError: no position is left for a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, tokens: int, compression: int, max_length: int, positions: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._compression = compression
        limit = max_length if positions is None else min(max_length, positions)
        self.max_length = limit - tokens
        self.clamped = limit < max_length
        limited = f"the {limit} positions of the model" if self.clamped else f"max_length={limit}"
        self.bound = f"the {self.max_length} that {limited} leave beside {tokens} trained tokens"
        if self.max_length < 1 + len(tokenizer.prefix):
            raise InputError(
                f"{limited} leave no room for a text beside {tokens} trained tokens"
                + (f" and {len(tokenizer.prefix)} of the tokenizer" if len(tokenizer.prefix) else "")
                + f": give at least {tokens + len(tokenizer.prefix) + 1}"
            )

    def render(self, texts: Sequence[str], instruction: str = "") -> list[Rendered]:
        """Lay out texts.

        Args:
            texts: any strings without lone surrogates.
            instruction: stands before each text, joined to it by one space; ``""`` for none.

        Returns:
            One `Rendered` a text, in order.
        """
        ahead = f"{instruction.rstrip()} " if instruction.strip() else ""
        *plain, alone = self._tokenizer.plain([*(ahead + text for text in texts), ahead.rstrip()])
        prefix = self._tokenizer.prefix
        begin = np.concatenate([prefix, alone])
        return [self._lay_out(np.concatenate([prefix, ids]), begin) for ids in plain]

    def instruction_length(self, instruction: str) -> int:
        """Tokens of the instruction with the prefix, before anything is cut."""
        return len(self._tokenizer.prefix) + len(self._tokenizer.plain([instruction])[0])

    def _lay_out(self, uncut: Ids, begin: Ids) -> Rendered:
        """Cut ids to what there is room for; the tokens of ``begin`` that they begin with depend on no text."""
        ids = uncut[: self.max_length]
        most = min(len(ids), len(begin))
        differ = np.flatnonzero(ids[:most] != begin[:most])
        end = len(ids) + self._tokens
        return Rendered(
            ids,
            ((end - self._compression, end),),
            len(uncut),
            self._tokens,
            head=int(differ[0]) if len(differ) else most,
        )


def _substitute(parts: tuple[str, ...], text: str, instruction: str) -> str:
    """The piece's string: variables replaced once, so nothing inside a text is ever expanded."""
    values = {"text": text, "prompt": instruction}
    return "".join(values[part] if place % 2 else part for place, part in enumerate(parts))
