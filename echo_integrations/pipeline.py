"""One call of the encoder on its way: laid out, through the model beside what others ask for, finished, put in place.

This module knows nothing of single strings, progress bars and frameworks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from echo_integrations.backbone import Backbone, BackboneSpec
from echo_integrations.batching import distinct, one_ahead, slices, windows
from echo_integrations.config import EncoderSettings, EncodingError, Role
from echo_integrations.forward import Embedded, Row, submit
from echo_integrations.registry import registry
from echo_integrations.resolve import instruction_of, recipe_of, resolve
from echo_integrations.texts import TruncationReport, checked

Vectors = NDArray[np.float32]
Positions = NDArray[np.int64]

_WINDOW = 65_536  # texts that are sorted together, unless their characters come to more than
_WINDOW_CHARACTERS = 33_554_432
_SLICE = 4_096  # texts that are laid out while the ones before them are in the model, unless theirs come to more than
_SLICE_CHARACTERS = 524_288

_Slice = tuple[list[Future[list[Embedded]]], list[list[int]]]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Finished vectors.

    Attributes:
        positions: (m,) of the texts.
        vectors: (m, D) float32.
        states: (m, N, H) hidden states of their compression tokens, on the model's device, if there are any.
    """

    positions: Positions
    vectors: Vectors
    states: Tensor | None


class Call:
    """Texts of one role and instruction; every text comes out exactly once, in no particular order.

    Two slices of texts are on their way at a time: while the model works on one, the next is tokenised and queued.

    Args:
        encoder: the settings, and who uses the model.
        role: of the texts.
        instruction: in place of the role's own; ``""`` for none.
        first: number of the first text, for positions and messages.

    Raises:
        InputError, TruncationError: of the instruction.
        ModelLoadError, TokenSetError: the files cannot be used.
    """

    def __init__(self, encoder: EncoderSettings, role: Role, instruction: str | None, first: int = 0) -> None:
        self._encoder = encoder
        self._first = first
        self._checkpoint, self._token_set = resolve(encoder)
        given = instruction_of(encoder, role) if instruction is None else instruction
        self._instruction = next(checked([given], "instruction"))
        self._recipe = recipe_of(encoder, role, self._checkpoint, self._token_set)
        self._report = TruncationReport(encoder.on_truncate, self._recipe)
        self._report.check("the instruction", self._recipe.instruction_length(self._instruction))

    def batches(self, texts: Iterable[str]) -> Iterator[Batch]:
        """Embed texts.

        Raises:
            InputError, TruncationError, ModelLoadError, EncodingError: as `Encoder.encode_document`.
        """
        under_way: list[Future[list[Embedded]]] = []
        try:
            for futures, owners in one_ahead(self._slices(texts, under_way)):
                for future in futures:
                    yield from self._finished(future.result(), owners)
        finally:
            _cancel(under_way)

    async def abatches(self, texts: Iterable[str]) -> AsyncIterator[Batch]:
        """As `batches`, on any event loop; only laying texts out takes a thread, waiting takes none."""
        under_way: list[Future[list[Embedded]]] = []
        coming = one_ahead(self._slices(texts, under_way))
        given_up = threading.Event()

        def following() -> _Slice | None:
            item = next(coming, None)
            if given_up.is_set():  # meanwhile
                _cancel(under_way)
            return item

        try:
            while (item := await asyncio.to_thread(following)) is not None:
                futures, owners = item
                for future in futures:
                    parts = await asyncio.wrap_future(future)
                    for batch in self._finished(parts, owners):
                        yield batch
        finally:
            given_up.set()
            _cancel(under_way)

    def _slices(self, texts: Iterable[str], under_way: list[Future[list[Embedded]]]) -> Iterator[_Slice]:
        """Texts of similar length: futures of their batches, noted in ``under_way``, and where each text stands."""
        first = self._first
        backbone: Backbone | None = None
        for window in windows(checked(texts, first=first), _WINDOW, weight=len, most=_WINDOW_CHARACTERS):
            places = {text: [first + i for i in indices] for text, indices in distinct(window).items()}
            first += len(window)
            for run in slices(places, _SLICE_CHARACTERS, _SLICE):
                owners = [places[text] for text in run]
                rows = [
                    Row(rendered, f"texts[{own[0]}]", self._token_set)
                    for rendered, own in zip(self._recipe.render(run, self._instruction), owners, strict=True)
                ]
                for row in rows:
                    self._report.check(row.name, row.rendered.length)
                backbone = backbone or registry.acquire(
                    BackboneSpec.of(self._encoder, self._checkpoint, self._token_set), self._encoder
                )
                futures = submit(backbone, rows, self._encoder.token_budget)
                under_way[:] = [*(future for future in under_way if not future.done()), *futures]
                yield futures, owners

    def _finished(self, parts: Sequence[Embedded], owners: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """What the model gave, ready for the caller: a row for each text, repeated ones included."""
        for part in parts:
            own = [owners[row] for row in part.rows]
            vectors = self._finish(part.vectors, [positions[0] for positions in own])
            repeats = [len(positions) for positions in own]
            states = part.states
            if states is not None and max(repeats) > 1:
                states = states[np.repeat(np.arange(len(repeats)), repeats)]
            yield Batch(np.concatenate(own), np.repeat(vectors, repeats, axis=0), states)

    def _finish(self, vectors: Vectors, numbers: Sequence[int]) -> Vectors:
        """(B, D): cut, normalised, and free of anything that is no number."""
        vectors = vectors[:, : self._encoder.truncate_dim]
        sizes = np.linalg.norm(vectors, axis=1)
        usable = np.isfinite(sizes) & (sizes > 0)
        if not usable.all():
            bad = int(np.argmin(usable))
            raise EncodingError(
                f"the model gave {'a zero vector' if sizes[bad] == 0 else 'NaN or infinity'} for "
                f"texts[{numbers[bad]}]: try dtype='float32'; if that does not help, the weights are damaged"
            )
        return cast(Any, vectors / sizes[:, None]) if self._encoder.normalize_embeddings else vectors


def _cancel(futures: Iterable[Future[list[Embedded]]]) -> None:
    """Take what is still queued out of the queue: the call is over, or was given up."""
    for future in futures:
        future.cancel()
