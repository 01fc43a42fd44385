"""Which texts go through the model together: order, batches, windows. Pure; knows nothing of tokens or models."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def plan(lengths: Sequence[int], token_budget: int, max_batch: int = 1024) -> list[list[int]]:
    """Group texts of similar length into batches, the longest first.

    Longest first means that memory peaks in the first batch, so that running out of it shows at once. Padding is kept
    under a twentieth of the budget, even at the price of a batch more.

    Args:
        lengths: tokens of each text.
        token_budget: bound on rows x longest row of a batch; a text that is longer gets a batch of its own.
        max_batch: bound on rows.

    Returns:
        Batches of indices into ``lengths``; every index stands in exactly one.

    Example:
        >>> plan([3, 9, 2, 3], token_budget=20)
        [[1], [0, 3, 2]]
    """
    batches: list[list[int]] = []
    padding = longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padding += longest - lengths[index]
        size = longest * (len(batches[-1]) + 1) if batches else 0
        if batches and len(batches[-1]) < max_batch and size <= token_budget and padding * 20 <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            padding, longest = 0, lengths[index]
    return batches


def windows(
    items: Iterable[T], size: int, weight: Callable[[T], int] = lambda _: 0, most: int = 1
) -> Iterator[list[T]]:
    """Cut a stream into lists of ``size`` items, or earlier where their weights come to ``most``.

    Example:
        >>> list(windows("abcde", 2))
        [['a', 'b'], ['c', 'd'], ['e']]
        >>> list(windows(["a", "bbbb", "c"], 9, weight=len, most=4))
        [['a', 'bbbb'], ['c']]
    """
    window: list[T] = []
    total = 0
    for item in items:
        window.append(item)
        total += weight(item)
        if len(window) == size or total >= most:
            yield window
            window, total = [], 0
    if window:
        yield window


def distinct(texts: Sequence[str]) -> dict[str, list[int]]:
    """Where each distinct text stands, so that it is encoded once.

    Example:
        >>> distinct(["a", "b", "a"])
        {'a': [0, 2], 'b': [1]}
    """
    places: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        places.setdefault(text, []).append(index)
    return places


def slices(texts: Iterable[str], characters: int, max_texts: int) -> Iterator[list[str]]:
    """Cut texts into runs of about ``characters`` characters, longest text first.

    Characters stand in for tokens before anything is tokenised: a run is small enough to be tokenised while the
    one before it is in the model, and its texts are of similar length.

    Example:
        >>> list(slices(["a", "dddd", "bb"], characters=4, max_texts=9))
        [['dddd'], ['bb', 'a']]
    """
    run: list[str] = []
    size = 0
    for text in sorted(texts, key=len, reverse=True):
        if run and (size + len(text) > characters or len(run) >= max_texts):
            yield run
            run, size = [], 0
        run.append(text)
        size += len(text)
    if run:
        yield run


def one_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Each item once the next one has been made, too; what making that raises comes after the item before it.

    Example:
        >>> made = []
        >>> for item in one_ahead(made.append(i) or i for i in range(3)):
        ...     print(item, made)
        0 [0, 1]
        1 [0, 1, 2]
        2 [0, 1, 2]
    """
    source = iter(items)
    waiting: list[T] = []
    try:
        for item in source:
            yield from waiting
            waiting = [item]
    except Exception:
        yield from waiting
        raise
    yield from waiting
