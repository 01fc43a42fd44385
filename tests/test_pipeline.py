"""Calls on their way: concurrent ones share batches, each gets its own, and one that fails or is given up is alone."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echo_integrations import pipeline
from echo_integrations.config import EncodingError, InputError, Mode, Role, TruncationError
from echo_integrations.encoder import Encoder
from echo_integrations.pipeline import Call
from tests.conftest import backbone_of

Mini = Callable[..., Encoder]
QUESTIONS = [f"where is valve {i} {'of the pump ' * (i % 4)}?" for i in range(64)]


@contextmanager
def passes(encoder: Encoder) -> Iterator[list[int]]:
    """Rows of each pass through the model meanwhile."""
    rows: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else kwargs["inputs_embeds"]))

    handle = backbone_of(encoder).model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def busy(encoder: Encoder) -> Iterator[threading.Event]:
    """The model's thread has something else to do until the event is set."""
    release, begun = threading.Event(), threading.Event()
    worker = backbone_of(encoder).worker
    other = threading.Thread(target=lambda: worker.call(lambda: (begun.set(), release.wait())))
    other.start()
    begun.wait()
    try:
        yield release
    finally:
        release.set()
        other.join()


async def all_are_waiting(encoder: Encoder, requests: int) -> None:
    worker = backbone_of(encoder).worker
    while len(worker._small) + len(worker._large) < requests:
        await asyncio.sleep(0.001)


async def test_tasks_that_ask_at_once_share_a_batch(mini: Mini) -> None:
    encoder = mini(mode="classical")
    expected = encoder.encode_query(QUESTIONS)
    with passes(encoder) as rows:
        with busy(encoder) as release:
            tasks = [asyncio.ensure_future(encoder.aencode_query(question)) for question in QUESTIONS]
            await all_are_waiting(encoder, len(tasks))
            release.set()
        vectors = await asyncio.gather(*tasks)
    assert sum(rows) == 64 and len(rows) <= 3  # 64 questions of about 15 tokens, 2 048 a pass
    assert np.abs(np.stack(vectors) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_threads_and_several_event_loops_share_batches_too(mini: Mini) -> None:
    encoder = mini(mode="classical")
    expected = encoder.encode_query(QUESTIONS)

    def ask(number: int) -> np.ndarray:
        if number % 2:
            return asyncio.run(encoder.aencode_query(QUESTIONS[number]))
        return encoder.encode_query(QUESTIONS[number])

    with passes(encoder) as rows, ThreadPoolExecutor(32) as pool:
        with busy(encoder) as release:
            vectors = pool.map(ask, range(32))
            asyncio.run(all_are_waiting(encoder, 32))
            release.set()
        got = np.stack(list(vectors))
    assert sum(rows) == 32 and len(rows) <= 2
    assert np.abs(got - expected[:32]).max() <= 1e-5 * np.abs(expected).max()


async def test_modes_and_token_sets_share_a_batch(mini: Mini, mini_tokens: Path) -> None:
    encoders = [
        mini(),
        mini(mode="classical", truncate_dim=7),
        mini(mode=Mode.LLM2VEC_GEN, token_set=mini_tokens, query_instruction=""),
        mini(mode=Mode.LLM2VEC_GEN, query_instruction="Ask:"),
    ]
    expected = [encoder.encode_query("rain") for encoder in encoders]
    with passes(encoders[0]) as rows:
        with busy(encoders[0]) as release:
            tasks = [asyncio.ensure_future(encoder.aencode_query("rain")) for encoder in encoders]
            await all_are_waiting(encoders[0], len(tasks))
            release.set()
        vectors = await asyncio.gather(*tasks)
    assert rows == [4]
    for got, own in zip(vectors, expected, strict=True):
        assert np.abs(got - own).max() <= 1e-5 * np.abs(own).max()


async def test_one_failing_text_fails_its_own_caller_only(mini: Mini) -> None:
    encoder, strict = mini(mode="classical"), mini(mode="classical", max_length=3, on_truncate="error")
    encoder.encode("warm")

    def no_memory_for_snow(module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> None:
        if (kwargs["input_ids"] == snow).any():
            raise RuntimeError("a kernel failed")

    snow = int(resolve_ids(encoder, "snow")[-1])
    handle = backbone_of(encoder).model.register_forward_pre_hook(no_memory_for_snow, with_kwargs=True)
    try:
        with busy(encoder) as release:
            asked: list[Any] = [encoder.aencode_query(text) for text in ("rain", "snow", "hail")]
            tasks = [asyncio.ensure_future(task) for task in (*asked, strict.aencode_query("a b c d e f g"))]
            await all_are_waiting(encoder, 3)
            release.set()
        rain, snowy, hail, long = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        handle.remove()
    assert isinstance(snowy, RuntimeError) and isinstance(long, TruncationError)
    np.testing.assert_allclose(rain, encoder.encode_query("rain"), atol=1e-6)
    np.testing.assert_allclose(hail, encoder.encode_query("hail"), atol=1e-6)


def resolve_ids(encoder: Encoder, text: str) -> np.ndarray:
    call = Call(encoder, Role.QUERY, None)
    return call._recipe.render([text])[0].ids


async def test_a_cancelled_call_frees_its_place(mini: Mini) -> None:
    encoder = mini(mode="classical")
    encoder.encode("warm")
    with passes(encoder) as rows:
        with busy(encoder) as release:
            kept = asyncio.ensure_future(encoder.aencode_query("rain"))
            gone = asyncio.ensure_future(encoder.aencode_document([f"text {i}" for i in range(40)]))
            await all_are_waiting(encoder, 2)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            release.set()
        await kept
    assert rows == [1]


async def test_a_call_that_is_cancelled_while_it_is_laid_out_frees_its_place_too(
    mini: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = mini(mode="classical")
    encoder.encode("warm")
    queued, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    submit = pipeline.submit

    def slow(*args: Any) -> Any:
        futures = submit(*args)
        queued.set()
        go_on.wait()
        futures[0].add_done_callback(lambda _: closed.set())
        return futures

    monkeypatch.setattr(pipeline, "submit", slow)
    with passes(encoder) as rows:
        with busy(encoder) as release:
            gone = asyncio.ensure_future(encoder.aencode_document(["a", "b", "c"]))
            while not queued.is_set():
                await asyncio.sleep(0.001)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            go_on.set()
            assert await asyncio.to_thread(closed.wait, 60)
            release.set()
        monkeypatch.undo()
        await encoder.aencode_query("rain")
    assert rows == [1]


def test_a_call_that_is_given_up_leaves_nothing_in_the_queue(mini: Mini) -> None:
    encoder = mini(mode="classical", token_budget=40)
    encoder.encode("warm")
    batches = encoder.encode_batches(QUESTIONS)
    next(batches)
    batches.close()
    worker = backbone_of(encoder).worker
    with passes(encoder) as rows:
        while worker._small or worker._large:
            worker.call(lambda: None)
    assert sum(rows) <= 2  # the one under way


async def test_the_event_loop_stays_free(mini: Mini) -> None:
    encoder = mini(mode="classical")
    with busy(encoder) as release:
        task = asyncio.ensure_future(encoder.aencode_query("rain"))
        await all_are_waiting(encoder, 1)  # the loop turns while the call waits
        assert not task.done()
        release.set()
    assert (await task).shape == (256,)


async def test_async_calls_give_and_refuse_what_the_others_do(mini: Mini) -> None:
    encoder = mini(document_template="classical")
    np.testing.assert_array_equal(await encoder.aencode_document(QUESTIONS[:5]), encoder.encode_document(QUESTIONS[:5]))
    np.testing.assert_array_equal(await encoder.aencode("a", role="query"), encoder.encode_query("a"))
    assert (await encoder.aencode([])).shape == (0, 256)
    with pytest.raises(InputError, match=r"texts\[1\] is None"):
        await encoder.aencode(["a", None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="no place for it"):
        await encoder.aencode(["a"], instruction="Find:")


def test_errors_of_a_later_slice_come_after_the_vectors_before_it(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_integrations.pipeline._SLICE", 4)
    monkeypatch.setattr("echo_integrations.pipeline._WINDOW", 4)
    texts: list[Any] = [*QUESTIONS[:6], None]
    done = []
    with pytest.raises(InputError, match=r"texts\[6\] is None"):
        for positions, _ in mini(mode="classical").encode_batches(texts):
            done += positions.tolist()
    assert sorted(done) == [0, 1, 2, 3]


def test_nan_in_one_callers_text_is_not_seen_by_another(mini: Mini) -> None:
    encoder = mini(mode="classical")
    encoder.encode("warm")

    def first_row_is_nan(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[0] = torch.nan
        return output

    handle = backbone_of(encoder).model.norm.register_forward_hook(first_row_is_nan)
    try:
        with ThreadPoolExecutor(2) as pool, busy(encoder) as release:
            long, short = pool.submit(encoder.encode, "the longest of both"), pool.submit(encoder.encode, "a")
            asyncio.run(all_are_waiting(encoder, 2))
            release.set()
            assert isinstance(long.exception(), EncodingError)  # the longest goes first
            assert np.isfinite(short.result()).all()
    finally:
        handle.remove()
