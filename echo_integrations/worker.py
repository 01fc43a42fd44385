"""One thread that serves many callers: what they ask for while it is busy is served together.

Whoever comes while the thread is idle is served at once and alone; nobody waits for company. This module knows
nothing of models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

Serve = Callable[[Sequence[Job]], Iterator[tuple[int, Result]]]


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    job: Any
    size: int
    room: int
    serve: Serve[Any, Any]
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """Runs functions on one thread, one after the other, and gathers small requests into common ones.

    The thread starts with the first request and ends with the process, which answers what was asked before.

    Args:
        name: of the thread.

    Example:
        >>> worker = Worker("adder")
        >>> def serve(jobs):
        ...     yield from enumerate(sum(job) for job in jobs)
        >>> worker.submit([1, 2], size=2, room=8, serve=serve).result()
        3
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._small: deque[_Request] = deque()
        self._large: deque[_Request] = deque()
        self._large_is_next = False

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the thread, after what is under way there, and wait for it."""
        return self._thread.submit(function).result()

    def submit(self, job: Job, size: int, room: int, serve: Serve[Job, Result]) -> Future[Result]:
        """Ask for a job to be done; jobs that fit into the room together are handed over in one call.

        Small jobs and those that fill more than half of the room take turns, so that neither wait for all of the
        others.

        Args:
            job: whatever ``serve`` takes.
            size: how much room it needs.
            room: what one call can hold.
            serve: takes jobs, and yields the index and the result of each as soon as it is there. Where it raises,
                every job without a result is tried alone, so that only those fail which fail alone.

        Returns:
            A future; cancelled before the job's turn it gives up its place.
        """
        request = _Request(job, size, room, serve)
        (self._large if size > room // 2 else self._small).append(request)
        self._thread.submit(self._turn)
        return request.future

    def _turn(self) -> None:
        """Serve the requests whose turn it is, if any are left; there are at least as many turns as requests."""
        if requests := self._next():
            self._serve(requests)

    def _serve(self, requests: Sequence[_Request]) -> None:
        """Answer requests; where that fails, each that has no answer yet by itself, and a lone one with the error."""
        try:
            for index, result in requests[0].serve([request.job for request in requests]):
                requests[index].future.set_result(result)
        except BaseException as error:  # handed to whoever waits for it
            for request in (request for request in requests if not request.future.done()):
                if len(requests) == 1:
                    request.future.set_exception(error)
                else:
                    self._serve([request])

    def _next(self) -> list[_Request]:
        """A large request, or small ones that fit together, the oldest first; empty where all were cancelled."""
        large = bool(self._large) and (self._large_is_next or not self._small)
        line = self._large if large else self._small
        taken: list[_Request] = []
        room = 0
        while line and not (taken and (large or line[0].size > room or line[0].serve != taken[0].serve)):
            request = line.popleft()
            if request.future.set_running_or_notify_cancel():
                room = (room if taken else request.room) - request.size
                taken.append(request)
        self._large_is_next = not large
        return taken
