import pytest
import torch

from echo_integrations.config import Pooling
from echo_integrations.pooling import pool

HIDDEN = torch.tensor([[[1.0, 0.0], [2.0, 4.0], [6.0, 8.0]], [[10.0, 20.0], [30.0, 40.0], [-7.0, -7.0]]])  # (2, 3, 2)


def test_mean_of_the_marked_positions() -> None:
    assert pool(HIDDEN, [[(1, 3)], [(0, 2)]], Pooling.MEAN).tolist() == [[4.0, 6.0], [20.0, 30.0]]


def test_last_of_the_marked_positions() -> None:
    assert pool(HIDDEN, [[(0, 2)], [(0, 1), (1, 2)]], Pooling.LAST).tolist() == [[2.0, 4.0], [30.0, 40.0]]


def test_several_spans_are_one_mean_over_tokens() -> None:
    # (1 + 6) / 2, (0 + 8) / 2
    assert pool(HIDDEN[:1], [[(0, 1), (2, 3)]], Pooling.MEAN).tolist() == [[3.5, 4.0]]


def test_what_is_not_marked_does_not_matter() -> None:
    other = HIDDEN.clone()
    other[1, 2] = torch.inf
    spans = [[(0, 3)], [(0, 2)]]
    assert torch.equal(pool(HIDDEN, spans, Pooling.MEAN), pool(other, spans, Pooling.MEAN))


@pytest.mark.parametrize("pooling", list(Pooling))
def test_half_precision_is_pooled_in_float32(pooling: Pooling) -> None:
    # 257 tokens of 1 and one of 3 in bfloat16: summed in bfloat16 the sum would stick at 256
    hidden = torch.ones(1, 258, 1, dtype=torch.bfloat16)
    hidden[0, -1] = 3.0
    pooled = pool(hidden, [[(0, 258)]], pooling)
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(260 / 258 if pooling is Pooling.MEAN else 3.0, rel=1e-6)
