from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_integrations.batching import distinct, one_ahead, plan, slices, windows


def test_the_longest_come_first_and_fill_the_budget() -> None:
    # 8 alone (16 > 12); 4 + 4 + 4 = 12; then 1
    assert plan([4, 8, 4, 1, 4], token_budget=12) == [[1], [0, 2, 4], [3]]


def test_a_text_longer_than_the_budget_goes_alone() -> None:
    assert plan([100, 2, 2], token_budget=10) == [[0], [1, 2]]


def test_rows_are_bounded() -> None:
    assert [len(batch) for batch in plan([1] * 7, token_budget=100, max_batch=3)] == [3, 3, 1]


def test_nothing_gives_nothing() -> None:
    assert plan([], 10) == [] and list(windows([], 3)) == [] and list(slices([], 9, 9)) == [] and distinct([]) == {}


@given(st.lists(st.integers(1, 50)), st.integers(1, 200), st.integers(1, 9))
def test_every_text_stands_in_one_batch_within_the_bounds(lengths: list[int], budget: int, rows: int) -> None:
    batches = plan(lengths, budget, rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        assert sum(max(lengths[j] for j in batch) - lengths[i] for i in batch) * 20 <= budget
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.text(max_size=20)), st.integers(1, 60), st.integers(1, 5))
def test_slices_keep_every_text_within_their_bounds(texts: list[str], characters: int, most: int) -> None:
    runs = list(slices(texts, characters, most))
    assert sorted(text for run in runs for text in run) == sorted(texts)
    for run in runs:
        assert len(run) <= most
        assert len(run) == 1 or sum(map(len, run)) <= characters
    lengths = [len(text) for run in runs for text in run]
    assert lengths == sorted(lengths, reverse=True)


@given(st.lists(st.sampled_from(["a", "b", "c"])))
def test_distinct_texts_know_their_places(texts: list[str]) -> None:
    places = distinct(texts)
    assert sorted(i for indices in places.values() for i in indices) == list(range(len(texts)))
    assert all(texts[i] == text for text, indices in places.items() for i in indices)


def test_windows_close_when_they_are_heavy() -> None:
    assert list(windows(["a", "bbb", "cc", "d"], 3, weight=len, most=4)) == [["a", "bbb"], ["cc", "d"]]


def test_windows_take_no_more_than_they_give() -> None:
    taken = []

    def stream() -> object:
        for i in range(10):
            taken.append(i)
            yield i

    first = next(windows(stream(), 3))  # type: ignore[arg-type]
    assert first == [0, 1, 2] and taken == [0, 1, 2]


def test_little_of_many_texts_is_padding() -> None:
    lengths = [1 + i * i % 300 for i in range(5_000)]
    batches = plan(lengths, token_budget=2_048)
    positions = sum(len(batch) * lengths[batch[0]] for batch in batches)
    assert sum(lengths) < positions <= 1.05 * sum(lengths)


def test_an_item_is_handed_over_once_the_next_is_made() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number
        raise ValueError("no fourth")

    ahead = one_ahead(items())
    assert (next(ahead), made) == (0, [0, 1])
    assert (next(ahead), made) == (1, [0, 1, 2])
    assert next(ahead) == 2  # the error comes after what was made before it
    with pytest.raises(ValueError, match="no fourth"):
        next(ahead)
    assert list(one_ahead([])) == [] and list(one_ahead("a")) == ["a"]
