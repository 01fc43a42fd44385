import pytest
import torch

from echo_integrations.pooling import pool

HIDDEN = torch.tensor([[[1.0, 0.0], [2.0, 4.0], [6.0, 8.0]], [[10.0, 20.0], [30.0, 40.0], [-7.0, -7.0]]])  # (2, 3, 2)


def test_mean_of_the_marked_positions() -> None:
    assert pool(HIDDEN, [[(1, 3)], [(0, 2)]]).tolist() == [[4.0, 6.0], [20.0, 30.0]]


def test_one_position_a_row_is_that_position() -> None:
    assert pool(HIDDEN, [[(1, 2)], [(0, 1)]]).tolist() == [[2.0, 4.0], [10.0, 20.0]]


def test_several_spans_are_one_mean_over_tokens() -> None:
    # (1 + 6) / 2, (0 + 8) / 2
    assert pool(HIDDEN[:1], [[(0, 1), (2, 3)]]).tolist() == [[3.5, 4.0]]


def test_what_is_not_marked_does_not_matter() -> None:
    other = HIDDEN.clone()
    other[1, 2] = torch.inf
    spans = [[(0, 3)], [(0, 2)]]
    assert torch.equal(pool(HIDDEN, spans), pool(other, spans))


@pytest.mark.parametrize(("span", "expected"), [((0, 258), 260 / 258), ((257, 258), 3.0)])
def test_half_precision_is_pooled_in_float32(span: tuple[int, int], expected: float) -> None:
    # 257 tokens of 1 and one of 3 in bfloat16: summed in bfloat16 the sum would stick at 256
    hidden = torch.ones(1, 258, 1, dtype=torch.bfloat16)
    hidden[0, -1] = 3.0
    pooled = pool(hidden, [[span]])
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(expected, rel=1e-6)
