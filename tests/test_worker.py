"""One thread for many callers: what is gathered, whose turn it is, and who fails."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_integrations.worker import Worker

Calls = list[list[int]]


class Held:
    """A worker whose thread is held back until the test has asked for everything."""

    def __init__(self) -> None:
        self.worker = Worker("test")
        self.calls: Calls = []
        self._open = threading.Event()
        self._holding = threading.Thread(target=lambda: self.worker.call(self._open.wait))
        self._holding.start()
        while not self.worker._thread._threads:  # its one thread is there, and waits
            pass

    def serve(self, jobs: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Squares; a negative one is an error, after what stands before it."""
        self.calls.append(list(jobs))
        for index, job in enumerate(jobs):
            if job < 0:
                raise ValueError(f"{job} is negative")
            yield index, job * job

    def ask(self, job: int, size: int = 1, room: int = 8) -> Future[int]:
        return self.worker.submit(job, size, room, self.serve)

    def go(self) -> None:
        self._open.set()
        self._holding.join()


def test_a_lone_request_is_served_alone_and_at_once() -> None:
    worker = Worker("test")
    calls: Calls = []

    def serve(jobs: Sequence[int]) -> Iterator[tuple[int, int]]:
        calls.append(list(jobs))
        yield from enumerate(jobs)

    assert [worker.submit(job, 1, 8, serve).result() for job in (3, 1, 2)] == [3, 1, 2]
    assert calls == [[3], [1], [2]]


def test_small_requests_that_wait_are_served_together_as_far_as_there_is_room() -> None:
    held = Held()
    futures = [held.ask(job, size=3, room=8) for job in range(5)]
    held.go()
    assert [future.result() for future in futures] == [0, 1, 4, 9, 16]
    assert held.calls == [[0, 1], [2, 3], [4]]


def test_large_and_small_requests_take_turns() -> None:
    held = Held()
    large = [held.ask(job, size=8) for job in (100, 101, 102)]
    small = [held.ask(job, size=4) for job in range(5)]
    held.go()
    assert [future.result() for future in large] == [10_000, 10_201, 10_404]
    assert [future.result() for future in small] == [0, 1, 4, 9, 16]
    assert held.calls == [[0, 1], [100], [2, 3], [101], [4], [102]]


def test_jobs_of_another_kind_are_not_mixed_in() -> None:
    held = Held()

    def double(jobs: Sequence[int]) -> Iterator[tuple[int, int]]:
        held.calls.append([-job for job in jobs])
        yield from enumerate(2 * job for job in jobs)

    futures = [held.ask(1), held.ask(2), held.worker.submit(3, 1, 8, double), held.ask(4)]
    held.go()
    assert [future.result() for future in futures] == [1, 4, 6, 16]
    assert held.calls == [[1, 2], [-3], [4]]


def test_one_that_fails_fails_alone() -> None:
    held = Held()
    futures = [held.ask(job) for job in (1, 2, -3, 4)]
    held.go()
    assert [futures[i].result() for i in (0, 1, 3)] == [1, 4, 16]
    with pytest.raises(ValueError, match="-3 is negative"):
        futures[2].result()
    assert held.calls == [[1, 2, -3, 4], [-3], [4]]  # what had its result was not done again


def test_a_cancelled_request_gives_up_its_place() -> None:
    held = Held()
    futures = [held.ask(job, size=4) for job in (1, 2, 3)]
    assert futures[1].cancel()
    held.go()
    assert (futures[0].result(), futures[2].result()) == (1, 9)
    with pytest.raises(CancelledError):
        futures[1].result()
    assert held.calls == [[1, 3]]


def test_calls_run_on_the_same_thread() -> None:
    worker = Worker("test")
    threads = {worker.call(threading.current_thread) for _ in range(3)}
    assert len(threads) == 1 and threading.current_thread() not in threads
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 // 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 30), st.integers(1, 12), st.booleans()), max_size=30))
def test_everyone_is_answered_with_their_own(asked: list[tuple[int, int, bool]]) -> None:
    held = Held()
    futures = [held.ask(job, size) for job, size, _ in asked]
    cancelled = [cancel and future.cancel() for future, (_, _, cancel) in zip(futures, asked, strict=True)]
    held.go()
    for future, (job, _, _), gone in zip(futures, asked, cancelled, strict=True):
        if gone:
            assert future.cancelled()
        elif job < 0:
            assert isinstance(future.exception(), ValueError)
        else:
            assert future.result() == job * job
    sizes: dict[int, list[int]] = {}
    for job, size, _ in asked:
        sizes.setdefault(job, []).append(size)
    for call in held.calls:
        assert len(call) == 1 or sum(min(sizes[job]) for job in call) <= 8
